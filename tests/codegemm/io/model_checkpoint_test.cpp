// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/io/model_checkpoint_writer.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <codegemm/samples.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm;
using namespace codegemm::test;

namespace {

constexpr auto kOurs = CheckpointKind::kCodeGemm;
constexpr auto kAqlm = CheckpointKind::kAqlm;
constexpr std::size_t kEmbeddingBytes = std::size_t{8} * 64 * 2;  // 8 x 64 in fp16
constexpr std::size_t kNormBytes = std::size_t{64} * 4;           // 64 in fp32

bool same(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  const auto equal = [](auto x, auto y) { return std::equal(x.begin(), x.end(), y.begin(), y.end()); };
  return a.format() == b.format() && a.rows() == b.rows() && a.cols() == b.cols() &&
         equal(a.codes(), b.codes()) && equal(a.codebooks(), b.codebooks()) && equal(a.scales(), b.scales());
}

bool same_weights(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  for (std::int64_t n = 0; n < a.rows(); ++n) {
    for (std::int64_t k = 0; k < a.cols(); ++k) {
      if (reference_weight(a.view(), n, k) != reference_weight(b.view(), n, k)) return false;
    }
  }
  return a.rows() == b.rows() && a.cols() == b.cols();
}

/// Two layers of two modules, sorted by name as a reader finds them, an embedding and a norm, with a config
/// that has fields of its own.
struct Model {
  std::vector<QuantizedMatrix> matrices;
  std::vector<NamedMatrix> named;
  std::vector<std::byte> data = std::vector<std::byte>(kEmbeddingBytes + kNormBytes);
  std::vector<SafetensorsTensor> plain;
  nlohmann::json config = {{"model_type", "llama"}, {"hidden_size", 64}, {"dtype", "bfloat16"}};

  Model(Format format, Rng& rng) {
    matrices.reserve(4);
    const char* const names[] = {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj",
                                 "model.layers.10.mlp.down_proj", "model.layers.10.self_attn.q_proj"};
    for (int i = 0; i < 4; ++i) {
      matrices.push_back(random_quantized(rng, format, 6 + i, i % 2 == 0 ? 192 : 64));
      named.push_back({names[i], matrices.back().view()});
    }
    for (std::byte& b : data) b = static_cast<std::byte>(rng.below(256));
    const std::span<const std::byte> all(data);
    plain.push_back({"model.embed_tokens.weight", Dtype::kF16, {8, 64}, all.first(kEmbeddingBytes)});
    plain.push_back({"model.norm.weight", Dtype::kF32, {64}, all.subspan(kEmbeddingBytes, kNormBytes)});
  }

  void check(const ModelCheckpoint& checkpoint) const {
    REQUIRE(checkpoint.entries().size() == matrices.size());
    for (std::size_t i = 0; i < named.size(); ++i) {
      CAPTURE(named[i].name);
      const Result<QuantizedMatrix> loaded = checkpoint.load(named[i].name);
      CAPTURE(loaded.status().message());
      REQUIRE(loaded.ok());
      CHECK(same(*loaded, matrices[i]));
    }
    const std::vector<SafetensorsTensor> others = checkpoint.plain_tensors();
    REQUIRE(others.size() == plain.size());
    for (std::size_t i = 0; i < plain.size(); ++i) {
      CHECK(others[i].name == plain[i].name);
      CHECK(others[i].shape == plain[i].shape);
      CHECK(std::equal(others[i].data.begin(), others[i].data.end(), plain[i].data.begin(),
                       plain[i].data.end()));
    }
    CHECK(checkpoint.config()["model_type"] == "llama");
    CHECK(checkpoint.config()["dtype"] == "float16");
  }
};

Format format_of(const char* name) { return parse_format(name).value(); }

}  // namespace

TEST_CASE("models in both formats, single and sharded, come back bit for bit", "[model_checkpoint]") {
  const std::uint64_t seed = seed_or(41);
  CAPTURE(seed);
  Rng rng(seed);
  struct Case {
    CheckpointKind kind;
    const char* format;
    std::uint64_t shard;
    std::size_t files;
  };
  for (const Case& c : {Case{kOurs, "m1v4g32", 1 << 30, 1}, Case{kOurs, "m2v8g64", 1 << 30, 1},
                        Case{kOurs, "m1v4b6g16", 4000, 4}, Case{kOurs, "m4v2g64", 1, 14},
                        Case{kAqlm, "m2v8g-1", 1 << 30, 1}, Case{kAqlm, "m1v8b16g-1", 1 << 30, 1},
                        Case{kAqlm, "m1v16b12g-1", 1 << 30, 1}, Case{kAqlm, "m3v4b5g-1", 1, 14}}) {
    CAPTURE(c.format, to_string(c.kind));
    const Model model(format_of(c.format), rng);
    const TemporaryFolder folder;
    const Status saved =
        save_model_checkpoint(folder.path(), c.kind, model.config, model.named, model.plain, {c.shard});
    CAPTURE(saved.message());
    REQUIRE(saved.ok());
    const Result<ModelCheckpoint> checkpoint = ModelCheckpoint::open(folder.path());
    CAPTURE(checkpoint.status().message());
    REQUIRE(checkpoint.ok());
    CHECK(checkpoint->kind() == c.kind);
    CHECK(checkpoint->format() == format_of(c.format));
    if (c.shard != 4000) CHECK(checkpoint->files().file_count() == c.files);
    if (c.shard == 4000) CHECK(checkpoint->files().file_count() > 1);
    model.check(*checkpoint);
  }
}

TEST_CASE("a model written over another one replaces it, however either was cut", "[model_checkpoint]") {
  Rng rng(42);
  const TemporaryFolder folder;
  for (const std::uint64_t shard : {std::uint64_t{1} << 30, std::uint64_t{1}, std::uint64_t{1} << 30}) {
    const Model model(format_of("m1v4g64"), rng);
    REQUIRE(
        save_model_checkpoint(folder.path(), kOurs, model.config, model.named, model.plain, {shard}).ok());
    const Result<ModelCheckpoint> checkpoint = ModelCheckpoint::open(folder.path());
    REQUIRE(checkpoint.ok());
    model.check(*checkpoint);
    CHECK(std::filesystem::exists(folder / "model.safetensors") == (shard > 1));
    CHECK(std::filesystem::exists(folder / "model.safetensors.index.json") == (shard == 1));
  }
}

TEST_CASE("a model half written over another one of as many shards cannot be opened", "[model_checkpoint]") {
  Rng rng(43);
  const TemporaryFolder folder;
  const Model first(format_of("m1v4g64"), rng);
  const Model second(format_of("m1v4g64"), rng);
  const auto save = [&](const Model& model) {
    return save_model_checkpoint(folder.path(), kOurs, model.config, model.named, model.plain, {1});
  };
  REQUIRE(save(first).ok());
  std::string last;
  for (const std::string& name : folder.list())
    if (name.ends_with(".safetensors")) last = std::max(last, name);
  std::filesystem::remove(folder / last);
  std::filesystem::create_directory(folder / last);  // no file can take its place
  CHECK_FALSE(save(second).ok());
  CHECK(ModelCheckpoint::open(folder.path()).status().code() == StatusCode::kNotFound);
  std::filesystem::remove(folder / last);
  REQUIRE(save(second).ok());
  second.check(ModelCheckpoint::open(folder.path()).value());
}

TEST_CASE("AQLM's codes wrap to signed, CodeGEMM's are four to a word", "[model_checkpoint]") {
  // A row of 8 codes for b = 8 and v = 2, its code j being 100 + 40 j modulo 256, in codebook 0 of 1.
  Result<QuantizedMatrix> made = QuantizedMatrix::create(Format{2, 1, 8, -1}, 1, 16);
  REQUIRE(made.ok());
  for (std::uint32_t j = 0; j < 8; ++j) made->set_code(0, 0, j, (100 + 40 * j) % 256);
  const NamedMatrix named{"model.layers.0.x", made->view()};
  const TemporaryFolder folder;
  REQUIRE(save_model_checkpoint(folder.path(), kAqlm, {}, {&named, 1}, {}).ok());
  const SafetensorsFile aqlm = SafetensorsFile::open(folder / "model.safetensors").value();
  const SafetensorsTensor* codes = aqlm.find("model.layers.0.x.codes");
  REQUIRE(codes != nullptr);
  CHECK(codes->dtype == Dtype::kI8);
  CHECK(codes->shape == std::vector<std::int64_t>{1, 8, 1});
  const std::int8_t want[8] = {100, -116, -76, -36, 4, 44, 84, 124};
  CHECK(std::memcmp(codes->data.data(), want, 8) == 0);
  CHECK(aqlm.find("model.layers.0.x.codebooks")->shape == std::vector<std::int64_t>{1, 256, 1, 2});
  CHECK(aqlm.find("model.layers.0.x.scales")->shape == std::vector<std::int64_t>{1, 1, 1, 1});
  REQUIRE(aqlm.find_metadata("format") != nullptr);
  CHECK(*aqlm.find_metadata("format") == "pt");

  const QuantizedMatrix regrouped = regroup(made->view(), 8).value();
  const NamedMatrix again{"model.layers.0.x", regrouped.view()};
  REQUIRE(save_model_checkpoint(folder.path(), kOurs, {}, {&again, 1}, {}).ok());
  const SafetensorsFile ours = SafetensorsFile::open(folder / "model.safetensors").value();
  codes = ours.find("model.layers.0.x.codes");
  REQUIRE(codes != nullptr);
  CHECK(codes->dtype == Dtype::kI32);
  CHECK(codes->shape == std::vector<std::int64_t>{1, 2, 1});
  const std::uint32_t words[2] = {0xDCB48C64U, 0x7C542C04U};
  CHECK(std::memcmp(codes->data.data(), words, 8) == 0);
  CHECK(ours.find("model.layers.0.x.scales")->shape == std::vector<std::int64_t>{2, 1});
  const nlohmann::json config =
      parse_json_object(get_file(folder / "config.json"), "config.json").value()["codegemm"];
  CHECK(config["group_size"] == 8);
  CHECK(config["vec_len"] == 2);
  CHECK(config["num_codebooks"] == 1);
  CHECK(config["nbits_per_codebook"] == 8);
  CHECK(config["arch_config"]["module_names"] == nlohmann::json{"x"});
}

TEST_CASE("a model is converted where the formats allow it, and refused with the reason elsewhere",
          "[model_checkpoint]") {
  Rng rng(43);
  const TemporaryFolder first;
  const TemporaryFolder second;
  const TemporaryFolder third;
  const Model aqlm(format_of("m2v8g-1"), rng);
  REQUIRE(save_model_checkpoint(first.path(), kAqlm, aqlm.config, aqlm.named, aqlm.plain).ok());
  const ModelCheckpoint from = ModelCheckpoint::open(first.path()).value();
  REQUIRE(convert_model_checkpoint(from, second.path(), kOurs).ok());
  const ModelCheckpoint ours = ModelCheckpoint::open(second.path()).value();
  CHECK(ours.kind() == kOurs);
  CHECK(ours.format() == format_of("m2v8g64"));  // 64 divides 64 and 192
  for (std::size_t i = 0; i < aqlm.named.size(); ++i)
    CHECK(same_weights(ours.load(aqlm.named[i].name).value(), aqlm.matrices[i]));
  REQUIRE(convert_model_checkpoint(ours, third.path(), kAqlm).ok());
  const ModelCheckpoint back = ModelCheckpoint::open(third.path()).value();
  aqlm.check(back);
  CHECK(get_file(third / "config.json") == get_file(first / "config.json"));
  CHECK((get_file(third / "model.safetensors") == get_file(first / "model.safetensors")));

  const auto refusal = [&](const ModelCheckpoint& model, CheckpointKind kind) {
    const TemporaryFolder folder;
    const Status status = convert_model_checkpoint(model, folder.path(), kind);
    CHECK(status.code() == StatusCode::kUnsupported);
    CHECK(folder.list().empty());
    return status.message();
  };
  const Model grouped(format_of("m1v4g32"), rng);
  REQUIRE(save_model_checkpoint(second.path(), kOurs, grouped.config, grouped.named, grouped.plain).ok());
  const std::string message = refusal(ModelCheckpoint::open(second.path()).value(), kAqlm);
  CAPTURE(message);
  CHECK(contains(message, "'model.layers.0.mlp.down_proj': row 0 has the scales "));
  CHECK(contains(message, "within what would be one group of 192 weights: m1v4g32 cannot become m1v4g-1"));
  const Model wide(format_of("m1v8b12g-1"), rng);
  REQUIRE(save_model_checkpoint(first.path(), kAqlm, wide.config, wide.named, wide.plain).ok());
  CHECK(contains(refusal(ModelCheckpoint::open(first.path()).value(), kOurs),
                 "CodeGEMM packs four codes of at most 8 bits into a word"));
}

TEST_CASE("what a format cannot say is refused with the layer", "[model_checkpoint]") {
  Rng rng(44);
  const QuantizedMatrix a = random_quantized(rng, format_of("m1v4g32"), 4, 64);
  const QuantizedMatrix b = random_quantized(rng, format_of("m2v4g32"), 4, 64);
  const QuantizedMatrix row = random_quantized(rng, format_of("m1v4g-1"), 4, 64);
  const QuantizedMatrix odd = random_quantized(rng, format_of("m1v4g4"), 4, 68);
  const QuantizedMatrix tail = random_quantized(rng, format_of("m1v4g32"), 4, 80);
  const auto refusal = [&](CheckpointKind kind, const std::vector<NamedMatrix>& matrices) {
    const TemporaryFolder folder;
    const Status status = save_model_checkpoint(folder.path(), kind, {}, matrices, {});
    CHECK_FALSE(status.ok());
    CHECK(folder.list().empty());
    return status.message();
  };
  const std::string x = "model.layers.0.x";
  CHECK(contains(refusal(kOurs, {}), "there is no quantized layer to save"));
  CHECK(contains(refusal(kOurs, {{x, a.view()}, {"model.layers.0.y", b.view()}}),
                 "'model.layers.0.y' is 4 x 64 in m2v4g32, and CodeGEMM has one format for the whole model"));
  CHECK(contains(refusal(kOurs, {{x, row.view()}}), "CodeGEMM has no group size of -1"));
  CHECK(contains(refusal(kOurs, {{x, odd.view()}}), "needs a K that is a multiple of 4 v = 16"));
  CHECK(contains(refusal(kOurs, {{x, tail.view()}}), "needs a K that is a multiple of g = 32"));
  CHECK(contains(refusal(kOurs, {{"lm_head", a.view()}}), "'lm_head' is not of the form model.layers.N"));
  CHECK(contains(refusal(kOurs, {{x, a.view()}, {"model.layers.1.y", a.view()}}),
                 "'x' is quantized in 1 of 2 layers"));
  CHECK(contains(refusal(kAqlm, {{x, a.view()}}), "AQLM has one scale a row"));
}

TEST_CASE("a folder whose files contradict one another is refused with the place", "[model_checkpoint]") {
  Rng rng(45);
  const std::string good_ours =
      R"({"codegemm":{"group_size":32,"vec_len":4,"num_codebooks":1,"nbits_per_codebook":8}})";
  const std::string good_aqlm =
      R"({"quantization_config":{"quant_method":"aqlm","in_group_size":4,"num_codebooks":1,)"
      R"("nbits_per_codebook":8,"out_group_size":1}})";
  const std::vector<std::byte> data(1 << 17);
  const TemporaryFolder folder;
  const auto open = [&](const std::string& config, std::vector<std::pair<std::string, Dtype>> tensors,
                        std::vector<std::vector<std::int64_t>> shapes) {
    std::vector<SafetensorsTensor> list;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      std::uint64_t bytes = 0;
      REQUIRE(shape_bytes(shapes[i], tensors[i].second, bytes));
      REQUIRE(bytes <= data.size());
      list.push_back({tensors[i].first, tensors[i].second, shapes[i],
                      std::span(data).first(static_cast<std::size_t>(bytes))});
    }
    put_file(folder / "config.json", config);
    REQUIRE(write_safetensors(folder / "model.safetensors", list).ok());
    const Result<ModelCheckpoint> opened = ModelCheckpoint::open(folder.path());
    if (opened.ok()) return std::string("opened");
    CHECK(contains(opened.status().message(), folder.path()));
    return opened.status().message();
  };
  const auto i32 = Dtype::kI32;
  const auto f16 = Dtype::kF16;
  const std::vector<std::pair<std::string, Dtype>> ours{
      {"w.codes", i32}, {"w.codebooks", f16}, {"w.scales", f16}};
  const std::vector<std::pair<std::string, Dtype>> aqlm{
      {"w.codes", Dtype::kI8}, {"w.codebooks", f16}, {"w.scales", f16}};
  CHECK(open(good_ours, ours, {{1, 4, 5}, {1, 256, 4}, {2, 5}}) == "opened");
  CHECK(open(good_aqlm, aqlm, {{5, 16, 1}, {1, 256, 1, 4}, {5, 1, 1, 1}}) == "opened");

  struct Bad {
    std::string config;
    const char* message;
  };
  const std::string deep = std::string(200, '[') + std::string(200, ']');
  for (const Bad& bad :
       {Bad{"{}", "has neither 'codegemm' nor 'quantization_config'"}, Bad{"[]", "must be an object"},
        Bad{"{", "is no JSON"}, Bad{"{\"x\":" + deep + "}", "is nested deeper than 100 levels"},
        Bad{R"({"codegemm":{},"quantization_config":{}})", "has both"},
        Bad{R"({"codegemm":[]})", "'codegemm' is of type array"},
        Bad{R"({"codegemm":{"vec_len":4}})", "codegemm: has no 'num_codebooks'"},
        Bad{R"({"codegemm":{"vec_len":"4"}})", "'vec_len' is string, must be an integer"},
        Bad{R"({"codegemm":{"vec_len":1e3}})", "'vec_len' is number, must be an integer"},
        Bad{R"({"codegemm":{"vec_len":18446744073709551615}})", "must be an integer in 1..1073741824"},
        Bad{R"({"codegemm":{"vec_len":4,"num_codebooks":1,"nbits_per_codebook":16,"group_size":32}})",
            "four codes of at most 8 bits"},
        Bad{R"({"codegemm":{"vec_len":4,"num_codebooks":9,"nbits_per_codebook":8,"group_size":32}})",
            "m = 9 is not in 1..4"},
        Bad{R"({"codegemm":{"vec_len":4,"num_codebooks":1,"nbits_per_codebook":8,"group_size":-1}})",
            "'group_size' is -1"},
        Bad{R"({"quantization_config":{"quant_method":"gptq"}})", "quant_method is 'gptq'"},
        Bad{R"({"quantization_config":{"quant_method":7}})", "has no text 'quant_method'"},
        Bad{R"({"quantization_config":{"quant_method":"aqlm","in_group_size":4,"num_codebooks":1,)"
            R"("nbits_per_codebook":8,"out_group_size":2}})",
            "out_group_size is 2"}}) {
    CAPTURE(bad.config);
    const std::string message = open(bad.config, ours, {{1, 4, 5}, {1, 256, 4}, {2, 5}});
    CAPTURE(message);
    CHECK(contains(message, bad.message));
  }

  CHECK(contains(open(good_ours, {{"w.codes", i32}}, {{1, 4, 5}}), "'w': has no tensor 'codebooks'"));
  CHECK(contains(open(good_ours, ours, {{4, 5}, {1, 256, 4}, {2, 5}}), "must have three dimensions"));
  CHECK(contains(open(good_ours, ours, {{2, 4, 5}, {1, 256, 4}, {2, 5}}), "must be I32 [1, 4, 5]"));
  CHECK(contains(open(good_ours, ours, {{1, 3, 5}, {1, 256, 4}, {2, 5}}),
                 "48 columns are not a multiple of group_size 32"));
  CHECK(contains(open(good_ours, ours, {{1, 4, 5}, {1, 128, 4}, {2, 5}}), "codebooks have shape"));
  CHECK(contains(open(good_ours, ours, {{1, 4, 5}, {1, 256, 4}, {5, 2}}), "scales have shape [5, 2]"));
  // Sizes near 2^63 beside a dimension of 0 must not overflow.
  const std::int64_t huge = std::int64_t{1} << 60;
  CHECK(contains(open(good_ours, ours, {{0, huge, 1}, {1, 256, 4}, {2, 5}}), "too large"));
  CHECK(contains(open(good_ours, ours, {{1, huge, 0}, {1, 256, 4}, {2, 5}}), "too large"));
  CHECK(contains(open(good_aqlm, aqlm, {{0, huge, 1}, {1, 256, 1, 4}, {5, 1, 1, 1}}),
                 "scales have shape [5, 1, 1, 1], must be [0, 1, 1, 1]"));
  CHECK(contains(open(good_aqlm, ours, {{5, 16, 1}, {1, 256, 1, 4}, {5, 1, 1, 1}}),
                 "codes are I32 [5, 16, 1], must be I8"));
}

TEST_CASE("values in bf16 and fp32 are taken where fp16 holds them exactly", "[model_checkpoint]") {
  const TemporaryFolder folder;
  put_file(folder / "config.json",
           R"({"quantization_config":{"quant_method":"aqlm","in_group_size":2,"num_codebooks":1,)"
           R"("nbits_per_codebook":4,"out_group_size":1}})");
  const std::int8_t codes[2] = {-1, 7};  // 15 and 7 of 16
  std::vector<BFloat16> books(32);
  for (std::size_t i = 0; i < 32; ++i) books[i] = BFloat16::from_float(static_cast<float>(i) * 0.5F);
  float scale = 0.75F;
  const auto write = [&] {
    const SafetensorsTensor tensors[] = {
        {"w.codes", Dtype::kI8, {1, 2, 1}, std::as_bytes(std::span(codes))},
        {"w.codebooks", Dtype::kBF16, {1, 16, 1, 2}, std::as_bytes(std::span(books))},
        {"w.scales", Dtype::kF32, {1, 1, 1, 1}, std::as_bytes(std::span(&scale, 1))}};
    REQUIRE(write_safetensors(folder / "model.safetensors", tensors).ok());
    return ModelCheckpoint::open(folder.path()).value().load("w");
  };
  const Result<QuantizedMatrix> exact = write();
  REQUIRE(exact.ok());
  CHECK(exact->view().code(0, 0, 0) == 15);
  CHECK(reference_weight(exact->view(), 0, 1) == 0.75 * 15.5);
  CHECK(reference_weight(exact->view(), 0, 2) == 0.75 * 7.0);
  scale = 0.1F;
  const Result<QuantizedMatrix> inexact = write();
  CHECK(inexact.status().code() == StatusCode::kUnsupported);
  CHECK(contains(inexact.status().message(), "tensor 'w.scales' has the F32 value 0.1 at 0"));
}

TEST_CASE("weights keep their bits under another scale group", "[regroup]") {
  Rng rng(46);
  const QuantizedMatrix row = random_quantized(rng, format_of("m2v4g-1"), 5, 60);
  for (const int group : {-1, 4, 20, 36, 60, 100}) {
    CAPTURE(group);
    const QuantizedMatrix other = regroup(row.view(), group).value();
    CHECK(other.format().g == group);
    CHECK(same_weights(other, row));
    CHECK(same(regroup(other.view(), -1).value(), row));
  }
  const QuantizedMatrix fine = random_quantized(rng, format_of("m1v4g12"), 5, 60);
  CHECK(same_weights(regroup(fine.view(), 4).value(), fine));
  CHECK(regroup(fine.view(), 24).status().code() == StatusCode::kUnsupported);
  CHECK(regroup(fine.view(), 6).status().code() == StatusCode::kInvalidArgument);
}
