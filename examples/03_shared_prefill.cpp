// SPDX-License-Identifier: Apache-2.0
//
// Three agents read one document. A frozen base model prefills it once; each agent has a decode module of its
// own, at a few bits a weight, that reads the base's cache. Then the same session again, every agent with a
// prefill and a cache of its own, so that the two can be compared. Then specialists, fine-tuned for a task on
// the base's cache, answer requests that the base cannot.
//
// Run it with: scripts/demo
// test: --model {model} --document {source}/tests/data/short_document.txt --agents {source}/tests/data/two_agents.json --cache {cache} --max-tokens 6

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/agent_turns.hpp>
#include <common/agents.hpp>
#include <common/answer_printer.hpp>
#include <common/model_tokenizer.hpp>
#include <common/progress.hpp>
#include <common/quantized_model.hpp>
#include <common/report.hpp>
#include <common/run_program.hpp>
#include <common/sampler.hpp>
#include <common/separate_session.hpp>
#include <common/shared_prefill_options.hpp>
#include <common/specialists.hpp>
#include <prefillshare/serve/session.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

/// An agent's decode module, which reads the base's cache.
struct Member {
  DecodeModule<CodeGemmLinear> decode;
  ForwardWorkspace workspace;
};

constexpr std::int64_t kPrefillChunk = 512;  // tokens a forward pass: large enough for full GEMM speed

/// The base prefills, the agents decode; the text streams to stdout.
Run run_shared(const SharedPrefillOptions& options, const std::vector<Agent>& agents,
               const Tokenizer& tokenizer, const PrefillModule<DenseLinear>& base,
               std::vector<Member>& members, const SessionResources& resources, std::vector<Turn>& turns) {
  Run run{"shared prefill", {}, 0.0};
  SharedSession<DenseLinear> session(base, resources);
  Sampler sampler = unwrap(Sampler::create(options.sampler));
  const std::vector<std::int32_t> stop = stop_tokens(tokenizer);
  const auto start = std::chrono::steady_clock::now();
  for (Turn& turn : turns) {
    const Agent& agent = agents[turn.agent];
    Member& member = members[turn.agent];
    session.append(turn.prompt);
    std::printf("\n== %s, turn %d (%s) ==\n", agent.name.c_str(), turn.turn + 1,
                codegemm::format_name(agent.format).c_str());
    std::fflush(stdout);

    ProgressLine progress("prefill by the base");
    AnswerPrinter printer(tokenizer);
    const double begin = seconds_since(start);
    Generation made = unwrap(session.decode(
        member.decode, member.workspace, DecodeLimits{options.max_tokens, stop},
        [&](std::span<float> logits) {
          turn.chosen.push_back(unwrap(sampler.sample(logits, turn.chosen)));
          return turn.chosen.back();
        },
        [&](std::int32_t token) {
          printer.push(token);
          return true;
        },
        [&](std::int64_t done, std::int64_t total) { progress.update(done, total, "tokens"); }));
    printer.end();
    turn.answer = made.tokens;
    session.append(turn.answer);  // the base prefills the answer before the next agent's call
    run.calls.push_back(Call{static_cast<int>(turn.agent), turn.turn, begin, std::move(made)});
  }
  run.seconds = seconds_since(start);
  return run;
}

int run(const SharedPrefillOptions& options) {
  const std::vector<Agent> agents = read_agents(options.agents);
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
  std::vector<Turn> turns = plan_turns(agents, options.document, tokenizer);

  codegemm::ThreadPool pool(options.threads);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  const ModelConfig config = unwrap(model_config(source->hyperparameters()));
  const std::int64_t context = context_of(turns, options, config.context_length);

  ProgressLine loading("loading " + options.model);
  const LoadedModel loaded = unwrap(load_model(
      *source, [&](std::int64_t done, std::int64_t total) { loading.update(done, total, "tensors"); }));
  // [guide: base]
  const PrefillModule<DenseLinear> base(loaded.model, CacheKey{options.model, loaded.fingerprint, ""});
  ForwardWorkspace base_workspace =
      unwrap(ForwardWorkspace::create(*loaded.model, kPrefillChunk, context, pool.workers()));
  // [guide: end]

  std::vector<Member> members;
  std::vector<AgentSummary> summaries;
  std::vector<std::shared_ptr<const LlamaModel<CodeGemmLinear>>> models;
  for (const Agent& agent : agents) {
    const std::string format = codegemm::format_name(agent.format);
    ProgressLine progress(codegemm::concat(agent.name, ": quantizing to ", format));
    models.push_back(unwrap(quantized_model(
        loaded, agent.format, options.cache, pool,
        [&](std::int64_t done, std::int64_t total) { progress.update(done, total, "layers"); })));
    summaries.push_back({agent.name, format, packed_bits(*models.back())});
    members.push_back({unwrap(factorize(base, models.back())),
                       unwrap(ForwardWorkspace::create(*models.back(), 1, context, pool.workers()))});
  }
  std::printf("document: %s\nsession: %zu agents, %zu calls, up to %lld tokens; %d threads\n",
              options.document.c_str(), agents.size(), turns.size(), static_cast<long long>(context),
              pool.workers());

  // One cache a session and one private tail; the separate run keeps a cache for every agent.
  const KvShape shape = kv_shape(config);
  const auto blocks_for = [&](std::int64_t tokens) { return tokens / shape.block_tokens + 2; };
  const auto agent_count = static_cast<std::int64_t>(agents.size());
  const std::int64_t blocks = agent_count * blocks_for(context) + blocks_for(options.max_tokens);
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, blocks));

  Run shared;
  {
    // [guide: resources]
    const auto allocator = unwrap(KvAllocator::create(storage));
    const SessionResources resources{allocator.get(), &storage, &base_workspace, &pool};
    // [guide: end]
    shared = run_shared(options, agents, tokenizer, base, members, resources, turns);
  }
  const Run separate = run_separate(turns, models, context, kPrefillChunk, storage, pool);

  print_report(shared, separate, summaries);
  SpecialistRound round(loaded, tokenizer, base, options.cache, pool);
  write_report(options.json, options.svg, shared, separate, summaries,
               scores_json(round.run(options.specialists, options.specialist_items)));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  SharedPrefillOptions options;
  CLI::App app{
      "Three agents on one prefill: decode modules at a few bits a weight over a shared base cache."};
  add_shared_prefill_options(app, options);
  return run_program("shared_prefill", app, argc, argv, [&] { return run(options); });
}
