// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/load_gpu_test.cu - a model that is loaded in parts has, bit for bit, what upload()
// makes of a whole one; no more of it is read at a time than a part; what does not fit is named.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/model/cuda/load.cuh>
#include <prefillshare/model/cuda/upload.cuh>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../gpu_model.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::seed_or;
using HostModel = LlamaModel<DenseLinear>;

// A model's tensors as a file has them.
class MemorySource {
 public:
  struct Tensor {
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::vector<float> values;
  };

  explicit MemorySource(const HostModel& model) {
    const ModelConfig& c = model.config;
    add("model.embed_tokens.weight", c.vocab_size, c.hidden_size, *model.embedding);
    for (std::size_t i = 0; i < model.layers.size(); ++i) {
      const LlamaLayer<DenseLinear>& layer = model.layers[i];
      const std::string prefix = "model.layers." + std::to_string(i) + ".";
      add(prefix + "input_layernorm.weight", layer.input_norm);
      add(prefix + "post_attention_layernorm.weight", layer.post_attention_norm);
      if (c.qk_norm) {
        add(prefix + "self_attn.q_norm.weight", layer.q_norm);
        add(prefix + "self_attn.k_norm.weight", layer.k_norm);
      }
    }
    add("model.norm.weight", model.final_norm);
    for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
      if (name != "lm_head" || !c.tied_embeddings) add(name, layer);
    });
  }

  [[nodiscard]] Result<Tensor> info(std::string_view name) const {
    const auto found = tensors.find(std::string(name));
    if (found == tensors.end()) {
      return codegemm::error(StatusCode::kNotFound, "tensor ", std::string(name), " is missing");
    }
    return Tensor{found->second.rows, found->second.cols, {}};
  }
  [[nodiscard]] Status read_rows(std::string_view name, std::int64_t first, std::int64_t count,
                                 float* out) const {
    const Tensor& tensor = tensors.at(std::string(name));
    REQUIRE((first >= 0 && count > 0 && first + count <= tensor.rows));
    if (name == fails) return codegemm::error(StatusCode::kCorruptData, "tensor ", fails, " cannot be read");
    most_values = std::max(most_values, count * tensor.cols);
    std::copy_n(tensor.values.begin() + first * tensor.cols, count * tensor.cols, out);
    return {};
  }

  std::map<std::string, Tensor> tensors;
  std::string fails;                     // a tensor
  mutable std::int64_t most_values = 0;  // that were asked for at once

 private:
  void add(const std::string& name, std::int64_t rows, std::int64_t cols, std::span<const float> values) {
    tensors[name] = {rows, cols, {values.begin(), values.end()}};
  }
  void add(const std::string& name, std::span<const float> vector) {
    add(name, 1, std::ssize(vector), vector);
  }
  void add(const std::string& name, const DenseLinear& layer) {
    add(name + ".weight", layer.rows(), layer.cols(),
        {layer.weights().data, static_cast<std::size_t>(layer.rows() * layer.cols())});
    if (!layer.bias().empty()) add(name + ".bias", layer.bias());
  }
};
static_assert(cuda::WeightSource<MemorySource>);

template <class T>
bool same(const cuda::DeviceArray<T>& a, const cuda::DeviceArray<T>& b) {
  REQUIRE(a.size() == b.size());
  std::vector<unsigned char> left(a.bytes(), 0x11);
  std::vector<unsigned char> right(b.bytes(), 0x22);
  if (a.size() > 0) {
    REQUIRE_CUDA(cudaMemcpy(left.data(), a.data(), a.bytes(), cudaMemcpyDeviceToHost));
    REQUIRE_CUDA(cudaMemcpy(right.data(), b.data(), b.bytes(), cudaMemcpyDeviceToHost));
  }
  return left == right;
}

ModelConfig config_of(bool tied, bool bias, bool qk_norm) {
  ModelConfig c = gpu_config();
  c.tied_embeddings = tied;
  c.attention_bias = bias;
  c.qk_norm = qk_norm;
  return c;
}

template <class T>
void check_loading(const ModelConfig& c, std::uint64_t seed, std::int64_t part, cudaStream_t stream) {
  const auto host = random_model(c, seed);
  const MemorySource source(*host);
  auto cublas = take(cuda::Cublas::create());
  const cuda::DenseUploader<T> uploader(cublas);
  const auto whole = take(cuda::upload(*host, uploader, uploader));
  const auto loaded = take(cuda::load_dense<T>(c, source, cublas, stream, part));
  CHECK(source.most_values <= std::max<std::int64_t>(part, 256));  // the widest row is that of down or q
  CHECK(same(*loaded->embedding, *whole->embedding));
  CHECK(same(loaded->final_norm, whole->final_norm));
  CHECK(same(loaded->rope_frequencies, whole->rope_frequencies));
  CHECK(same(*loaded->head.weights(), *whole->head.weights()));
  CHECK((loaded->head.weights() == loaded->embedding) == c.tied_embeddings);
  REQUIRE(loaded->layers.size() == whole->layers.size());
  for (std::size_t i = 0; i < loaded->layers.size(); ++i) {
    const auto& a = loaded->layers[i];
    const auto& b = whole->layers[i];
    CHECK(same(a.input_norm, b.input_norm));
    CHECK(same(a.post_attention_norm, b.post_attention_norm));
    CHECK(same(a.q_norm, b.q_norm));
    CHECK(same(a.k_norm, b.k_norm));
    CHECK(same(*a.qkv.weights(), *b.qkv.weights()));
    CHECK(a.qkv.parameter_bytes() == b.qkv.parameter_bytes());  // the bias, too
    CHECK(same(*a.o.weights(), *b.o.weights()));
    CHECK(same(*a.gate_up.weights(), *b.gate_up.weights()));
    CHECK(same(*a.down.weights(), *b.down.weights()));
  }
}

}  // namespace

TEST_CASE("a model loaded in parts is what upload() makes of a whole one, bit for bit") {
  static_cast<void>(gpu_or_skip());
  const std::uint64_t seed = seed_or(91);
  CAPTURE(seed);
  cudaStream_t stream = nullptr;
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  // Parts that cut matrices unevenly, one row at a time, and all at once.
  check_loading<__half>(config_of(true, false, false), seed, 128 * 7, stream);
  check_loading<__half>(config_of(false, true, true), seed + 1, 1, stream);
  check_loading<__nv_bfloat16>(config_of(false, true, false), seed + 2, 1 << 20, stream);
  REQUIRE_CUDA(cudaStreamDestroy(stream));
}

TEST_CASE("loading names the tensor that is missing, of another shape, or cannot be read") {
  static_cast<void>(gpu_or_skip());
  cudaStream_t stream = nullptr;
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const ModelConfig c = config_of(false, false, false);
  const auto host = random_model(c, 5);
  auto cublas = take(cuda::Cublas::create());
  const auto fails = [&](const MemorySource& source, StatusCode code, const std::string& name) {
    const auto loaded = cuda::load_dense<__half>(c, source, cublas, stream, 1000);
    INFO(loaded.status().message());
    CHECK(loaded.status().code() == code);
    CHECK(loaded.status().message().find(name) != std::string::npos);
  };
  const MemorySource whole(*host);
  MemorySource source = whole;
  source.tensors.erase("model.layers.1.mlp.down_proj.weight");
  fails(source, StatusCode::kNotFound, "model.layers.1.mlp.down_proj.weight");
  source = whole;
  source.tensors["model.norm.weight"].cols = 127;
  fails(source, StatusCode::kShapeMismatch, "model.norm.weight");
  source = whole;
  source.fails = "model.layers.0.self_attn.v_proj.weight";
  fails(source, StatusCode::kCorruptData, source.fails);
  CHECK(cuda::WeightStream<__half>::create(0, stream).status().code() == StatusCode::kInvalidArgument);
  auto parts = take(cuda::WeightStream<__half>::create(64, stream));
  const auto none = [](std::int64_t, std::int64_t, float*) { return Status(); };
  CHECK(parts.put(nullptr, 1, 65, none).code() == StatusCode::kInvalidArgument);
  CHECK(parts.put(nullptr, 0, 64, none).ok());
  REQUIRE_CUDA(cudaStreamDestroy(stream));
}

}  // namespace prefillshare::test
