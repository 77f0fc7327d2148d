// SPDX-License-Identifier: Apache-2.0
//
// What may be factorized, what may not, and what a message says about it.

#include <string>

#include <prefillshare/model/modules.hpp>
#include <support/catch.hpp>
#include <support/model_harness.hpp>
#include <support/tiny_model.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::test;

void check_names(const Status& status, std::initializer_list<const char*> parts) {
  CAPTURE(status.message());
  for (const char* part : parts) {
    CAPTURE(part);
    CHECK(status.message().find(part) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("a decode module must fit the base's cache, and the message names all that differs") {
  const ModelConfig base = tiny_config();
  const PrefillModule<DenseLinear> module(random_model(base, 1), CacheKey{"base", "1", ""});

  SECTION("the base itself fits") { CHECK(factorize(module, random_model(base, 2)).ok()); }
  SECTION("what the cache is not made of may differ") {
    ModelConfig other = base;
    other.hidden_size = 32;
    other.intermediate_size = 16;
    other.heads = 2;
    other.tied_embeddings = false;
    CHECK(factorize(module, random_model(other, 3)).ok());
  }
  SECTION("everything else may not") {
    ModelConfig other = base;
    other.vocab_size = 62;
    other.layers = 3;
    other.kv_heads = 3;
    other.head_dim = 16;
    other.rope.head_dim = 16;
    other.rope.theta = 500000.0;
    other.qk_norm = true;
    // [guide: factorize]
    const auto made = factorize(module, random_model(other, 4));
    REQUIRE_FALSE(made.ok());
    CHECK(made.status().code() == StatusCode::kIncompatible);
    check_names(made.status(),
                {"vocab_size: base 61, decode 62", "layers: base 2, decode 3", "kv_heads: base 2, decode 3",
                 "head_dim: base 8, decode 16", "rope theta: base 10000, decode 500000", "qk_norm"});
    // [guide: end]
  }
  SECTION("RoPE scaling is part of the cache") {
    ModelConfig other = base;
    other.rope.scaling = RopeScaling::kLinear;
    other.rope.factor = 4.0;
    check_names(factorize(module, random_model(other, 5)).status(),
                {"rope scaling type", "rope scaling factor"});
  }
  SECTION("no model at all") {
    CHECK(factorize(module, std::shared_ptr<const LlamaModel<DenseLinear>>()).status().code() ==
          StatusCode::kNullPointer);
  }
  SECTION("a model whose tensors do not fit its own config") {
    auto broken = std::make_shared<LlamaModel<DenseLinear>>(*random_model(base, 6));
    broken->layers[1].down = broken->layers[1].up;
    check_names(factorize(module, std::shared_ptr<const LlamaModel<DenseLinear>>(broken)).status(),
                {"model.layers.1.mlp.down_proj is 40 x 24", "24 x 40"});
  }
}

TEST_CASE("validate names the member of a config that cannot be") {
  const auto message = [](auto&& change) {
    ModelConfig c = tiny_config();
    change(c);
    const Status status = validate(c);
    CHECK(status.code() == StatusCode::kInvalidArgument);
    return status.message();
  };
  CHECK(validate(tiny_config()).ok());
  CHECK(message([](ModelConfig& c) { c.layers = 0; }).find("layers is 0") != std::string::npos);
  CHECK(message([](ModelConfig& c) { c.vocab_size = -5; }).find("vocab_size is -5") != std::string::npos);
  CHECK(message([](ModelConfig& c) { c.hidden_size = std::int64_t{1} << 40; }).find("hidden_size") !=
        std::string::npos);
  CHECK(message([](ModelConfig& c) { c.kv_heads = 4; }).find("not a multiple of kv_heads = 4") !=
        std::string::npos);
  CHECK(message([](ModelConfig& c) { c.head_dim = 7; }).find("head_dim is 7") != std::string::npos);
  CHECK(message([](ModelConfig& c) { c.rms_epsilon = 0.0; }).find("rms_epsilon") != std::string::npos);
}

TEST_CASE("a prefill module stops at the context length and at the last block, and keeps what it has") {
  ModelConfig config = tiny_config();
  config.context_length = 64;
  const PrefillModule<DenseLinear> module(random_model(config, 7), CacheKey{"base", "1", ""});
  codegemm::SerialExecutor serial;
  CacheHarness cache(config, 3);  // 48 tokens
  ForwardWorkspace workspace = ForwardWorkspace::create(module.model(), 8, 64, 1).value();
  Rng rng(8);
  const std::vector<std::int32_t> tokens = random_tokens(rng, 65, config.vocab_size);
  Sequence sequence = cache.allocator->open(module.key(), {}).value();
  const auto prefill = [&](std::size_t first, std::size_t count) {
    return module.prefill(std::span(tokens).subspan(first, count), *cache.allocator, cache.storage, sequence,
                          workspace, serial);
  };
  check_names(prefill(0, 65), {"65 tokens", "context length is 64"});
  CHECK(sequence.length() == 0);
  CHECK(prefill(0, 40).ok());
  CHECK(prefill(40, 20).code() == StatusCode::kExhausted);
  CHECK(sequence.length() == 40);
  CHECK(prefill(40, 8).ok());
  CHECK(sequence.length() == 48);
}
