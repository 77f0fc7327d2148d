// SPDX-License-Identifier: Apache-2.0
//
// The parts of a model for tensor parallelism: every weight is in exactly one of them, and a pass in which
// all ranks compute their part and add up what o and down give is the whole model's.
#include <prefillshare/model/shard_layers.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/reference.hpp>
#include <support/catch.hpp>
#include <support/tiny_model.hpp>

namespace prefillshare::test {
namespace {

ModelConfig parallel_config() {
  ModelConfig c = tiny_config();
  c.heads = 8;
  c.kv_heads = 4;
  c.attention_bias = true;
  c.qk_norm = true;
  c.tied_embeddings = false;
  c.vocab_size = 60;
  return c;
}

// All ranks in turn, in double; `parts` are their blocks, in the order of the ranks.
std::vector<std::vector<double>> forward_of_ranks(
    const LlamaModel<DenseLinear>& whole, const std::vector<std::vector<LlamaLayer<DenseLinear>>>& parts,
    const std::vector<DenseLinear>& heads, const ModelConfig& local, std::span<const std::int32_t> tokens) {
  const ModelConfig& c = whole.config;
  const auto dim = static_cast<std::size_t>(c.head_dim);
  std::vector<std::vector<ReferenceCache>> caches(parts.size(),
                                                  std::vector<ReferenceCache>(whole.layers.size()));
  std::vector<std::vector<double>> all;
  for (const std::int32_t token : tokens) {
    const float* const row = whole.embedding->data() + token * c.hidden_size;
    std::vector<double> x(row, row + c.hidden_size);
    for (std::size_t i = 0; i < whole.layers.size(); ++i) {
      std::vector<double> sum = x;
      const auto add = [&](const std::vector<double>& product) {
        for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += product[d];
      };
      for (std::size_t r = 0; r < parts.size(); ++r) {
        const LlamaLayer<DenseLinear>& layer = parts[r][i];
        ReferenceCache& cache = caches[r][i];
        const std::size_t at = cache.k.size();
        const std::vector<double> normed = detail::ref_norm(x, layer.input_norm, c.rms_epsilon);
        std::vector<double> q = detail::ref_linear(layer.q, normed);
        std::vector<double> k = detail::ref_linear(layer.k, normed);
        detail::ref_position(q, layer.q_norm, local, at);
        detail::ref_position(k, layer.k_norm, local, at);
        cache.k.push_back(std::move(k));
        cache.v.push_back(detail::ref_linear(layer.v, normed));
        std::vector<double> attended(q.size(), 0.0);
        for (std::size_t head = 0; head < static_cast<std::size_t>(local.heads); ++head) {
          const std::size_t kv = head / static_cast<std::size_t>(local.heads / local.kv_heads);
          std::vector<double> weights(at + 1);
          double total = 0.0;
          for (std::size_t s = 0; s <= at; ++s) {
            double score = 0.0;
            for (std::size_t d = 0; d < dim; ++d) score += q[head * dim + d] * cache.k[s][kv * dim + d];
            weights[s] = std::exp(score / std::sqrt(static_cast<double>(dim)));
            total += weights[s];
          }
          for (std::size_t s = 0; s <= at; ++s) {
            for (std::size_t d = 0; d < dim; ++d)
              attended[head * dim + d] += weights[s] / total * cache.v[s][kv * dim + d];
          }
        }
        add(detail::ref_linear(layer.o, attended));
      }
      x = sum;
      for (const auto& part : parts) {
        const LlamaLayer<DenseLinear>& layer = part[i];
        const std::vector<double> post = detail::ref_norm(x, layer.post_attention_norm, c.rms_epsilon);
        std::vector<double> gate = detail::ref_linear(layer.gate, post);
        const std::vector<double> up = detail::ref_linear(layer.up, post);
        for (std::size_t d = 0; d < gate.size(); ++d) gate[d] = gate[d] / (1.0 + std::exp(-gate[d])) * up[d];
        add(detail::ref_linear(layer.down, gate));
      }
      x = sum;
    }
    std::vector<double> logits;
    for (const DenseLinear& head : heads) {
      const auto own = detail::ref_linear(head, detail::ref_norm(x, whole.final_norm, c.rms_epsilon));
      logits.insert(logits.end(), own.begin(), own.end());
    }
    all.push_back(std::move(logits));
  }
  return all;
}

CodeGemmLinear random_codes(codegemm::Format format, std::int64_t rows, std::int64_t cols, Rng& rng) {
  auto matrix = codegemm::QuantizedMatrix::create(format, rows, cols).value();
  for (std::int64_t m = 0; m < format.m; ++m) {
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t j = 0; j < cols / format.v; ++j)
        matrix.set_code(m, n, j, static_cast<std::uint32_t>(rng.below(format.centroids())));
    }
  }
  for (auto& value : matrix.codebooks()) value = codegemm::Half::from_float(rng.normal());
  for (auto& value : matrix.scales()) value = codegemm::Half::from_float(rng.uniform(0.5F, 1.5F));
  return CodeGemmLinear(codegemm::pack(matrix.view()).value(), rng.normals(rows));
}

}  // namespace

TEST_CASE("ranks that each compute their part of a model compute the whole one") {
  const std::uint64_t seed = codegemm::test::seed_or(71);
  const auto whole = random_model(parallel_config(), seed);
  Rng rng(seed + 1);
  const auto tokens = random_tokens(rng, 9, whole->config.vocab_size);
  std::vector<ReferenceCache> caches;
  const auto want = reference_forward(*whole, tokens, caches);
  for (const int ranks : {1, 2, 4}) {
    std::vector<std::vector<LlamaLayer<DenseLinear>>> parts;
    std::vector<DenseLinear> heads;
    for (int rank = 0; rank < ranks; ++rank) {
      auto& layers = parts.emplace_back();
      for (const auto& layer : whole->layers) layers.push_back(shard_layer(layer, {ranks, rank}).value());
      heads.push_back(shard_outputs(whole->head, {ranks, rank}).value());
    }
    const ModelConfig local = shard_config(whole->config, {ranks, 0}).value();
    CHECK(local.heads * ranks == whole->config.heads);
    CHECK(local.kv_heads * ranks == whole->config.kv_heads);
    CHECK(local.intermediate_size * ranks == whole->config.intermediate_size);
    CHECK(local.hidden_size == whole->config.hidden_size);
    const auto got = forward_of_ranks(*whole, parts, heads, local, tokens);
    std::vector<float> flat;
    for (const auto& row : got) flat.insert(flat.end(), row.begin(), row.end());
    CAPTURE(seed, ranks);
    CHECK(worst_relative(flat, want) < 1e-6);  // the comparison's own fp32
  }
}

TEST_CASE("every weight of a layer of codes is in one of its parts, with its bias once") {
  Rng rng(codegemm::test::seed_or(73));
  for (const char* name : {"m1v4g128", "m2v8g64", "m1v4g-1"}) {
    const auto format = codegemm::parse_format(name).value();
    const CodeGemmLinear whole = random_codes(format, 48, 512, rng);
    const auto all = codegemm::unpack(whole.weights()).value();
    for (const int ranks : {1, 2, 4}) {
      for (int rank = 0; rank < ranks; ++rank) {
        CAPTURE(name, ranks, rank);
        const CodeGemmLinear outputs = shard_outputs(whole, {ranks, rank}).value();
        const CodeGemmLinear inputs = shard_inputs(whole, {ranks, rank}).value();
        REQUIRE(outputs.rows() * ranks == 48);
        REQUIRE(inputs.cols() * ranks == 512);
        const auto by_rows = codegemm::unpack(outputs.weights()).value();
        const auto by_cols = codegemm::unpack(inputs.weights()).value();
        bool same = true;
        for (std::int64_t n = 0; n < outputs.rows(); ++n) {
          for (std::int64_t k = 0; k < 512; ++k) {
            same = same && codegemm::reference_weight(by_rows.view(), n, k) ==
                               codegemm::reference_weight(all.view(), rank * outputs.rows() + n, k);
          }
          same = same && outputs.bias()[static_cast<std::size_t>(n)] ==
                             whole.bias()[static_cast<std::size_t>(rank * outputs.rows() + n)];
        }
        for (std::int64_t n = 0; n < 48; ++n) {
          for (std::int64_t k = 0; k < inputs.cols(); ++k) {
            same = same && codegemm::reference_weight(by_cols.view(), n, k) ==
                               codegemm::reference_weight(all.view(), n, rank * inputs.cols() + k);
          }
        }
        CHECK(same);
        CHECK(inputs.bias().size() == (rank == 0 ? 48U : 0U));
      }
    }
  }
}

TEST_CASE("what cannot be dealt out evenly is refused with its name and numbers") {
  const auto text = [](const Status& status) { return status.message(); };
  ModelConfig config = parallel_config();
  CHECK(text(shard_config(config, {3, 0}).status()) == "ModelConfig::heads is 8, no multiple of 3 ranks");
  CHECK(text(shard_config(config, {8, 0}).status()) == "ModelConfig::kv_heads is 4, no multiple of 8 ranks");
  config.intermediate_size = 41;
  CHECK(shard_config(config, {2, 0}).status().code() == StatusCode::kInvalidArgument);
  for (const ModelShard part : {ModelShard{0, 0}, ModelShard{2, 2}, ModelShard{2, -1}}) {
    CHECK(shard_config(config, part).status().code() == StatusCode::kInvalidArgument);
  }
  Rng rng(5);
  const CodeGemmLinear codes = random_codes(codegemm::parse_format("m1v4g128").value(), 32, 384, rng);
  // 192 columns: the second scale group would be cut.
  CHECK(text(shard_inputs(codes, {2, 1}).status()).find("multiples of 128") != std::string::npos);
  const auto whole = random_model(parallel_config(), 3);
  CHECK(text(shard_layer(whole->layers[0], {3, 0}).status()).starts_with("q_proj: N is 64"));
}

}  // namespace prefillshare::test
