// SPDX-License-Identifier: Apache-2.0
//
// tests/peer/logits_gpu_tool.cu - writes the GPU's logits for given token ids, of a model that goes from its
// files to the device in parts, and the weights as the host reads them, for logits_gpu_peer.py to compare.
// Usage: logits_gpu_tool MODEL IDS.json STEP OUT.bin WEIGHTS.bin
//   IDS.json: [[id, ...], ...]. OUT.bin: fp32 rows [vocab], prompt by prompt: behind every STEP-th token but
//   for the last eight, behind the last of those before these eight, and behind each of these, which are
//   decoded.
//   WEIGHTS.bin: a line of JSON (config, names and shapes), then the fp32 values in that order.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550, 2810

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/model_loader.hpp>
#include <common/tensor_source.hpp>
#include <prefillshare/model/cuda/load.cuh>
#include <prefillshare/model/cuda/modules.cuh>

namespace {

using namespace prefillshare;
using namespace prefillshare::cuda;

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}
void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}
template <class T>
T take(codegemm::Result<T> made) {
  check(made.status());
  return std::move(made).value();
}

void write_weights(const LlamaModel<DenseLinear>& model, const char* path) {
  const ModelConfig& c = model.config;
  if (c.rope.layout != RopeLayout::kHalf || c.rope.scaling != RopeScaling::kNone) {
    throw std::runtime_error("the peer reads models without RoPE scaling");
  }
  nlohmann::json tensors = nlohmann::json::array();
  std::vector<std::span<const float>> values;
  const auto add = [&](const std::string& name, std::span<const float> of, std::int64_t rows,
                       std::int64_t cols) {
    tensors.push_back({{"name", name}, {"rows", rows}, {"cols", cols}});
    values.push_back(of);
  };
  const auto linear = [&](const std::string& name, const DenseLinear& layer) {
    add(name + ".weight", {layer.weights().data, static_cast<std::size_t>(layer.rows() * layer.cols())},
        layer.rows(), layer.cols());
    if (!layer.bias().empty()) add(name + ".bias", layer.bias(), 1, layer.rows());
  };
  add("model.embed_tokens.weight", *model.embedding, c.vocab_size, c.hidden_size);
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const LlamaLayer<DenseLinear>& layer = model.layers[i];
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    add(prefix + "input_layernorm.weight", layer.input_norm, 1, c.hidden_size);
    add(prefix + "post_attention_layernorm.weight", layer.post_attention_norm, 1, c.hidden_size);
  }
  add("model.norm.weight", model.final_norm, 1, c.hidden_size);
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    if (name != "lm_head" || !c.tied_embeddings) linear(name, layer);
  });
  const nlohmann::json head{{"vocab_size", c.vocab_size},
                            {"hidden_size", c.hidden_size},
                            {"intermediate_size", c.intermediate_size},
                            {"num_hidden_layers", c.layers},
                            {"num_attention_heads", c.heads},
                            {"num_key_value_heads", c.kv_heads},
                            {"head_dim", c.head_dim},
                            {"max_position_embeddings", c.context_length},
                            {"rms_norm_eps", c.rms_epsilon},
                            {"rope_theta", c.rope.theta},
                            {"attention_bias", c.attention_bias},
                            {"tie_word_embeddings", c.tied_embeddings},
                            {"tensors", tensors}};
  std::ofstream out(path, std::ios::binary);
  out << head.dump() << '\n';
  for (const std::span<const float> of : values) {
    out.write(reinterpret_cast<const char*>(of.data()), static_cast<std::streamsize>(of.size_bytes()));
  }
  out.flush();
  if (!out.good()) throw std::runtime_error(std::string(path) + ": cannot be written");
}

void run(const char* model_path, const char* ids_path, std::int64_t step, const char* out_path,
         const char* weights_path) {
  constexpr std::int64_t kDecoded = 8;
  const Device device = take(codegemm::cuda::query_device(0));
  const auto source = take(examples::open_model(model_path));
  const auto loaded = take(examples::load_model(*source));
  const LlamaModel<DenseLinear>& host = *loaded.model;
  const ModelConfig& c = host.config;
  write_weights(host, weights_path);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto model = take(load_dense<__half>(c, *source, take(Cublas::create()), stream));

  std::ifstream in(ids_path);
  const auto prompts = nlohmann::json::parse(in).get<std::vector<std::vector<std::int32_t>>>();
  std::ofstream out(out_path, std::ios::binary);
  std::vector<float> row(static_cast<std::size_t>(c.vocab_size));
  for (const std::vector<std::int32_t>& ids : prompts) {
    const auto tokens = std::ssize(ids);
    if (tokens <= kDecoded) throw std::runtime_error("a prompt of too few tokens");
    const std::int64_t blocks = tokens / 16 + 2;
    auto storage = take(DeviceKvStorage<__half>::create(kv_shape(c), blocks, stream));
    const auto allocator = take(DeviceKvAllocator<__half>::create(storage));
    auto workspace = take(DeviceWorkspace<__half>::create(*model, step, 1, device));
    auto input = take(PrefillBatch::create(step, 1, blocks));
    const MatrixView<float> logits(workspace.logits.data(), 1, c.vocab_size);
    const auto keep = [&] {
      check(cudaStreamSynchronize(stream));
      check(cudaMemcpy(row.data(), logits.data, row.size() * sizeof(float), cudaMemcpyDeviceToHost));
      out.write(reinterpret_cast<const char*>(row.data()),
                static_cast<std::streamsize>(row.size() * sizeof(float)));
    };
    Sequence base = take(allocator->open(CacheKey{"logits", "1", ""}, {}));
    check(allocator->reserve(base, tokens - kDecoded));
    const std::span<const std::int32_t> all(ids);
    const Sequence* one = &base;
    for (std::int64_t done = 0; done < tokens - kDecoded;) {
      const std::int64_t count = std::min(step, tokens - kDecoded - done);
      const auto chunk = all.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count));
      const DeviceBatch batch =
          take(input.send(std::span(&chunk, 1), std::span(&one, 1), c.vocab_size, stream));
      check(forward(*model, batch, storage, logits, workspace, device, stream));
      check(allocator->commit(base, chunk));
      keep();
      done += count;
    }
    Sequence fork = take(allocator->fork(base));
    one = &fork;
    using Graph = DecodeGraph<DeviceDenseLinear<__half>, DeviceDenseLinear<__half>>;
    const auto graph = take(Graph::capture(*model, storage, workspace, 1, blocks, false, device, stream));
    PageTable table;
    for (std::int64_t t = tokens - kDecoded; t < tokens; ++t) {
      check(allocator->append_private(fork, 1));
      check(export_page_table(std::span(&one, 1), table));
      DecodeStep decode;
      decode.table = &table;
      decode.tokens = all.subspan(static_cast<std::size_t>(t), 1);
      check(graph->launch(decode));
      check(graph->wait().status());
      keep();
    }
  }
  out.flush();
  if (!out.good()) throw std::runtime_error(std::string(out_path) + ": cannot be written");
  check(cudaStreamDestroy(stream));
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (argc == 6 && (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)) {
    std::printf("SKIPPED: no GPU\n");
    return 4;
  }
  try {
    const std::int64_t step = argc == 6 ? std::atoll(argv[3]) : 0;
    if (step < 1) throw std::runtime_error("usage: logits_gpu_tool MODEL IDS.json STEP OUT.bin WEIGHTS.bin");
    run(argv[1], argv[2], step, argv[4], argv[5]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "logits_gpu_tool: %s\n", e.what());
    return 2;
  }
  return 0;
}
