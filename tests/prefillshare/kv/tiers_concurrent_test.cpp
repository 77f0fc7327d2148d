// SPDX-License-Identifier: Apache-2.0
//
// The allocator with tiers below the device. The engine here does its copies whenever the test says, in any
// order, or fails them, and fills the target with rubbish when a copy begins: a block that is read before its
// copy is done, or given to somebody else meanwhile, shows as a wrong number.
#include <prefillshare/kv/allocator.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <prefillshare/kv/agent_eviction.hpp>
#include <prefillshare/kv/host_copy_engine.hpp>
#include <prefillshare/kv/priority_eviction.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::Status;
using codegemm::StatusCode;
using prefillshare::AgentEviction;
using prefillshare::BasicKvAllocator;
using prefillshare::BlockId;
using prefillshare::BlockPlace;
using prefillshare::CacheKey;
using prefillshare::ChainHash;
using prefillshare::CopyResult;
using prefillshare::HostKvStorage;
using prefillshare::LruEviction;
using prefillshare::PriorityEviction;
using prefillshare::Sequence;
using Tokens = std::vector<std::int32_t>;

namespace {

constexpr int kBlockTokens = 3;

class ManualEngine final : public prefillshare::CopyEngine {
 public:
  ManualEngine(HostKvStorage& storage, std::vector<std::int64_t> slots, std::int64_t queue)
      : storage_(&storage), slots_(std::move(slots)), queue_(queue) {
    for (const std::int64_t count : slots_) {
      memory_.emplace_back(static_cast<std::size_t>(count * storage.bytes_per_block()));
    }
  }
  [[nodiscard]] int tiers() const noexcept override { return static_cast<int>(slots_.size()); }
  [[nodiscard]] std::int64_t slots(int tier) const noexcept override {
    return slots_[static_cast<std::size_t>(tier - 1)];
  }
  [[nodiscard]] std::int64_t queue_size() const noexcept override { return queue_; }
  [[nodiscard]] Status start(BlockPlace from, BlockPlace to, std::uint64_t ticket) override {
    if (refuse) return codegemm::error(StatusCode::kIoError, "refused");
    REQUIRE(static_cast<std::int64_t>(jobs.size()) < queue_);
    REQUIRE(from.tier != to.tier);
    for (const Job& job : jobs) {  // nobody else reads or writes the target
      REQUIRE_FALSE(job.to == to);
      REQUIRE_FALSE(job.from == to);
      REQUIRE_FALSE(job.to == from);
    }
    jobs.push_back({from, to, ticket, bytes_of(from)});
    put(to, std::vector<std::byte>(jobs.back().seen.size(), std::byte{0x7F}));
    return {};
  }
  [[nodiscard]] bool poll(CopyResult& result) override {
    if (ended.empty()) return false;
    result = ended.back();
    ended.pop_back();
    return true;
  }
  /// The source is what it was when the copy began: nobody wrote to it meanwhile.
  void finish(std::size_t index, bool ok) {
    const Job job = jobs[index];
    jobs.erase(jobs.begin() + static_cast<std::ptrdiff_t>(index));
    REQUIRE(bytes_of(job.from) == job.seen);
    if (ok) put(job.to, job.seen);
    ended.push_back({job.ticket, ok ? Status() : codegemm::error(StatusCode::kIoError, "failed")});
  }
  void finish_all() {
    while (!jobs.empty()) finish(0, true);
  }

  struct Job {
    BlockPlace from;
    BlockPlace to;
    std::uint64_t ticket;
    std::vector<std::byte> seen;
  };
  std::vector<Job> jobs;
  std::vector<CopyResult> ended;
  bool refuse = false;

 private:
  [[nodiscard]] std::vector<std::byte> bytes_of(BlockPlace place) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(storage_->bytes_per_block()));
    if (place.tier == 0) {
      REQUIRE(storage_->read_block(place.slot, bytes).ok());
      return bytes;
    }
    const auto at = static_cast<std::ptrdiff_t>(bytes.size()) * place.slot;
    const auto& memory = memory_[static_cast<std::size_t>(place.tier - 1)];
    std::copy_n(memory.begin() + at, bytes.size(), bytes.begin());
    return bytes;
  }
  void put(BlockPlace place, const std::vector<std::byte>& bytes) {
    if (place.tier == 0) {
      REQUIRE(storage_->write_block(place.slot, bytes).ok());
      return;
    }
    std::copy(bytes.begin(), bytes.end(),
              memory_[static_cast<std::size_t>(place.tier - 1)].begin() +
                  static_cast<std::ptrdiff_t>(bytes.size()) * place.slot);
  }
  HostKvStorage* storage_;
  std::vector<std::int64_t> slots_;
  std::int64_t queue_;
  std::vector<std::vector<std::byte>> memory_;
};

/// What the base writes for the last of these tokens: a function of the producer and the whole prefix.
float value_of(const CacheKey& key, std::span<const std::int32_t> tokens) {
  std::uint64_t h = key.tenant_salt.size() + 1;
  for (const std::int32_t token : tokens)
    h = (h ^ static_cast<std::uint32_t>(token + 1)) * 0xD6E8FEB86659FD93ULL;
  return static_cast<float>((h >> 40) & 0xFFFFFU);
}

template <class Allocator>
void write(Allocator& allocator, HostKvStorage& storage, const Sequence& sequence, std::int64_t position,
           float value) {
  REQUIRE(allocator.writable(sequence, position));
  const BlockId block = sequence.blocks()[static_cast<std::size_t>(position / kBlockTokens)];
  *storage.k(0, block, static_cast<int>(position % kBlockTokens)) = value;
  *storage.v(0, block, static_cast<int>(position % kBlockTokens)) = -value;
}
bool reads(const HostKvStorage& storage, const Sequence& sequence, std::int64_t position, float value) {
  const BlockId block = sequence.blocks()[static_cast<std::size_t>(position / kBlockTokens)];
  return *storage.k(0, block, static_cast<int>(position % kBlockTokens)) == value &&
         *storage.v(0, block, static_cast<int>(position % kBlockTokens)) == -value;
}

/// Random steps of sessions, forks, loads, offloads, hints and copies that end, fail or are refused.
template <class Eviction, class Hash>
class TierTrial {
 public:
  using Allocator = BasicKvAllocator<HostKvStorage, Hash, Eviction>;

  TierTrial(std::uint64_t seed, std::int64_t blocks, std::vector<std::int64_t> slots, std::int64_t queue)
      : rng_(seed),
        storage_(*HostKvStorage::create({1, 1, 1, kBlockTokens}, blocks)),
        engine_(storage_, std::move(slots), queue) {
    REQUIRE(events_.resize(1 << 16).ok());
    allocator_ = *Allocator::create(storage_, {}, {}, {&events_, &engine_});
  }

  void run(std::int64_t steps) {
    for (std::int64_t step = 0; step < steps; ++step) {
      CAPTURE(step);
      engine_.refuse = rng_.below(12) == 0;
      switch (rng_.below(18)) {
        case 0:
        case 1:
        case 2: open(); break;
        case 3:
        case 16:
        case 17: close(); break;
        case 4:
        case 5: prefill(); break;
        case 6:
        case 7: load(pick()); break;
        case 8: finish_load(); break;
        case 9: fork(); break;
        case 10: offload(); break;
        case 11: hint(); break;
        case 12:
        case 13:
        case 14: finish_copy(); break;
        case 15: allocator_->poll(); break;
      }
      check(step % 8 == 0);
    }
    engine_.refuse = false;
    while (!live_.empty()) close();
    for (int i = 0; i < 100; ++i) {
      engine_.finish_all();
      allocator_->poll();
    }
    check(true);
    const auto stats = allocator_->stats();
    CHECK(stats.in_use_blocks == 0);
    CHECK(stats.moving_blocks == 0);
    CHECK(allocator_->copies_under_way() == 0);
    // Each kind of event has really happened.
    CHECK(stats.offloaded_blocks > 100);
    CHECK(stats.failed_copies > 50);
    CHECK(stats.refused_copies > 5);
    CHECK(stats.loaded_tokens > 100);
    CHECK(stats.evicted_blocks > 100);
    CHECK(waited_ > 20);
    CHECK(closed_while_loading_ > 5);
  }

 private:
  struct Live {
    Sequence sequence;
    CacheKey key;
    Tokens tokens;    // what length() covers
    Tokens intended;  // what it is to become
    std::vector<float> content;
    bool loading = false;
  };

  Tokens some_tokens(std::int64_t count) {
    Tokens tokens(static_cast<std::size_t>(count));
    for (std::int32_t& token : tokens) token = rng_.below(8) == 0 ? 1 : 0;
    return tokens;
  }
  Live* pick() {
    return live_.empty() ? nullptr : &live_[static_cast<std::size_t>(rng_.below(std::ssize(live_)))];
  }
  void cover(Live& live) {
    while (std::ssize(live.content) < live.sequence.length()) {
      live.tokens.push_back(live.intended[live.tokens.size()]);
      live.content.push_back(value_of(live.key, live.tokens));
    }
  }
  void open() {
    if (live_.size() >= 4) return close();
    Live live;
    live.key = {"m", "1", std::string(static_cast<std::size_t>(rng_.below(2)), 's')};
    live.intended = some_tokens(rng_.below(std::int64_t{5} * kBlockTokens));
    live.sequence = *allocator_->open(live.key, live.intended);
    cover(live);
    live_.push_back(std::move(live));
    if (rng_.below(4) != 0) load(&live_.back());
  }
  void close() {
    if (live_.empty()) return;
    std::swap(live_[static_cast<std::size_t>(rng_.below(std::ssize(live_)))], live_.back());
    closed_while_loading_ += live_.back().loading ? 1 : 0;
    live_.pop_back();
  }
  void prefill() {
    Live* live = pick();
    if (live == nullptr || live->sequence.is_fork()) return;
    if (live->loading) {
      REQUIRE(allocator_->reserve(live->sequence, 1).code() == StatusCode::kInvalidArgument);
      return;
    }
    if (live->intended.size() == live->tokens.size()) {
      const Tokens more = some_tokens(rng_.below(4));
      live->intended.insert(live->intended.end(), more.begin(), more.end());
    }
    const Tokens missing(live->intended.begin() + live->sequence.length(), live->intended.end());
    const Status status = allocator_->reserve(live->sequence, std::ssize(missing));
    if (!status.ok()) {
      REQUIRE(status.code() == StatusCode::kExhausted);
      waited_ += status.message().find("poll()") != std::string::npos ? 1 : 0;
      return;
    }
    Tokens all = live->tokens;
    for (const std::int32_t token : missing) {
      all.push_back(token);
      write(*allocator_, storage_, live->sequence, std::ssize(all) - 1, value_of(live->key, all));
    }
    REQUIRE(allocator_->commit(live->sequence, missing).ok());
    cover(*live);
  }
  void load(Live* live) {
    if (live == nullptr || live->sequence.is_fork() || live->loading) return;
    const Tokens missing(live->intended.begin() + live->sequence.length(), live->intended.end());
    std::array<std::int64_t, 4> before{};
    allocator_->lookup(live->key, live->intended, before);
    const auto begun = allocator_->start_load(live->sequence, missing);
    if (!begun.ok()) {
      REQUIRE((begun.status().code() == StatusCode::kExhausted || engine_.refuse));
      return;
    }
    if (*begun > 0) {  // what is on the device already is not loaded, and no more than the tiers had
      REQUIRE(live->sequence.length() + *begun <= before[0] + before[1] + before[2] + before[3] + *begun);
    }
    live->loading = *begun > 0;
    REQUIRE(live->sequence.loading() == *begun);
  }
  void finish_load() {
    Live* live = pick();
    if (live == nullptr || !live->loading) return;
    const std::int64_t expected = live->sequence.loading();
    allocator_->poll();
    const auto loaded = allocator_->finish_load(live->sequence);
    if (!loaded.ok()) {
      REQUIRE(loaded.status().code() == StatusCode::kExhausted);
      return;
    }
    REQUIRE(*loaded <= expected);
    REQUIRE(live->sequence.loading() == 0);
    live->loading = false;
    cover(*live);
  }
  void fork() {
    Live* parent = pick();
    if (parent == nullptr || live_.size() >= 5) return;
    auto forked = allocator_->fork(parent->sequence);
    if (parent->loading) {
      REQUIRE(forked.status().code() == StatusCode::kInvalidArgument);
      return;
    }
    REQUIRE(forked.ok());
    Live live{*std::move(forked), parent->key, parent->tokens, parent->tokens, parent->content, false};
    const Status status = allocator_->append_private(live.sequence, 1);
    if (status.ok()) {
      live.content.push_back(static_cast<float>(++private_values_) + 0.5F);
      write(*allocator_, storage_, live.sequence, live.sequence.length() - 1, live.content.back());
    } else {
      REQUIRE(status.code() == StatusCode::kExhausted);
    }
    live_.push_back(std::move(live));
  }
  void offload() {
    Live* live = pick();
    if (live == nullptr || live->sequence.is_fork() || live->loading) return;
    REQUIRE(allocator_->offload(live->sequence).ok());
  }
  void hint() {
    if constexpr (prefillshare::HintedEviction<Eviction>) {
      allocator_->set_time(++now_);
      Live* live = pick();
      if (live == nullptr || live->sequence.is_fork() || live->loading) return;
      prefillshare::Retention retention;
      retention.priority = static_cast<int>(rng_.below(101));
      if (rng_.below(2) == 0) retention.expires = now_ + rng_.below(8);
      if (rng_.below(2) == 0) retention.next_use = now_ + rng_.below(8);
      retention.pinned = retention.expires != prefillshare::kKvNever && rng_.below(2) == 0;
      REQUIRE(allocator_->retain(live->sequence, 0, rng_.below(live->sequence.length() + 1), retention).ok());
    }
  }
  void finish_copy() {
    if (engine_.jobs.empty()) return;
    engine_.finish(static_cast<std::size_t>(rng_.below(std::ssize(engine_.jobs))), rng_.below(6) != 0);
  }

  void check(bool whole) {
    const Status status = allocator_->check_invariants();
    INFO(status.message());
    REQUIRE(status.ok());
    for (const Live& live : live_) {
      REQUIRE(live.sequence.length() == std::ssize(live.content));
      bool holds = true;
      for (std::int64_t p = 0; p < live.sequence.length(); ++p) {
        holds = holds && reads(storage_, live.sequence, p, live.content[static_cast<std::size_t>(p)]);
      }
      REQUIRE(holds);
    }
    if (whole) check_events();
  }
  /// Who has followed the events from the start knows what is cached.
  void check_events() {
    std::array<prefillshare::KvEvent, 64> batch;
    for (;;) {
      const auto got = events_.read(next_event_, batch);
      REQUIRE(got.lost == 0);
      if (got.count == 0) break;
      for (std::int64_t i = 0; i < got.count; ++i) {
        const auto& event = batch[static_cast<std::size_t>(i)];
        REQUIRE(event.number == next_event_ + static_cast<std::uint64_t>(i));
        const Entry entry{event.tier, event.parent, event.hash};
        if (event.kind == prefillshare::KvEvent::Kind::kStored) {
          known_.insert(entry);
        } else {
          const auto found = known_.find(entry);
          REQUIRE(found != known_.end());
          known_.erase(found);
        }
      }
      next_event_ = got.next;
    }
    std::vector<prefillshare::KvEvent> all;
    REQUIRE(*allocator_->snapshot(all) == next_event_);
    std::multiset<Entry> there;
    for (const auto& event : all) there.insert({event.tier, event.parent, event.hash});
    REQUIRE(there == known_);
  }

  using Entry = std::tuple<int, std::uint64_t, std::uint64_t>;
  codegemm::test::Rng rng_;
  HostKvStorage storage_;
  ManualEngine engine_;
  prefillshare::EventLog events_;
  std::unique_ptr<Allocator> allocator_;
  std::vector<Live> live_;
  std::multiset<Entry> known_;
  std::uint64_t next_event_ = 0;
  std::int64_t now_ = 0, private_values_ = 0, waited_ = 0, closed_while_loading_ = 0;
};

struct OneBucketHash {
  std::uint64_t operator()(std::uint64_t, std::span<const std::int32_t>) const { return 3; }
  std::uint64_t operator()(const CacheKey&) const { return 3; }
};

std::int64_t steps_or(std::int64_t written) {
  const char* text = std::getenv("PREFILLSHARE_KV_STEPS");
  return text != nullptr ? std::strtoll(text, nullptr, 10) : written;
}

}  // namespace

TEST_CASE("random steps with tiers: what is read back is what was written, whatever fails") {
  const std::uint64_t seed = codegemm::test::seed_or(1);
  CAPTURE(seed);
  SECTION("LRU, two tiers") { TierTrial<LruEviction, ChainHash>(seed, 8, {6, 8}, 5).run(steps_or(60000)); }
  SECTION("LRU, one tier that is larger, copies rarely refused") {
    TierTrial<LruEviction, ChainHash>(seed + 1, 9, {14}, 3).run(steps_or(60000));
  }
  SECTION("priorities, three tiers") {
    TierTrial<PriorityEviction, ChainHash>(seed + 2, 8, {3, 4, 5}, 4).run(steps_or(60000));
  }
  SECTION("pins and next uses") {
    TierTrial<AgentEviction, ChainHash>(seed + 3, 10, {4, 6}, 4).run(steps_or(60000));
  }
  SECTION("every hash collides") {
    TierTrial<LruEviction, OneBucketHash>(seed + 4, 8, {6, 8}, 5).run(steps_or(40000));
  }
}

TEST_CASE("a session that was evicted comes back from memory and from the file") {
  HostKvStorage storage = *HostKvStorage::create({1, 1, 1, kBlockTokens}, 4);
  auto engine = prefillshare::HostCopyEngine<HostKvStorage>::create(
      storage, {2, 8, std::filesystem::temp_directory_path().string(), 8});
  REQUIRE(engine.ok());
  auto allocator = *prefillshare::KvAllocator::create(storage, {}, {}, {nullptr, engine->get()});
  const CacheKey key{"m", "1", ""};
  const auto settle = [&] {
    for (int i = 0; i < 8; ++i) {
      while ((*engine)->work_one()) {
      }
      allocator->poll();
    }
  };
  const auto fill = [&](const Tokens& tokens) {
    Sequence sequence = *allocator->open(key, tokens);
    Status status;
    for (int i = 0; i < 4 && !(status = allocator->reserve(sequence, std::ssize(tokens))).ok(); ++i) settle();
    REQUIRE(status.ok());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      write(*allocator, storage, sequence, static_cast<std::int64_t>(i),
            value_of(key, std::span(tokens).first(i + 1)));
    }
    REQUIRE(allocator->commit(sequence, tokens).ok());
  };
  const Tokens first(12, 1);
  const Tokens second(12, 2);
  fill(first);
  fill(second);  // evicts all four blocks of the first
  settle();
  std::array<std::int64_t, 3> where{};
  allocator->lookup(key, first, where);
  CHECK(where[0] == 0);
  CHECK(where[1] + where[2] == 12);
  CHECK(where[2] >= 6);  // memory holds two blocks only

  Sequence again = *allocator->open(key, first);
  CHECK(again.length() == 0);
  auto begun = allocator->start_load(again, first);
  for (int i = 0; i < 4 && !begun.ok(); ++i) {  // the second session's blocks leave first
    REQUIRE(begun.status().code() == StatusCode::kExhausted);
    settle();
    begun = allocator->start_load(again, first);
  }
  REQUIRE(begun.ok());
  CHECK(*begun > 0);
  CHECK(allocator->finish_load(again).status().code() == StatusCode::kExhausted);
  settle();
  REQUIRE(*allocator->finish_load(again) == *begun);
  for (std::int64_t p = 0; p < again.length(); ++p) {
    CHECK(reads(storage, again, p, value_of(key, std::span(first).first(static_cast<std::size_t>(p + 1)))));
  }
  CHECK(allocator->check_invariants().ok());
}

TEST_CASE("an offloaded session costs no wait when it is evicted") {
  HostKvStorage storage = *HostKvStorage::create({1, 1, 1, kBlockTokens}, 2);
  ManualEngine engine(storage, {4}, 4);
  auto allocator = *prefillshare::KvAllocator::create(storage, {}, {}, {nullptr, &engine});
  const auto fill = [&](std::int32_t token) {
    Sequence sequence = *allocator->open({"m", "1", ""}, {});
    const Status status = allocator->reserve(sequence, 6);
    if (status.ok()) REQUIRE(allocator->commit(sequence, Tokens(6, token)).ok());
    if (status.ok() && token == 1) REQUIRE(*allocator->offload(sequence) == 2);
    return status.code();
  };
  CHECK(fill(1) == StatusCode::kOk);
  CHECK(fill(2) == StatusCode::kExhausted);  // both blocks are being read
  CHECK(allocator->stats().moving_blocks == 2);
  engine.finish_all();
  allocator->poll();
  CHECK(allocator->stats().free_blocks == 2);
  CHECK(fill(2) == StatusCode::kOk);
  CHECK(fill(3) == StatusCode::kExhausted);                             // 2 has no copy yet
  CHECK(allocator->open({"m", "1", ""}, Tokens(6, 2))->length() == 6);  // but can be had while it leaves
  engine.finish_all();
  allocator->poll();
  CHECK(fill(3) == StatusCode::kOk);
}

TEST_CASE("two tenants on threads of their own, copies on a third, and every number right") {
  HostKvStorage storage = *HostKvStorage::create({1, 1, 1, kBlockTokens}, 24);
  auto engine = prefillshare::HostCopyEngine<HostKvStorage>::create(
      storage, {16, 32, std::filesystem::temp_directory_path().string(), 16});
  REQUIRE(engine.ok());
  auto allocator = *prefillshare::ConcurrentKvAllocator::create(storage, {}, {}, {nullptr, engine->get()});
  std::thread copier([&] { (*engine)->work(); });
  std::array<int, 2> faults{};
  const auto session = [&](int tenant) {
    codegemm::test::Rng rng(static_cast<std::uint64_t>(tenant) + 1);
    const CacheKey key{"m", "1", std::string(static_cast<std::size_t>(tenant), 's')};
    // The copies' thread may be late: go on until this one has seen copies come back.
    for (int turn = 0, loads = 0; turn < 1500 || (loads < 10 && turn < 3'000'000); ++turn) {
      Tokens tokens(static_cast<std::size_t>(3 + rng.below(12)));
      for (auto& token : tokens) token = static_cast<std::int32_t>(rng.below(8) == 0);
      Sequence sequence = *allocator->open(key, tokens);
      const auto rest =
          std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(sequence.length()));
      if (auto begun = allocator->start_load(sequence, rest); begun.ok() && *begun > 0) {
        while (!allocator->finish_load(sequence).ok()) {
          allocator->poll();
          std::this_thread::yield();
        }
        ++loads;
      }
      const auto missing =
          std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(sequence.length()));
      if (!allocator->reserve(sequence, std::ssize(missing)).ok()) {
        allocator->poll();
        std::this_thread::yield();
        continue;
      }
      for (std::int64_t p = sequence.length(); p < std::ssize(tokens); ++p) {
        const BlockId block = sequence.blocks()[static_cast<std::size_t>(p / kBlockTokens)];
        *storage.k(0, block, static_cast<int>(p % kBlockTokens)) =
            value_of(key, std::span(tokens).first(static_cast<std::size_t>(p + 1)));
        *storage.v(0, block, static_cast<int>(p % kBlockTokens)) =
            -value_of(key, std::span(tokens).first(static_cast<std::size_t>(p + 1)));
      }
      if (!allocator->commit(sequence, missing).ok()) ++faults[static_cast<std::size_t>(tenant)];
      for (std::int64_t p = 0; p < sequence.length(); ++p) {
        const float value = value_of(key, std::span(tokens).first(static_cast<std::size_t>(p + 1)));
        if (!reads(storage, sequence, p, value)) ++faults[static_cast<std::size_t>(tenant)];
      }
    }
  };
  std::thread other([&] { session(1); });
  session(0);
  other.join();
  (*engine)->stop();
  copier.join();
  while ((*engine)->work_one()) {
  }
  allocator->poll();
  CHECK(faults == std::array<int, 2>{});
  const Status status = allocator->check_invariants();
  INFO(status.message());
  CHECK(status.ok());
  CHECK(allocator->stats().loaded_tokens > 0);
}
