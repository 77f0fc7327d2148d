// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_step_times.cuh - step times of prefills and decode batches, which the simulator takes.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "cost_tables.hpp"
#include "gpu_serve_card.cuh"
#include "gpu_timing.cuh"

namespace codegemm::bench {

inline double seconds_of(const std::function<void()>& work, cudaStream_t stream, int repeats) {
  std::vector<double> times;
  for (int i = 0; i < repeats + 1; ++i) {
    check(cudaStreamSynchronize(stream), "a step");
    const auto start = std::chrono::steady_clock::now();
    work();
    check(cudaStreamSynchronize(stream), "a step");
    if (i > 0)
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return median(times);
}

/// Steps as the workers run them, behind contexts of pages that no step shares: alone on the card, or each on
/// its part while steps of the other kind run on the other.
class StepTimes {
 public:
  StepTimes(const ServeCard& card, std::int64_t blocks, bool quick)
      : card_(card),
        quick_(quick),
        storage_(take(DeviceKvStorage<__half>::create(card.shape.kv, blocks, card.stream))),
        batch_(take(PrefillBatch::create(kChunk, 1, 16384 / 16))) {
    allocator_ = take(DeviceKvAllocator<__half>::create(storage_));
    fill(storage_.layer(0), static_cast<std::size_t>(blocks * storage_.bytes_per_block()) / sizeof(__half),
         1.0F, 0.0F, next_seed());
    check(cudaDeviceSynchronize(), "the pages");
  }

  template <class Model>
  void prefill(const std::string& weights, const Model& model, nlohmann::json& rows) {
    const auto place = card_.whole();
    for (const std::int64_t tokens : {16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096}) {
      for (const std::int64_t context : {0, 2048, 4096, 8192}) {
        if (quick_ && context > 4096) continue;
        add(rows, prefill_row(weights, tokens, context, prefill_seconds(model, tokens, context, place)));
      }
    }
  }
  template <class Model>
  void decode(const std::string& weights, const Model& model, nlohmann::json& rows) {
    const auto place = card_.whole();
    for (const std::int64_t batch : card_.shape.batch_sizes) {
      const std::int64_t longest = std::min<std::int64_t>(8192, storage_.blocks() / batch * 16);
      auto graph = capture(model, batch, longest, place);
      for (const std::int64_t context : {longest / 8, longest}) {
        const double seconds = decode_seconds(*graph, batch, context, longest, quick_ ? 3 : 8);
        add(rows, decode_row(weights, batch, batch * context, seconds));
      }
    }
    std::fflush(stdout);
  }

  /// Both on the parts of a card, while the other runs without end.
  template <class Base, class Model>
  void beside(const std::string& base_weights, const Base& base, const std::string& weights,
              const Model& model, ServeParts& parts, nlohmann::json& rows) {
    const CardParts sizes = parts.multiprocessors();
    const DevicePlace<__half> rest = card_.rest(parts);
    const DevicePlace<__half> part{parts.split.part().device, parts.split.part().stream, &parts.decode};
    {
      constexpr std::int64_t kBatch = 6;
      constexpr std::int64_t kContext = 6144;
      auto graph = capture(model, kBatch, kContext, part);
      const Background others(
          [&] { static_cast<void>(decode_seconds(*graph, kBatch, kContext, kContext, 1)); });
      for (const std::int64_t tokens : {16, 128, 256, 512, 1024, 2048, 4096}) {
        for (const std::int64_t context : {0, 4096, 8192}) {
          add(rows, prefill_row(base_weights, tokens, context, prefill_seconds(base, tokens, context, rest),
                                {sizes.prefill, weights}));
        }
      }
    }
    // A chunk of the usual size, the same again and again.
    constexpr std::int64_t kTokens = 2048;
    constexpr std::int64_t kBefore = 4096;
    const Chunk chunk(*this, kTokens, kBefore);
    std::map<std::int64_t, decltype(capture(model, 1, 16, part))> graphs;
    std::vector<std::int64_t> batches;
    for (const std::int64_t batch : {1, 2, 4, 6, 8, 12, 16, 24}) {
      if (batch > card_.shape.batch_sizes.back()) continue;
      batches.push_back(batch);
      graphs[batch] = capture(model, batch, longest_of(batch), part);
    }
    const Background others([&] { chunk.run(base, rest); });
    for (const std::int64_t batch : batches) {
      const std::int64_t longest = longest_of(batch);
      for (const std::int64_t context : {longest / 8, longest}) {
        const double seconds = decode_seconds(*graphs[batch], batch, context, longest, quick_ ? 3 : 6);
        add(rows, decode_row(weights, batch, batch * context, seconds, {sizes.decode, base_weights}));
      }
    }
  }

 private:
  /// Work without end, in a thread, until it is destroyed.
  class Background {
   public:
    explicit Background(std::function<void()> work)
        : thread_([this, work = std::move(work)] {
            try {
              while (!over_) work();
            } catch (const std::exception& error) {
              std::fprintf(stderr, "beside: %s\n", error.what());
              std::exit(1);
            }
          }) {}
    Background(const Background&) = delete;
    Background& operator=(const Background&) = delete;
    ~Background() {
      over_ = true;
      thread_.join();
    }

   private:
    std::atomic<bool> over_{false};
    std::thread thread_;  // last: it uses the others
  };
  /// The next tokens of a sequence.
  class Chunk {
   public:
    Chunk(StepTimes& times, std::int64_t tokens, std::int64_t context)
        : times_(times), ids_(static_cast<std::size_t>(tokens + context)) {
      prefillshare::SimRandom random(static_cast<std::uint64_t>(++times.chunks_));
      for (std::int32_t& id : ids_) {
        id = static_cast<std::int32_t>(random.between(0, times.card_.shape.vocab_size - 1));
      }
      sequence_ = take(times.allocator_->open(CacheKey{"step times", std::to_string(times.chunks_), ""}, {}));
      check(times.allocator_->reserve(sequence_, tokens + context));
      const std::span<const std::int32_t> all(ids_);
      check(times.allocator_->commit(sequence_, all.first(static_cast<std::size_t>(context))));
      new_ = all.subspan(static_cast<std::size_t>(context));
    }
    template <class Model>
    void run(const Model& model, const DevicePlace<__half>& place) const {
      const Sequence* const one = &sequence_;
      const auto sent = times_.batch_.send(std::span(&new_, 1), std::span(&one, 1),
                                           times_.card_.shape.vocab_size, place.stream);
      check(sent.status());
      check(forward(model, *sent, times_.storage_, {}, *place.workspace, place.device, place.stream));
      check(cudaStreamSynchronize(place.stream), "a chunk");
    }

   private:
    StepTimes& times_;
    std::vector<std::int32_t> ids_;
    std::span<const std::int32_t> new_;
    Sequence sequence_;
  };

  static void add(nlohmann::json& rows, nlohmann::json row) {
    std::printf("%s\n", row.dump().c_str());
    rows.push_back(std::move(row));
  }
  [[nodiscard]] std::int64_t longest_of(std::int64_t batch) const {
    return std::min<std::int64_t>(8192, (storage_.blocks() - 1024) / batch * 16);
  }
  template <class Model>
  [[nodiscard]] double prefill_seconds(const Model& model, std::int64_t tokens, std::int64_t context,
                                       const DevicePlace<__half>& place) {
    const Chunk chunk(*this, tokens, context);
    return seconds_of([&] { chunk.run(model, place); }, place.stream, quick_ ? 2 : 3);
  }
  template <class Model>
  [[nodiscard]] auto capture(const Model& model, std::int64_t batch, std::int64_t longest,
                             const DevicePlace<__half>& place) {
    return take(DecodeGraph<typename Model::Linear, typename Model::Head>::capture(
        model, storage_, *place.workspace, static_cast<int>(batch), batch * longest / 16, false, place.device,
        place.stream));
  }
  /// The sequences' pages are the pool's last ones.
  template <class Graph>
  [[nodiscard]] double decode_seconds(Graph& graph, std::int64_t batch, std::int64_t context,
                                      std::int64_t longest, int repeats) const {
    PageTable table;
    table.indptr.push_back(0);
    for (std::int64_t i = 0; i < batch; ++i) {
      for (std::int64_t page = 0; page < context / 16; ++page) {
        table.indices.push_back(static_cast<std::int32_t>(storage_.blocks() - 1 - i * (longest / 16) - page));
      }
      table.indptr.push_back(static_cast<std::int32_t>(table.indices.size()));
      table.last_page_len.push_back(16);
    }
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch), 1);
    DecodeStep step;
    step.table = &table;
    step.tokens = tokens;
    std::vector<double> times;
    for (int i = 0; i <= repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      check(graph.launch(step));
      check(graph.wait().status());
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    times.erase(times.begin());
    return median(times);
  }

  const ServeCard& card_;
  bool quick_;
  DeviceKvStorage<__half> storage_;
  PrefillBatch batch_;
  std::unique_ptr<DeviceKvAllocator<__half>> allocator_;
  std::int64_t chunks_ = 0;
};

}  // namespace codegemm::bench
