// SPDX-License-Identifier: Apache-2.0
//
// Memory that the calls ask for themselves: products and attention none, the KV allocator only such as may be
// refused, at any of its calls, without a block being lost.
#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/thread_pool.hpp>
#include <codegemm/dense.hpp>
#include <codegemm/gemm.hpp>
#include <prefillshare/attention/paged.hpp>
#include <prefillshare/attention/shared.hpp>
#include <prefillshare/kv/agent_eviction.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/host_copy_engine.hpp>
#include <prefillshare/kv/page_table.hpp>
#include <support/catch.hpp>
#include <support/counted_new.hpp>
#include <support/quantized.hpp>
#include <support/random.hpp>

using codegemm::AlignedBuffer;
using codegemm::MatrixView;
using codegemm::Status;
using codegemm::StatusCode;
using codegemm::test::NewCalls;
using codegemm::test::Rng;
using prefillshare::BlockId;
using prefillshare::HostKvStorage;
using prefillshare::Sequence;
using Tokens = std::vector<std::int32_t>;

namespace {

// How often `call` asks for memory. A pool's threads may begin with a call before.
template <class Call>
std::int64_t allocations(Call&& call) {
  REQUIRE(call().ok());
  NewCalls::reset();
  const Status status = call();
  const std::int64_t count = NewCalls::count();
  REQUIRE(status.ok());
  return count;
}

}  // namespace

TEST_CASE("operator new is counted and refused here") {
  NewCalls::refuse_between(2, 2);
  ::operator delete(::operator new(8));  // called by name, they are not left out
  bool refused = false;
  try {
    ::operator delete(::operator new(100));
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  const std::int64_t count = NewCalls::count();
  NewCalls::reset();
  CHECK(refused);
  CHECK(count == 2);
}

TEST_CASE("products on the CPU allocate nothing") {
  codegemm::SerialExecutor serial;
  codegemm::ThreadPool pool(3);
  Rng rng(codegemm::test::seed_or(1));
  for (const codegemm::Format f :
       {codegemm::Format{4, 1, 8, 128}, codegemm::Format{8, 2, 8, 128}, codegemm::Format{4, 2, 4, 128},
        codegemm::Format{2, 3, 6, -1}, codegemm::Format{16, 1, 5, 32}}) {
    const auto packed = codegemm::pack(codegemm::test::random_matrix(f, 176, 1024, rng).view());
    REQUIRE(packed.ok());
    for (const std::int64_t tokens : {1, 2, 5, 8, 9, 16, 64, 300, 512}) {
      const std::vector<float> x = rng.normals(tokens * 1024);
      std::vector<float> y(static_cast<std::size_t>(tokens * 176));
      for (codegemm::Executor* executor :
           {static_cast<codegemm::Executor*>(&serial), static_cast<codegemm::Executor*>(&pool)}) {
        CAPTURE(codegemm::format_name(f), tokens, executor->workers());
        AlignedBuffer<std::byte> workspace;
        REQUIRE(workspace.reserve(codegemm::workspace_bytes(*packed, tokens, executor->workers())));
        CHECK(allocations([&] {
                return codegemm::gemm(*packed, MatrixView<const float>(x.data(), tokens, 1024),
                                      MatrixView<float>(y.data(), tokens, 176), workspace.span(), *executor);
              }) == 0);
      }
    }
  }
  const std::vector<float> w = rng.normals(std::int64_t{176} * 256);
  const std::vector<float> x = rng.normals(std::int64_t{20} * 256);
  std::vector<float> y(std::size_t{20} * 176);
  AlignedBuffer<std::byte> workspace;
  REQUIRE(workspace.reserve(codegemm::dense_workspace_bytes(176, 256, 20, pool.workers())));
  CHECK(allocations([&] {
          return codegemm::dense_gemm(MatrixView<const float>(w.data(), 176, 256),
                                      MatrixView<const float>(x.data(), 20, 256),
                                      MatrixView<float>(y.data(), 20, 176), workspace.span(), pool);
        }) == 0);
}

TEST_CASE("attention on the CPU allocates nothing") {
  constexpr int kHeads = 8, kKvHeads = 2, kDim = 64, kBlockTokens = 16;
  constexpr std::int64_t kContext = 1500, kRow = std::int64_t{kHeads} * kDim,
                         kKvRow = std::int64_t{kKvHeads} * kDim;
  codegemm::ThreadPool pool(2);
  Rng rng(codegemm::test::seed_or(2));
  HostKvStorage storage = *HostKvStorage::create({1, kKvHeads, kDim, kBlockTokens}, 100);
  std::vector<BlockId> blocks(94);
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<BlockId>(i);
  const std::vector<float> kv = rng.normals(kContext * kKvRow);
  const MatrixView<const float> rows(kv.data(), kContext, kKvRow);
  CHECK(allocations([&] { return prefillshare::append_kv(storage.layer(0), blocks, 0, rows, rows); }) == 0);
  for (const std::int64_t tokens : {1, 3, 100}) {
    CAPTURE(tokens);
    const std::vector<float> q = rng.normals(tokens * kRow);
    std::vector<float> out(q.size());
    prefillshare::PagedAttentionArgs args;
    args.kv = storage.layer(0);
    args.blocks = blocks;
    args.first_position = kContext - tokens;
    args.q = {q.data(), tokens, kRow};
    args.out = {out.data(), tokens, kRow};
    args.heads = kHeads;
    AlignedBuffer<std::byte> workspace;
    REQUIRE(workspace.reserve(prefillshare::workspace_bytes(shape_of(args), pool.workers())));
    args.workspace = workspace.span();
    CHECK(allocations([&] { return prefillshare::paged_attention(args, pool); }) == 0);
  }
  const std::vector<prefillshare::DecodeSequence> sequences(5, {blocks, kContext});
  const std::vector<float> q = rng.normals(5 * kRow);
  std::vector<float> out(q.size());
  prefillshare::SharedDecodeArgs args;
  args.kv = storage.layer(0);
  args.sequences = sequences;
  args.shared_tokens = 1200;
  args.q = {q.data(), 5, kRow};
  args.out = {out.data(), 5, kRow};
  args.heads = kHeads;
  AlignedBuffer<std::byte> workspace;
  REQUIRE(workspace.reserve(prefillshare::decode_workspace_bytes(args, pool.workers())));
  args.workspace = workspace.span();
  CHECK(allocations([&] { return prefillshare::shared_decode(args, pool); }) == 0);
}

namespace {

using Allocator =
    prefillshare::BasicKvAllocator<HostKvStorage, prefillshare::ChainHash, prefillshare::AgentEviction>;

// Everything that a caller can do, once, whatever fails. No call may throw, end otherwise than well or for
// want of memory or blocks, or leave the allocator inconsistent.
class Story {
 public:
  explicit Story(HostKvStorage& storage) : storage_(&storage) {}

  /// The kinds of answers so far.
  [[nodiscard]] const std::set<StatusCode>& codes() const { return codes_; }

  void run() {
    prefillshare::EventLog events;
    if (!good(events.resize(256), true)) return;
    auto engine = prefillshare::HostCopyEngine<HostKvStorage>::create(*storage_, tiers_);
    if (!good(engine.status(), true)) return;
    auto made = Allocator::create(*storage_, {}, {}, {&events, engine->get()});
    if (!good(made.status(), true)) return;
    allocator_ = made->get();
    prefillshare::TenantId tenant = prefillshare::kDefaultTenant;
    if (auto added = allocator_->add_tenant(std::move(name_), {14}); good(added.status())) tenant = *added;
    for (int turn = 0; turn < 3; ++turn) {
      const Tokens& tokens = texts_[static_cast<std::size_t>(turn)];
      auto opened = allocator_->open(keys_[static_cast<std::size_t>(turn % 2)], tokens, tenant);
      if (!good(opened.status())) continue;
      Sequence base = *std::move(opened);
      const auto rest = [&] {
        return std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(base.length()));
      };
      if (auto begun = allocator_->start_load(base, rest()); good(begun.status()) && *begun > 0) {
        work(**engine);
        good(allocator_->finish_load(base).status());
      }
      if (base.loading() > 0) continue;  // closed with its copies under way
      if (!good(allocator_->reserve(base, std::ssize(rest())))) {
        work(**engine);
        if (!good(allocator_->reserve(base, std::ssize(rest())))) continue;
      }
      good(allocator_->commit(base, rest()));
      good(allocator_->offload(base).status());
      if (auto fork = allocator_->fork(base); good(fork.status())) {
        good(allocator_->append_private(*fork, 5));
        good(allocator_->fork(*fork).status());
        good(allocator_->truncate(*fork, fork->base_length()));
      }
      std::array<Sequence, 2> forks;
      good(allocator_->fork_all(base, forks, 3));
      const Sequence* const both[] = {&base, &forks[0]};
      prefillshare::PageTable table;
      good(prefillshare::export_page_table(std::span(both, forks[0].is_open() ? 2 : 1), table));
      good(allocator_->retain(base, 0, base.length(), {}));
      good(allocator_->truncate(base, base.length() / 2));
      good(allocator_->extend(base, more_).status());
      good(allocator_->release_reserved(base));
      std::vector<prefillshare::KvEvent> all;
      good(allocator_->snapshot(all).status());
      work(**engine);
    }
    work(**engine);
    {
      const NewCalls::Pause pause;
      CHECK(allocator_->stats().in_use_blocks == 0);
      CHECK(allocator_->stats().sequences == 0);
      const auto held = allocator_->tenant_stats(tenant);
      REQUIRE(held.ok());
      CHECK(held->in_use_blocks == 0);
    }
    allocator_ = nullptr;
  }

 private:
  bool good(const Status& status, bool creating = false) {
    const NewCalls::Pause pause;
    codes_.insert(status.code());
    INFO(status.message());
    const bool known = status.ok() || status.code() == StatusCode::kOutOfMemory ||
                       (!creating && status.code() == StatusCode::kExhausted);
    REQUIRE(known);
    if (allocator_ != nullptr) {
      const Status sound = allocator_->check_invariants();
      INFO(sound.message());
      REQUIRE(sound.ok());
    }
    return status.ok();
  }
  void work(prefillshare::HostCopyEngine<HostKvStorage>& engine) {
    for (int i = 0; i < 4; ++i) {
      while (engine.work_one()) {
      }
      allocator_->poll();
    }
  }

  HostKvStorage* storage_;
  Allocator* allocator_ = nullptr;
  std::set<StatusCode> codes_;
  const prefillshare::HostTiers tiers_{6, 8, std::filesystem::temp_directory_path().string(), 8};
  std::string name_ = "a tenant whose name is too long to lie within the string itself";
  const std::array<prefillshare::CacheKey, 2> keys_ = {
      prefillshare::CacheKey{"a model whose name is too long to lie in the string itself", "1", "salt"},
      prefillshare::CacheKey{"m", "1", ""}};
  const std::array<Tokens, 3> texts_ = {Tokens(22, 1), Tokens(30, 2), Tokens(25, 1)};
  const Tokens more_ = Tokens(9, 1);
};

}  // namespace

TEST_CASE("memory that is refused at any call of the allocator costs an answer and no block") {
  HostKvStorage storage = *HostKvStorage::create({1, 1, 1, 4}, 16);
  std::int64_t out_of_memory = 0;  // where the text of another answer was refused, that is not among them
  const auto tell = [&](std::int64_t first, std::int64_t last) {
    Story story(storage);
    NewCalls::refuse_between(first, last);
    story.run();
    const std::int64_t count = NewCalls::count();
    NewCalls::reset();
    out_of_memory += story.codes().contains(StatusCode::kOutOfMemory) ? 1 : 0;
    return count;
  };
  const std::int64_t all = tell(NewCalls::kNever, NewCalls::kNever);
  CHECK(all > 50);
  CHECK(out_of_memory == 0);
  for (std::int64_t first = 1; first <= all; ++first) {
    CAPTURE(first);
    tell(first, first);
    tell(first, first + 2);
    tell(first, NewCalls::kNever);
  }
  CHECK(out_of_memory > 2 * all);
}
