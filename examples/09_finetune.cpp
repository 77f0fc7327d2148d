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
#include <codegemm/io/model_checkpoint.hpp>
#include <common/finetune_options.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/model_writer.hpp>
#include <common/progress.hpp>
#include <common/run_program.hpp>
#include <common/training_data.hpp>
#include <common/tuned_model.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/train/trainer.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

// [guide: checkpoint]
std::map<std::string, codegemm::QuantizedMatrix> quantized_layers(const std::string& folder) {
  const codegemm::ModelCheckpoint checkpoint = unwrap(codegemm::ModelCheckpoint::open(folder));
  std::map<std::string, codegemm::QuantizedMatrix> out;
  for (const codegemm::CheckpointEntry& entry : checkpoint.entries())
    out.emplace(entry.name, unwrap(checkpoint.load(entry.name)));
  return out;
}
// [guide: end]

// [guide: trainable]
TrainableModel<float> trainable(const FinetuneOptions& options, const LoadedModel& loaded) {
  if (options.parameters == "lora")
    return unwrap(TrainableModel<float>::low_rank(loaded.model, options.low_rank));
  if (options.parameters == "codebooks")
    return unwrap(TrainableModel<float>::codebooks(loaded.model, quantized_layers(options.model)));
  return unwrap(TrainableModel<float>::full(loaded.model));
}
// [guide: end]

/// Trains and judges with a Trainer, or with a cuda::DeviceTrainer, which has its members.
template <class AnyTrainer>
void tune(const FinetuneOptions& options, AnyTrainer& trainer, const std::vector<TrainingExample>& judged) {
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
  check(trainer.run(state, options.save_every,
                    [&](const TrainProgress& now) { line.update(now.step, now.steps, words_of(now)); }));
  report("after");
}

#ifdef FINETUNE_ON_GPU
/// The same with a cuda::DeviceTrainer; `model` has the parameters in the end.
void tune_on_gpu(const FinetuneOptions& options, TrainableModel<float>& model,
                 const LlamaModel<DenseLinear>& base, const std::vector<TrainingExample>& examples,
                 const std::string& name, const std::vector<TrainingExample>& judged);
#endif

int run(FinetuneOptions options) {
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
  const TrainingDataOptions reading{options.train.max_tokens, !options.plain, -1, options.limit};
  const std::vector<TrainingExample> examples = read_training_data(options.data, tokenizer, reading);
  const std::vector<TrainingExample> judged =
      options.held_out.empty() ? examples : read_training_data(options.held_out, tokenizer, reading);

  options.complete();
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
  write_tuned_model(*source, options.out, model, options.model, pool);
  std::filesystem::remove(options.out + "/state.safetensors");
  std::printf("written to %s\n", options.out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  FinetuneOptions options;
  CLI::App app{"Fine-tunes a decode module on the cache of a frozen base."};
  add_finetune_options(app, options);
  return run_program(
      "finetune", app, argc, argv, [&] { return run(options); },
      [&] {
        if (options.method != "naive-eval" && options.out.empty()) throw CLI::RequiredError("--out");
      });
}
