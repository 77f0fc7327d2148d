// SPDX-License-Identifier: Apache-2.0
//
// Eight threads on one ConcurrentKvAllocator. What each reads is what it wrote, or what another thread wrote
// for the same tokens of the same tenant; at the end every block is back.
#include <prefillshare/kv/allocator.hpp>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using prefillshare::BlockId;
using prefillshare::CacheKey;
using prefillshare::ConcurrentKvAllocator;
using prefillshare::HostKvStorage;
using prefillshare::Sequence;

namespace {

constexpr int kThreads = 8;
constexpr int kBlockTokens = 4;
constexpr std::int64_t kBlocks = 48;

float value_of(int tenant, std::span<const std::int32_t> tokens) {
  std::uint64_t h = static_cast<std::uint64_t>(tenant) + 1;
  for (const std::int32_t token : tokens)
    h = (h ^ static_cast<std::uint32_t>(token + 1)) * 0xD6E8FEB86659FD93ULL;
  return static_cast<float>((h >> 40) & 0xFFFFFU);
}

class Worker {
 public:
  Worker(ConcurrentKvAllocator& allocator, HostKvStorage& storage, int index)
      : allocator_(&allocator),
        storage_(&storage),
        tenant_(index % 2),
        rng_(static_cast<std::uint64_t>(index) + 1) {}

  /// The number of faults.
  std::int64_t run(std::int64_t turns) {
    for (std::int64_t turn = 0; turn < turns; ++turn) one_turn();
    return faults_;
  }

 private:
  float* k(const Sequence& sequence, std::int64_t position) {
    const BlockId block = sequence.blocks()[static_cast<std::size_t>(position / kBlockTokens)];
    return storage_->k(0, block, static_cast<int>(position % kBlockTokens));
  }
  void expect(bool good) { faults_ += good ? 0 : 1; }

  void one_turn() {
    const CacheKey key{"m", "1", std::string(static_cast<std::size_t>(tenant_), 's')};
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(1 + rng_.below(20)));
    for (auto& token : tokens) token = static_cast<std::int32_t>(rng_.below(10) == 0);
    const std::span<const std::int32_t> all(tokens);
    auto opened = allocator_->open(key, tokens, static_cast<prefillshare::TenantId>(tenant_));
    if (!opened.ok()) return expect(false);
    Sequence base = *std::move(opened);
    const auto missing = all.subspan(static_cast<std::size_t>(base.length()));
    if (!allocator_->reserve(base, std::ssize(missing)).ok()) return;  // back-pressure: the turn is given up
    for (std::int64_t p = base.length(); p < std::ssize(all); ++p) {
      *k(base, p) = value_of(tenant_, all.first(static_cast<std::size_t>(p + 1)));
    }
    if (rng_.below(8) == 0) return;  // aborted with its KV half written
    expect(allocator_->commit(base, missing).ok());
    std::array<Sequence, 3> forks;
    const bool admitted = allocator_->fork_all(base, forks, 6).ok();
    for (std::int64_t p = 0; p < base.length(); ++p) {
      expect(*k(base, p) == value_of(tenant_, all.first(static_cast<std::size_t>(p + 1))));
    }
    if (!admitted) {
      for (const Sequence& fork : forks) expect(!fork.is_open());
      return;
    }
    base.reset();  // the forks live on
    for (std::size_t i = 0; i < forks.size(); ++i) {
      for (int step = 0; step < 6; ++step) {
        expect(allocator_->append_private(forks[i], 1).ok());  // within its reservation: cannot fail
        *k(forks[i], forks[i].length() - 1) = static_cast<float>(100 * i + static_cast<std::size_t>(step));
      }
    }
    for (std::size_t i = 0; i < forks.size(); ++i) {
      for (int step = 0; step < 6; ++step) {
        expect(*k(forks[i], forks[i].base_length() + step) ==
               static_cast<float>(100 * i + static_cast<std::size_t>(step)));
      }
    }
  }

  ConcurrentKvAllocator* allocator_;
  HostKvStorage* storage_;
  int tenant_;
  codegemm::test::Rng rng_;
  std::int64_t faults_ = 0;
};

std::int64_t turns() {
  const char* text = std::getenv("PREFILLSHARE_KV_STEPS");
  return text != nullptr ? std::strtoll(text, nullptr, 10) / kThreads : 1500;
}

}  // namespace

TEST_CASE("eight threads share an allocator and every number is right") {
  HostKvStorage storage = *HostKvStorage::create({1, 1, 1, kBlockTokens}, kBlocks);
  auto allocator = *ConcurrentKvAllocator::create(storage);
  REQUIRE(allocator->add_tenant("second", {kBlocks / 2}).ok());
  std::array<std::int64_t, kThreads> faults{};
  std::atomic<bool> done{false};
  std::int64_t bad_stats = 0;
  std::thread watcher([&] {  // a router's or an operator's view, at any time
    while (!done) {
      const auto stats = allocator->stats();
      if (stats.total_blocks != stats.free_blocks + stats.cached_blocks + stats.in_use_blocks) ++bad_stats;
      if (allocator->tenant_stats(1)->in_use_blocks > kBlocks / 2) ++bad_stats;
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back(
        [&, i] { faults[static_cast<std::size_t>(i)] = Worker(*allocator, storage, i).run(turns()); });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  watcher.join();
  CHECK(faults == std::array<std::int64_t, kThreads>{});
  CHECK(bad_stats == 0);
  const auto status = allocator->check_invariants();
  INFO(status.message());
  CHECK(status.ok());
  CHECK(allocator->stats().in_use_blocks == 0);
  CHECK(allocator->stats().hit_tokens > 0);
  CHECK(allocator->stats().evicted_blocks > 0);
}
