// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/decode_lane.hpp - what a decode worker asks of each of its modules, and the module on
// processors.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/aligned_buffer.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/model/modules.hpp>

namespace prefillshare {

/// One sequence's part of a decode step.
struct DecodeSlot {
  Sequence* own = nullptr;   ///< the fork, which counts the token already
  std::int32_t token = 0;    ///< runs at its end
  float temperature = 0.0F;  ///< of the draw of the next token; 0: the largest logit
  std::uint64_t seed = 0;    ///< of the draw, another one for each token of an answer
};

/// A decode module with the memory for its batches: HostDecodeLane, cuda::DeviceDecodeLane, SimDecodeLane.
///   vocab_size(), max_batch() of a step, max_context() of a sequence and its answer
///   launch(batch)   begins a step of up to max_batch() sequences; one at a time
///   wait()          until that step is done: then, until the next launch(),
///   token(i)        is what it chose for batch[i], or
///   logits(i)       are those of batch[i]'s next token, [vocab_size]: the caller chooses
template <class L>
concept DecodeLane = requires(L& lane, const L& is, std::span<const DecodeSlot> batch, std::size_t i) {
  typename L::Allocator;
  { is.vocab_size() } -> std::same_as<std::int64_t>;
  { is.max_batch() } -> std::same_as<std::int64_t>;
  { is.max_context() } -> std::same_as<std::int64_t>;
  { lane.launch(batch) } -> std::same_as<Status>;
  { lane.wait() } -> std::same_as<Status>;
}
&&(
    requires(L& lane, std::size_t i) {
      { lane.token(i) } -> std::same_as<std::int32_t>;
    } ||
    requires(L & lane, std::size_t i) {
      { lane.logits(i) } -> std::same_as<std::span<float>>;
    });

/// A lane that samples by itself, where the logits lie.
template <class L>
concept ChoosingLane = DecodeLane<L> && requires(L& lane, std::size_t i) {
  { lane.token(i) } -> std::same_as<std::int32_t>;
};

/// Whether a decode module of that config fits pages of that shape: kIncompatible, with both.
[[nodiscard]] inline Status check_pages(const ModelConfig& config, const KvShape& have) {
  const KvShape wanted = kv_shape(config, have.block_tokens);
  if (wanted == have) return {};
  return error(StatusCode::kIncompatible, "decode module of ", wanted.layers, " layers, ", wanted.kv_heads,
               " KV heads of ", wanted.head_dim, " does not fit pages of ", have.layers, " layers, ",
               have.kv_heads, " KV heads of ", have.head_dim);
}

/// A decode module on processors, whatever its linear layers are.
class HostDecodeLane {
 public:
  using Allocator = KvAllocator;  ///< of pages in host memory

  HostDecodeLane(const HostDecodeLane&) = delete;
  HostDecodeLane& operator=(const HostDecodeLane&) = delete;
  virtual ~HostDecodeLane() = default;

  [[nodiscard]] virtual std::int64_t vocab_size() const noexcept = 0;          ///< the module's
  [[nodiscard]] virtual std::int64_t max_context() const noexcept = 0;         ///< in tokens
  [[nodiscard]] virtual Status launch(std::span<const DecodeSlot> batch) = 0;  ///< as DecodeLane says
  [[nodiscard]] static Status wait() { return {}; }                            ///< launch() has done all
  [[nodiscard]] std::int64_t max_batch() const noexcept { return workspace_.max_tokens(); }  ///< of a step
  /// Of the last launch(), which the caller may overwrite.
  [[nodiscard]] std::span<float> logits(std::size_t item) noexcept {
    const auto width = static_cast<std::size_t>(vocab_size());
    return logits_.span().subspan(item * width, width);
  }

 protected:
  /// For a module that `workspace` was made for.
  explicit HostDecodeLane(ForwardWorkspace workspace) : workspace_(std::move(workspace)) {}

  ForwardWorkspace workspace_;             ///< of the module's passes
  codegemm::AlignedBuffer<float> logits_;  ///< [max_batch][vocab_size]
};

namespace detail {

template <LinearLayer Linear>
class HostDecodeLaneOf final : public HostDecodeLane {
 public:
  HostDecodeLaneOf(DecodeModule<Linear> module, ForwardWorkspace workspace, HostKvStorage& storage,
                   Executor& executor)
      : HostDecodeLane(std::move(workspace)),
        module_(std::move(module)),
        storage_(&storage),
        executor_(&executor) {}

  [[nodiscard]] bool reserve() {
    return logits_.reserve(static_cast<std::size_t>(max_batch() * vocab_size())) &&
           try_allocate([&] { items_.reserve(static_cast<std::size_t>(max_batch())); });
  }
  [[nodiscard]] std::int64_t vocab_size() const noexcept override { return module_.config().vocab_size; }
  [[nodiscard]] std::int64_t max_context() const noexcept override {
    return std::min(module_.config().context_length, workspace_.max_context());
  }
  [[nodiscard]] Status launch(std::span<const DecodeSlot> batch) override {
    items_.clear();
    for (const DecodeSlot& slot : batch) {
      items_.push_back(
          {std::span(&slot.token, 1), KvTarget{storage_, slot.own->blocks(), slot.own->length() - 1}});
    }
    return module_.run(items_, MatrixView<float>(logits_.data(), std::ssize(items_), vocab_size()),
                       workspace_, *executor_);
  }

 private:
  DecodeModule<Linear> module_;
  HostKvStorage* storage_;
  Executor* executor_;
  std::vector<ForwardItem> items_;
};

}  // namespace detail
}  // namespace prefillshare
