// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/decode_worker.cuh - decode modules side by side on a GPU, each decoding many
// requests as one CUDA graph.
// Layer: serve (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/serve/cuda/prefill_runner.cuh>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/prefix_groups.hpp>

namespace prefillshare::cuda {

/// Batch sizes that a module's steps are captured for, up to `max_batch`, which is one of them: a batch of
/// another size runs as the next larger one, a quarter larger at most.
[[nodiscard]] inline std::vector<std::int64_t> batch_buckets(std::int64_t max_batch) {
  std::vector<std::int64_t> out;
  for (std::int64_t size = 1, octave = 1; size < max_batch; size += std::max<std::int64_t>(1, octave / 4)) {
    if (size == 2 * octave) octave = size;
    out.push_back(size);
  }
  out.push_back(max_batch);
  return out;
}

/// From so many common tokens on the sequences of a batch are told to attention as a group, which then reads
/// what they share once where that is faster.
inline constexpr std::int64_t kShareFromTokens = kMinSharedTokens;

/// A decode module on a GPU, whatever its linear layers are; see DecodeLane. T: of activations and cache.
template <class T>
class DeviceDecodeLane {
 public:
  using Allocator = DeviceKvAllocator<T>;  ///< of pages in device memory

  DeviceDecodeLane(const DeviceDecodeLane&) = delete;
  DeviceDecodeLane& operator=(const DeviceDecodeLane&) = delete;
  virtual ~DeviceDecodeLane() = default;

  [[nodiscard]] virtual std::int64_t vocab_size() const noexcept = 0;          ///< the module's
  [[nodiscard]] virtual std::int64_t max_batch() const noexcept = 0;           ///< of a step
  [[nodiscard]] virtual std::int64_t max_context() const noexcept = 0;         ///< in tokens
  [[nodiscard]] virtual Status launch(std::span<const DecodeSlot> batch) = 0;  ///< puts it into the stream
  [[nodiscard]] virtual Status wait() = 0;                                     ///< until the stream is there
  virtual void use(std::size_t place) noexcept = 0;                            ///< for the steps from now on
  /// Chosen by the last step for batch[item].
  [[nodiscard]] std::int32_t token(std::size_t item) const noexcept { return chosen_[item]; }

 protected:
  DeviceDecodeLane() = default;

  std::span<const std::int32_t> chosen_;  ///< by the last step
};

namespace detail {

template <class Linear, class Head>
class DeviceDecodeLaneOf final : public DeviceDecodeLane<typename Linear::Scalar> {
 public:
  using T = typename Linear::Scalar;
  using Graph = DecodeGraph<Linear, Head>;

  /// A graph for each of `sizes`, ascending, in each of `places`; one more each for steps whose sequences
  /// share at least `share_from` tokens, unless that is 0. `padding` is a page that any step may write.
  [[nodiscard]] static Result<std::unique_ptr<DeviceDecodeLaneOf>> create(
      DeviceDecodeModule<Linear, Head> module, std::span<const std::int64_t> sizes, std::int64_t max_context,
      BlockId padding, const DeviceKvStorage<T>& storage, std::span<const DevicePlace<T>> places,
      std::int64_t share_from) {
    std::unique_ptr<DeviceDecodeLaneOf> out(new DeviceDecodeLaneOf(std::move(module), max_context, padding));
    const std::int64_t block_tokens = storage.shape().block_tokens;
    const std::int64_t pages = (out->max_context() + block_tokens - 1) / block_tokens;
    for (const DevicePlace<T>& place : places) {
      auto& graphs = out->places_.emplace_back();
      graphs.stream = place.stream;
      for (const std::int64_t size : sizes) {
        for (const bool share : {false, true}) {
          if (share && (share_from == 0 || size < 2)) continue;
          auto graph = Graph::capture(out->module_.model(), storage, *place.workspace, static_cast<int>(size),
                                      size * pages, share, place.device, place.stream);
          if (!graph.ok()) return graph.status();
          (share ? graphs.sharing : graphs.by_size).push_back(std::move(graph).value());
        }
      }
    }
    out->copies_ = storage.stream();
    out->block_tokens_ = storage.shape().block_tokens;
    out->share_from_ = share_from;
    return out;
  }

  [[nodiscard]] std::int64_t vocab_size() const noexcept override { return module_.config().vocab_size; }
  [[nodiscard]] std::int64_t max_batch() const noexcept override {
    return places_[0].by_size.back()->sequences();
  }
  void use(std::size_t place) noexcept override { place_ = place; }
  [[nodiscard]] std::int64_t max_context() const noexcept override {
    return std::min(module_.config().context_length, max_context_);
  }
  [[nodiscard]] Status launch(std::span<const DecodeSlot> batch) override {
    sequences_.clear();
    for (const DecodeSlot& slot : batch) sequences_.push_back(slot.own);
    shares_ = share_from_ > 0 && groups_.find(sequences_, block_tokens_, share_from_);
    const auto& graphs = shares_ ? places_[place_].sharing : places_[place_].by_size;
    const auto graph = std::find_if(graphs.begin(), graphs.end(),
                                    [&](const auto& one) { return one->sequences() >= std::ssize(batch); });
    if (batch.empty() || graph == graphs.end()) {
      return codegemm::error(StatusCode::kInvalidArgument, "decode step of ", batch.size(),
                             " sequences, at most ", max_batch());
    }
    launched_ = graph->get();
    tokens_.clear();
    temperatures_.clear();
    seeds_.clear();
    bool drawn = false;
    for (std::size_t i = 0; i < batch.size(); ++i) {
      const DecodeSlot& slot = batch[shares_ ? groups_.order()[i] : i];
      sequences_[i] = slot.own;
      tokens_.push_back(slot.token);
      temperatures_.push_back(slot.temperature);
      seeds_.push_back(slot.seed);
      drawn = drawn || slot.temperature > 0.0F;
    }
    if (Status s = export_page_table(sequences_, table_); !s.ok()) return s;
    // The rest of the graph's sequences have one token, on a page of nobody's.
    const auto size = static_cast<std::size_t>(launched_->sequences());
    for (std::size_t i = batch.size(); i < size; ++i) {
      table_.indices.push_back(padding_);
      table_.indptr.push_back(static_cast<std::int32_t>(table_.indices.size()));
      table_.last_page_len.push_back(1);
    }
    tokens_.resize(size, 0);
    temperatures_.resize(size, 0.0F);
    seeds_.resize(size, 0);
    DecodeStep step;
    step.table = &table_;
    step.tokens = tokens_;
    if (shares_) {
      step.group_indptr = groups_.indptr();
      step.shared_pages = groups_.pages();
    }
    if (drawn) {
      step.temperatures = temperatures_;
      step.seeds = seeds_;
    }
    // Blocks that the sequences have of their own may be copies on their way.
    if (Status s = order_.behind(copies_, places_[place_].stream); !s.ok()) return s;
    return launched_->launch(step);
  }
  [[nodiscard]] Status wait() override {
    const auto chosen = launched_->wait();
    if (!chosen.ok()) return chosen.status();
    this->chosen_ = *chosen;
    if (!shares_) return {};
    in_batch_.resize(sequences_.size());
    for (std::size_t i = 0; i < in_batch_.size(); ++i) in_batch_[groups_.order()[i]] = (*chosen)[i];
    this->chosen_ = in_batch_;
    return {};
  }

 private:
  DeviceDecodeLaneOf(DeviceDecodeModule<Linear, Head> module, std::int64_t max_context, BlockId padding)
      : module_(std::move(module)), max_context_(max_context), padding_(padding) {}

  struct PlaceGraphs {
    cudaStream_t stream = nullptr;
    std::vector<std::unique_ptr<Graph>> by_size;  // ascending
    std::vector<std::unique_ptr<Graph>> sharing;  // the same, for sequences that share prefixes
  };

  DeviceDecodeModule<Linear, Head> module_;
  std::int64_t max_context_;
  BlockId padding_;
  std::vector<PlaceGraphs> places_;
  std::size_t place_ = 0;
  cudaStream_t copies_ = nullptr;  // where the storage copies blocks
  StreamOrder order_;
  int block_tokens_ = 0;
  std::int64_t share_from_ = 0;  // tokens; 0: never
  Graph* launched_ = nullptr;
  bool shares_ = false;  // that step
  // One step's, kept for their memory.
  std::vector<const Sequence*> sequences_;
  std::vector<std::int32_t> tokens_;
  std::vector<float> temperatures_;
  std::vector<std::uint64_t> seeds_;
  PageTable table_;
  PrefixGroups groups_;
  std::vector<std::int32_t> in_batch_;  // its tokens, in the batch's order
};

}  // namespace detail

/// A decode worker on a GPU: its modules' steps are graphs in one stream, begun one after the other and
/// waited for once. Modules may differ in their layers (fp16 and codes beside each other). A page of the pool
/// is set aside for as long as the worker lives. What the resources point to outlives it. Its steps may have
/// several places, one at a time: all of the card, and a part of it for steps beside a prefill.
template <class T>
class DeviceDecodeWorker : public BasicDecodeWorker<DeviceDecodeLane<T>> {
 public:
  /// Up to `most_active` requests at once. The resources are place 0, where steps run at first; `further`
  /// are the next ones. kExhausted: no free block; kOutOfMemory.
  [[nodiscard]] static Result<std::unique_ptr<DeviceDecodeWorker>> create(
      const DeviceResources<T>& resources, std::int64_t most_active,
      std::span<const DevicePlace<T>> further = {}) {
    auto padding = resources.allocator->open(CacheKey{"padding of decode batches", "", ""}, {});
    if (!padding.ok()) return padding.status();
    if (Status s = resources.allocator->reserve(*padding, 1); !s.ok()) return s;
    std::unique_ptr<DeviceDecodeWorker> out(new DeviceDecodeWorker(resources, most_active));
    out->places_.assign(1, {resources.device, resources.stream, resources.workspace});
    out->places_.insert(out->places_.end(), further.begin(), further.end());
    out->padding_ = std::move(padding).value();
    out->set_blocks_aside(1);
    return out;
  }

  /// A decode module more, with a graph for batches of each size in `sizes`, ascending, the last the most
  /// (the rest of a step's go in further batches), over contexts of up to `max_context` tokens. Where
  /// sequences of a batch share at least `share_from` tokens (a common system prompt, answers forked from one
  /// context), attention reads those once, by a second graph for each size; 0: never, and no such graphs.
  /// kIncompatible where it does not fit this worker's pages; kInvalidArgument for sizes that do not ascend
  /// from 1; errors of DecodeGraph::capture().
  template <class Linear, class Head>
  [[nodiscard]] Result<ModuleId> add_module(DeviceDecodeModule<Linear, Head> module,
                                            std::span<const std::int64_t> sizes, std::int64_t max_context,
                                            std::int64_t share_from = kShareFromTokens) {
    if (share_from < 0) {
      return codegemm::error(StatusCode::kInvalidArgument, "decode module: prefixes shared from ", share_from,
                             " tokens on");
    }
    if (Status s = check_pages(module.config(), resources_.storage->shape()); !s.ok()) return s;
    for (std::size_t i = 0; i < std::max<std::size_t>(sizes.size(), 1); ++i) {
      if (i < sizes.size() && sizes[i] > (i > 0 ? sizes[i - 1] : 0) && sizes[i] <= kMaxSequences) continue;
      return codegemm::error(StatusCode::kInvalidArgument, "decode module: batch size ", i, " of ",
                             sizes.size(), ", they must ascend, from 1 to ", kMaxSequences);
    }
    auto lane = detail::DeviceDecodeLaneOf<Linear, Head>::create(std::move(module), sizes, max_context,
                                                                 padding_.blocks()[0], *resources_.storage,
                                                                 places_, share_from);
    if (!lane.ok()) return lane.status();
    (*lane)->use(place_);
    return this->add_lane(std::move(lane).value());
  }

  /// Steps from now on run there. kInvalidArgument where there is no such place.
  [[nodiscard]] Status use(std::size_t place) {
    if (place >= places_.size()) {
      return codegemm::error(StatusCode::kInvalidArgument, "decode worker: place ", place, " of ",
                             places_.size());
    }
    place_ = place;
    this->each_lane([&](DeviceDecodeLane<T>& lane) { lane.use(place); });
    return {};
  }

 private:
  DeviceDecodeWorker(const DeviceResources<T>& resources, std::int64_t most_active)
      : BasicDecodeWorker<DeviceDecodeLane<T>>(*resources.allocator, most_active), resources_(resources) {}

  DeviceResources<T> resources_;
  std::vector<DevicePlace<T>> places_;
  std::size_t place_ = 0;
  Sequence padding_;  // a page that no answer reads
};

}  // namespace prefillshare::cuda
