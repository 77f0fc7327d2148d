// SPDX-License-Identifier: Apache-2.0
//
// bench/multi_gpu.cu - suite multi-gpu: what several GPUs add. Parts, each as far as the GPUs here allow:
//   link      bytes a second from one GPU to another, by copy engine and by kernel: the peak
//   sums      time of a sum over the ranks, by peer memory and by NCCL
//   handoff   base caches at the shapes of Llama-3.1-8B from a prefill GPU to a decode GPU: alone, and layer by
//             layer under the prefill; time to the first token, and that the text is one GPU's
//   logits    a small model of codes spread over the GPUs against the same on one
//   parallel  decode at the shapes of Llama-3.1-70B, 2 bits a weight, on 1, 2, 4, ... GPUs
//   killed    a prefill process killed in the middle of a hand-off: what becomes of its blocks and its session
// With one GPU, handoff and killed run between two pools on it.
//
// usage: multi-gpu [--json FILE] [--quick] [--part NAME]... [--steps N]
//   FILE keeps the rows of parts that are not run.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <codegemm/shard.hpp>
#include <prefillshare/model/cuda/peer_group.cuh>
#include <prefillshare/model/shard.hpp>
#include <prefillshare/serve/cuda/peer_transport.cuh>
#ifdef PREFILLSHARE_WITH_NCCL
#include <prefillshare/serve/cuda/nccl_wire.cuh>
#endif

#include "support/gpu_program.hpp"
#include "support/gpu_timing.cuh"
#include "support/random_llama.cuh"
#include "support/report.hpp"

namespace {

using namespace prefillshare;
using namespace prefillshare::cuda;
using namespace codegemm::bench;
using Clock = std::chrono::steady_clock;
using Table = HandoffTable<DeviceKvAllocator<__half>, std::mutex>;

struct Options {
  std::string json;
  std::vector<std::string> parts;
  bool quick = false;
  int steps = 100;
};

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}
int gpu_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}
void use(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }
Device device_of(int number) {
  use(number);
  return take(codegemm::cuda::query_device(number));
}
// Every GPU reaches every other's memory from now on.
void enable_peers(int gpus) {
  for (int a = 0; a < gpus; ++a) {
    use(a);
    for (int b = 0; b < gpus; ++b) {
      if (a == b) continue;
      int can = 0;
      check(cudaDeviceCanAccessPeer(&can, a, b), "cudaDeviceCanAccessPeer");
      if (can == 0)
        throw std::runtime_error("GPU " + std::to_string(a) + " does not reach GPU " + std::to_string(b));
      const cudaError_t code = cudaDeviceEnablePeerAccess(b, 0);
      if (code != cudaErrorPeerAccessAlreadyEnabled) check(code, "cudaDeviceEnablePeerAccess");
      static_cast<void>(cudaGetLastError());
    }
  }
  use(0);
}

// A stream of the current device; `first`: before the others' work.
struct Stream {
  cudaStream_t get = nullptr;
  explicit Stream(bool first = false) {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&get, cudaStreamNonBlocking, first ? greatest : least),
          "cudaStreamCreateWithPriority");
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(get); }
  void wait() const { check(cudaStreamSynchronize(get), "cudaStreamSynchronize"); }
};

// body(rank) in a thread for each rank, whose GPU is current; what one throws ends the program, for the others
// would wait for it.
void on_ranks(int ranks, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        use(r);
        body(r);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "multi-gpu: rank %d: %s\n", r, e.what());
        std::fflush(nullptr);
        std::_Exit(1);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  use(0);
}

// Mailboxes of all ranks, and each one's group.
struct Peers {
  std::vector<DeviceArray<std::byte>> boxes;
  std::vector<void*> pointers;
  std::vector<PeerGroup> groups;

  Peers(int ranks, const PeerGroup::Options& options) {
    for (int r = 0; r < ranks; ++r) {
      use(r);
      boxes.push_back(take(DeviceArray<std::byte>::zeros(PeerGroup::mailbox_bytes(ranks, options.most))));
      pointers.push_back(boxes.back().data());
    }
    for (int r = 0; r < ranks; ++r)
      groups.push_back(take(PeerGroup::create(r, pointers, device_of(r), options)));
    use(0);
  }
};

#ifdef PREFILLSHARE_WITH_NCCL
void nccl_check(ncclResult_t code, const char* what, int rank) {
  check(nccl_status(code, what, rank, nullptr));
}
struct Communicators {
  std::vector<ncclComm_t> comms;
  explicit Communicators(int ranks) : comms(static_cast<std::size_t>(ranks)) {
    ncclUniqueId id;
    nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId", 0);
    on_ranks(ranks, [&](int r) {
      nccl_check(ncclCommInitRank(&comms[static_cast<std::size_t>(r)], ranks, id, r), "ncclCommInitRank", r);
    });
  }
  Communicators(const Communicators&) = delete;
  Communicators& operator=(const Communicators&) = delete;
  ~Communicators() {
    on_ranks(static_cast<int>(comms.size()),
             [&](int r) { ncclCommDestroy(comms[static_cast<std::size_t>(r)]); });
  }
};
#endif

struct Rows {
  nlohmann::json rows = nlohmann::json::array();
  void add(const char* part, nlohmann::json row) {
    row["part"] = part;
    std::printf("%s\n", row.dump().c_str());
    std::fflush(stdout);
    rows.push_back(std::move(row));
  }
};

// ---- link

double copy_gb_per_s(cudaStream_t stream, double bytes, const std::function<void()>& copy) {
  std::vector<double> times;
  for (int i = 0; i < 6; ++i) {
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    const auto start = Clock::now();
    copy();
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    if (i > 0) times.push_back(us_since(start));
  }
  return bytes / median(times) * 1e-3;
}

// The most that any way of copying reaches, GB/s.
double link_peak(int to, Rows* rows) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  use(to);
  auto target = device_array<std::byte>(kBytes);
  use(0);
  auto source = device_array<std::byte>(kBytes);
  check(cudaMemset(source.data(), 0x5A, kBytes), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaMemset");
  Stream stream;
  double peak = 0.0;
  const auto tell = [&](const char* how, int blocks, double speed) {
    peak = std::max(peak, speed);
    if (rows != nullptr) rows->add("link", {{"name", how}, {"blocks", blocks}, {"gb_per_s", speed}});
  };
  tell("cudaMemcpyPeer", 0, copy_gb_per_s(stream.get, kBytes, [&] {
         check(cudaMemcpyPeerAsync(target.data(), to, source.data(), 0, kBytes, stream.get),
               "cudaMemcpyPeerAsync");
       }));
  const BlockId zero = 0;
  for (const int blocks : {4, 8, 16, 32, 64, 132}) {
    tell("copy kernel", blocks, copy_gb_per_s(stream.get, kBytes, [&] {
           check(copy_pages({source.data(), kBytes}, std::span(&zero, 1), {target.data(), kBytes},
                            std::span(&zero, 1), blocks, stream.get));
         }));
  }
  return peak;
}

// ---- sums

template <class Group>
void measure_sums(const char* kind, int ranks, const std::function<const Group&(int)>& group, Rows& rows) {
  std::barrier all(ranks);
  for (const std::int64_t count : {8192, 8 * 8192, 32 * 8192, 256 * 8192}) {
    double us = 0.0;
    on_ranks(ranks, [&](int r) {
      constexpr int kSums = 50;
      Stream stream;
      auto data = take(DeviceArray<float>::zeros(static_cast<std::size_t>(count)));
      const MatrixView<float> x(data.data(), 1, count);
      all.arrive_and_wait();
      check(group(r).sum(x, stream.get));  // whatever the first call makes is made
      stream.wait();
      all.arrive_and_wait();
      const Replay graph(stream.get, kSums, [&](int) { check(group(r).sum(x, stream.get)); });
      std::vector<double> times;
      for (int i = 0; i < 12; ++i) {
        all.arrive_and_wait();
        const auto start = Clock::now();
        graph.enqueue();
        graph.wait();
        if (i > 1) times.push_back(us_since(start) / kSums);
      }
      if (r == 0) us = median(times);
      all.arrive_and_wait();
    });
    rows.add("sums", {{"name", kind},
                      {"gpus", ranks},
                      {"bytes", count * 4},
                      {"us", us},
                      {"gb_per_s", static_cast<double>(count) * 4.0 / us * 1e-3}});
  }
}

// ---- handoff

ModelConfig handoff_config(bool quick) {
  ModelConfig c = llama_8b();
  if (quick) c.layers = 8;
  return c;
}

// A prefill GPU with the dense base model, and on it and the decode GPU the same decode module of codes.
class HandoffSuite {
 public:
  using Base = DeviceLlama<Dense>;
  using Decode = DeviceLlama<Coded, Dense>;
  static constexpr std::int64_t kChunk = 2048;
  static constexpr std::int64_t kMostContext = 16384;
  static constexpr std::int64_t kPool = 2 * kMostContext / 16 + 64;  // a cache and the next one

  HandoffSuite(const Options& options, int to, double peak, Rows& rows)
      : options_(options),
        to_(to),
        peak_(peak),
        rows_(rows),
        config_(handoff_config(options.quick)),
        here_(device_of(0)),
        there_(device_of(to)) {
    use(0);
    compute_ = std::make_unique<Stream>();
    copies_ = std::make_unique<Stream>(true);
    wire_ = std::make_unique<Stream>(true);
    base_ = std::make_unique<Base>(RandomLlama(take(Cublas::create()), 1).dense_model(config_));
    near_model_ = std::make_unique<Decode>(RandomLlama(take(Cublas::create()), 5000).coded_model(config_));
    near_ = std::make_unique<KvPool>(config_, kPool, compute_->get);
    workspace_ = std::make_unique<DeviceWorkspace<__half>>(
        take(DeviceWorkspace<__half>::create(*base_, kChunk, 1, here_)));
    input_ = std::make_unique<PrefillBatch>(take(PrefillBatch::create(kChunk, 1, kPool)));
    near_decoder_ =
        std::make_unique<GreedyDecoder<Decode>>(*near_model_, *near_, kPool, here_, compute_->get);
    use(to);
    far_stream_ = std::make_unique<Stream>();
    far_copies_ = std::make_unique<Stream>(true);
    far_wire_ = std::make_unique<Stream>(true);
    far_model_ = std::make_unique<Decode>(RandomLlama(take(Cublas::create()), 5000).coded_model(config_));
    far_ = std::make_unique<KvPool>(config_, kPool, far_stream_->get);
    far_decoder_ =
        std::make_unique<GreedyDecoder<Decode>>(*far_model_, *far_, kPool, there_, far_stream_->get);
    table_ = std::make_unique<Table>(*far_->allocator, config_.layers, 4);
    use(0);
  }

  void run(std::int64_t context) {
    tokens_ = random_prompt(context, config_.vocab_size, static_cast<std::uint64_t>(context));
    const double bytes =
        static_cast<double>((context - 1 + 15) / 16) * static_cast<double>(near_->storage.bytes_per_block());
    // The prefill alone.
    std::vector<double> times;
    Sequence cache;
    for (int i = 0; i < 4; ++i) {
      cache.reset();
      const auto start = Clock::now();
      cache = prefill([](const PageRun&) { return Status(); }, 0);
      compute_->wait();
      if (i > 0) times.push_back(us_since(start));
    }
    const double prefill_us = median(times);
    // One GPU's first token and text.
    const auto [near_us, near_text] = first_token("same GPU", [&] {
      Sequence own = prefill([](const PageRun&) { return Status(); }, 0);
      return std::pair(std::move(own), false);
    });
    for (const int blocks : {8, 16, 32, 64}) {
      PeerTransportOptions peer;
      peer.blocks = blocks;
      auto transport =
          take(PeerPageTransport<__half, Table>::create(*table_, far_->storage, copies_->get, peer));
      // All of a cache that is there.
      const double alone_us = median_of(5, [&] {
        const HandoffGrant grant = reserve();
        const auto start = Clock::now();
        send_all(cache, grant.id,
                 [&](const PageRun& run) { check(transport.send(near_->storage, run, compute_->get)); });
        check(transport.drain());
        const double us = us_since(start);
        take(table_->take(grant.id)).reset();
        return us;
      });
      // Layer by layer under the prefill.
      const auto overlapped = [&] {
        const HandoffGrant grant = reserve();
        Sequence own = prefill(
            [&](const PageRun& run) { return transport.send(near_->storage, run, compute_->get); }, grant.id);
        check(transport.drain());
        return std::pair(take(table_->take(grant.id)), true);
      };
      const double under_us = median_of(3, [&] {
        const auto start = Clock::now();
        overlapped().first.reset();
        return us_since(start);
      });
      const auto [far_us, far_text] = first_token("peer", overlapped);
      tell("peer copy", blocks, context, bytes, alone_us, prefill_us, under_us, near_us, far_us,
           far_text == near_text);
    }
    copy_engine(cache, context, bytes);
#ifdef PREFILLSHARE_WITH_NCCL
    if (to_ != 0) nccl(cache, context, bytes, prefill_us, near_us, near_text);
#endif
  }

 private:
  template <class Body>
  static double median_of(int times, Body&& body) {
    std::vector<double> all;
    for (int i = 0; i <= times; ++i) {
      const double us = body();
      if (i > 0) all.push_back(us);
    }
    return median(all);
  }

  CacheKey fresh_key() { return CacheKey{"bench", codegemm::concat(keys_++), ""}; }
  std::span<const std::int32_t> base_tokens() const { return std::span(tokens_).first(tokens_.size() - 1); }
  HandoffGrant reserve() { return take(table_->reserve(fresh_key(), base_tokens())); }

  // The base cache of all tokens but the last; on_pages(run) as each layer of each chunk is in the stream.
  Sequence prefill(const std::function<Status(const PageRun&)>& on_pages, HandoffId id) {
    const auto tokens = base_tokens();
    Sequence cache = take(near_->allocator->open(fresh_key(), {}));
    check(near_->allocator->reserve(cache, std::ssize(tokens)));
    for (std::int64_t done = 0; done < std::ssize(tokens);) {
      const std::int64_t count = std::min(kChunk, std::ssize(tokens) - done);
      const auto chunk = tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count));
      const Sequence* const one = &cache;
      const DeviceBatch batch =
          take(input_->send(std::span(&chunk, 1), std::span(&one, 1), config_.vocab_size, compute_->get));
      PageRun run;
      run.handoff = id;
      run.first = done / 16;
      run.blocks = cache.blocks().subspan(static_cast<std::size_t>(run.first),
                                          static_cast<std::size_t>((count + 15) / 16));
      run.last_tokens = (count - 1) % 16 + 1;
      check(forward(*base_, batch, near_->storage, {}, *workspace_, here_, compute_->get, [&](int layer) {
        run.layer = layer;
        return on_pages(run);
      }));
      check(near_->allocator->commit(cache, chunk));
      done += count;
    }
    return cache;
  }
  void send_all(const Sequence& cache, HandoffId id, const std::function<void(const PageRun&)>& send) {
    PageRun run;
    run.handoff = id;
    run.blocks = cache.blocks();
    run.last_tokens = (cache.length() - 1) % 16 + 1;
    for (int layer = 0; layer < config_.layers; ++layer) {
      run.layer = layer;
      send(run);
    }
  }

  // make() gives a base cache and whether it is on the decode GPU: the time until the first token is known,
  // and 32 tokens.
  template <class Make>
  std::pair<double, std::vector<std::int32_t>> first_token(const char*, Make&& make) {
    std::vector<double> times;
    std::vector<std::int32_t> text;
    for (int i = 0; i < 4; ++i) {
      use(0);
      const auto start = Clock::now();
      auto [base, far] = make();
      use(far ? to_ : 0);
      GreedyDecoder<Decode>& decoder = far ? *far_decoder_ : *near_decoder_;
      text.assign(1, decoder.first(base, tokens_.back()));
      if (i > 0) times.push_back(us_since(start));
      for (int k = 0; k < 31; ++k) text.push_back(decoder.next());
      decoder.end();
      base.reset();
      use(0);
    }
    return {median(times), text};
  }

  void tell(const char* how, int blocks, std::int64_t context, double bytes, double alone_us,
            double prefill_us, double under_us, double near_us, double far_us, bool same) {
    const double exposed = std::max(0.0, under_us - prefill_us);
    const double speed = bytes / alone_us * 1e-3;
    rows_.add("handoff", {{"name", how},
                          {"blocks", blocks},
                          {"context", context},
                          {"layers", config_.layers},
                          {"bytes", bytes},
                          {"transfer_us", alone_us},
                          {"gb_per_s", speed},
                          {"share_of_peak", peak_ > 0.0 ? speed / peak_ : 0.0},
                          {"prefill_us", prefill_us},
                          {"with_transfer_us", under_us},
                          {"hidden_share", std::max(0.0, 1.0 - exposed / alone_us)},
                          {"first_token_us", far_us},
                          {"first_token_same_gpu_us", near_us},
                          {"text_equal", same}});
    if (!same) throw std::runtime_error("the text behind a hand-off is not one GPU's");
  }

  // What a copy for each page takes, for comparison.
  void copy_engine(const Sequence& cache, std::int64_t context, double bytes) {
    const double us = median_of(2, [&] {
      const auto start = Clock::now();
      for (int layer = 0; layer < config_.layers; ++layer) {
        const PageArray from = pages_of(near_->storage, layer);
        const PageArray to = pages_of(far_->storage, layer);
        for (const BlockId block : cache.blocks()) {
          check(cudaMemcpyPeerAsync(static_cast<std::byte*>(to.base) + block * to.bytes, to_,
                                    static_cast<std::byte*>(from.base) + block * from.bytes, 0,
                                    static_cast<std::size_t>(from.bytes), copies_->get),
                "cudaMemcpyPeerAsync");
        }
      }
      copies_->wait();
      return us_since(start);
    });
    const double speed = bytes / us * 1e-3;
    rows_.add("handoff", {{"name", "a copy for each page"},
                          {"context", context},
                          {"layers", config_.layers},
                          {"bytes", bytes},
                          {"transfer_us", us},
                          {"gb_per_s", speed},
                          {"share_of_peak", peak_ > 0.0 ? speed / peak_ : 0.0}});
  }

#ifdef PREFILLSHARE_WITH_NCCL
  void nccl(const Sequence& cache, std::int64_t context, double bytes, double prefill_us, double near_us,
            const std::vector<std::int32_t>& near_text) {
    if (comms_ == nullptr) comms_ = std::make_unique<Communicators>(2);
    auto send_end = take(NcclWire::create(comms_->comms[0], 1));
    auto receive_end = take(NcclWire::create(comms_->comms[1], 0));
    for (const std::int64_t chunk : {64, 256}) {
      const auto staging_bytes = static_cast<std::size_t>(4 * chunk * pages_of(near_->storage, 0).bytes);
      StagedPageOptions options;
      options.chunk_pages = chunk;
      auto near_memory = device_array<std::byte>(staging_bytes);
      options.wire = wire_->get;
      options.copies = copies_->get;
      options.staging = {near_memory.data(), near_memory.size()};
      auto sender = take(StagedPageSender<__half, NcclWire>::create(send_end, near_->storage, options));
      use(to_);
      auto far_memory = device_array<std::byte>(staging_bytes);
      options.wire = far_wire_->get;
      options.copies = far_copies_->get;
      options.staging = {far_memory.data(), far_memory.size()};
      auto receiver = take(
          StagedPageReceiver<__half, Table, NcclWire>::create(receive_end, *table_, far_->storage, options));
      use(0);
      // The receiving end in a thread of its own, told beforehand what comes.
      const auto with_receiver = [&](const std::vector<PageNotice>& notices,
                                     const std::function<void()>& send) {
        std::thread other([&] {
          try {
            use(to_);
            for (const PageNotice& notice : notices) check(receiver.receive(notice));
            check(receiver.drain());
          } catch (const std::exception& e) {
            std::fprintf(stderr, "multi-gpu: receiver: %s\n", e.what());
            std::fflush(nullptr);
            std::_Exit(1);
          }
        });
        send();
        check(sender.drain());
        other.join();
      };
      const double alone_us = median_of(5, [&] {
        const HandoffGrant grant = reserve();
        std::vector<PageNotice> notices;
        send_all(cache, grant.id, [&](const PageRun& run) { notices.push_back(notice_of(run)); });
        const auto start = Clock::now();
        with_receiver(notices, [&] {
          send_all(cache, grant.id, [&](const PageRun& run) { check(sender.send(run, compute_->get)); });
        });
        const double us = us_since(start);
        take(table_->take(grant.id)).reset();
        return us;
      });
      const auto overlapped = [&] {
        const HandoffGrant grant = reserve();
        std::vector<PageNotice> notices;
        const std::int64_t total = context - 1;
        for (std::int64_t done = 0; done < total; done += kChunk) {
          const std::int64_t count = std::min(kChunk, total - done);
          for (std::int64_t layer = 0; layer < config_.layers; ++layer)
            notices.push_back({grant.id, layer, done / 16, (count + 15) / 16, (count - 1) % 16 + 1});
        }
        with_receiver(notices, [&] {
          Sequence own =
              prefill([&](const PageRun& run) { return sender.send(run, compute_->get); }, grant.id);
          check(sender.drain());
        });
        return std::pair(take(table_->take(grant.id)), true);
      };
      const double under_us = median_of(3, [&] {
        const auto start = Clock::now();
        overlapped().first.reset();
        return us_since(start);
      });
      const auto [far_us, far_text] = first_token("nccl", overlapped);
      tell("nccl", static_cast<int>(chunk), context, bytes, alone_us, prefill_us, under_us, near_us, far_us,
           far_text == near_text);
    }
  }
  std::unique_ptr<Communicators> comms_;
#endif

  const Options& options_;
  int to_;
  double peak_;
  Rows& rows_;
  ModelConfig config_;
  Device here_;
  Device there_;
  std::unique_ptr<Stream> compute_, copies_, wire_, far_stream_, far_copies_, far_wire_;
  std::unique_ptr<Base> base_;
  std::unique_ptr<Decode> near_model_, far_model_;
  std::unique_ptr<KvPool> near_, far_;
  std::unique_ptr<DeviceWorkspace<__half>> workspace_;
  std::unique_ptr<PrefillBatch> input_;
  std::unique_ptr<GreedyDecoder<Decode>> near_decoder_, far_decoder_;
  std::unique_ptr<Table> table_;
  std::vector<std::int32_t> tokens_;
  std::uint64_t keys_ = 0;
};

// ---- parallel

// A batch of decoding sequences behind contexts of random K and V.
template <class Model>
class Decoding {
 public:
  Decoding(const Model& model, int batch, std::int64_t context, const Device& device, cudaStream_t stream)
      : pool_(model.config, batch * ((context + 15) / 16 + 1), stream),
        workspace_(take(DeviceWorkspace<__half>::create(model, batch, batch, device))),
        sequences_(static_cast<std::size_t>(batch)) {
    fill_values(pool_.storage.layer(0),
                static_cast<std::size_t>(pool_.storage.blocks() * pool_.storage.bytes_per_block()) / 2, 1.0F,
                17);
    std::vector<const Sequence*> pointers;
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      sequences_[i] = take(pool_.allocator->open(CacheKey{"bench", codegemm::concat(i), ""}, {}));
      check(pool_.allocator->reserve(sequences_[i], context + 1));
      pointers.push_back(&sequences_[i]);
    }
    const std::vector<std::int64_t> pending(sequences_.size(), context);
    check(export_page_table(pointers, table_, pending));
    check(cudaDeviceSynchronize(), "the cache");
    graph_ = take(Graph::capture(model, pool_.storage, workspace_, batch, std::ssize(table_.indices), false,
                                 device, stream));
    check(cudaDeviceSynchronize(), "the graph");
  }
  ~Decoding() {
    for (Sequence& s : sequences_) static_cast<void>(pool_.allocator->release_reserved(s).ok());
  }
  void step(std::span<const std::int32_t> tokens = {}) {
    DecodeStep what;
    what.table = &table_;
    what.tokens = tokens;
    check(graph_->launch(what));
  }
  std::span<const std::int32_t> wait() { return take(graph_->wait()); }

 private:
  using Graph = DecodeGraph<typename Model::Linear, typename Model::Head>;
  KvPool pool_;
  DeviceWorkspace<__half> workspace_;
  std::vector<Sequence> sequences_;
  PageTable table_;
  std::unique_ptr<Graph> graph_;
};

// make(rank) -> the rank's model.
template <class Make>
void measure_parallel(const char* kind, int ranks, const Options& options, const std::vector<double>& alone,
                      Rows& rows, Make&& make, std::vector<double>* out = nullptr) {
  constexpr int kContext = 1024;
  std::barrier all(ranks);
  const std::vector<int> batches = {1, 8, 32};
  std::vector<double> step_us(batches.size()), loop_us(batches.size());
  on_ranks(ranks, [&](int r) {
    const Device device = device_of(r);
    Stream stream;
    const auto model = make(r);
    all.arrive_and_wait();
    for (std::size_t b = 0; b < batches.size(); ++b) {
      Decoding<std::remove_const_t<std::remove_reference_t<decltype(model)>>> decoding(
          model, batches[b], kContext, device, stream.get);
      const auto first = random_prompt(batches[b], model.config.vocab_size);
      all.arrive_and_wait();
      decoding.step(first);
      static_cast<void>(decoding.wait());
      const auto timed = [&](bool wait) {
        std::vector<double> times;
        for (int round = 0; round < 6; ++round) {
          all.arrive_and_wait();
          const auto start = Clock::now();
          for (int i = 0; i < options.steps / 5; ++i) {
            decoding.step();
            if (wait) static_cast<void>(decoding.wait());
          }
          static_cast<void>(decoding.wait());
          if (round > 0) times.push_back(us_since(start) / (options.steps / 5));
        }
        return median(times);
      };
      const double step = timed(false);
      const double loop = timed(true);
      if (r == 0) step_us[b] = step, loop_us[b] = loop;
      all.arrive_and_wait();
    }
  });
  for (std::size_t b = 0; b < batches.size(); ++b) {
    rows.add("parallel", {{"name", kind},
                          {"gpus", ranks},
                          {"model", "70b"},
                          {"weights", "m1v4g128"},
                          {"batch", batches[b]},
                          {"context", kContext},
                          {"step_us", step_us[b]},
                          {"loop_us", loop_us[b]},
                          {"tokens_per_s", batches[b] * 1e6 / loop_us[b]},
                          {"speedup", alone.empty() ? 1.0 : alone[b] / loop_us[b]}});
  }
  if (out != nullptr) *out = loop_us;
}

// ---- logits

// A small model of codes, canonical, whose parts can be cut.
struct CanonicalModel {
  struct Layer {
    codegemm::QuantizedMatrix q, k, v, o, gate, up, down;
  };
  ModelConfig config;
  std::vector<Layer> layers;

  explicit CanonicalModel(const ModelConfig& c) : config(c) {
    Random random{4711};
    const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
      auto out =
          take(codegemm::QuantizedMatrix::create(take(codegemm::parse_format("m1v4g128")), rows, cols));
      for (std::uint32_t& word : out.codes()) word = static_cast<std::uint32_t>(random.next());
      for (auto& value : out.codebooks()) value = codegemm::Half::from_float(random.normal());
      const float size = 1.0F / std::sqrt(static_cast<float>(cols));
      for (auto& value : out.scales())
        value = codegemm::Half::from_float(size * (0.8F + 0.4F * random.uniform()));
      return out;
    };
    for (std::int64_t i = 0; i < c.layers; ++i) {
      layers.push_back({matrix(c.q_size(), c.hidden_size), matrix(c.kv_size(), c.hidden_size),
                        matrix(c.kv_size(), c.hidden_size), matrix(c.hidden_size, c.q_size()),
                        matrix(c.intermediate_size, c.hidden_size),
                        matrix(c.intermediate_size, c.hidden_size),
                        matrix(c.hidden_size, c.intermediate_size)});
    }
  }

  static Coded upload(const std::vector<codegemm::QuantizedMatrix>& parts) {
    std::vector<codegemm::QuantizedMatrixView> views;
    for (const auto& part : parts) views.push_back(part.view());
    return take(Coded::create(views));
  }
  // wrap(layer, summed) -> Linear, of each layer's part.
  template <class Linear, class Wrap>
  void add_layers(std::vector<DeviceLlamaLayer<Linear>>& out, int ranks, int rank, Wrap&& wrap) const {
    const auto rows = [&](const codegemm::QuantizedMatrix& m) {
      return take(codegemm::shard_rows(m.view(), m.rows() / ranks * rank, m.rows() / ranks));
    };
    const auto cols = [&](const codegemm::QuantizedMatrix& m) {
      return take(codegemm::shard_cols(m.view(), m.cols() / ranks * rank, m.cols() / ranks));
    };
    const auto several = [](auto&&... parts) {
      std::vector<codegemm::QuantizedMatrix> made;
      (made.push_back(std::move(parts)), ...);
      return upload(made);
    };
    for (const Layer& l : layers) {
      DeviceLlamaLayer<Linear> layer = RandomLlama::norms<Linear>(config);
      layer.qkv = wrap(several(rows(l.q), rows(l.k), rows(l.v)), false);
      layer.o = wrap(several(cols(l.o)), true);
      layer.gate_up = wrap(several(rows(l.gate), rows(l.up)), false);
      layer.down = wrap(several(cols(l.down)), true);
      out.push_back(std::move(layer));
    }
  }
};

constexpr int kLogitSteps = 64;

// Steps of one sequence from an empty cache, the tokens given or its own: all logits, and what it chose.
template <class Model>
std::pair<std::vector<float>, std::vector<std::int32_t>> decode_steps(const Model& model, bool given,
                                                                      const Device& device) {
  Stream stream;
  KvPool pool(model.config, kLogitSteps / 16 + 1, stream.get);
  auto workspace = take(DeviceWorkspace<__half>::create(model, 1, 1, device));
  Sequence sequence = take(pool.allocator->open(CacheKey{"m", "1", ""}, {}));
  check(pool.allocator->reserve(sequence, kLogitSteps));
  auto graph = take(DecodeGraph<typename Model::Linear, typename Model::Head>::capture(
      model, pool.storage, workspace, 1, kLogitSteps / 16 + 1, false, device, stream.get));
  check(cudaDeviceSynchronize(), "the graph");
  const auto prompt = random_prompt(kLogitSteps, model.config.vocab_size);
  const auto vocab = static_cast<std::size_t>(model.config.vocab_size);
  std::pair<std::vector<float>, std::vector<std::int32_t>> out;
  out.first.resize(vocab * kLogitSteps);
  PageTable table;
  for (std::int64_t k = 0; k < kLogitSteps; ++k) {
    const Sequence* const one = &sequence;
    const std::int64_t pending = k + 1;
    check(export_page_table(std::span(&one, 1), table, std::span(&pending, 1)));
    DecodeStep step;
    step.table = &table;
    if (given || k == 0) step.tokens = std::span(prompt).subspan(static_cast<std::size_t>(k), 1);
    check(graph->launch(step));
    out.second.push_back(take(graph->wait())[0]);
    check(cudaMemcpy(out.first.data() + vocab * static_cast<std::size_t>(k), workspace.logits.data(),
                     vocab * sizeof(float), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  }
  check(pool.allocator->release_reserved(sequence));
  return out;
}

// The largest relative difference of any step's logits.
double worst_row(const std::vector<float>& a, const std::vector<float>& b, std::size_t width) {
  double worst = 0.0;
  for (std::size_t first = 0; first < a.size(); first += width) {
    double off = 0.0, size = 0.0;
    for (std::size_t i = first; i < first + width; ++i) {
      off += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
      size += std::pow(static_cast<double>(b[i]), 2);
    }
    const double relative = std::sqrt(off / size);
    worst = relative <= worst ? worst : (relative > worst ? relative : HUGE_VAL);
  }
  return worst;
}

template <class Group>
void compare_logits(const char* kind, const CanonicalModel& canonical, int ranks,
                    const std::function<const Group&(int)>& group,
                    const std::pair<std::vector<float>, std::vector<std::int32_t>>& given,
                    const std::pair<std::vector<float>, std::vector<std::int32_t>>& own, Rows& rows) {
  using Linear = ParallelLinear<Coded, Group>;
  using Head = ParallelHead<Dense, Group>;
  double off = 0.0;
  std::int64_t equal = 0;
  std::barrier all(ranks);
  on_ranks(ranks, [&](int r) {
    const Device device = device_of(r);
    auto model = [&] {
      auto cublas = take(Cublas::create());
      // The ends and the head are the whole's: of the same seeds, the head's rows cut out.
      auto whole_head =
          RandomLlama(cublas, 900).dense(canonical.config.vocab_size, canonical.config.hidden_size);
      ModelConfig ends = canonical.config;
      ends.layers = 1;
      auto from = RandomLlama(cublas, 700).coded_model(ends);
      DeviceLlama<Linear, Head> out;
      out.config = take(shard_config(canonical.config, {ranks, r}));
      out.embedding = from.embedding;
      out.final_norm = std::move(from.final_norm);
      out.rope_frequencies = std::move(from.rope_frequencies);
      canonical.add_layers(out.layers, ranks, r, [&](Coded layer, bool summed) {
        return summed ? Linear::by_inputs(std::move(layer), group(r)) : Linear::by_outputs(std::move(layer));
      });
      const std::int64_t count = canonical.config.vocab_size / ranks * canonical.config.hidden_size;
      auto part = device_array<__half>(static_cast<std::size_t>(count));
      check(cudaMemcpy(part.data(), whole_head.weights()->data() + r * count, part.bytes(),
                       cudaMemcpyDeviceToDevice),
            "cudaMemcpy");
      out.head = Head(take(Dense::create(cublas, std::make_shared<const DeviceArray<__half>>(std::move(part)),
                                         canonical.config.vocab_size / ranks, canonical.config.hidden_size)),
                      group(r));
      return RandomLlama::checked(std::move(out));
    }();
    {
      Stream warm;
      auto some = take(DeviceArray<float>::zeros(64));
      all.arrive_and_wait();
      check(group(r).sum(MatrixView<float>(some.data(), 1, 64), warm.get));
      check(group(r).gather(MatrixView<float>(some.data(), 1, 64), warm.get));
      warm.wait();
    }
    all.arrive_and_wait();
    const auto mine_given = decode_steps(model, true, device);
    all.arrive_and_wait();
    const auto mine_own = decode_steps(model, false, device);
    all.arrive_and_wait();
    if (r != 0) return;
    off = worst_row(mine_given.first, given.first, static_cast<std::size_t>(canonical.config.vocab_size));
    while (equal < kLogitSteps &&
           mine_own.second[static_cast<std::size_t>(equal)] == own.second[static_cast<std::size_t>(equal)])
      ++equal;
  });
  rows.add("logits", {{"name", kind},
                      {"gpus", ranks},
                      {"relative_difference", off},
                      {"greedy_tokens", kLogitSteps},
                      {"equal_at_first", equal}});
  if (!(off < 0.02)) throw std::runtime_error("the logits of several GPUs are not one GPU's");
}

void run_logits(int gpus, Rows& rows) {
  const CanonicalModel canonical(llama_config(2048, 4096, 4, 16, 8, 8192));
  const Device device = device_of(0);
  auto whole = [&] {
    auto cublas = take(Cublas::create());
    ModelConfig ends = canonical.config;
    ends.layers = 1;
    DeviceLlama<Coded, Dense> out = RandomLlama(cublas, 700).coded_model(ends);
    out.config = canonical.config;
    out.layers.clear();
    canonical.add_layers(out.layers, 1, 0, [](Coded layer, bool) { return layer; });
    out.head = RandomLlama(cublas, 900).dense(canonical.config.vocab_size, canonical.config.hidden_size);
    return RandomLlama::checked(std::move(out));
  }();
  const auto given = decode_steps(whole, true, device);
  const auto own = decode_steps(whole, false, device);
  for (int ranks = 2; ranks <= std::min(gpus, 8); ranks *= 2) {
    Peers peers(ranks, {});
    compare_logits<PeerGroup>(
        "peer memory", canonical, ranks,
        [&](int r) -> const PeerGroup& { return peers.groups[static_cast<std::size_t>(r)]; }, given, own,
        rows);
#ifdef PREFILLSHARE_WITH_NCCL
    Communicators comms(ranks);
    std::vector<NcclGroup> groups;
    for (ncclComm_t comm : comms.comms) groups.push_back(take(NcclGroup::create(comm)));
    compare_logits<NcclGroup>(
        "nccl", canonical, ranks,
        [&](int r) -> const NcclGroup& { return groups[static_cast<std::size_t>(r)]; }, given, own, rows);
#endif
  }
}

void run_parallel(const Options& options, int gpus, Rows& rows) {
  const ModelConfig whole = llama_70b();
  std::vector<double> alone;
  measure_parallel(
      "one GPU", 1, options, {}, rows,
      [&](int) { return RandomLlama(take(Cublas::create()), 1).coded_model(whole); }, &alone);
  for (int ranks = 2; ranks <= std::min(gpus, 8); ranks *= 2) {
    const ModelConfig part = take(shard_config(whole, {ranks, 0}));
    Peers peers(ranks, {});
    measure_parallel("peer memory", ranks, options, alone, rows, [&](int r) {
      return RandomLlama(take(Cublas::create()), static_cast<std::uint64_t>(1 + 10000 * r))
          .coded_part(part, peers.groups[static_cast<std::size_t>(r)]);
    });
#ifdef PREFILLSHARE_WITH_NCCL
    Communicators comms(ranks);
    std::vector<NcclGroup> groups;
    for (ncclComm_t comm : comms.comms) groups.push_back(take(NcclGroup::create(comm)));
    on_ranks(ranks, [&](int r) {  // NCCL connects the ranks: not while a stream is captured
      Stream warm;
      auto some = take(DeviceArray<float>::zeros(64));
      const NcclGroup& group = groups[static_cast<std::size_t>(r)];
      check(group.sum(MatrixView<float>(some.data(), 1, 64), warm.get));
      check(group.gather(MatrixView<float>(some.data(), 1, 64), warm.get));
      warm.wait();
    });
    measure_parallel("nccl", ranks, options, alone, rows, [&](int r) {
      return RandomLlama(take(Cublas::create()), static_cast<std::uint64_t>(1 + 10000 * r))
          .coded_part(part, groups[static_cast<std::size_t>(r)]);
    });
#endif
  }
}

// ---- killed

ModelConfig killed_config() { return llama_config(1024, 2816, 12, 8, 2, 32000); }
constexpr std::int64_t kKilledContext = 700;
constexpr std::int64_t kKilledBlocks = (kKilledContext - 1 + 15) / 16;
constexpr std::int64_t kKilledPool = 4 * kKilledBlocks;

// What the prefill process is told: where the decode worker's pool is and which blocks are to be filled.
struct KilledTask {
  cudaIpcMemHandle_t pool;
  BlockId blocks[kKilledBlocks];
};

void write_all(int file, const void* from, std::size_t bytes) {
  const auto* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t done = write(file, at, bytes);
    if (done <= 0) throw std::runtime_error("a pipe was closed");
    at += done;
    bytes -= static_cast<std::size_t>(done);
  }
}
bool read_all(int file, void* to, std::size_t bytes) {
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
int killed_child(int number) {
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

void run_killed(int gpus, Rows& rows) {
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

// ---- the program

// Rows of parts that did not run now stay.
void keep(const Options& options, const Device& device, MemorySpeed memory, const Rows& now) {
  if (options.json.empty()) return;
  nlohmann::json rows = nlohmann::json::array();
  if (std::ifstream file(options.json); file) {
    const auto before = nlohmann::json::parse(file, nullptr, false);
    if (before.is_object() && before.contains("rows")) {
      for (const auto& row : before["rows"]) {
        const std::string part = row.value("part", "");
        if (std::find(options.parts.begin(), options.parts.end(), part) == options.parts.end())
          rows.push_back(row);
      }
      memory.read_gb_per_s = std::max(memory.read_gb_per_s, before.value("read_gb_per_s", 0.0));
      memory.copy_gb_per_s = std::max(memory.copy_gb_per_s, before.value("copy_gb_per_s", 0.0));
    }
  }
  for (const auto& row : now.rows) rows.push_back(row);
  const Suite frame{"multi-gpu", describe_card(device), memory, {}};
  check(write_text(frame_json(frame, std::move(rows)).dump(2) + '\n', options.json));
}

int program(int argc, char** argv) {
  Options options;
  int child = -1;
  parse(argc, argv,
        {{"--json", Option::value(options.json)},
         {"--quick", Option::flag([&] { options.quick = true, options.steps = 25; })},
         {"--part", Option::value([&](const char* text) { options.parts.emplace_back(text); })},
         {"--steps", Option::value(options.steps)},
         {"--child", Option::value(child)}});
  if (child >= 0) return killed_child(child);
  if (options.steps < 5) throw std::runtime_error("--steps from 5 on");
  const std::vector<std::string> known = {"killed", "link", "sums", "handoff", "logits", "parallel"};
  if (options.parts.empty()) options.parts = known;
  for (const std::string& part : options.parts) {
    if (std::find(known.begin(), known.end(), part) == known.end())
      throw std::runtime_error("unknown part " + part);
  }
  const auto wanted = [&](const char* part) {
    return std::find(options.parts.begin(), options.parts.end(), part) != options.parts.end();
  };
  const int gpus = gpu_count();
  if (gpus == 0) throw std::runtime_error("no GPU");
  Rows rows;
  if (wanted("killed")) run_killed(gpus, rows);
  const int to = gpus > 1 ? 1 : 0;
  enable_peers(gpus);
  const Device device = device_of(0);
  MemorySpeed memory;
  if (wanted("link")) {
    const Stream stream;
    memory = measure_bandwidth(stream.get, device.multiprocessors);
    if (gpus > 1) static_cast<void>(link_peak(to, &rows));
  }
  if (wanted("sums")) {
    for (int ranks = 2; ranks <= std::min(gpus, 8); ranks *= 2) {
      Peers peers(ranks, {});
      measure_sums<PeerGroup>(
          "peer memory", ranks,
          [&](int r) -> const PeerGroup& { return peers.groups[static_cast<std::size_t>(r)]; }, rows);
#ifdef PREFILLSHARE_WITH_NCCL
      Communicators comms(ranks);
      std::vector<NcclGroup> groups;
      for (ncclComm_t comm : comms.comms) groups.push_back(take(NcclGroup::create(comm)));
      measure_sums<NcclGroup>(
          "nccl", ranks, [&](int r) -> const NcclGroup& { return groups[static_cast<std::size_t>(r)]; },
          rows);
#endif
    }
  }
  if (wanted("handoff")) {
    const double peak = gpus > 1 ? link_peak(to, nullptr) : 0.0;
    HandoffSuite suite(options, to, peak, rows);
    for (const std::int64_t context : {1024, 4096, 16384}) {
      if (options.quick && context > 1024) break;
      suite.run(context);
    }
  }
  if (wanted("logits")) run_logits(gpus, rows);
  if (wanted("parallel")) run_parallel(options, gpus, rows);
  keep(options, device, memory, rows);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // Read when CUDA and NCCL start; multicast stays off whatever the machine offers.
  setenv("NCCL_NVLS_ENABLE", "0", 1);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  return run_suite("multi-gpu", argc, argv, program);
}
