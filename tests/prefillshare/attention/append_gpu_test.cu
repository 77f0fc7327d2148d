// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/append_gpu_test.cu - RoPE and page writes against the CPU's RopeTable.
#include <optional>

#include <prefillshare/attention/append.cuh>

#include "gpu_angles.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::random_vector;
using codegemm::test::seed_or;

template <class T, class C = T>
void check(const BatchShape& shape, const RopeConfig& rope, Angles angles, const std::vector<int>& lengths,
           const std::vector<int>& chunks, bool with_q, bool far = false) {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(1);
  CAPTURE(seed, shape.page_size, shape.head_dim, static_cast<int>(rope.layout), static_cast<int>(angles),
          lengths, chunks, with_q);
  Rng rng(seed);
  PagedBatch<C> batch(shape, lengths, {}, rng);
  std::vector<std::int32_t> query_indptr{0};
  std::vector<QueryAt> rows;  // keys: position + 1
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    for (int t = 0; t < chunks[i]; ++t) rows.push_back({i, lengths[i] - chunks[i] + t + 1});
    query_indptr.push_back(static_cast<std::int32_t>(rows.size()));
  }
  const bool one_each = std::all_of(chunks.begin(), chunks.end(), [](int n) { return n == 1; });
  const auto tokens = static_cast<std::int64_t>(rows.size());
  const std::int64_t q_cols = std::int64_t{shape.heads()} * shape.head_dim;
  const std::int64_t cols = std::int64_t{shape.kv_heads} * shape.head_dim;
  const auto q = random_vector<T>(static_cast<std::size_t>(tokens * (q_cols + 8)), rng);
  const auto k = random_vector<T>(static_cast<std::size_t>(tokens * cols), rng);
  const auto v = random_vector<T>(static_cast<std::size_t>(tokens * (cols + 16)), rng);
  const std::int64_t positions = *std::max_element(lengths.begin(), lengths.end());
  DeviceAngles turn(rope, positions);
  DeviceBuffer<C> cache(batch.values);
  DeviceTable pages(batch);
  DeviceBuffer<std::int32_t> query_indptr_device(query_indptr);
  DeviceBuffer<T> q_device(q);
  DeviceBuffer<T> k_device(k);
  DeviceBuffer<T> v_device(v);

  cuda::AppendProblem<T, C> p;
  p.kv = batch.view(cache.data());
  std::optional<FarPages<C>> far_pages;
  if (far) p.kv = far_pages.emplace(batch.view(cache.data())).view();
  p.table = pages.view();
  p.query_indptr = one_each ? nullptr : query_indptr_device.data();
  if (with_q) p.q = MatrixView<T>(q_device.data(), tokens, q_cols, q_cols + 8);
  p.heads = shape.heads();
  p.k = MatrixView<const T>(k_device.data(), tokens, cols);
  p.v = MatrixView<const T>(v_device.data(), tokens, cols, cols + 16);
  p.rope = turn.rope(angles);
  const Status status = cuda::run(p, device, nullptr);
  codegemm::test::require_ok(status);
  REQUIRE_CUDA(cudaDeviceSynchronize());
  if (far) far_pages->copy_back();
  REQUIRE(cache.guards_intact());
  REQUIRE(q_device.guards_intact());

  // What the CPU makes of a row; the fp32 angle functions of the two differ by units in the last place.
  const auto turned = [&](const T* row, std::int64_t count, int position) {
    std::vector<float> out;
    for (std::int64_t i = 0; i < count; ++i) out.push_back(row[i].to_float());
    if (angles != Angles::kNone) {
      REQUIRE(turn.table.apply(MatrixView<float>(out.data(), 1, count), position).ok());
    }
    return out;
  };
  double off = 0.0;
  bool same_bits = true;
  const auto compare = [&](T got, float want, bool exact) {
    const double bound =
        exact ? 1e-30 : 1.01 * codegemm::test::rounding_of<T>() * std::abs(static_cast<double>(want)) + 2e-5;
    const double d = std::abs(static_cast<double>(got.to_float()) - static_cast<double>(want)) / bound;
    off = d <= off ? off : (d > off ? d : HUGE_VAL);
  };
  // What a page holds of a number: the same, or fp8. An angle's last place may move it to the next fp8.
  const auto compare_stored = [&](C got, float want, float scale, bool exact) {
    if constexpr (std::is_same_v<C, T>) {
      compare(got, want, exact);
    } else {
      if (exact) {
        same_bits = same_bits && got == C::from_float(want / scale);
        return;
      }
      const double stored = static_cast<double>(want) / static_cast<double>(scale);
      const double size = std::max(std::abs(stored), 0x1p-6);
      const double bound =
          1.01 * 0x1p-4 * std::exp2(std::floor(std::log2(size))) + 2e-5 / static_cast<double>(scale);
      const double d = std::abs(static_cast<double>(got.to_float()) - stored) / bound;
      off = d <= off ? off : (d > off ? d : HUGE_VAL);
    }
  };
  std::vector<C> expected = batch.values;  // with the new tokens: everything else must stay
  const std::vector<C> got = cache.download();
  const std::vector<T> got_q = q_device.download();
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const int position = rows[r].keys - 1;
    const auto k_row = turned(k.data() + static_cast<std::int64_t>(r) * cols, cols, position);
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (int d = 0; d < shape.head_dim; ++d) {
        const std::size_t k_at =
            batch.offset(rows[r].sequence, position, h, false) + static_cast<std::size_t>(d);
        const std::size_t v_at =
            batch.offset(rows[r].sequence, position, h, true) + static_cast<std::size_t>(d);
        const auto column = static_cast<std::size_t>(h * shape.head_dim + d);
        compare_stored(got[k_at], k_row[column], batch.k_scale, angles == Angles::kNone);
        compare_stored(got[v_at], v[r * static_cast<std::size_t>(cols + 16) + column].to_float(),
                       batch.v_scale, true);
        expected[k_at] = got[k_at];
        expected[v_at] = got[v_at];
      }
    }
    const T* const q_row = q.data() + static_cast<std::int64_t>(r) * (q_cols + 8);
    const T* const got_row = got_q.data() + static_cast<std::int64_t>(r) * (q_cols + 8);
    if (with_q) {
      const auto want_q = turned(q_row, q_cols, position);
      for (std::int64_t i = 0; i < q_cols; ++i) {
        compare(got_row[i], want_q[static_cast<std::size_t>(i)], angles == Angles::kNone);
      }
    } else {
      CHECK(std::equal(q_row, q_row + q_cols, got_row));
    }
    CHECK(std::equal(q_row + q_cols, q_row + q_cols + 8, got_row + q_cols));
  }
  CHECK(off <= 1.0);
  CHECK(same_bits);
  CHECK(std::memcmp(expected.data(), got.data(), got.size() * sizeof(C)) == 0);
}

RopeConfig plain(int head_dim, RopeLayout layout) {
  RopeConfig out;
  out.head_dim = head_dim;
  out.layout = layout;
  return out;
}

TEST_CASE("cuda append: a small one of each kind") {
  check<Half>({16, cuda::KvLayout::kNhd, 2, 2, 64}, plain(64, RopeLayout::kHalf), Angles::kTable, {17, 5},
              {3, 5}, true);
  check<BFloat16>({5, cuda::KvLayout::kHnd, 1, 3, 128}, plain(128, RopeLayout::kInterleaved),
                  Angles::kFrequencies, {30, 6}, {1, 1}, true);
}

TEST_CASE("cuda append: page sizes, head sizes, layouts, ways of having angles") {
  RopeConfig llama3;
  llama3.theta = 500000.0;
  llama3.scaling = RopeScaling::kLlama3;
  llama3.factor = 8.0;
  for (const int page_size : {1, 16, 64}) {
    for (const int head_dim : {64, 96, 128}) {
      llama3.head_dim = head_dim;
      for (const auto angles : {Angles::kTable, Angles::kFrequencies, Angles::kNone}) {
        for (const auto layout : {cuda::KvLayout::kNhd, cuda::KvLayout::kHnd}) {
          const BatchShape shape{page_size, layout, 2, 4, head_dim};
          check<Half>(shape, llama3, angles, {1, 64, 65, 300}, {1, 64, 2, 0}, true);
          check<BFloat16>(shape, llama3, angles, {1, 64, 65, 5000}, {1, 1, 1, 1}, false);
          check<BFloat16, Fp8E4M3>(shape, llama3, angles, {1, 64, 65, 300}, {1, 64, 2, 0}, true);
        }
      }
      check<Half>({page_size, cuda::KvLayout::kNhd, 1, 4, head_dim},
                  plain(head_dim, RopeLayout::kInterleaved), Angles::kTable, {40}, {40}, true);
    }
  }
}

TEST_CASE("cuda append: pages that begin beyond 32 bits") {
  static_cast<void>(gpu_or_skip());
  if (!FarPages<Half>::fit()) return;
  for (const auto layout : {cuda::KvLayout::kNhd, cuda::KvLayout::kHnd}) {
    const BatchShape shape{16, layout, 2, 4, 128};
    const RopeConfig rope = plain(128, RopeLayout::kHalf);
    check<Half>(shape, rope, Angles::kTable, {1, 64, 65, 300}, {1, 64, 2, 0}, true, true);
    check<BFloat16, Fp8E4M3>(shape, rope, Angles::kNone, {1, 64, 65, 300}, {1, 64, 2, 0}, true, true);
  }
}

}  // namespace
}  // namespace prefillshare::test
