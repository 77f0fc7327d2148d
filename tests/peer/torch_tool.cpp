// SPDX-License-Identifier: Apache-2.0
//
// tests/peer/torch_tool.cpp - quantizes a model, and writes our greedy tokens, for torch_peer.py to compare.
// Usage: torch_tool quantize MODEL FOLDER FORMAT     a folder in CodeGEMM's format, by a quick k-means
//        torch_tool generate BASE FOLDER IDS.json COUNT OUT.json
// IDS.json: [[id, ...], ...]; OUT.json: for each prompt {"own": tokens of the model in FOLDER by itself,
// "shared": the same model's from the cache of BASE}.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/model_checkpoint.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <common/model_loader.hpp>
#include <common/model_writer.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/model/codegemm_linear.hpp>
#include <prefillshare/serve/session.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

/// The folder's layers are codes, but its head is dense.
class EitherLinear {
 public:
  EitherLinear() = default;
  explicit EitherLinear(DenseLinear layer) : layer_(std::move(layer)) {}
  explicit EitherLinear(CodeGemmLinear layer) : layer_(std::move(layer)) {}

  [[nodiscard]] std::int64_t rows() const {
    return std::visit([](const auto& l) { return l.rows(); }, layer_);
  }
  [[nodiscard]] std::int64_t cols() const {
    return std::visit([](const auto& l) { return l.cols(); }, layer_);
  }
  [[nodiscard]] std::int64_t parameter_bytes() const {
    return std::visit([](const auto& l) { return l.parameter_bytes(); }, layer_);
  }
  [[nodiscard]] std::size_t workspace_bytes(std::int64_t tokens, int workers) const {
    return std::visit([&](const auto& l) { return l.workspace_bytes(tokens, workers); }, layer_);
  }
  Status forward(MatrixView<const float> x, MatrixView<float> y, std::span<std::byte> workspace,
                 Executor& executor) const {
    return std::visit([&](const auto& l) { return l.forward(x, y, workspace, executor); }, layer_);
  }

 private:
  std::variant<DenseLinear, CodeGemmLinear> layer_;
};
static_assert(LinearLayer<EitherLinear>);

void quantize(const std::string& model, const std::string& folder, const std::string& name) {
  const codegemm::Format format = unwrap(codegemm::parse_format(name));
  codegemm::ThreadPool pool;
  const std::unique_ptr<TensorSource> source = unwrap(open_model(model));
  const LoadedModel loaded = unwrap(load_model(*source));
  codegemm::KMeansOptions options;
  options.iterations = 6;
  options.rounds = 2;
  options.encode_rounds = 1;
  options.refits = 1;
  options.sample = 8192;
  std::vector<std::string> names;
  std::vector<codegemm::QuantizedMatrix> matrices;
  for_each_linear(*loaded.model, [&](const std::string& layer_name, const DenseLinear& layer) {
    if (layer_name == "lm_head") return;
    names.push_back(layer_name);
    matrices.push_back(unwrap(codegemm::quantize_kmeans(layer.weights(), format, options, pool)));
  });
  std::vector<codegemm::NamedMatrix> named;
  for (std::size_t i = 0; i < names.size(); ++i) named.push_back({names[i], matrices[i].view()});
  check(write_quantized_model(*source, folder, codegemm::CheckpointKind::kCodeGemm, named));
}

std::shared_ptr<const LlamaModel<EitherLinear>> read_quantized(const std::string& folder) {
  const LoadedModel loaded = unwrap(load_model(*unwrap(open_model(folder))));
  const codegemm::ModelCheckpoint checkpoint = unwrap(codegemm::ModelCheckpoint::open(folder));
  const LlamaModel<DenseLinear>& dense = *loaded.model;
  auto model = std::make_shared<LlamaModel<EitherLinear>>();
  model->config = dense.config;
  model->embedding = dense.embedding;
  model->final_norm = dense.final_norm;
  for (const LlamaLayer<DenseLinear>& layer : dense.layers) {
    LlamaLayer<EitherLinear>& out = model->layers.emplace_back();
    out.input_norm = layer.input_norm;
    out.post_attention_norm = layer.post_attention_norm;
    out.q_norm = layer.q_norm;
    out.k_norm = layer.k_norm;
  }
  std::vector<EitherLinear*> layers;
  for_each_linear(*model, [&](const std::string&, EitherLinear& layer) { layers.push_back(&layer); });
  std::size_t i = 0;
  for_each_linear(dense, [&](const std::string& name, const DenseLinear& layer) {
    EitherLinear& out = *layers[i++];
    if (checkpoint.find(name) == nullptr) {
      out = EitherLinear(layer);
      return;
    }
    const codegemm::QuantizedMatrix matrix = unwrap(checkpoint.load(name));
    out = EitherLinear(CodeGemmLinear(unwrap(codegemm::pack(matrix.view())),
                                      std::vector<float>(layer.bias().begin(), layer.bias().end())));
  });
  return model;
}

/// Greedy tokens of a decode module after `prompt`, which `base` prefills.
template <LinearLayer Base>
std::vector<std::int32_t> decode(const PrefillModule<Base>& base, const DecodeModule<EitherLinear>& module,
                                 const std::vector<std::int32_t>& prompt, std::int64_t count,
                                 Executor& executor) {
  const auto tokens = static_cast<std::int64_t>(prompt.size()) + count;
  const KvShape shape = kv_shape(base.config());
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, tokens / shape.block_tokens + 2));
  const auto allocator = unwrap(KvAllocator::create(storage));
  ForwardWorkspace prefill =
      unwrap(ForwardWorkspace::create(base.model(), tokens, tokens, executor.workers()));
  ForwardWorkspace own = unwrap(ForwardWorkspace::create(module.model(), 1, tokens, executor.workers()));
  SharedSession<Base> session(base, SessionResources{allocator.get(), &storage, &prefill, &executor});
  session.append(prompt);
  return unwrap(session.decode(
                    module, own, DecodeLimits{count, {}},
                    [](std::span<float> logits) {
                      return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) -
                                                       logits.begin());
                    },
                    [](std::int32_t) { return true; }))
      .tokens;
}

void generate(const std::string& base_path, const std::string& folder, const std::string& ids_path,
              std::int64_t count, const std::string& out_path) {
  codegemm::ThreadPool pool;
  const LoadedModel loaded = unwrap(load_model(*unwrap(open_model(base_path))));
  const auto quantized = read_quantized(folder);
  const PrefillModule<DenseLinear> base(loaded.model, CacheKey{"base", "1", ""});
  const PrefillModule<EitherLinear> itself(quantized, CacheKey{"module", "1", ""});
  const DecodeModule<EitherLinear> module = unwrap(factorize(base, quantized));
  std::ifstream in(ids_path);
  nlohmann::json out = nlohmann::json::array();
  for (const auto& prompt : nlohmann::json::parse(in).get<std::vector<std::vector<std::int32_t>>>()) {
    out.push_back({{"own", decode(itself, module, prompt, count, pool)},
                   {"shared", decode(base, module, prompt, count, pool)}});
  }
  check(codegemm::write_file(out_path, out.dump() + "\n"));
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> a(argv + 1, argv + argc);
  try {
    if (a.size() == 4 && a[0] == "quantize") {
      quantize(a[1], a[2], a[3]);
    } else if (a.size() == 6 && a[0] == "generate") {
      generate(a[1], a[2], a[3], std::stoll(a[4]), a[5]);
    } else {
      std::fputs(
          "usage: torch_tool quantize MODEL FOLDER FORMAT\n"
          "       torch_tool generate BASE FOLDER IDS.json COUNT OUT.json\n",
          stderr);
      return 2;
    }
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "torch_tool: %s\n", e.what());
    return 2;
  }
}
