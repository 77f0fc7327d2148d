// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/quantize_model_test.cpp - a model quantized layer by layer, stopped and gone on with,
// written as a folder and read again.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/safetensors_folder.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <common/config_json_writer.hpp>
#include <common/layer_quantizer.hpp>
#include <common/model_loader.hpp>
#include <common/model_writer.hpp>
#include <common/text_quantizer.hpp>
#include <common/text_tokens.hpp>
#include <support/catch.hpp>
#include <support/tiny_model.hpp>

using namespace prefillshare;
using namespace prefillshare::examples;
using codegemm::test::contains;
using codegemm::test::get_file;
using codegemm::test::put_file;
using codegemm::test::TemporaryFolder;
using prefillshare::test::random_model;
using prefillshare::test::random_tokens;
using prefillshare::test::Rng;
using prefillshare::test::tiny_config;

namespace {

constexpr codegemm::Format kFormat{4, 2, 4, 8};

codegemm::CalibratedOptions quick_options() {
  codegemm::CalibratedOptions options;
  options.rounds = 1;
  options.beam = 2;
  options.kmeans.iterations = 4;
  return options;
}

std::vector<std::vector<std::int32_t>> sequences() {
  Rng rng(82);
  return {random_tokens(rng, 40, 61), random_tokens(rng, 25, 61)};
}

/// Quantizes up to `blocks` blocks into `folder`; the message of what went wrong, or "".
std::string quantize(const std::shared_ptr<const LlamaModel<DenseLinear>>& model, const std::string& folder,
                     std::int64_t blocks, int workers, const std::string& run,
                     std::vector<QuantizeProgress>* told = nullptr, int tune_steps = 0) {
  codegemm::ThreadPool pool(workers);
  CalibrationRun calibration = CalibrationRun::create(model, sequences(), workers).value();
  BlockTuneOptions tune;
  tune.steps = tune_steps;
  tune.tokens = 40;
  LayerQuantizer quantizer(*model, kFormat, quick_options(), tune, folder, run, pool,
                           [&](const QuantizeProgress& now) {
                             if (told != nullptr) told->push_back(now);
                           });
  for (std::int64_t i = 0; i < blocks; ++i) {
    if (Status s = calibration.next_block(quantizer, pool); !s.ok()) return s.message();
  }
  return "";
}

std::map<std::string, std::string> files_of(const TemporaryFolder& folder) {
  std::map<std::string, std::string> out;
  for (const std::string& name : folder.list()) out.emplace(name, get_file(folder / name));
  return out;
}

/// A small model as a Hugging Face folder in fp32.
void write_folder(const std::string& folder, const LlamaModel<DenseLinear>& model) {
  const ModelConfig& c = model.config;
  std::vector<codegemm::SafetensorsTensor> tensors;
  const auto add = [&](const std::string& name, const float* data, std::vector<std::int64_t> shape) {
    std::int64_t count = 1;
    for (const std::int64_t dim : shape) count *= dim;
    tensors.push_back({name, codegemm::Dtype::kF32, std::move(shape),
                       std::as_bytes(std::span(data, static_cast<std::size_t>(count)))});
  };
  add("model.embed_tokens.weight", model.embedding->data(), {c.vocab_size, c.hidden_size});
  add("model.norm.weight", model.final_norm.data(), {c.hidden_size});
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const std::string prefix = codegemm::concat("model.layers.", i, ".");
    add(prefix + "input_layernorm.weight", model.layers[i].input_norm.data(), {c.hidden_size});
    add(prefix + "post_attention_layernorm.weight", model.layers[i].post_attention_norm.data(),
        {c.hidden_size});
  }
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    if (name != "lm_head") add(name + ".weight", layer.weights().data, {layer.rows(), layer.cols()});
  });
  REQUIRE(codegemm::write_safetensors_folder(folder, tensors, 1 << 30).ok());
  put_file(folder + "/config.json",
           R"({"model_type":"llama","vocab_size":61,"hidden_size":24,"intermediate_size":40,"head_dim":8,)"
           R"("num_hidden_layers":2,"num_attention_heads":6,"num_key_value_heads":2,"rms_norm_eps":1e-5,)"
           R"("max_position_embeddings":256,"tie_word_embeddings":true,"rope_theta":10000.0})");
}

}  // namespace

TEST_CASE("what a folder cannot hold is said before anything is quantized, and what it could", "[quantize]") {
  const auto model = random_model(tiny_config(), 80);  // K of 24, 40 and 48
  using Kind = codegemm::CheckpointKind;
  CHECK(check_writable(Kind::kCodeGemm, {2, 1, 4, 8}, *model).ok());
  CHECK(check_writable(Kind::kAqlm, {2, 1, 4, -1}, *model).ok());
  const codegemm::Format wide{2, 1, 4, 16};
  const Status status = check_writable(Kind::kCodeGemm, wide, *model);
  CHECK(status.code() == StatusCode::kUnsupported);
  CHECK(contains(status.message(), "'model.layers.0.self_attn.q_proj' is "));
  CHECK(contains(status.message(), "and CodeGEMM needs a K that is a multiple of g = 16"));
  const auto smaller = writable_format(Kind::kCodeGemm, wide, *model);
  REQUIRE(smaller.ok());
  CHECK((*smaller == codegemm::Format{2, 1, 4, 8}));
  CHECK((*writable_format(Kind::kCodeGemm, *smaller, *model) == *smaller));
  // No group size helps where vectors are too long, or where a kind has one scale a row.
  CHECK(writable_format(Kind::kCodeGemm, {8, 1, 4, 16}, *model).status().code() == StatusCode::kUnsupported);
  CHECK(contains(writable_format(Kind::kAqlm, {2, 1, 4, 8}, *model).status().message(),
                 "AQLM has one scale a row"));
}

TEST_CASE("the default format is one that the model's folder can hold", "[quantize]") {
  using Kind = codegemm::CheckpointKind;
  ModelConfig c = tiny_config();
  const auto name_of = [&](Kind kind) {
    const auto format = default_format(kind, *random_model(c, 82));
    return format.ok() ? codegemm::format_name(*format) : format.status().message();
  };
  CHECK(contains(name_of(Kind::kCodeGemm), "is 48 x 24 in m2v8g128"));  // K of 24, 40 and 48: none fits
  CHECK(name_of(Kind::kAqlm) == "m2v8g-1");
  c.head_dim = 16;
  c.hidden_size = 64;  // K of 64, 96 and 192
  c.intermediate_size = 192;
  CHECK(name_of(Kind::kCodeGemm) == "m2v8g32");
  c.hidden_size = 192;  // 96 = 6 heads of 16, still
  c.head_dim = 32;      // 192 of all
  CHECK(name_of(Kind::kCodeGemm) == "m2v8g64");
  c.hidden_size = c.intermediate_size = 256;
  c.head_dim = 64;  // 384
  CHECK(name_of(Kind::kCodeGemm) == "m2v8g128");
}

TEST_CASE("a run stopped anywhere goes on to the same files", "[quantize]") {
  const auto model = random_model(tiny_config(), 81);
  const TemporaryFolder whole;
  std::vector<QuantizeProgress> told;
  REQUIRE(quantize(model, whole.path(), 2, 1, "run", &told).empty());
  const auto want = files_of(whole);
  REQUIRE(want.size() == 14);
  REQUIRE(told.size() >= 14);
  for (std::size_t i = 1; i < told.size(); ++i) CHECK(told[i].share >= told[i - 1].share);
  CHECK(told.back().share > 0.999999);
  CHECK(told.front().seconds_left < 0.0);  // no layer is done yet
  CHECK(told.back().seconds_left >= 0.0);
  CHECK(told.back().layer == "model.layers.1.mlp.down_proj");
  CHECK(told.back().error > 0.0);

  // Layers are lost from some point on, as when a process is killed; a half-written file is left behind.
  const char* const order[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                               "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
  for (const std::size_t kept : std::vector<std::size_t>{0, 1, 4, 7, 10, 14}) {
    CAPTURE(kept);
    const TemporaryFolder part;
    for (std::size_t i = 0; i < kept; ++i) {
      const std::string name = codegemm::concat("model.layers.", i / 7, ".", order[i % 7], ".safetensors");
      put_file(part / name, want.at(name));
    }
    put_file(part / "model.layers.1.mlp.down_proj.safetensors.tmp-1-1", "half");
    told.clear();
    REQUIRE(quantize(model, part.path(), 2, 2, "run", &told).empty());
    std::filesystem::remove(part / "model.layers.1.mlp.down_proj.safetensors.tmp-1-1");
    CHECK((files_of(part) == want));
    CHECK(told.empty() == (kept == 14));
  }
}

TEST_CASE("a run that tunes its blocks, stopped anywhere, goes on to the same files", "[quantize]") {
  ModelConfig config = tiny_config();
  config.qk_norm = true;
  const auto model = random_model(config, 85);
  const TemporaryFolder whole;
  std::vector<QuantizeProgress> told;
  REQUIRE(quantize(model, whole.path(), 2, 1, "run", &told, 6).empty());
  const auto want = files_of(whole);
  REQUIRE(want.size() == 18);  // 14 layers; norms and matrices of two blocks
  CHECK(told.back().layer == "model.layers.1 tuned");
  CHECK(told.back().share > 0.999999);

  const char* const lost[] = {"model.layers.1.tuned", "model.layers.1.norms", "model.layers.1.mlp.down_proj",
                              "model.layers.0.tuned", "model.layers.1.self_attn.q_proj"};
  for (std::size_t count = 1; count <= std::size(lost); ++count) {
    CAPTURE(count);
    const TemporaryFolder part;
    for (const auto& [name, bytes] : want) put_file(part / name, bytes);
    for (std::size_t i = 0; i < count; ++i)
      std::filesystem::remove(part / codegemm::concat(lost[i], ".safetensors"));
    REQUIRE(quantize(model, part.path(), 2, 3, "run", nullptr, 6).empty());
    CHECK((files_of(part) == want));
  }
  CHECK(contains(quantize(model, whole.path(), 2, 1, "other run", nullptr, 6), "belongs to another run"));

  // What is written is what was tuned, and not what each layer was before.
  codegemm::SerialExecutor serial;
  BlockTuneOptions tune;
  tune.steps = 6;
  LayerQuantizer reader(*model, kFormat, quick_options(), tune, whole.path(), "run", serial, {});
  const std::string name = "model.layers.1.mlp.down_proj";
  const codegemm::QuantizedMatrix tuned = reader.result(name).value();
  const codegemm::QuantizedMatrix before = **reader.load(name);
  CHECK(std::equal(tuned.codes().begin(), tuned.codes().end(), before.codes().begin()));
  CHECK(!std::equal(tuned.codebooks().begin(), tuned.codebooks().end(), before.codebooks().begin()));
  const ReplacedTensors norms = reader.norms(1).value();
  REQUIRE(norms.size() == 4);
  CHECK(norms.at("model.layers.1.self_attn.q_norm.weight").size() == 8);
  CHECK(norms.at("model.layers.1.input_layernorm.weight") != model->layers[1].input_norm);
  put_file(whole / "model.layers.0.norms.safetensors", want.at("model.layers.1.norms.safetensors"));
  CHECK(contains(quantize(model, whole.path(), 1, 1, "run", nullptr, 6),
                 "has no model.layers.0.input_layernorm.weight of 24 values"));
}

TEST_CASE("layers of another run, and broken ones, are not taken for done", "[quantize]") {
  const auto model = random_model(tiny_config(), 83);
  const TemporaryFolder folder;
  REQUIRE(quantize(model, folder.path(), 1, 1, "format a").empty());
  const std::string message = quantize(model, folder.path(), 1, 1, "format b");
  CAPTURE(message);
  CHECK(contains(message, "belongs to another run ('format a'), this one is 'format b'"));
  put_file(folder / "model.layers.0.self_attn.o_proj.safetensors", "not a safetensors file");
  CHECK(contains(quantize(model, folder.path(), 1, 1, "format a"), "o_proj.safetensors"));
}

TEST_CASE("a quantized model is written in either format and read as the dequantized model", "[quantize]") {
  const auto model = random_model(tiny_config(), 84);
  const TemporaryFolder dense;
  write_folder(dense.path(), *model);
  put_file(dense / "tokenizer.json", "{}");
  const auto source = open_model(dense.path()).value();
  codegemm::SerialExecutor serial;
  for (const auto kind : {codegemm::CheckpointKind::kCodeGemm, codegemm::CheckpointKind::kAqlm}) {
    CAPTURE(codegemm::to_string(kind));
    const codegemm::Format format{2, 1, 4, kind == codegemm::CheckpointKind::kAqlm ? -1 : 8};
    std::vector<codegemm::QuantizedMatrix> matrices;
    std::vector<codegemm::NamedMatrix> named;
    matrices.reserve(14);
    for_each_linear(*model, [&](const std::string& name, const DenseLinear& layer) {
      if (name == "lm_head") return;
      matrices.push_back(codegemm::quantize_kmeans(layer.weights(), format, {}, serial).value());
      named.push_back({name, matrices.back().view()});
    });
    const TemporaryFolder parent;
    const std::string out = parent / "quantized";
    const std::string norm = "model.layers.1.input_layernorm.weight";
    const ReplacedTensors replaced = {{norm, std::vector<float>(24, 0.75F)}};
    const Status written = write_quantized_model(*source, out, kind, named, replaced);
    CAPTURE(written.message());
    REQUIRE(written.ok());
    CHECK(get_file(out + "/tokenizer.json") == "{}");
    CHECK(contains(write_quantized_model(*source, out, kind, named, {{norm, {1.0F}}}).message(),
                   "model.layers.1.input_layernorm.weight: 1 values in place of 24"));
    const std::map<std::string, std::string> before = files_of(dense);
    CHECK(write_quantized_model(*source, dense.path() + "/.", kind, named).code() ==
          StatusCode::kInvalidArgument);
    CHECK((files_of(dense) == before));

    const auto again = open_model(out).value();
    CHECK(again->hyperparameters().hidden_size == 24);
    CHECK(again->info("model.layers.0.mlp.up_proj.weight")->type == codegemm::format_name(format));
    CHECK(again->names() == source->names());
    CHECK(again->info("absent.weight").status().code() == StatusCode::kNotFound);
    const LoadedModel loaded = load_model(*again).value();
    CHECK(loaded.model->layers[1].input_norm == replaced.at(norm));
    std::size_t i = 0;
    for_each_linear(*loaded.model, [&](const std::string& name, const DenseLinear& layer) {
      if (name == "lm_head") return;
      CAPTURE(name);
      const codegemm::QuantizedMatrix& matrix = matrices[i++];
      bool same = true;
      for (std::int64_t n = 0; n < layer.rows(); ++n) {
        for (std::int64_t k = 0; k < layer.cols(); ++k)
          same = same && layer.weights().row(n)[k] ==
                             static_cast<float>(codegemm::reference_weight(matrix.view(), n, k));
      }
      CHECK(same);
    });
    float row[24];
    REQUIRE(again->read_rows("model.embed_tokens.weight", 7, 1, row).ok());
    for (std::size_t d = 0; d < 24; ++d) {
      const float want = (*model->embedding)[std::size_t{7} * 24 + d];
      CHECK(row[d] == codegemm::Half::from_float(want).to_float());
    }
  }
}

TEST_CASE("a model read by blocks is quantized to the same files", "[quantize]") {
  const auto model = random_model(tiny_config(), 86);
  const TemporaryFolder dense;
  write_folder(dense.path(), *model);
  const auto source = open_model(dense.path()).value();
  const LoadedModel whole = load_model(*source).value();
  const LoadedModel parts = load_model_by_blocks(*source).value();
  CHECK(parts.fingerprint == whole.fingerprint);
  CHECK(parts.model->embedding->size() == whole.model->embedding->size());
  CHECK(!whole.read_block);
  std::size_t hollow = 0;
  for_each_linear(*parts.model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head") return;  // tied
    CHECK(layer.rows() > 0);
    if (layer.weights().data == nullptr) ++hollow;
  });
  CHECK(hollow == 14);
  codegemm::ThreadPool pool(2);
  const DenseLinear& q = parts.model->layers[0].q;
  const std::vector<float> x(static_cast<std::size_t>(q.cols()));
  std::vector<float> y(static_cast<std::size_t>(q.rows()));
  CHECK(q.forward({x.data(), 1, q.cols()}, {y.data(), 1, q.rows()}, {}, pool).code() ==
        StatusCode::kNullPointer);
  TextQuantizerOptions options;
  options.layers = quick_options();
  for (const int tune_steps : {0, 2}) {
    CAPTURE(tune_steps);
    options.tune.steps = tune_steps;
    options.tune.tokens = 40;
    std::map<std::string, std::string> files[2];
    for (const LoadedModel* loaded : {&whole, &parts}) {
      const TemporaryFolder folder;
      const QuantizedLayers layers = quantize_on_sequences(*loaded, kFormat, sequences(), options,
                                                           folder.path(), pool, [](const auto&) {});
      CHECK(layers.matrices.size() == 14);
      files[loaded == &parts ? 1 : 0] = files_of(folder);
    }
    CHECK((files[0] == files[1]));
  }
  // What is kept goes, and nothing else.
  const TemporaryFolder kept;
  const std::string state = kept / "state";
  static_cast<void>(
      quantize_on_sequences(whole, kFormat, sequences(), options, state, pool, [](const auto&) {}));
  put_file(state + "/notes.txt", "mine");
  remove_state(state);
  CHECK(kept.list() == std::vector<std::string>{"state"});
  CHECK(get_file(state + "/notes.txt") == "mine");
  CHECK(std::distance(std::filesystem::directory_iterator(state), {}) == 1);
  std::filesystem::remove(state + "/notes.txt");
  remove_state(state);
  CHECK(kept.list().empty());
  remove_state(state);  // nothing there
  // What reading a block says is what the run says.
  LoadedModel broken = parts;
  broken.read_block = [](std::int64_t index) -> Result<LlamaLayer<DenseLinear>> {
    return error(StatusCode::kIoError, "block ", index, " is gone");
  };
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(
      quantize_on_sequences(broken, kFormat, sequences(), options, folder.path(), pool, [](const auto&) {}),
      "block 0 is gone");
}

TEST_CASE("a config.json made for a model gives its numbers back", "[quantize]") {
  const auto has = [](std::string_view) { return false; };
  for (const char* architecture : {"llama", "mistral", "qwen2", "qwen3"}) {
    for (const char* scaling : {"none", "linear", "llama3"}) {
      CAPTURE(architecture, scaling);
      ModelHyperparameters h;
      h.architecture = architecture;
      h.vocab_size = 1000;
      h.hidden_size = 64;
      h.layers = 3;
      h.heads = 4;
      h.kv_heads = 2;
      h.head_dim = 16;
      h.intermediate_size = 160;
      h.context_length = 4096;
      h.sliding_window = h.architecture == "mistral" ? 1024 : 0;
      h.rms_epsilon = 1e-5;
      h.rope_theta = 50000.0;
      h.rope_scaling = scaling;
      h.rope_factor = 4.0;
      h.rope_original_context = 2048;
      h.tied_embeddings = true;
      const Result<nlohmann::json> json = config_json(h);
      REQUIRE(json.ok());
      const auto read = read_hyperparameters(json->dump(), "config.json", has);
      CAPTURE(read.status().message());
      REQUIRE(read.ok());
      CHECK(read->architecture == h.architecture);
      CHECK(read->vocab_size == h.vocab_size);
      CHECK(read->hidden_size == h.hidden_size);
      CHECK(read->layers == h.layers);
      CHECK(read->heads == h.heads);
      CHECK(read->kv_heads == h.kv_heads);
      CHECK(read->head_dim == h.head_dim);
      CHECK(read->intermediate_size == h.intermediate_size);
      CHECK(read->context_length == h.context_length);
      CHECK(read->sliding_window == h.sliding_window);
      CHECK(read->rms_epsilon == h.rms_epsilon);
      CHECK(read->rope_theta == h.rope_theta);
      CHECK(read->rope_scaling == h.rope_scaling);
      CHECK(read->rope_factor == (h.rope_scaling == "none" ? 1.0 : 4.0));
      CHECK(read->tied_embeddings);
    }
  }
  ModelHyperparameters odd;
  odd.rope_scaling = "yarn";
  CHECK(config_json(odd).status().code() == StatusCode::kUnsupported);
}
