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
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <common/agents.hpp>
#include <common/conversation.hpp>
#include <common/model_tokenizer.hpp>
#include <common/progress.hpp>
#include <common/quantized_model.hpp>
#include <common/report.hpp>
#include <common/run_program.hpp>
#include <common/sampler.hpp>
#include <common/specialists.hpp>
#include <prefillshare/serve/session.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string model, document, agents, cache, specialists, json, svg;
  std::size_t specialist_items = 5;
  std::int64_t max_tokens = 96;
  int threads = 0;
  SamplerOptions sampler;
};

/// One agent's call: what joins the context before it and, once it was run, what was answered.
struct Turn {
  int agent = 0;
  int turn = 0;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> chosen;  // every token that was sampled, a stop token included
  std::vector<std::int32_t> answer;  // the same without the stop token
};

/// An agent's models: the decode module that reads the base's cache and, for the comparison, a prefill
/// module out of the same weights.
struct Member {
  DecodeModule<CodeGemmLinear> decode;
  ForwardWorkspace decode_workspace;
  PrefillModule<CodeGemmLinear> own_prefill;
  ForwardWorkspace prefill_workspace;
};

constexpr std::int64_t kPrefillChunk = 512;  // tokens a forward pass: large enough for full GEMM speed

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// All calls of the session in order. The prompts do not depend on the answers.
std::vector<Turn> plan_turns(const std::vector<Agent>& agents, const std::string& document,
                             const Tokenizer& tokenizer) {
  std::vector<Turn> turns;
  Conversation conversation(tokenizer);
  for (std::size_t turn = 0; turn < agents.front().instructions.size(); ++turn) {
    for (std::size_t a = 0; a < agents.size(); ++a) {
      const std::string& instruction = agents[a].instructions[turn];
      turns.push_back(
          {static_cast<int>(a),
           static_cast<int>(turn),
           conversation.user(turns.empty() ? codegemm::concat(document, "\n\n", instruction) : instruction),
           {},
           {}});
    }
  }
  return turns;
}

/// The base prefills, the agents decode; the text streams to stdout.
Run run_shared(const Options& options, const std::vector<Agent>& agents, const Tokenizer& tokenizer,
               const PrefillModule<DenseLinear>& base, std::vector<Member>& members,
               const SessionResources& resources, std::vector<Turn>& turns) {
  Run run{"shared prefill", {}, 0.0};
  SharedSession<DenseLinear> session(base, resources);
  Sampler sampler = unwrap(Sampler::create(options.sampler));
  const std::vector<std::int32_t> stop = stop_tokens(tokenizer);
  const Clock::time_point start = Clock::now();
  for (Turn& turn : turns) {
    const Agent& agent = agents[static_cast<std::size_t>(turn.agent)];
    Member& member = members[static_cast<std::size_t>(turn.agent)];
    session.append(turn.prompt);
    std::printf("\n== %s, turn %d (%s) ==\n", agent.name.c_str(), turn.turn + 1,
                codegemm::format_name(agent.format).c_str());
    std::fflush(stdout);

    ProgressLine progress("prefill by the base");
    StreamDecoder stream(tokenizer);
    const double begin = seconds_since(start);
    Generation made = unwrap(session.decode(
        member.decode, member.decode_workspace, DecodeLimits{options.max_tokens, stop},
        [&](std::span<float> logits) {
          turn.chosen.push_back(unwrap(sampler.sample(logits, turn.chosen)));
          return turn.chosen.back();
        },
        [&](std::int32_t token) {
          std::fputs(unwrap(stream.push(token)).c_str(), stdout);
          std::fflush(stdout);
          return true;
        },
        [&](std::int64_t done, std::int64_t total) { progress.update(done, total, "tokens"); }));
    std::printf("%s\n", stream.finish().c_str());
    turn.answer = made.tokens;
    session.append(turn.answer);  // the base prefills the answer before the next agent's call
    run.calls.push_back(Call{turn.agent, turn.turn, begin, std::move(made)});
  }
  run.seconds = seconds_since(start);
  return run;
}

/// Every agent prefills the whole context with its own weights and keeps its own cache, as separate models
/// have to. The answers are those of the shared run, so that both runs do the same work.
Run run_separate(const std::vector<Turn>& turns, std::vector<Member>& members,
                 const SessionResources& resources) {
  Run run{"separate prefill per model", {}, 0.0};
  std::vector<SharedSession<CodeGemmLinear>> sessions;
  for (Member& member : members) {
    SessionResources own = resources;
    own.prefill_workspace = &member.prefill_workspace;
    sessions.emplace_back(member.own_prefill, own);
  }
  ProgressLine progress("the same session with separate prefill");
  const Clock::time_point start = Clock::now();
  for (const Turn& turn : turns) {
    for (auto& session : sessions) session.append(turn.prompt);
    Member& member = members[static_cast<std::size_t>(turn.agent)];
    const double begin = seconds_since(start);
    std::size_t next = 0;
    Generation made = unwrap(sessions[static_cast<std::size_t>(turn.agent)].decode(
        member.decode, member.decode_workspace,
        DecodeLimits{static_cast<std::int64_t>(turn.chosen.size()), {}},
        [&](std::span<float>) { return turn.chosen[next++]; }, [](std::int32_t) { return true; }));
    for (auto& session : sessions) session.append(turn.answer);
    run.calls.push_back(Call{turn.agent, turn.turn, begin, std::move(made)});
    progress.update(static_cast<std::int64_t>(run.calls.size()), static_cast<std::int64_t>(turns.size()),
                    "calls");
  }
  run.seconds = seconds_since(start);
  return run;
}

int run(const Options& options) {
  const std::vector<Agent> agents = read_agents(options.agents);
  const std::string document = read_text(options.document);
  if (document.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw UserError(options.document + ": the document is empty");
  }
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
  std::vector<Turn> turns = plan_turns(agents, document, tokenizer);

  codegemm::ThreadPool pool(options.threads);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  const ModelConfig config = unwrap(model_config(source->hyperparameters()));
  std::int64_t context = static_cast<std::int64_t>(turns.size()) * options.max_tokens;
  for (const Turn& turn : turns) context += static_cast<std::int64_t>(turn.prompt.size());
  if (context > config.context_length) {
    throw UserError(codegemm::concat(options.document, ": the session needs up to ", context,
                                     " tokens (document, instructions and ", turns.size(), " answers of ",
                                     options.max_tokens, "), the model's context length is ",
                                     config.context_length));
  }

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
  for (const Agent& agent : agents) {
    const std::string format = codegemm::format_name(agent.format);
    ProgressLine progress(codegemm::concat(agent.name, ": quantizing to ", format));
    const auto model = unwrap(quantized_model(
        loaded, agent.format, options.cache, pool,
        [&](std::int64_t done, std::int64_t total) { progress.update(done, total, "layers"); }));
    summaries.push_back(
        {agent.name, format,
         8.0 * static_cast<double>(linear_bytes(*model)) / static_cast<double>(linear_weights(*model))});
    members.push_back(
        {unwrap(factorize(base, model)), unwrap(ForwardWorkspace::create(*model, 1, context, pool.workers())),
         PrefillModule<CodeGemmLinear>(model, CacheKey{agent.name, loaded.fingerprint + format, ""}),
         unwrap(ForwardWorkspace::create(*model, kPrefillChunk, context, pool.workers()))});
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

  Run shared, separate;
  {
    // [guide: resources]
    const auto allocator = unwrap(KvAllocator::create(storage));
    const SessionResources resources{allocator.get(), &storage, &base_workspace, &pool};
    // [guide: end]
    shared = run_shared(options, agents, tokenizer, base, members, resources, turns);
  }
  {
    const auto allocator = unwrap(KvAllocator::create(storage));
    const SessionResources resources{allocator.get(), &storage, nullptr, &pool};
    separate = run_separate(turns, members, resources);
  }

  print_report(shared, separate, summaries);
  SpecialistRound round(loaded, tokenizer, base, options.cache, pool);
  const std::vector<SpecialistScore> scores = round.run(options.specialists, options.specialist_items);
  nlohmann::ordered_json report = report_json(shared, separate, summaries);
  if (!scores.empty()) report["specialists"] = scores_json(scores);
  check(codegemm::write_file(options.json, report.dump(2) + "\n"));
  check(codegemm::write_file(options.svg, report_svg(shared, separate, summaries)));
  std::printf("\nnumbers: %s\ntimeline: %s\n", options.json.c_str(), options.svg.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  options.sampler.repetition_penalty = 1.1F;  // a model this small repeats itself otherwise
  CLI::App app{
      "Three agents on one prefill: decode modules at a few bits a weight over a shared base cache."};
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder of a Llama-family model")
      ->required();
  app.add_option("--document", options.document, "text that all agents read")->required();
  app.add_option("--agents", options.agents, "JSON: who takes part and what each is told")->required();
  app.add_option("--cache", options.cache, "folder for quantized weights")->required();
  app.add_option(
      "--specialists", options.specialists,
      "folder of low-rank deltas, TASK.safetensors, that suite finetune-gpu wrote; none: left out");
  app.add_option("--specialist-items", options.specialist_items, "requests for each of them")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--max-tokens", options.max_tokens, "longest answer")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_option("--temperature", options.sampler.temperature, "0: greedy")->check(CLI::Range(0.0, 10.0));
  app.add_option("--repetition-penalty", options.sampler.repetition_penalty, "above 1: less of the same")
      ->check(CLI::Range(1.0, 10.0))
      ->capture_default_str();
  app.add_option("--seed", options.sampler.seed, "of the sampler");
  app.add_option("--json", options.json, "where the numbers go")->default_val("shared_prefill.json");
  app.add_option("--svg", options.svg, "where the timeline goes")->default_val("shared_prefill.svg");
  return run_program("shared_prefill", app, argc, argv, [&] { return run(options); });
}
