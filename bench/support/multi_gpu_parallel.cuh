// SPDX-License-Identifier: Apache-2.0
//
// bench/support/multi_gpu_parallel.cuh - decode steps of a model that is spread over several GPUs.
#pragma once

#include <algorithm>
#include <barrier>
#include <memory>
#include <span>
#include <vector>

#include "multi_gpu_common.cuh"

namespace codegemm::bench::multi {

// A batch of decoding sequences behind contexts of random K and V.
template <class Model>
class Decoding {
 public:
  Decoding(const Model& model, int batch, std::int64_t context, const Device& device, cudaStream_t stream)
      : pool_(model.config, batch * ((context + 15) / 16 + 1), stream),
        workspace_(take(DeviceWorkspace<__half>::create(model, batch, batch, device))),
        sequences_(static_cast<std::size_t>(batch)) {
    fill_values(pool_.storage.layer(0),
                static_cast<std::size_t>(pool_.storage.blocks() * pool_.storage.bytes_per_block()) / 2, 1.0F,
                17);
    std::vector<const Sequence*> pointers;
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      sequences_[i] = take(pool_.allocator->open(CacheKey{"bench", codegemm::concat(i), ""}, {}));
      check(pool_.allocator->reserve(sequences_[i], context + 1));
      pointers.push_back(&sequences_[i]);
    }
    const std::vector<std::int64_t> pending(sequences_.size(), context);
    check(export_page_table(pointers, table_, pending));
    check(cudaDeviceSynchronize(), "the cache");
    graph_ = take(Graph::capture(model, pool_.storage, workspace_, batch, std::ssize(table_.indices), false,
                                 device, stream));
    check(cudaDeviceSynchronize(), "the graph");
  }
  ~Decoding() {
    for (Sequence& s : sequences_) static_cast<void>(pool_.allocator->release_reserved(s).ok());
  }
  void step(std::span<const std::int32_t> tokens = {}) {
    DecodeStep what;
    what.table = &table_;
    what.tokens = tokens;
    check(graph_->launch(what));
  }
  std::span<const std::int32_t> wait() { return take(graph_->wait()); }

 private:
  using Graph = DecodeGraph<typename Model::Linear, typename Model::Head>;
  KvPool pool_;
  DeviceWorkspace<__half> workspace_;
  std::vector<Sequence> sequences_;
  PageTable table_;
  std::unique_ptr<Graph> graph_;
};

// make(rank) -> the rank's model; verify(rank, stream): whether its group is sound.
template <class Make, class Verify>
void measure_parallel(const char* kind, int ranks, const Options& options, const std::vector<double>& alone,
                      Rows& rows, Make&& make, Verify&& verify, std::vector<double>* out = nullptr) {
  constexpr int kContext = 1024;
  std::barrier all(ranks);
  const std::vector<int> batches = {1, 8, 32};
  std::vector<double> step_us(batches.size()), loop_us(batches.size());
  on_ranks(ranks, [&](int r) {
    const Device device = device_of(r);
    Stream stream;
    const auto model = make(r);
    all.arrive_and_wait();
    for (std::size_t b = 0; b < batches.size(); ++b) {
      Decoding<std::remove_const_t<std::remove_reference_t<decltype(model)>>> decoding(
          model, batches[b], kContext, device, stream.get);
      const auto first = random_prompt(batches[b], model.config.vocab_size);
      all.arrive_and_wait();
      decoding.step(first);
      static_cast<void>(decoding.wait());
      const auto timed = [&](bool wait) {
        std::vector<double> times;
        for (int round = 0; round < 6; ++round) {
          all.arrive_and_wait();
          const auto start = Clock::now();
          for (int i = 0; i < options.steps / 5; ++i) {
            decoding.step();
            if (wait) static_cast<void>(decoding.wait());
          }
          static_cast<void>(decoding.wait());
          if (round > 0) times.push_back(us_since(start) / (options.steps / 5));
        }
        return median(times);
      };
      const double step = timed(false);
      const double loop = timed(true);
      verify(r, stream.get);
      if (r == 0) step_us[b] = step, loop_us[b] = loop;
      all.arrive_and_wait();
    }
  });
  for (std::size_t b = 0; b < batches.size(); ++b) {
    rows.add("parallel", {{"name", kind},
                          {"gpus", ranks},
                          {"model", "70b"},
                          {"weights", "m1v4g128"},
                          {"batch", batches[b]},
                          {"context", kContext},
                          {"step_us", step_us[b]},
                          {"loop_us", loop_us[b]},
                          {"tokens_per_s", batches[b] * 1e6 / loop_us[b]},
                          {"speedup", alone.empty() ? 1.0 : alone[b] / loop_us[b]}});
  }
  if (out != nullptr) *out = loop_us;
}

inline void run_parallel(const Options& options, int gpus, Rows& rows) {
  const ModelConfig whole = llama_70b();
  std::vector<double> alone;
  measure_parallel(
      "one GPU", 1, options, {}, rows,
      [&](int) { return RandomLlama(take(Cublas::create()), 1).coded_model(whole); },
      [](int, cudaStream_t) {}, &alone);
  for (int ranks = 2; ranks <= std::min(gpus, 8); ranks *= 2) {
    const ModelConfig part = take(shard_config(whole, {ranks, 0}));
    Peers peers(ranks, {});
    measure_parallel(
        "peer memory", ranks, options, alone, rows,
        [&](int r) {
          return RandomLlama(take(Cublas::create()), static_cast<std::uint64_t>(1 + 10000 * r))
              .coded_part(part, peers.groups[static_cast<std::size_t>(r)]);
        },
        [&](int r, cudaStream_t stream) { check_group(peers.groups[static_cast<std::size_t>(r)], stream); });
#ifdef PREFILLSHARE_WITH_NCCL
    Communicators comms(ranks);
    std::vector<NcclGroup> groups;
    for (ncclComm_t comm : comms.comms) groups.push_back(take(NcclGroup::create(comm)));
    on_ranks(ranks, [&](int r) {  // NCCL connects the ranks: not while a stream is captured
      Stream warm;
      auto some = take(DeviceArray<float>::zeros(64));
      const NcclGroup& group = groups[static_cast<std::size_t>(r)];
      check(group.sum(MatrixView<float>(some.data(), 1, 64), warm.get));
      check(group.gather(MatrixView<float>(some.data(), 1, 64), warm.get));
      warm.wait();
    });
    measure_parallel(
        "nccl", ranks, options, alone, rows,
        [&](int r) {
          return RandomLlama(take(Cublas::create()), static_cast<std::uint64_t>(1 + 10000 * r))
              .coded_part(part, groups[static_cast<std::size_t>(r)]);
        },
        [&](int r, cudaStream_t stream) { check_group(groups[static_cast<std::size_t>(r)], stream); });
#endif
  }
}

}  // namespace codegemm::bench::multi
