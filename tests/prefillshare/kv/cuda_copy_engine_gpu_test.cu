// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/kv/cuda_copy_engine_gpu_test.cu - blocks between device, pinned memory and a file: every
// byte, in any order, while kernels write other blocks; failures; and under the allocator.
#include <prefillshare/kv/cuda_copy_engine.cuh>

#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <cuda_fp16.h>

#include <prefillshare/kv/allocator.hpp>

#include "../../codegemm/cuda/gpu.cuh"

namespace prefillshare::test {
namespace {

using codegemm::Status;
using codegemm::StatusCode;
using codegemm::test::gpu_or_skip;
using codegemm::test::Rng;
using Storage = cuda::DeviceKvStorage<__half>;

constexpr KvShape kShape{3, 2, 8, 4};
constexpr std::int64_t kPageWords = 2 * 4 * 2 * 8 / 2;  // of 4 bytes
constexpr std::int64_t kBlockBytes = 3 * kPageWords * 4;

__host__ __device__ std::uint32_t word_of(std::uint32_t content, std::int64_t layer, std::int64_t i) {
  return (content * 2654435761U) ^ static_cast<std::uint32_t>(layer * 1000 + i) * 40503U;
}

// Waits a while first, so that a copy that did not wait for this kernel would read what was there before.
__global__ void fill_block(std::uint32_t* data, std::int64_t blocks, std::int64_t block,
                           std::uint32_t content, long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
  for (std::int64_t i = threadIdx.x; i < kShape.layers * kPageWords; i += blockDim.x) {
    const std::int64_t layer = i / kPageWords;
    data[(layer * blocks + block) * kPageWords + i % kPageWords] = word_of(content, layer, i % kPageWords);
  }
}

// Streams, pinned memory and a storage of so many blocks.
struct Fixture {
  cudaStream_t kernels = nullptr;
  cudaStream_t out = nullptr;
  cudaStream_t in = nullptr;
  std::byte* pinned = nullptr;
  std::int64_t memory_blocks;
  std::int64_t staging_blocks;
  std::unique_ptr<Storage> storage;

  Fixture(std::int64_t blocks, std::int64_t memory, std::int64_t staging)
      : memory_blocks(memory), staging_blocks(staging) {
    for (cudaStream_t* stream : {&kernels, &out, &in}) {
      REQUIRE_CUDA(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
    }
    const auto bytes = static_cast<std::size_t>((memory + staging) * kBlockBytes);
    REQUIRE_CUDA(cudaMallocHost(reinterpret_cast<void**>(&pinned), bytes));
    std::fill_n(pinned, bytes, std::byte{0xEE});
    auto made = Storage::create(kShape, blocks, kernels);
    codegemm::test::require_ok(made.status());
    storage = std::make_unique<Storage>(std::move(made).value());
    REQUIRE(storage->bytes_per_block() == kBlockBytes);
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;
  ~Fixture() {
    cudaDeviceSynchronize();
    cudaFreeHost(pinned);
    for (cudaStream_t stream : {kernels, out, in}) cudaStreamDestroy(stream);
  }

  [[nodiscard]] cuda::CudaTiers tiers(std::int64_t file_blocks, std::int64_t queue) const {
    cuda::CudaTiers out_tiers;
    out_tiers.memory = {pinned, static_cast<std::size_t>(memory_blocks * kBlockBytes)};
    out_tiers.staging = {pinned + memory_blocks * kBlockBytes,
                         static_cast<std::size_t>(staging_blocks * kBlockBytes)};
    out_tiers.file_blocks = file_blocks;
    out_tiers.folder = std::filesystem::temp_directory_path().string();
    out_tiers.out = out;
    out_tiers.in = in;
    out_tiers.queue_size = queue;
    return out_tiers;
  }
  [[nodiscard]] std::unique_ptr<cuda::CudaCopyEngine> engine(std::int64_t file_blocks,
                                                             std::int64_t queue) const {
    auto made = cuda::CudaCopyEngine::create(cuda::device_blocks(*storage), tiers(file_blocks, queue));
    codegemm::test::require_ok(made.status());
    return std::move(made).value();
  }
  void fill(BlockId block, std::uint32_t content, long long cycles = 0) const {
    fill_block<<<1, 64, 0, kernels>>>(reinterpret_cast<std::uint32_t*>(storage->layer(0)), storage->blocks(),
                                      block, content, cycles);
    REQUIRE_CUDA(cudaGetLastError());
  }
  // Whether the block holds this and nothing else; after everything in the kernels' stream.
  [[nodiscard]] bool device_holds(BlockId block, std::uint32_t content) const {
    bool same = true;
    for (int layer = 0; layer < kShape.layers; ++layer) {
      std::vector<std::uint32_t> words(static_cast<std::size_t>(kPageWords));
      REQUIRE_CUDA(cudaMemcpyAsync(words.data(), storage->layer(layer) + block * storage->page_elements(),
                                   words.size() * 4, cudaMemcpyDeviceToHost, kernels));
      REQUIRE_CUDA(cudaStreamSynchronize(kernels));
      for (std::int64_t i = 0; i < kPageWords; ++i) {
        same = same && words[static_cast<std::size_t>(i)] == word_of(content, layer, i);
      }
    }
    return same;
  }
};

// Until so many copies have ended: their tickets and statuses.
std::vector<CopyResult> finish(cuda::CudaCopyEngine& engine, std::size_t count) {
  std::vector<CopyResult> out;
  for (int turn = 0; out.size() < count; ++turn) {
    REQUIRE(turn < 10'000'000);
    engine.work_one();
    CopyResult result;
    while (engine.poll(result)) out.push_back(result);
  }
  return out;
}

TEST_CASE("cuda copy engine: device, memory and file, random copies while kernels write") {
  static_cast<void>(gpu_or_skip());
  const std::uint64_t seed = codegemm::test::seed_or(11);
  CAPTURE(seed);
  Rng rng(seed);
  constexpr std::array<std::int64_t, 3> kSlots{8, 5, 6};
  constexpr std::size_t kQueue = 5;
  const Fixture f(kSlots[0], kSlots[1], 2);
  const auto engine = f.engine(kSlots[2], kQueue);
  REQUIRE(engine->slots(1) == kSlots[1]);
  REQUIRE(engine->slots(2) == kSlots[2]);
  struct Job {
    BlockPlace from;
    BlockPlace to;
  };
  std::array<std::vector<std::uint32_t>, 3> content;  // 0: nothing was written there
  for (std::size_t t = 0; t < 3; ++t) content[t].assign(static_cast<std::size_t>(kSlots[t]), 0U);
  std::vector<Job> jobs;  // by ticket
  std::vector<std::uint64_t> under_way;
  std::uint32_t next = 1;
  int refused = 0;
  std::array<int, 9> ways{};
  const auto at = [&](BlockPlace p) -> std::uint32_t& {
    return content[static_cast<std::size_t>(p.tier)][static_cast<std::size_t>(p.slot)];
  };
  const auto busy = [&](BlockPlace place, bool as_target) {
    for (const std::uint64_t ticket : under_way) {
      if (jobs[ticket].to == place || (as_target && jobs[ticket].from == place)) return true;
    }
    return false;
  };
  const auto take = [&](const CopyResult& result) {
    REQUIRE(result.status.ok());
    const auto found = std::find(under_way.begin(), under_way.end(), result.ticket);
    REQUIRE(found != under_way.end());
    under_way.erase(found);
    at(jobs[result.ticket].to) = at(jobs[result.ticket].from);
  };
  const auto somewhere = [&] {
    const auto tier = static_cast<int>(rng.below(3));
    return BlockPlace{tier, static_cast<std::int32_t>(rng.below(kSlots[static_cast<std::size_t>(tier)]))};
  };
  for (int step = 0; step < 6000; ++step) {
    switch (rng.below(4)) {
      case 0: {
        const auto block = static_cast<std::int32_t>(rng.below(kSlots[0]));
        if (busy({0, block}, true)) break;
        f.fill(block, next, rng.below(8) == 0 ? 200'000 : 0);
        at({0, block}) = next++;
        break;
      }
      case 1: {
        const BlockPlace from = somewhere();
        const BlockPlace to = somewhere();
        if (from.tier == to.tier || at(from) == 0 || busy(from, false) || busy(to, true)) break;
        const Status status = engine->start(from, to, jobs.size());
        if (under_way.size() == kQueue) {
          REQUIRE(status.code() == StatusCode::kExhausted);
          ++refused;
          CopyResult result;  // this thread is faster than the copies: let one end
          while (!engine->poll(result)) engine->work_one();
          take(result);
          break;
        }
        codegemm::test::require_ok(status);
        ++ways[static_cast<std::size_t>(from.tier * 3 + to.tier)];
        under_way.push_back(jobs.size());
        jobs.push_back({from, to});
        break;
      }
      case 2: engine->work_one(); break;
      case 3: {
        CopyResult result;
        if (engine->poll(result)) take(result);
        break;
      }
    }
  }
  for (const CopyResult& result : finish(*engine, under_way.size())) take(result);
  CHECK(refused > 0);
  for (const int way : {1, 2, 3, 5, 6, 7}) CHECK(ways[static_cast<std::size_t>(way)] > 20);
  for (BlockId block = 0; block < kSlots[0]; ++block) {
    if (at({0, block}) != 0) CHECK(f.device_holds(block, at({0, block})));
  }
  for (int tier = 1; tier < 3; ++tier) {  // and what lies below, by way of block 0
    for (std::int32_t slot = 0; slot < kSlots[static_cast<std::size_t>(tier)]; ++slot) {
      if (at({tier, slot}) == 0) continue;
      f.fill(0, 0xFFFFFFFFU);
      REQUIRE(engine->start({tier, slot}, {0, 0}, 7).ok());
      REQUIRE(finish(*engine, 1)[0].status.ok());
      CHECK(f.device_holds(0, at({tier, slot})));
    }
  }
}

TEST_CASE("cuda copy engine: what create() refuses, and copies that fail") {
  static_cast<void>(gpu_or_skip());
  const Fixture f(4, 4, 1);
  const cuda::DeviceBlocks blocks = cuda::device_blocks(*f.storage);
  const auto code_of = [&](const cuda::CudaTiers& tiers) {
    return cuda::CudaCopyEngine::create(blocks, tiers).status().code();
  };
  cuda::CudaTiers tiers = f.tiers(4, 4);
  std::vector<std::byte> pageable(static_cast<std::size_t>(4 * kBlockBytes));
  tiers.memory = pageable;
  CHECK(code_of(tiers) == StatusCode::kInvalidArgument);
  tiers = f.tiers(4, 4);
  tiers.staging = {};
  CHECK(code_of(tiers) == StatusCode::kInvalidArgument);
  tiers = f.tiers(4, 0);
  CHECK(code_of(tiers) == StatusCode::kInvalidArgument);
  tiers = f.tiers(4, 4);
  tiers.folder = "/no/such/folder";
  const auto no_folder = cuda::CudaCopyEngine::create(blocks, tiers);
  CHECK(no_folder.status().code() == StatusCode::kIoError);
  CHECK(no_folder.status().native_code() == ENOENT);

  // CUDA refuses: nothing was begun, and the next copy finds all places of the queue.
  cuda::DeviceBlocks nowhere = blocks;
  std::vector<std::byte> host(static_cast<std::size_t>(blocks.blocks * kBlockBytes));
  nowhere.data = host.data();  // not device memory
  auto wrong = cuda::CudaCopyEngine::create(nowhere, f.tiers(4, 1));
  codegemm::test::require_ok(wrong.status());
  for (int time = 0; time < 3; ++time) {
    const Status status = (*wrong)->start({0, 0}, {time % 2 == 0 ? 1 : 2, 0}, 1);
    CHECK(status.code() == StatusCode::kCudaError);
    CHECK(status.native_code() == static_cast<int>(cudaErrorInvalidValue));
  }
  CHECK(cudaGetLastError() == cudaSuccess);  // it was reported, and is not left for somebody else

  // The file's end cannot be written: the copy fails with errno, its block of staging is free again.
  const auto engine = f.engine(4, 4);
  f.fill(1, 5);
  f.fill(2, 6);
  rlimit before = {};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit small = before;
  small.rlim_cur = static_cast<rlim_t>(kBlockBytes);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  REQUIRE(engine->start({0, 1}, {2, 3}, 1).ok());
  REQUIRE(engine->start({0, 2}, {2, 0}, 2).ok());  // waits for the staging of the first
  const std::vector<CopyResult> results = finish(*engine, 2);
  REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(results[0].ticket == 1);
  CHECK(results[0].status.code() == StatusCode::kIoError);
  CHECK(results[0].status.native_code() == EFBIG);
  CHECK(results[1].ticket == 2);
  CHECK(results[1].status.ok());
  REQUIRE(engine->start({2, 0}, {0, 3}, 3).ok());
  REQUIRE(finish(*engine, 1)[0].status.ok());
  CHECK(f.device_holds(3, 6));
  CHECK(f.device_holds(1, 5));
}

TEST_CASE("cuda copy engine: a session that was evicted comes back from memory and from the file") {
  static_cast<void>(gpu_or_skip());
  const Fixture f(4, 2, 1);
  const auto engine = f.engine(16, 8);
  auto made = BasicKvAllocator<Storage>::create(*f.storage, {}, {}, {nullptr, engine.get()});
  codegemm::test::require_ok(made.status());
  auto& allocator = **made;
  std::thread file([&] { engine->work(); });  // the file has a thread of its own
  const CacheKey key{"m", "1", ""};
  const auto content_of = [](std::int32_t session, std::size_t block) {
    return static_cast<std::uint32_t>(session) * 100U + static_cast<std::uint32_t>(block) + 1U;
  };
  // Each session fills all four blocks of the device.
  const auto fill = [&](std::int32_t session) {
    const std::vector<std::int32_t> tokens(16, session);
    Sequence sequence = *allocator.open(key, tokens);
    Status status;
    for (int i = 0; i < 2'000'000 && !(status = allocator.reserve(sequence, 16)).ok(); ++i) allocator.poll();
    codegemm::test::require_ok(status);
    for (std::size_t b = 0; b < 4; ++b) f.fill(sequence.blocks()[b], content_of(session, b), 100'000);
    codegemm::test::require_ok(allocator.commit(sequence, tokens));
  };
  fill(1);
  fill(2);  // evicts the first, whose kernels may still run
  fill(3);
  for (const std::int32_t session : {1, 2}) {
    const std::vector<std::int32_t> tokens(16, session);
    Sequence again = *allocator.open(key, tokens);
    CHECK(again.length() == 0);
    auto begun = allocator.start_load(again, tokens);
    for (int i = 0; i < 2'000'000 && begun.status().code() == StatusCode::kExhausted; ++i) {
      allocator.poll();
      begun = allocator.start_load(again, tokens);
    }
    codegemm::test::require_ok(begun.status());
    CHECK(*begun > 0);
    auto loaded = allocator.finish_load(again);
    for (int i = 0; i < 2'000'000 && !loaded.ok(); ++i) {
      allocator.poll();
      loaded = allocator.finish_load(again);
    }
    codegemm::test::require_ok(loaded.status());
    REQUIRE(*loaded == *begun);
    for (std::size_t b = 0; b < static_cast<std::size_t>(*loaded / 4); ++b)
      CHECK(f.device_holds(again.blocks()[b], content_of(session, b)));
  }
  while (allocator.copies_under_way() > 0) allocator.poll();
  engine->stop();
  file.join();
  codegemm::test::require_ok(allocator.check_invariants());
}

}  // namespace
}  // namespace prefillshare::test
