// SPDX-License-Identifier: Apache-2.0
//
// examples/ggml/ggml_layer.cpp - CodeGEMM in ggml, the library below llama.cpp: a linear layer as a custom
// operator over the C API, checked in double, and timed beside ggml's own product with Q2_K weights.
//
//   ggml_layer [--rows N] [--cols K] [--format m2v8g128] [--threads 2]
//
// Needs ggml's headers and libraries, of which nothing is copied here: PyPI's llama-cpp-python brings both
// (CMake: -DCODEGEMM_GGML=.../site-packages/llama_cpp/lib; the headers are found from there).
// ggml calls an operator from each of its threads with that thread's number. So every thread gets the rows
// that are its own, as a matrix packed by itself, and multiplies on no other thread than itself.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <codegemm_c.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <CLI/CLI.hpp>

namespace {

struct Options {
  std::int64_t rows = 4096;
  std::int64_t cols = 4096;
  std::string format = "m2v8g128";
  int threads = 2;
  int rounds = 11;
  double cold_megabytes = 256.0;
};

void check(codegemm_c_status status) {
  if (status == CODEGEMM_C_OK) return;
  throw std::runtime_error(std::string(codegemm_c_status_name(status)) + ": " + codegemm_c_last_error());
}

float half_value(std::uint16_t bits) {
  ggml_fp16_t half = 0;
  static_assert(sizeof(half) == sizeof(bits));
  std::memcpy(&half, &bits, sizeof(half));
  return ggml_fp16_to_fp32(half);
}

std::uint16_t half_bits(float value) {
  const ggml_fp16_t half = ggml_fp32_to_fp16(value);
  std::uint16_t bits = 0;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}

/// Quantized weights in the canonical layout, here random ones.
struct Weights {
  codegemm_c_format format = {};
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<std::uint32_t> codes;      // [m][words of a row][rows]
  std::vector<std::uint16_t> codebooks;  // [m][2^b][v]
  std::vector<std::uint16_t> scales;     // [groups][rows]

  Weights(const Options& options, std::mt19937& random) : rows(options.rows), cols(options.cols) {
    check(codegemm_c_parse_format(options.format.c_str(), &format));
    std::int64_t words = 0, values = 0, scale_values = 0;
    check(codegemm_c_canonical_sizes(&format, rows, cols, &words, &values, &scale_values));
    if (format.b > 8) throw std::runtime_error(options.format + ": codes have at most 8 bits on the CPU");
    codes.resize(static_cast<std::size_t>(words));
    codebooks.resize(static_cast<std::size_t>(values));
    scales.resize(static_cast<std::size_t>(scale_values));
    const std::int64_t row_words = row_words_of();
    const std::int64_t vectors = cols / format.v;
    for (std::int64_t i = 0; i < words; ++i) {
      std::uint32_t word = 0;
      for (std::int64_t j = 0; j < 4; ++j) {
        if (i / rows % row_words * 4 + j >= vectors) continue;  // what is over stays 0
        word |= (static_cast<std::uint32_t>(random()) & ((1U << format.b) - 1U)) << (8 * j);
      }
      codes[static_cast<std::size_t>(i)] = word;
    }
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.5F, 1.5F);
    for (auto& value : codebooks) value = half_bits(normal(random));
    const float gain = 1.0F / std::sqrt(static_cast<float>(cols * format.m));
    for (auto& scale : scales) scale = half_bits(uniform(random) * gain);
  }

  [[nodiscard]] std::int64_t row_words_of() const {
    return static_cast<std::int64_t>(codes.size()) / (format.m * rows);
  }

  /// W[N][K] by the formula of codegemm_c_format.
  [[nodiscard]] std::vector<float> dequantize() const {
    std::vector<float> out(static_cast<std::size_t>(rows * cols));
    const std::int64_t group = format.g < 0 ? cols : format.g;
    for (std::int64_t k = 0; k < cols; ++k) {
      const std::int64_t j = k / format.v;
      for (std::int64_t n = 0; n < rows; ++n) {
        float sum = 0.0F;
        for (std::int64_t c = 0; c < format.m; ++c) {
          const auto at = static_cast<std::size_t>((c * row_words_of() + j / 4) * rows + n);
          const std::int64_t code = codes[at] >> (8 * (j % 4)) & 255U;
          const std::int64_t value = ((c << format.b) + code) * format.v + k % format.v;
          sum += half_value(codebooks[static_cast<std::size_t>(value)]);
        }
        out[static_cast<std::size_t>(n * cols + k)] =
            sum * half_value(scales[static_cast<std::size_t>(k / group * rows + n)]);
      }
    }
    return out;
  }

  /// Rows first to first + count as a matrix of their own.
  [[nodiscard]] codegemm_c_packed* pack(std::int64_t first, std::int64_t count) const {
    const auto cut = [&](const auto& array) {
      std::remove_const_t<std::remove_reference_t<decltype(array)>> out;
      for (std::size_t at = 0; at < array.size(); at += static_cast<std::size_t>(rows)) {
        const auto begin = array.begin() + static_cast<std::ptrdiff_t>(at) + first;
        out.insert(out.end(), begin, begin + count);
      }
      return out;
    };
    const auto own_codes = cut(codes);
    const auto own_scales = cut(scales);
    codegemm_c_matrix matrix = {};
    matrix.struct_size = sizeof(matrix);
    matrix.format = format;
    matrix.rows = count;
    matrix.cols = cols;
    matrix.codes = own_codes.data();
    matrix.codebooks = codebooks.data();
    matrix.scales = own_scales.data();
    matrix.code_words = static_cast<std::int64_t>(own_codes.size());
    matrix.codebook_values = static_cast<std::int64_t>(codebooks.size());
    matrix.scale_values = static_cast<std::int64_t>(own_scales.size());
    codegemm_c_packed* packed = nullptr;
    check(codegemm_c_pack(&matrix, &packed));
    return packed;
  }
};

struct Destroy {
  void operator()(codegemm_c_packed* packed) const { codegemm_c_packed_destroy(packed); }
  void operator()(codegemm_c_executor* executor) const { codegemm_c_executor_destroy(executor); }
  void operator()(void* memory) const { std::free(memory); }
};

/// What one of ggml's threads works with. Not shared, so that nothing waits.
struct Part {
  std::int64_t first = 0;
  std::unique_ptr<codegemm_c_packed, Destroy> packed;
  std::unique_ptr<codegemm_c_executor, Destroy> executor;  // of one thread: the one that calls
  std::unique_ptr<void, Destroy> workspace;
  std::size_t workspace_bytes = 0;
};

/// A linear layer for graphs of a certain number of threads and up to max_tokens tokens.
class Layer {
 public:
  Layer(const Weights& weights, int threads, std::int64_t max_tokens)
      : rows_(weights.rows), parts_(static_cast<std::size_t>(threads)) {
    constexpr std::int64_t kRowTile = 16;
    const std::int64_t tiles = (rows_ + kRowTile - 1) / kRowTile;
    for (int i = 0; i < threads; ++i) {
      Part& part = parts_[static_cast<std::size_t>(i)];
      part.first = std::min(rows_, tiles * i / threads * kRowTile);
      const std::int64_t count = std::min(rows_, tiles * (i + 1) / threads * kRowTile) - part.first;
      part.packed.reset(weights.pack(part.first, count));
      codegemm_c_executor* executor = nullptr;
      check(codegemm_c_executor_create(1, &executor));
      part.executor.reset(executor);
      check(codegemm_c_workspace_bytes(part.packed.get(), max_tokens, 1, &part.workspace_bytes));
      constexpr std::size_t kAlignment = CODEGEMM_C_WORKSPACE_ALIGNMENT;
      part.workspace_bytes = (part.workspace_bytes + kAlignment) / kAlignment * kAlignment;
      part.workspace.reset(std::aligned_alloc(kAlignment, part.workspace_bytes));
      if (part.workspace == nullptr) throw std::bad_alloc();
    }
  }

  /// x [tokens][K] becomes y [tokens][N] in a graph. The layer outlives the graph's computations.
  [[nodiscard]] ggml_tensor* add(ggml_context* context, ggml_tensor* x) {
    return ggml_custom_4d(context, GGML_TYPE_F32, rows_, x->ne[1], 1, 1, &x, 1, &Layer::compute,
                          static_cast<int>(parts_.size()), this);
  }

  /// Nothing may be thrown through ggml: what a thread could not do is told here.
  [[nodiscard]] bool failed() const { return failed_; }

 private:
  // [guide: ggml_operator]
  static void compute(ggml_tensor* y, int thread, int threads, void* self) {
    auto& layer = *static_cast<Layer*>(self);
    const ggml_tensor* x = y->src[0];
    const std::size_t count = layer.parts_.size();
    // A graph that runs on fewer threads: each takes several parts.
    for (auto i = static_cast<std::size_t>(thread); i < count; i += static_cast<std::size_t>(threads)) {
      const Part& part = layer.parts_[i];
      const auto floats = [](std::size_t bytes) { return static_cast<std::int64_t>(bytes / sizeof(float)); };
      const codegemm_c_status status =
          codegemm_c_gemm(part.packed.get(), x->ne[1], static_cast<const float*>(x->data), floats(x->nb[1]),
                          static_cast<float*>(y->data) + part.first, floats(y->nb[1]), part.workspace.get(),
                          part.workspace_bytes, part.executor.get());
      if (status != CODEGEMM_C_OK) layer.failed_ = true;
    }
  }
  // [guide: end]

  std::int64_t rows_;
  std::vector<Part> parts_;
  std::atomic<bool> failed_ = false;
};

/// A ggml context with room for some tensors' data.
class Context {
 public:
  explicit Context(std::size_t bytes) {
    constexpr std::size_t kRoom = std::size_t{1} << 20;  // of tensors' heads, graphs and alignment
    context_ = ggml_init({bytes + kRoom, nullptr, false});
    if (context_ == nullptr) throw std::bad_alloc();
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() { ggml_free(context_); }

  [[nodiscard]] ggml_context* get() const { return context_; }

 private:
  ggml_context* context_;
};

/// A graph of the given outputs, computed by ggml's own threads.
class Graph {
 public:
  Graph(ggml_context* context, const std::vector<ggml_tensor*>& outputs, int threads)
      : graph_(ggml_new_graph(context)) {
    for (ggml_tensor* output : outputs) ggml_build_forward_expand(graph_, output);
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    pool_ = ggml_threadpool_new(&params);
    plan_ = ggml_graph_plan(graph_, threads, pool_);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { ggml_threadpool_free(pool_); }

  void compute() {
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS)
      throw std::runtime_error("ggml_graph_compute failed");
  }

  /// Median microseconds.
  [[nodiscard]] double time_us(int rounds) {
    std::vector<double> times;
    for (int i = 0; i <= rounds; ++i) {
      const auto start = std::chrono::steady_clock::now();
      compute();
      const std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - start;
      if (i > 0) times.push_back(passed.count());
    }
    std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
    return times[static_cast<std::size_t>(rounds / 2)];
  }

 private:
  ggml_cgraph* graph_;
  ggml_threadpool* pool_ = nullptr;
  ggml_cplan plan_ = {};
  std::vector<std::uint8_t> work_;
};

/// ||y - x W^T|| / ||x W^T||, in double.
double relative_error(const std::vector<float>& w, const ggml_tensor* x, const ggml_tensor* y) {
  const std::int64_t cols = x->ne[0];
  double off2 = 0.0, size2 = 0.0;
  for (std::int64_t t = 0; t < x->ne[1]; ++t) {
    for (std::int64_t n = 0; n < y->ne[0]; ++n) {
      double want = 0.0;
      for (std::int64_t k = 0; k < cols; ++k) {
        want += static_cast<double>(w[static_cast<std::size_t>(n * cols + k)]) *
                static_cast<double>(static_cast<const float*>(x->data)[t * cols + k]);
      }
      const double off = static_cast<double>(static_cast<const float*>(y->data)[t * y->ne[0] + n]) - want;
      off2 += off * off;
      size2 += want * want;
    }
  }
  return std::sqrt(off2 / size2);
}

ggml_tensor* random_x(ggml_context* context, std::int64_t cols, std::int64_t tokens, std::mt19937& random) {
  ggml_tensor* x = ggml_new_tensor_2d(context, GGML_TYPE_F32, cols, tokens);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < cols * tokens; ++i) static_cast<float*>(x->data)[i] = normal(random);
  return x;
}

int run(const Options& options) {
  std::mt19937 random(20261124);
  const Weights weights(options, random);
  const std::vector<float> w = weights.dequantize();
  const std::int64_t rows = options.rows, cols = options.cols;

  // ---- A graph of one layer: one and three tokens, on the threads that the layer was made for, and on one.
  constexpr std::int64_t kMaxTokens = 3;
  Layer layer(weights, options.threads, kMaxTokens);
  double error = 0.0;
  for (const std::int64_t tokens : {std::int64_t{1}, kMaxTokens}) {
    for (const int threads : {options.threads, 1}) {
      const Context context(sizeof(float) * static_cast<std::size_t>((rows + cols) * tokens));
      ggml_tensor* x = random_x(context.get(), cols, tokens, random);
      ggml_tensor* y = layer.add(context.get(), x);
      std::fill_n(static_cast<float*>(y->data), rows * tokens, NAN);
      Graph(context.get(), {y}, threads).compute();
      if (layer.failed()) throw std::runtime_error("codegemm_c_gemm failed in a thread of ggml's");
      const double now = relative_error(w, x, y);
      error = now <= error ? error : now;  // a NaN stays
    }
  }
  std::printf("%lld x %lld as %s in a ggml graph: relative error %.1e\n", static_cast<long long>(rows),
              static_cast<long long>(cols), options.format.c_str(), error);
  if (!(error < 1e-3)) return 1;

  // ---- The time of one layer for one token, of as many copies in a graph as no cache holds.
  const std::int64_t block = ggml_blck_size(GGML_TYPE_Q2_K);
  if (cols % block != 0) {
    std::printf("no Q2_K weights: K is not a multiple of %lld\n", static_cast<long long>(block));
    return 0;
  }
  const std::size_t q2_bytes = ggml_row_size(GGML_TYPE_Q2_K, cols) * static_cast<std::size_t>(rows);
  const double cold = options.cold_megabytes * 1024.0 * 1024.0 / static_cast<double>(q2_bytes);
  const auto copies = static_cast<std::size_t>(std::clamp(std::ceil(cold), 1.0, 512.0));
  const Context context(copies * (q2_bytes + 2 * sizeof(float) * static_cast<std::size_t>(rows)) +
                        sizeof(float) * static_cast<std::size_t>(cols) + copies * 4096);
  ggml_tensor* x = random_x(context.get(), cols, 1, random);
  std::vector<ggml_tensor*> q2_outputs, our_outputs;
  std::vector<std::unique_ptr<Layer>> layers;
  for (std::size_t i = 0; i < copies; ++i) {
    ggml_tensor* q2 = ggml_new_tensor_2d(context.get(), GGML_TYPE_Q2_K, cols, rows);
    if (i == 0) {
      ggml_quantize_chunk(GGML_TYPE_Q2_K, w.data(), q2->data, 0, rows, cols, nullptr);
    } else {
      std::memcpy(q2->data, q2_outputs[0]->src[0]->data, q2_bytes);
    }
    q2_outputs.push_back(ggml_mul_mat(context.get(), q2, x));
    layers.push_back(std::make_unique<Layer>(weights, options.threads, 1));
    our_outputs.push_back(layers.back()->add(context.get(), x));
  }
  Graph q2_graph(context.get(), q2_outputs, options.threads);
  const double q2_us = q2_graph.time_us(options.rounds) / static_cast<double>(copies);
  Graph our_graph(context.get(), our_outputs, options.threads);
  const double our_us = our_graph.time_us(options.rounds) / static_cast<double>(copies);
  std::printf(
      "one token, %d threads, %zu copies in turn: %s %.0f us, ggml's Q2_K %.0f us: %.2f times as fast\n",
      options.threads, copies, options.format.c_str(), our_us, q2_us, q2_us / our_us);
  std::printf("Q2_K of the same weights is %.1e off, which is what these random weights make of it\n",
              relative_error(w, x, q2_outputs[0]));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"A linear layer on codebook-quantized weights as a custom operator of ggml."};
  app.add_option("--rows", options.rows, "N")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--cols", options.cols, "K")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--format", options.format, "mMvVgG or mMvVbBgG")->capture_default_str();
  app.add_option("--threads", options.threads, "of ggml's")->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--rounds", options.rounds, "of the timing")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  app.add_option("--cold-megabytes", options.cold_megabytes, "of Q2_K weights that are read in turn")
      ->check(CLI::Range(0.0, 4096.0))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run(options);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "ggml_layer: %s\n", e.what());
    return 2;
  }
}
