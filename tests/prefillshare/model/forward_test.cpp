// SPDX-License-Identifier: Apache-2.0
//
// The forward pass against plain double loops, in one pass, in chunks, and on a cache that another model
// made.

#include <cmath>
#include <cstdint>
#include <vector>

#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/reference.hpp>
#include <prefillshare/model/codegemm_linear.hpp>
#include <prefillshare/model/forward.hpp>
#include <support/catch.hpp>
#include <support/model_harness.hpp>
#include <support/tiny_model.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::test;

// fp32 sums of up to 40 products through two layers: a few units of 6e-8 each, with room for ten times that.
constexpr double kTolerance = 2e-5;

Sequence open_empty(CacheHarness& cache) { return cache.allocator->open(CacheKey{"m", "1", ""}, {}).value(); }

}  // namespace

TEST_CASE("forward equals the double reference for every variant of the family") {
  const std::uint64_t seed = codegemm::test::seed_or(11);
  CAPTURE(seed);
  ModelConfig config = tiny_config();
  SECTION("Llama: tied head, no biases") {}
  SECTION("Llama: head of its own") { config.tied_embeddings = false; }
  SECTION("Qwen2: biases") { config.attention_bias = true; }
  SECTION("Qwen3: head norms, wide heads") {
    config.qk_norm = true;
    config.head_dim = 16;
    config.rope.head_dim = 16;
  }
  SECTION("one KV head") { config.kv_heads = 1; }
  SECTION("as many KV heads as heads") { config.kv_heads = 6; }
  const auto model = random_model(config, seed);
  REQUIRE(validate(*model).ok());
  Rng rng(seed + 1);
  const std::vector<std::int32_t> tokens = random_tokens(rng, 37, config.vocab_size);

  std::vector<ReferenceCache> reference_cache;
  const auto reference = reference_forward(*model, tokens, reference_cache);

  codegemm::ThreadPool pool(2);
  CacheHarness cache(config, 8);
  Sequence sequence = open_empty(cache);
  const std::vector<float> logits = run_forward(*model, tokens, 37, cache, sequence, pool);
  CHECK(worst_relative(logits, reference) < kTolerance);

  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const BlockId block = sequence.blocks()[t / 16];
    for (int l = 0; l < config.layers; ++l) {
      const auto& want = reference_cache[static_cast<std::size_t>(l)];
      for (std::int64_t d = 0; d < config.kv_size(); ++d) {
        const auto slot = static_cast<int>(t % 16);
        const double k = static_cast<double>(cache.storage.k(l, block, slot)[d]);
        const double v = static_cast<double>(cache.storage.v(l, block, slot)[d]);
        REQUIRE(std::abs(k - want.k[t][static_cast<std::size_t>(d)]) < 1e-4);
        REQUIRE(std::abs(v - want.v[t][static_cast<std::size_t>(d)]) < 1e-4);
      }
    }
  }
}

TEST_CASE("a forward pass in chunks of any size gives what one pass gives") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, codegemm::test::seed_or(21));
  Rng rng(22);
  const std::vector<std::int32_t> tokens = random_tokens(rng, 70, config.vocab_size);
  std::vector<ReferenceCache> reference_cache;
  const auto reference = reference_forward(*model, tokens, reference_cache);

  codegemm::SerialExecutor serial;
  for (const std::size_t chunk : {1UL, 2UL, 15UL, 16UL, 17UL, 33UL, 70UL}) {
    CAPTURE(chunk);
    CacheHarness cache(config, 8);
    Sequence sequence = open_empty(cache);
    for (std::size_t first = 0; first < tokens.size(); first += chunk) {
      const std::size_t count = std::min(chunk, tokens.size() - first);
      const bool last = first + count == tokens.size();
      const auto part = std::span<const std::int32_t>(tokens).subspan(first, count);
      const std::vector<float> logits =
          run_forward(*model, part, last ? static_cast<std::int64_t>(count) : 0, cache, sequence, serial);
      if (last)
        CHECK(worst_relative(logits, {reference.end() - static_cast<std::ptrdiff_t>(count),
                                      reference.end()}) < kTolerance);
    }
  }
}

TEST_CASE("a batch of sequences gives each what it gets alone, to the bit where one token each is dense") {
  ModelConfig config = tiny_config();
  config.hidden_size = 32;  // rows fill cache lines
  config.intermediate_size = 48;
  const auto model = random_model(config, codegemm::test::seed_or(61));
  codegemm::ThreadPool pool(2);
  ForwardWorkspace workspace = ForwardWorkspace::create(*model, 64, 128, 2).value();
  for (const std::size_t count : {1UL, 2UL, 3UL, 8UL, 9UL}) {
    CAPTURE(count);
    CacheHarness cache(config, 64);
    std::vector<Sequence> alone, together;
    std::vector<std::int32_t> next;
    Rng rng(count);
    for (std::size_t i = 0; i < count; ++i) {  // contexts of unlike lengths, twice
      const std::vector<std::int32_t> context = random_tokens(rng, 1 + rng.below(40), config.vocab_size);
      next.push_back(static_cast<std::int32_t>(rng.below(config.vocab_size)));
      for (std::vector<Sequence>* to : {&alone, &together}) {
        to->push_back(open_empty(cache));
        run_forward(*model, context, 0, cache, to->back(), pool);
        REQUIRE(cache.allocator->reserve(to->back(), 20).ok());
      }
    }
    const auto target = [&](Sequence& sequence) {
      return KvTarget{&cache.storage, sequence.blocks(), sequence.length()};
    };
    std::vector<ForwardItem> items;
    for (std::size_t i = 0; i < count; ++i) items.push_back({std::span(&next[i], 1), target(together[i])});
    const auto rows = static_cast<std::int64_t>(count);
    std::vector<float> logits(count * 61, NAN);
    std::vector<int> layers;
    REQUIRE(forward_batch(*model, items, MatrixView<float>(logits.data(), rows, 61), workspace, pool,
                          [&](int layer) {
                            // The KV of every item stands in its page.
                            for (std::size_t i = 0; i < count; ++i) {
                              const auto at = static_cast<std::size_t>(together[i].length());
                              const float* k = cache.storage.k(layer, items[i].kv.blocks[at / 16],
                                                               static_cast<int>(at % 16));
                              CHECK(std::abs(k[0]) + std::abs(k[1]) > 0.0F);
                            }
                            layers.push_back(layer);
                            return Status();
                          })
                .ok());
    CHECK(layers == std::vector<int>{0, 1});
    for (std::size_t i = 0; i < count; ++i) {
      CAPTURE(i);
      std::vector<float> want(61, NAN);
      REQUIRE(forward(*model, std::span(&next[i], 1), target(alone[i]), MatrixView<float>(want.data(), 1, 61),
                      workspace, pool)
                  .ok());
      const std::span<const float> got(logits.data() + i * 61, 61);
      const std::vector<std::vector<double>> wanted{{want.begin(), want.end()}};
      CHECK(worst_relative(got, wanted) < kTolerance);
      if (count <= DenseLinear::kFewTokens) CHECK(std::equal(got.begin(), got.end(), want.begin()));
    }
    // Prefill chunks and single tokens in one pass, each with the logits of its last token.
    if (count < 3) continue;
    const std::vector<std::int32_t> chunk = random_tokens(rng, 17, config.vocab_size);
    items[1].tokens = chunk;
    REQUIRE(forward_batch(*model, items, MatrixView<float>(logits.data(), rows, 61), workspace, pool).ok());
    std::vector<float> want(61, NAN);
    REQUIRE(forward(*model, chunk, target(alone[1]), MatrixView<float>(want.data(), 1, 61), workspace, pool)
                .ok());
    CHECK(worst_relative(std::span<const float>(logits.data() + 61, 61), {{want.begin(), want.end()}}) <
          kTolerance);
    items[2].kv.first_position = 128;
    const Status status = forward_batch(*model, items, MatrixView<float>(), workspace, pool);
    CHECK(status.code() == StatusCode::kInvalidArgument);
    CHECK(status.message().find("item 2") != std::string::npos);
    items[2] = {};
    CHECK_FALSE(forward_batch(*model, items, MatrixView<float>(), workspace, pool).ok());
    CHECK(forward_batch(*model, std::span(items).first(1), MatrixView<float>(logits.data(), 2, 61), workspace,
                        pool)
              .code() == StatusCode::kShapeMismatch);
    CHECK(
        forward_batch(*model, std::span(items).first(1), MatrixView<float>(), workspace, pool, [](int layer) {
          return layer == 0 ? error(StatusCode::kCancelled, "enough") : Status();
        }).code() == StatusCode::kCancelled);
  }
}

TEST_CASE("forward does not depend on the number of workers") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, codegemm::test::seed_or(31));
  Rng rng(32);
  const std::vector<std::int32_t> tokens = random_tokens(rng, 65, config.vocab_size);
  std::vector<std::vector<float>> results;
  for (const int workers : {1, 2, 3}) {
    codegemm::ThreadPool pool(workers);
    CacheHarness cache(config, 8);
    Sequence sequence = open_empty(cache);
    results.push_back(run_forward(*model, tokens, 65, cache, sequence, pool));
  }
  CHECK(results[0] == results[1]);
  CHECK(results[0] == results[2]);
}

TEST_CASE("a model of CodeGEMM layers is the dense model of its dequantized weights") {
  ModelConfig config = tiny_config();
  config.tied_embeddings = false;
  const auto dense = random_model(config, codegemm::test::seed_or(41));
  codegemm::SerialExecutor serial;
  auto quantized = std::make_shared<LlamaModel<CodeGemmLinear>>();
  auto rebuilt = std::make_shared<LlamaModel<DenseLinear>>(*dense);
  quantized->config = config;
  quantized->embedding = dense->embedding;
  quantized->final_norm = dense->final_norm;
  for (const auto& layer : dense->layers) {
    auto& target = quantized->layers.emplace_back();
    target.input_norm = layer.input_norm;
    target.post_attention_norm = layer.post_attention_norm;
  }
  std::vector<CodeGemmLinear*> into;
  std::vector<DenseLinear*> plain;
  for_each_linear(*quantized, [&](const std::string&, CodeGemmLinear& layer) { into.push_back(&layer); });
  for_each_linear(*rebuilt, [&](const std::string&, DenseLinear& layer) { plain.push_back(&layer); });
  std::size_t index = 0;
  for_each_linear(*dense, [&](const std::string& name, const DenseLinear& layer) {
    CAPTURE(name);
    const codegemm::Format format{4, 1, 8, 8};
    const auto matrix = codegemm::quantize_kmeans(layer.weights(), format, {}, serial);
    REQUIRE(matrix.ok());
    *into[index] = CodeGemmLinear(codegemm::pack(matrix->view()).value());
    std::vector<float> values(static_cast<std::size_t>(layer.rows() * layer.cols()));
    codegemm::reference_dequantize(matrix->view(),
                                   MatrixView<float>(values.data(), layer.rows(), layer.cols()));
    *plain[index] = DenseLinear(std::make_shared<const std::vector<float>>(std::move(values)), layer.rows(),
                                layer.cols());
    ++index;
  });
  REQUIRE(validate(*quantized).ok());

  Rng rng(42);
  const std::vector<std::int32_t> tokens = random_tokens(rng, 33, config.vocab_size);
  std::vector<ReferenceCache> reference_cache;
  const auto reference = reference_forward(*rebuilt, tokens, reference_cache);
  CacheHarness cache(config, 8);
  Sequence sequence = open_empty(cache);
  CHECK(worst_relative(run_forward(*quantized, tokens, 33, cache, sequence, serial), reference) < kTolerance);
}

TEST_CASE("forward refuses a wrong call with the numbers, and writes nothing") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, 51);
  codegemm::SerialExecutor serial;
  CacheHarness cache(config, 8);
  Sequence sequence = open_empty(cache);
  REQUIRE(cache.allocator->reserve(sequence, 16).ok());
  ForwardWorkspace workspace = ForwardWorkspace::create(*model, 4, 32, 1).value();
  std::vector<float> logits(static_cast<std::size_t>(5 * config.vocab_size), -1.0F);
  const auto call = [&](std::vector<std::int32_t> tokens, std::int64_t first, std::int64_t rows,
                        std::int64_t cols) {
    const KvTarget target{&cache.storage, sequence.blocks(), first};
    return forward(*model, tokens, target, MatrixView<float>(logits.data(), rows, cols), workspace, serial);
  };
  const auto names = [](const Status& status, const char* part) {
    CAPTURE(status.message());
    CHECK(status.message().find(part) != std::string::npos);
  };
  const Status token = call({1, 61}, 0, 1, 61);
  CHECK(token.code() == StatusCode::kInvalidArgument);
  names(token, "token 1 has id 61");
  names(call({-1}, 0, 1, 61), "id -1");
  names(call({1, 2, 3, 4, 5}, 0, 1, 61), "5 tokens in a workspace for 4");
  names(call({1, 2}, 31, 1, 61), "contexts of 32 tokens");
  CHECK(call({1, 2}, 0, 3, 61).code() == StatusCode::kShapeMismatch);
  CHECK(call({1, 2}, 0, 1, 60).code() == StatusCode::kShapeMismatch);
  CHECK_FALSE(call({1, 2}, 15, 1, 61).ok());  // the second token has no block
  codegemm::ThreadPool pool(2);
  const KvTarget target{&cache.storage, sequence.blocks(), 0};
  names(forward(*model, std::vector<std::int32_t>{1}, target, MatrixView<float>(), workspace, pool),
        "2 workers");
  CHECK(call({}, 0, 0, 0).ok());
  for (const float value : logits) REQUIRE(value == -1.0F);
}
