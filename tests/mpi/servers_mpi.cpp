// SPDX-License-Identifier: Apache-2.0
//
// One prefill process and three decode processes of an MPI job on a tiny model: the answers are those of one
// process alone. With --kill N, process 2 kills itself when its N-th message comes: the others go on, what it
// was to answer is prefilled for another, and every block comes back in every process that is left. With
// --flood, process 3 sends a message longer than any may be, and is given up for that.
//
// test: -n 4 -- --seed 1
// test: --enable-recovery -n 4 -- --seed 2 --kill 2
// test: --enable-recovery -n 4 -- --seed 3 --kill 9
// test: --enable-recovery -n 4 -- --seed 4 --kill 21
// test: -n 4 -- --seed 5 --flood
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include <common/unwrap.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/serve/decode_server.hpp>
#include <prefillshare/serve/mpi_channel.hpp>
#include <prefillshare/serve/prefill_server.hpp>
#include <prefillshare/serve/session.hpp>
#include <support/tiny_model.hpp>

namespace {

using namespace prefillshare;
using examples::check;
using examples::unwrap;
using test::random_model;
using Model = std::shared_ptr<const LlamaModel<DenseLinear>>;

constexpr int kProcesses = 4;
constexpr int kModules = 3;
constexpr int kVerdictTag = 7;
const CacheKey kKey{"base", "1", ""};

ModelConfig config() {
  ModelConfig out = test::tiny_config();
  out.hidden_size = 32;
  out.intermediate_size = 48;
  out.layers = 4;
  return out;
}

KvTime now() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

std::int32_t greedy(std::uint64_t /*id*/, std::span<float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

/// Storage and allocator of one process.
struct Pool {
  HostKvStorage storage = unwrap(HostKvStorage::create(kv_shape(config()), 64));
  std::unique_ptr<KvAllocator> allocator = unwrap(KvAllocator::create(storage));

  void check_all_back() const {
    check(allocator->check_invariants());
    const std::int64_t held = allocator->stats().in_use_blocks;
    if (held != 0) throw examples::UserError(codegemm::concat(held, " blocks did not come back"));
  }
};

/// An MpiChannel whose process is killed by the N-th message.
class DyingChannel {
 public:
  DyingChannel(MpiChannel& channel, std::int64_t dies_at) : channel_(&channel), left_(dies_at) {}

  [[nodiscard]] Status send(int peer, Message message) { return channel_->send(peer, std::move(message)); }
  [[nodiscard]] Result<std::optional<int>> receive(Message& message) {
    Result<std::optional<int>> from = channel_->receive(message);
    if (from.ok() && from->has_value() && --left_ == 0) kill(getpid(), SIGKILL);
    return from;
  }
  [[nodiscard]] std::int64_t queued_bytes(int peer) const { return channel_->queued_bytes(peer); }
  void give_up(int peer) { channel_->give_up(peer); }

 private:
  MpiChannel* channel_;
  std::int64_t left_;  // below 0: lives
};
static_assert(MessageChannel<DyingChannel>);

constexpr WatchOptions kWatch{50, 6000};  // others may keep the processor for seconds

void decode(MpiChannel& mpi, const std::vector<Model>& tasks, std::int64_t dies_at) {
  codegemm::SerialExecutor serial;
  Pool pool;
  DyingChannel channel(mpi, dies_at);
  DecodeWorker worker(*pool.allocator, pool.storage, serial, 8);
  for (const Model& task : tasks)
    static_cast<void>(unwrap(worker.add_module(unwrap(factorize(config(), task)), 4, 256)));
  DecodeServerOptions options;
  options.watch = kWatch;
  DecodeServer<DyingChannel> server(worker, *pool.allocator, pool.storage, channel, config(), kKey, options);
  bool met = false;
  while (!met || server.living_peers() > 0 || !server.idle()) {
    check(server.step(now(), greedy));
    met = met || server.living_peers() > 0;
    if (worker.active() == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  check(server.last_loss());
  pool.check_all_back();
}

/// What one process alone answers, all turns: each answer and two tokens more join the context.
std::vector<std::vector<std::int32_t>> alone(const Model& base, const std::vector<Model>& tasks,
                                             const std::vector<std::int32_t>& document, int turns) {
  codegemm::SerialExecutor serial;
  Pool pool;
  const PrefillModule<DenseLinear> module(base, kKey);
  ForwardWorkspace prefill = unwrap(ForwardWorkspace::create(*base, 32, 256, 1));
  ForwardWorkspace one = unwrap(ForwardWorkspace::create(*base, 1, 256, 1));
  SharedSession<DenseLinear> session(module, {pool.allocator.get(), &pool.storage, &prefill, &serial});
  session.append(document);
  std::vector<std::vector<std::int32_t>> out;
  for (int turn = 0; turn < turns; ++turn) {
    const auto decoder = unwrap(factorize(module, tasks[static_cast<std::size_t>(turn % kModules)]));
    out.push_back(unwrap(session.decode(
                             decoder, one, DecodeLimits{12, {}},
                             [](std::span<float> logits) { return greedy(0, logits); },
                             [](std::int32_t) { return true; }))
                      .tokens);
    session.append(out.back());
    session.append(std::vector<std::int32_t>{7, static_cast<std::int32_t>(turn)});
  }
  return out;
}

/// `bad`: the process that will be lost; 0: none.
void prefill(MpiChannel& channel, const Model& base, const std::vector<Model>& tasks, std::uint64_t seed,
             int bad) {
  codegemm::SerialExecutor serial;
  test::Rng rng(seed);
  const std::vector<std::int32_t> document = test::random_tokens(rng, 100, config().vocab_size);
  constexpr int kTurns = 9;
  const auto expected = alone(base, tasks, document, kTurns);

  Pool pool;
  const PrefillModule<DenseLinear> module(base, kKey);
  auto worker = unwrap(PrefillWorker<DenseLinear>::create(module, *pool.allocator, pool.storage,
                                                          unwrap(ForwardWorkspace::create(*base, 32, 256, 1)),
                                                          serial, {32, 4, 16}));
  PrefillServerOptions options;
  options.watch = kWatch;
  PrefillServer<DenseLinear, MpiChannel> server(module, worker, pool.storage, channel, options);
  for (int process = 1; process < kProcesses; ++process) check(server.add_process(process, now()));

  std::map<std::uint64_t, std::vector<std::int32_t>> answers;
  std::map<std::uint64_t, Status> ends;
  const auto on_event = [&](const ServeEvent& event) {
    if (event.kind == DecodeEvent::Kind::kToken) {
      answers[event.id].push_back(event.token);
    } else if (!ends.emplace(event.id, event.status).second) {
      throw examples::UserError(codegemm::concat("request ", event.id, " ended twice"));
    }
  };
  std::uint64_t next_id = 1;
  int again = 0;
  // Asks `process`, and the next one where that is lost.
  const auto answer = [&](const std::vector<std::int32_t>& context, ModuleId task, int process) {
    while (true) {
      for (int i = 1; !server.alive(process); ++i) {
        if (i == kProcesses) throw examples::UserError("every decode process was lost");
        process = process % (kProcesses - 1) + 1;
      }
      ServeRequest request;
      request.id = next_id++;
      request.process = process;
      request.module = task;
      request.context = context;
      request.max_tokens = 12;
      const std::uint64_t id = request.id;
      check(server.submit(std::move(request)));
      while (!ends.contains(id)) {
        check(server.step(now(), on_event));
        if (worker.idle()) std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
      if (ends[id].ok()) return answers[id];
      if (process != bad) check(ends[id]);
      if (ends[id].code() != (bad == 2 ? StatusCode::kIoError : StatusCode::kCorruptData)) check(ends[id]);
      ++again;
    }
  };
  std::vector<std::int32_t> context = document;
  for (int turn = 0; turn < kTurns; ++turn) {
    const auto got = answer(context, turn % kModules, turn % (kProcesses - 1) + 1);
    if (got != expected[static_cast<std::size_t>(turn)]) {
      throw examples::UserError(codegemm::concat("turn ", turn, ": another answer than in one process"));
    }
    context.insert(context.end(), got.begin(), got.end());
    context.insert(context.end(), {7, turn});
  }
  if ((bad == 2 && again == 0) || (bad == 0 && again > 0) || (bad != 0 && server.alive(bad))) {
    throw examples::UserError(codegemm::concat(again, " requests were asked again"));
  }
  server.leave();
  check(server.step(now(), on_event));
  pool.check_all_back();

  // The others' verdicts: without waiting for the dead.
  for (int process = 1; process < kProcesses; ++process) {
    if (process == bad) continue;
    int there = 0;
    for (int i = 0; i < 10000 && there == 0; ++i) {
      check(server.step(now(), on_event));
      MPI_Iprobe(process, kVerdictTag, MPI_COMM_WORLD, &there, MPI_STATUS_IGNORE);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    int good = 0;
    if (there != 0) MPI_Recv(&good, 1, MPI_INT, process, kVerdictTag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    if (good != 1) throw examples::UserError(codegemm::concat("process ", process, " is not well"));
  }
  std::printf("ok: %d answers as in one process, %d asked again\n", kTurns, again);
}

/// A message that no MpiChannel would send, and that none receives: it is never over.
void flood(const MpiChannel& channel) {
  static const std::vector<char> bytes(kMostMessageBytes + 1);
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Isend(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, 0, MpiChannel::kTag, channel.comm(),
            &request);
  MPI_Request_free(&request);
}

int run(std::uint64_t seed, std::int64_t dies_at, bool floods) {
  MpiChannel channel = unwrap(MpiChannel::create(MPI_COMM_WORLD));
  if (channel.size() != kProcesses) throw examples::UserError("needs mpirun -n 4");
  const Model base = random_model(config(), seed);
  std::vector<Model> tasks;
  tasks.reserve(kModules);
  for (int i = 0; i < kModules; ++i)
    tasks.push_back(random_model(config(), seed * 10 + static_cast<std::uint64_t>(i)));
  if (channel.rank() == 0) {
    prefill(channel, base, tasks, seed, dies_at > 0 ? 2 : floods ? 3 : 0);
    return 0;
  }
  if (floods && channel.rank() == 3) {
    flood(channel);
    return 0;
  }
  int good = 1;
  try {
    decode(channel, tasks, channel.rank() == 2 ? dies_at : 0);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "process %d: %s\n", channel.rank(), e.what());
    good = 0;
  }
  MPI_Send(&good, 1, MPI_INT, 0, kVerdictTag, MPI_COMM_WORLD);
  return good == 1 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  std::uint64_t seed = 1;
  std::int64_t dies_at = 0;
  CLI::App app{"One prefill and three decode processes on a tiny model."};
  app.add_option("--seed", seed);
  bool floods = false;
  app.add_flag("--flood", floods, "process 3 sends too long a message");
  app.add_option("--kill", dies_at, "process 2 dies with its N-th message");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e);
  }
  int code = 1;
  try {
    code = run(seed, dies_at, floods);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "servers_mpi: %s\n", e.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  if (dies_at > 0) {  // MPI_Finalize may wait for the dead one
    std::fflush(stdout);
    std::_Exit(code);
  }
  MPI_Finalize();
  return code;
}
