// SPDX-License-Identifier: Apache-2.0
//
// One prefill and three decode "processes" that only exchange messages: the answers are those of one process,
// a process that dies at any point costs its own requests alone, and what is hostile is given up with all it
// held.
#include <prefillshare/serve/decode_server.hpp>
#include <prefillshare/serve/prefill_server.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/mailbox.hpp>
#include <support/serve_harness.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::test;
using Kind = DecodeEvent::Kind;
using Model = std::shared_ptr<const LlamaModel<DenseLinear>>;

constexpr WatchOptions kWatch{10, 60};

/// A decode process: number 1, 2, ... of the mail.
struct DecodeProcess {
  CacheHarness cache;
  MailChannel channel;
  DecodeWorker worker;
  DecodeServer<MailChannel> server;

  DecodeProcess(Mail& mail, int self, const ModelConfig& base, const Model& model, std::int64_t blocks,
                Executor& executor, const DecodeServerOptions& options)
      : cache(base, blocks),
        channel(mail, self),
        worker(*cache.allocator, cache.storage, executor, 8),
        server(worker, *cache.allocator, cache.storage, channel, base, kBaseKey, options) {
    REQUIRE(worker.add_module(factorize(base, model).value(), 4, 256).ok());
  }
  void step(KvTime now) { REQUIRE(server.step(now, greedy).ok()); }
  [[nodiscard]] std::int64_t in_use() const { return cache.allocator->stats().in_use_blocks; }
};

struct Cluster {
  ModelConfig config = lined_config();
  codegemm::SerialExecutor serial;
  Mail mail;
  Model base = random_model(config, codegemm::test::seed_or(1));
  std::vector<Model> tasks;
  PrefillSide prefill{base, 64, {32, 3, 64}, serial};
  MailChannel channel{mail, 0};
  PrefillServer<DenseLinear, MailChannel> server{
      prefill.base, prefill.worker, prefill.cache.storage, channel, {1 << 20, kWatch}};
  std::vector<std::unique_ptr<DecodeProcess>> decode;  // process i + 1
  KvTime now = 0;
  Answers answers;

  explicit Cluster(std::int64_t blocks = 64, KvTime handoff_time = 1000) {
    for (int i = 0; i < 3; ++i) {
      tasks.push_back(random_model(config, codegemm::test::seed_or(2) + static_cast<std::uint64_t>(i)));
      DecodeServerOptions options;
      options.watch = kWatch;
      options.handoff_time = handoff_time;
      decode.push_back(
          std::make_unique<DecodeProcess>(mail, i + 1, config, tasks.back(), blocks, serial, options));
      REQUIRE(server.add_process(i + 1, now).ok());
    }
  }
  [[nodiscard]] static ServeRequest request(std::uint64_t id, int process, std::vector<std::int32_t> context,
                                            std::int64_t max_tokens) {
    ServeRequest out;
    out.id = id;
    out.process = process;
    out.context = std::move(context);
    out.max_tokens = max_tokens;
    return out;
  }
  void step() {
    ++now;
    REQUIRE(server.step(now, [&](const ServeEvent& event) { answers(event); }).ok());
    for (std::size_t i = 0; i < decode.size(); ++i) {
      if (!mail.dead.contains(static_cast<int>(i) + 1)) decode[i]->step(now);
    }
  }
  void run(KvTime most = 2000) {
    for (const KvTime end = now + most; server.active() > 0 && now < end;) step();
    REQUIRE(server.active() == 0);
  }
  void check_all_blocks_back() {
    for (int i = 0; i < 80; ++i) step();  // every loss is noticed
    CHECK(prefill.in_use() == 0);
    CHECK(prefill.cache.allocator->check_invariants().ok());
    for (std::size_t i = 0; i < decode.size(); ++i) {
      if (mail.dead.contains(static_cast<int>(i) + 1)) continue;
      CHECK(decode[i]->in_use() == 0);
      CHECK(decode[i]->server.idle());
      CHECK(decode[i]->server.handoffs().size() == 0);
      CHECK(decode[i]->cache.allocator->check_invariants().ok());
    }
  }
};

}  // namespace

TEST_CASE("three agents in three processes, turn after turn, answer as in one process") {
  Cluster cluster;
  Rng rng(5);
  std::vector<std::int32_t> context = random_tokens(rng, 40, 61);
  std::uint64_t id = 0;
  for (int turn = 0; turn < 3; ++turn) {
    for (int process = 1; process <= 3; ++process) {
      CAPTURE(turn, process);
      REQUIRE(cluster.server.submit(Cluster::request(++id, process, context, 7)).ok());
      cluster.run();
      const auto& answer = cluster.answers.by_id[id];
      CHECK((answer.ends == 1 && answer.last.kind == Kind::kLength));
      CHECK(answer.tokens == alone(cluster.base, cluster.tasks[static_cast<std::size_t>(process - 1)],
                                   context, 7, cluster.serial));
      context.insert(context.end(), answer.tokens.begin(), answer.tokens.end());
      context.push_back(3);
    }
  }
  // The base computed each token once, but for the last partly filled block of each call.
  CHECK(cluster.prefill.cache.allocator->stats().hit_tokens > 300);
  // Many at once, and one with nothing for the base to do.
  std::map<std::uint64_t, std::vector<std::int32_t>> contexts;
  for (int i = 0; i < 9; ++i) {
    contexts[++id] = random_tokens(rng, i == 4 ? 1 : 1 + rng.below(70), 61);
    REQUIRE(cluster.server.submit(Cluster::request(id, i % 3 + 1, contexts[id], 5)).ok());
  }
  cluster.run();
  for (const auto& [one, tokens] : contexts) {
    CHECK(cluster.answers.by_id[one].tokens == alone(cluster.base,
                                                     cluster.tasks[static_cast<std::size_t>((one - 10) % 3)],
                                                     tokens, 5, cluster.serial));
  }
  cluster.check_all_blocks_back();
}

TEST_CASE("a decode process that dies at any point costs its requests alone, which another answers") {
  for (const KvTime dies_at : {1, 2, 3, 4, 5, 7, 9}) {
    CAPTURE(dies_at);
    Cluster cluster;
    Rng rng(6);
    const auto context = random_tokens(rng, 90, 61);
    const auto other = random_tokens(rng, 60, 61);
    REQUIRE(cluster.server.submit(Cluster::request(1, 1, context, 6)).ok());
    REQUIRE(cluster.server.submit(Cluster::request(2, 2, other, 30)).ok());
    for (KvTime i = 0; i < dies_at; ++i) cluster.step();
    cluster.mail.dead.insert(1);
    cluster.run();
    const auto& lost = cluster.answers.by_id[1];
    REQUIRE(lost.ends == 1);
    CHECK(lost.last.status.code() == StatusCode::kIoError);
    CHECK(lost.last.status.message().find("process 1") != std::string::npos);
    CHECK(cluster.answers.by_id[2].tokens ==
          alone(cluster.base, cluster.tasks[1], other, 30, cluster.serial));
    CHECK_FALSE(cluster.server.alive(1));
    CHECK(cluster.server.submit(Cluster::request(9, 1, context, 6)).code() == StatusCode::kIoError);

    const std::int64_t before = cluster.prefill.cache.allocator->stats().hit_tokens;
    REQUIRE(cluster.server.submit(Cluster::request(3, 3, context, 6)).ok());
    cluster.run();
    CHECK(cluster.answers.by_id[3].tokens ==
          alone(cluster.base, cluster.tasks[2], context, 6, cluster.serial));
    // What the base had computed for the dead one, it has not computed again.
    if (dies_at >= 5) CHECK(cluster.prefill.cache.allocator->stats().hit_tokens - before >= 80);

    // It was only slow: what it says now is answered to nobody.
    cluster.mail.dead.clear();
    cluster.check_all_blocks_back();
    CHECK(cluster.answers.by_id[1].ends == 1);
  }
}

TEST_CASE("a prefill process that dies leaves no block behind in decode processes") {
  for (const KvTime dies_at : {1, 2, 3, 4, 6}) {
    CAPTURE(dies_at);
    Cluster cluster;
    Rng rng(7);
    REQUIRE(cluster.server.submit(Cluster::request(1, 1, random_tokens(rng, 120, 61), 100)).ok());
    REQUIRE(cluster.server.submit(Cluster::request(2, 1, random_tokens(rng, 90, 61), 100)).ok());
    for (KvTime i = 0; i < dies_at; ++i) cluster.step();
    DecodeProcess& decode = *cluster.decode[0];
    if (dies_at > 1) CHECK(decode.in_use() > 0);
    for (KvTime i = 0; i < 70; ++i) decode.step(++cluster.now);
    CHECK(decode.server.idle());
    CHECK(decode.in_use() == 0);
    CHECK_FALSE(decode.server.alive(0));
    CHECK(decode.server.last_loss().message().find("silent") != std::string::npos);
    CHECK(decode.cache.allocator->check_invariants().ok());
  }
}

TEST_CASE("what cannot be served is refused with its Status, and cancel gives everything back") {
  Cluster cluster(8);  // 128 tokens in each decode process
  Rng rng(8);
  const auto submit = [&](std::uint64_t id, int process, std::int64_t length, std::int64_t count,
                          ModuleId module = 0, KvTime limit = 0) {
    ServeRequest request = Cluster::request(id, process, random_tokens(rng, length, 61), count);
    request.module = module;
    request.time_limit = limit;
    return cluster.server.submit(std::move(request));
  };
  const auto code = [&](std::uint64_t id) { return cluster.answers.by_id[id].last.status.code(); };
  CHECK(submit(1, 4, 3, 3).code() == StatusCode::kNotFound);
  CHECK(submit(1, 1, 0, 3).code() == StatusCode::kInvalidArgument);
  REQUIRE(submit(1, 1, 20, 300).ok());  // over the context's limit
  CHECK(submit(1, 1, 20, 3).code() == StatusCode::kInvalidArgument);
  REQUIRE(submit(2, 1, 20, 3, 7).ok());       // no such module
  REQUIRE(submit(3, 1, 100, 50).ok());        // more than the pool has
  REQUIRE(submit(4, 2, 80, 30).ok());         // 7 blocks
  REQUIRE(submit(5, 2, 70, 30).ok());         // no room beside it
  REQUIRE(submit(6, 3, 60, 40, 0, 12).ok());  // a deadline that comes while it decodes
  cluster.run();
  CHECK(code(1) == StatusCode::kInvalidArgument);
  CHECK(code(2) == StatusCode::kNotFound);
  CHECK(code(3) == StatusCode::kInvalidArgument);
  CHECK(code(4) == StatusCode::kOk);
  CHECK(code(5) == StatusCode::kExhausted);
  CHECK(code(6) == StatusCode::kCancelled);
  CHECK(cluster.answers.by_id[6].tokens.size() < 40);
  CHECK(submit(7, 2, 70, 30).ok());  // there is room now
  cluster.run();
  CHECK(code(7) == StatusCode::kOk);

  // Two complete caches that leave no room for either's answer: the younger gives way, the older is answered.
  REQUIRE(submit(8, 1, 64, 40).ok());
  REQUIRE(submit(9, 1, 60, 40).ok());
  cluster.run();
  CHECK(code(8) == StatusCode::kOk);
  CHECK(code(9) == StatusCode::kExhausted);

  for (std::uint64_t id = 10; id < 16; ++id) {  // cancelled at every stage
    REQUIRE(submit(id, 3, 90, 20).ok());
    for (std::uint64_t i = 10; i < id; ++i) cluster.step();
    CHECK(cluster.server.cancel(id));
    cluster.run();
    CHECK((code(id) == StatusCode::kCancelled && cluster.answers.by_id[id].ends == 1));
    CHECK_FALSE(cluster.server.cancel(id));
  }
  cluster.check_all_blocks_back();

  // A prefill process that leaves takes all it has asked for with it.
  REQUIRE(submit(20, 1, 60, 40).ok());
  for (int i = 0; i < 4; ++i) cluster.step();
  CHECK(cluster.decode[0]->in_use() > 0);
  cluster.server.leave();
  cluster.run();
  CHECK(code(20) == StatusCode::kCancelled);
  CHECK(submit(21, 1, 60, 40).code() == StatusCode::kIoError);
  for (int i = 0; i < 3; ++i) cluster.step();
  for (const auto& process : cluster.decode) {
    CHECK(
        (process->in_use() == 0 && process->server.living_peers() == 0 && process->server.last_loss().ok()));
  }

  // A hand-off whose pages never come is given up by the decode process itself.
  Cluster slow(64, 20);
  Message message;
  write_message(AskMessage{77, 0, 4, 0, {}, random_tokens(rng, 50, 61)}, message);
  REQUIRE(slow.channel.send(1, message).ok());
  for (int i = 0; i < 5; ++i) slow.step();
  CHECK(slow.decode[0]->in_use() == 4);
  for (int i = 0; i < 25; ++i) slow.step();
  CHECK(slow.decode[0]->in_use() == 0);
}

TEST_CASE("a base that the decode process does not serve is told so, and given up") {
  Cluster cluster;
  ModelConfig other = cluster.config;
  other.rope.theta = 5e5;
  PrefillSide stranger(random_model(other, 1), 8, {16, 1, 4}, cluster.serial);
  MailChannel channel(cluster.mail, 9);
  PrefillServer<DenseLinear, MailChannel> server(stranger.base, stranger.worker, stranger.cache.storage,
                                                 channel, {1 << 20, kWatch});
  REQUIRE(server.add_process(1, 0).ok());
  REQUIRE(server.submit(Cluster::request(1, 1, {1, 2, 3}, 3)).ok());
  Answers answers;
  for (KvTime now = 1; now < 5; ++now) {
    cluster.step();
    REQUIRE(server.step(now, [&](const ServeEvent& event) { answers(event); }).ok());
  }
  CHECK(answers.by_id[1].last.status.code() == StatusCode::kIncompatible);
  CHECK(answers.by_id[1].last.status.message().find("rope theta: base 500000, decode 10000") !=
        std::string::npos);
  CHECK_FALSE(server.alive(1));
  cluster.check_all_blocks_back();
}

TEST_CASE(
    "messages of random and of changed bytes never get through, and what their sender held comes back") {
  const std::uint64_t seed = codegemm::test::seed_or(9);
  CAPTURE(seed);
  Rng rng(seed);
  std::int64_t lost = 0;
  for (int round = 0; round < 150; ++round) {
    CAPTURE(round);
    Mail mail;
    codegemm::SerialExecutor serial;
    const ModelConfig config = lined_config();
    static const Model model = random_model(config, 1);
    DecodeServerOptions options;
    options.watch = kWatch;
    DecodeProcess decode(mail, 1, config, model, 16, serial, options);
    MailChannel channel(mail, 0);
    std::vector<Message> script(4);
    write_message(HelloMessage{config, kBaseKey, 16}, script[0]);
    write_message(AskMessage{1, 0, 5, 0, {60}, random_tokens(rng, 34, 61)}, script[1]);
    for (int layer = 0; layer < 2; ++layer) {
      Message& pages = script[2 + static_cast<std::size_t>(layer)];
      write_message(PagesHeader{1, layer, 0, 3, 1}, pages);
      pages.resize(pages.size() + std::size_t{33} * 2 * 16 * sizeof(float));
    }
    // Unchanged, it is served.
    const bool change = round % 10 != 0;
    if (change) {
      Message& victim = script[static_cast<std::size_t>(rng.below(4))];
      switch (rng.below(4)) {
        case 0: victim.resize(static_cast<std::size_t>(rng.below(std::ssize(victim)))); break;
        case 1: victim.resize(victim.size() + static_cast<std::size_t>(1 + rng.below(9))); break;
        case 2:
          for (std::byte& byte : victim) byte = static_cast<std::byte>(rng.below(256));
          break;
        default:
          for (std::int64_t i = 0, n = 1 + rng.below(4); i < n; ++i) {
            const auto at =
                static_cast<std::size_t>(rng.below(std::min<std::int64_t>(std::ssize(victim), 48)));
            victim[at] = static_cast<std::byte>(rng.below(256));
          }
      }
    }
    for (const Message& message : script) REQUIRE(channel.send(1, message).ok());
    for (KvTime now = 0; now < 100; ++now) decode.step(now);
    if (!decode.server.last_loss().ok() &&
        decode.server.last_loss().message().find("silent") == std::string::npos) {
      ++lost;
    }
    CHECK(decode.server.idle());
    CHECK(decode.in_use() == 0);
    CHECK(decode.server.handoffs().size() == 0);
    CHECK(decode.cache.allocator->check_invariants().ok());
    if (!change)
      CHECK(decode.cache.allocator->stats().hit_tokens + decode.cache.allocator->stats().tree_blocks > 0);
  }
  CHECK(lost > 20);
}
