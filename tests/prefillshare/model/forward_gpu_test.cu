// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/forward_gpu_test.cu - the forward pass on the GPU against plain double loops:
// prefill in chunks, decode as a graph, decode modules on a cache that another model made, and sampling.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/model/cuda/modules.cuh>
#include <prefillshare/model/cuda/upload.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/pack.hpp>
#include <codegemm/reference.hpp>
#include <prefillshare/model/codegemm_linear.hpp>

#include "forward_rig.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::seed_or;

// Activations are rounded to fp16 (2^-11) or bf16 (2^-8) some ten times a layer.
template <class T>
constexpr double kTolerance = std::is_same_v<T, __half> ? 6e-3 : 4e-2;

ModelConfig forward_config() {
  ModelConfig c = gpu_config();
  c.layers = 3;
  c.context_length = 512;
  return c;
}

template <class T>
using Dense = cuda::DeviceDenseLinear<T>;
// Enough for the formats below: every kernel is tested elsewhere, and compiling them all takes minutes.
struct FewConfigs {
  using Gather = codegemm::config_list<codegemm::cuda::GatherAny<1, 4>, codegemm::cuda::GatherAny<2, 4>>;
  using Fused = codegemm::config_list<codegemm::cuda::Fused<4, 1, 0>, codegemm::cuda::Fused<8, 2, 0>>;
};
template <class T>
using Coded = cuda::DeviceCodeGemmLinear<T, FewConfigs>;

// Prefills several sequences in passes of different sizes, asking for logits at the end of each, then decodes
// them together by the graph, tokens given; every row of logits is compared.
template <class T, class Linear, class Head>
void check_model(const cuda::DeviceLlama<Linear, Head>& model, const LlamaModel<DenseLinear>& host,
                 const cuda::Device& device, std::uint64_t seed) {
  const ModelConfig& c = host.config;
  Rng rng(seed);
  ForwardRig<T> rig(model, device, 64);
  const std::vector<int> lengths{45, 7, 33};
  std::vector<std::vector<std::int32_t>> tokens;
  std::vector<std::vector<std::vector<double>>> want;
  std::vector<Sequence> sequences;
  for (const int length : lengths) {
    tokens.push_back(random_tokens(rng, length, c.vocab_size));
    std::vector<ReferenceCache> cache;
    want.push_back(reference_forward(host, tokens.back(), cache));
    sequences.push_back(take(rig.allocator->open(CacheKey{"m", "1", ""}, {})));
    require_ok(rig.allocator->reserve(sequences.back(), length));
  }
  std::vector<const Sequence*> pointers;
  for (const Sequence& s : sequences) pointers.push_back(&s);
  constexpr int kDecoded = 4;
  std::vector<std::size_t> done(lengths.size(), 0);
  // Uneven chunks: all of each but the last kDecoded tokens.
  for (const std::size_t step : {std::size_t{1}, std::size_t{2}, std::size_t{19}, std::size_t{64}}) {
    std::vector<std::span<const std::int32_t>> chunks;
    std::vector<const Sequence*> caches;
    std::vector<std::size_t> who;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const std::size_t all = static_cast<std::size_t>(lengths[i] - kDecoded);
      const std::size_t count = std::min(step, all - done[i]);
      if (count == 0) continue;
      chunks.push_back(std::span<const std::int32_t>(tokens[i]).subspan(done[i], count));
      caches.push_back(pointers[i]);
      who.push_back(i);
      done[i] += count;
    }
    if (chunks.empty()) continue;
    auto batch = rig.input.send(chunks, caches, c.vocab_size, rig.stream.get);
    require_ok(batch.status());
    CHECK_FALSE(batch->split_keys);
    batch->split_keys = step == 19;  // as behind long contexts
    const auto rows = std::ssize(chunks);
    require_ok(cuda::forward(model, *batch, rig.storage,
                             MatrixView<float>(rig.workspace.logits.data(), rows, c.vocab_size),
                             rig.workspace, device, rig.stream.get));
    const std::vector<float> got = rig.logits(rows, c.vocab_size);
    std::vector<std::vector<double>> rows_wanted;
    for (std::size_t r = 0; r < who.size(); ++r) {
      rows_wanted.push_back(want[who[r]][done[who[r]] - 1]);
      require_ok(rig.allocator->commit(sequences[who[r]], chunks[r]));
    }
    CAPTURE(step);
    CHECK(worst_relative(got, rows_wanted) < kTolerance<T>);
  }
  auto graph = take(cuda::DecodeGraph<Linear, Head>::capture(model, rig.storage, rig.workspace,
                                                             static_cast<int>(lengths.size()), 32, false,
                                                             device, rig.stream.get));
  PageTable table;
  for (int k = 0; k < kDecoded; ++k) {
    std::vector<std::int32_t> next;
    std::vector<std::vector<double>> rows_wanted;
    const std::vector<std::int64_t> pending(lengths.size(), 1);
    require_ok(export_page_table(pointers, table, pending));
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      next.push_back(tokens[i][done[i]]);
      rows_wanted.push_back(want[i][done[i]]);
    }
    cuda::DecodeStep step;
    step.table = &table;
    step.tokens = next;
    require_ok(graph->launch(step));
    const auto chosen = graph->wait();
    require_ok(chosen.status());
    const std::vector<float> got = rig.logits(std::ssize(lengths), c.vocab_size);
    CAPTURE(k);
    CHECK(worst_relative(got, rows_wanted) < kTolerance<T>);
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const auto row = got.begin() + static_cast<std::ptrdiff_t>(i) * c.vocab_size;
      CHECK((*chosen)[i] == std::max_element(row, row + c.vocab_size) - row);
      require_ok(rig.allocator->commit(sequences[i], std::span<const std::int32_t>(&next[i], 1)));
      ++done[i];
    }
  }
}

// Random codes for every layer of a config, in both shapes: packed for the CPU, and the same weights dense.
struct CodedModel {
  std::shared_ptr<LlamaModel<CodeGemmLinear>> coded = std::make_shared<LlamaModel<CodeGemmLinear>>();
  std::shared_ptr<LlamaModel<DenseLinear>> dense;
};

CodedModel coded_model(const ModelConfig& c, codegemm::Format format, std::uint64_t seed) {
  CodedModel out;
  out.dense = rounded_model<__half>(c, seed);
  Rng rng(seed + 7);
  const auto code = [&](DenseLinear& layer) {
    auto matrix = codegemm::QuantizedMatrix::create(format, layer.rows(), layer.cols());
    require_ok(matrix.status());
    for (std::int64_t m = 0; m < format.m; ++m) {
      for (std::int64_t n = 0; n < layer.rows(); ++n) {
        for (std::int64_t j = 0; j < layer.cols() / format.v; ++j)
          matrix->set_code(m, n, j, static_cast<std::uint32_t>(rng.below(format.centroids())));
      }
    }
    for (auto& value : matrix->codebooks()) value = codegemm::Half::from_float(rng.normal());
    const float size = 1.0F / std::sqrt(static_cast<float>(layer.cols() * format.m));
    for (auto& value : matrix->scales()) value = codegemm::Half::from_float(size * rng.uniform(0.8F, 1.2F));
    auto weights =
        std::make_shared<std::vector<float>>(static_cast<std::size_t>(layer.rows() * layer.cols()));
    for (std::int64_t n = 0; n < layer.rows(); ++n) {
      for (std::int64_t k = 0; k < layer.cols(); ++k) {
        (*weights)[static_cast<std::size_t>(n * layer.cols() + k)] =
            static_cast<float>(codegemm::reference_weight(matrix->view(), n, k));
      }
    }
    std::vector<float> bias(layer.bias().begin(), layer.bias().end());
    layer = DenseLinear(weights, layer.rows(), layer.cols(), bias);
    auto packed = codegemm::pack(matrix->view());
    require_ok(packed.status());
    return CodeGemmLinear(std::move(packed).value(), std::move(bias));
  };
  out.coded->config = c;
  out.coded->embedding = out.dense->embedding;
  out.coded->final_norm = out.dense->final_norm;
  for (LlamaLayer<DenseLinear>& layer : out.dense->layers) {
    LlamaLayer<CodeGemmLinear> low;
    low.input_norm = layer.input_norm;
    low.post_attention_norm = layer.post_attention_norm;
    low.q_norm = layer.q_norm;
    low.k_norm = layer.k_norm;
    low.q = code(layer.q);
    low.k = code(layer.k);
    low.v = code(layer.v);
    low.o = code(layer.o);
    low.gate = code(layer.gate);
    low.up = code(layer.up);
    low.down = code(layer.down);
    out.coded->layers.push_back(std::move(low));
  }
  out.coded->head = code(out.dense->head);
  return out;
}

template <class T>
auto upload_coded(const LlamaModel<CodeGemmLinear>& model) {
  auto made =
      cuda::upload(model, cuda::CodeGemmUploader<T, FewConfigs>(), cuda::CodeGemmUploader<T, FewConfigs>());
  require_ok(made.status());
  return *made;
}

}  // namespace

TEST_CASE("the forward pass with dense layers equals the double reference for every variant of the family") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(31);
  CAPTURE(seed);
  ModelConfig config = forward_config();
  SECTION("Llama: tied head, no biases") {}
  SECTION("Llama: head of its own") { config.tied_embeddings = false; }
  SECTION("Qwen2: biases") { config.attention_bias = true; }
  SECTION("Qwen3: head norms, wide heads") {
    config.qk_norm = true;
    config.head_dim = 128;
    config.rope.head_dim = 128;
  }
  SECTION("one KV head") { config.kv_heads = 1; }
  SECTION("a wide residual stream") {
    config.hidden_size = 4168;
    config.layers = 1;
  }
  {
    const auto host = rounded_model<__half>(config, seed);
    check_model<__half>(*upload_dense<__half>(*host), *host, device, seed + 1);
  }
  const auto host = rounded_model<__nv_bfloat16>(config, seed);
  check_model<__nv_bfloat16>(*upload_dense<__nv_bfloat16>(*host), *host, device, seed + 1);
}

TEST_CASE("the forward pass with CodeGEMM layers equals the double reference") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(41);
  ModelConfig config = forward_config();
  config.tied_embeddings = false;
  std::string format = "m1v4g128";
  SECTION("m1v4g128") {}
  SECTION("m2v8g64, biases") {
    format = "m2v8g64";
    config.attention_bias = true;
  }
  SECTION("m1v4g-1, head norms") {
    format = "m1v4g-1";
    config.qk_norm = true;
  }
  CAPTURE(seed, format);
  const CodedModel models = coded_model(config, codegemm::parse_format(format).value(), seed);
  check_model<__half>(*upload_coded<__half>(*models.coded), *models.dense, device, seed + 1);
  check_model<__nv_bfloat16>(*upload_coded<__nv_bfloat16>(*models.coded), *models.dense, device, seed + 1);
}

// Both also under compute-sanitizer.
TEST_CASE("the forward pass on the GPU: a small one of each kind with CodeGEMM layers") {
  const auto device = gpu_or_skip();
  ModelConfig config = forward_config();
  config.layers = 1;
  config.qk_norm = true;
  config.attention_bias = true;
  const CodedModel models = coded_model(config, codegemm::parse_format("m1v4g64").value(), seed_or(37));
  check_model<__nv_bfloat16>(*upload_coded<__nv_bfloat16>(*models.coded), *models.dense, device, 38);
}

TEST_CASE("the forward pass on the GPU: a small one with dense layers") {
  const auto device = gpu_or_skip();
  ModelConfig config = forward_config();
  config.layers = 1;
  config.attention_bias = true;
  const auto host = rounded_model<__half>(config, seed_or(35));
  check_model<__half>(*upload_dense<__half>(*host), *host, device, 36);
}

TEST_CASE("decode modules of codes read one base cache, as the double reference does") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(51);
  CAPTURE(seed);
  ModelConfig config = forward_config();
  config.tied_embeddings = false;
  const auto base_host = rounded_model<__half>(config, seed);
  const auto base_model = upload_dense<__half>(*base_host);
  const cuda::DevicePrefillModule<Dense<__half>, Dense<__half>> base(base_model, CacheKey{"base", "1", ""});
  ForwardRig<__half> rig(*base_model, device, 24);
  Rng rng(seed + 1);
  const std::vector<std::int32_t> context = random_tokens(rng, 53, config.vocab_size);
  // All but the last token are the base's (design: the decode module runs that one itself).
  Sequence cache = take(rig.allocator->open(base.key(), {}));
  require_ok(base.prefill(std::span(context).first(52), *rig.allocator, rig.storage, cache, rig.input,
                          rig.workspace, device, rig.stream.get));
  REQUIRE(cache.length() == 52);
  std::vector<ReferenceCache> base_cache;
  static_cast<void>(reference_forward(*base_host, std::span(context).first(52), base_cache));

  for (const std::uint64_t which : {std::uint64_t{0}, std::uint64_t{1}}) {
    CAPTURE(which);
    const CodedModel models =
        coded_model(config, codegemm::parse_format("m1v4g64").value(), seed + 100 * (which + 1));
    const auto decode = take(cuda::factorize(base.config(), upload_coded<__half>(*models.coded)));
    // Three agents' forks of the context, which differ from their first own token on.
    std::vector<Sequence> forks(3);
    require_ok(rig.allocator->fork_all(cache, forks, 8));
    std::vector<const Sequence*> pointers;
    for (const Sequence& fork : forks) pointers.push_back(&fork);
    auto workspace = take(cuda::DeviceWorkspace<__half>::create(decode.model(), 3, 3, device));
    using Graph = cuda::DecodeGraph<Coded<__half>, Coded<__half>>;
    auto graph =
        take(Graph::capture(decode.model(), rig.storage, workspace, 3, 32, true, device, rig.stream.get));
    std::vector<std::vector<std::int32_t>> own(3);
    PageTable table;
    for (int k = 0; k < 6; ++k) {
      std::vector<std::int32_t> next;
      for (std::size_t i = 0; i < 3; ++i) {
        next.push_back(k == 0 ? context.back() : static_cast<std::int32_t>(rng.below(config.vocab_size)));
        own[i].push_back(next.back());
        require_ok(rig.allocator->append_private(forks[i], 1));
      }
      require_ok(export_page_table(pointers, table));
      const std::vector<std::int32_t> groups{0, 3};
      const std::vector<std::int32_t> shared{3};  // 48 tokens; the fourth page is copied for each
      cuda::DecodeStep step;
      step.table = &table;
      step.tokens = next;
      step.group_indptr = groups;
      step.shared_pages = shared;
      require_ok(graph->launch(step));
      require_ok(graph->wait().status());
      std::vector<float> got(static_cast<std::size_t>(3 * config.vocab_size));
      REQUIRE_CUDA(cudaMemcpy(got.data(), workspace.logits.data(), got.size() * sizeof(float),
                              cudaMemcpyDeviceToHost));
      std::vector<std::vector<double>> want;
      for (std::size_t i = 0; i < 3; ++i) {
        std::vector<ReferenceCache> copy = base_cache;
        want.push_back(reference_forward(*models.dense, own[i], copy).back());
      }
      CAPTURE(k);
      CHECK(worst_relative(got, want) < kTolerance<__half>);
    }
  }
  // The base's cache is as it was: the same context is found, and its next token comes out the same.
  CHECK(cache.length() == 52);
  Sequence again = take(rig.allocator->open(base.key(), std::span(context).first(52)));
  CHECK(again.length() == 48);
  const std::span<const std::int32_t> rest = std::span(context).subspan(48);
  require_ok(rig.allocator->reserve(again, 5));
  const Sequence* const one = &again;
  const auto batch =
      rig.input.send(std::span(&rest, 1), std::span(&one, 1), config.vocab_size, rig.stream.get);
  require_ok(batch.status());
  require_ok(cuda::forward(*base_model, *batch, rig.storage,
                           MatrixView<float>(rig.workspace.logits.data(), 1, config.vocab_size),
                           rig.workspace, device, rig.stream.get));
  std::vector<ReferenceCache> fresh;
  const auto want = reference_forward(*base_host, context, fresh);
  CHECK(worst_relative(rig.logits(1, config.vocab_size), {want.back()}) < kTolerance<__half>);
  require_ok(rig.allocator->release_reserved(again));
}

TEST_CASE("a graph that goes on with its own tokens generates what single steps generate") {
  const auto device = gpu_or_skip();
  const ModelConfig config = forward_config();
  const auto host = rounded_model<__half>(config, seed_or(61));
  const auto model = upload_dense<__half>(*host);
  using Graph = cuda::DecodeGraph<Dense<__half>, Dense<__half>>;
  const auto generate = [&](bool feed, float temperature, std::int64_t few_keys = cuda::kFewKeys) {
    ForwardRig<__half> rig(*model, device, 8);
    std::vector<Sequence> sequences;
    for (int i = 0; i < 2; ++i) {
      sequences.push_back(take(rig.allocator->open(CacheKey{"m", codegemm::concat(i), ""}, {})));
      require_ok(rig.allocator->reserve(sequences.back(), 40));
    }
    const std::vector<const Sequence*> pointers{&sequences[0], &sequences[1]};
    auto graph = take(
        Graph::capture(*model, rig.storage, rig.workspace, 2, 16, false, device, rig.stream.get, few_keys));
    std::vector<std::int32_t> last{5, 9};
    std::vector<std::int32_t> out;
    PageTable table;
    for (std::int64_t k = 0; k < 40; ++k) {
      const std::vector<std::int64_t> pending{k + 1, k + 1};
      require_ok(export_page_table(pointers, table, pending));
      cuda::DecodeStep step;
      step.table = &table;
      if (k == 0 || feed) step.tokens = last;
      const std::vector<float> temperatures{temperature, temperature};
      const std::vector<std::uint64_t> seeds{11, 12};
      step.temperatures = temperatures;
      step.seeds = seeds;
      require_ok(graph->launch(step));
      const auto chosen = graph->wait();
      require_ok(chosen.status());
      last.assign(chosen->begin(), chosen->end());
      out.insert(out.end(), last.begin(), last.end());
    }
    for (Sequence& s : sequences) require_ok(rig.allocator->release_reserved(s));
    return out;
  };
  CHECK(generate(true, 0.0F) == generate(false, 0.0F));
  CHECK(generate(true, 1.5F) == generate(false, 1.5F));
  CHECK(generate(true, 1.5F) != generate(true, 0.0F));
  // Appending and attention in one kernel, apart, and apart from 33 keys on.
  CHECK(generate(true, 0.0F) == generate(true, 0.0F, 0));
  CHECK(generate(true, 0.0F) == generate(true, 0.0F, 32));
}

TEST_CASE("sampling draws from the softmax, and takes the lowest of equal logits without a temperature") {
  const auto device = gpu_or_skip();
  constexpr int kRows = 4096;
  constexpr int kVocab = 37;
  const std::uint64_t seed = seed_or(71);
  CAPTURE(seed);
  Rng rng(seed);
  std::vector<float> row(kVocab);
  for (float& x : row) x = rng.normal();
  std::vector<float> all;
  std::vector<std::uint64_t> seeds;
  for (int i = 0; i < kRows; ++i) {
    all.insert(all.end(), row.begin(), row.end());
    seeds.push_back(seed + static_cast<std::uint64_t>(i) * 7919);
  }
  constexpr float kTemperature = 0.7F;
  codegemm::test::DeviceBuffer<float> logits(all);
  codegemm::test::DeviceBuffer<float> temperatures(std::vector<float>(kRows, kTemperature));
  codegemm::test::DeviceBuffer<std::uint64_t> seeds_device(seeds);
  codegemm::test::DeviceBuffer<std::uint64_t> best(kRows);
  codegemm::test::DeviceBuffer<unsigned> arrived(kRows);
  codegemm::test::DeviceBuffer<std::int32_t> tokens(kRows);
  best.clear();
  arrived.clear();
  cuda::DeviceSampling how;
  how.temperatures = temperatures.data();
  how.seeds = seeds_device.data();
  how.best = best.data();
  how.arrived = arrived.data();
  const MatrixView<const float> view(logits.data(), kRows, kVocab);
  require_ok(cuda::sample(view, how, tokens.data(), device, nullptr));
  REQUIRE_CUDA(cudaDeviceSynchronize());
  std::vector<double> counted(kVocab, 0.0);
  for (const std::int32_t token : tokens.download()) {
    REQUIRE(token >= 0);
    REQUIRE(token < kVocab);
    counted[static_cast<std::size_t>(token)] += 1.0;
  }
  double sum = 0.0;
  for (const float x : row) sum += std::exp(static_cast<double>(x / kTemperature));
  double chi_square = 0.0;
  for (std::size_t i = 0; i < counted.size(); ++i) {
    const double expected = kRows * std::exp(static_cast<double>(row[i] / kTemperature)) / sum;
    chi_square += (counted[i] - expected) * (counted[i] - expected) / expected;
  }
  CHECK(chi_square < 80.0);  // 36 degrees of freedom: above 80 once in 40,000

  how.temperatures = nullptr;
  std::vector<float> ties(kVocab, 1.0F);
  ties[0] = -INFINITY;
  ties[1] = NAN;
  ties[5] = ties[20] = 2.0F;
  codegemm::test::DeviceBuffer<float> one(ties);
  require_ok(
      cuda::sample(MatrixView<const float>(one.data(), 1, kVocab), how, tokens.data(), device, nullptr));
  REQUIRE_CUDA(cudaDeviceSynchronize());
  CHECK(tokens.download()[0] == 5);
  for (const std::uint64_t left : best.download()) REQUIRE(left == 0);
  for (const unsigned left : arrived.download()) REQUIRE(left == 0);
}

TEST_CASE("the GPU's forward pass refuses what does not fit, with the numbers") {
  const auto device = gpu_or_skip();
  const ModelConfig config = forward_config();
  const auto host = rounded_model<__half>(config, 1);
  const auto model = upload_dense<__half>(*host);
  ForwardRig<__half> rig(*model, device, 8);
  const auto text = [](const Status& s) { return std::string(s.message()); };
  Sequence sequence = take(rig.allocator->open(CacheKey{"m", "1", ""}, {}));
  const Sequence* const one = &sequence;
  const std::vector<std::int32_t> bad{1, 203};
  std::span<const std::int32_t> chunk(bad);
  CHECK(text(rig.input.send(std::span(&chunk, 1), std::span(&one, 1), 203, rig.stream.get).status())
            .find("203") != std::string::npos);
  const std::vector<std::int32_t> nine(9, 1);
  chunk = nine;
  CHECK(text(rig.input.send(std::span(&chunk, 1), std::span(&one, 1), 203, rig.stream.get).status())
            .find('9') != std::string::npos);
  chunk = std::span(nine).first(3);  // nothing is reserved
  CHECK(text(rig.input.send(std::span(&chunk, 1), std::span(&one, 1), 203, rig.stream.get).status())
            .find("pending") != std::string::npos);

  cuda::DeviceBatch batch;
  batch.tokens = reinterpret_cast<const std::int32_t*>(rig.workspace.logits.data());
  batch.count = 9;
  batch.table.sequences = 1;
  CHECK(text(cuda::forward(*model, batch, rig.storage, {}, rig.workspace, device, rig.stream.get))
            .find("9 tokens") != std::string::npos);
  batch.count = 2;
  CHECK(text(cuda::forward(*model, batch, rig.storage, {}, rig.workspace, device, rig.stream.get))
            .find("query_indptr") != std::string::npos);
  batch.count = 1;
  CHECK(text(cuda::forward(*model, batch, rig.storage, MatrixView<float>(nullptr, 1, 7), rig.workspace,
                           device, rig.stream.get))
            .find("vocabulary 203") != std::string::npos);

  ModelConfig other = config;
  other.kv_heads = 4;
  CHECK(text(cuda::factorize(other, model).status()).find("kv_heads: base 4, decode 2") != std::string::npos);
  CHECK(cuda::DeviceWorkspace<__half>::create(*model, 0, 1, device).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(cuda::DeviceKvStorage<__half>::create(kv_shape(config), 1 << 30, nullptr).status().code() ==
        StatusCode::kOutOfMemory);
}

}  // namespace prefillshare::test
