// SPDX-License-Identifier: Apache-2.0
//
// bench/support/multi_gpu_killed.cuh - a prefill process that is killed in the middle of a hand-off.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "multi_gpu_common.cuh"

namespace codegemm::bench::multi {

ModelConfig killed_config() { return llama_config(1024, 2816, 12, 8, 2, 32000); }
inline constexpr std::int64_t kKilledContext = 700;
inline constexpr std::int64_t kKilledBlocks = (kKilledContext - 1 + 15) / 16;
inline constexpr std::int64_t kKilledPool = 4 * kKilledBlocks;

// What the prefill process is told: where the decode worker's pool is and which blocks are to be filled.
struct KilledTask {
  cudaIpcMemHandle_t pool;
  BlockId blocks[kKilledBlocks];
};

inline void write_all(int file, const void* from, std::size_t bytes) {
  const auto* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t done = write(file, at, bytes);
    if (done <= 0) throw std::runtime_error("a pipe was closed");
    at += done;
    bytes -= static_cast<std::size_t>(done);
  }
}
inline bool read_all(int file, void* to, std::size_t bytes) {
  auto* at = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t done = read(file, at, bytes);
    if (done <= 0) return false;
    at += done;
    bytes -= static_cast<std::size_t>(done);
  }
  return true;
}

// A prefill worker: pool, model, and a prefill of the context that tells of each layer.
struct PrefillSide {
  Device device;
  Stream compute;
  Stream copies;
  DeviceLlama<Dense> model;
  KvPool pool;
  DeviceWorkspace<__half> workspace;
  PrefillBatch input;
  Sequence cache;

  explicit PrefillSide(int number)
      : device(device_of(number)),
        model(RandomLlama(take(Cublas::create()), 1).dense_model(killed_config())),
        pool(model.config, kKilledBlocks + 4, compute.get),
        workspace(take(DeviceWorkspace<__half>::create(model, 1024, 1, device))),
        input(take(PrefillBatch::create(1024, 1, 256))) {}

  template <class AfterLayer>
  void prefill(std::span<const std::int32_t> tokens, const char* version, AfterLayer&& after_layer) {
    cache.reset();
    cache = take(pool.allocator->open(CacheKey{"base", version, ""}, {}));
    check(pool.allocator->reserve(cache, std::ssize(tokens)));
    const Sequence* const one = &cache;
    const DeviceBatch batch =
        take(input.send(std::span(&tokens, 1), std::span(&one, 1), model.config.vocab_size, compute.get));
    check(forward(model, batch, pool.storage, {}, workspace, device, compute.get, after_layer));
    check(pool.allocator->commit(cache, tokens));
  }
};

// The prefill process, which its parent kills: fills the parent's blocks a layer at a time and says so.
inline int killed_child(int number) {
  KilledTask task;
  if (!read_all(STDIN_FILENO, &task, sizeof(task))) return 2;
  PrefillSide side(number);
  void* far = nullptr;
  check(cudaIpcOpenMemHandle(&far, task.pool, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
  const auto prompt = random_prompt(kKilledContext, side.model.config.vocab_size);
  const PageArray near_pages = pages_of(side.pool.storage, 0);
  side.prefill(std::span(prompt).first(kKilledContext - 1), "child", [&](int layer) -> Status {
    side.compute.wait();
    check(
        copy_pages(pages_of(side.pool.storage, layer), side.cache.blocks().first(kKilledBlocks),
                   {static_cast<std::byte*>(far) + layer * kKilledPool * near_pages.bytes, near_pages.bytes},
                   task.blocks, 32, side.copies.get));
    side.copies.wait();
    write_all(STDOUT_FILENO, &layer, sizeof(layer));
    std::this_thread::sleep_for(std::chrono::milliseconds(30));  // so that it is killed amid its layers
    return {};
  });
  std::this_thread::sleep_for(std::chrono::seconds(20));
  return 0;
}

inline void run_killed(int gpus, Rows& rows) {
  const auto expect = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("killed: not so: ") + what);
  };
  // The child has CUDA of its own: it is started before this process has any.
  int down[2], up[2];
  expect(pipe(down) == 0 && pipe(up) == 0, "pipe");
  const pid_t child = fork();
  expect(child >= 0, "fork");
  if (child == 0) {
    dup2(down[0], STDIN_FILENO);
    dup2(up[1], STDOUT_FILENO);
    for (const int file : {down[0], down[1], up[0], up[1]}) close(file);
    execl("/proc/self/exe", "multi-gpu", "--child", gpus > 1 ? "1" : "0", static_cast<char*>(nullptr));
    std::_Exit(127);
  }
  close(down[0]);
  close(up[1]);
  constexpr int kKillAfter = 4;  // layers of 12
  constexpr std::int32_t kDead = 1, kAlive = 2;

  // The decode worker, and beside it a prefill worker that lives.
  const ModelConfig config = killed_config();
  const Device device = device_of(0);
  Stream stream;
  KvPool pool(config, kKilledPool, stream.get);
  const auto decoder_model = RandomLlama(take(Cublas::create()), 5000).coded_model(config);
  GreedyDecoder<DeviceLlama<Coded, Dense>> decoder(decoder_model, pool, kKilledPool, device, stream.get);
  Table table(*pool.allocator, config.layers, 4);
  PrefillSide living(0);
  const auto prompt = random_prompt(kKilledContext, config.vocab_size);
  const auto other = random_prompt(kKilledContext, config.vocab_size, 7);
  const auto base_of = [](const std::vector<std::int32_t>& tokens) {
    return std::span(tokens).first(tokens.size() - 1);
  };
  const auto text_behind = [&](Sequence base, std::int32_t last) {
    std::vector<std::int32_t> text{decoder.first(base, last)};
    for (int k = 0; k < 31; ++k) text.push_back(decoder.next());
    decoder.end();
    return text;
  };
  auto transport = take(PeerPageTransport<__half, Table>::create(table, pool.storage, living.copies.get));
  const auto from_living = [&](const std::vector<std::int32_t>& tokens, const char* version) {
    const HandoffGrant grant =
        take(table.reserve(CacheKey{"base", version, ""}, base_of(tokens), {kAlive, kKvNever}));
    living.prefill(base_of(tokens), version, [&](int layer) {
      PageRun run;
      run.handoff = grant.id;
      run.layer = layer;
      run.blocks = living.cache.blocks().first(kKilledBlocks);
      run.last_tokens = (kKilledContext - 2) % 16 + 1;
      return transport.send(living.pool.storage, run, living.compute.get);
    });
    return grant.id;
  };
  const auto finish = [&](HandoffId id, std::int32_t last) {
    check(transport.drain());
    return text_behind(take(table.take(id)), last);
  };
  // What the sessions should say.
  const auto want = finish(from_living(prompt, "want"), prompt.back());
  const auto want_other = finish(from_living(other, "want"), other.back());
  expect(pool.allocator->stats().in_use_blocks == 0, "no block is in use before");

  // The session of the process that will be killed. Its blocks may be written from now on.
  const HandoffGrant grant =
      take(table.reserve(CacheKey{"base", "child", ""}, base_of(prompt), {kDead, kKvNever}));
  KilledTask task = {};
  for (int layer = 0; layer < config.layers; ++layer) {
    const auto blocks = take(table.begin(grant.id, layer, 0, kKilledBlocks));
    std::copy(blocks.begin(), blocks.end(), task.blocks);
  }
  check(cudaIpcGetMemHandle(&task.pool, pool.storage.layer(0)), "cudaIpcGetMemHandle");
  write_all(down[1], &task, sizeof(task));
  std::vector<int> arrived;
  for (int layer = 0; static_cast<int>(arrived.size()) < kKillAfter; arrived.push_back(layer)) {
    expect(read_all(up[0], &layer, sizeof(layer)), "the child tells of its layers");
    expect(take(table.finish(grant.id, layer, 0, kKilledBlocks)) == HandoffState::kFilling,
           "a part of the layers is no whole cache");
  }
  expect(!table.take(grant.id).ok(), "nothing decodes from a part of a cache");
  // Another session is under way when it dies.
  const HandoffId beside = from_living(other, "beside");
  const auto killed_at = Clock::now();
  expect(kill(child, SIGKILL) == 0, "kill");
  int status = 0;
  expect(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
         "the child was killed");
  int layer = 0;
  while (read_all(up[0], &layer, sizeof(layer))) {  // what it had said by then
    expect(take(table.finish(grant.id, layer, 0, kKilledBlocks)) == HandoffState::kFilling, "not complete");
    arrived.push_back(layer);
  }
  const std::int64_t aborted =
      table.abort_from(kDead, codegemm::error(StatusCode::kIoError, "the prefill process was killed"));
  expect(aborted == 1, "its hand-off is aborted, and no other");
  const std::int64_t held = pool.allocator->stats().in_use_blocks;
  // It is reaped, so it writes no more: what it had begun has failed, and the blocks go back.
  for (int index = 0; index < config.layers; ++index) {
    if (std::find(arrived.begin(), arrived.end(), index) == arrived.end())
      static_cast<void>(table.fail(grant.id, index, 0, kKilledBlocks).ok());
  }
  const std::int64_t left = pool.allocator->stats().in_use_blocks;
  expect(held - left == kKilledBlocks, "its blocks are held until it is reaped, and then returned");
  check(table.check_invariants());
  check(pool.allocator->check_invariants());
  expect(finish(beside, other.back()) == want_other, "the other session goes on, and its text is the same");
  // Prefilled again, elsewhere.
  const auto again = finish(from_living(prompt, "child"), prompt.back());
  const double recovered_us = us_since(killed_at);
  expect(again == want, "the session's text is the same");
  expect(table.size() == 0 && pool.allocator->stats().in_use_blocks == 0, "no block is lost");
  check(pool.allocator->check_invariants());
  close(down[1]);
  close(up[0]);
  rows.add("killed", {{"name", "a prefill process killed in the middle of a hand-off"},
                      {"gpus", std::min(gpus, 2)},
                      {"layers", config.layers},
                      {"layers_arrived", arrived.size()},
                      {"blocks_returned", held - left},
                      {"blocks_lost", pool.allocator->stats().in_use_blocks},
                      {"text_equal", true},
                      {"until_both_sessions_answered_us", recovered_us}});
}

}  // namespace codegemm::bench::multi
