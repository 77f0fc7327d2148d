// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_models.cuh - decoders of published shapes with random weights, made on the GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <codegemm/cuda/dequantize.cuh>
#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/modules.cuh>
#include <prefillshare/model/cuda/search_products.cuh>

#include "gpu_timing.cuh"

namespace codegemm::bench {

using namespace prefillshare;
using namespace prefillshare::cuda;
using codegemm::Format;
using codegemm::cuda::PackedLayout;

// The formats that the suite may be asked for: the kernels that the paper's need.
struct Configs {
  using Gather = codegemm::config_list<codegemm::cuda::GatherM1V4G128, codegemm::cuda::GatherM2V8G128,
                                       codegemm::cuda::GatherM1V4G32>;
  using Fused = codegemm::config_list<codegemm::cuda::Fused<4, 1, 3>, codegemm::cuda::Fused<8, 2, 3>,
                                      codegemm::cuda::Fused<4, 1, 0>>;
};
using Coded = DeviceCodeGemmLinear<__half, Configs>;
using Dense = DeviceDenseLinear<__half>;

inline ModelConfig config_of(const std::string& name) {
  ModelConfig c;
  c.vocab_size = 128256;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.context_length = 131072;
  c.rope.head_dim = 128;
  c.rope.theta = 500000.0;
  c.rope.scaling = RopeScaling::kLlama3;
  c.rope.factor = 8.0;
  if (name == "8b") {
    c.hidden_size = 4096, c.intermediate_size = 14336, c.layers = 32, c.heads = 32;
  } else if (name == "70b") {
    c.hidden_size = 8192, c.intermediate_size = 28672, c.layers = 80, c.heads = 64;
  } else {
    throw std::runtime_error("unknown model " + name + ": 8b or 70b");
  }
  return c;
}

static __device__ std::uint64_t draw(std::uint64_t i, std::uint64_t seed) {
  std::uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ULL + seed * 0xD1B54A32D192ED03ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}
static __device__ float uniform(std::uint64_t z) { return static_cast<float>(z >> 40) * 0x1p-24F; }  // [0, 1)

// Variance 1 times scale squared.
static __global__ void fill_kernel(__half* data, std::uint64_t count, float scale, float shift,
                                   std::uint64_t seed) {
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step)
    data[i] = __float2half_rn((uniform(draw(i, seed)) - 0.5F) * 3.4641016F * scale + shift);
}

// Codes of 8 bits: any byte is one. Scales from 32 to 64 behind them.
static __global__ void fill_tiles_kernel(unsigned char* tiles, std::uint64_t tile_count, int tile_bytes,
                                         int scales_at, std::uint64_t seed) {
  for (std::uint64_t tile = blockIdx.x; tile < tile_count; tile += gridDim.x) {
    auto* const words = reinterpret_cast<unsigned*>(tiles + tile * static_cast<std::uint64_t>(tile_bytes));
    for (int i = static_cast<int>(threadIdx.x); i < tile_bytes / 4; i += static_cast<int>(blockDim.x)) {
      const std::uint64_t z = draw(tile * 4096U + static_cast<std::uint64_t>(i), seed);
      const auto scale = [](std::uint64_t bits) {
        return static_cast<unsigned>(__half_as_ushort(__float2half_rn(32.0F + 32.0F * uniform(bits))));
      };
      words[i] = i * 4 < scales_at ? static_cast<unsigned>(z) : scale(z) | scale(z << 20) << 16;
    }
  }
}

inline void fill(__half* data, std::size_t count, float scale, float shift, std::uint64_t seed) {
  fill_kernel<<<1024, 256>>>(data, count, scale, shift, seed);
  check(cudaGetLastError(), "fill");
}

template <class T>
DeviceArray<T> array(std::size_t size) {
  auto made = DeviceArray<T>::create(size);
  check(made.status());
  return std::move(made).value();
}

inline std::uint64_t next_seed() {
  static std::uint64_t seed = 1;
  return seed++;
}

// Weights of about unit gain; codebooks as the packed layout has them, largest at about 2^6.
inline Coded random_coded(Format format, std::vector<std::int64_t> part_rows, std::int64_t cols) {
  const auto layout = codegemm::cuda::packed_layout(format, std::span<const std::int64_t>(part_rows), cols);
  check(layout.status());
  auto bytes = array<std::byte>(layout->bytes);
  check(cudaMemset(bytes.data(), 0, bytes.bytes()), "cudaMemset");
  const auto values = static_cast<std::size_t>(layout->parts * format.m * format.centroids() * format.v);
  fill(reinterpret_cast<__half*>(bytes.data() + layout->codebooks_at), values, 20.0F, 0.0F, next_seed());
  fill_tiles_kernel<<<4096, 128>>>(reinterpret_cast<unsigned char*>(bytes.data() + layout->tiles_at),
                                   static_cast<std::uint64_t>(layout->granules * layout->row_tiles),
                                   layout->tile_bytes, layout->scales_at(), next_seed());
  check(cudaGetLastError(), "fill");
  codegemm::cuda::DevicePackedView view;
  view.format = format;
  for (const std::int64_t rows : part_rows) view.rows += rows;
  view.cols = cols;
  view.layout = *layout;
  view.data = bytes.data();
  view.version = codegemm::cuda::kPackedVersion;
  view.unscale =
      std::exp2f(-std::round(std::log2(20.0F * 48.0F * std::sqrt(static_cast<float>(cols * format.m)))));
  auto made = Coded::create(view, std::move(bytes));
  check(made.status());
  return std::move(made).value();
}

// The same weights, dense.
inline Dense dense_of(const Coded& coded, const std::shared_ptr<Cublas>& cublas, const Device& device) {
  auto weights = array<__half>(static_cast<std::size_t>(coded.rows() * coded.cols()));
  check(codegemm::cuda::dequantize(coded.weights(),
                                   codegemm::MatrixView<__half>(weights.data(), coded.rows(), coded.cols()),
                                   device, nullptr));
  auto made = Dense::create(cublas, std::make_shared<const DeviceArray<__half>>(std::move(weights)),
                            coded.rows(), coded.cols());
  check(made.status());
  return std::move(made).value();
}

inline DeviceArray<float> ones(std::int64_t size) {
  auto made = DeviceArray<float>::copy_of(std::vector<float>(static_cast<std::size_t>(size), 1.0F));
  check(made.status());
  return std::move(made).value();
}

template <class Linear, class Head>
void add_norms(DeviceLlama<Linear, Head>& model) {
  const ModelConfig& c = model.config;
  for (auto& layer : model.layers) {
    layer.input_norm = ones(c.hidden_size);
    layer.post_attention_norm = ones(c.hidden_size);
  }
  model.final_norm = ones(c.hidden_size);
  auto rope = upload_rope(c.rope);
  check(rope.status());
  model.rope_frequencies = std::move(rope).value();
}

using CodedModel = DeviceLlama<Coded, Dense>;  // the head stays fp16
using DenseModel = DeviceLlama<Dense, Dense>;

/// What multiplies one token by the dense weights of a model: those of all layers, or of the head alone.
template <class Linear>
void set_one_token(DeviceLlama<Linear, Dense>& model, OneToken kernel) {
  model.head.set_one_token(kernel);
  if constexpr (std::is_same_v<Linear, Dense>) {
    for (auto& l : model.layers) {
      for (Dense* layer : {&l.qkv, &l.o, &l.gate_up, &l.down}) layer->set_one_token(kernel);
    }
  }
}

inline CodedModel coded_model(const ModelConfig& c, Format format, const std::shared_ptr<Cublas>& cublas) {
  CodedModel out;
  out.config = c;
  auto table = array<__half>(static_cast<std::size_t>(c.vocab_size * c.hidden_size));
  fill(table.data(), table.size(), 1.0F, 0.0F, next_seed());
  out.embedding = std::make_shared<const DeviceArray<__half>>(std::move(table));
  for (std::int64_t i = 0; i < c.layers; ++i) {
    DeviceLlamaLayer<Coded> layer;
    layer.qkv = random_coded(format, {c.q_size(), c.kv_size(), c.kv_size()}, c.hidden_size);
    layer.o = random_coded(format, {c.hidden_size}, c.q_size());
    layer.gate_up = random_coded(format, {c.intermediate_size, c.intermediate_size}, c.hidden_size);
    layer.down = random_coded(format, {c.hidden_size}, c.intermediate_size);
    out.layers.push_back(std::move(layer));
  }
  add_norms(out);
  auto head = array<__half>(static_cast<std::size_t>(c.vocab_size * c.hidden_size));
  fill(head.data(), head.size(), 1.0F / std::sqrt(static_cast<float>(c.hidden_size)), 0.0F, next_seed());
  auto made = Dense::create(cublas, std::make_shared<const DeviceArray<__half>>(std::move(head)),
                            c.vocab_size, c.hidden_size);
  check(made.status());
  out.head = std::move(made).value();
  check(validate(out));
  check(cudaDeviceSynchronize(), "the weights");
  return out;
}

inline DenseModel dense_model(const CodedModel& from, const std::shared_ptr<Cublas>& cublas,
                              const Device& device) {
  DenseModel out;
  out.config = from.config;
  out.embedding = from.embedding;
  for (const auto& layer : from.layers) {
    DeviceLlamaLayer<Dense> made;
    made.qkv = dense_of(layer.qkv, cublas, device);
    made.o = dense_of(layer.o, cublas, device);
    made.gate_up = dense_of(layer.gate_up, cublas, device);
    made.down = dense_of(layer.down, cublas, device);
    out.layers.push_back(std::move(made));
  }
  add_norms(out);
  auto head = Dense::create(cublas, from.head.weights(), from.head.rows(), from.head.cols());
  check(head.status());
  out.head = std::move(head).value();
  check(validate(out));
  check(cudaDeviceSynchronize(), "the dense weights");
  return out;
}

// Weights of its own, of unit gain; embedding and head too.
inline DenseModel dense_model(const ModelConfig& c, const std::shared_ptr<Cublas>& cublas) {
  const auto random = [&](std::int64_t rows, std::int64_t cols) {
    auto weights = array<__half>(static_cast<std::size_t>(rows * cols));
    fill(weights.data(), weights.size(), 1.0F / std::sqrt(static_cast<float>(cols)), 0.0F, next_seed());
    auto made =
        Dense::create(cublas, std::make_shared<const DeviceArray<__half>>(std::move(weights)), rows, cols);
    check(made.status());
    return std::move(made).value();
  };
  DenseModel out;
  out.config = c;
  auto table = array<__half>(static_cast<std::size_t>(c.vocab_size * c.hidden_size));
  fill(table.data(), table.size(), 1.0F, 0.0F, next_seed());
  out.embedding = std::make_shared<const DeviceArray<__half>>(std::move(table));
  for (std::int64_t i = 0; i < c.layers; ++i) {
    DeviceLlamaLayer<Dense> layer;
    layer.qkv = random(c.q_size() + 2 * c.kv_size(), c.hidden_size);
    layer.o = random(c.hidden_size, c.q_size());
    layer.gate_up = random(2 * c.intermediate_size, c.hidden_size);
    layer.down = random(c.hidden_size, c.intermediate_size);
    out.layers.push_back(std::move(layer));
  }
  add_norms(out);
  out.head = random(c.vocab_size, c.hidden_size);
  check(validate(out));
  check(cudaDeviceSynchronize(), "the weights");
  return out;
}

}  // namespace codegemm::bench
