// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/serve/workers_gpu_test.cu - prefill and decode workers over models on the GPU: many
// requests at once get what double loops choose, whatever shares their batch; cancel, deadlines and limits
// give every page back.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/serve/cuda/card_split.cuh>
#include <prefillshare/serve/cuda/decode_worker.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/upload.cuh>
#include <support/serve_harness.hpp>

#include "../gpu_model.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::seed_or;
using Kind = DecodeEvent::Kind;
using Dense = cuda::DeviceDenseLinear<__half>;
using Model = cuda::DeviceLlama<Dense, Dense>;
using HostModel = std::shared_ptr<const LlamaModel<DenseLinear>>;
using Prefill = cuda::DevicePrefillWorker<Dense, Dense>;
using Decode = cuda::DeviceDecodeWorker<__half>;

const auto kIgnorePages = [](const PagesReady&) { return Status(); };

// A base and two decode modules, one of them the base's own weights, on one pool.
struct Rig {
  ModelConfig config;
  HostModel hosts[2];
  std::shared_ptr<const Model> models[2];
  cudaStream_t stream = nullptr;
  std::shared_ptr<cuda::Cublas> cublas;
  std::optional<cuda::DeviceKvStorage<__half>> storage;
  std::unique_ptr<cuda::DeviceKvAllocator<__half>> allocator;
  std::optional<cuda::DeviceWorkspace<__half>> workspace;
  std::optional<cuda::PrefillBatch> batch;
  std::unique_ptr<cuda::DevicePrefillModule<Dense, Dense>> base;
  cuda::DeviceResources<__half> on;
  std::optional<Prefill> prefill;
  std::unique_ptr<Decode> decode;

  // Places of decode steps besides the stream.
  std::optional<cuda::DeviceWorkspace<__half>> part_workspace;
  std::vector<cuda::DevicePlace<__half>> further;

  Rig(const cuda::Device& device, std::uint64_t seed, std::int64_t blocks, const PrefillOptions& options,
      const std::vector<std::int64_t>& sizes, std::int64_t most_active = 64,
      const cuda::CardSplit* split = nullptr, std::int64_t share_from = 0)
      : config(gpu_config()) {
    if (share_from > 0) config.context_length = 4096;
    REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cublas = take(cuda::Cublas::create());
    const cuda::DenseUploader<__half> uploader(cublas);
    for (std::size_t i = 0; i < 2; ++i) {
      hosts[i] = rounded_model<__half>(config, seed + i);
      models[i] = take(cuda::upload(*hosts[i], uploader, uploader));
    }
    storage.emplace(take(cuda::DeviceKvStorage<__half>::create(kv_shape(config), blocks, stream)));
    // What no pass has written is NaN.
    REQUIRE_CUDA(cudaMemsetAsync(storage->layer(0), 0xFF,
                                 static_cast<std::size_t>(blocks * storage->bytes_per_block()), stream));
    allocator = take(cuda::DeviceKvAllocator<__half>::create(*storage));
    workspace.emplace(take(cuda::DeviceWorkspace<__half>::create(*models[0], 64, 8, device)));
    batch.emplace(take(cuda::PrefillBatch::create(64, 8, blocks + 8)));
    base = std::make_unique<cuda::DevicePrefillModule<Dense, Dense>>(models[0], CacheKey{"base", "1", ""});
    on = {device, stream, allocator.get(), &*storage, &*workspace};
    prefill.emplace(take(Prefill::create(
        cuda::DevicePrefill<Dense, Dense>(*base, on, *batch, config.context_length), options)));
    if (split != nullptr) {
      for (const cuda::CardPart& part : {split->part(), split->rest()})
        require_ok(cublas->add_stream(part.stream, part.device.multiprocessors));
      part_workspace.emplace(
          take(cuda::DeviceWorkspace<__half>::create(*models[0], 64, 8, split->part().device)));
      further.push_back({split->part().device, split->part().stream, &*part_workspace});
    }
    decode = take(Decode::create(on, most_active, further));
    for (ModuleId i = 0; i < 2; ++i) {
      auto module = take(cuda::factorize(config, models[i]));
      REQUIRE(take(decode->add_module(std::move(module), sizes, config.context_length, share_from)) == i);
    }
  }
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;
  ~Rig() {
    decode.reset();
    cudaStreamDestroy(stream);
  }

  // But for the page that pads batches.
  [[nodiscard]] std::int64_t in_use() const { return allocator->stats().in_use_blocks - 1; }

  // How far each token's logit is below the largest one, by double loops over the base's cache of all but the
  // context's last token; as a share of the largest logit there is.
  [[nodiscard]] double worst_choice(ModuleId module, const std::vector<std::int32_t>& context,
                                    const std::vector<std::int32_t>& answer) const {
    std::vector<ReferenceCache> cache;
    if (context.size() > 1) {
      static_cast<void>(reference_forward(*hosts[0], std::span(context).first(context.size() - 1), cache));
    }
    std::vector<std::int32_t> own{context.back()};
    own.insert(own.end(), answer.begin(), answer.end() - 1);
    const auto logits = reference_forward(*hosts[module], own, cache);
    double worst = 0.0;
    for (std::size_t i = 0; i < answer.size(); ++i) {
      double size = 0.0;
      for (const double value : logits[i]) size = std::max(size, std::abs(value));
      const double most = *std::max_element(logits[i].begin(), logits[i].end());
      const double off = (most - logits[i][static_cast<std::size_t>(answer[i])]) / size;
      worst = off <= worst ? worst : off;  // NaN stays
    }
    return worst;
  }
};

DecodeRequest request_of(std::uint64_t id, const std::vector<std::int32_t>& context, std::int64_t max_tokens,
                         ModuleId module = 0) {
  DecodeRequest request;
  request.id = id;
  request.module = module;
  request.last_token = context.back();
  request.max_tokens = max_tokens;
  return request;
}
PrefillJob job_of(std::uint64_t id, const std::vector<std::int32_t>& context, KvTime deadline = kKvNever) {
  PrefillJob job;
  job.id = id;
  job.tokens.assign(context.begin(), context.end() - 1);
  job.deadline = deadline;
  return job;
}

}  // namespace

TEST_CASE("batches of a decode module are captured for sizes a quarter apart") {
  CHECK(cuda::batch_buckets(1) == std::vector<std::int64_t>{1});
  CHECK(cuda::batch_buckets(5) == std::vector<std::int64_t>{1, 2, 3, 4, 5});
  CHECK(cuda::batch_buckets(20) == std::vector<std::int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20});
}

TEST_CASE("workers on the GPU: many requests on two modules choose as double loops do, turn after turn") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(61);
  CAPTURE(seed);
  // Chunks cut blocks, batches are padded, and module 1's requests need a second round.
  Rig rig(device, seed, 256, {48, 4, 64}, {1, 2, 5});
  Rng rng(seed + 2);
  std::map<std::uint64_t, std::vector<std::int32_t>> contexts;
  for (std::uint64_t id = 0; id < 16; ++id) {
    contexts[id] = random_tokens(rng, id == 5 ? 1 : 2 + rng.below(90), rig.config.vocab_size);
    if (id > 9 && contexts[id - 7].size() > 40)
      std::copy_n(contexts[id - 7].begin(), 40, contexts[id].insert(contexts[id].begin(), 40, 0));
  }
  const auto module_of = [](std::uint64_t id) { return static_cast<ModuleId>(id % 4 == 0 ? 0 : 1); };
  std::int64_t reused = 0;
  for (int turn = 0; turn < 2; ++turn) {
    CAPTURE(turn);
    for (const auto& [id, context] : contexts) require_ok(rig.prefill->submit(job_of(id, context)));
    Answers answers;
    for (KvTime now = 0; now < 400 && (answers.by_id.size() < contexts.size() || rig.decode->active() > 0);
         ++now) {
      rig.prefill->step(now, kIgnorePages, [&](PrefillResult&& result) {
        require_ok(result.status);
        reused += result.reused_tokens;
        const auto& context = contexts[result.id];
        REQUIRE(result.cache.length() == std::ssize(context) - 1);
        require_ok(rig.decode->start(request_of(result.id, context, 9, module_of(result.id)), result.cache));
      });
      rig.decode->step(now, [&](const DecodeEvent& event) { answers(event); });
    }
    CHECK(rig.prefill->idle());
    REQUIRE(answers.by_id.size() == contexts.size());
    for (const auto& [id, answer] : answers.by_id) {
      CAPTURE(id);
      CHECK((answer.ends == 1 && answer.last.kind == Kind::kLength));
      REQUIRE(answer.tokens.size() == 9);
      CHECK(rig.worst_choice(module_of(id), contexts[id], answer.tokens) < 0.02);
      contexts[id].insert(contexts[id].end(), answer.tokens.begin(), answer.tokens.end());
      const auto more = random_tokens(rng, 1 + rng.below(20), rig.config.vocab_size);
      contexts[id].insert(contexts[id].end(), more.begin(), more.end());
    }
    CHECK(rig.in_use() == 0);
  }
  CHECK(reused > 200);  // the second turn found what the first had left
  CHECK(rig.allocator->check_invariants().ok());
}

TEST_CASE(
    "workers on the GPU: draws follow seeds; stop, cancel, deadline and refusals give every page back") {
  const auto device = gpu_or_skip();
  Rig rig(device, seed_or(71), 12, {32, 2, 4}, {2}, 3);
  Rng rng(72);
  const auto context = random_tokens(rng, 40, rig.config.vocab_size);
  std::optional<Sequence> base;
  require_ok(rig.prefill->submit(job_of(1, context)));
  for (KvTime now = 0; !base; ++now) {
    rig.prefill->step(now, kIgnorePages, [&](PrefillResult&& result) { base = std::move(result.cache); });
  }
  REQUIRE((base->length() == 39 && rig.in_use() == 3));
  Answers answers;
  KvTime now = 0;
  const auto steps = [&](int count) {
    for (int i = 0; i < count; ++i)
      rig.decode->step(++now, [&](const DecodeEvent& event) { answers(event); });
  };
  const auto drawn = [&](std::uint64_t id, std::uint64_t seed) {
    DecodeRequest request = request_of(id, context, 12);
    request.temperature = 1e3F;  // next to even
    request.seed = seed;
    require_ok(rig.decode->start(request, *base));
  };
  drawn(1, 5);
  drawn(2, 5);
  drawn(3, 6);
  steps(12);
  CHECK(rig.decode->active() == 0);
  CHECK(answers.by_id[1].tokens == answers.by_id[2].tokens);  // one batch, one seed
  CHECK(answers.by_id[1].tokens != answers.by_id[3].tokens);
  for (const std::int32_t token : answers.by_id[3].tokens)
    CHECK((token >= 0 && token < rig.config.vocab_size));

  // The pool has 12 blocks: one pads, three are the base's. An answer of 100 needs seven and a copy.
  const auto code = [&](const DecodeRequest& request) { return rig.decode->start(request, *base).code(); };
  CHECK(code(request_of(10, context, 4, 2)) == StatusCode::kNotFound);
  CHECK(code(request_of(10, context, 218)) == StatusCode::kInvalidArgument);  // 39 + 218 > 256
  CHECK(code(request_of(10, context, 130)) == StatusCode::kInvalidArgument);  // more than the pool
  REQUIRE(code(request_of(10, context, 80)) == StatusCode::kOk);
  CHECK(code(request_of(11, context, 80)) == StatusCode::kExhausted);
  DecodeRequest late = request_of(12, context, 9);
  late.deadline = now + 4;
  REQUIRE(code(late) == StatusCode::kOk);
  steps(6);
  CHECK(answers.by_id[12].last.status.code() == StatusCode::kCancelled);
  CHECK(answers.by_id[12].tokens.size() == 3);
  CHECK(rig.decode->cancel(10));
  steps(1);
  CHECK(answers.by_id[10].last.status.code() == StatusCode::kCancelled);
  CHECK(answers.by_id[10].tokens.size() == 6);
  REQUIRE(code(request_of(13, context, 8)) == StatusCode::kOk);
  steps(8);
  const std::vector<std::int32_t> full = answers.by_id[13].tokens;
  CHECK(std::equal(full.begin(), full.begin() + 3, answers.by_id[12].tokens.begin()));
  DecodeRequest stopping = request_of(14, context, 8);
  stopping.stop_tokens = {full[4]};
  REQUIRE(code(stopping) == StatusCode::kOk);
  steps(8);
  CHECK(answers.by_id[14].last.kind == Kind::kStopped);
  CHECK((rig.decode->active() == 0 && rig.in_use() == 3));
  base.reset();
  CHECK(rig.in_use() == 0);

  // A prefill that is cancelled in its middle, and one that is late.
  std::map<std::uint64_t, PrefillResult> results;
  const auto keep = [&](PrefillResult&& result) { results[result.id] = std::move(result); };
  require_ok(rig.prefill->submit(job_of(20, random_tokens(rng, 100, rig.config.vocab_size))));
  require_ok(rig.prefill->submit(job_of(21, random_tokens(rng, 100, rig.config.vocab_size), 2)));
  CHECK(rig.prefill->step(1, kIgnorePages, keep) == 32);
  CHECK(rig.prefill->cancel(20));
  rig.prefill->step(2, kIgnorePages, keep);
  rig.prefill->step(3, kIgnorePages, keep);
  CHECK(results[20].status.code() == StatusCode::kCancelled);
  CHECK(results[20].cache.length() == 32);
  CHECK(results[21].status.code() == StatusCode::kCancelled);
  results.clear();
  CHECK((rig.prefill->idle() && rig.in_use() == 0));
  CHECK(rig.allocator->check_invariants().ok());
  REQUIRE_CUDA(cudaStreamSynchronize(rig.stream));
  CHECK(
      rig.decode
          ->add_module(take(cuda::factorize(rig.config, rig.models[0])), std::vector<std::int64_t>{2, 2}, 256)
          .status()
          .code() == StatusCode::kInvalidArgument);
}

TEST_CASE("workers on the GPU: a batch's common prefixes are read once, and it chooses as double loops do") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(76);
  CAPTURE(seed);
  Rig rig(device, seed, 400, {64, 8, 64}, {1, 3, 8}, 64, nullptr, 256);
  Rng rng(seed + 2);
  // Two prompts whose sequences come in turns, one that nobody shares, one that is shared by too little.
  const auto first = random_tokens(rng, 2085, rig.config.vocab_size);
  const auto second = random_tokens(rng, 270, rig.config.vocab_size);
  std::map<std::uint64_t, std::vector<std::int32_t>> contexts;
  for (std::uint64_t id = 0; id < 8; ++id) {
    const auto& prompt = id % 2 == 0 ? first : second;
    std::int64_t length = std::ssize(prompt);
    if (id == 5) length = 0;
    if (id == 7) length = 40;
    contexts[id].assign(prompt.begin(), prompt.begin() + length);
    const auto own = random_tokens(rng, 3 + 11 * static_cast<std::int64_t>(id), rig.config.vocab_size);
    contexts[id].insert(contexts[id].end(), own.begin(), own.end());
  }
  // One after the other, so that each finds what the one before has left in the tree.
  std::map<std::uint64_t, Sequence> bases;
  for (const auto& [id, context] : contexts) {
    require_ok(rig.prefill->submit(job_of(id, context)));
    while (!rig.prefill->idle()) {
      rig.prefill->step(0, kIgnorePages, [&](PrefillResult&& result) {
        require_ok(result.status);
        bases[result.id] = std::move(result.cache);
      });
    }
  }
  // What the attention's kernel shares by itself, and what it is told of besides.
  static_assert(cuda::kMinSharedTokens <= 2080 && cuda::kMinSharedSequences <= 4);
  REQUIRE(bases.at(2).blocks()[128] == bases.at(0).blocks()[128]);
  const auto module_of = [](std::uint64_t id) { return static_cast<ModuleId>(id % 2 == 0 ? 1 : 0); };
  Answers answers;
  for (const auto& [id, context] : contexts) {
    require_ok(rig.decode->start(request_of(id, context, 6, module_of(id)), bases.at(id)));
  }
  for (int i = 0; i < 6; ++i) rig.decode->step(i, [&](const DecodeEvent& event) { answers(event); });
  REQUIRE(answers.by_id.size() == contexts.size());
  for (const auto& [id, answer] : answers.by_id) {
    CAPTURE(id);
    REQUIRE(answer.tokens.size() == 6);
    CHECK(rig.worst_choice(module_of(id), contexts[id], answer.tokens) < 0.02);
  }
  bases.clear();
  CHECK(rig.in_use() == 0);
  CHECK(rig.decode
            ->add_module(take(cuda::factorize(rig.config, rig.models[0])), std::vector<std::int64_t>{2}, 256,
                         -1)
            .status()
            .code() == StatusCode::kInvalidArgument);
}

TEST_CASE(
    "workers on the GPU: decode steps beside a prefill, on parts of the card, choose as double loops do") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(81);
  CAPTURE(seed);
  auto split = cuda::CardSplit::create(device, 0, 8);
  if (split.status().code() == StatusCode::kUnsupported) TEST_SKIP("no green contexts");
  require_ok(split.status());
  CHECK(split->part().device.multiprocessors >= 8);
  CHECK(split->part().device.multiprocessors + split->rest().device.multiprocessors <=
        device.multiprocessors);
  CHECK(cuda::CardSplit::create(device, 0, device.multiprocessors).status().code() ==
        StatusCode::kInvalidArgument);
  Rig rig(device, seed, 240, {48, 6, 64}, {1, 2, 5}, 64, &*split);
  CHECK(rig.decode->use(2).code() == StatusCode::kInvalidArgument);
  const cuda::DevicePlace<__half> whole{device, rig.stream, &*rig.workspace};
  const cuda::DevicePlace<__half> rest{split->rest().device, split->rest().stream, &*rig.workspace};
  Rng rng(seed + 2);
  // Equal contexts beside each other: their blocks meet in the tree while both are being written.
  std::map<std::uint64_t, std::vector<std::int32_t>> contexts;
  for (std::uint64_t id = 0; id < 20; ++id) {
    contexts[id] = random_tokens(rng, 20 + rng.below(70), rig.config.vocab_size);
    if (id % 2 == 1) contexts[id] = contexts[id - 1];
    if (id % 4 == 3) contexts[id].push_back(7);
  }
  const auto module_of = [](std::uint64_t id) { return static_cast<ModuleId>(id % 3 == 0 ? 0 : 1); };
  struct Chunk {
    cudaEvent_t done = nullptr;
    std::vector<PrefillResult> results;
  };
  for (int turn = 0; turn < 2; ++turn) {
    CAPTURE(turn);
    for (const auto& [id, context] : contexts) require_ok(rig.prefill->submit(job_of(id, context)));
    Answers answers;
    std::deque<Chunk> chunks;
    int beside = 0;
    for (KvTime now = 0; now < 600 && (!rig.prefill->idle() || !chunks.empty() || rig.decode->active() > 0);
         ++now) {
      // As many chunks under way as fit; on all of the card at times.
      if (now % 16 == 0) require_ok(rig.prefill->runner().move_to(now % 32 == 0 ? rest : whole));
      const cudaStream_t in = now % 32 < 16 ? rest.stream : whole.stream;
      if (!rig.prefill->idle() && chunks.size() < 2) {
        Chunk chunk;
        rig.prefill->step(now, kIgnorePages,
                          [&](PrefillResult&& result) { chunk.results.push_back(std::move(result)); });
        REQUIRE_CUDA(cudaEventCreateWithFlags(&chunk.done, cudaEventDisableTiming));
        REQUIRE_CUDA(cudaEventRecord(chunk.done, in));
        chunks.push_back(std::move(chunk));
      }
      beside += !chunks.empty() && rig.decode->active() > 0 ? 1 : 0;
      require_ok(rig.decode->use(chunks.empty() ? 0 : 1));  // the whole's memory is the prefill's, too
      rig.decode->step(now, [&](const DecodeEvent& event) { answers(event); });
      if (chunks.empty() || (chunks.size() < 2 && !rig.prefill->idle())) continue;
      REQUIRE_CUDA(cudaEventSynchronize(chunks.front().done));
      REQUIRE_CUDA(cudaEventDestroy(chunks.front().done));
      for (PrefillResult& result : chunks.front().results) {
        require_ok(result.status);
        const auto& context = contexts[result.id];
        REQUIRE(result.cache.length() == std::ssize(context) - 1);
        require_ok(rig.decode->start(request_of(result.id, context, 9, module_of(result.id)), result.cache));
      }
      chunks.pop_front();
    }
    CHECK(beside > 3);
    REQUIRE(answers.by_id.size() == contexts.size());
    for (const auto& [id, answer] : answers.by_id) {
      CAPTURE(id);
      CHECK((answer.ends == 1 && answer.last.kind == Kind::kLength));
      REQUIRE(answer.tokens.size() == 9);
      CHECK(rig.worst_choice(module_of(id), contexts[id], answer.tokens) < 0.02);
      contexts[id].insert(contexts[id].end(), answer.tokens.begin(), answer.tokens.end());
      contexts[id].push_back(static_cast<std::int32_t>(id));
    }
    CHECK(rig.in_use() == 0);
  }
  CHECK(rig.allocator->stats().merged_blocks > 0);
  CHECK(rig.allocator->check_invariants().ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());
}

}  // namespace prefillshare::test
