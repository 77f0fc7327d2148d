// SPDX-License-Identifier: Apache-2.0
//
// bench/model_gpu.cu - suite model-gpu: whole decoders at the shapes of Llama-3.1 8B and 70B on the GPU, with
// random weights: decode steps as CUDA graphs behind a context, and prefill. Layers of codes beside the same
// weights dense, multiplied by cuBLAS, by its own choice of algorithms and by those that are fastest when all
// that it proposes are tried, and one token by our own kernel too; and steps of sequences whose contexts
// begin alike, with that beginning read for each and once for all.
//
// First the logits of one prompt by both are compared, then those of a step of one token by each. A step is
// timed over many replays behind a full
// context: a model's weights are many times what the caches hold. bytes are those that a step has to read:
// weights, K and V.
//
// usage: model-gpu [--json FILE] [--quick] [--model 8b|70b]... [--format NAME] [--context TOKENS] [--steps N]
//                  [--no-dense] [--once] [--few-keys N]
//   --few-keys  up to so many keys appending and attention of one sequence are one kernel
//   --once      one decode step of each model outside of a graph, and no timing: for a profiler
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/gpu_models.cuh"
#include "support/gpu_problem.cuh"
#include "support/gpu_program.hpp"
#include "support/gpu_timing.cuh"
#include "support/report.hpp"

namespace {

using namespace codegemm::bench;

struct Options {
  std::string json;
  std::string format = "m1v4g128";
  std::vector<std::string> models;
  int context = 1024;
  int steps = 200;
  bool dense = true;
  bool once = false;
  int few_keys = kFewKeys;
};

// A cache of `sequences` contexts, whose pages are filled.
struct Cache {
  DeviceKvStorage<__half> storage;
  std::unique_ptr<DeviceKvAllocator<__half>> allocator;
  std::vector<Sequence> sequences;
  std::vector<const Sequence*> pointers;

  Cache(const ModelConfig& c, int count, std::int64_t tokens, cudaStream_t stream)
      : storage(make_storage(c, count * ((tokens + 15) / 16 + 1), stream)) {
    auto made = DeviceKvAllocator<__half>::create(storage);
    check(made.status());
    allocator = std::move(made).value();
    fill(storage.layer(0),
         static_cast<std::size_t>(storage.blocks() * storage.bytes_per_block()) / sizeof(__half), 1.0F, 0.0F,
         static_cast<std::uint64_t>(count));  // the same for every model
    sequences.resize(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      auto opened = allocator->open(CacheKey{"bench", codegemm::concat(i), ""}, {});
      check(opened.status());
      sequences[static_cast<std::size_t>(i)] = std::move(opened).value();
      check(allocator->reserve(sequences[static_cast<std::size_t>(i)], tokens));
    }
    for (const Sequence& s : sequences) pointers.push_back(&s);
    check(cudaDeviceSynchronize(), "the cache");
  }
  static DeviceKvStorage<__half> make_storage(const ModelConfig& c, std::int64_t blocks,
                                              cudaStream_t stream) {
    auto made = DeviceKvStorage<__half>::create(kv_shape(c), blocks, stream);
    check(made.status());
    return std::move(made).value();
  }
};

std::vector<std::int32_t> prompt_of(std::int64_t size, std::int64_t vocab) {
  codegemm::bench::Random random{99};
  std::vector<std::int32_t> out(static_cast<std::size_t>(size));
  for (std::int32_t& id : out)
    id = static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(vocab));
  return out;
}

template <class Linear, class Head>
DeviceWorkspace<__half> workspace_of(const DeviceLlama<Linear, Head>& model, std::int64_t tokens,
                                     int sequences, const Device& device) {
  auto made = DeviceWorkspace<__half>::create(model, tokens, sequences, device);
  check(made.status());
  return std::move(made).value();
}

// Those of a pass that has ended, of its first sequence.
std::vector<float> first_logits(const DeviceWorkspace<__half>& workspace, std::int64_t vocab) {
  std::vector<float> out(static_cast<std::size_t>(vocab));
  check(cudaMemcpy(out.data(), workspace.logits.data(), out.size() * sizeof(float), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  return out;
}

// The logits behind a prompt, from a fresh cache.
template <class Model>
std::vector<float> logits_of(const Model& model, std::span<const std::int32_t> prompt, const Device& device,
                             cudaStream_t stream) {
  const auto size = std::ssize(prompt);
  Cache cache(model.config, 1, size, stream);
  auto workspace = workspace_of(model, size, 1, device);
  auto input = PrefillBatch::create(size, 1, 4096);
  check(input.status());
  const auto batch = input->send(std::span(&prompt, 1), cache.pointers, model.config.vocab_size, stream);
  check(batch.status());
  check(forward(model, *batch, cache.storage,
                codegemm::MatrixView<float>(workspace.logits.data(), 1, model.config.vocab_size), workspace,
                device, stream));
  check(cudaStreamSynchronize(stream), "forward");
  std::vector<float> out = first_logits(workspace, model.config.vocab_size);
  check(cache.allocator->release_reserved(cache.sequences[0]));
  return out;
}

double relative(const std::vector<float>& a, const std::vector<float>& b) {
  double off = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    off += d * d;
    size += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(off / size);
}

struct Measured {
  double step_us = 0.0;       // of steps put into the stream one after the other
  double loop_us = 0.0;       // the same, each waited for by the host
  double bytes = 0.0;         // that a step reads
  std::vector<float> logits;  // of the first sequence
};

template <class Model>
Measured measure_decode(const Model& model, int batch, const Options& options, const Device& device,
                        cudaStream_t stream) {
  const ModelConfig& c = model.config;
  Cache cache(c, batch, options.context + 1, stream);
  auto workspace = workspace_of(model, batch, batch, device);
  const std::vector<std::int64_t> pending(static_cast<std::size_t>(batch), options.context);
  PageTable table;
  check(export_page_table(cache.pointers, table, pending));
  const std::vector<std::int32_t> first = prompt_of(batch, c.vocab_size);
  Measured out;
  using Graph = DecodeGraph<typename Model::Linear, typename Model::Head>;
  auto made = Graph::capture(model, cache.storage, workspace, batch, std::ssize(table.indices), false, device,
                             stream, options.few_keys);
  check(made.status());
  Graph& graph = **made;
  DecodeStep step;
  step.table = &table;
  step.tokens = first;
  check(graph.launch(step));
  check(graph.wait().status());
  out.logits = first_logits(workspace, c.vocab_size);
  step.tokens = {};
  if (!options.once) {
    const auto timed = [&](bool wait) {
      for (int i = 0; i < 10; ++i) check(graph.launch(step));
      check(graph.wait().status());
      std::vector<double> times;
      for (int round = 0; round < 5; ++round) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < options.steps / 5; ++i) {
          check(graph.launch(step));
          if (wait) check(graph.wait().status());
        }
        check(graph.wait().status());
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
        times.push_back(took.count() / (options.steps / 5));
      }
      return codegemm::bench::median(times);
    };
    out.step_us = timed(false);
    out.loop_us = timed(true);
  }
  out.bytes = static_cast<double>(linear_bytes(model)) + static_cast<double>(batch) * options.context *
                                                             c.layers * 4.0 *
                                                             static_cast<double>(c.kv_size());
  for (Sequence& s : cache.sequences) check(cache.allocator->release_reserved(s));
  return out;
}

// A step's time, us, of sequences that have their first `shared` tokens in common, in the same pages; `once`:
// attention reads those once for all (PrefixGroups), or for each.
template <class Model>
double measure_shared(const Model& model, int batch, std::int64_t shared, std::int64_t own, bool once,
                      const Options& options, const Device& device, cudaStream_t stream) {
  const ModelConfig& c = model.config;
  const std::int64_t pages = shared / 16;
  const std::int64_t own_pages = own / 16 + 1;  // with one for the new token
  DeviceKvStorage<__half> storage = Cache::make_storage(c, pages + batch * own_pages, stream);
  fill(storage.layer(0),
       static_cast<std::size_t>(storage.blocks() * storage.bytes_per_block()) / sizeof(__half), 1.0F, 0.0F,
       next_seed());
  auto workspace = workspace_of(model, batch, batch, device);
  check(cudaDeviceSynchronize(), "the cache");
  PageTable table;
  table.indptr.push_back(0);
  for (int i = 0; i < batch; ++i) {
    for (std::int64_t page = 0; page < pages + own_pages; ++page) {
      table.indices.push_back(static_cast<std::int32_t>(page < pages ? page : page + i * own_pages));
    }
    table.indptr.push_back(static_cast<std::int32_t>(table.indices.size()));
    table.last_page_len.push_back(1);
  }
  using Graph = DecodeGraph<typename Model::Linear, typename Model::Head>;
  auto graph =
      Graph::capture(model, storage, workspace, batch, std::ssize(table.indices), once, device, stream);
  check(graph.status());
  const std::vector<std::int32_t> first = prompt_of(batch, c.vocab_size);
  const std::vector<std::int32_t> groups{0, batch};
  const std::vector<std::int32_t> common{static_cast<std::int32_t>(pages)};
  DecodeStep step;
  step.table = &table;
  step.tokens = first;
  if (once) {
    step.group_indptr = groups;
    step.shared_pages = common;
  }
  std::vector<double> times;
  for (int round = 0; round <= 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < options.steps / 10; ++i) check((*graph)->launch(step));
    check((*graph)->wait().status());
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    if (round > 0) times.push_back(took.count() / (options.steps / 10));
  }
  return codegemm::bench::median(times);
}

template <class Model>
double measure_prefill(const Model& model, std::int64_t tokens, const Device& device, cudaStream_t stream) {
  Cache cache(model.config, 1, tokens, stream);
  auto workspace = workspace_of(model, tokens, 1, device);
  auto input = PrefillBatch::create(tokens, 1, 4096);
  check(input.status());
  const std::vector<std::int32_t> prompt = prompt_of(tokens, model.config.vocab_size);
  const std::span<const std::int32_t> chunk(prompt);
  std::vector<double> times;
  for (int i = 0; i < 6; ++i) {
    check(cudaStreamSynchronize(stream), "prefill");
    const auto start = std::chrono::steady_clock::now();
    const auto batch = input->send(std::span(&chunk, 1), cache.pointers, model.config.vocab_size, stream);
    check(batch.status());
    check(forward(model, *batch, cache.storage, {}, workspace, device, stream));
    check(cudaStreamSynchronize(stream), "prefill");
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    if (i > 0) times.push_back(took.count());
  }
  check(cache.allocator->release_reserved(cache.sequences[0]));
  return codegemm::bench::median(times);
}

class Suite {
 public:
  Suite(const Options& options, const Device& device, cudaStream_t stream)
      : options_(options),
        device_(device),
        stream_(stream),
        memory_(codegemm::bench::measure_bandwidth(stream, device.multiprocessors)) {
    std::printf("reads %.0f GB/s\n", memory_.read_gb_per_s);
  }

  void run(const std::string& name) {
    const ModelConfig c = config_of(name);
    const auto format = codegemm::parse_format(options_.format.c_str());
    check(format.status());
    auto cublas = Cublas::create();
    check(cublas.status());
    CodedModel coded = coded_model(c, *format, *cublas);
    std::printf("%s: %s, %.2f GB of linear layers, of which the fp16 head %.2f\n", name.c_str(),
                options_.format.c_str(), static_cast<double>(linear_bytes(coded)) * 1e-9,
                static_cast<double>(coded.head.parameter_bytes()) * 1e-9);
    const bool dense = options_.dense && name == "8b";  // 70B in fp16 do not fit beside
    std::unique_ptr<DenseModel> beside;
    if (dense) beside = std::make_unique<DenseModel>(dense_model(coded, *cublas, device_));
    if (dense && !options_.once) {
      const std::vector<std::int32_t> prompt = prompt_of(100, c.vocab_size);
      compare(name, logits_of(coded, prompt, device_, stream_), logits_of(*beside, prompt, device_, stream_));
    }
    for (const int batch : {1, 8, 32}) {
      if (options_.once && batch > 1) break;
      const std::vector<float> logits = decode(name, options_.format, coded, batch);
      if (dense) compare(name, logits, decode(name, "fp16", *beside, batch));
      if (dense && batch > 1) searched(name, "fp16, searched", *beside, batch, logits);
      if (batch > 1) continue;
      // The same with cuBLAS's products.
      set_one_token(coded, OneToken::kCublas);
      compare(name, logits, decode(name, options_.format + ", head by cuBLAS", coded, batch));
      set_one_token(coded, OneToken::kStream);
      if (!dense) continue;
      set_one_token(*beside, OneToken::kCublas);
      compare(name, logits, decode(name, "fp16 by cuBLAS", *beside, batch));
      searched(name, "fp16 by cuBLAS, searched", *beside, batch, logits);
      // Those that cuBLAS reads at nine tenths of the bandwidth by itself, the others in our own kernel.
      for (auto& l : beside->layers) {
        for (Dense* layer : {&l.qkv, &l.o, &l.down}) layer->set_one_token(OneToken::kStream);
      }
      searched(name, "fp16, gate and up and the head by cuBLAS, searched", *beside, batch, logits);
      compare(name, logits, decode(name, "fp16, gate and up and the head by cuBLAS", *beside, batch));
      beside->head.set_one_token(OneToken::kStream);
      compare(name, logits, decode(name, "fp16, gate and up by cuBLAS", *beside, batch));
      set_one_token(*beside, OneToken::kStream);
    }
    if (options_.once) return;
    for (const int batch : {8, 32}) {
      shared(name, options_.format, coded, batch);
      if (dense) shared(name, "fp16", *beside, batch);
    }
    for (const std::int64_t tokens : {512, 2048}) {
      prefill(name, options_.format, coded, tokens);
      if (dense) prefill(name, "fp16", *beside, tokens);
    }
  }

 private:
  static void compare(const std::string& name, const std::vector<float>& a, const std::vector<float>& b) {
    const double off = relative(a, b);
    std::printf("%s: logits are off by %.2e\n", name.c_str(), off);
    if (!(off < 0.05)) throw std::runtime_error("the logits do not agree");
  }
  // After each row: a run that is cut short keeps what it has.
  void write() const {
    if (options_.json.empty()) return;
    const codegemm::bench::Suite frame{"model-gpu", codegemm::bench::describe_card(device_), memory_, {}};
    check(
        codegemm::bench::write_text(codegemm::bench::frame_json(frame, rows_).dump(2) + '\n', options_.json));
  }
  template <class Model>
  std::vector<float> decode(const std::string& name, const std::string& weights, const Model& model,
                            int batch) {
    const Measured m = measure_decode(model, batch, options_, device_, stream_);
    if (options_.once) return m.logits;
    const double share = m.bytes / m.step_us * 1e-3 / memory_.read_gb_per_s;
    std::printf(
        "%-4s %-10s decode, batch %2d, context %d: %8.1f us a step (%8.1f waited for), %7.1f tokens/s, "
        "%.0f%% of read\n",
        name.c_str(), weights.c_str(), batch, options_.context, m.step_us, m.loop_us, batch * 1e6 / m.loop_us,
        share * 100.0);
    std::fflush(stdout);
    rows_.push_back({{"name", "decode"},
                     {"model", name},
                     {"weights", weights},
                     {"batch", batch},
                     {"context", options_.context},
                     {"few_keys", options_.few_keys},
                     {"step_us", m.step_us},
                     {"loop_us", m.loop_us},
                     {"tokens_per_s", batch * 1e6 / m.loop_us},
                     {"gigabytes", m.bytes * 1e-9},
                     {"share_of_read", share}});
    write();
    return m.logits;
  }
  /// The same by the algorithms that are fastest; the model is as it was afterwards.
  void searched(const std::string& name, const std::string& weights, DenseModel& model, int batch,
                const std::vector<float>& logits) {
    auto made = CublasProducts::create();
    check(made.status());
    const std::shared_ptr<CublasProducts> products = std::move(*made);
    check(search_products(model, batch, products, stream_));
    compare(name, logits, decode(name, weights, model, batch));
    set_products(model, nullptr);
  }
  template <class Model>
  void shared(const std::string& name, const std::string& weights, const Model& model, int batch) {
    constexpr std::int64_t kShared = 4096;
    constexpr std::int64_t kOwn = 256;
    const double each = measure_shared(model, batch, kShared, kOwn, false, options_, device_, stream_);
    const double once = measure_shared(model, batch, kShared, kOwn, true, options_, device_, stream_);
    std::printf(
        "%-4s %-10s decode, batch %2d, %lld of %lld tokens in common: %8.1f us a step, read once %8.1f us "
        "(%.2f "
        "times as fast)\n",
        name.c_str(), weights.c_str(), batch, static_cast<long long>(kShared),
        static_cast<long long>(kShared + kOwn), each, once, each / once);
    std::fflush(stdout);
    rows_.push_back({{"name", "decode_shared"},
                     {"model", name},
                     {"weights", weights},
                     {"batch", batch},
                     {"context", kShared + kOwn},
                     {"shared", kShared},
                     {"step_us", each},
                     {"once_step_us", once},
                     {"times_as_fast", each / once}});
    write();
  }
  template <class Model>
  void prefill(const std::string& name, const std::string& weights, const Model& model, std::int64_t tokens) {
    const double us = measure_prefill(model, tokens, device_, stream_);
    const double flop = 2.0 * static_cast<double>(tokens) * static_cast<double>(layer_weights(model.config));
    std::printf("%-4s %-10s prefill of %4lld: %8.2f ms, %8.0f tokens/s, %.0f TFLOP/s\n", name.c_str(),
                weights.c_str(), static_cast<long long>(tokens), us * 1e-3,
                static_cast<double>(tokens) * 1e6 / us, flop / us * 1e-6);
    std::fflush(stdout);
    rows_.push_back({{"name", "prefill"},
                     {"model", name},
                     {"weights", weights},
                     {"tokens", tokens},
                     {"us", us},
                     {"tokens_per_s", static_cast<double>(tokens) * 1e6 / us},
                     {"tflop_per_s", flop / us * 1e-6}});
    write();
  }
  static std::int64_t layer_weights(const ModelConfig& c) {
    return c.layers * c.hidden_size * (2 * c.q_size() + 2 * c.kv_size() + 3 * c.intermediate_size);
  }

  const Options& options_;
  const Device& device_;
  cudaStream_t stream_;
  codegemm::bench::MemorySpeed memory_;
  nlohmann::json rows_ = nlohmann::json::array();
};

int program(int argc, char** argv) {
  using codegemm::bench::Option;
  Options options;
  codegemm::bench::parse(
      argc, argv,
      {{"--json", Option::value(options.json)},
       {"--quick", Option::flag([&] { options.steps = 50; })},
       {"--model", Option::value([&](const char* text) { options.models.emplace_back(text); })},
       {"--format", Option::value(options.format)},
       {"--context", Option::value(options.context)},
       {"--steps", Option::value(options.steps)},
       {"--no-dense", Option::flag(options.dense, false)},
       {"--few-keys", Option::value(options.few_keys)},
       {"--once", Option::flag(options.once)}});
  if (options.context < 1 || options.steps < 5)
    throw std::runtime_error("--context from 1, --steps from 5 on");
  if (options.models.empty()) options.models = {"8b", "70b"};
  const auto device = codegemm::cuda::query_device(0);
  check(device.status());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Suite suite(options, *device, stream);
  for (const std::string& name : options.models) suite.run(name);
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return codegemm::bench::run_suite("model-gpu", argc, argv, program); }
