// SPDX-License-Identifier: Apache-2.0
//
// On a real model: with a decode module whose weights are the base's, the greedy tokens under shared prefill
// are those of an ordinary unshared run, token by token.

#include <cstdlib>
#include <string>
#include <vector>

#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <support/catch.hpp>
#include <support/model_harness.hpp>

TEST_CASE("greedy tokens under shared prefill equal the unshared run's on three prompts") {
  using namespace prefillshare;
  using namespace prefillshare::examples;
  const char* path = std::getenv("PREFILLSHARE_TEST_MODEL");
  if (path == nullptr || *path == '\0') TEST_SKIP("PREFILLSHARE_TEST_MODEL names no model");

  const auto source = open_model(path);
  INFO(source.status().message());
  REQUIRE(source.ok());
  const auto loaded = load_model(**source);
  INFO(loaded.status().message());
  REQUIRE(loaded.ok());
  const auto tokenizer = load_tokenizer(path);
  INFO(tokenizer.status().message());
  REQUIRE(tokenizer.ok());

  codegemm::ThreadPool pool;
  constexpr std::int64_t kTokens = 128;
  for (const char* text : {
           "The river had risen in the night, and by morning",
           "<|im_start|>user\nExplain in a few sentences why the sky is "
           "blue.<|im_end|>\n<|im_start|>assistant\n",
           "def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number, counted from zero.\"\"\"\n",
       }) {
    CAPTURE(text);
    const std::vector<std::int32_t> prompt = tokenizer->encode(text).value();
    const std::vector<std::int32_t> unshared = test::generate_unshared(*loaded->model, prompt, kTokens, pool);
    const auto context = static_cast<std::int64_t>(prompt.size()) + kTokens;
    test::SessionHarness<DenseLinear, DenseLinear> harness(loaded->model, loaded->model, 64, context,
                                                           context / 16 + 4, pool);
    harness.session.append(prompt);
    const auto shared = harness.greedy(kTokens);
    INFO(shared.status().message());
    REQUIRE(shared.ok());
    REQUIRE(shared->tokens.size() == static_cast<std::size_t>(kTokens));
    for (std::size_t i = 0; i < shared->tokens.size(); ++i) {
      CAPTURE(i);
      REQUIRE(shared->tokens[i] == unshared[i]);
    }
  }
}
