// SPDX-License-Identifier: Apache-2.0
//
// bench/support/random_llama.cuh - decoders of random weights, made on the device, whole or a rank's part;
// the same from the same seeds, in any process.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/modules.cuh>
#include <prefillshare/model/cuda/tensor_parallel.cuh>

#include "gpu_problem.cuh"
#include "gpu_timing.cuh"

namespace codegemm::bench {

using prefillshare::ModelConfig;
using prefillshare::Sequence;
using prefillshare::cuda::DeviceArray;
using prefillshare::cuda::DeviceKvAllocator;
using prefillshare::cuda::DeviceKvStorage;
using prefillshare::cuda::DeviceLlama;
using prefillshare::cuda::DeviceLlamaLayer;

// The kernels that m1v4g128 needs.
struct TwoBitConfigs {
  using Gather = config_list<cuda::GatherM1V4G128>;
  using Fused = config_list<cuda::Fused<4, 1, 3>>;
};
using Coded = prefillshare::cuda::DeviceCodeGemmLinear<__half, TwoBitConfigs>;
using Dense = prefillshare::cuda::DeviceDenseLinear<__half>;
using CublasHandle = std::shared_ptr<prefillshare::cuda::Cublas>;

inline ModelConfig llama_config(std::int64_t hidden, std::int64_t intermediate, std::int64_t layers,
                                std::int64_t heads, std::int64_t kv_heads, std::int64_t vocab) {
  ModelConfig c;
  c.vocab_size = vocab;
  c.hidden_size = hidden;
  c.intermediate_size = intermediate;
  c.layers = layers;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = 128;
  c.context_length = 131072;
  c.rope.head_dim = 128;
  c.rope.theta = 500000.0;
  c.rope.scaling = prefillshare::RopeScaling::kLlama3;
  c.rope.factor = 8.0;
  return c;
}
inline ModelConfig llama_8b() { return llama_config(4096, 14336, 32, 32, 8, 128256); }
inline ModelConfig llama_70b() { return llama_config(8192, 28672, 80, 64, 8, 128256); }

template <class T>
T take(Result<T> made) {
  check(made.status());
  return std::move(made).value();
}

__device__ inline std::uint64_t draw_bits(std::uint64_t i, std::uint64_t seed) {
  std::uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ULL + seed * 0xD1B54A32D192ED03ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}
__device__ inline float draw_uniform(std::uint64_t z) { return static_cast<float>(z >> 40) * 0x1p-24F; }

// Variance scale squared.
template <int>
__global__ void fill_values_kernel(__half* data, std::uint64_t count, float scale, std::uint64_t seed) {
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step)
    data[i] = __float2half_rn((draw_uniform(draw_bits(i, seed)) - 0.5F) * 3.4641016F * scale);
}
// Codes of 8 bits: any byte is one. Scales from 32 to 64 behind them.
template <int>
__global__ void fill_codes_kernel(unsigned char* tiles, std::uint64_t tile_count, int tile_bytes,
                                  int scales_at, std::uint64_t seed) {
  for (std::uint64_t tile = blockIdx.x; tile < tile_count; tile += gridDim.x) {
    auto* const words = reinterpret_cast<unsigned*>(tiles + tile * static_cast<std::uint64_t>(tile_bytes));
    for (int i = static_cast<int>(threadIdx.x); i < tile_bytes / 4; i += static_cast<int>(blockDim.x)) {
      const std::uint64_t z = draw_bits(tile * 4096U + static_cast<std::uint64_t>(i), seed);
      const auto scale = [](std::uint64_t bits) {
        return static_cast<unsigned>(__half_as_ushort(__float2half_rn(32.0F + 32.0F * draw_uniform(bits))));
      };
      words[i] = i * 4 < scales_at ? static_cast<unsigned>(z) : scale(z) | scale(z << 20) << 16;
    }
  }
}

inline void fill_values(__half* data, std::size_t count, float scale, std::uint64_t seed) {
  fill_values_kernel<0><<<1024, 256>>>(data, count, scale, seed);
  check(cudaGetLastError(), "fill");
}

template <class T>
DeviceArray<T> device_array(std::size_t size) {
  return take(DeviceArray<T>::create(size));
}

// Makes the tensors of a model in order: the same order gives the same weights.
class RandomLlama {
 public:
  RandomLlama(CublasHandle cublas, std::uint64_t first_seed)
      : cublas_(std::move(cublas)), seed_(first_seed) {}

  // Weights of about unit gain; codebooks as the packed layout has them, largest at about 2^6.
  Coded coded(std::vector<std::int64_t> part_rows, std::int64_t cols) {
    const Format format = take(parse_format("m1v4g128"));
    const auto layout = take(cuda::packed_layout(format, std::span<const std::int64_t>(part_rows), cols));
    auto bytes = device_array<std::byte>(layout.bytes);
    check(cudaMemset(bytes.data(), 0, bytes.bytes()), "cudaMemset");
    const auto values = static_cast<std::size_t>(layout.parts * format.m * format.centroids() * format.v);
    fill_values(reinterpret_cast<__half*>(bytes.data() + layout.codebooks_at), values, 20.0F, seed_++);
    fill_codes_kernel<0><<<4096, 128>>>(reinterpret_cast<unsigned char*>(bytes.data() + layout.tiles_at),
                                        static_cast<std::uint64_t>(layout.granules * layout.row_tiles),
                                        layout.tile_bytes, layout.scales_at(), seed_++);
    check(cudaGetLastError(), "fill");
    cuda::DevicePackedView view;
    view.format = format;
    for (const std::int64_t rows : part_rows) view.rows += rows;
    view.cols = cols;
    view.layout = layout;
    view.data = bytes.data();
    view.version = cuda::kPackedVersion;
    view.unscale =
        std::exp2f(-std::round(std::log2(20.0F * 48.0F * std::sqrt(static_cast<float>(cols * format.m)))));
    return take(Coded::create(view, std::move(bytes)));
  }
  Dense dense(std::int64_t rows, std::int64_t cols) {
    auto weights = device_array<__half>(static_cast<std::size_t>(rows * cols));
    fill_values(weights.data(), weights.size(), 1.0F / std::sqrt(static_cast<float>(cols)), seed_++);
    return take(
        Dense::create(cublas_, std::make_shared<const DeviceArray<__half>>(std::move(weights)), rows, cols));
  }

  DeviceLlama<Dense> dense_model(const ModelConfig& c) {
    DeviceLlama<Dense> out = ends<DeviceLlama<Dense>>(c);
    for (std::int64_t i = 0; i < c.layers; ++i) {
      DeviceLlamaLayer<Dense> layer = norms<Dense>(c);
      layer.qkv = dense(c.q_size() + 2 * c.kv_size(), c.hidden_size);
      layer.o = dense(c.hidden_size, c.q_size());
      layer.gate_up = dense(2 * c.intermediate_size, c.hidden_size);
      layer.down = dense(c.hidden_size, c.intermediate_size);
      out.layers.push_back(std::move(layer));
    }
    out.head = dense(c.vocab_size, c.hidden_size);
    return checked(std::move(out));
  }
  // The head stays fp16.
  DeviceLlama<Coded, Dense> coded_model(const ModelConfig& c) {
    DeviceLlama<Coded, Dense> out = ends<DeviceLlama<Coded, Dense>>(c);
    for (std::int64_t i = 0; i < c.layers; ++i) {
      DeviceLlamaLayer<Coded> layer = norms<Coded>(c);
      layer.qkv = coded({c.q_size(), c.kv_size(), c.kv_size()}, c.hidden_size);
      layer.o = coded({c.hidden_size}, c.q_size());
      layer.gate_up = coded({c.intermediate_size, c.intermediate_size}, c.hidden_size);
      layer.down = coded({c.hidden_size}, c.intermediate_size);
      out.layers.push_back(std::move(layer));
    }
    out.head = dense(c.vocab_size, c.hidden_size);
    return checked(std::move(out));
  }
  // A rank's part: `c` is its config, from shard_config().
  template <class Group>
  auto coded_part(const ModelConfig& c, const Group& group) {
    using Linear = prefillshare::cuda::ParallelLinear<Coded, Group>;
    using Head = prefillshare::cuda::ParallelHead<Dense, Group>;
    auto out = ends<DeviceLlama<Linear, Head>>(c);
    for (std::int64_t i = 0; i < c.layers; ++i) {
      DeviceLlamaLayer<Linear> layer = norms<Linear>(c);
      layer.qkv = Linear::by_outputs(coded({c.q_size(), c.kv_size(), c.kv_size()}, c.hidden_size));
      layer.o = Linear::by_inputs(coded({c.hidden_size}, c.q_size()), group);
      layer.gate_up = Linear::by_outputs(coded({c.intermediate_size, c.intermediate_size}, c.hidden_size));
      layer.down = Linear::by_inputs(coded({c.hidden_size}, c.intermediate_size), group);
      out.layers.push_back(std::move(layer));
    }
    out.head = Head(dense(c.vocab_size / group.ranks(), c.hidden_size), group);
    return checked(std::move(out));
  }

  static DeviceArray<float> ones(std::int64_t size) {
    return take(DeviceArray<float>::copy_of(std::vector<float>(static_cast<std::size_t>(size), 1.0F)));
  }
  template <class Model>
  static Model checked(Model model) {
    check(validate(model));
    check(cudaDeviceSynchronize(), "the weights");
    return model;
  }
  template <class Linear>
  static DeviceLlamaLayer<Linear> norms(const ModelConfig& c) {
    DeviceLlamaLayer<Linear> out;
    out.input_norm = ones(c.hidden_size);
    out.post_attention_norm = ones(c.hidden_size);
    return out;
  }

 private:
  // All but the layers and the head.
  template <class Model>
  Model ends(const ModelConfig& c) {
    Model out;
    out.config = c;
    auto table = device_array<__half>(static_cast<std::size_t>(c.vocab_size * c.hidden_size));
    fill_values(table.data(), table.size(), 1.0F, seed_++);
    out.embedding = std::make_shared<const DeviceArray<__half>>(std::move(table));
    out.final_norm = ones(c.hidden_size);
    out.rope_frequencies = take(prefillshare::cuda::upload_rope(c.rope));
    return out;
  }

  CublasHandle cublas_;
  std::uint64_t seed_;
};

inline std::vector<std::int32_t> random_prompt(std::int64_t size, std::int64_t vocab,
                                               std::uint64_t seed = 99) {
  Random random{seed};
  std::vector<std::int32_t> out(static_cast<std::size_t>(size));
  for (std::int32_t& id : out)
    id = static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(vocab));
  return out;
}

// Pages with their allocator.
struct KvPool {
  DeviceKvStorage<__half> storage;
  std::unique_ptr<DeviceKvAllocator<__half>> allocator;

  KvPool(const ModelConfig& c, std::int64_t blocks, cudaStream_t stream)
      : storage(take(DeviceKvStorage<__half>::create(kv_shape(c), blocks, stream))),
        allocator(take(DeviceKvAllocator<__half>::create(storage))) {}
};

// Decodes one sequence greedily behind its base cache; its stream and memory.
template <class Model>
class GreedyDecoder {
 public:
  GreedyDecoder(const Model& model, KvPool& pool, std::int64_t max_pages, const cuda::Device& device,
                cudaStream_t stream)
      : model_(model),
        pool_(pool),
        workspace_(take(prefillshare::cuda::DeviceWorkspace<__half>::create(model, 1, 1, device))),
        graph_(take(prefillshare::cuda::DecodeGraph<typename Model::Linear, typename Model::Head>::capture(
            model, pool.storage, workspace_, 1, max_pages, false, device, stream))) {}

  // Forks `base` and puts `token` behind it; waits for the token that follows.
  std::int32_t first(Sequence& base, std::int32_t token) {
    own_ = take(pool_.allocator->fork(base));
    return next(&token);
  }
  // The token behind that.
  std::int32_t next(const std::int32_t* token = nullptr) {
    check(pool_.allocator->append_private(own_, 1));
    const Sequence* const one = &own_;
    check(export_page_table(std::span(&one, 1), table_));
    prefillshare::cuda::DecodeStep step;
    step.table = &table_;
    if (token != nullptr) step.tokens = std::span(token, 1);
    check(graph_->launch(step));
    return take(graph_->wait())[0];
  }
  void end() { own_.reset(); }

 private:
  const Model& model_;
  KvPool& pool_;
  prefillshare::cuda::DeviceWorkspace<__half> workspace_;
  std::unique_ptr<prefillshare::cuda::DecodeGraph<typename Model::Linear, typename Model::Head>> graph_;
  Sequence own_;
  prefillshare::PageTable table_;
};

}  // namespace codegemm::bench
