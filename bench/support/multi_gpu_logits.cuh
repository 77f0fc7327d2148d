// SPDX-License-Identifier: Apache-2.0
//
// bench/support/multi_gpu_logits.cuh - a small model of codes spread over several GPUs against the same on
// one.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include <codegemm/shard.hpp>

#include "multi_gpu_common.cuh"

namespace codegemm::bench::multi {

// A small model of codes, canonical, whose parts can be cut.
struct CanonicalModel {
  struct Layer {
    codegemm::QuantizedMatrix q, k, v, o, gate, up, down;
  };
  ModelConfig config;
  std::vector<Layer> layers;

  explicit CanonicalModel(const ModelConfig& c) : config(c) {
    Random random{4711};
    const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
      auto out =
          take(codegemm::QuantizedMatrix::create(take(codegemm::parse_format("m1v4g128")), rows, cols));
      for (std::uint32_t& word : out.codes()) word = static_cast<std::uint32_t>(random.next());
      for (auto& value : out.codebooks()) value = codegemm::Half::from_float(random.normal());
      const float size = 1.0F / std::sqrt(static_cast<float>(cols));
      for (auto& value : out.scales())
        value = codegemm::Half::from_float(size * (0.8F + 0.4F * random.uniform()));
      return out;
    };
    for (std::int64_t i = 0; i < c.layers; ++i) {
      layers.push_back({matrix(c.q_size(), c.hidden_size), matrix(c.kv_size(), c.hidden_size),
                        matrix(c.kv_size(), c.hidden_size), matrix(c.hidden_size, c.q_size()),
                        matrix(c.intermediate_size, c.hidden_size),
                        matrix(c.intermediate_size, c.hidden_size),
                        matrix(c.hidden_size, c.intermediate_size)});
    }
  }

  static Coded upload(const std::vector<codegemm::QuantizedMatrix>& parts) {
    std::vector<codegemm::QuantizedMatrixView> views;
    for (const auto& part : parts) views.push_back(part.view());
    return take(Coded::create(views));
  }
  // wrap(layer, summed) -> Linear, of each layer's part.
  template <class Linear, class Wrap>
  void add_layers(std::vector<DeviceLlamaLayer<Linear>>& out, int ranks, int rank, Wrap&& wrap) const {
    const auto rows = [&](const codegemm::QuantizedMatrix& m) {
      return take(codegemm::shard_rows(m.view(), m.rows() / ranks * rank, m.rows() / ranks));
    };
    const auto cols = [&](const codegemm::QuantizedMatrix& m) {
      return take(codegemm::shard_cols(m.view(), m.cols() / ranks * rank, m.cols() / ranks));
    };
    const auto several = [](auto&&... parts) {
      std::vector<codegemm::QuantizedMatrix> made;
      (made.push_back(std::move(parts)), ...);
      return upload(made);
    };
    for (const Layer& l : layers) {
      DeviceLlamaLayer<Linear> layer = RandomLlama::norms<Linear>(config);
      layer.qkv = wrap(several(rows(l.q), rows(l.k), rows(l.v)), false);
      layer.o = wrap(several(cols(l.o)), true);
      layer.gate_up = wrap(several(rows(l.gate), rows(l.up)), false);
      layer.down = wrap(several(cols(l.down)), true);
      out.push_back(std::move(layer));
    }
  }
};

inline constexpr int kLogitSteps = 64;

// Steps of one sequence from an empty cache, the tokens given or its own: all logits, and what it chose.
template <class Model>
std::pair<std::vector<float>, std::vector<std::int32_t>> decode_steps(const Model& model, bool given,
                                                                      const Device& device) {
  Stream stream;
  KvPool pool(model.config, kLogitSteps / 16 + 1, stream.get);
  auto workspace = take(DeviceWorkspace<__half>::create(model, 1, 1, device));
  Sequence sequence = take(pool.allocator->open(CacheKey{"m", "1", ""}, {}));
  check(pool.allocator->reserve(sequence, kLogitSteps));
  auto graph = take(DecodeGraph<typename Model::Linear, typename Model::Head>::capture(
      model, pool.storage, workspace, 1, kLogitSteps / 16 + 1, false, device, stream.get));
  check(cudaDeviceSynchronize(), "the graph");
  const auto prompt = random_prompt(kLogitSteps, model.config.vocab_size);
  const auto vocab = static_cast<std::size_t>(model.config.vocab_size);
  std::pair<std::vector<float>, std::vector<std::int32_t>> out;
  out.first.resize(vocab * kLogitSteps);
  PageTable table;
  for (std::int64_t k = 0; k < kLogitSteps; ++k) {
    const Sequence* const one = &sequence;
    const std::int64_t pending = k + 1;
    check(export_page_table(std::span(&one, 1), table, std::span(&pending, 1)));
    DecodeStep step;
    step.table = &table;
    if (given || k == 0) step.tokens = std::span(prompt).subspan(static_cast<std::size_t>(k), 1);
    check(graph->launch(step));
    out.second.push_back(take(graph->wait())[0]);
    check(cudaMemcpy(out.first.data() + vocab * static_cast<std::size_t>(k), workspace.logits.data(),
                     vocab * sizeof(float), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  }
  check(pool.allocator->release_reserved(sequence));
  return out;
}

// The largest relative difference of any step's logits.
inline double worst_row(const std::vector<float>& a, const std::vector<float>& b, std::size_t width) {
  double worst = 0.0;
  for (std::size_t first = 0; first < a.size(); first += width) {
    double off = 0.0, size = 0.0;
    for (std::size_t i = first; i < first + width; ++i) {
      off += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
      size += std::pow(static_cast<double>(b[i]), 2);
    }
    const double relative = std::sqrt(off / size);
    worst = relative <= worst ? worst : (relative > worst ? relative : HUGE_VAL);
  }
  return worst;
}

template <class Group>
void compare_logits(const char* kind, const CanonicalModel& canonical, int ranks,
                    const std::function<const Group&(int)>& group,
                    const std::pair<std::vector<float>, std::vector<std::int32_t>>& given,
                    const std::pair<std::vector<float>, std::vector<std::int32_t>>& own, Rows& rows) {
  using Linear = ParallelLinear<Coded, Group>;
  using Head = ParallelHead<Dense, Group>;
  double off = 0.0;
  std::int64_t equal = 0;
  std::barrier all(ranks);
  on_ranks(ranks, [&](int r) {
    const Device device = device_of(r);
    auto model = [&] {
      auto cublas = take(Cublas::create());
      // The ends and the head are the whole's: of the same seeds, the head's rows cut out.
      auto whole_head =
          RandomLlama(cublas, 900).dense(canonical.config.vocab_size, canonical.config.hidden_size);
      ModelConfig ends = canonical.config;
      ends.layers = 1;
      auto from = RandomLlama(cublas, 700).coded_model(ends);
      DeviceLlama<Linear, Head> out;
      out.config = take(shard_config(canonical.config, {ranks, r}));
      out.embedding = from.embedding;
      out.final_norm = std::move(from.final_norm);
      out.rope_frequencies = std::move(from.rope_frequencies);
      canonical.add_layers(out.layers, ranks, r, [&](Coded layer, bool summed) {
        return summed ? Linear::by_inputs(std::move(layer), group(r)) : Linear::by_outputs(std::move(layer));
      });
      const std::int64_t count = canonical.config.vocab_size / ranks * canonical.config.hidden_size;
      auto part = device_array<__half>(static_cast<std::size_t>(count));
      check(cudaMemcpy(part.data(), whole_head.weights()->data() + r * count, part.bytes(),
                       cudaMemcpyDeviceToDevice),
            "cudaMemcpy");
      out.head = Head(take(Dense::create(cublas, std::make_shared<const DeviceArray<__half>>(std::move(part)),
                                         canonical.config.vocab_size / ranks, canonical.config.hidden_size)),
                      group(r));
      return RandomLlama::checked(std::move(out));
    }();
    {
      Stream warm;
      auto some = take(DeviceArray<float>::zeros(64));
      all.arrive_and_wait();
      check(group(r).sum(MatrixView<float>(some.data(), 1, 64), warm.get));
      check(group(r).gather(MatrixView<float>(some.data(), 1, 64), warm.get));
      warm.wait();
    }
    all.arrive_and_wait();
    const auto mine_given = decode_steps(model, true, device);
    all.arrive_and_wait();
    const auto mine_own = decode_steps(model, false, device);
    check_group(group(r), nullptr);
    all.arrive_and_wait();
    if (r != 0) return;
    off = worst_row(mine_given.first, given.first, static_cast<std::size_t>(canonical.config.vocab_size));
    while (equal < kLogitSteps &&
           mine_own.second[static_cast<std::size_t>(equal)] == own.second[static_cast<std::size_t>(equal)])
      ++equal;
  });
  rows.add("logits", {{"name", kind},
                      {"gpus", ranks},
                      {"relative_difference", off},
                      {"greedy_tokens", kLogitSteps},
                      {"equal_at_first", equal}});
  if (!(off < 0.02)) throw std::runtime_error("the logits of several GPUs are not one GPU's");
}

inline void run_logits(int gpus, Rows& rows) {
  const CanonicalModel canonical(llama_config(2048, 4096, 4, 16, 8, 8192));
  const Device device = device_of(0);
  auto whole = [&] {
    auto cublas = take(Cublas::create());
    ModelConfig ends = canonical.config;
    ends.layers = 1;
    DeviceLlama<Coded, Dense> out = RandomLlama(cublas, 700).coded_model(ends);
    out.config = canonical.config;
    out.layers.clear();
    canonical.add_layers(out.layers, 1, 0, [](Coded layer, bool) { return layer; });
    out.head = RandomLlama(cublas, 900).dense(canonical.config.vocab_size, canonical.config.hidden_size);
    return RandomLlama::checked(std::move(out));
  }();
  const auto given = decode_steps(whole, true, device);
  const auto own = decode_steps(whole, false, device);
  for (int ranks = 2; ranks <= std::min(gpus, 8); ranks *= 2) {
    Peers peers(ranks, {});
    compare_logits<PeerGroup>(
        "peer memory", canonical, ranks,
        [&](int r) -> const PeerGroup& { return peers.groups[static_cast<std::size_t>(r)]; }, given, own,
        rows);
#ifdef PREFILLSHARE_WITH_NCCL
    Communicators comms(ranks);
    std::vector<NcclGroup> groups;
    for (ncclComm_t comm : comms.comms) groups.push_back(take(NcclGroup::create(comm)));
    compare_logits<NcclGroup>(
        "nccl", canonical, ranks,
        [&](int r) -> const NcclGroup& { return groups[static_cast<std::size_t>(r)]; }, given, own, rows);
#endif
  }
}

}  // namespace codegemm::bench::multi
