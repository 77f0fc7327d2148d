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
#include <optional>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/agent_model.hpp>
#include <common/agent_options.hpp>
#include <common/agent_turns.hpp>
#include <common/agents.hpp>
#include <common/answer_printer.hpp>
#include <common/chooser.hpp>
#include <common/model_tokenizer.hpp>
#include <common/mpi_program.hpp>
#include <common/one_process.hpp>
#include <prefillshare/serve/decode_server.hpp>
#include <prefillshare/serve/mpi_channel.hpp>
#include <prefillshare/serve/prefill_server.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options : AgentOptions {
  bool dense = false;
  bool check = false;
};

constexpr std::int64_t kChunk = 256;        // tokens of a prefill step
constexpr WatchOptions kWatch{500, 60000};  // milliseconds; quantizing or loading may take a process long

KvTime now() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

void decode_process(MpiChannel& channel, const Options& options, const Agent& agent) {
  codegemm::ThreadPool pool(options.threads);
  const AgentModel model(options.model, options.cache, options.dense);
  HostKvStorage storage = model.storage();
  const auto allocator = unwrap(KvAllocator::create(storage));
  DecodeWorker worker(*allocator, storage, pool, 4);
  model.with_decode_module(agent.format, pool, [&](auto module) {
    static_cast<void>(unwrap(worker.add_module(std::move(module), 4, model.context)));
  });
  DecodeServerOptions server_options;
  server_options.watch = kWatch;
  DecodeServer<MpiChannel> server(worker, *allocator, storage, channel, model.config(), model.key,
                                  server_options);
  GreedyChooser choose;
  bool met = false;
  while (!met || server.living_peers() > 0) {
    check(server.step(now(), choose));
    met = met || server.living_peers() > 0;
    if (worker.active() == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  check(server.last_loss());
}

void prefill_process(MpiChannel& channel, const Options& options, const std::vector<Agent>& agents) {
  codegemm::ThreadPool pool(options.threads);
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
  const std::vector<std::int32_t> stop = stop_tokens(tokenizer);
  std::vector<Turn> turns = plan_turns(agents, options.document, tokenizer);

  const AgentModel model(options.model, options.cache, options.dense);
  HostKvStorage storage = model.storage();
  const auto allocator = unwrap(KvAllocator::create(storage));
  const PrefillModule<DenseLinear> base(model.loaded.model, model.key);
  PrefillOptions prefill_options;
  prefill_options.chunk_tokens = kChunk;
  auto worker = unwrap(PrefillWorker<DenseLinear>::create(
      base, *allocator, storage,
      unwrap(ForwardWorkspace::create(*model.loaded.model, kChunk, model.context, pool.workers())), pool,
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
    AnswerPrinter printer(tokenizer);
    std::optional<Status> end;
    while (!end) {
      check(server.step(now(), [&](const ServeEvent& event) {
        if (event.kind != DecodeEvent::Kind::kToken) {
          end = event.status;
          return;
        }
        if (first == 0) first = now();
        turn.answer.push_back(event.token);
        printer.push(event.token);
      }));
      if (worker.idle()) std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    printer.end();
    check(*end);
    std::printf("(context %zu tokens, first token after %.2f s, %zu tokens in %.2f s)\n", context.size(),
                static_cast<double>(first - start) * 1e-3, turn.answer.size(),
                static_cast<double>(now() - start) * 1e-3);
    context.insert(context.end(), turn.answer.begin(), turn.answer.end());
  }
  server.leave();
  while (!unwrap(channel.flush())) std::this_thread::sleep_for(std::chrono::milliseconds(1));

  if (!options.check) return;
  HostKvStorage own = model.storage();
  check_in_one_process(
      base, own, kChunk, turns, options.max_tokens, tokenizer, pool,
      [&](std::size_t agent, auto&& use) { model.with_decode_module(agents[agent].format, pool, use); });
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
  Options options;
  options.max_tokens = 48;
  options.threads = 1;
  CLI::App app{"Agents in processes of their own that share one prefill; run it with mpirun."};
  add_agent_options(app, options);
  app.add_flag("--dense", options.dense, "every agent decodes with the model as it is");
  app.add_flag("--check", options.check, "compare with one process alone");
  return run_mpi_program("serve_mpi", app, argc, argv, [&] { return run(options); });
}
