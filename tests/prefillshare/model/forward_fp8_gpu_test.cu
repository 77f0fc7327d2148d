// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/forward_fp8_gpu_test.cu - the forward pass on the GPU over a cache of fp8 with
// scales, against plain double loops whose cache is rounded the same way.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/model/cuda/modules.cuh>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <prefillshare/kv/element.hpp>

#include "forward_rig.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::seed_or;

// Of K and V in each layer; as far from 1 as real ones are.
constexpr std::array<cuda::DeviceKvStorage<Fp8E4M3>::Scales, 3> kScales{
    {{0.02F, 0.015F}, {0.013F, 0.03F}, {0.05F, 0.02F}}};

double stored(double value, std::size_t layer, bool is_v) {
  const float scale = is_v ? kScales[layer].v : kScales[layer].k;
  return static_cast<double>(Fp8E4M3::from_float(static_cast<float>(value) / scale).to_float() * scale);
}

// Prefill in chunks, with keys split and not, then decode by the graph, with a shared prefix: every row of
// logits. The error allowed is for activations of fp16 that round to the next number of fp8, which is an
// eighth away: a few of all do. It is less than half of what fp8 takes from an exact cache, measured beside
// it.
TEST_CASE("the forward pass over a cache of fp8 equals a reference that rounds K and V the same way") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(51);
  CAPTURE(seed);
  ModelConfig config = gpu_config();
  config.layers = static_cast<std::int64_t>(kScales.size());
  const auto host = rounded_model<__half>(config, seed);
  const auto model = upload_dense<__half>(*host);
  ForwardRig<__half, Fp8E4M3> rig(*model, device, 64, 32);
  for (int i = 0; i < static_cast<int>(config.layers); ++i) {
    require_ok(rig.storage.set_scales(i, kScales[static_cast<std::size_t>(i)]));
  }
  CHECK(rig.storage.set_scales(3, {1.0F, 1.0F}).code() == StatusCode::kInvalidArgument);
  CHECK(rig.storage.set_scales(0, {0.0F, 1.0F}).code() == StatusCode::kInvalidArgument);

  Rng rng(seed + 1);
  constexpr int kShared = 48;  // three blocks
  constexpr int kDecoded = 4;
  const std::vector<std::int32_t> context = random_tokens(rng, kShared, config.vocab_size);
  constexpr std::size_t kSequences = 2;
  std::vector<std::vector<std::int32_t>> tokens;
  std::vector<std::vector<std::vector<double>>> want;
  std::vector<std::vector<std::vector<double>>> exact;
  for (std::size_t i = 0; i < kSequences; ++i) {
    tokens.push_back(context);
    for (const std::int32_t token : random_tokens(rng, kDecoded, config.vocab_size))
      tokens.back().push_back(token);
    std::vector<ReferenceCache> cache;
    want.push_back(reference_forward(*host, tokens.back(), cache, stored));
    std::vector<ReferenceCache> exact_cache;
    exact.push_back(reference_forward(*host, tokens.back(), exact_cache));
  }
  double off = 0.0;        // of what was computed
  double off_exact = 0.0;  // of an exact cache
  const auto compare = [&](const std::vector<float>& got, std::size_t row, std::size_t sequence,
                           std::size_t at) {
    const auto vocab = static_cast<std::size_t>(config.vocab_size);
    const std::span<const float> logits(got.data() + row * vocab, vocab);
    off = std::max(off, worst_relative(logits, {want[sequence][at]}));
    off_exact = std::max(off_exact, worst_relative(logits, {exact[sequence][at]}));
  };

  Sequence base = take(rig.allocator->open(CacheKey{"m", "1", ""}, {}));
  require_ok(rig.allocator->reserve(base, kShared));
  std::size_t done = 0;
  for (const std::size_t step : {std::size_t{5}, std::size_t{21}, std::size_t{22}}) {
    const auto chunk = std::span<const std::int32_t>(context).subspan(done, step);
    const Sequence* const one = &base;
    auto batch = rig.input.send(std::span(&chunk, 1), std::span(&one, 1), config.vocab_size, rig.stream.get);
    require_ok(batch.status());
    batch->split_keys = step == 21;
    require_ok(cuda::forward(*model, *batch, rig.storage,
                             MatrixView<float>(rig.workspace.logits.data(), 1, config.vocab_size),
                             rig.workspace, device, rig.stream.get));
    done += step;
    compare(rig.logits(1, config.vocab_size), 0, 0, done - 1);
    require_ok(rig.allocator->commit(base, chunk));
  }

  std::vector<Sequence> forks;
  std::vector<const Sequence*> pointers;
  for (std::size_t i = 0; i < kSequences; ++i) {
    forks.push_back(take(rig.allocator->fork(base)));
    require_ok(rig.allocator->reserve(forks.back(), kDecoded));
  }
  for (const Sequence& fork : forks) pointers.push_back(&fork);
  using Linear = std::remove_cvref_t<decltype(model->layers[0].qkv)>;
  using Head = std::remove_cvref_t<decltype(model->head)>;
  auto graph = take(cuda::DecodeGraph<Linear, Head>::capture(
      *model, rig.storage, rig.workspace, static_cast<int>(kSequences), 32, true, device, rig.stream.get));
  PageTable table;
  const std::vector<std::int32_t> group_indptr{0, static_cast<std::int32_t>(kSequences)};
  const std::vector<std::int32_t> shared_pages{kShared / 16};
  for (std::size_t k = 0; k < kDecoded; ++k) {
    const std::vector<std::int64_t> pending(kSequences, static_cast<std::int64_t>(k) + 1);
    require_ok(export_page_table(pointers, table, pending));
    std::vector<std::int32_t> next;
    for (std::size_t i = 0; i < kSequences; ++i) next.push_back(tokens[i][kShared + k]);
    cuda::DecodeStep step;
    step.table = &table;
    step.tokens = next;
    step.group_indptr = group_indptr;
    step.shared_pages = shared_pages;
    require_ok(graph->launch(step));
    require_ok(graph->wait().status());
    const std::vector<float> got = rig.logits(static_cast<std::int64_t>(kSequences), config.vocab_size);
    for (std::size_t i = 0; i < kSequences; ++i) compare(got, i, i, kShared + k);
  }
  INFO("off by " << off << ", from an exact cache by " << off_exact);
  CHECK(off < 0.02);
  CHECK(off_exact > 2.0 * off);
}

}  // namespace
}  // namespace prefillshare::test
