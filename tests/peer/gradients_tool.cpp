// SPDX-License-Identifier: Apache-2.0
//
// tests/peer/gradients_tool.cpp - writes small random models, a batch behind a base's cache, and our losses
// and gradients in double, for gradients_peer.py to compare with PyTorch's autograd.
// Usage: gradients_tool OUT_FOLDER   OUT_FOLDER/N.safetensors for each kind of model.

#include <cstdint>
#include <cstdio>
#include <exception>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <codegemm/io/safetensors_writer.hpp>
#include <prefillshare/train/pass.hpp>
#include <support/tiny_model.hpp>

namespace {

using namespace prefillshare;

int fail(const Status& status) {
  std::fprintf(stderr, "gradients_tool: %s\n", status.message().c_str());
  return 2;
}

template <class T>
codegemm::SafetensorsTensor tensor(const std::string& name, codegemm::Dtype dtype,
                                   std::vector<std::int64_t> shape, std::span<const T> values) {
  return {name, dtype, std::move(shape), std::as_bytes(values)};
}

int write(const ModelConfig& c, const std::string& path) {
  constexpr std::int64_t kPrefix = 6;
  constexpr std::int64_t kRows = 29;
  test::Rng rng(77);
  std::vector<double> keys;
  std::vector<double> values;
  for (std::vector<double>* x : {&keys, &values}) {
    for (const float value : rng.normals(c.layers * kPrefix * c.kv_size()))
      x->push_back(static_cast<double>(value));
  }
  LossBatch<double> batch;
  batch.tokens = test::random_tokens(rng, kRows, c.vocab_size);
  batch.segments = {{0, kRows, kPrefix, kPrefix, keys.data(), values.data()}};
  for (std::int64_t i = 9; i < kRows; ++i) batch.loss_rows.push_back(i);
  batch.labels = test::random_tokens(rng, kRows - 9, c.vocab_size);

  codegemm::SerialExecutor serial;
  auto pass = TrainPass<double>::create(c, kRows, 64, serial);
  if (!pass.ok()) return fail(pass.status());
  auto model = TrainableModel<double>::full(test::random_model(c, 78));
  if (!model.ok()) return fail(model.status());
  std::vector<double> losses;
  if (Status s = pass->run(*model, batch, true, 1.0, losses); !s.ok()) return fail(s);

  std::vector<codegemm::SafetensorsTensor> out;
  for (const Parameter<double>& p : model->parameters()) {
    out.push_back(tensor(p.name, codegemm::Dtype::kF64, p.shape, p.value.span()));
    out.push_back(tensor("gradient " + p.name, codegemm::Dtype::kF64, p.shape, p.gradient.span()));
  }
  const std::vector<std::int64_t> cache = {c.layers, kPrefix, c.kv_heads, c.head_dim};
  out.push_back(tensor("keys", codegemm::Dtype::kF64, cache, std::span<const double>(keys)));
  out.push_back(tensor("values", codegemm::Dtype::kF64, cache, std::span<const double>(values)));
  out.push_back(
      tensor("tokens", codegemm::Dtype::kI32, {kRows}, std::span<const std::int32_t>(batch.tokens)));
  out.push_back(
      tensor("labels", codegemm::Dtype::kI32, {kRows - 9}, std::span<const std::int32_t>(batch.labels)));
  out.push_back(tensor("losses", codegemm::Dtype::kF64, {kRows - 9}, std::span<const double>(losses)));
  const codegemm::SafetensorsText texts[] = {
      {"layers", codegemm::concat(c.layers)},
      {"heads", codegemm::concat(c.heads)},
      {"kv_heads", codegemm::concat(c.kv_heads)},
      {"head_dim", codegemm::concat(c.head_dim)},
      {"theta", codegemm::concat(c.rope.theta)},
      {"factor", codegemm::concat(c.rope.scaling == RopeScaling::kLinear ? c.rope.factor : 1.0)},
      {"epsilon", codegemm::concat(c.rms_epsilon)}};
  if (Status s = codegemm::write_safetensors(path, out, texts); !s.ok()) return fail(s);
  return 0;
}

int run(const std::string& folder) {
  ModelConfig plain = test::tiny_config();
  plain.rope.scaling = RopeScaling::kLinear;
  plain.rope.factor = 4.0;
  ModelConfig qwen = test::tiny_config();
  qwen.attention_bias = true;
  qwen.qk_norm = true;
  qwen.tied_embeddings = false;
  const int first = write(plain, folder + "/0.safetensors");
  return first != 0 ? first : write(qwen, folder + "/1.safetensors");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: gradients_tool OUT_FOLDER\n");
    return 2;
  }
  try {
    return run(argv[1]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "gradients_tool: %s\n", e.what());
    return 2;
  }
}
