// SPDX-License-Identifier: Apache-2.0
//
// The engine of suite serve-gpu in simulated time, at toy size; step costs from a suite's rows, and runs from
// a plan's.
#include <bench/support/cost_tables.hpp>
#include <bench/support/serve_plan.hpp>
#include <bench/support/sim_card.hpp>

#include <cmath>
#include <cstdint>
#include <vector>

#include <support/catch.hpp>

namespace {

using namespace codegemm::bench;
using codegemm::StatusCode;
using prefillshare::CostModel;
using prefillshare::MeasuredLine;
using prefillshare::PrefillPart;
using prefillshare::Workload;

// A card that prefills 10,000 tokens a second and decodes in 2 ms a step, and a little for what it reads.
nlohmann::json toy_rows() {
  nlohmann::json rows = nlohmann::json::array();
  for (const std::int64_t tokens : {1, 16, 256}) {
    for (const std::int64_t context : {0, 1000}) {
      rows.push_back(prefill_row(
          "fp16", tokens, context,
          1e-3 + 1e-4 * static_cast<double>(tokens) + 1e-8 * static_cast<double>(tokens * context)));
    }
  }
  for (const std::int64_t batch : {1, 2, 4, 8, 16, 32}) {
    for (const std::int64_t context : {64 * batch, 512 * batch}) {
      rows.push_back(decode_row("fp16", batch, context, 2e-3 + 1e-7 * static_cast<double>(context)));
      rows.push_back(decode_row("codes", batch, context, 1e-3));
    }
  }
  rows.push_back({{"name", "something else"}});
  return rows;
}

CardShape toy_shape(std::int64_t blocks) {
  CardShape shape;
  shape.kv = {1, 1, 8, 16};
  shape.blocks = blocks;
  shape.vocab_size = 1000;
  shape.max_context = 4096;
  shape.batch_sizes = {1, 2, 4, 8, 16, 32};
  return shape;
}

Workload toy_sessions(double rate, std::int64_t sessions = 40) {
  const prefillshare::AgentPattern pattern{
      "toy", std::vector<prefillshare::AgentStep>(4, {5, 43}), 160, 0, 2, 3, 0.0};
  return prefillshare::make_workload(pattern, sessions, rate, 3).value();
}

CardOutcome simulate(CardSharing sharing, const Workload& workload, std::int64_t blocks,
                     bool admission = true) {
  CardOptions options;
  options.sharing = sharing;
  options.chunk_tokens = 256;
  options.admission = admission;
  static const CostModel cost = cost_from_rows(toy_rows(), "fp16", "fp16").value();
  return simulate_card(toy_shape(blocks), cost, workload, options);
}

}  // namespace

TEST_CASE("step costs: read from rows, linear between them, and what cannot be is named") {
  const auto made = cost_from_rows(toy_rows(), "fp16", "fp16");
  REQUIRE(made.ok());
  const CostModel& cost = *made;
  CHECK(std::abs(cost.prefill_seconds(256, 0) - 26.6e-3) < 1e-9);
  CHECK(std::abs(cost.prefill_seconds(136, 500) - (14.6e-3 + 136 * 500 * 1e-8)) < 1e-9);
  CHECK(std::abs(cost.decode_seconds(8, 2000, 1) - 2.2e-3) < 1e-9);
  CHECK(std::abs(cost.decode_seconds(3, 300000, 1) - 32e-3) < 1e-9);  // far behind what was measured
  // One pass over three chunks: the step's cost once, the attention of all, or of one that takes longer.
  const std::vector<PrefillPart> parts{{100, 0}, {60, 1000}, {40, 2000}};
  const double own = 0.5e-8 * (100 * 100 + 60 * 60 + 40 * 40 - 200 * 200);  // not of each to the others
  CHECK(std::abs(cost.prefill_step_seconds(parts) - (1e-3 + 200e-4 + (60 * 1000 + 40 * 2000) * 1e-8 + own)) <
        1e-9);
  const std::vector<PrefillPart> one{{100, 500}};
  CHECK(std::abs(cost.prefill_step_seconds(one) - cost.prefill_seconds(100, 500)) < 1e-9);
  CHECK(std::abs(cost_from_rows(toy_rows(), "fp16", "codes")->decode_seconds(8, 2000, 1) - 1e-3) < 1e-9);

  const auto code = [](const nlohmann::json& rows) {
    return cost_from_rows(rows, "fp16", "fp16").status().code();
  };
  CHECK(code(nlohmann::json::array()) == StatusCode::kInvalidArgument);
  nlohmann::json rows = toy_rows();
  rows.push_back(prefill_row("fp16", 512, 0, 0.1));  // at one context of two
  CHECK(code(rows) == StatusCode::kCorruptData);
  rows = toy_rows();
  rows.push_back(decode_row("fp16", 64, 64, 0.1));
  CHECK(code(rows) == StatusCode::kCorruptData);
  rows = toy_rows();
  rows[0].erase("ms");
  CHECK(code(rows) == StatusCode::kCorruptData);

  // What noise makes of two times: never a slope below 0, never a time below 0.
  const std::vector<MeasuredLine> falling{{1, 10, 20, 3.0, 1.0}, {2, 10, 20, 1.0, 3.0}};
  const auto table = prefillshare::table_of_lines(falling, 100);
  REQUIRE(table.ok());
  CHECK(std::abs((*table)(1, 50) - 2.0) < 1e-12);
  CHECK((*table)(2, 0) == 0.0);
  CHECK(std::abs((*table)(2, 20) - 3.0) < 1e-12);
  CHECK(prefillshare::table_of_lines(std::vector<MeasuredLine>{{1, 10, 10, 1, 1}}, 100).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(prefillshare::table_of_lines(std::vector<MeasuredLine>{{2, 1, 2, 1, 1}, {1, 1, 2, 1, 1}}, 100)
            .status()
            .code() == StatusCode::kInvalidArgument);
}

TEST_CASE("the engine: every session ends with all its tokens, and caches hold what they can") {
  const Workload workload = toy_sessions(4.0);
  std::int64_t tokens = 0;
  double wanted = 0.0;
  for (const prefillshare::CallPlan& call : workload.calls) {
    tokens += call.output;
    wanted += call.context - 1;
  }
  for (const CardSharing sharing : {CardSharing::kSeparate, CardSharing::kPooled, CardSharing::kShared}) {
    CAPTURE(name_of(sharing));
    const CardOutcome outcome = simulate(sharing, workload, 100'000);
    CHECK(outcome.output_tokens == tokens);
    CHECK(outcome.calls.size() == workload.calls.size());
    CHECK(outcome.sessions.size() == workload.sessions.size());
    CHECK(static_cast<double>(outcome.reused_tokens + outcome.computed_tokens) == wanted);
    // Whole blocks are found: up to one block and the last token of each call are not.
    const double ideal = prefillshare::ideal_hit_ratio(workload, sharing == CardSharing::kShared);
    CHECK(outcome.hit_ratio() <= ideal);
    CHECK(outcome.hit_ratio() > ideal - 17.0 * static_cast<double>(workload.calls.size()) / wanted);
    for (std::size_t i = 0; i < outcome.calls.size(); ++i) {
      CHECK((outcome.first_token[i] > 0.0 && outcome.first_token[i] <= outcome.calls[i]));
    }
    // The same again is the same, token by token.
    const CardOutcome again = simulate(sharing, workload, 100'000);
    CHECK((again.token_sum == outcome.token_sum && again.sessions == outcome.sessions));
  }
}

TEST_CASE("the engine past saturation: admission keeps throughput, without it separate caches lose theirs") {
  const std::int64_t blocks = 400;
  const auto speed = [&](CardSharing sharing, double rate, bool admission) {
    return simulate(sharing, toy_sessions(rate, 80), blocks, admission).steady_tokens_per_second;
  };
  const double separate = speed(CardSharing::kSeparate, 8.0, true);
  const double shared = speed(CardSharing::kShared, 8.0, true);
  CHECK(shared > 2.0 * separate);
  CHECK(std::abs(speed(CardSharing::kSeparate, 64.0, true) / separate - 1.0) < 0.15);
  CHECK(speed(CardSharing::kShared, 64.0, true) > 0.85 * shared);
  const CardOutcome open = simulate(CardSharing::kSeparate, toy_sessions(64.0, 80), blocks, false);
  const CardOutcome held = simulate(CardSharing::kSeparate, toy_sessions(64.0, 80), blocks, true);
  CHECK(open.output_tokens == held.output_tokens);
  CHECK(open.hit_ratio() < 0.5 * held.hit_ratio());
  CHECK(open.tokens_per_second < held.tokens_per_second);
  CHECK(open.most_sessions > held.most_sessions);
  CHECK(held.refused_starts == 0);
}

TEST_CASE("the engine gives up in time, and every block comes back") {
  CardOptions options;
  options.sharing = CardSharing::kShared;
  options.chunk_tokens = 64;
  options.most_seconds = 0.7;
  const CostModel cost = cost_from_rows(toy_rows(), "fp16", "codes").value();
  const CardOutcome outcome =
      simulate_card(toy_shape(300), cost, toy_sessions(20.0), options);  // throws else
  CHECK(outcome.given_up);
  CHECK(outcome.sessions.size() < 40);
}

namespace {

// The toy card's steps on two parts of it: prefill takes a little longer, decode steps half as long again.
nlohmann::json toy_parts() {
  nlohmann::json rows = toy_rows();
  const nlohmann::json whole = rows;
  for (const nlohmann::json& row : whole) {
    const bool step = row["name"] == "prefill_step";
    if (!step && row["name"] != "decode_step") continue;
    nlohmann::json part = row;
    part["ms"] = row["ms"].get<double>() * (step ? 1.05 : 1.5);
    part["multiprocessors"] = step ? 24 : 8;
    part["beside"] = "fp16";
    if (row["weights"] == "fp16") rows.push_back(part);
  }
  return rows;
}

}  // namespace

TEST_CASE("the engine with decode steps beside a prefill: the same answers, sooner, and every block back") {
  const nlohmann::json rows = toy_parts();
  const CostModel cost = cost_from_rows(rows, "fp16", "fp16").value();
  const CostModel part = cost_from_rows(rows, "fp16", "fp16", {24, 8}).value();
  CHECK(std::abs(part.prefill_seconds(256, 0) - 1.05 * 26.6e-3) < 1e-9);
  CHECK(std::abs(part.decode_seconds(8, 2000, 1) - 1.5 * 2.2e-3) < 1e-9);
  CHECK(cost_from_rows(rows, "fp16", "fp16", {24, 16}).status().code() == StatusCode::kInvalidArgument);
  CHECK(std::abs(cost.prefill_seconds(256, 0) - 26.6e-3) < 1e-9);  // rows of parts are not mixed in
  for (const CardSharing sharing : {CardSharing::kSeparate, CardSharing::kPooled, CardSharing::kShared}) {
    CAPTURE(name_of(sharing));
    for (const double rate : {2.0, 64.0}) {
      CAPTURE(rate);
      const Workload workload = toy_sessions(rate);
      CardOptions options;
      options.sharing = sharing;
      options.chunk_tokens = 256;
      const CardOutcome one = simulate_card(toy_shape(100'000), cost, workload, options);
      options.beside = true;
      const CardOutcome two = simulate_card(toy_shape(100'000), cost, workload, options, &part);
      CHECK((two.output_tokens == one.output_tokens && two.calls.size() == one.calls.size()));
      CHECK(two.token_sum == one.token_sum);  // seeds, not schedules, make the tokens
      CHECK(two.computed_tokens == one.computed_tokens);
      // Costs on parts that were those of the whole: nothing is slower, and a flood is faster.
      const CardOutcome bound = simulate_card(toy_shape(100'000), cost, workload, options);
      CHECK(bound.seconds < one.seconds * 1.02);
      if (rate > 8.0) CHECK(two.seconds < one.seconds);
    }
  }
  // One module at a time: the same answers from fewer steps of weights, in less time.
  for (const CardSharing sharing : {CardSharing::kSeparate, CardSharing::kShared}) {
    const Workload workload = toy_sessions(64.0);
    CardOptions all;
    all.sharing = sharing;
    all.chunk_tokens = 256;
    CardOptions largest = all;
    largest.largest_first = true;
    const CardOutcome each = simulate_card(toy_shape(100'000), cost, workload, all);
    const CardOutcome one = simulate_card(toy_shape(100'000), cost, workload, largest);
    CHECK((one.token_sum == each.token_sum && one.sessions.size() == each.sessions.size()));
    CHECK(one.seconds < each.seconds);
    largest.beside = true;
    CHECK(simulate_card(toy_shape(100'000), cost, workload, largest, &part).token_sum == each.token_sum);
  }
  // A small pool, and a run that is given up in its middle.
  CardOptions options;
  options.chunk_tokens = 64;
  options.beside = true;
  options.most_seconds = 0.7;
  const CardOutcome over = simulate_card(toy_shape(300), cost, toy_sessions(20.0), options, &part);
  CHECK((over.given_up && over.sessions.size() < 40));
  options.most_seconds = 1e9;
  options.admission = false;
  CHECK(simulate_card(toy_shape(300), cost, toy_sessions(20.0), options, &part).sessions.size() == 40);
}

TEST_CASE("a run's row tells its conditions, and what it leaves out is as usual") {
  ServePoint point;
  point.sharing = CardSharing::kPooled;
  point.weights = "m1v4g128";
  point.parts = {108, 24};
  point.pattern = "reflexion";
  point.rate = 3.5;
  point.sessions = 7;
  point.seed = 9;
  point.admission = false;
  point.largest_first = false;
  point.chunk_tokens = 1024;
  const ServePoint again = point_of(point_row(point));
  CHECK(point_row(again) == point_row(point));
  CHECK((again.same_system(point) && again.options().beside && again.workload().sessions.size() == 7));
  const ServePoint bare = point_of({{"system", "shared"}, {"sessions_per_s", 2.0}});
  CHECK((bare.seed == 1 && bare.weights == "fp16" && !bare.options().beside && bare.admission));
  CHECK_THROWS(point_of({{"system", "none"}, {"sessions_per_s", 2.0}}));
}
