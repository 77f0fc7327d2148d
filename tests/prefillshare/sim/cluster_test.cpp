// SPDX-License-Identifier: Apache-2.0
//
// The simulator against arithmetic: one session by hand, queueing theory, conservation, faults, and the
// shapes that the paper reports.
#include <prefillshare/sim/cluster.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

namespace {

using namespace prefillshare;  // NOLINT(google-build-using-namespace): a test
using codegemm::test::Rng;
using codegemm::test::seed_or;

/// Equal but for a share of it; prints both on failure.
struct Near {
  double value = 0.0;
  double share = 1e-9;

  [[nodiscard]] Near epsilon(double relative) const { return {value, relative}; }
  friend bool operator==(double got, const Near& wanted) {
    return std::abs(got - wanted.value) <= wanted.share * std::abs(wanted.value);
  }
  friend std::ostream& operator<<(std::ostream& out, const Near& near) { return out << near.value; }
};
Near near(double value) { return {value}; }

constexpr double kForEver = std::numeric_limits<double>::infinity();

/// prefill(t, c) = a + b t + p t c; decode(B, S) = c + d B + e S.
CostModel linear_cost(double a, double b, double p, double c, double d, double e) {
  CostModel cost;
  cost.prefill.x = {0, 1000};
  cost.prefill.y = {0, 1000};
  cost.prefill.seconds = {a, a, a + 1000 * b, a + 1000 * b + 1e6 * p};
  cost.decode.x = {1, 101};
  cost.decode.y = {0, 1000};
  cost.decode.seconds = {c + d, c + d + 1000 * e, c + 101 * d, c + 101 * d + 1000 * e};
  return cost;
}

/// The rules in one type, so that the cluster is compiled once.
class TestRouting {
 public:
  static constexpr bool kUsesPrefixes = true;

  template <PrefillCost Cost>
  [[nodiscard]] Result<WorkerId> choose(const RouteRequest& request, const RouteContext<Cost>& context) {
    if (rule == 0) return sticky_.choose(request, context);
    return rule == 1 ? in_turn_.choose(request, context) : prefix_.choose(request, context);
  }
  [[nodiscard]] Status changed(const WorkerTable& workers) { return sticky_.changed(workers); }
  void ended(SessionId session) {
    sticky_.ended(session);
    in_turn_.ended(session);
  }

  int rule = 0;

 private:
  StickyRouting<> sticky_;
  StickyRouting<RoundRobinRouting> in_turn_;
  PrefixRouting prefix_{1.5};
};
TestRouting rule_of(int rule) {
  TestRouting routing;
  routing.rule = rule;
  return routing;
}
const TestRouting kSticky = rule_of(0);
const TestRouting kInTurn = rule_of(1);
const TestRouting kPrefix = rule_of(2);

ClusterConfig small_cluster() {
  ClusterConfig config;
  config.modules = 2;
  config.prefill_workers = 2;
  config.decode_workers = 2;
  config.prefill_blocks = 100;
  config.decode_blocks = 100;
  config.kv_bytes_per_token = 10.0;
  config.chunk_tokens = 64;
  config.cost = linear_cost(1e-3, 1e-4, 1e-8, 2e-3, 1e-4, 1e-6);
  config.cost.link_seconds = 1e-3;
  config.cost.link_bytes_per_second = 1e6;
  config.sample_seconds = 0.1;
  return config;
}

AgentPattern small_pattern() { return {"small", {{10, 30}, {20, 15}}, 100, 0, 1, 4, 0.0}; }

/// Runs, and wants everything given back, every call answered once and no work that nobody asked for.
SimReport run(const ClusterConfig& config, const Workload& workload, const TestRouting& policy) {
  auto cluster = Cluster<TestRouting>::create(config, workload, policy);
  INFO(cluster.status().message());
  REQUIRE(cluster.ok());
  const auto report = cluster.value()->run();
  INFO(report.status().message());
  REQUIRE(report.ok());
  const Status idle = cluster.value()->check_idle();
  INFO(idle.message());
  REQUIRE(idle.ok());
  const SimReport& out = report.value();
  REQUIRE(out.sessions_finished + out.sessions_refused <= std::ssize(workload.sessions));
  REQUIRE(out.prefill_busy <= 1.0 + 1e-9);
  REQUIRE(out.decode_busy <= 1.0 + 1e-9);
  REQUIRE(out.hit_tokens <= out.prompt_tokens);
  REQUIRE(out.attempts >= out.calls_finished);
  if (config.faults.empty()) {
    REQUIRE(out.sessions_finished + out.sessions_refused == std::ssize(workload.sessions));
    REQUIRE(out.calls_unfinished == 0);
    REQUIRE(out.computed_tokens == out.prompt_tokens - out.hit_tokens);
  }
  if (out.sessions_finished == std::ssize(workload.sessions)) {
    std::int64_t tokens = 0;
    for (const CallPlan& call : workload.calls) tokens += call.output;
    REQUIRE(out.calls_finished == std::ssize(workload.calls));
    REQUIRE(out.output_tokens == tokens);
    REQUIRE(out.call_latency.count == out.calls_finished);
  }
  CHECK(cluster.value()->run().status().code() == StatusCode::kInvalidArgument);
  return out;
}

Workload one_session(std::vector<CallPlan> calls, std::int32_t modules) {
  Workload workload;
  workload.name = "one";
  workload.modules = modules;
  SessionPlan plan;
  plan.calls = static_cast<std::int32_t>(calls.size());
  workload.sessions = {plan};
  workload.calls = std::move(calls);
  return workload;
}

}  // namespace

TEST_CASE("tables are read between their points and beyond, and refused when they cannot be") {
  StepTable table{{1, 3, 10}, {0, 5}, {2, 12, 6, 16, 20, 30}};  // 2 x + 2 y
  Rng rng(seed_or(31));
  for (int i = 0; i < 100; ++i) {
    const double x = 20.0 * rng.uniform();
    const double y = 10.0 * rng.uniform();
    REQUIRE(table(x, y) == near(2 * x + 2 * y));
  }
  CHECK(validate(table, "t").ok());
  CHECK(StepTable{{1}, {1}, {5}}(3, 7) == 5.0);
  CHECK(!validate(StepTable{{1, 1}, {0}, {1, 1}}, "t").ok());
  CHECK(!validate(StepTable{{1, 2}, {0}, {1}}, "t").ok());
  CHECK(!validate(StepTable{{1, 2}, {0}, {1, -1}}, "t").ok());
  CHECK(!validate(StepTable{{1, 2}, {0}, {1, std::nan("")}}, "t").ok());
  CHECK(!validate(StepTable{}, "t").ok());

  // All steps of a segment: the mean is exact, since the table is linear in the context.
  const CostModel cost = linear_cost(0, 0, 0, 2e-3, 1e-4, 1e-6);
  double sum = 0.0;
  for (int step = 0; step < 40; ++step) sum += cost.decode(3, 500 + 3.0 * step);
  CHECK(40 * cost.decode_seconds(3, 500, 40) == near(sum));

  CostModel link = cost;
  link.link_bytes_per_second = 100.0;
  CHECK(link.transfer_seconds(1000.0, 4.0) == near(10.0));
  link.overlapped_layers = 5;
  CHECK(link.transfer_seconds(1000.0, 4.0) == near(6.0));   // the rest hides behind the prefill
  CHECK(link.transfer_seconds(1000.0, 99.0) == near(2.0));  // the last layer does not
  CHECK(validate(roofline_cost(a100_llama_8b())).ok());
}

TEST_CASE("one session alone takes the time that its steps add up to") {
  ClusterConfig config = small_cluster();
  const CostModel& cost = config.cost;
  for (const bool reserve : {true, false}) {
    for (const CacheSharing sharing : {CacheSharing::kShared, CacheSharing::kPerModule}) {
      CAPTURE(reserve, to_string(sharing));
      config.reserve_decode = reserve;
      config.sharing = sharing;
      const Workload workload = one_session({{0, 100, 20, 0}, {0, 150, 1, 0.5F}, {1, 161, 5, 0}}, 2);
      const SimReport out = run(config, workload, kSticky);

      // 99 tokens in chunks of 64 and 35, 6 blocks and 3 tokens over the wire, 20 steps at 100 tokens and
      // more.
      double decode = 0.0;
      for (int i = 0; i < 20; ++i) decode += cost.decode(1, 100 + i);
      const double first = cost.prefill(64, 0) + cost.prefill(35, 64) + 1e-3 + 99 * 10.0 / 1e6;
      // Of 149 tokens 6 blocks are there, on both sides.
      const double second = cost.prefill(53, 96) + 1e-3 + 53 * 10.0 / 1e6 + cost.decode(1, 150);
      // Another module: its decode worker has nothing; its prefill worker 9 blocks when they are shared.
      const double prefill = sharing == CacheSharing::kShared
                                 ? cost.prefill(16, 144)
                                 : cost.prefill(64, 0) + cost.prefill(64, 64) + cost.prefill(32, 128);
      double last = prefill + 1e-3 + 160 * 10.0 / 1e6;
      for (int i = 0; i < 5; ++i) last += cost.decode(1, 161 + i);
      // A step of the mean time stands for each, in segments of 16 without reservation.
      const double half = 1e-6 * (reserve ? 19 : 15) / 2;
      CHECK(out.first_token.most ==
            near(std::max(first + cost.decode(1, 100) + half, last - 4 * cost.decode(1, 163))).epsilon(1e-9));
      CHECK(out.session_latency.mean == near(first + decode + 0.5 + second + last).epsilon(1e-9));
      CHECK(out.prompt_tokens == 99 + 149 + 160);
      CHECK(out.hit_tokens == 96 + (sharing == CacheSharing::kShared ? 144 : 0));
      CHECK(out.transferred_bytes == near(10.0 * (99 + 53 + 160)));
      CHECK(out.mean_batch == 1.0);
    }
  }
}

TEST_CASE("the wait for a prefill worker is that of the M/D/1 queue") {
  // One worker, one request a step, all of them alike: Poisson arrivals at a server of constant time. The
  // mean wait is rho / (2 (1 - rho)) service times (Pollaczek and Khinchine).
  ClusterConfig config = small_cluster();
  config.modules = config.prefill_workers = config.decode_workers = 1;
  config.block_tokens = 100;
  config.chunk_tokens = 100;
  config.prefill_blocks = 50;
  config.decode_blocks = 100'000;
  config.cost = linear_cost(0.0, 1e-2, 0.0, 1e-9, 0.0, 0.0);  // one second
  config.cost.link_bytes_per_second = 1e30;
  config.sample_seconds = 1000.0;
  for (const double rho : {0.3, 0.6}) {
    CAPTURE(rho);
    const AgentPattern pattern{"one", {{1, 0}}, 101, 0, 1, 1, 0.0};
    const Workload workload = make_workload(pattern, rho < 0.5 ? 10'000 : 60'000, rho, seed_or(32)).value();
    const SimReport out = run(config, workload, kSticky);
    CHECK(out.prefill_wait.mean == near(rho / (2 * (1 - rho))).epsilon(0.05));
    CHECK(out.prefill_busy == near(rho).epsilon(0.03));
  }
}

TEST_CASE("everything ends once, in every mode, with memory short everywhere") {
  const std::uint64_t seed = seed_or(33);
  CAPTURE(seed);
  Rng rng(seed);
  std::int64_t preempted = 0;
  std::int64_t staged = 0;
  std::int64_t refused = 0;
  for (int round = 0; round < 40; ++round) {
    CAPTURE(round);
    ClusterConfig config = small_cluster();
    config.sharing = static_cast<CacheSharing>(rng.below(3));
    config.prefill_workers = static_cast<std::int32_t>(2 + rng.below(3));
    config.decode_workers = static_cast<std::int32_t>(2 + rng.below(3));
    config.block_tokens = static_cast<int>(1 + rng.below(20));
    // At least the largest call of all; not much more.
    const AgentPattern pattern = small_pattern();
    const std::int64_t largest = (100 + 4 * 75 + config.block_tokens) / config.block_tokens + 2;
    config.prefill_blocks = largest + rng.below(2 * largest);
    config.decode_blocks = largest + rng.below(2 * largest);
    config.most_batch = static_cast<std::int32_t>(1 + rng.below(8));
    config.most_sessions = 1 + rng.below(30);
    config.reserve_decode = rng.below(2) == 0;
    config.staging_bytes_per_second = rng.below(2) == 0 ? 2e5 : 0.0;
    if (rng.below(3) == 0) config.most_queued = rng.below(10);
    if (rng.below(3) == 0) config.session_patience = 0.5;
    if (rng.below(3) == 0) config.session_blocks_share = 0.5 + rng.uniform();
    if (rng.below(3) == 0) config.cost.overlapped_layers = 4;
    if (rng.below(4) == 0) config.event_ring = 8;  // the router loses events all the time
    const Workload workload =
        make_workload(pattern, 60, 20.0, seed + static_cast<std::uint64_t>(round)).value();
    const SimReport out = run(config, workload, rng.below(2) == 0 ? kSticky : kPrefix);
    preempted += out.preempted;
    staged += out.staged;
    refused += out.sessions_refused;
    if (config.reserve_decode) {
      REQUIRE(out.preempted == 0);
      REQUIRE(out.attempts == out.calls_finished);
    }
  }
  CHECK(preempted > 60);
  CHECK(staged > 20);
  CHECK(refused > 30);
}

TEST_CASE("a worker that dies in the middle of a hand-off: its calls are computed again elsewhere") {
  ClusterConfig config = small_cluster();
  config.modules = 1;
  config.cost.link_bytes_per_second = 1e3;  // 99 tokens take about a second
  const Workload workload = one_session({{0, 100, 3, 0}}, 1);
  const double undisturbed = run(config, workload, kInTurn).seconds;
  REQUIRE(undisturbed > 0.99);
  for (const SimFault::Side side : {SimFault::Side::kPrefill, SimFault::Side::kDecode}) {
    for (const bool reserve : {true, false}) {
      CAPTURE(reserve);
      config.reserve_decode = reserve;
      // Whichever worker it is: both die, the second long after.
      config.faults = {{side, 0, 0.5, kForEver}};
      const SimReport first = run(config, workload, kInTurn);
      config.faults[0].worker = 1;
      const SimReport second = run(config, workload, kInTurn);
      CHECK(first.rerouted + second.rerouted == 1);
      CHECK(first.attempts + second.attempts == 3);
      CHECK(std::min(first.seconds, second.seconds) == near(undisturbed));
      // From its death on as from the start; a prefill worker that lives still has the cache.
      const double again = side == SimFault::Side::kPrefill ? undisturbed : undisturbed - 96 * 1e-4 - 1e-3;
      CHECK(std::max(first.seconds, second.seconds) > 0.5 + again - 1e-2);
      CHECK(first.calls_finished == 1);
      CHECK(second.calls_finished == 1);
    }
  }
}

TEST_CASE("with workers dying and coming back all the time every call is answered once") {
  const std::uint64_t seed = seed_or(34);
  CAPTURE(seed);
  Rng rng(seed);
  std::int64_t rerouted = 0;
  for (int round = 0; round < 20; ++round) {
    CAPTURE(round);
    ClusterConfig config = small_cluster();
    config.prefill_workers = config.decode_workers = 4;
    config.sharing = static_cast<CacheSharing>(rng.below(3));
    config.reserve_decode = rng.below(2) == 0;
    config.staging_bytes_per_second = rng.below(2) == 0 ? 2e5 : 0.0;
    config.decode_blocks = 60;
    for (int i = 0; i < 8; ++i) {
      for (const SimFault::Side side : {SimFault::Side::kPrefill, SimFault::Side::kDecode}) {
        const double down = static_cast<double>(i) + 0.8 * rng.uniform();
        config.faults.push_back(
            {side, static_cast<std::int32_t>(rng.below(4)), down, down + 0.05 + 0.1 * rng.uniform()});
      }
    }
    const Workload workload =
        make_workload(small_pattern(), 100, 15.0, seed + static_cast<std::uint64_t>(round)).value();
    const SimReport out = run(config, workload, rng.below(2) == 0 ? kSticky : kPrefix);
    rerouted += out.rerouted;
    REQUIRE(out.sessions_finished == 100);
    REQUIRE(out.calls_unfinished == 0);
  }
  CHECK(rerouted > 60);

  // Nobody comes back: what is left is told, and holds nothing.
  ClusterConfig config = small_cluster();
  for (std::int32_t w = 0; w < 2; ++w) config.faults.push_back({SimFault::Side::kPrefill, w, 1.0, kForEver});
  const Workload workload = make_workload(small_pattern(), 100, 15.0, seed).value();
  const SimReport out = run(config, workload, kPrefix);
  CHECK(out.calls_unfinished > 0);
  CHECK(out.sessions_finished < 100);
}

TEST_CASE("the same run twice is the same report, and another seed another") {
  ClusterConfig config = small_cluster();
  config.reserve_decode = false;
  config.staging_bytes_per_second = 2e5;
  const auto once = [&](std::uint64_t seed) {
    const Workload workload = make_workload(small_pattern(), 150, 12.0, seed).value();
    return run(config, workload, kPrefix);
  };
  const SimReport a = once(1);
  const SimReport b = once(1);
  const SimReport c = once(2);
  CHECK(a.seconds == b.seconds);
  CHECK(a.events == b.events);
  CHECK(a.hit_tokens == b.hit_tokens);
  CHECK(a.call_latency.mean == b.call_latency.mean);
  CHECK(a.transferred_bytes == b.transferred_bytes);
  CHECK(a.prefill_kv_bytes_mean == b.prefill_kv_bytes_mean);
  CHECK(a.seconds != c.seconds);
}

TEST_CASE("hits: the ideal with room, the fall without, and what sharing and admission save") {
  ClusterConfig config = small_cluster();
  config.prefill_blocks = config.decode_blocks = 100'000;
  config.block_tokens = 5;
  AgentPattern pattern = small_pattern();
  pattern.fewest_turns = pattern.most_turns = 4;
  const Workload workload = make_workload(pattern, 150, 30.0, seed_or(35)).value();
  const auto with = [&](CacheSharing sharing, std::int64_t sessions, double share) {
    ClusterConfig one = config;
    one.sharing = sharing;
    one.most_sessions = sessions;
    one.session_blocks_share = share;
    return run(one, workload, kSticky);
  };
  // A call's last token is not looked up, and what was generated is known from the next call on: near the
  // ideal.
  CHECK(with(CacheSharing::kShared, 20, kForEver).hit_ratio() ==
        near(ideal_hit_ratio(workload, true)).epsilon(0.04));
  CHECK(with(CacheSharing::kPerModule, 20, kForEver).hit_ratio() ==
        near(ideal_hit_ratio(workload, false)).epsilon(0.04));
  CHECK(with(CacheSharing::kPooled, 20, kForEver).hit_ratio() ==
        near(ideal_hit_ratio(workload, false)).epsilon(0.04));
  CHECK(ideal_hit_ratio(workload, true) > ideal_hit_ratio(workload, false) + 0.15);

  config.prefill_blocks = config.decode_blocks = 800;  // ten contexts a worker
  const SimReport separate = with(CacheSharing::kPerModule, 30, kForEver);
  const SimReport shared = with(CacheSharing::kShared, 12, kForEver);
  CHECK(separate.hit_ratio() < 0.5 * ideal_hit_ratio(workload, false));
  CHECK(shared.hit_ratio() > 0.96 * ideal_hit_ratio(workload, true));
  CHECK(shared.tokens_per_second > 1.5 * separate.tokens_per_second);

  const SimReport flooded = with(CacheSharing::kShared, 120, kForEver);
  const SimReport admitted = with(CacheSharing::kShared, 120, 0.8);
  CHECK(flooded.tokens_per_second < 0.75 * shared.tokens_per_second);
  CHECK(admitted.tokens_per_second > 0.95 * shared.tokens_per_second);
  CHECK(admitted.session_latency.p95 < 0.8 * flooded.session_latency.p95);
}

TEST_CASE("a slow prefill worker: a rule that knows the load works around it") {
  ClusterConfig config = small_cluster();
  config.prefill_blocks = config.decode_blocks = 10'000;
  config.prefill_workers = 4;
  config.prefill_speed = {0.1, 1.0, 1.0, 1.0};
  const Workload workload = make_workload(small_pattern(), 300, 25.0, seed_or(36)).value();
  const SimReport in_turn = run(config, workload, kInTurn);
  const SimReport aware = run(config, workload, kPrefix);
  CHECK(aware.first_token.p95 < 0.5 * in_turn.first_token.p95);
}

TEST_CASE("what cannot be simulated is refused with its name") {
  const Workload workload = make_workload(small_pattern(), 3, 1.0, 1).value();
  const auto message = [&](auto&& change) {
    ClusterConfig config = small_cluster();
    change(config);
    const auto cluster = Cluster<TestRouting>::create(config, workload);
    REQUIRE(cluster.status().code() == StatusCode::kInvalidArgument);
    return cluster.status().message();
  };
  CHECK(message([](ClusterConfig& c) { c.prefill_blocks = 0; }).find("prefill_blocks = 0") !=
        std::string::npos);
  CHECK(message([](ClusterConfig& c) { c.decode_workers = 1; }).find("decode_workers = 1") !=
        std::string::npos);
  CHECK(message([](ClusterConfig& c) {
          c.sharing = CacheSharing::kPerModule;
          c.prefill_workers = 1;
        }).find("1 prefill workers for 2") != std::string::npos);
  message([](ClusterConfig& c) { c.modules = c.prefill_workers = 1; });
  message([](ClusterConfig& c) { c.prefill_speed = {1.0}; });
  message([](ClusterConfig& c) { c.faults = {{SimFault::Side::kDecode, 2, 1.0, 2.0}}; });
  message([](ClusterConfig& c) { c.faults = {{SimFault::Side::kDecode, 1, 2.0, 1.0}}; });
  message([](ClusterConfig& c) { c.cost.link_bytes_per_second = 0.0; });
  message([](ClusterConfig& c) { c.cost.decode.seconds.clear(); });
  CHECK(make_workload(small_pattern(), 3, 0.0, 1).status().code() == StatusCode::kInvalidArgument);
  CHECK(!validate(one_session({{0, 100, 3, 0}, {0, 100, 3, 0}}, 1)).ok());
  CHECK(!validate(one_session({{0, 100, 0, 0}}, 1)).ok());
  CHECK(!validate(one_session({{2, 100, 1, 0}}, 2)).ok());

  // A call that no worker could hold is refused when it comes; the others are served.
  ClusterConfig config = small_cluster();
  config.decode_blocks = 10;
  config.modules = 1;
  Workload large = one_session({{0, 100, 3, 0}}, 1);
  large.sessions.push_back(large.sessions[0]);
  large.sessions[1].first_call = 1;
  large.calls.push_back({0, 500, 3, 0});
  const SimReport out = run(config, large, kSticky);
  CHECK(out.sessions_refused == 1);
  CHECK(out.sessions_finished == 1);
}
