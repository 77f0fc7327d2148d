// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <bench/support/permuted_model.hpp>
#include <support/catch.hpp>
#include <support/tiny_model.hpp>

using namespace prefillshare;
using namespace prefillshare::test;

TEST_CASE("a model with its channels in another order says the same", "[permuted]") {
  ModelConfig plain = tiny_config();
  ModelConfig untied = tiny_config();
  untied.tied_embeddings = false;
  untied.attention_bias = untied.qk_norm = true;
  for (const ModelConfig& c : {plain, untied}) {
    const auto model = random_model(c, 7);
    const auto permuted = codegemm::bench::permuted_model(*model, 3);
    REQUIRE(validate(*permuted).ok());
    // Every matrix has other neighbours in its rows.
    for (std::size_t i = 0; i < model->layers.size(); ++i) {
      const auto& a = model->layers[i];
      const auto& b = permuted->layers[i];
      for (const auto& [old, now] :
           {std::pair(&a.q, &b.q), {&a.o, &b.o}, {&a.up, &b.up}, {&a.down, &b.down}}) {
        const float* const values = old->weights().data;
        CHECK(!std::equal(values, values + old->cols(), now->weights().data));
      }
    }
    Rng rng(8);
    const std::vector<std::int32_t> tokens = random_tokens(rng, 21, c.vocab_size);
    std::vector<ReferenceCache> caches;
    std::vector<ReferenceCache> others;
    const auto want = reference_forward(*model, tokens, caches);
    const auto got = reference_forward(*permuted, tokens, others);
    REQUIRE(want.size() == got.size());
    double worst = 0.0;
    for (std::size_t t = 0; t < want.size(); ++t) {
      for (std::size_t i = 0; i < want[t].size(); ++i)
        worst = std::max(worst, std::abs(want[t][i] - got[t][i]));
    }
    CHECK(worst <= 1e-9);
    CHECK(worst > 0.0);  // the sums have another order: it is another model
  }
}
