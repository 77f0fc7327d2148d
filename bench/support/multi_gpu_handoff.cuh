// SPDX-License-Identifier: Apache-2.0
//
// bench/support/multi_gpu_handoff.cuh - base caches from a prefill GPU to a decode GPU: alone, and under the
// prefill.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "multi_gpu_common.cuh"

namespace codegemm::bench::multi {

inline ModelConfig handoff_config(bool quick) {
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
    bytes_ =
        static_cast<double>((context - 1 + 15) / 16) * static_cast<double>(near_->storage.bytes_per_block());
    // One GPU does both: the prefill's time alone, its first token and its text.
    const Session near = sessions(false, [&] {
      Sequence own = prefill([](const PageRun&) { return Status(); }, 0);
      compute_->wait();
      return own;
    });
    Sequence cache = prefill([](const PageRun&) { return Status(); }, 0);
    compute_->wait();

    double best_us = HUGE_VAL;
    int best_blocks = 0;
    const auto transport_of = [&](int blocks) {
      PeerTransportOptions peer;
      peer.blocks = blocks;
      return take(PeerPageTransport<__half, Table>::create(*table_, far_->storage, copies_->get, peer));
    };
    for (const int blocks : {8, 16, 32, 64}) {
      auto transport = transport_of(blocks);
      const double us = median_of(5, [&] {
        const HandoffGrant grant = reserve();
        const auto start = Clock::now();
        send_all(cache, grant.id,
                 [&](const PageRun& run) { check(transport.send(near_->storage, run, compute_->get)); });
        check(transport.drain());
        const double took = us_since(start);
        take(table_->take(grant.id)).reset();
        return took;
      });
      tell_alone("peer copy", blocks, us);
      if (us < best_us) best_us = us, best_blocks = blocks;
    }
    // A prefill produces far less than the link carries: few blocks, which leave it the GPU, may do better.
    for (const int blocks : {4, best_blocks}) {
      auto transport = transport_of(blocks);
      const Session far = sessions(true, [&] {
        const HandoffGrant grant = reserve();
        Sequence own = prefill(
            [&](const PageRun& run) { return transport.send(near_->storage, run, compute_->get); }, grant.id);
        check(transport.drain());
        return take(table_->take(grant.id));
      });
      tell_session("peer copy", blocks, best_us, near, far);
    }
    copy_engine(cache);
#ifdef PREFILLSHARE_WITH_NCCL
    if (to_ != 0) nccl(cache, near);
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

  // A context's way to its answer.
  struct Session {
    double ready_us = 0.0;  // until the base cache is where it is decoded from
    double first_us = 0.0;  // until the first token is known
    std::vector<std::int32_t> text;
  };
  // make() gives the base cache, on the decode GPU where `far`.
  template <class Make>
  Session sessions(bool far, Make&& make) {
    std::vector<double> ready, first;
    Session out;
    for (int i = 0; i < 4; ++i) {
      use(0);
      const auto start = Clock::now();
      Sequence base = make();
      const double ready_us = us_since(start);
      use(far ? to_ : 0);
      GreedyDecoder<Decode>& decoder = far ? *far_decoder_ : *near_decoder_;
      out.text.assign(1, decoder.first(base, tokens_.back()));
      if (i > 0) ready.push_back(ready_us), first.push_back(us_since(start));
      for (int k = 0; k < 31; ++k) out.text.push_back(decoder.next());
      decoder.end();
      use(0);
    }
    out.ready_us = median(ready);
    out.first_us = median(first);
    return out;
  }

  // All of a cache that is there.
  void tell_alone(const char* how, int size, double us) {
    const double speed = bytes_ / us * 1e-3;
    rows_.add("handoff", {{"name", codegemm::concat(how, ", alone")},
                          {"blocks", size},
                          {"context", tokens_.size()},
                          {"layers", config_.layers},
                          {"bytes", bytes_},
                          {"transfer_us", us},
                          {"gb_per_s", speed},
                          {"share_of_peak", peak_ > 0.0 ? speed / peak_ : 0.0}});
  }
  // Layer by layer under the prefill.
  void tell_session(const char* how, int size, double alone_us, const Session& near, const Session& far) {
    const double exposed = std::max(0.0, far.ready_us - near.ready_us);
    rows_.add("handoff", {{"name", codegemm::concat(how, ", under the prefill")},
                          {"blocks", size},
                          {"context", tokens_.size()},
                          {"layers", config_.layers},
                          {"bytes", bytes_},
                          {"transfer_us", alone_us},
                          {"prefill_us", near.ready_us},
                          {"with_transfer_us", far.ready_us},
                          {"hidden_share", std::max(0.0, 1.0 - exposed / alone_us)},
                          {"first_token_us", far.first_us},
                          {"first_token_same_gpu_us", near.first_us},
                          {"tokens", near.text.size()},
                          {"text_equal", far.text == near.text}});
    if (far.text != near.text) throw std::runtime_error("the text behind a hand-off is not one GPU's");
  }

  // What a copy for each page takes, for comparison.
  void copy_engine(const Sequence& cache) {
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
    tell_alone("a copy for each page", 1, us);
  }

#ifdef PREFILLSHARE_WITH_NCCL
  // Both ends, with messages of so many pages.
  struct NcclEnds {
    DeviceArray<std::byte> near_memory, far_memory;
    NcclWire near_wire, far_wire;
    std::unique_ptr<StagedPageSender<__half, NcclWire>> sender;
    std::unique_ptr<StagedPageReceiver<__half, Table, NcclWire>> receiver;
  };
  std::unique_ptr<NcclEnds> nccl_ends(std::int64_t chunk) {
    const auto bytes = static_cast<std::size_t>(4 * chunk * pages_of(near_->storage, 0).bytes);
    std::unique_ptr<NcclEnds> out(new NcclEnds{{},
                                               {},
                                               take(NcclWire::create(comms_->comms[0], 1)),
                                               take(NcclWire::create(comms_->comms[1], 0)),
                                               nullptr,
                                               nullptr});
    out->near_memory = device_array<std::byte>(bytes);
    StagedPageOptions options;
    options.chunk_pages = chunk;
    options.wire = wire_->get;
    options.copies = copies_->get;
    options.staging = {out->near_memory.data(), bytes};
    using Sender = StagedPageSender<__half, NcclWire>;
    out->sender = std::make_unique<Sender>(take(Sender::create(out->near_wire, near_->storage, options)));
    use(to_);
    out->far_memory = device_array<std::byte>(bytes);
    options.wire = far_wire_->get;
    options.copies = far_copies_->get;
    options.staging = {out->far_memory.data(), bytes};
    using Receiver = StagedPageReceiver<__half, Table, NcclWire>;
    out->receiver =
        std::make_unique<Receiver>(take(Receiver::create(out->far_wire, *table_, far_->storage, options)));
    use(0);
    return out;
  }
  // send() here and the receiving end in a thread of its own, told beforehand what comes: the time of both.
  double with_receiver(NcclEnds& ends, const std::vector<PageNotice>& notices,
                       const std::function<void()>& send) {
    std::barrier both(2);
    std::thread other([&] {
      try {
        use(to_);
        both.arrive_and_wait();
        for (const PageNotice& notice : notices) check(ends.receiver->receive(notice));
        check(ends.receiver->drain());
      } catch (const std::exception& e) {
        std::fprintf(stderr, "multi-gpu: receiver: %s\n", e.what());
        std::fflush(nullptr);
        std::_Exit(1);
      }
    });
    both.arrive_and_wait();
    const auto start = Clock::now();
    send();
    check(ends.sender->drain());
    other.join();
    return us_since(start);
  }
  void nccl(const Sequence& cache, const Session& near) {
    if (comms_ == nullptr) comms_ = std::make_unique<Communicators>(2);
    double best_us = HUGE_VAL;
    std::int64_t best = 0;
    for (const std::int64_t chunk : {64, 128, 256}) {
      const auto ends = nccl_ends(chunk);
      const double us = median_of(5, [&] {
        const HandoffGrant grant = reserve();
        std::vector<PageNotice> notices;
        send_all(cache, grant.id, [&](const PageRun& run) { notices.push_back(notice_of(run)); });
        const double took = with_receiver(*ends, notices, [&] {
          send_all(cache, grant.id,
                   [&](const PageRun& run) { check(ends->sender->send(run, compute_->get)); });
        });
        take(table_->take(grant.id)).reset();
        return took;
      });
      tell_alone("nccl", static_cast<int>(chunk), us);
      if (us < best_us) best_us = us, best = chunk;
    }
    const auto ends = nccl_ends(best);
    const Session far = sessions(true, [&] {
      const HandoffGrant grant = reserve();
      std::vector<PageNotice> notices;
      const std::int64_t total = std::ssize(base_tokens());
      for (std::int64_t done = 0; done < total; done += kChunk) {
        const std::int64_t count = std::min(kChunk, total - done);
        for (std::int64_t layer = 0; layer < config_.layers; ++layer)
          notices.push_back({grant.id, layer, done / 16, (count + 15) / 16, (count - 1) % 16 + 1});
      }
      Sequence own;
      with_receiver(*ends, notices, [&] {
        own = prefill([&](const PageRun& run) { return ends->sender->send(run, compute_->get); }, grant.id);
      });
      return take(table_->take(grant.id));
    });
    tell_session("nccl", static_cast<int>(best), best_us, near, far);
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
  double bytes_ = 0.0;  // of the base cache
  std::uint64_t keys_ = 0;
};

}  // namespace codegemm::bench::multi
