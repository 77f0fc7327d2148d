// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/attention/paged.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <prefillshare/attention/shared.hpp>
#include <prefillshare/kv/allocator.hpp>

#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::MatrixView;
using codegemm::SerialExecutor;
using codegemm::Status;
using codegemm::StatusCode;
using codegemm::ThreadPool;
using codegemm::test::Rng;
using prefillshare::BlockId;
using prefillshare::HostKvStorage;
using prefillshare::KvAllocator;
using prefillshare::PagedAttentionArgs;
using prefillshare::PagedAttentionShape;
using prefillshare::Sequence;
using prefillshare::detail::AttentionKernels;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<const AttentionKernels*> all_kernels() {
  std::vector<const AttentionKernels*> kernels = {&prefillshare::detail::kPortableKernels};
  if (&prefillshare::detail::attention_kernels() != kernels[0]) {
    kernels.push_back(&prefillshare::detail::attention_kernels());
  }
#if defined(__x86_64__)
  if (kernels.back() == &prefillshare::detail::kAvx512Kernels) {
    kernels.push_back(&prefillshare::detail::kAvx2Kernels);
  }
#endif
  return kernels;
}

/// Exactly as many bytes as asked for, aligned, full of NaN, with a guard behind that must stay.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes), memory_(bytes + kGuard) {
    std::memset(memory_.data(), 0xFF, memory_.size());
  }
  [[nodiscard]] std::span<std::byte> span() { return {memory_.data(), bytes_}; }
  [[nodiscard]] bool intact() const {
    return std::all_of(memory_.begin() + static_cast<std::ptrdiff_t>(bytes_), memory_.end(),
                       [](std::byte b) { return b == std::byte{0xFF}; });
  }

 private:
  static constexpr std::size_t kGuard = 64;
  template <class T>
  struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}  // NOLINT(google-explicit-constructor)
    T* allocate(std::size_t n) {
      return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{64}));
    }
    void deallocate(T* p, std::size_t) { ::operator delete (p, std::align_val_t{64}); }
    bool operator==(const Aligned&) const { return true; }
  };
  std::size_t bytes_;
  std::vector<std::byte, Aligned<std::byte>> memory_;
};

/// One problem: K, V and Q as plain matrices, and the pages, in shuffled order among blocks full of NaN.
struct Problem {
  Problem(Rng& rng, std::int64_t tokens_, std::int64_t first_, int heads_, int kv_heads_, int head_dim_,
          int block_tokens, float spread = 1.0F)
      : tokens(tokens_), first(first_), heads(heads_), kv_heads(kv_heads_), head_dim(head_dim_) {
    const std::int64_t context = first + tokens;
    k = rng.normals(context * kv_heads * head_dim);
    v = rng.normals(context * kv_heads * head_dim);
    q = rng.normals(tokens * q_stride());
    for (float& x : q) x *= spread;
    page(rng, block_tokens);
  }

  void page(Rng& rng, int block_tokens) {
    const std::int64_t context = first + tokens;
    const std::int64_t used = (context + block_tokens - 1) / block_tokens;
    const std::int64_t spare = 3;
    storage.emplace(*HostKvStorage::create({2, kv_heads, head_dim, block_tokens}, used + spare));
    const std::int64_t floats = (used + spare) * 2 * block_tokens * kv_heads * head_dim;
    for (int layer = 0; layer < 2; ++layer) std::fill_n(storage->layer(layer).data, floats, kNaN);
    std::vector<BlockId> order(static_cast<std::size_t>(used + spare));
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(i)))]);
    }
    blocks.assign(order.begin(), order.begin() + used);
    REQUIRE(prefillshare::append_kv(pages(), blocks, 0, {k.data(), context, kv_row()},
                                    {v.data(), context, kv_row()})
                .ok());
  }

  [[nodiscard]] prefillshare::KvLayerView<float> pages() { return storage->layer(1); }
  [[nodiscard]] std::int64_t kv_row() const { return std::int64_t{kv_heads} * head_dim; }
  [[nodiscard]] std::int64_t columns() const { return std::int64_t{heads} * head_dim; }
  [[nodiscard]] std::int64_t q_stride() const { return columns() + 3; }  // not dense, not aligned
  [[nodiscard]] std::int64_t out_stride() const { return columns() + 5; }

  [[nodiscard]] PagedAttentionArgs args(std::vector<float>& out) {
    PagedAttentionArgs args;
    args.kv = pages();
    args.blocks = blocks;
    args.first_position = first;
    args.q = {q.data(), tokens, columns(), q_stride()};
    args.out = {out.data(), tokens, columns(), out_stride()};
    args.heads = heads;
    args.scale = scale;
    return args;
  }

  /// The output, dense [tokens][columns], of a call that must succeed.
  [[nodiscard]] std::vector<float> run(codegemm::Executor& executor, const AttentionKernels& kernels) {
    std::vector<float> padded(static_cast<std::size_t>(tokens * out_stride()), kNaN);
    PagedAttentionArgs call = args(padded);
    Workspace workspace(prefillshare::workspace_bytes(prefillshare::shape_of(call), executor.workers()));
    call.workspace = workspace.span();
    const Status status = prefillshare::detail::paged_attention(call, executor, kernels);
    INFO(status.message());
    REQUIRE(status.ok());
    REQUIRE(workspace.intact());
    std::vector<float> out;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto row = padded.begin() + t * out_stride();
      out.insert(out.end(), row, row + columns());
      REQUIRE(std::all_of(row + columns(), row + out_stride(), [](float x) { return std::isnan(x); }));
    }
    return out;
  }

  /// The definition in double, and a bound on what fp32 may add to each element: u times the length of each
  /// sum times the sum of magnitudes, once for the scores and once for the weighted values.
  void reference(std::vector<double>& out, std::vector<double>& bound) const {
    const double factor =
        scale != 0.0F ? static_cast<double>(scale) : 1.0 / std::sqrt(static_cast<double>(head_dim));
    constexpr double kUnit = 0x1p-24;
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int head = 0; head < heads; ++head) {
        const float* own_q = q.data() + t * q_stride() + std::int64_t{head} * head_dim;
        const int kv_head = head / (heads / kv_heads);
        const std::int64_t keys = first + t + 1;
        std::vector<double> weight(static_cast<std::size_t>(keys));
        double peak = -std::numeric_limits<double>::infinity();
        double score_error = 0.0;
        for (std::int64_t key = 0; key < keys; ++key) {
          const float* own_k = k.data() + (key * kv_heads + kv_head) * head_dim;
          double sum = 0.0, magnitude = 0.0;
          for (int d = 0; d < head_dim; ++d) {
            const double product = static_cast<double>(own_q[d]) * static_cast<double>(own_k[d]);
            sum += product;
            magnitude += std::abs(product);
          }
          weight[static_cast<std::size_t>(key)] = sum * factor;
          peak = std::max(peak, sum * factor);
          score_error = std::max(score_error, (head_dim / 4.0 + 4.0) * kUnit * magnitude * std::abs(factor));
        }
        double total = 0.0;
        for (double& w : weight) total += w = std::exp(w - peak);
        for (int d = 0; d < head_dim; ++d) {
          double sum = 0.0, magnitude = 0.0;
          std::int64_t at = std::int64_t{kv_head} * head_dim + d;
          for (const double w : weight) {
            const double value = static_cast<double>(v[static_cast<std::size_t>(at)]);
            sum += w * value;
            magnitude += w * std::abs(value);
            at += kv_row();
          }
          out.push_back(sum / total);
          const double relative = 2.0 * score_error + (static_cast<double>(keys) / 8.0 + 16.0) * kUnit;
          bound.push_back(relative * (magnitude + std::abs(sum)) / total + 1e-30);
        }
      }
    }
  }

  /// Every kernel that this machine runs, against the definition.
  void check(codegemm::Executor& executor) {
    std::vector<double> expected, bound;
    reference(expected, bound);
    for (const AttentionKernels* kernels : all_kernels()) {
      CAPTURE(std::string(kernels->name));
      const std::vector<float> got = run(executor, *kernels);
      REQUIRE(got.size() == expected.size());
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (!(std::abs(static_cast<double>(got[i]) - expected[i]) <= bound[i])) {
          if (wrong++ == 0) {
            UNSCOPED_INFO("first at " << i << ": got " << got[i] << ", expected " << expected[i] << " +- "
                                      << bound[i]);
          }
        }
      }
      CHECK(wrong == 0);
    }
  }

  std::int64_t tokens, first;
  int heads, kv_heads, head_dim;
  float scale = 0.0F;
  std::vector<float> k, v;  // [context][kv_heads][head_dim]
  std::vector<float> q;     // [tokens][q_stride]
  std::optional<HostKvStorage> storage;
  std::vector<BlockId> blocks;
};

}  // namespace

TEST_CASE("paged attention agrees with the definition in double") {
  const std::uint64_t seed = codegemm::test::seed_or(41);
  CAPTURE(seed);
  Rng rng(seed);
  SerialExecutor executor;
  const std::vector<int> groups = {1, 3, 4, 8};
  const std::vector<int> head_dims = {8, 64, 80, 96, 128};
  std::size_t turn = 0;
  for (const std::int64_t tokens : {0, 1, 2, 17, 64, 65}) {
    for (const std::int64_t first : {0, 1, 63, 64, 130}) {
      for (const int block_tokens : {1, 5, 16, 64}) {
        const int group = groups[turn % groups.size()];
        const int head_dim = head_dims[turn % head_dims.size()];
        const int kv_heads = turn % 3 == 0 ? 2 : 1;
        ++turn;
        CAPTURE(tokens, first, block_tokens, group, head_dim, kv_heads);
        Problem problem(rng, tokens, first, group * kv_heads, kv_heads, head_dim, block_tokens);
        problem.check(executor);
      }
    }
  }
}

TEST_CASE("every group and head size, for a prefill chunk and for decode") {
  Rng rng(42);
  SerialExecutor executor;
  for (const int group : {1, 2, 3, 4, 7, 8, 16, 17, 71}) {
    for (const int head_dim : {8, 16, 24, 40, 64, 72, 80, 88, 96, 128, 256}) {
      if (group * head_dim > 640) continue;
      for (const std::int64_t tokens : {1, 20}) {
        CAPTURE(group, head_dim, tokens);
        Problem problem(rng, tokens, 70, group, 1, head_dim, 16);
        problem.check(executor);
      }
    }
  }
}

TEST_CASE("decode over contexts that are split and merged") {
  Rng rng(43);
  SerialExecutor executor;
  for (const std::int64_t context : {255, 256, 257, 512, 700, 8193, 9001}) {
    for (const std::int64_t tokens : {1, 5}) {
      CAPTURE(context, tokens);
      Problem problem(rng, tokens, context - tokens, 2, 1, 8, 16);
      problem.check(executor);
    }
  }
}

TEST_CASE("peaked, flat and far-off scores stay stable") {
  Rng rng(44);
  SerialExecutor executor;
  for (const std::int64_t tokens : {1, 40}) {
    for (const float spread : {0.0F, 30.0F, 1000.0F}) {
      CAPTURE(tokens, spread);
      Problem problem(rng, tokens, 300, 2, 2, 64, 16, spread);
      for (const float scale : {0.0F, 1.0F, -0.125F}) {
        problem.scale = scale;
        if (spread <= 30.0F) problem.check(executor);
        for (const AttentionKernels* kernels : all_kernels()) {
          const std::vector<float> out = problem.run(executor, *kernels);
          CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::abs(x) < 10.0F; }));
        }
      }
    }
  }
}

TEST_CASE("the result is bit for bit the same for 1, 2 and 3 workers") {
  Rng rng(45);
  SerialExecutor serial;
  ThreadPool two(2), three(3);
  for (const std::int64_t tokens : {1, 4, 65, 300}) {
    CAPTURE(tokens);
    Problem problem(rng, tokens, 900, 6, 2, 64, 16);
    for (const AttentionKernels* kernels : all_kernels()) {
      const std::vector<float> one = problem.run(serial, *kernels);
      CHECK(problem.run(two, *kernels) == one);
      CHECK(problem.run(three, *kernels) == one);
      CHECK(problem.run(three, *kernels) == one);
    }
  }
}

TEST_CASE("a prefill cut into chunks is the whole prefill") {
  Rng rng(46);
  SerialExecutor executor;
  constexpr std::int64_t kTokens = 203;
  Problem whole(rng, kTokens, 0, 6, 2, 64, 16);
  for (const AttentionKernels* kernels : all_kernels()) {
    CAPTURE(std::string(kernels->name));
    const std::vector<float> expected = whole.run(executor, *kernels);
    for (const std::int64_t chunk : {6, 17, 64, 100, 1}) {
      CAPTURE(chunk);
      float worst = 0.0F;
      for (std::int64_t first = 0; first < kTokens; first += chunk) {
        const std::int64_t count = std::min(chunk, kTokens - first);
        std::vector<float> out(static_cast<std::size_t>(count * whole.columns()), kNaN);
        PagedAttentionArgs args;
        args.kv = whole.pages();
        args.blocks = whole.blocks;
        args.first_position = first;
        args.q = {whole.q.data() + first * whole.q_stride(), count, whole.columns(), whole.q_stride()};
        args.out = {out.data(), count, whole.columns()};
        args.heads = whole.heads;
        Workspace workspace(prefillshare::workspace_bytes(prefillshare::shape_of(args), 1));
        args.workspace = workspace.span();
        REQUIRE(prefillshare::detail::paged_attention(args, executor, *kernels).ok());
        const auto begin = expected.begin() + first * whole.columns();
        for (std::size_t i = 0; i < out.size(); ++i) {
          const float difference = std::abs(out[i] - begin[static_cast<std::ptrdiff_t>(i)]);
          worst = difference <= worst ? worst : difference;  // NaN gets through
        }
        if (count * 3 > 16) REQUIRE(std::equal(out.begin(), out.end(), begin));  // 3 heads a group
      }
      CHECK(worst <= 2e-6F);
    }
  }
}

TEST_CASE("the result does not depend on the size and place of the blocks") {
  Rng rng(47);
  SerialExecutor executor;
  for (const std::int64_t tokens : {1, 50}) {
    Problem problem(rng, tokens, 100, 4, 2, 40, 16);
    for (const AttentionKernels* kernels : all_kernels()) {
      const std::vector<float> expected = problem.run(executor, *kernels);
      for (const int block_tokens : {1, 5, 16, 64, 4096}) {
        CAPTURE(tokens, block_tokens);
        problem.page(rng, block_tokens);
        CHECK(problem.run(executor, *kernels) == expected);
      }
    }
  }
}

TEST_CASE("forks that share a prefix read the same as contexts of their own") {
  Rng rng(48);
  SerialExecutor executor;
  constexpr int kKvHeads = 2, kHeads = 6, kDim = 64, kRow = kKvHeads * kDim;
  constexpr std::int64_t kShared = 37, kOwn = 25;
  auto storage = HostKvStorage::create({1, kKvHeads, kDim, 16}, 24);
  REQUIRE(storage.ok());
  std::fill_n(storage->layer(0).data, 24 * 2 * 16 * kRow, kNaN);
  auto allocator = KvAllocator::create(*storage);
  REQUIRE(allocator.ok());
  auto base = (*allocator)->open({"base", "1", ""}, {});
  REQUIRE(base.ok());
  const std::vector<float> shared_k = rng.normals(kShared * kRow);
  const std::vector<float> shared_v = rng.normals(kShared * kRow);
  std::vector<std::int32_t> tokens(kShared, 7);
  REQUIRE((*allocator)->reserve(*base, kShared).ok());
  REQUIRE(prefillshare::append_kv(storage->layer(0), base->blocks(), 0, {shared_k.data(), kShared, kRow},
                                  {shared_v.data(), kShared, kRow})
              .ok());
  REQUIRE((*allocator)->commit(*base, tokens).ok());

  std::vector<Sequence> forks;
  std::vector<Problem> alone;
  for (int i = 0; i < 3; ++i) {
    auto fork = (*allocator)->fork(*base);
    REQUIRE(fork.ok());
    forks.push_back(*std::move(fork));
    Problem problem(rng, 1, kShared + kOwn - 1, kHeads, kKvHeads, kDim, 16);
    std::copy(shared_k.begin(), shared_k.end(), problem.k.begin());
    std::copy(shared_v.begin(), shared_v.end(), problem.v.begin());
    problem.page(rng, 16);
    alone.push_back(std::move(problem));
  }
  for (std::int64_t t = 0; t < kOwn; ++t) {  // the forks take turns
    for (std::size_t i = 0; i < forks.size(); ++i) {
      REQUIRE((*allocator)->append_private(forks[i], 1).ok());
      const std::int64_t at = (kShared + t) * kRow;
      REQUIRE(prefillshare::append_kv(storage->layer(0), forks[i].blocks(), kShared + t,
                                      {alone[i].k.data() + at, 1, kRow}, {alone[i].v.data() + at, 1, kRow})
                  .ok());
    }
  }
  REQUIRE((*allocator)->check_invariants().ok());
  for (std::size_t i = 0; i < forks.size(); ++i) {
    for (const AttentionKernels* kernels : all_kernels()) {
      const std::vector<float> expected = alone[i].run(executor, *kernels);
      std::vector<float> out(expected.size(), kNaN);
      PagedAttentionArgs args;
      args.kv = storage->layer(0);
      args.blocks = forks[i].blocks();
      args.first_position = kShared + kOwn - 1;
      args.q = {alone[i].q.data(), 1, alone[i].columns(), alone[i].q_stride()};
      args.out = {out.data(), 1, alone[i].columns()};
      args.heads = kHeads;
      Workspace workspace(prefillshare::workspace_bytes(prefillshare::shape_of(args), 1));
      args.workspace = workspace.span();
      REQUIRE(prefillshare::detail::paged_attention(args, executor, *kernels).ok());
      CHECK(out == expected);
    }
    alone[i].check(executor);
  }
}

namespace {

/// Sequences whose first tokens lie in the same blocks, each a Problem of its own to be compared with.
struct SharedProblem {
  std::vector<Problem> alone;
  std::optional<HostKvStorage> storage;
  std::vector<std::vector<BlockId>> blocks;
  std::vector<prefillshare::DecodeSequence> sequences;
  std::vector<float> q;
  std::int64_t shared;

  SharedProblem(Rng& rng, int heads, int kv_heads, int head_dim, std::int64_t shared_,
                const std::vector<std::int64_t>& tails, int block_tokens)
      : shared(shared_) {
    const std::int64_t row = std::int64_t{kv_heads} * head_dim;
    const std::vector<float> k = rng.normals(shared * row);
    const std::vector<float> v = rng.normals(shared * row);
    std::int64_t needed = 2 + shared / block_tokens;
    for (const std::int64_t tail : tails) needed += tail / block_tokens + 2;
    storage.emplace(*HostKvStorage::create({1, kv_heads, head_dim, block_tokens}, needed));
    std::fill_n(storage->layer(0).data, needed * 2 * block_tokens * row, kNaN);
    BlockId next = static_cast<BlockId>(needed);  // from the end, so that pages do not lie in order
    std::vector<BlockId> common;
    for (std::int64_t t = 0; t < shared; t += block_tokens) common.push_back(--next);
    for (const std::int64_t tail : tails) {
      Problem& one = alone.emplace_back(rng, 1, shared + tail - 1, heads, kv_heads, head_dim, block_tokens);
      std::copy(k.begin(), k.end(), one.k.begin());
      std::copy(v.begin(), v.end(), one.v.begin());
      std::vector<BlockId>& own = blocks.emplace_back(common);
      while (std::ssize(own) * block_tokens < shared + tail) own.push_back(--next);
      REQUIRE(prefillshare::append_kv(storage->layer(0), own, 0, {one.k.data(), shared + tail, row},
                                      {one.v.data(), shared + tail, row})
                  .ok());
      q.insert(q.end(), one.q.begin(), one.q.end());
    }
    for (std::size_t i = 0; i < tails.size(); ++i) sequences.push_back({blocks[i], shared + tails[i]});
  }

  [[nodiscard]] prefillshare::SharedDecodeArgs args(std::vector<float>& out) {
    const auto count = static_cast<std::int64_t>(alone.size());
    prefillshare::SharedDecodeArgs args;
    args.kv = storage->layer(0);
    args.sequences = sequences;
    args.shared_tokens = shared;
    args.q = {q.data(), count, alone[0].columns(), alone[0].q_stride()};
    args.out = {out.data(), count, alone[0].columns(), alone[0].out_stride()};
    args.heads = alone[0].heads;
    return args;
  }
  [[nodiscard]] std::vector<float> run(codegemm::Executor& executor, const AttentionKernels& kernels) {
    std::vector<float> out(alone.size() * static_cast<std::size_t>(alone[0].out_stride()), kNaN);
    prefillshare::SharedDecodeArgs call = args(out);
    Workspace workspace(prefillshare::decode_workspace_bytes(call, executor.workers()));
    call.workspace = workspace.span();
    const Status status = prefillshare::detail::shared_decode(call, executor, kernels);
    INFO(status.message());
    REQUIRE(status.ok());
    REQUIRE(workspace.intact());
    return out;
  }
};

}  // namespace

TEST_CASE("sequences that share a prefix, decoded together, agree with the definition in double") {
  Rng rng(52);
  SerialExecutor serial;
  ThreadPool pool(2);
  const auto check = [&](int heads, int kv_heads, int head_dim, std::int64_t shared,
                         const std::vector<std::int64_t>& tails, int block_tokens) {
    CAPTURE(heads, kv_heads, head_dim, shared, tails, block_tokens);
    SharedProblem problem(rng, heads, kv_heads, head_dim, shared, tails, block_tokens);
    for (const AttentionKernels* kernels : all_kernels()) {
      CAPTURE(std::string(kernels->name));
      const std::vector<float> got = problem.run(serial, *kernels);
      const std::vector<float> again = problem.run(pool, *kernels);
      REQUIRE(std::memcmp(got.data(), again.data(), got.size() * sizeof(float)) == 0);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < problem.alone.size(); ++i) {
        std::vector<double> expected, bound;
        problem.alone[i].reference(expected, bound);
        const auto* row = got.data() + i * static_cast<std::size_t>(problem.alone[i].out_stride());
        for (std::size_t j = 0; j < expected.size(); ++j) {
          if (!(std::abs(static_cast<double>(row[j]) - expected[j]) <= bound[j])) ++wrong;
        }
      }
      CHECK(wrong == 0);
    }
  };
  check(4, 1, 64, 48, {5, 1, 17}, 16);
  check(8, 2, 128, 704, {3, 300, 20, 1, 90, 2}, 16);   // several parts of both, several sets of 16 rows
  check(20, 1, 96, 32, {9, 40}, 1);                    // a group larger than a set of rows
  check(3, 3, 64, 0, {70, 1, 600}, 11);                // nothing is shared
  check(6, 2, 8, 70, {0, 0, 0, 0, 0, 0, 0, 0, 0}, 7);  // all is shared
  check(2, 1, 64, 33, {0, 0}, 16);                     // a partly filled block, too
}

TEST_CASE("pages of every element type and order, read by prefill, decode and shared decode") {
  Rng rng(54);
  SerialExecutor executor;
  constexpr int kHeads = 6, kKvHeads = 2, kDim = 64, kBlockTokens = 16;
  constexpr std::int64_t kRow = std::int64_t{kKvHeads} * kDim;
  using prefillshare::KvElement;
  using prefillshare::KvLayout;
  for (const KvElement element :
       {KvElement::kFp32, KvElement::kFp16, KvElement::kBf16, KvElement::kFp8E4M3}) {
    for (const KvLayout layout : {KvLayout::kNhd, KvLayout::kHnd}) {
      for (const std::int64_t tokens : {1, 40}) {
        CAPTURE(static_cast<int>(element), static_cast<int>(layout), tokens);
        Problem problem(rng, tokens, 600 - tokens, kHeads, kKvHeads, kDim, kBlockTokens);
        const std::int64_t used = std::ssize(problem.blocks) + 3;
        std::vector<std::byte> memory(static_cast<std::size_t>(used * 2 * kBlockTokens * kRow * 4));
        std::memset(memory.data(), 0xFF, memory.size());  // NaN in each of the types
        prefillshare::KvPages pages;
        pages.base = memory.data();
        pages.format = {element, layout};
        pages.strides = prefillshare::dense_strides({1, kKvHeads, kDim, kBlockTokens}, layout);
        pages.blocks = used;
        pages.block_tokens = kBlockTokens;
        pages.kv_heads = kKvHeads;
        pages.head_dim = kDim;
        if (element == KvElement::kFp8E4M3) pages.k_scale = 0.01F, pages.v_scale = 0.02F;
        // The definition gets the numbers as they are stored; some are so small that they are subnormal.
        for (std::int64_t t = 0; t < 600; ++t) {
          for (int part = 0; part < 2; ++part) {
            std::span<float> row(
                (part == 0 ? problem.k : problem.v).data() + static_cast<std::ptrdiff_t>(t * kRow),
                static_cast<std::size_t>(kRow));
            for (std::size_t j = 0; j < row.size(); j += 7) row[j] *= 1e-5F;
            const BlockId block = problem.blocks[static_cast<std::size_t>(t / kBlockTokens)];
            const auto slot = static_cast<int>(t % kBlockTokens);
            prefillshare::store_token(pages, block, slot, part, row);
            prefillshare::load_token(pages, block, slot, part, row);
          }
        }
        std::vector<double> expected, bound;
        problem.reference(expected, bound);
        for (const AttentionKernels* kernels : all_kernels()) {
          CAPTURE(std::string(kernels->name));
          const auto wrong = [&](const std::vector<float>& out) {
            std::size_t count = 0;
            for (std::int64_t t = 0; t < tokens; ++t) {
              for (std::int64_t c = 0; c < problem.columns(); ++c) {
                const auto at = static_cast<std::size_t>(t * problem.columns() + c);
                const double got =
                    static_cast<double>(out[static_cast<std::size_t>(t * problem.out_stride() + c)]);
                if (!(std::abs(got - expected[at]) <= bound[at])) ++count;
              }
            }
            return count;
          };
          std::vector<float> out(static_cast<std::size_t>(tokens * problem.out_stride()), kNaN);
          PagedAttentionArgs args = problem.args(out);
          args.kv = {};
          args.pages = &pages;
          Workspace workspace(prefillshare::workspace_bytes(prefillshare::shape_of(args), 1));
          args.workspace = workspace.span();
          REQUIRE(prefillshare::detail::paged_attention(args, executor, *kernels).ok());
          CHECK(workspace.intact());
          CHECK(wrong(out) == 0);
          if (tokens > 1) continue;
          out.assign(out.size(), kNaN);
          const prefillshare::DecodeSequence sequence{problem.blocks, 600};
          prefillshare::SharedDecodeArgs shared;
          shared.pages = &pages;
          shared.sequences = {&sequence, 1};
          shared.shared_tokens = 320;
          shared.q = args.q;
          shared.out = args.out;
          shared.heads = kHeads;
          Workspace room(prefillshare::decode_workspace_bytes(shared, 1));
          shared.workspace = room.span();
          REQUIRE(prefillshare::detail::shared_decode(shared, executor, *kernels).ok());
          CHECK(room.intact());
          CHECK(wrong(out) == 0);
        }
      }
    }
  }
}

TEST_CASE("decoding with a shared prefix refuses wrong calls before it writes") {
  Rng rng(53);
  SerialExecutor executor;
  SharedProblem problem(rng, 4, 2, 64, 32, {5, 9}, 16);
  std::vector<float> out(2 * static_cast<std::size_t>(problem.alone[0].out_stride()), kNaN);
  const prefillshare::SharedDecodeArgs good = problem.args(out);
  Workspace workspace(prefillshare::decode_workspace_bytes(good, 1));
  const auto code_of = [&](auto&& change) {
    prefillshare::SharedDecodeArgs args = good;
    args.workspace = workspace.span();
    change(args);
    return prefillshare::shared_decode(args, executor).code();
  };
  using Args = prefillshare::SharedDecodeArgs;
  CHECK(code_of([](Args& a) { a.heads = 3; }) == StatusCode::kInvalidArgument);
  CHECK(code_of([](Args& a) { a.kv.head_dim = 12; }) == StatusCode::kUnsupported);
  CHECK(code_of([](Args& a) { a.q.cols -= 64; }) == StatusCode::kShapeMismatch);
  CHECK(code_of([](Args& a) { a.out.rows = 1; }) == StatusCode::kShapeMismatch);
  CHECK(code_of([](Args& a) { a.scale = kNaN; }) == StatusCode::kInvalidArgument);
  CHECK(code_of([](Args& a) { a.q.data = nullptr; }) == StatusCode::kNullPointer);
  CHECK(code_of([](Args& a) { a.shared_tokens = -1; }) == StatusCode::kInvalidArgument);
  CHECK(code_of([](Args& a) { a.shared_tokens = 38; }) == StatusCode::kInvalidArgument);  // beyond the first
  CHECK(code_of([](Args& a) { a.shared_tokens = 33; }) ==
        StatusCode::kInvalidArgument);  // not the same block
  CHECK(code_of([](Args& a) { a.kv.blocks = 1; }) == StatusCode::kInvalidArgument);
  CHECK(code_of([&](Args& a) { a.q.data = out.data() + 3; }) == StatusCode::kInvalidArgument);
  for (const std::int64_t length : {std::int64_t{1} << 40, std::numeric_limits<std::int64_t>::max()}) {
    std::vector<prefillshare::DecodeSequence> long_one(good.sequences.begin(), good.sequences.end());
    long_one[1].length = length;
    CHECK(code_of([&](Args& a) { a.sequences = long_one; }) == StatusCode::kInvalidArgument);
  }
  CHECK(code_of([](Args& a) { a.workspace = a.workspace.first(64); }) == StatusCode::kWorkspaceTooSmall);
  CHECK(code_of([](Args& a) { a.workspace = {}; }) == StatusCode::kWorkspaceTooSmall);
  CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }));
  CHECK(code_of([](Args&) {}) == StatusCode::kOk);
  Args none;
  none.kv = good.kv;
  none.heads = 4;
  none.q.cols = none.out.cols = none.q.stride = none.out.stride = 256;
  CHECK(prefillshare::shared_decode(none, executor).ok());
}

TEST_CASE("a NaN stays in the rows that see it, and is not lost in them") {
  Rng rng(49);
  SerialExecutor executor;
  for (const AttentionKernels* kernels : all_kernels()) {
    CAPTURE(std::string(kernels->name));
    for (const std::int64_t tokens : {70, 8}) {
      Problem problem(rng, tokens, 75, 2, 1, 16, 16);
      const std::vector<float> clean = problem.run(executor, *kernels);
      const std::int64_t bad = 80;  // the tokens from the sixth on see it
      for (int i = 0; i < 16; ++i) problem.v[static_cast<std::size_t>(bad * 16 + i)] = kNaN;
      problem.k[static_cast<std::size_t>(bad * 16 + 3)] = kNaN;
      problem.page(rng, 16);
      const std::vector<float> out = problem.run(executor, *kernels);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t i = t * 32; i < (t + 1) * 32; ++i) {
          const auto at = static_cast<std::size_t>(i);
          if (75 + t < bad) {
            REQUIRE(out[at] == clean[at]);
          } else {
            REQUIRE(std::isnan(out[at]));
          }
        }
      }
    }
  }
}

TEST_CASE("a workspace for the largest call serves the smaller ones") {
  for (const int group : {1, 3, 8, 40}) {
    std::size_t before = 0;
    for (const std::int64_t tokens : {0, 1, 2, 5, 16, 17, 100, 2000}) {
      std::size_t at_tokens = 0;
      for (const std::int64_t context : {2000, 2255, 5000, 8192, 8193, 100000}) {
        const PagedAttentionShape shape{tokens, context, 2 * group, 2, 64};
        const std::size_t bytes = prefillshare::workspace_bytes(shape, 3);
        CHECK(bytes >= at_tokens);
        CHECK(bytes % 64 == 0);
        at_tokens = bytes;
      }
      CHECK(at_tokens >= before);
      before = at_tokens;
    }
  }
  CHECK(prefillshare::workspace_bytes({0, 100, 8, 2, 64}, 4) == 0);
}

TEST_CASE("paged attention refuses wrong calls before it writes") {
  Rng rng(50);
  SerialExecutor executor;
  Problem problem(rng, 3, 20, 4, 2, 16, 8);
  std::vector<float> out(static_cast<std::size_t>(3 * problem.out_stride()), 42.0F);
  const std::vector<float> untouched = out;
  PagedAttentionArgs good = problem.args(out);
  Workspace workspace(prefillshare::workspace_bytes(prefillshare::shape_of(good), 1));
  good.workspace = workspace.span();
  const auto refused = [&](const PagedAttentionArgs& args) {
    return prefillshare::paged_attention(args, executor);
  };

  PagedAttentionArgs args = good;
  args.q.rows = 2;
  CHECK(refused(args).code() == StatusCode::kShapeMismatch);
  args = good;
  args.q.cols = args.out.cols = 60;
  CHECK(refused(args).message() == "paged_attention: q has 60 columns, expected 4 heads x 16");
  args = good;
  args.out.stride = 10;
  CHECK(refused(args).code() == StatusCode::kShapeMismatch);
  args = good;
  args.heads = 3;
  CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  args = good;
  args.heads = 0;
  CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  args = good;
  args.kv.kv_heads = 0;
  CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  for (const int head_dim : {0, 4, 12, 520}) {
    args = good;
    args.kv.head_dim = head_dim;
    CHECK(refused(args).code() == StatusCode::kUnsupported);
  }
  args = good;
  args.scale = std::numeric_limits<float>::infinity();
  CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  args = good;
  args.first_position = 22;
  CHECK(refused(args).message() == "paged_attention: 3 tokens at position 22, but 3 blocks of 8 hold 24");
  args.first_position = -1;
  CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  args.first_position = std::numeric_limits<std::int64_t>::max();
  CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  for (const BlockId wrong : {-1, 6, 1 << 30}) {
    std::vector<BlockId> blocks = problem.blocks;
    blocks[2] = wrong;
    args = good;
    args.blocks = blocks;
    CHECK(refused(args).code() == StatusCode::kInvalidArgument);
  }
  args = good;
  args.q.data = nullptr;
  CHECK(refused(args).message() == "paged_attention: q is null");
  args = good;
  args.kv.data = nullptr;
  CHECK(refused(args).code() == StatusCode::kNullPointer);
  args = good;
  args.q.data = out.data();
  CHECK(refused(args).message() == "paged_attention: out overlaps q");
  args = good;
  args.workspace = args.workspace.first(args.workspace.size() - 1);
  CHECK(refused(args).code() == StatusCode::kWorkspaceTooSmall);
  Workspace larger(good.workspace.size() + 64);
  args.workspace = larger.span().subspan(4);
  CHECK(refused(args).code() == StatusCode::kMisaligned);
  CHECK(out == untouched);

  args = good;
  args.q.rows = args.out.rows = 0;
  args.q.data = nullptr;
  args.out.data = nullptr;
  args.workspace = {};
  CHECK(refused(args).ok());
  CHECK(out == untouched);
  CHECK(refused(good).ok());
  CHECK(out != untouched);
}

TEST_CASE("append_kv writes the slots of its positions and no other") {
  Rng rng(51);
  auto storage = HostKvStorage::create({1, 2, 8, 4}, 5);
  REQUIRE(storage.ok());
  const auto view = storage->layer(0);
  std::fill_n(view.data, 5 * 2 * 4 * 16, kNaN);
  const std::vector<BlockId> blocks = {3, 0, 4};
  const std::vector<float> k = rng.normals(120), v = rng.normals(144);
  REQUIRE(prefillshare::append_kv(view, blocks, 3, {k.data(), 6, 16, 20}, {v.data(), 6, 16, 24}).ok());
  for (std::int64_t position = 0; position < 12; ++position) {
    const BlockId block = blocks[static_cast<std::size_t>(position / 4)];
    for (int i = 0; i < 16; ++i) {
      const float got_k = view.k(block, static_cast<int>(position % 4))[i];
      const float got_v = view.v(block, static_cast<int>(position % 4))[i];
      if (position < 3 || position >= 9) {
        CHECK((std::isnan(got_k) && std::isnan(got_v)));
      } else {
        CHECK(got_k == k[static_cast<std::size_t>((position - 3) * 20 + i)]);
        CHECK(got_v == v[static_cast<std::size_t>((position - 3) * 24 + i)]);
      }
    }
  }
  for (const BlockId other : {1, 2}) {
    for (int slot = 0; slot < 4; ++slot) CHECK(std::isnan(view.k(other, slot)[0]));
  }
  const MatrixView<const float> one(k.data(), 1, 16);
  CHECK(prefillshare::append_kv(view, blocks, 12, one, one).code() == StatusCode::kInvalidArgument);
  CHECK(prefillshare::append_kv(view, blocks, -1, one, one).code() == StatusCode::kInvalidArgument);
  CHECK(prefillshare::append_kv(view, std::vector<BlockId>{5}, 0, one, one).message() ==
        "append_kv: blocks[0] = 5 of 5");
  CHECK(prefillshare::append_kv(view, blocks, 0, {k.data(), 1, 8}, {k.data(), 1, 8}).code() ==
        StatusCode::kShapeMismatch);
  CHECK(prefillshare::append_kv(view, blocks, 0, {nullptr, 1, 16}, one).code() == StatusCode::kNullPointer);
  CHECK(prefillshare::append_kv(view, blocks, 12, {nullptr, 0, 16}, {nullptr, 0, 16}).ok());
}
