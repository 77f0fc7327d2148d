// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/workspace.cuh - the activations of a forward pass on the GPU and the memory of its
// kernels.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <prefillshare/attention/decode.cuh>
#include <prefillshare/attention/prefill.cuh>
#include <prefillshare/attention/prefill_split.cuh>
#include <prefillshare/kv/element.hpp>
#include <prefillshare/model/cuda/llama.cuh>

namespace prefillshare::cuda {

/// The activations of a pass and the memory of its kernels, on the device: allocated once, used by one pass
/// at a time.
template <class T>
class DeviceWorkspace {
 public:
  /// Room for `max_tokens` tokens of up to `max_sequences` sequences a pass. kInvalidArgument for numbers
  /// below 1; kOutOfMemory, kCudaError.
  template <class Linear, class Head>
  [[nodiscard]] static Result<DeviceWorkspace> create(const DeviceLlama<Linear, Head>& model,
                                                      std::int64_t max_tokens, std::int64_t max_sequences,
                                                      const Device& device) {
    const ModelConfig& c = model.config;
    if (max_tokens < 1 || max_tokens > kMaxQueryTokens || max_sequences < 1 || max_sequences > max_tokens ||
        max_sequences > kMaxSequences) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceWorkspace for ", max_tokens, " tokens of ",
                             max_sequences, " sequences");
    }
    LinearMemory linear = model.head.memory(max_sequences, device);
    for (const DeviceLlamaLayer<Linear>& l : model.layers) {
      for (const Linear* layer : {&l.qkv, &l.o, &l.gate_up, &l.down})
        linear = larger(linear, layer->memory(max_tokens, device));
    }
    const std::size_t attention = std::max(attention_bytes<T>(c, max_tokens, max_sequences, device),
                                           attention_bytes<Fp8E4M3>(c, max_tokens, max_sequences, device));

    DeviceWorkspace out;
    out.max_tokens_ = max_tokens;
    out.max_sequences_ = max_sequences;
    Status status;
    const auto make = [&](auto& array, std::int64_t size, bool zeroed = false) {
      using Array = std::remove_reference_t<decltype(array)>;
      if (!status.ok()) return;
      auto made = zeroed ? Array::zeros(static_cast<std::size_t>(size))
                         : Array::create(static_cast<std::size_t>(size));
      if (made.ok()) {
        array = std::move(made).value();
      } else {
        status = made.status().with_prefix("DeviceWorkspace");
      }
    };
    make(out.hidden, max_tokens * c.hidden_size);
    make(out.normed, max_tokens * c.hidden_size);
    make(out.qkv, max_tokens * (c.q_size() + 2 * c.kv_size()));
    make(out.attended, max_tokens * c.q_size());
    make(out.gated, max_tokens * c.intermediate_size);
    make(out.logits, max_sequences * c.vocab_size);
    make(out.attention, static_cast<std::int64_t>(attention));
    make(out.zeroed, static_cast<std::int64_t>(linear.zeroed), true);
    make(out.scratch, static_cast<std::int64_t>(linear.scratch));
    if (!status.ok()) return status;
    return out;
  }

  [[nodiscard]] std::int64_t max_tokens() const noexcept { return max_tokens_; }        ///< of a pass
  [[nodiscard]] std::int64_t max_sequences() const noexcept { return max_sequences_; }  ///< of a pass

  DeviceArray<float> hidden;         ///< [tokens][hidden], the residual stream
  DeviceArray<T> normed;             ///< [tokens][hidden]
  DeviceArray<T> qkv;                ///< [tokens][(heads + 2 * kv_heads) * head_dim]
  DeviceArray<T> attended;           ///< [tokens][heads * head_dim]
  DeviceArray<T> gated;              ///< [tokens][intermediate]
  DeviceArray<float> logits;         ///< [sequences][vocab], of the last pass that asked for them
  DeviceArray<std::byte> attention;  ///< of decode, and of prefill with keys split
  DeviceArray<std::byte> zeroed;     ///< of linear layers
  DeviceArray<std::byte> scratch;    ///< the same

 private:
  DeviceWorkspace() = default;

  // Of decode and of prefill with keys split, over a cache of type C.
  template <class C>
  [[nodiscard]] static std::size_t attention_bytes(const ModelConfig& c, std::int64_t max_tokens,
                                                   std::int64_t max_sequences, const Device& device) {
    DecodeProblem<T, T, C> decode;
    decode.heads = static_cast<int>(c.heads);
    decode.kv.kv_heads = static_cast<int>(c.kv_heads);
    decode.kv.head_dim = static_cast<int>(c.head_dim);
    decode.kv.page_size = 1;
    decode.table.sequences = static_cast<int>(max_sequences);
    const std::size_t plain = workspace_bytes(decode, device);
    // As many groups as sequences is the most that decoding needs.
    decode.prefixes.groups = static_cast<int>(max_sequences);
    return std::max(
        {plain, workspace_bytes(decode, device), most_split_workspace(decode, max_tokens, device)});
  }

  // Of any pass that splits keys: the more tokens and sequences, the more; few of them are split.
  template <class C>
  [[nodiscard]] static std::size_t most_split_workspace(const DecodeProblem<T, T, C>& like,
                                                        std::int64_t max_tokens, const Device& device) {
    PrefillProblem<T, T, C> p;
    p.kv = like.kv;
    p.heads = like.heads;
    p.table.sequences = 1;
    std::int64_t tokens = 0;
    for (std::int64_t step = max_tokens; step > 0; step /= 2) {
      for (p.q.rows = tokens + step; p.q.rows <= max_tokens && splits_keys(p, device); p.q.rows += step) {
        tokens = p.q.rows;
      }
    }
    p.q.rows = tokens;
    p.table.sequences = static_cast<int>(std::min<std::int64_t>(tokens, like.table.sequences));
    return split_workspace_bytes(p, device);
  }

  std::int64_t max_tokens_ = 0;
  std::int64_t max_sequences_ = 0;
};

}  // namespace prefillshare::cuda
