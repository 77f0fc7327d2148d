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

  /// A graph for each of `sizes`, ascending. `padding` is a page that any step may write.
  [[nodiscard]] static Result<std::unique_ptr<DeviceDecodeLaneOf>> create(
      DeviceDecodeModule<Linear, Head> module, std::span<const std::int64_t> sizes, std::int64_t max_context,
      BlockId padding, const DeviceResources<T>& on) {
    std::unique_ptr<DeviceDecodeLaneOf> out(new DeviceDecodeLaneOf(std::move(module), max_context, padding));
    const std::int64_t block_tokens = on.storage->shape().block_tokens;
    const std::int64_t pages = (out->max_context() + block_tokens - 1) / block_tokens;
    for (const std::int64_t size : sizes) {
      auto graph = Graph::capture(out->module_.model(), *on.storage, *on.workspace, static_cast<int>(size),
                                  size * pages, false, on.device, on.stream);
      if (!graph.ok()) return graph.status();
      out->graphs_.push_back(std::move(graph).value());
    }
    return out;
  }

  [[nodiscard]] std::int64_t vocab_size() const noexcept override { return module_.config().vocab_size; }
  [[nodiscard]] std::int64_t max_batch() const noexcept override { return graphs_.back()->sequences(); }
  [[nodiscard]] std::int64_t max_context() const noexcept override {
    return std::min(module_.config().context_length, max_context_);
  }
  [[nodiscard]] Status launch(std::span<const DecodeSlot> batch) override {
    const auto graph = std::find_if(graphs_.begin(), graphs_.end(),
                                    [&](const auto& one) { return one->sequences() >= std::ssize(batch); });
    if (batch.empty() || graph == graphs_.end()) {
      return codegemm::error(StatusCode::kInvalidArgument, "decode step of ", batch.size(),
                             " sequences, at most ", max_batch());
    }
    launched_ = graph->get();
    sequences_.clear();
    tokens_.clear();
    temperatures_.clear();
    seeds_.clear();
    bool drawn = false;
    for (const DecodeSlot& slot : batch) {
      sequences_.push_back(slot.own);
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
    if (drawn) {
      step.temperatures = temperatures_;
      step.seeds = seeds_;
    }
    return launched_->launch(step);
  }
  [[nodiscard]] Status wait() override {
    const auto chosen = launched_->wait();
    if (!chosen.ok()) return chosen.status();
    this->chosen_ = *chosen;
    return {};
  }

 private:
  DeviceDecodeLaneOf(DeviceDecodeModule<Linear, Head> module, std::int64_t max_context, BlockId padding)
      : module_(std::move(module)), max_context_(max_context), padding_(padding) {}

  DeviceDecodeModule<Linear, Head> module_;
  std::int64_t max_context_;
  BlockId padding_;
  std::vector<std::unique_ptr<Graph>> graphs_;  // by their size, ascending
  Graph* launched_ = nullptr;
  // One step's, kept for their memory.
  std::vector<const Sequence*> sequences_;
  std::vector<std::int32_t> tokens_;
  std::vector<float> temperatures_;
  std::vector<std::uint64_t> seeds_;
  PageTable table_;
};

}  // namespace detail

/// A decode worker on a GPU: its modules' steps are graphs in one stream, begun one after the other and
/// waited for once. Modules may differ in their layers (fp16 and codes beside each other). A page of the pool
/// is set aside for as long as the worker lives. What the resources point to outlives it.
template <class T>
class DeviceDecodeWorker : public BasicDecodeWorker<DeviceDecodeLane<T>> {
 public:
  /// Up to `most_active` requests at once. kExhausted: no free block; kOutOfMemory.
  [[nodiscard]] static Result<std::unique_ptr<DeviceDecodeWorker>> create(const DeviceResources<T>& resources,
                                                                          std::int64_t most_active) {
    auto padding = resources.allocator->open(CacheKey{"padding of decode batches", "", ""}, {});
    if (!padding.ok()) return padding.status();
    if (Status s = resources.allocator->reserve(*padding, 1); !s.ok()) return s;
    std::unique_ptr<DeviceDecodeWorker> out(new DeviceDecodeWorker(resources, most_active));
    out->padding_ = std::move(padding).value();
    out->set_blocks_aside(1);
    return out;
  }

  /// A decode module more, with a graph for batches of each size in `sizes`, ascending, the last the most
  /// (the rest of a step's go in further batches), over contexts of up to `max_context` tokens. kIncompatible
  /// where it does not fit this worker's pages; kInvalidArgument for sizes that do not ascend from 1; errors
  /// of DecodeGraph::capture().
  template <class Linear, class Head>
  [[nodiscard]] Result<ModuleId> add_module(DeviceDecodeModule<Linear, Head> module,
                                            std::span<const std::int64_t> sizes, std::int64_t max_context) {
    if (Status s = check_pages(module.config(), resources_.storage->shape()); !s.ok()) return s;
    for (std::size_t i = 0; i < std::max<std::size_t>(sizes.size(), 1); ++i) {
      if (i < sizes.size() && sizes[i] > (i > 0 ? sizes[i - 1] : 0) && sizes[i] <= kMaxSequences) continue;
      return codegemm::error(StatusCode::kInvalidArgument, "decode module: batch size ", i, " of ",
                             sizes.size(), ", they must ascend, from 1 to ", kMaxSequences);
    }
    auto lane = detail::DeviceDecodeLaneOf<Linear, Head>::create(std::move(module), sizes, max_context,
                                                                 padding_.blocks()[0], resources_);
    if (!lane.ok()) return lane.status();
    return this->add_lane(std::move(lane).value());
  }

 private:
  DeviceDecodeWorker(const DeviceResources<T>& resources, std::int64_t most_active)
      : BasicDecodeWorker<DeviceDecodeLane<T>>(*resources.allocator, most_active), resources_(resources) {}

  DeviceResources<T> resources_;
  Sequence padding_;  // a page that no answer reads
};

}  // namespace prefillshare::cuda
