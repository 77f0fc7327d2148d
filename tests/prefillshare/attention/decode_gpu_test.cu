// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/decode_gpu_test.cu - decode over pages, plain and with shared prefixes,
// against sums in double.
#include <optional>

#include <prefillshare/attention/decode.cuh>

#include "gpu_pages.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::random_vector;
using codegemm::test::seed_or;

struct Case {
  BatchShape shape;
  std::vector<int> lengths;
  std::vector<SharedGroup> groups;
  cuda::SharedPath path = cuda::SharedPath::kAlways;
  bool far = false;  // see FarPages
};

std::vector<std::int32_t> group_indptr_of(const std::vector<SharedGroup>& groups) {
  std::vector<std::int32_t> out;
  for (const SharedGroup& g : groups) out.push_back(g.first);
  if (!groups.empty()) out.push_back(groups.back().first + groups.back().count);
  return out;
}
std::vector<std::int32_t> shared_pages_of(const std::vector<SharedGroup>& groups) {
  std::vector<std::int32_t> out;
  for (const SharedGroup& g : groups) out.push_back(g.pages);
  return out;
}

// Everything of one batch on the device; run() gives what the call wrote.
template <class T, class Y, class C = T>
struct Fixture {
  PagedBatch<C> batch;
  std::int64_t cols;
  std::int64_t stride;
  std::vector<T> queries;
  DeviceBuffer<C> cache;
  std::optional<FarPages<C>> far;
  DeviceTable table;
  DeviceBuffer<std::int32_t> group_indptr;
  DeviceBuffer<std::int32_t> shared_pages;
  DeviceBuffer<T> q;
  DeviceBuffer<Y> out;
  cuda::DecodeProblem<T, Y, C> problem;
  codegemm::cuda::Device device;
  DeviceBuffer<std::byte> workspace;

  Fixture(const Case& c, const codegemm::cuda::Device& device_, Rng& rng)
      : batch(c.shape, c.lengths, c.groups, rng),
        cols(std::int64_t{c.shape.heads()} * c.shape.head_dim),
        stride(cols + 8),
        queries(random_vector<T>(c.lengths.size() * static_cast<std::size_t>(stride), rng)),
        cache(batch.values),
        table(batch),
        group_indptr(group_indptr_of(c.groups)),
        shared_pages(shared_pages_of(c.groups)),
        q(queries),
        out(queries.size()),
        problem(make(c)),
        device(device_),
        workspace(cuda::workspace_bytes(problem, device)) {
    workspace.poison();
  }
  cuda::DecodeProblem<T, Y, C> make(const Case& c) {
    cuda::DecodeProblem<T, Y, C> p;
    p.kv = batch.view(cache.data());
    if (c.far) p.kv = far.emplace(batch.view(cache.data())).view();
    p.table = table.view();
    p.prefixes = {group_indptr.data(), shared_pages.data(), static_cast<int>(c.groups.size())};
    const auto rows = static_cast<std::int64_t>(c.lengths.size());
    p.q = MatrixView<const T>(q.data(), rows, cols, stride);
    p.out = MatrixView<Y>(out.data(), rows, cols, stride);
    p.heads = c.shape.heads();
    p.tuning.shared = c.path;
    return p;
  }
  void enqueue(cudaStream_t stream) {
    const Status prepared = cuda::prepare(problem, device, workspace.data(), workspace.size(), stream);
    codegemm::test::require_ok(prepared);
    const Status status = cuda::run(problem, device, workspace.data(), workspace.size(), stream);
    codegemm::test::require_ok(status);
  }
  std::vector<Y> run() {
    enqueue(nullptr);
    problem.overlap = true;  // a second layer, with kernels between prepare() and itself
    out.poison();
    REQUIRE(cuda::run(problem, device, workspace.data(), workspace.size(), nullptr).ok());
    problem.overlap = false;
    REQUIRE_CUDA(cudaDeviceSynchronize());
    REQUIRE(out.guards_intact());
    REQUIRE(workspace.guards_intact());
    return out.download();
  }
  [[nodiscard]] AttentionReference reference() const {
    std::vector<QueryAt> rows;
    for (std::size_t i = 0; i < batch.lengths.size(); ++i) rows.push_back({i, batch.lengths[i]});
    return reference_attention(batch, queries, stride, rows);
  }
};

template <class T, class Y, class C = T>
void check(const Case& c, std::uint64_t seed) {
  const auto device = gpu_or_skip();
  CAPTURE(seed, c.shape.page_size, c.shape.kv_heads, c.shape.group, c.shape.head_dim);
  CAPTURE(static_cast<int>(c.shape.layout), c.lengths, static_cast<int>(c.path), sizeof(Y));
  Rng rng(seed);
  Fixture<T, Y, C> f(c, device, rng);
  const std::vector<Y> got = f.run();
  // Weights are rounded to bf16 where many query rows share keys.
  const bool rounded = std::is_same_v<T, BFloat16> && !c.groups.empty();
  CHECK(furthest(f.reference(), got, f.cols, f.stride, rounded ? kTolerancePrefillBFloat16 : kTolerance) <=
        1.0);
  const std::vector<Y> again = f.run();
  CHECK(std::memcmp(got.data(), again.data(), got.size() * sizeof(Y)) == 0);
  // Columns behind the last head belong to somebody else.
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (static_cast<std::int64_t>(i) % f.stride >= f.cols) {
      const auto* const bytes = reinterpret_cast<const unsigned char*>(&got[i]);
      REQUIRE(std::all_of(bytes, bytes + sizeof(Y), [](unsigned char b) { return b == 0xFF; }));
    }
  }
}

const std::vector<SharedGroup> kNoGroups;

TEST_CASE("cuda decode: a small one of each kind") {
  const std::uint64_t seed = seed_or(1);
  check<Half, Half>({{16, cuda::KvLayout::kNhd, 2, 4, 128}, {200, 0, 1, 70}, kNoGroups}, seed);
  check<BFloat16, float>(
      {{16, cuda::KvLayout::kNhd, 1, 4, 64}, {90, 100, 80, 200}, {{0, 3, 5}}, cuda::SharedPath::kAlways},
      seed);
  check<Half, Half>(
      {{16, cuda::KvLayout::kHnd, 2, 8, 128}, {200, 192, 300, 90}, {{0, 3, 12}}, cuda::SharedPath::kAlways},
      seed);
  check<Half, float>(
      {{5, cuda::KvLayout::kHnd, 1, 4, 64}, {90, 100, 80, 200}, {{0, 3, 16}}, cuda::SharedPath::kAlways},
      seed);
  check<BFloat16, float, Fp8E4M3>({{16, cuda::KvLayout::kNhd, 1, 4, 128}, {200, 0, 1, 70}, kNoGroups}, seed);
}

TEST_CASE("cuda decode: groups, page sizes, head sizes, layouts") {
  const std::uint64_t seed = seed_or(2);
  for (const int page_size : {1, 5, 16, 64}) {
    for (const int group : {1, 3, 4, 8, 20}) {
      for (const int head_dim : {64, 96, 128}) {
        const auto layout = (page_size + group) % 2 == 0 ? cuda::KvLayout::kNhd : cuda::KvLayout::kHnd;
        const Case c{{page_size, layout, 2, group, head_dim},
                     {1, page_size - 1, page_size, page_size + 1, 0, 63, 64, 65, 700},
                     kNoGroups};
        check<Half, float>(c, seed);
        check<BFloat16, BFloat16>(c, seed);
      }
    }
  }
}

TEST_CASE("cuda decode: long sequences in many parts") {
  const std::uint64_t seed = seed_or(3);
  check<Half, Half>({{16, cuda::KvLayout::kNhd, 8, 4, 128}, {9001}, kNoGroups}, seed);
  check<BFloat16, float>({{16, cuda::KvLayout::kHnd, 8, 8, 128}, {3000, 17, 5003}, kNoGroups}, seed);
  // So many tiles a block that all have the same number within one.
  check<Half, Half>({{16, cuda::KvLayout::kNhd, 8, 1, 64}, {20000, 3, 9001, 5003}, kNoGroups}, seed);
  check<Half, Half>({{16, cuda::KvLayout::kHnd, 8, 1, 64}, {34016, 34100}, {{0, 2, 2126}}}, seed);
}

TEST_CASE("cuda decode: many sequences, whole items and parts in one block") {
  const std::uint64_t seed = seed_or(4);
  std::vector<int> lengths;
  Rng rng(seed);
  for (int i = 0; i < 300; ++i) lengths.push_back(static_cast<int>(rng.below(150)));
  check<Half, Half>({{16, cuda::KvLayout::kNhd, 2, 4, 64}, lengths, kNoGroups}, seed);
}

TEST_CASE("cuda decode: shared prefixes") {
  const std::uint64_t seed = seed_or(5);
  for (const auto path : {cuda::SharedPath::kAlways, cuda::SharedPath::kNever, cuda::SharedPath::kAuto}) {
    // A tail of no key, a sequence in no group between and behind, a group of one, one of more rows than a
    // tile has; groups of consecutive sequences cover the batch from the first group's start to the end.
    const Case several{{16, cuda::KvLayout::kNhd, 2, 8, 128},
                       {33, 640, 641, 1000, 700, 300, 2000, 640, 640, 656, 657, 720, 900, 641, 690, 650},
                       {{1, 3, 40}, {4, 1, 3}, {5, 1, 0}, {6, 1, 125}, {7, 9, 40}},
                       path};
    check<Half, Half>(several, seed);
    check<BFloat16, float>(several, seed);
    std::vector<int> lengths(20, 515);
    lengths[7] = 520;
    check<Half, float>({{64, cuda::KvLayout::kHnd, 1, 5, 96}, lengths, {{0, 20, 8}}, path}, seed);
    check<Half, Half>({{1, cuda::KvLayout::kNhd, 3, 3, 64}, lengths, {{0, 20, 515}}, path}, seed);
    // Tails of no key, and of many parts beside many of what is shared; more heads than a tile of a tail has.
    const std::vector<int> uneven{640, 4000, 641, 2900, 700};
    check<Half, Half>({{16, cuda::KvLayout::kNhd, 1, 20, 64}, uneven, {{0, 5, 40}}, path}, seed);
    check<BFloat16, float>({{16, cuda::KvLayout::kHnd, 8, 16, 128}, uneven, {{0, 3, 40}, {3, 2, 43}}, path},
                           seed);
    // What is shared ends within a page, since the first sequence does: no tile behind begins at one.
    check<Half, Half>({{16, cuda::KvLayout::kNhd, 2, 4, 128}, {633, 900, 1100, 633}, {{0, 4, 40}}, path},
                      seed);
    // Groups of few, some and many query rows, the first two sharing more than the crossover.
    std::vector<int> mixed(50, 1100);
    std::fill(mixed.begin() + 11, mixed.end(), 333);
    check<Half, Half>(
        {{16, cuda::KvLayout::kNhd, 2, 6, 128}, mixed, {{0, 3, 66}, {3, 8, 68}, {11, 39, 20}}, path}, seed);
  }
}

TEST_CASE("cuda decode: a cache of fp8 with scales") {
  const std::uint64_t seed = seed_or(7);
  for (const int page_size : {1, 5, 16, 64}) {
    for (const int head_dim : {64, 96, 128}) {
      const auto layout = page_size == 16 ? cuda::KvLayout::kNhd : cuda::KvLayout::kHnd;
      check<BFloat16, float, Fp8E4M3>({{page_size, layout, 2, 4, head_dim},
                                       {1, page_size, page_size + 1, 0, 63, 64, 65, 321, 700},
                                       kNoGroups},
                                      seed);
      // Groups of few, some and many query rows.
      std::vector<int> mixed(50, 400);
      std::fill(mixed.begin() + 11, mixed.end(), 333);
      const int pages = 320 / page_size;
      check<BFloat16, float, Fp8E4M3>(
          {{page_size, layout, 2, 6, head_dim}, mixed, {{0, 3, pages}, {3, 8, pages}, {11, 39, pages}}},
          seed);
    }
  }
  check<BFloat16, float, Fp8E4M3>({{16, cuda::KvLayout::kNhd, 8, 8, 128}, {3000, 17, 5003}, kNoGroups}, seed);
}

TEST_CASE("cuda decode: pages that begin beyond 32 bits") {
  static_cast<void>(gpu_or_skip());
  if (!FarPages<Half>::fit()) return;
  const std::uint64_t seed = seed_or(9);
  for (const auto layout : {cuda::KvLayout::kNhd, cuda::KvLayout::kHnd}) {
    for (const std::vector<SharedGroup>& groups : {kNoGroups, std::vector<SharedGroup>{{0, 4, 40}}}) {
      const auto path = cuda::SharedPath::kAlways;
      const std::vector<int> lengths{700, 640, 1000, 641, 90};
      check<Half, float>({{16, layout, 2, 4, 128}, lengths, groups, path, true}, seed);
      check<BFloat16, float>({{16, layout, 1, 20, 96}, lengths, groups, path, true}, seed);
      check<BFloat16, float, Fp8E4M3>({{16, layout, 2, 4, 128}, lengths, groups, path, true}, seed);
    }
  }
}

// Lets the next kernel start, and writes rows of the cache long after that has asked for its first keys.
__global__ void write_late_kernel(std::uint16_t* cache, const std::uint16_t* right, const std::int64_t* rows,
                                  int count, int elements) {
  codegemm::cuda::detail::allow_next_kernel();
  for (const long long start = clock64(); clock64() - start < 1'000'000;) {
  }
  for (int i = static_cast<int>(threadIdx.x); i < count * elements; i += static_cast<int>(blockDim.x)) {
    const std::int64_t at = rows[i / elements] + i % elements;
    cache[at] = right[at];
  }
}

template <class T>
void check_late(const Case& c, std::uint64_t seed) {
  const auto device = gpu_or_skip();
  CAPTURE(seed, c.shape.page_size, c.shape.head_dim, c.lengths, c.groups.size());
  Rng rng(seed);
  Fixture<T, float> f(c, device, rng);
  std::vector<T> stale = f.batch.values;
  std::vector<std::int64_t> rows;
  for (std::size_t i = 0; i < c.lengths.size(); ++i) {
    for (int h = 0; h < c.shape.kv_heads; ++h) {
      for (const bool v : {false, true}) {
        const std::size_t at = f.batch.offset(i, c.lengths[i] - 1, h, v);
        rows.push_back(static_cast<std::int64_t>(at));
        for (int d = 0; d < c.shape.head_dim; ++d) stale[at + static_cast<std::size_t>(d)].bits = 0xFFFF;
      }
    }
  }
  DeviceBuffer<T> right(f.batch.values);
  DeviceBuffer<std::int64_t> rows_device(rows);
  f.enqueue(nullptr);
  REQUIRE_CUDA(cudaDeviceSynchronize());
  f.cache.upload(stale);
  f.out.poison();
  f.problem.overlap = true;
  write_late_kernel<<<1, 256>>>(reinterpret_cast<std::uint16_t*>(f.cache.data()),
                                reinterpret_cast<const std::uint16_t*>(right.data()), rows_device.data(),
                                static_cast<int>(rows.size()), c.shape.head_dim);
  REQUIRE(cuda::run(f.problem, device, f.workspace.data(), f.workspace.size(), nullptr).ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  const bool rounded = std::is_same_v<T, BFloat16> && !c.groups.empty();
  CHECK(furthest(f.reference(), f.out.download(), f.cols, f.stride,
                 rounded ? kTolerancePrefillBFloat16 : kTolerance) <= 1.0);
}

TEST_CASE("cuda decode: the kernel before writes each sequence's newest key") {
  const std::uint64_t seed = seed_or(8);
  for (const int head_dim : {64, 128}) {
    for (const int page_size : {5, 16}) {
      const BatchShape shape{page_size, cuda::KvLayout::kNhd, 2, 4, head_dim};
      check_late<Half>({shape, {200, 1, 70, 1500, 64, 65}, kNoGroups}, seed);
      // Tails of one key, of whole tiles, and of many parts; a sequence that ends with what is shared.
      const int shared = 640 / page_size;
      check_late<Half>({shape, {641, 704, 900, 2000, 705}, {{0, 5, shared}}}, seed);
      check_late<BFloat16>({shape, {900, 640, 1000, 77}, {{0, 3, shared}}}, seed);
    }
  }
}

TEST_CASE("cuda decode: a graph follows lengths, pages and groups that change") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(6);
  CAPTURE(seed);
  Rng rng(seed);
  Case c{{16, cuda::KvLayout::kNhd, 2, 4, 128}, {800, 900, 700, 64}, {{0, 3, 40}}, cuda::SharedPath::kAuto};
  Fixture<Half, Half> f(c, device, rng);
  cudaStream_t stream = nullptr;
  REQUIRE_CUDA(cudaStreamCreate(&stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  REQUIRE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  f.enqueue(stream);
  REQUIRE_CUDA(cudaStreamEndCapture(stream, &graph));
  REQUIRE_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (const int shorter : {0, 1, 37, 200}) {
    CAPTURE(shorter);
    // Fewer tokens of the same pages, and fewer of them shared.
    for (std::size_t i = 0; i < 4; ++i) {
      f.batch.lengths[i] = std::max(0, c.lengths[i] - shorter);
    }
    std::vector<std::int32_t> indptr{0};
    std::vector<std::int32_t> indices;
    for (std::size_t i = 0; i < 4; ++i) {
      const int pages = (f.batch.lengths[i] + 15) / 16;
      for (int j = 0; j < pages; ++j) {
        indices.push_back(f.batch.indices[static_cast<std::size_t>(f.batch.indptr[i] + j)]);
      }
      indptr.push_back(static_cast<std::int32_t>(indices.size()));
      f.batch.last_page_len[i] = f.batch.lengths[i] == 0 ? 16 : (f.batch.lengths[i] - 1) % 16 + 1;
    }
    const AttentionReference want = f.reference();
    indices.resize(f.batch.indices.size(), 0);
    f.table.indptr.upload(indptr);
    f.table.indices.upload(indices);
    f.table.last_page_len.upload(f.batch.last_page_len);
    f.shared_pages.upload({40 - shorter / 10});
    f.out.poison();
    REQUIRE_CUDA(cudaGraphLaunch(exec, stream));
    REQUIRE_CUDA(cudaStreamSynchronize(stream));
    CHECK(furthest(want, f.out.download(), f.cols, f.stride, kTolerance) <= 1.0);
  }
  REQUIRE_CUDA(cudaGraphExecDestroy(exec));
  REQUIRE_CUDA(cudaGraphDestroy(graph));
  REQUIRE_CUDA(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace prefillshare::test
