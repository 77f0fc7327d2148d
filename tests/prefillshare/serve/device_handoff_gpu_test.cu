// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/serve/device_handoff_gpu_test.cu - base caches handed from one pool in device memory to
// another, by a peer copy and as messages: every page arrives as it was, nothing else is written, and the
// hand-off is complete with the last page and not before. Between two GPUs where there are two.
#include <prefillshare/serve/cuda/peer_transport.cuh>
#include <prefillshare/serve/cuda/staged_pages.cuh>
#ifdef PREFILLSHARE_WITH_NCCL
#include <prefillshare/serve/cuda/nccl_wire.cuh>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <cuda_fp16.h>

#include <prefillshare/kv/allocator.hpp>

#include "../../codegemm/cuda/gpu.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_count;
using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::Rng;
using codegemm::test::seed_or;
using codegemm::test::Stream;
using codegemm::test::take;

using Storage = cuda::DeviceKvStorage<__half>;
using Allocator = BasicKvAllocator<Storage>;
using Table = HandoffTable<Allocator, std::mutex>;
const CacheKey kKey{"base", "1", ""};

void use(int device) { REQUIRE_CUDA(cudaSetDevice(device)); }
void reach_each_other(int a, int b) {
  if (a == b) return;
  for (const auto& [from, to] : {std::pair(a, b), std::pair(b, a)}) {
    use(from);
    const cudaError_t code = cudaDeviceEnablePeerAccess(to, 0);
    if (code != cudaErrorPeerAccessAlreadyEnabled) REQUIRE_CUDA(code);
    static_cast<void>(cudaGetLastError());
  }
}

KvShape shape() {
  KvShape out;
  out.layers = 3;
  out.kv_heads = 2;
  out.head_dim = 40;  // pages of 5,120 bytes: no multiple of what a block copies at once
  out.block_tokens = 16;
  return out;
}

// A pool on a device; the sending one is full of numbers, the receiving one of 0xFF.
struct Pool {
  int device;
  Stream stream;
  Storage storage;
  std::vector<std::uint16_t> host;  // what is in it

  Pool(int device_, std::int64_t blocks, bool filled)
      : device((use(device_), device_)), storage(take(Storage::create(shape(), blocks, stream.get))) {
    host.resize(static_cast<std::size_t>(blocks * storage.bytes_per_block()) / 2, 0xFFFF);
    Rng rng(77);
    if (filled) {
      for (std::uint16_t& x : host) x = static_cast<std::uint16_t>(rng.next());
    }
    REQUIRE_CUDA(cudaMemcpy(storage.layer(0), host.data(), host.size() * 2, cudaMemcpyHostToDevice));
    REQUIRE_CUDA(cudaDeviceSynchronize());
  }
  std::uint16_t* page(std::vector<std::uint16_t>& of, std::int64_t layer, BlockId block) const {
    return of.data() + (layer * storage.blocks() + block) * storage.page_elements();
  }
  std::vector<std::uint16_t> download() const {
    std::vector<std::uint16_t> out(host.size());
    REQUIRE_CUDA(cudaMemcpy(out.data(), storage.layer(0), out.size() * 2, cudaMemcpyDeviceToHost));
    return out;
  }
};

std::vector<std::int32_t> tokens_of(std::int64_t count, std::int32_t first) {
  std::vector<std::int32_t> out(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = first + static_cast<std::int32_t>(i);
  return out;
}

// The decode worker's side: a pool in which free blocks lie scattered, its allocator and its table.
struct Receiver {
  Pool pool;
  std::unique_ptr<Allocator> allocator;
  Table table;
  std::vector<Sequence> held;

  Receiver(int device, std::int64_t blocks, bool scattered)
      : pool(device, blocks, false),
        allocator(take(Allocator::create(pool.storage))),
        table(*allocator, shape().layers, 16) {
    if (!scattered) return;
    for (std::int64_t i = 0; i < blocks; ++i) {
      Sequence one = take(allocator->open(CacheKey{"held", std::to_string(i), ""}, {}));
      require_ok(allocator->reserve(one, 16));
      held.push_back(std::move(one));
    }
    for (std::size_t i = 0; i < held.size(); ++i) {
      if (i % 3 != 1) held[i].reset();
    }
  }
  std::int64_t in_use() const {
    std::int64_t kept = 0;
    for (const Sequence& s : held) kept += s.is_open() ? 1 : 0;
    return allocator->stats().in_use_blocks - kept;
  }
  void check() const {
    require_ok(table.check_invariants());
    require_ok(allocator->check_invariants());
  }
};

// The blocks of a sequence as the sender has them: scattered, or one piece.
std::vector<BlockId> blocks_of(std::int64_t count, bool scattered) {
  std::vector<BlockId> out;
  for (std::int64_t i = 0; i < count; ++i)
    out.push_back(static_cast<BlockId>(scattered ? (i * 7 + 3) % 31 : i + 5));
  return out;
}

// What should be in the receiver's pool once these blocks are there.
void expect(Receiver& to, Pool& from, std::span<const BlockId> sent, std::span<const BlockId> got) {
  REQUIRE(sent.size() == got.size());
  for (int layer = 0; layer < shape().layers; ++layer) {
    for (std::size_t i = 0; i < sent.size(); ++i) {
      std::copy_n(from.page(from.host, layer, sent[i]), from.storage.page_elements(),
                  to.pool.page(to.pool.host, layer, got[i]));
    }
  }
}
void check_pages(Receiver& to) {
  const std::vector<std::uint16_t> got = to.pool.download();
  CHECK(std::memcmp(got.data(), to.pool.host.data(), got.size() * 2) == 0);
}

PageRun run_of(HandoffId id, int layer, std::int64_t first, std::span<const BlockId> blocks,
               std::int64_t last_tokens) {
  PageRun run;
  run.handoff = id;
  run.layer = layer;
  run.first = first;
  run.blocks = blocks;
  run.last_tokens = last_tokens;
  return run;
}

// Pairs of devices to hand over between.
std::vector<std::pair<int, int>> pairs() {
  std::vector<std::pair<int, int>> out{{0, 0}};
  if (gpu_count() >= 2) {
    reach_each_other(0, 1);
    out.emplace_back(0, 1);
    out.emplace_back(1, 0);
  }
  return out;
}

// Bytes between two ends in one process, through memory of its own.
struct LocalWire {
  struct Piece {
    void* data;
    std::size_t bytes;
    cudaEvent_t sent;
  };
  std::deque<Piece> pieces;
  std::vector<Piece> over;

  LocalWire() = default;
  LocalWire(const LocalWire&) = delete;
  LocalWire& operator=(const LocalWire&) = delete;
  ~LocalWire() {
    cudaDeviceSynchronize();
    for (const Piece& p : pieces) free(p);
    for (const Piece& p : over) free(p);
  }
  static void free(const Piece& piece) {
    cudaFree(piece.data);
    cudaEventDestroy(piece.sent);
  }
  Status send(const void* from, std::size_t bytes, cudaStream_t stream) {
    Piece piece{nullptr, bytes, nullptr};
    REQUIRE_CUDA(cudaMalloc(&piece.data, bytes));
    REQUIRE_CUDA(cudaEventCreateWithFlags(&piece.sent, cudaEventDisableTiming));
    REQUIRE_CUDA(cudaMemcpyAsync(piece.data, from, bytes, cudaMemcpyDefault, stream));
    REQUIRE_CUDA(cudaEventRecord(piece.sent, stream));
    pieces.push_back(piece);
    return {};
  }
  Status receive(void* to, std::size_t bytes, cudaStream_t stream) {
    REQUIRE(!pieces.empty());
    const Piece piece = pieces.front();
    pieces.pop_front();
    REQUIRE(piece.bytes == bytes);
    REQUIRE_CUDA(cudaStreamWaitEvent(stream, piece.sent, 0));
    REQUIRE_CUDA(cudaMemcpyAsync(to, piece.data, bytes, cudaMemcpyDefault, stream));
    over.push_back(piece);
    return {};
  }
};

}  // namespace

TEST_CASE("pages are copied as plain loops do, any number of any size, and nothing else is written") {
  static_cast<void>(gpu_or_skip());
  Rng rng(seed_or(901));
  Stream stream;
  for (const std::int64_t bytes : {16, 5120, 8192, 65536 + 16}) {
    for (const std::int64_t count : {0, 1, 3, 480, 481, 1000}) {
      if (bytes * count > (8 << 20)) continue;
      const std::int64_t pages = count + 7;
      std::vector<std::uint32_t> words(static_cast<std::size_t>(pages * bytes / 4));
      for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(rng.next());
      codegemm::test::DeviceBuffer<std::uint32_t> from(words);
      codegemm::test::DeviceBuffer<std::uint32_t> to(words.size());
      to.poison();
      std::vector<BlockId> sources;
      std::vector<BlockId> targets;
      for (BlockId i = 0; i < static_cast<BlockId>(pages); ++i) targets.push_back(i);
      for (std::size_t i = targets.size(); i > 1; --i)
        std::swap(targets[i - 1], targets[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(i)))]);
      targets.resize(static_cast<std::size_t>(count));
      for (std::int64_t i = 0; i < count; ++i) sources.push_back(static_cast<BlockId>(rng.below(pages)));
      require_ok(cuda::copy_pages({from.data(), bytes}, sources, {to.data(), bytes}, targets,
                                  count % 2 == 0 ? 3 : 32, stream.get));
      REQUIRE_CUDA(cudaStreamSynchronize(stream.get));
      std::vector<std::uint32_t> want(words.size(), 0xFFFFFFFFU);
      for (std::size_t i = 0; i < sources.size(); ++i) {
        std::copy_n(words.data() + sources[i] * (bytes / 4), bytes / 4,
                    want.data() + targets[i] * (bytes / 4));
      }
      CAPTURE(bytes, count);
      const bool same = to.download() == want;  // not decomposed: a failure would print two million numbers
      CHECK(same);
      CHECK(to.guards_intact());
    }
  }
  const std::vector<BlockId> one{0};
  void* const some = reinterpret_cast<void*>(0x1000);
  CHECK(cuda::copy_pages({some, 16}, one, {some, 16}, {}, 1, nullptr).code() == StatusCode::kShapeMismatch);
  CHECK(cuda::copy_pages({some, 24}, one, {some, 24}, one, 1, nullptr).code() == StatusCode::kMisaligned);
}

TEST_CASE("a peer copy completes a hand-off with the last layer's last page, and an abort returns all") {
  static_cast<void>(gpu_or_skip());
  for (const auto& [a, b] : pairs()) {
    for (const bool scattered : {false, true}) {
      CAPTURE(a, b, scattered);
      Receiver to(b, 33, scattered);
      Pool from(a, 40, true);
      use(a);
      Stream copies;
      cuda::PeerTransportOptions options;
      options.most_under_way = 2;  // so that send() has to wait now and then
      {
        auto transport = take(
            cuda::PeerPageTransport<__half, Table>::create(to.table, to.pool.storage, copies.get, options));
        const auto tokens = tokens_of(5 * 16 + 9, 100);
        const auto grant = to.table.reserve(kKey, tokens).value();
        REQUIRE(grant.missing_blocks == 6);
        const std::vector<BlockId> sent = blocks_of(6, scattered);
        for (int layer = 0; layer < shape().layers; ++layer) {
          CHECK(to.table.take(grant.id).status().code() == StatusCode::kExhausted);
          // In two parts, the end first in one of the layers.
          const auto first = std::span<const BlockId>(sent).first(4);
          const auto rest = std::span<const BlockId>(sent).subspan(4);
          if (layer == 1)
            require_ok(transport.send(from.storage, run_of(grant.id, layer, 4, rest, 9), from.stream.get));
          require_ok(transport.send(from.storage, run_of(grant.id, layer, 0, first, 16), from.stream.get));
          if (layer != 1)
            require_ok(transport.send(from.storage, run_of(grant.id, layer, 4, rest, 9), from.stream.get));
        }
        require_ok(transport.drain());
        CHECK(transport.poll().value() == 0);
        Sequence sequence = take(to.table.take(grant.id));
        CHECK(sequence.length() == std::ssize(tokens));
        expect(to, from, sent, sequence.blocks());
        check_pages(to);
        to.check();
        sequence.reset();
        CHECK(to.in_use() == 0);

        // Aborted under way: what is being written keeps its blocks until then.
        const auto other = to.table.reserve(kKey, tokens_of(40, 1000)).value();
        const std::vector<BlockId> three = blocks_of(3, scattered);
        require_ok(transport.send(from.storage, run_of(other.id, 0, 0, three, 8), from.stream.get));
        CHECK(to.table.abort(other.id, error(StatusCode::kIoError, "the sender died")));
        CHECK(to.in_use() == 3);
        CHECK(transport.send(from.storage, run_of(other.id, 1, 0, three, 8), from.stream.get).code() ==
              StatusCode::kCancelled);
        require_ok(transport.drain());
        CHECK(to.in_use() == 0);
        CHECK(to.table.size() == 0);
        to.check();

        // Refused, and nothing is held or written.
        const auto last = to.table.reserve(kKey, tokens_of(20, 2000)).value();
        CHECK(transport.send(from.storage, run_of(last.id, 3, 0, three, 8), from.stream.get).code() ==
              StatusCode::kInvalidArgument);
        CHECK(transport.send(from.storage, run_of(last.id, 0, 0, three, 8), from.stream.get).code() ==
              StatusCode::kInvalidArgument);
        CHECK(to.table.abort(last.id, error(StatusCode::kCancelled, "over")));
        CHECK(to.in_use() == 0);
      }
      use(0);
    }
  }
}

TEST_CASE("staged pages complete hand-offs through messages, and what nobody wants is dropped") {
  static_cast<void>(gpu_or_skip());
  for (const auto& [a, b] : pairs()) {
    for (const bool scattered : {false, true}) {
      CAPTURE(a, b, scattered);
      Receiver to(b, 33, scattered);
      Pool from(a, 40, true);
      const std::int64_t bytes = cuda::pages_of(from.storage, 0).bytes;
      LocalWire wire;
      const auto options = [&](cudaStream_t messages, cudaStream_t copies, std::span<std::byte> staging) {
        cuda::StagedPageOptions out;
        out.wire = messages;
        out.copies = copies;
        out.staging = staging;
        out.chunk_pages = 2;
        out.most_under_way = 2;
        return out;
      };
      use(a);
      Stream send_wire, send_copies;
      auto send_memory =
          take(codegemm::cuda::DeviceArray<std::byte>::create(static_cast<std::size_t>(5 * bytes)));
      auto sender = take(cuda::StagedPageSender<__half, LocalWire>::create(
          wire, from.storage,
          options(send_wire.get, send_copies.get, {send_memory.data(), send_memory.size()})));
      use(b);
      Stream receive_wire, receive_copies;
      auto memory = take(codegemm::cuda::DeviceArray<std::byte>::create(static_cast<std::size_t>(5 * bytes)));
      using Ends = cuda::StagedPageReceiver<__half, Table, LocalWire>;
      auto receiver =
          take(Ends::create(wire, to.table, to.pool.storage,
                            options(receive_wire.get, receive_copies.get, {memory.data(), memory.size()})));
      CHECK(Ends::create(wire, to.table, to.pool.storage,
                         options(receive_wire.get, receive_copies.get, {memory.data(), 16}))
                .status()
                .code() == StatusCode::kWorkspaceTooSmall);

      const std::vector<BlockId> dropped = blocks_of(3, !scattered);
      const std::vector<BlockId> sent = blocks_of(6, scattered);
      const auto gone = to.table.reserve(kKey, tokens_of(40, 1000)).value();
      const auto grant = to.table.reserve(kKey, tokens_of(5 * 16 + 9, 100)).value();
      CHECK(to.table.abort(gone.id, error(StatusCode::kCancelled, "nobody waits")));
      for (int layer = 0; layer < shape().layers; ++layer) {
        for (const bool wanted : {false, true}) {
          const PageRun run =
              wanted ? run_of(grant.id, layer, 0, sent, 9) : run_of(gone.id, layer, 0, dropped, 8);
          CHECK(to.table.take(grant.id).status().code() == StatusCode::kExhausted);
          use(a);
          require_ok(sender.send(run, from.stream.get));
          use(b);
          const Status status = receiver.receive(cuda::notice_of(run));
          CHECK(status.code() == (wanted ? StatusCode::kOk : StatusCode::kNotFound));
        }
      }
      require_ok(receiver.drain());
      use(a);
      require_ok(sender.drain());
      CHECK(sender.poll().value() == 0);
      use(b);
      Sequence sequence = take(to.table.take(grant.id));
      expect(to, from, sent, sequence.blocks());
      check_pages(to);
      to.check();
      sequence.reset();
      CHECK(to.in_use() == 0);
      use(0);
    }
  }
}

TEST_CASE("staged pages travel by NCCL between two GPUs") {
#ifdef PREFILLSHARE_WITH_NCCL
  static_cast<void>(gpu_or_skip());
  if (gpu_count() < 2) TEST_SKIP("needs two GPUs");
  for (const bool scattered : {false, true}) {
    CAPTURE(scattered);
    Receiver to(1, 33, scattered);
    Pool from(0, 40, true);
    const std::int64_t bytes = cuda::pages_of(from.storage, 0).bytes;
    const auto grant = to.table.reserve(kKey, tokens_of(5 * 16 + 9, 100)).value();
    const std::vector<BlockId> sent = blocks_of(6, scattered);
    ncclUniqueId id;
    REQUIRE(ncclGetUniqueId(&id) == ncclSuccess);
    // Each end in a thread of its own, as NCCL wants it; what went wrong is told at the end.
    const auto end = [&](int rank) -> Status {
      if (cudaSetDevice(rank) != cudaSuccess) return error(StatusCode::kCudaError, "cudaSetDevice");
      ncclComm_t comm = nullptr;
      if (Status s = cuda::nccl_status(ncclCommInitRank(&comm, 2, id, rank), "ncclCommInitRank", rank, comm);
          !s.ok())
        return s;
      auto wire = cuda::NcclWire::create(comm, 1 - rank);
      if (!wire.ok()) return wire.status();
      cudaStream_t streams[2] = {};
      for (cudaStream_t& stream : streams) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      auto memory = codegemm::cuda::DeviceArray<std::byte>::create(static_cast<std::size_t>(4 * bytes));
      if (!memory.ok()) return memory.status();
      cuda::StagedPageOptions options;
      options.wire = streams[0];
      options.copies = streams[1];
      options.staging = {memory->data(), memory->size()};
      options.chunk_pages = 2;
      Status status;
      const auto keep = [&](const Status& s) {
        if (status.ok()) status = s;
      };
      if (rank == 0) {
        auto sender = cuda::StagedPageSender<__half, cuda::NcclWire>::create(*wire, from.storage, options);
        if (!sender.ok()) return sender.status();
        for (int layer = 0; layer < shape().layers; ++layer)
          keep(sender->send(run_of(grant.id, layer, 0, sent, 9), from.stream.get));
        keep(sender->drain());
      } else {
        auto receiver = cuda::StagedPageReceiver<__half, Table, cuda::NcclWire>::create(
            *wire, to.table, to.pool.storage, options);
        if (!receiver.ok()) return receiver.status();
        for (int layer = 0; layer < shape().layers; ++layer)
          keep(receiver->receive(cuda::notice_of(run_of(grant.id, layer, 0, sent, 9))));
        keep(receiver->drain());
      }
      for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
      keep(cuda::nccl_status(ncclCommDestroy(comm), "ncclCommDestroy", rank, nullptr));
      return status;
    };
    Status first;
    std::thread other([&] { first = end(0); });
    const Status second = end(1);
    other.join();
    require_ok(first);
    require_ok(second);
    use(1);
    Sequence sequence = take(to.table.take(grant.id));
    expect(to, from, sent, sequence.blocks());
    check_pages(to);
    to.check();
    sequence.reset();
    CHECK(to.in_use() == 0);
    use(0);
  }
#else
  TEST_SKIP("built without NCCL");
#endif
}

}  // namespace prefillshare::test
