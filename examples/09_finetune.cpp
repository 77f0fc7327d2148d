// SPDX-License-Identifier: Apache-2.0
//
// examples/09_finetune.cpp - fine-tune a decode module on the cache of a frozen base.
//
//   finetune --model MODEL --data FILE.jsonl --out OUT_DIR --method prefillshare --steps 200
//
// Lines of the data are {"prompt": "...", "target": "..."}. MODEL is a GGUF file or a Hugging Face folder;
// --base names another one where it has been fine-tuned before. Methods: prefillshare reads the prompt from
// the base's cache, full runs it itself, naive-eval trains nothing and reports the loss of MODEL both on its
// own cache and on the base's. Parameters: all weights, low-rank deltas (merged in the end), or the
// codebooks, scales and norms of a folder that 06_quantize.cpp wrote. A run that was stopped goes on where it
// was. 09_finetune_gpu.cu is the same with --device gpu.
// test: --model {model} --data {source}/examples/data/capitals.jsonl --out {work}/tuned --parameters lora --steps 2 --batch 2 --limit 4
// test: --model {model} --data {source}/examples/data/capitals.jsonl --method naive-eval --limit 4

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <codegemm/io/model_checkpoint.hpp>
#include <common/config_json_writer.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/model_writer.hpp>
#include <common/progress.hpp>
#include <common/run_program.hpp>
#include <common/training_data.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/train/trainer.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options {
  std::string model, base, data, held_out, out, method = "prefillshare", parameters = "full", device = "cpu";
  double sharing = -1.0;
  std::int64_t limit = 0;
  std::int64_t save_every = 50;
  int threads = 0;
  bool plain = false;
  bool constant = false;
  TrainOptions train;
  LowRankOptions low_rank;
};

using Matrices = std::map<std::string, codegemm::QuantizedMatrix>;

// [guide: checkpoint]
Matrices quantized_layers(const std::string& folder) {
  const codegemm::ModelCheckpoint checkpoint = unwrap(codegemm::ModelCheckpoint::open(folder));
  Matrices out;
  for (const codegemm::CheckpointEntry& entry : checkpoint.entries())
    out.emplace(entry.name, unwrap(checkpoint.load(entry.name)));
  return out;
}
// [guide: end]

// [guide: trainable]
TrainableModel<float> trainable(const Options& options, const LoadedModel& loaded) {
  if (options.parameters == "lora")
    return unwrap(TrainableModel<float>::low_rank(loaded.model, options.low_rank));
  if (options.parameters == "codebooks")
    return unwrap(TrainableModel<float>::codebooks(loaded.model, quantized_layers(options.model)));
  return unwrap(TrainableModel<float>::full(loaded.model));
}
// [guide: end]

/// A folder with the tuned model: dense in fp32, or quantized as it came, with its norms.
void write_result(const Options& options, const TensorSource& source, const TrainableModel<float>& model,
                  Executor& executor) {
  if (options.parameters != "codebooks") {
    const auto dense = unwrap(model.dense(executor));
    nlohmann::json config = unwrap(source_config(source));
    config.erase("quantization_config");
    config.erase("codegemm");
    config["torch_dtype"] = "float32";
    check(save_model(options.out + "/model.safetensors", *dense));
    check(codegemm::write_file(options.out + "/config.json", config.dump(2)));
    return;
  }
  const Matrices matrices = model.matrices();
  std::vector<codegemm::NamedMatrix> named;
  for (const auto& [name, matrix] : matrices) named.push_back({name, matrix.view()});
  ReplacedTensors norms;
  for (const Parameter<float>& p : model.parameters()) {
    if (p.name.find("norm.weight") != std::string::npos)
      norms[p.name].assign(p.value.span().begin(), p.value.span().end());
  }
  const auto kind = unwrap(codegemm::ModelCheckpoint::open(options.model)).kind();
  check(write_quantized_model(source, options.out, kind, named, norms));
}

/// Trains and judges with a Trainer, or with a cuda::DeviceTrainer, which has its members.
template <class AnyTrainer>
void tune(const Options& options, AnyTrainer& trainer, const std::vector<TrainingExample>& judged) {
  // [guide: evaluate]
  const auto report = [&](const char* when) {
    const double own = unwrap(trainer.evaluate(judged, 0.0));
    const double shared = unwrap(trainer.evaluate(judged, 1.0));
    std::printf("%s: loss %.4f on its own cache, %.4f on the base's\n", when, own, shared);
    std::fflush(stdout);
  };
  // [guide: end]
  if (options.method == "naive-eval") return report("as it is");
  report("before");

  std::filesystem::create_directories(options.out);
  const std::string state = options.out + "/state.safetensors";
  if (std::filesystem::exists(state)) {
    check(trainer.load(state));
    std::printf("going on after step %lld\n", static_cast<long long>(trainer.steps_done()));
  }
  ProgressLine line("fine-tuning");
  const Status status = trainer.run(state, options.save_every, [&](const TrainProgress& now) {
    char text[96];
    std::snprintf(text, sizeof(text), "loss %.4f, %.0f tokens/s, %.0f s left", now.loss,
                  now.tokens_per_second, now.seconds_left);
    line.update(now.step, now.steps, text);
  });
  check(status);
  report("after");
}

#ifdef FINETUNE_ON_GPU
/// The same with a cuda::DeviceTrainer; `model` has the parameters in the end.
void tune_on_gpu(const Options& options, TrainableModel<float>& model, const LlamaModel<DenseLinear>& base,
                 const std::vector<TrainingExample>& examples, const std::string& name,
                 const std::vector<TrainingExample>& judged);
#endif

int run(Options options) {
#ifndef FINETUNE_ON_GPU
  if (options.device == "gpu") throw UserError("--device gpu: take finetune_gpu, which is built with CUDA");
#endif
  codegemm::ThreadPool pool(options.threads);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  check(check_target(*source, options.out));
  const LoadedModel loaded = unwrap(load_model(*source));
  LoadedModel base = loaded;
  if (!options.base.empty()) {
    const std::unique_ptr<TensorSource> base_source = unwrap(open_model(options.base));
    check(check_target(*base_source, options.out));
    base = unwrap(load_model(*base_source));
  }
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.base.empty() ? options.model : options.base));
  const TrainingDataOptions reading{options.train.max_tokens, !options.plain, -1};
  const auto read = [&](const std::string& path) {
    std::vector<TrainingExample> examples = read_training_data(path, tokenizer, reading);
    const auto most = static_cast<std::size_t>(options.limit);
    if (most > 0 && examples.size() > most) examples.resize(most);
    return examples;
  };
  const std::vector<TrainingExample> examples = read(options.data);
  const std::vector<TrainingExample> judged = options.held_out.empty() ? examples : read(options.held_out);

  options.train.schedule = options.constant ? RateSchedule::kConstant : RateSchedule::kCosine;
  options.train.sharing = options.sharing >= 0.0 ? options.sharing : options.method == "full" ? 0.0 : 1.0;
  if (options.method == "naive-eval") options.train.steps = 0;
  TrainableModel<float> model = trainable(options, loaded);
  std::printf("%lld parameters, %zu examples, %.2f of each prompt from the base's cache\n",
              static_cast<long long>(model.parameter_count()), examples.size(), options.train.sharing);
  // [guide: trainer]
  const std::string name = codegemm::concat(
      "base ", base.fingerprint, ", model ", loaded.fingerprint, ", parameters ", options.parameters,
      ", rank ", options.low_rank.rank, ", alpha ", options.low_rank.alpha, ", version 1");
  if (options.device == "cpu") {
    Trainer<DenseLinear> trainer =
        unwrap(Trainer<DenseLinear>::create(model, base.model, examples, options.train, name, pool));
    tune(options, trainer, judged);
  }
  // [guide: end]
#ifdef FINETUNE_ON_GPU
  if (options.device == "gpu") tune_on_gpu(options, model, *base.model, examples, name, judged);
#endif
  if (options.method == "naive-eval") return 0;
  write_result(options, *source, model, pool);
  std::filesystem::remove(options.out + "/state.safetensors");
  std::printf("written to %s\n", options.out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Fine-tunes a decode module on the cache of a frozen base."};
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder to begin with")->required();
  app.add_option("--base", options.base, "the frozen base, where it is not the model");
  app.add_option("--data", options.data, "JSONL with prompt and target")->required();
  app.add_option("--held-out", options.held_out, "JSONL to judge by; none: the data");
  app.add_option("--out", options.out, "folder for the tuned model");
  app.add_option("--method", options.method, "prefillshare, full or naive-eval")
      ->check(CLI::IsMember({"prefillshare", "full", "naive-eval"}))
      ->capture_default_str();
  app.add_option("--parameters", options.parameters, "full, lora or codebooks")
      ->check(CLI::IsMember({"full", "lora", "codebooks"}))
      ->capture_default_str();
  app.add_option("--device", options.device, "cpu or gpu")
      ->check(CLI::IsMember({"cpu", "gpu"}))
      ->capture_default_str();
  app.add_option("--sharing", options.sharing, "share of each prompt read from the base; none: by the method")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--steps", options.train.steps, "updates")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  app.add_option("--batch", options.train.batch, "examples of a step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--pass-tokens", options.train.pass_tokens, "tokens computed at once")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-tokens", options.train.max_tokens, "of prompt and target")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--rate", options.train.rate, "highest learning rate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--warmup", options.train.warmup, "share of the steps")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_flag("--constant", options.constant, "no cosine after the warm-up");
  app.add_option("--weight-decay", options.train.adam.weight_decay)->capture_default_str();
  app.add_option("--clip", options.train.clip, "highest norm of the gradient; 0: none")
      ->capture_default_str();
  app.add_option("--rank", options.low_rank.rank, "of low-rank deltas")->capture_default_str();
  app.add_option("--alpha", options.low_rank.alpha, "their scale times the rank")->capture_default_str();
  app.add_option("--seed", options.train.seed, "of the order of the examples")->capture_default_str();
  app.add_option("--limit", options.limit, "most examples of a file; 0: all")->check(CLI::NonNegativeNumber);
  app.add_option("--save-every", options.save_every, "steps between saved states")->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_flag("--plain", options.plain, "prompts as they are, not in the chat template");
  return run_program(
      "finetune", app, argc, argv, [&] { return run(options); },
      [&] {
        if (options.method != "naive-eval" && options.out.empty()) throw CLI::RequiredError("--out");
      });
}
