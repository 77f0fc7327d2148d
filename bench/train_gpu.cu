// SPDX-License-Identifier: Apache-2.0
//
// bench/train_gpu.cu - suite train-gpu: fine-tuning on the GPU at the shape of SmolLM2-135M, with random
// weights: tokens of prompt and target a second, and device memory, of full fine-tuning, of fine-tuning on
// the base's cache, and of low-rank deltas and codebooks on it; beside PyTorch on the same examples in the
// same run.
//
// A step is timed as a user sees it: packing, copies, the base's prefill, both passes, AdamW and the read
// back.
//
// usage: train-gpu [--json FILE] [--quick] [--batch EXAMPLES] [--pass TOKENS] [--steps N] [--only METHOD]
// [--once]
//   --only  full, prefillshare, low-rank, generate or codebooks
//   --once  one step of each, and no timing: for a profiler
// The fixed parts of nvcc's front end's remarks on Eigen.
#pragma nv_diag_suppress 20012, 1675, 550

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/generator.cuh>
#include <prefillshare/train/cuda/trainer.cuh>

#include "support/gpu_program.hpp"
#include "support/gpu_timing.cuh"
#include "support/peer_process.hpp"
#include "support/random_dense.hpp"
#include "support/report.hpp"

namespace {

using namespace prefillshare;
using namespace prefillshare::cuda;
using codegemm::bench::check;
using S = __nv_bfloat16;

struct Options {
  std::string json;
  std::string only;
  int batch = 64;
  int pass = 8192;
  int steps = 30;
  bool once = false;
  bool quick = false;
};

ModelConfig smollm2_135m() {
  ModelConfig c;
  c.vocab_size = 49152;
  c.hidden_size = 576;
  c.intermediate_size = 1536;
  c.layers = 30;
  c.heads = 9;
  c.kv_heads = 3;
  c.head_dim = 64;
  c.context_length = 8192;
  c.rope.head_dim = 64;
  c.rope.theta = 100000.0;
  c.tied_embeddings = true;
  return c;
}

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return state_ >> 33U;
  }
  float centered() { return static_cast<float>(next()) * 0x1p-31F - 0.5F; }  // of 2^31 values

 private:
  std::uint64_t state_;
};

// Lengths as bench/finetune_torch_peer.py has them: prompts of 64 to 144 tokens, targets of 8 to 40.
std::vector<TrainingExample> examples_of(const ModelConfig& c, int count) {
  Draw draw(2);
  std::vector<TrainingExample> out;
  for (int i = 0; i < count; ++i) {
    TrainingExample e;
    e.prompt.resize(static_cast<std::size_t>(64 + i * 37 % 81));
    e.target.resize(static_cast<std::size_t>(8 + i * 13 % 33));
    for (auto* ids : {&e.prompt, &e.target}) {
      for (std::int32_t& id : *ids)
        id = static_cast<std::int32_t>(draw.next() % static_cast<std::uint64_t>(c.vocab_size));
    }
    out.push_back(std::move(e));
  }
  return out;
}

std::map<std::string, codegemm::QuantizedMatrix> random_codes(const LlamaModel<DenseLinear>& model) {
  Draw draw(3);
  std::map<std::string, codegemm::QuantizedMatrix> out;
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head") return;
    auto made = codegemm::QuantizedMatrix::create({4, 1, 8, 64}, layer.rows(), layer.cols());
    check(made.status());
    codegemm::QuantizedMatrix q = std::move(made).value();
    for (codegemm::Half& x : q.codebooks()) x = codegemm::Half::from_float(draw.centered() * 3.4641016F);
    for (codegemm::Half& x : q.scales())
      x = codegemm::Half::from_float(1.0F / std::sqrt(static_cast<float>(layer.cols())));
    for (std::int64_t n = 0; n < layer.rows(); ++n) {
      for (std::int64_t j = 0; j < layer.cols() / 4; ++j)
        q.set_code(0, n, j, static_cast<std::uint32_t>(draw.next() & 255U));
    }
    out.emplace(name, std::move(q));
  });
  return out;
}

struct Measured {
  double tokens_per_s = 0.0;
  double step_ms = 0.0;
  double gigabytes = 0.0;
  double setup_s = 0.0;  // of the trainer
  double first_loss = 0.0;
  double last_loss = 0.0;
};

double free_gigabytes() {
  std::size_t free = 0;
  std::size_t all = 0;
  check(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
  return static_cast<double>(free) * 1e-9;
}

class Suite {
 public:
  Suite(const Options& options, const codegemm::cuda::Device& device, cudaStream_t stream)
      : options_(options),
        device_(device),
        stream_(stream),
        model_(codegemm::bench::random_dense_model(smollm2_135m(), 0.04)),
        examples_(examples_of(model_->config, 512)) {
    auto base = DeviceFrozenWeights<S>::create(*model_, device, stream);
    check(base.status());
    base_ = std::make_shared<const DeviceFrozenWeights<S>>(std::move(base).value());
    if (!options.once) memory_ = codegemm::bench::measure_bandwidth(stream, device.multiprocessors);
  }

  void run() {
    if (wanted("full")) row("full", TrainableModel<float>::full(model_), 0.0, true);
    if (wanted("prefillshare")) row("prefillshare", TrainableModel<float>::full(model_), 1.0, false);
    if (wanted("low-rank")) row("low-rank", TrainableModel<float>::low_rank(model_, {}), 1.0, false);
    if (wanted("generate")) generate();
    if (wanted("codebooks"))
      row("codebooks", TrainableModel<float>::codebooks(model_, random_codes(*model_)), 1.0, false);
  }

  void write() const {
    if (options_.json.empty()) return;
    codegemm::bench::Suite frame;
    frame.name = "train-gpu";
    frame.machine = codegemm::bench::describe_card(device_);
    frame.memory = memory_;
    check(
        codegemm::bench::write_text(codegemm::bench::frame_json(frame, rows_).dump(2) + '\n', options_.json));
  }

 private:
  [[nodiscard]] bool wanted(const char* method) const {
    return options_.only.empty() || options_.only == method;
  }

  void row(const char* method, Result<TrainableModel<float>> made, double sharing, bool with_peers) {
    check(made.status());
    TrainableModel<float> model = std::move(made).value();
    const Measured m = measure(model, sharing);
    std::printf(
        "%-13s %9.0f tokens/s, %7.2f ms a step of %d examples, %5.2f GB, loss %.3f to %.3f, %.2f s to set "
        "up\n",
        method, m.tokens_per_s, m.step_ms, options_.batch, m.gigabytes, m.first_loss, m.last_loss, m.setup_s);
    std::fflush(stdout);
    if (options_.once) return;
    nlohmann::json peers = nlohmann::json::array();
    if (with_peers) {
      for (const char* kind : {"bf16", "autocast"}) {
        const std::vector<double> peer =
            codegemm::bench::run_peer("", "finetune_torch_peer.py",
                                      codegemm::concat(kind, ' ', options_.batch, ' ', options_.steps), 3);
        if (peer.empty()) {
          std::printf("  PyTorch %s: not measured\n", kind);
          continue;
        }
        std::printf("  PyTorch %-8s %9.0f tokens/s, %7.2f ms a step, %5.2f GB: %.2f times as fast\n", kind,
                    peer[0], peer[1], peer[2], m.tokens_per_s / peer[0]);
        peers.push_back({{"name", codegemm::concat("torch-", kind)},
                         {"tokens_per_s", peer[0]},
                         {"median_us", peer[1] * 1e3},
                         {"gigabytes", peer[2]},
                         {"ratio", m.tokens_per_s / peer[0]}});
      }
    }
    std::fflush(stdout);
    rows_.push_back({{"name", "step"},
                     {"method", method},
                     {"model", "SmolLM2-135M"},
                     {"examples", options_.batch},
                     {"pass_tokens", options_.pass},
                     {"tokens_per_s", m.tokens_per_s},
                     {"median_us", m.step_ms * 1e3},
                     {"gigabytes", m.gigabytes},
                     {"peers", peers}});
  }

  // Greedy answers of 48 tokens to 1,024 prompts, all but the last token of each run by the base.
  void generate() {
    constexpr int kPrompts = 1024;
    constexpr int kMost = 48;
    auto generator =
        DeviceGenerator<S>::create(model_->config, model_->config, kPrompts, 256, device_, stream_);
    check(generator.status());
    std::vector<std::vector<std::int32_t>> prompts;
    for (int i = 0; i < kPrompts; ++i)
      prompts.push_back(examples_[static_cast<std::size_t>(i) % examples_.size()].prompt);
    std::vector<double> times;
    for (int i = 0; i < (options_.once ? 1 : 4); ++i) {
      const auto start = std::chrono::steady_clock::now();
      const auto answers = generator->generate(base_->view(), base_->view(), prompts, 1.0, kMost, {});
      check(answers.status());
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    const double seconds = codegemm::bench::median({times.begin() + (times.size() > 1 ? 1 : 0), times.end()});
    std::printf("generate      %9.0f tokens/s, %7.2f ms for %d prompts and answers of %d\n",
                kPrompts * kMost / seconds, seconds * 1e3, kPrompts, kMost);
    std::fflush(stdout);
    rows_.push_back({{"name", "generate"},
                     {"model", "SmolLM2-135M"},
                     {"examples", kPrompts},
                     {"answer_tokens", kMost},
                     {"tokens_per_s", kPrompts * kMost / seconds},
                     {"median_us", seconds * 1e6}});
  }

  Measured measure(TrainableModel<float>& model, double sharing) {
    TrainOptions o;
    o.steps = 100000;
    o.batch = options_.batch;
    o.pass_tokens = options_.pass;
    o.max_tokens = 256;
    o.sharing = sharing;
    o.rate = 1e-4;
    o.warmup = 0.0;
    o.clip = 1.0;
    Measured out;
    const double before = free_gigabytes();
    const auto begin = std::chrono::steady_clock::now();
    auto trainer = DeviceTrainer<S>::create(model, base_, examples_, o, "bench", device_, stream_);
    check(trainer.status());
    out.setup_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const int warm = options_.once ? 0 : 3;
    const int steps = options_.once ? 1 : options_.steps;
    std::vector<double> times;
    double tokens = 0.0;
    double seconds = 0.0;
    for (int i = 0; i < warm + steps; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const auto now = trainer->step();
      check(now.status());
      const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (i == 0) out.first_loss = now->loss;
      out.last_loss = now->loss;
      if (i < warm) continue;
      times.push_back(took);
      seconds += took;
    }
    // The stream of examples covers all lengths evenly.
    for (const TrainingExample& e : examples_) tokens += static_cast<double>(e.tokens());
    const double mean = tokens / static_cast<double>(examples_.size());
    out.step_ms = codegemm::bench::median(times) * 1e3;
    out.tokens_per_s = mean * options_.batch * static_cast<double>(times.size()) / seconds;
    out.gigabytes = before - free_gigabytes();
    return out;
  }

  const Options& options_;
  codegemm::cuda::Device device_;
  cudaStream_t stream_;
  std::shared_ptr<const LlamaModel<DenseLinear>> model_;
  std::vector<TrainingExample> examples_;
  std::shared_ptr<const DeviceFrozenWeights<S>> base_;
  codegemm::bench::MemorySpeed memory_;
  nlohmann::json rows_ = nlohmann::json::array();
};

int program(int argc, char** argv) {
  using codegemm::bench::Option;
  Options options;
  codegemm::bench::parse(argc, argv,
                         {{"--json", Option::value(options.json)},
                          {"--quick", Option::flag([&] { options.steps = 8; })},
                          {"--batch", Option::value(options.batch)},
                          {"--pass", Option::value(options.pass)},
                          {"--steps", Option::value(options.steps)},
                          {"--only", Option::value(options.only)},
                          {"--once", Option::flag(options.once)}});
  const auto device = codegemm::cuda::query_device(0);
  check(device.status());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Suite suite(options, *device, stream);
  suite.run();
  suite.write();
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return codegemm::bench::run_suite("train-gpu", argc, argv, program); }
