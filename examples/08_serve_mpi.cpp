// SPDX-License-Identifier: Apache-2.0
//
// Agents in processes of their own: process 0 prefills for all of them, process i decodes as the i-th agent,
// and the base cache goes from one to the other layer by layer while it is being computed. On one machine or,
// with a host file, on many:
//
//   mpirun -n 4 serve_mpi --model FILE --document TEXT --agents JSON --cache FOLDER [--check]
//
// One process for each agent and one more. --check runs the same session in process 0 alone, with the session
// of 03_shared_prefill, and fails unless every text is the same.
// test: --model {model} --document {source}/tests/data/short_document.txt --agents {source}/tests/data/three_agents.json --cache {cache} --max-tokens 8 --check

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/agents.hpp>
#include <common/conversation.hpp>
#include <common/model_tokenizer.hpp>
#include <common/progress.hpp>
#include <common/quantized_model.hpp>
#include <common/sampler.hpp>
#include <prefillshare/serve/decode_server.hpp>
#include <prefillshare/serve/mpi_channel.hpp>
#include <prefillshare/serve/prefill_server.hpp>
#include <prefillshare/serve/session.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options {
  std::string model, document, agents, cache;
  std::int64_t max_tokens = 48;
  int threads = 1;
  bool dense = false;
  bool check = false;
};

constexpr std::int64_t kChunk = 256;        // tokens of a prefill step
constexpr WatchOptions kWatch{500, 60000};  // milliseconds; quantizing or loading may take a process long

KvTime now() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

/// What every process has: the model as loaded, its name and its limits.
struct Common {
  LoadedModel loaded;
  CacheKey key;
  std::int64_t context = 0;

  explicit Common(const Options& options) {
    const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
    loaded = unwrap(load_model(*source, {}));
    key = CacheKey{"base", loaded.fingerprint, ""};
    context = loaded.model->config.context_length;
  }
  [[nodiscard]] const ModelConfig& config() const { return loaded.model->config; }
};

/// Greedy, with the penalty that keeps a model this small from repeating itself.
class Chooser {
 public:
  std::int32_t operator()(std::uint64_t id, std::span<float> logits) {
    if (id != id_) chosen_.clear();  // one call after the other
    id_ = id;
    chosen_.push_back(unwrap(sampler_.sample(logits, chosen_)));
    return chosen_.back();
  }

 private:
  static SamplerOptions options() {
    SamplerOptions out;
    out.repetition_penalty = 1.1F;
    return out;
  }
  Sampler sampler_ = unwrap(Sampler::create(options()));
  std::uint64_t id_ = 0;
  std::vector<std::int32_t> chosen_;
};

/// A decode module of the agent's format, or the dense model itself, put into `use`.
template <class Use>
void with_decode_module(const Common& common, const Options& options, const Agent& agent, Executor& executor,
                        Use&& use) {
  if (options.dense) return use(unwrap(factorize(common.config(), common.loaded.model)));
  use(unwrap(factorize(common.config(),
                       unwrap(quantized_model(common.loaded, agent.format, options.cache, executor)))));
}

void decode_process(MpiChannel& channel, const Options& options, const Agent& agent) {
  codegemm::ThreadPool pool(options.threads);
  const Common common(options);
  const KvShape shape = kv_shape(common.config());
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, 2 * (common.context / shape.block_tokens + 1)));
  const auto allocator = unwrap(KvAllocator::create(storage));
  DecodeWorker worker(*allocator, storage, pool, 4);
  with_decode_module(common, options, agent, pool, [&](auto module) {
    static_cast<void>(unwrap(worker.add_module(std::move(module), 4, common.context)));
  });
  DecodeServerOptions server_options;
  server_options.watch = kWatch;
  DecodeServer<MpiChannel> server(worker, *allocator, storage, channel, common.config(), common.key,
                                  server_options);
  Chooser choose;
  bool met = false;
  while (!met || server.living_peers() > 0) {
    check(server.step(now(), choose));
    met = met || server.living_peers() > 0;
    if (worker.active() == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  check(server.last_loss());
}

/// One agent's call.
struct Turn {
  std::size_t agent = 0;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> answer;
};

/// The same session in this process alone. The answers.
std::vector<std::vector<std::int32_t>> one_process(const Common& common, const Options& options,
                                                   const std::vector<Agent>& agents,
                                                   const std::vector<Turn>& turns,
                                                   const std::vector<std::int32_t>& stop,
                                                   Executor& executor) {
  const KvShape shape = kv_shape(common.config());
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, 2 * (common.context / shape.block_tokens + 1)));
  const auto allocator = unwrap(KvAllocator::create(storage));
  const PrefillModule<DenseLinear> base(common.loaded.model, common.key);
  ForwardWorkspace workspace =
      unwrap(ForwardWorkspace::create(*common.loaded.model, kChunk, common.context, executor.workers()));
  SharedSession<DenseLinear> session(base, {allocator.get(), &storage, &workspace, &executor});
  Chooser choose;
  std::vector<std::vector<std::int32_t>> answers;
  for (const Turn& turn : turns) {
    session.append(turn.prompt);
    with_decode_module(common, options, agents[turn.agent], executor, [&](auto module) {
      ForwardWorkspace own =
          unwrap(ForwardWorkspace::create(module.model(), 1, common.context, executor.workers()));
      answers.push_back(
          unwrap(session.decode(
                     module, own, DecodeLimits{options.max_tokens, stop},
                     [&](std::span<float> logits) { return choose(answers.size() + 1, logits); },
                     [](std::int32_t) { return true; }))
              .tokens);
    });
    session.append(answers.back());
  }
  return answers;
}

void prefill_process(MpiChannel& channel, const Options& options, const std::vector<Agent>& agents) {
  codegemm::ThreadPool pool(options.threads);
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
  const std::vector<std::int32_t> stop = stop_tokens(tokenizer);
  const std::string document = read_text(options.document);
  std::vector<Turn> turns;
  Conversation conversation(tokenizer);
  for (std::size_t turn = 0; turn < agents.front().instructions.size(); ++turn) {
    for (std::size_t a = 0; a < agents.size(); ++a) {
      const std::string& instruction = agents[a].instructions[turn];
      turns.push_back(
          {a,
           conversation.user(turns.empty() ? codegemm::concat(document, "\n\n", instruction) : instruction),
           {}});
    }
  }

  const Common common(options);
  const KvShape shape = kv_shape(common.config());
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, 2 * (common.context / shape.block_tokens + 1)));
  const auto allocator = unwrap(KvAllocator::create(storage));
  const PrefillModule<DenseLinear> base(common.loaded.model, common.key);
  PrefillOptions prefill_options;
  prefill_options.chunk_tokens = kChunk;
  auto worker = unwrap(PrefillWorker<DenseLinear>::create(
      base, *allocator, storage,
      unwrap(ForwardWorkspace::create(*common.loaded.model, kChunk, common.context, pool.workers())), pool,
      prefill_options));
  PrefillServerOptions server_options;
  server_options.watch = kWatch;
  PrefillServer<DenseLinear, MpiChannel> server(base, worker, storage, channel, server_options);
  for (int process = 1; process < channel.size(); ++process) check(server.add_process(process, now()));

  std::vector<std::int32_t> context;
  std::uint64_t id = 0;
  for (Turn& turn : turns) {
    context.insert(context.end(), turn.prompt.begin(), turn.prompt.end());
    std::printf("\n== %s, in process %zu ==\n", agents[turn.agent].name.c_str(), turn.agent + 1);
    ServeRequest request;
    request.id = ++id;
    request.process = static_cast<int>(turn.agent) + 1;
    request.context = context;
    request.max_tokens = options.max_tokens;
    request.stop_tokens = stop;
    const KvTime start = now();
    KvTime first = 0;
    check(server.submit(std::move(request)));
    StreamDecoder stream(tokenizer);
    std::optional<Status> end;
    while (!end) {
      check(server.step(now(), [&](const ServeEvent& event) {
        if (event.kind != DecodeEvent::Kind::kToken) {
          end = event.status;
          return;
        }
        if (first == 0) first = now();
        turn.answer.push_back(event.token);
        std::fputs(unwrap(stream.push(event.token)).c_str(), stdout);
        std::fflush(stdout);
      }));
      if (worker.idle()) std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    std::printf("%s\n", stream.finish().c_str());
    check(*end);
    std::printf("(context %zu tokens, first token after %.2f s, %zu tokens in %.2f s)\n", context.size(),
                static_cast<double>(first - start) * 1e-3, turn.answer.size(),
                static_cast<double>(now() - start) * 1e-3);
    context.insert(context.end(), turn.answer.begin(), turn.answer.end());
  }
  server.leave();
  while (!unwrap(channel.flush())) std::this_thread::sleep_for(std::chrono::milliseconds(1));

  if (!options.check) return;
  const auto alone = one_process(common, options, agents, turns, stop, pool);
  for (std::size_t i = 0; i < turns.size(); ++i) {
    if (alone[i] == turns[i].answer) continue;
    throw UserError(codegemm::concat(
        "call ", i + 1, ": one process alone answers otherwise: ", unwrap(tokenizer.decode(alone[i]))));
  }
  std::printf("\nok: the %zu answers of one process alone are the same\n", turns.size());
}

int run(const Options& options) {
  MpiChannel channel = unwrap(MpiChannel::create(MPI_COMM_WORLD));
  const std::vector<Agent> agents = read_agents(options.agents);
  if (std::ssize(agents) != channel.size() - 1) {
    throw UserError(codegemm::concat(options.agents, ": ", agents.size(), " agents need mpirun -n ",
                                     agents.size() + 1, ", this is a job of ", channel.size()));
  }
  if (channel.rank() == 0) {
    prefill_process(channel, options, agents);
  } else {
    decode_process(channel, options, agents[static_cast<std::size_t>(channel.rank() - 1)]);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  Options options;
  CLI::App app{"Agents in processes of their own that share one prefill; run it with mpirun."};
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder of a Llama-family model")
      ->required();
  app.add_option("--document", options.document, "text that all agents read")->required();
  app.add_option("--agents", options.agents, "JSON: who takes part and what each is told")->required();
  app.add_option("--cache", options.cache, "folder for quantized weights")->required();
  app.add_option("--max-tokens", options.max_tokens, "longest answer")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "of each process; 0: one for each processor")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_flag("--dense", options.dense, "every agent decodes with the model as it is");
  app.add_flag("--check", options.check, "compare with one process alone");
  int code = 2;
  try {
    app.parse(argc, argv);
    code = run(options);
  } catch (const CLI::ParseError& e) {
    code = app.exit(e) == 0 ? 0 : 2;
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "serve_mpi: %s\n", e.what());
    MPI_Abort(MPI_COMM_WORLD, 2);  // the others wait for what does not come
  }
  MPI_Finalize();
  return code;
}
