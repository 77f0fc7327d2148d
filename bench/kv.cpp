// SPDX-License-Identifier: Apache-2.0
//
// bench/kv.cpp - the KV allocator: how fast it looks up and hands out, what it saves, what each eviction
// policy keeps of a production trace, no numbers lying in the blocks; and decoding over blocks that sequences
// share beside the plain path. On one core.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <prefillshare/attention/shared.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <support/random.hpp>

#include "support/cpu_program.hpp"
#include "support/kv_plot.hpp"
#include "support/kv_trace.hpp"
#include "support/machine.hpp"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using nlohmann::json;
using prefillshare::BasicKvAllocator;
using prefillshare::BlockId;
using prefillshare::CacheKey;
using prefillshare::KvShape;
using prefillshare::NoKvStorage;
using prefillshare::Sequence;
using Allocator = BasicKvAllocator<NoKvStorage>;
using Tokens = std::vector<std::int32_t>;
using Clock = std::chrono::steady_clock;

const CacheKey kKey{"model", "1", ""};
constexpr KvShape kLlama8b{32, 8, 128, 16};

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}
Tokens random_tokens(std::int64_t count, std::uint64_t seed) {
  test::Rng rng(seed);
  Tokens tokens(static_cast<std::size_t>(count));
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(rng.below(128'000));
  return tokens;
}
Sequence fill(Allocator& allocator, const Tokens& tokens) {
  Sequence sequence = allocator.open(kKey, tokens).value();
  const auto missing =
      std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(sequence.length()));
  check(allocator.reserve(sequence, std::ssize(missing)));
  check(allocator.commit(sequence, missing));
  return sequence;
}
/// Median seconds of `work` over `runs`; `before` is not timed.
double time_of(int runs, const std::function<void()>& before, const std::function<void()>& work) {
  std::vector<double> seconds;
  for (int run = 0; run < runs; ++run) {
    before();
    const auto start = Clock::now();
    work();
    seconds.push_back(seconds_since(start));
  }
  return median(seconds);
}
/// Throws what caches hold of the allocator's memory out of them.
void cool() {
  static std::vector<std::int64_t> memory(std::size_t{1} << 24);  // 128 MiB
  for (std::size_t i = 0; i < memory.size(); i += 8) ++memory[i];
}
void row(json& rows, json one) {
  std::printf("%s\n", one.dump().c_str());
  std::fflush(stdout);
  rows.push_back(std::move(one));
}

void lookups(json& rows) {
  constexpr std::int64_t kTokens = 50'000;
  NoKvStorage storage(kLlama8b, 200'000);
  auto allocator = Allocator::create(storage).value();
  for (int i = 0; i < 40; ++i) fill(*allocator, random_tokens(kTokens, 100U + static_cast<std::uint64_t>(i)));
  const Tokens tokens = random_tokens(kTokens, 117);
  for (const bool cold : {false, true}) {
    std::int64_t found = 0;
    const double lookup = time_of(
        51, cold ? cool : [] {},
        [&] {
          std::int64_t by_tier[1] = {};
          allocator->lookup(kKey, tokens, by_tier);
          found = by_tier[0];
        });
    const double open = time_of(
        51, cold ? cool : [] {},
        [&] {
          const Sequence sequence = allocator->open(kKey, tokens).value();
          found = std::min(found, sequence.length());
        });
    if (found != kTokens) throw std::runtime_error("the prefix is not found");
    row(rows, {{"name", cold ? "lookup_50k_cold" : "lookup_50k"},
               {"tokens", kTokens},
               {"median_us", lookup * 1e6}});
    row(rows, {{"name", cold ? "open_close_50k_cold" : "open_close_50k"},
               {"tokens", kTokens},
               {"median_us", open * 1e6}});
  }
}

void allocations(json& rows) {
  constexpr std::int64_t kBlocks = std::int64_t{1} << 16;
  constexpr std::int64_t kRounds = 64;
  auto pool = prefillshare::BlockPool::create(kBlocks).value();
  std::vector<BlockId> held(kBlocks);
  std::iota(held.begin(), held.end(), 0);
  test::Rng rng(1);
  for (std::size_t i = held.size(); i-- > 1;)
    std::swap(held[i], held[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(i) + 1))]);
  const std::vector<BlockId> order = held;  // freed in another order than they were handed out in
  const double seconds = time_of(
      9, [] {},
      [&] {
        for (std::int64_t round = 0; round < kRounds; ++round) {
          for (BlockId& block : held) block = pool.allocate().value();
          for (const BlockId block : order) pool.release(block);
        }
      });
  row(rows, {{"name", "allocate_free"},
             {"blocks", kBlocks},
             {"per_second", static_cast<double>(kBlocks * kRounds) / seconds}});

  NoKvStorage storage(kLlama8b, kBlocks);
  auto allocator = Allocator::create(storage).value();
  const Sequence base = fill(*allocator, random_tokens(1000, 2));
  const double forks = time_of(
      9, [] {},
      [&] {
        for (int i = 0; i < 1000; ++i) {
          Sequence fork = allocator->fork(base).value();
          check(allocator->append_private(
              fork, std::int64_t{16} * 64));  // 64 blocks, and a copy of the base's last one
        }
      });
  row(rows, {{"name", "fork_append_close"}, {"blocks", 65}, {"per_second", 1000.0 * 65 / forks}});
}

/// Sessions of 64 tokens on one common prefix of 64: the tree gets wide, not deep.
void sessions(json& rows) {
  NoKvStorage storage(kLlama8b, 4'100'000);
  auto allocator = Allocator::create(storage).value();
  const auto session = [](std::int64_t index) {
    Tokens tokens(128, 7);
    for (std::size_t i = 64; i < 128; ++i)
      tokens[i] = static_cast<std::int32_t>(index * 64 + static_cast<std::int64_t>(i));
    return tokens;
  };
  std::int64_t there = 0;
  for (const std::int64_t count : {1'000, 10'000, 100'000, 1'000'000}) {
    for (; there < count; ++there) fill(*allocator, session(there));
    test::Rng rng(3);
    std::vector<Tokens> wanted;
    wanted.reserve(20'000);
    for (int i = 0; i < 20'000; ++i) wanted.push_back(session(rng.below(count)));
    std::int64_t found = 0;
    const double seconds = time_of(
        5, [&] { found = 0; },
        [&] {
          for (const Tokens& tokens : wanted) {
            std::int64_t by_tier[1] = {};
            allocator->lookup(kKey, tokens, by_tier);
            found += by_tier[0];
          }
        });
    if (found != 128 * std::ssize(wanted)) throw std::runtime_error("a session is not found");
    row(rows, {{"name", "lookup_8_blocks"},
               {"sessions", count},
               {"tree_blocks", allocator->tree().size()},
               {"median_us", seconds * 1e6 / static_cast<double>(std::ssize(wanted))}});
  }
}

/// N decode modules on one context of 8000 tokens, each with an answer of 500.
void memory_of_modules(json& rows) {
  NoKvStorage storage(kLlama8b, 4096);
  constexpr std::int64_t kShared = 8000;  // 500 full blocks
  constexpr std::int64_t kUnique = 500;   // 32 blocks, the last one partly filled
  for (const std::int64_t modules : {1, 2, 4, 8, 16, 64}) {
    auto allocator = Allocator::create(storage).value();
    const Sequence base = fill(*allocator, random_tokens(kShared, 4));
    std::vector<Sequence> forks(static_cast<std::size_t>(modules));
    check(allocator->fork_all(base, forks, kUnique));
    for (Sequence& fork : forks) check(allocator->append_private(fork, kUnique));
    const auto stats = allocator->stats();
    const std::int64_t ideal = (kShared / 16 + modules * 32) * storage.bytes_per_block();
    if (stats.bytes_in_use != ideal) throw std::runtime_error("blocks are held that need not be");
    row(rows, {{"name", "memory_of_modules"},
               {"modules", modules},
               {"bytes", stats.bytes_in_use},
               {"bytes_ideal", ideal},
               {"bytes_separate", modules * (500 + 32) * storage.bytes_per_block()}});
  }
}

void trace_replays(json& rows, const std::string& path, const std::string& plot) {
  const Trace trace = read_trace(path);
  const auto percent = [&](std::int64_t hits) {
    return 100.0 * static_cast<double>(hits) / static_cast<double>(trace.accesses);
  };
  const Replay all = replay<prefillshare::LruEviction>(trace, trace.unique + 1000, Hints::kNone);
  if (all.hits != trace.accesses - trace.unique) throw std::runtime_error("unlimited hits are not the ideal");
  row(rows, {{"name", "trace_unlimited"},
             {"requests", std::ssize(trace.requests)},
             {"blocks", trace.accesses},
             {"working_set", trace.unique},
             {"hit_percent", percent(all.hits)},
             {"seconds", all.seconds}});
  struct Policy {
    const char* name;
    std::function<std::int64_t(std::int64_t)> hits;
  };
  using prefillshare::AgentEviction;
  using prefillshare::LruEviction;
  using prefillshare::PriorityEviction;
  const std::vector<Policy> policies = {
      {"lru", [&](std::int64_t c) { return replay<LruEviction>(trace, c, Hints::kNone).hits; }},
      {"priority, reused blocks",
       [&](std::int64_t c) { return replay<PriorityEviction>(trace, c, Hints::kReused).hits; }},
      {"agent, no hints", [&](std::int64_t c) { return replay<AgentEviction>(trace, c, Hints::kNone).hits; }},
      {"agent, next 5 minutes",
       [&](std::int64_t c) { return replay<AgentEviction>(trace, c, Hints::kFiveMinutes).hits; }},
      {"agent, all next uses",
       [&](std::int64_t c) { return replay<AgentEviction>(trace, c, Hints::kAll).hits; }},
      {"belady, offline bound", [&](std::int64_t c) { return offline_optimum(trace, c); }},
  };
  std::vector<Curve> curves;
  for (const Policy& policy : policies) {
    Curve curve{policy.name, {}};
    for (const int share : {1, 2, 5, 10, 25, 50, 100}) {
      const std::int64_t capacity = trace.unique * share / 100;
      curve.points.emplace_back(share, percent(policy.hits(capacity)));
      row(rows, {{"name", "trace"},
                 {"policy", policy.name},
                 {"capacity_percent", share},
                 {"capacity", capacity},
                 {"hit_percent", curve.points.back().second}});
    }
    curves.push_back(std::move(curve));
  }
  if (!plot.empty()) check(write_text(plot_svg(curves), plot));
}

/// Attention of one layer of Llama-3 8B, one token a sequence: the shared tokens read once for all sequences,
/// and once for each.
void shared_decode(json& rows) {
  constexpr int kHeads = 32, kKvHeads = 8, kDim = 128, kBlockTokens = 16, kTail = 64;
  SerialExecutor executor;
  for (const int shared : {256, 1024, 4096}) {
    for (const int count : {1, 2, 4, 16}) {
      const int shared_blocks = shared / kBlockTokens;
      const int tail_blocks = kTail / kBlockTokens;
      const int blocks = shared_blocks + count * tail_blocks;
      auto storage = prefillshare::HostKvStorage::create({1, kKvHeads, kDim, kBlockTokens}, blocks).value();
      test::Rng rng(3);
      const std::int64_t floats = std::int64_t{blocks} * 2 * kBlockTokens * kKvHeads * kDim;
      for (std::int64_t i = 0; i < floats; ++i) storage.layer(0).data[i] = rng.normal();
      std::vector<std::vector<BlockId>> tables(static_cast<std::size_t>(count));
      std::vector<prefillshare::DecodeSequence> sequences;
      for (int i = 0; i < count; ++i) {
        auto& table = tables[static_cast<std::size_t>(i)];
        for (int b = 0; b < shared_blocks; ++b) table.push_back(b);
        for (int b = 0; b < tail_blocks; ++b) table.push_back(shared_blocks + i * tail_blocks + b);
        sequences.push_back({table, shared + kTail});
      }
      const std::vector<float> q = rng.normals(std::int64_t{count} * kHeads * kDim);
      std::vector<float> out[2] = {std::vector<float>(q.size()), std::vector<float>(q.size())};
      double seconds[2] = {};
      for (const int plain : {0, 1}) {
        prefillshare::SharedDecodeArgs args;
        args.kv = storage.layer(0);
        args.sequences = sequences;
        args.shared_tokens = plain != 0 ? 0 : shared;
        args.q = {q.data(), count, kHeads * kDim};
        args.out = {out[plain].data(), count, kHeads * kDim};
        args.heads = kHeads;
        const std::size_t bytes = prefillshare::decode_workspace_bytes(args, 1);
        std::vector<float> memory(bytes / sizeof(float) + 16);
        void* aligned = memory.data();
        std::size_t space = memory.size() * sizeof(float);
        args.workspace = {static_cast<std::byte*>(std::align(64, bytes, aligned, space)), bytes};
        seconds[plain] = time_of(15, cool, [&] { check(prefillshare::shared_decode(args, executor)); });
      }
      for (std::size_t i = 0; i < q.size(); ++i) {
        if (!(std::abs(out[0][i] - out[1][i]) < 1e-4F)) throw std::runtime_error("the two paths differ");
      }
      row(rows, {{"name", "shared_decode"},
                 {"sequences", count},
                 {"tokens", shared},
                 {"median_us", seconds[0] * 1e6},
                 {"plain_us", seconds[1] * 1e6},
                 {"ratio", seconds[1] / seconds[0]}});
    }
  }
}

int run(int argc, char** argv) {
  std::string json_path;
  std::string plot;
  std::string trace = bench_file("data/mooncake_conversation.tsv");
  CLI::App app("The KV allocator on one core");
  app.add_option("--json", json_path, "Write the results to this file");
  app.add_option("--plot", plot, "Draw the policies' hit rates into this SVG file");
  app.add_option("--trace", trace, "The trace to replay, in the form that bench/data/README.md tells");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  SerialExecutor executor;
  Suite suite;
  suite.name = "kv";
  suite.machine = machine_json(executor);
  suite.memory = measure_memory(executor);
  json rows = json::array();
  lookups(rows);
  allocations(rows);
  sessions(rows);
  memory_of_modules(rows);
  trace_replays(rows, trace, plot);
  shared_decode(rows);
  if (!json_path.empty()) check(write_text(frame_json(suite, rows).dump(2) + '\n', json_path));
  return 0;
}

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) { return codegemm::bench::run_suite("kv", argc, argv, codegemm::bench::run); }
