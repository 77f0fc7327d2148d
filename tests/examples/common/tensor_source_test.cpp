// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/io/safetensors_writer.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <common/tensor_source.hpp>
#include <examples/common/gguf_builder.hpp>
#include <support/catch.hpp>

using namespace prefillshare::examples;
using namespace prefillshare::examples::test;
using namespace codegemm::test;
using codegemm::Dtype;
using codegemm::SafetensorsTensor;

namespace {

constexpr std::int64_t kHidden = 8;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kKvHeads = 1;
constexpr std::int64_t kHeadDim = 6;  // not hidden / heads

std::vector<float> counted(std::int64_t count, float first) {
  std::vector<float> out;
  for (std::int64_t i = 0; i < count; ++i) out.push_back(first + static_cast<float>(i));
  return out;
}

/// The hyperparameters of a model with one layer. `skip` leaves one key out.
GgufBuilder metadata(const std::string& architecture, const std::string& skip = {}) {
  GgufBuilder builder;
  builder.string("general.architecture", architecture);
  const std::string prefix = architecture + ".";
  const std::vector<std::pair<std::string, std::uint32_t>> numbers{
      {"embedding_length", kHidden},      {"block_count", 1},
      {"attention.head_count", kHeads},   {"attention.head_count_kv", kKvHeads},
      {"feed_forward_length", 10},        {"context_length", 64},
      {"attention.key_length", kHeadDim}, {"attention.value_length", kHeadDim},
      {"rope.dimension_count", kHeadDim},
  };
  for (const auto& [key, value] : numbers) {
    if (key != skip) builder.u32(prefix + key, value);
  }
  if (skip != "attention.layer_norm_rms_epsilon")
    builder.f32(prefix + "attention.layer_norm_rms_epsilon", 1e-5F);
  if (skip != "rope.freq_base") builder.f32(prefix + "rope.freq_base", 5000.0F);
  return builder;
}

void add_embedding(GgufBuilder& builder) {
  builder.tensor("token_embd.weight", {kHidden, 5}, std::span<const float>(counted(5 * kHidden, 0.0F)));
}

/// Where the converter of llama.cpp puts row r of a q or k projection: reshape to [heads][2][D / 2], swap the
/// last two.
std::int64_t converted_row(std::int64_t row, std::int64_t head_dim) {
  const std::int64_t head = row / head_dim;
  const std::int64_t half = row % head_dim / (head_dim / 2);
  const std::int64_t i = row % (head_dim / 2);
  return head * head_dim + 2 * i + half;
}

/// Rows in the converter's order: row r of `rows` goes to converted_row(r).
std::vector<float> convert(const std::vector<float>& rows, std::int64_t cols) {
  std::vector<float> out(rows.size());
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(rows.size()) / cols; ++r) {
    std::copy_n(rows.begin() + r * cols, cols, out.begin() + converted_row(r, kHeadDim) * cols);
  }
  return out;
}

std::unique_ptr<TensorSource> open_or_fail(const std::string& path) {
  Result<std::unique_ptr<TensorSource>> source = open_model(path);
  CAPTURE(source.status().message());
  REQUIRE(source.ok());
  return *std::move(source);
}

Status open_gguf(const TemporaryFolder& folder, const GgufBuilder& builder) {
  put_file(folder / "m.gguf", builder.build());
  return open_model(folder / "m.gguf").status();
}

std::vector<float> read_all(const TensorSource& source, const std::string& name) {
  const Result<TensorInfo> info = source.info(name);
  CAPTURE(name, info.status().message());
  REQUIRE(info.ok());
  std::vector<float> out(static_cast<std::size_t>(info->rows * info->cols), NAN);
  REQUIRE(source.read_rows(name, 0, info->rows, out.data()).ok());
  return out;
}

const std::string kConfig =
    R"({"model_type": "llama", "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1,
  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 10,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 5000.0, "tie_word_embeddings": true})";

/// kConfig with one member set to another JSON value, or taken out where `value` is empty.
std::string config_with(const std::string& key, const std::string& value) {
  nlohmann::json config = nlohmann::json::parse(kConfig);
  if (value.empty()) {
    config.erase(key);
  } else {
    config[key] = nlohmann::json::parse(value);
  }
  return config.dump();
}

Result<ModelHyperparameters> read_config(const std::string& text) {
  return read_hyperparameters(text, "config.json", [](std::string_view) { return false; });
}

}  // namespace

TEST_CASE("GGUF names become Hugging Face names", "[tensor_source]") {
  using detail::hugging_face_name;
  CHECK(hugging_face_name("token_embd.weight") == "model.embed_tokens.weight");
  CHECK(hugging_face_name("output_norm.weight") == "model.norm.weight");
  CHECK(hugging_face_name("output.weight") == "lm_head.weight");
  CHECK(hugging_face_name("blk.0.attn_q.weight") == "model.layers.0.self_attn.q_proj.weight");
  CHECK(hugging_face_name("blk.17.attn_k.bias") == "model.layers.17.self_attn.k_proj.bias");
  CHECK(hugging_face_name("blk.1.attn_v.weight") == "model.layers.1.self_attn.v_proj.weight");
  CHECK(hugging_face_name("blk.1.attn_output.weight") == "model.layers.1.self_attn.o_proj.weight");
  CHECK(hugging_face_name("blk.1.attn_q_norm.weight") == "model.layers.1.self_attn.q_norm.weight");
  CHECK(hugging_face_name("blk.1.attn_k_norm.weight") == "model.layers.1.self_attn.k_norm.weight");
  CHECK(hugging_face_name("blk.1.attn_norm.weight") == "model.layers.1.input_layernorm.weight");
  CHECK(hugging_face_name("blk.1.ffn_norm.weight") == "model.layers.1.post_attention_layernorm.weight");
  CHECK(hugging_face_name("blk.1.ffn_gate.weight") == "model.layers.1.mlp.gate_proj.weight");
  CHECK(hugging_face_name("blk.1.ffn_up.weight") == "model.layers.1.mlp.up_proj.weight");
  CHECK(hugging_face_name("blk.1.ffn_down.weight") == "model.layers.1.mlp.down_proj.weight");
  for (const char* other :
       {"", ".", "rope_freqs.weight", "blk.weight", "blk.0.weight", "blk..attn_q.weight",
        "blk.x.attn_q.weight", "blk.00.attn_q.weight", "blk.-1.attn_q.weight", "blk.0.attn_q",
        "blk.0.attn_q.scale", "blk.0.attn_q.weight.weight", "attn_q.weight", "output"}) {
    CAPTURE(other);
    CHECK(hugging_face_name(other).empty());
  }
}

TEST_CASE("q and k rows of a llama GGUF come back in rotate-half order", "[tensor_source]") {
  const TemporaryFolder folder;
  const std::vector<float> q = counted(kHeads * kHeadDim * kHidden, 100.0F);
  const std::vector<float> k = counted(kKvHeads * kHeadDim * kHidden, 300.0F);
  const std::vector<float> v = counted(kKvHeads * kHeadDim * kHidden, 500.0F);
  const std::vector<float> q_bias = counted(kHeads * kHeadDim, 700.0F);
  for (const std::string architecture : {"llama", "qwen2", "qwen3"}) {
    CAPTURE(architecture);
    const bool converted = architecture == "llama";
    GgufBuilder builder = metadata(architecture);
    add_embedding(builder);
    builder.tensor("blk.0.attn_q.weight", {kHidden, kHeads * kHeadDim}, converted ? convert(q, kHidden) : q)
        .tensor("blk.0.attn_k.weight", {kHidden, kKvHeads * kHeadDim}, converted ? convert(k, kHidden) : k)
        .tensor("blk.0.attn_v.weight", {kHidden, kKvHeads * kHeadDim}, v)
        .tensor("blk.0.attn_q.bias", {kHeads * kHeadDim}, converted ? convert(q_bias, 1) : q_bias)
        .tensor("rope_freqs.weight", {kHeadDim / 2}, std::span<const float>(std::vector<float>{1, 1, 1}));
    put_file(folder / "m.gguf", builder.build());
    const std::unique_ptr<TensorSource> source = open_or_fail(folder / "m.gguf");
    CHECK(source->path() == folder / "m.gguf");
    REQUIRE(source->gguf() != nullptr);
    CHECK(*source->gguf()->string("general.architecture") == architecture);
    CHECK(source->names() == std::vector<std::string>{"model.embed_tokens.weight",
                                                      "model.layers.0.self_attn.k_proj.weight",
                                                      "model.layers.0.self_attn.q_proj.bias",
                                                      "model.layers.0.self_attn.q_proj.weight",
                                                      "model.layers.0.self_attn.v_proj.weight"});

    const std::string q_name = "model.layers.0.self_attn.q_proj.weight";
    CHECK(read_all(*source, q_name) == q);
    CHECK(read_all(*source, "model.layers.0.self_attn.k_proj.weight") == k);
    CHECK(read_all(*source, "model.layers.0.self_attn.v_proj.weight") == v);
    CHECK(read_all(*source, "model.layers.0.self_attn.q_proj.bias") == q_bias);
    CHECK(source->info("model.layers.0.self_attn.q_proj.bias")->rows == 1);
    CHECK(source->info(q_name)->type == "F32");

    std::vector<float> part(3 * kHidden);
    REQUIRE(source->read_rows(q_name, 5, 3, part.data()).ok());
    CHECK(part == std::vector<float>(q.begin() + 5 * kHidden, q.begin() + 8 * kHidden));
    CHECK(source->read_rows(q_name, 12, 0, nullptr).ok());
    const Status beyond = source->read_rows(q_name, 10, 3, part.data());
    CHECK(beyond.code() == StatusCode::kInvalidArgument);
    CHECK(contains(beyond.message(), "has 12 rows, asked for 3 from row 10"));
    CHECK_FALSE(source->read_rows(q_name, -1, 1, part.data()).ok());
    CHECK_FALSE(source->contains("absent"));
    CHECK(source->info("absent").status().code() == StatusCode::kNotFound);
    CHECK(contains(source->read_rows("absent", 0, 1, part.data()).message(),
                   "m.gguf: tensor 'absent' is missing"));
  }
}

TEST_CASE("hyperparameters of a GGUF are read", "[tensor_source]") {
  const TemporaryFolder folder;
  GgufBuilder builder = metadata("llama");
  add_embedding(builder);
  put_file(folder / "m.gguf", builder.build());
  const ModelHyperparameters h = open_or_fail(folder / "m.gguf")->hyperparameters();
  CHECK(h.architecture == "llama");
  CHECK(h.vocab_size == 5);
  CHECK(h.hidden_size == kHidden);
  CHECK(h.layers == 1);
  CHECK(h.heads == kHeads);
  CHECK(h.kv_heads == kKvHeads);
  CHECK(h.head_dim == kHeadDim);
  CHECK(h.intermediate_size == 10);
  CHECK(h.context_length == 64);
  CHECK(h.sliding_window == 0);
  CHECK(h.rms_epsilon == static_cast<double>(1e-5F));
  CHECK(h.rope_theta == 5000.0);
  CHECK(h.rope_scaling == "none");
  CHECK_FALSE(h.rope_freqs);
  CHECK(h.tied_embeddings);
  CHECK_FALSE(h.attention_bias);
  CHECK_FALSE(h.qk_norm);

  // Features that the tensors tell.
  GgufBuilder more = metadata("qwen3");
  more.u32("qwen3.attention.sliding_window", 32)
      .string("qwen3.rope.scaling.type", "linear")
      .f32("qwen3.rope.scaling.factor", 4.0F)
      .u32("qwen3.rope.scaling.original_context_length", 16);
  add_embedding(more);
  more.tensor("output.weight", {kHidden, 5}, std::span<const float>(counted(5 * kHidden, 0.0F)))
      .tensor("blk.0.attn_q.bias", {kHeads * kHeadDim},
              std::span<const float>(counted(kHeads * kHeadDim, 0.0F)))
      .tensor("blk.0.attn_q_norm.weight", {kHeadDim}, std::span<const float>(counted(kHeadDim, 0.0F)));
  put_file(folder / "m.gguf", more.build());
  const ModelHyperparameters q = open_or_fail(folder / "m.gguf")->hyperparameters();
  CHECK_FALSE(q.tied_embeddings);
  CHECK(q.attention_bias);
  CHECK(q.qk_norm);
  CHECK(q.sliding_window == 32);
  CHECK(q.rope_scaling == "linear");
  CHECK(q.rope_factor == 4.0);
  CHECK(q.rope_original_context == 16);

  // Defaults: KV heads as many as heads, a head size that shares out the hidden size, the base 10000.
  GgufBuilder fewer = metadata("llama", "attention.key_length");
  add_embedding(fewer);
  CHECK(contains(open_gguf(folder, fewer).message(), "key, value and RoPE sizes of a head are 4, 6 and 6"));
  GgufBuilder no_base = metadata("llama", "rope.freq_base");
  add_embedding(no_base);
  put_file(folder / "m.gguf", no_base.build());
  CHECK(open_or_fail(folder / "m.gguf")->hyperparameters().rope_theta == 10000.0);
}

TEST_CASE("RoPE factors of a GGUF are recognized as llama3 scaling", "[tensor_source]") {
  // Default over llama3 frequencies of transformers 5.23 for factor 32, base 500000, head size 64.
  std::vector<float> factors(32, 32.0F);
  std::fill_n(factors.begin(), 15, 1.0F);
  factors[15] = 1.651329F;
  factors[16] = 3.292263F;
  factors[17] = 9.666731F;
  ModelHyperparameters h;
  h.head_dim = 64;
  h.rope_theta = 500000.0;
  detail::explain_rope_freqs(h, factors);
  CHECK(h.rope_freqs);
  CHECK(h.rope_scaling == "llama3");
  CHECK(h.rope_factor == 32.0);
  CHECK(h.rope_low_freq_factor == 1.0);
  CHECK(h.rope_high_freq_factor == 4.0);
  CHECK(h.rope_original_context == 8192);

  ModelHyperparameters other = h;
  factors[16] = 3.5F;
  detail::explain_rope_freqs(other, factors);
  CHECK(other.rope_scaling == "rope_freqs");
  factors[31] = NAN;
  detail::explain_rope_freqs(other, factors);
  CHECK(other.rope_scaling == "rope_freqs");
}

TEST_CASE("GGUF models that cannot be served are refused by name and number", "[tensor_source]") {
  struct Case {
    GgufBuilder builder;
    StatusCode code;
    const char* message;
    bool embedding = true;
  };
  const StatusCode corrupt = StatusCode::kCorruptData;
  const StatusCode unsupported = StatusCode::kUnsupported;
  const StatusCode missing = StatusCode::kNotFound;
  const auto without = [](const char* key) { return metadata("llama", key); };
  const auto changed = [](const std::string& key, std::uint32_t value) {
    return std::move(metadata("llama", key).u32("llama." + key, value));
  };
  std::vector<Case> cases;
  cases.push_back({GgufBuilder(), missing, "metadata 'general.architecture' is missing"});
  cases.push_back({std::move(GgufBuilder().u32("general.architecture", 1)), corrupt, "is the uint32 1"});
  cases.push_back(
      {metadata("gpt2"), unsupported, "architecture is 'gpt2', known are llama, mistral, qwen2, qwen3"});
  for (const char* key : {"embedding_length", "block_count", "attention.head_count", "feed_forward_length",
                          "context_length", "attention.layer_norm_rms_epsilon"}) {
    cases.push_back({without(key), missing, key});
  }
  cases.push_back({changed("block_count", 0), corrupt, "'llama.block_count' is 0, must be in 1..4096"});
  cases.push_back({changed("block_count", 4'000'000'000U), corrupt, "is 4000000000, must be in 1..4096"});
  cases.push_back({changed("attention.head_count", 0), corrupt, "'llama.attention.head_count' is 0"});
  cases.push_back(
      {changed("attention.head_count_kv", 3), corrupt, "2 attention heads are not a multiple of 3 KV heads"});
  cases.push_back({changed("attention.key_length", 7), unsupported,
                   "key, value and RoPE sizes of a head are 7, 6 and 6"});
  cases.push_back({changed("rope.dimension_count", 2), unsupported, "sizes of a head are 6, 6 and 2"});
  cases.push_back({std::move(without("rope.freq_base").f32("llama.rope.freq_base", NAN)), corrupt,
                   "'llama.rope.freq_base' is nan"});
  cases.push_back({std::move(without("rope.freq_base").f32("llama.rope.freq_base", -1.0F)), corrupt,
                   "is -1, must be in"});
  cases.push_back({std::move(without("attention.layer_norm_rms_epsilon")
                                 .f32("llama.attention.layer_norm_rms_epsilon", INFINITY)),
                   corrupt, "is inf, must be in"});
  cases.push_back(
      {std::move(metadata("llama").u32("llama.expert_count", 8)), unsupported, "a mixture of 8 experts"});
  cases.push_back({std::move(metadata("llama").u32("llama.rope.scaling.type", 8)), corrupt,
                   "metadata 'llama.rope.scaling.type' is the uint32 8, expected a string"});
  cases.push_back(
      {std::move(metadata("llama").f32("llama.rope.scaling.factor", 0.0F)), corrupt, "factor' is 0"});
  cases.push_back({metadata("llama"), missing, "tensor 'token_embd.weight' is missing", false});
  const std::vector<float> few = counted(kHidden * 6, 0.0F);
  cases.push_back({std::move(metadata("llama").tensor("blk.0.attn_q.weight", {kHidden, 6}, few)), corrupt,
                   "tensor 'blk.0.attn_q.weight' has 6 rows, must have 12, heads times head size"});
  cases.push_back({std::move(metadata("llama").tensor("blk.0.attn_k.bias", {8}, std::span(few).first(8))),
                   corrupt, "tensor 'blk.0.attn_k.bias' has 8 rows, must have 6"});
  cases.push_back(
      {std::move(metadata("llama").tensor("blk.0.attn_output.bias", {8}, std::span(few).first(8))),
       unsupported, "'model.layers.0.self_attn.o_proj.bias': no such bias is known"});
  cases.push_back({std::move(metadata("llama").tensor("rope_freqs.weight", {5}, std::span(few).first(5))),
                   corrupt, "tensor 'rope_freqs.weight' is 1 x 5, must be 1 x 3"});
  cases.push_back(
      {std::move(metadata("llama").tensor("blk.0.ffn_up.weight", {256}, 16, std::string(66, 'x'))),
       unsupported, "tensor 'blk.0.ffn_up.weight' has type 16 (IQ2_XXS), converted to fp32 are F32,"});
  for (Case& bad : cases) {
    const TemporaryFolder folder;
    CAPTURE(bad.message);
    if (bad.embedding) add_embedding(bad.builder);
    const Status status = open_gguf(folder, bad.builder);
    CAPTURE(status.message());
    CHECK(status.code() == bad.code);
    CHECK(contains(status.message(), (folder / "m.gguf") + ": "));
    CHECK(contains(status.message(), bad.message));
  }
}

TEST_CASE("a folder with one safetensors file is a model", "[tensor_source]") {
  const TemporaryFolder folder;
  put_file(folder / "config.json", kConfig);
  const std::vector<float> f32{1.5F, -2.0F, 3.0F, 0.25F};
  std::vector<codegemm::BFloat16> bf16;
  std::vector<codegemm::Half> f16;
  std::vector<double> f64;
  for (const float x : f32) {
    bf16.push_back(codegemm::BFloat16::from_float(x));
    f16.push_back(codegemm::Half::from_float(x));
    f64.push_back(static_cast<double>(x));
  }
  const std::vector<std::int8_t> i8{1, 2};
  const std::vector<SafetensorsTensor> tensors{
      {"f32", Dtype::kF32, {2, 2}, std::as_bytes(std::span(f32))},
      {"bf16", Dtype::kBF16, {2, 2}, std::as_bytes(std::span(bf16))},
      {"f16", Dtype::kF16, {4}, std::as_bytes(std::span(f16))},
      {"f64", Dtype::kF64, {4, 1}, std::as_bytes(std::span(f64))},
      {"i8", Dtype::kI8, {2}, std::as_bytes(std::span(i8))},
      {"cube", Dtype::kF32, {1, 2, 2}, std::as_bytes(std::span(f32))},
      {"scalar", Dtype::kF32, {}, std::as_bytes(std::span(f32)).first(4)},
      {"none", Dtype::kF32, {0, 3}, {}},
  };
  REQUIRE(codegemm::write_safetensors(folder / "model.safetensors", tensors).ok());
  const std::unique_ptr<TensorSource> source = open_or_fail(folder.path());
  CHECK(source->gguf() == nullptr);
  CHECK(source->names() ==
        std::vector<std::string>{"bf16", "cube", "f16", "f32", "f64", "i8", "none", "scalar"});
  for (const char* name : {"f32", "bf16", "f16", "f64"}) {
    CAPTURE(name);
    CHECK(read_all(*source, name) == f32);
  }
  CHECK(source->info("bf16")->type == "BF16");
  CHECK(source->info("f16")->rows == 1);
  CHECK(source->info("f64")->rows == 4);
  CHECK(read_all(*source, "scalar") == std::vector<float>{1.5F});
  CHECK(source->info("none")->rows == 0);
  CHECK(source->read_rows("none", 0, 0, nullptr).ok());
  std::vector<float> row(2);
  REQUIRE(source->read_rows("f32", 1, 1, row.data()).ok());
  CHECK(row == std::vector<float>{3.0F, 0.25F});
  CHECK(contains(source->read_rows("f32", 1, 2, row.data()).message(), "has 2 rows, asked for 2 from row 1"));
  const Status integers = source->read_rows("i8", 0, 1, row.data());
  CHECK(integers.code() == StatusCode::kUnsupported);
  CHECK(contains(integers.message(), "model.safetensors: tensor 'i8' has dtype I8"));
  CHECK(contains(source->info("cube").status().message(),
                 "has shape [1, 2, 2], only vectors and matrices are read"));
  CHECK_FALSE(source->read_rows("cube", 0, 1, row.data()).ok());
  CHECK(source->info("absent").status().code() == StatusCode::kNotFound);
}

TEST_CASE("a folder with shards is a model", "[tensor_source]") {
  const TemporaryFolder folder;
  put_file(folder / "config.json", kConfig);
  const std::vector<float> a{1.0F, 2.0F};
  const std::vector<float> b{3.0F};
  const std::vector<SafetensorsTensor> first{{"a", Dtype::kF32, {2}, std::as_bytes(std::span(a))}};
  const std::vector<SafetensorsTensor> second{{"b", Dtype::kF32, {1}, std::as_bytes(std::span(b))},
                                              {"unlisted", Dtype::kF32, {1}, std::as_bytes(std::span(b))}};
  REQUIRE(codegemm::write_safetensors(folder / "one.safetensors", first).ok());
  REQUIRE(codegemm::write_safetensors(folder / "two.safetensors", second).ok());
  const std::string index = folder / "model.safetensors.index.json";
  put_file(index,
           R"({"metadata":{"total_size":12},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  const std::unique_ptr<TensorSource> source = open_or_fail(folder.path());
  CHECK(source->names() == std::vector<std::string>{"a", "b"});
  CHECK(read_all(*source, "a") == a);
  CHECK(read_all(*source, "b") == b);

  struct Case {
    std::string index;
    StatusCode code;
    const char* message;
  };
  const StatusCode corrupt = StatusCode::kCorruptData;
  const std::vector<Case> cases{
      {"{", corrupt, "index.json: is no JSON"},
      {"[]", corrupt, "is of type array, must be an object"},
      {"{}", corrupt, "has no object 'weight_map'"},
      {R"({"weight_map":[]})", corrupt, "has no object 'weight_map'"},
      {R"({"weight_map":{"a":1}})", corrupt, "weight_map 'a' is of type number, expected a string"},
      {R"({"weight_map":{"a":"../one.safetensors"}})", corrupt, "names the shard '../one.safetensors'"},
      {R"({"weight_map":{"a":"/etc/passwd"}})", corrupt,
       "names the shard '/etc/passwd', must be a file name without"},
      {R"({"weight_map":{"a":"..\\one.safetensors"}})", corrupt, "must be a file name without folders"},
      {R"({"weight_map":{"a":".."}})", corrupt, "must be a file name without folders"},
      {R"({"weight_map":{"a":""}})", corrupt, "must be a file name without folders"},
      {R"({"weight_map":{"a":"one.safetensors\u0000.x"}})", corrupt, "must be a file name without folders"},
      {R"({"weight_map":{"a":"three.safetensors"}})", StatusCode::kNotFound, "three.safetensors"},
      {R"({"weight_map":{"b":"one.safetensors"}})", corrupt, "one.safetensors: has no tensor 'b', which"},
      {std::string(200'000, '['), corrupt, "is nested deeper than 100 levels"},
      {std::string(100'000, '[') + std::string(100'000, ']'), corrupt, "is nested deeper than 100 levels"},
  };
  for (const Case& bad : cases) {
    CAPTURE(bad.message);
    put_file(index, bad.index);
    const Status status = open_model(folder.path()).status();
    CAPTURE(status.message());
    CHECK(status.code() == bad.code);
    CHECK(contains(status.message(), folder.path()));
    CHECK(contains(status.message(), bad.message));
  }
}

TEST_CASE("paths that hold no model are named", "[tensor_source]") {
  const TemporaryFolder folder;
  CHECK(open_model(folder / "missing").status().code() == StatusCode::kNotFound);
  CHECK(contains(open_model(folder / "missing").status().message(), folder / "missing"));
  const Status empty = open_model(folder.path()).status();
  CHECK(empty.code() == StatusCode::kNotFound);
  CHECK(contains(empty.message(), "holds neither model.safetensors nor model.safetensors.index.json"));

  REQUIRE(codegemm::write_safetensors(folder / "model.safetensors", {}).ok());
  CHECK(contains(open_model(folder.path()).status().message(), "config.json"));
  CHECK(contains(open_model(folder / "model.safetensors").status().message(), "give its folder"));
  put_file(folder / "text.gguf", "this is no model");
  CHECK(contains(open_model(folder / "text.gguf").status().message(), "not a GGUF file"));
  put_file(folder / "model.safetensors", "short");
  CHECK(open_model(folder.path()).status().code() == StatusCode::kCorruptData);
}

TEST_CASE("hyperparameters of a config.json are read", "[tensor_source]") {
  const Result<ModelHyperparameters> h = read_config(kConfig);
  CAPTURE(h.status().message());
  REQUIRE(h.ok());
  CHECK(h->architecture == "llama");
  CHECK(h->vocab_size == 5);
  CHECK(h->hidden_size == 8);
  CHECK(h->heads == 2);
  CHECK(h->kv_heads == 1);
  CHECK(h->head_dim == 6);
  CHECK(h->intermediate_size == 10);
  CHECK(h->context_length == 64);
  CHECK(h->rms_epsilon == 1e-5);
  CHECK(h->rope_theta == 5000.0);
  CHECK(h->rope_scaling == "none");
  CHECK(h->tied_embeddings);
  CHECK(h->sliding_window == 0);

  CHECK(read_config(config_with("head_dim", "null"))->head_dim == 4);
  CHECK(read_config(config_with("head_dim", ""))->head_dim == 4);
  CHECK(read_config(config_with("num_key_value_heads", ""))->kv_heads == 2);
  CHECK(read_config(config_with("tie_word_embeddings", ""))->tied_embeddings == false);
  CHECK(read_config(config_with("rms_norm_eps", ""))->rms_epsilon == 1e-6);
  CHECK(read_config(config_with("rope_theta", ""))->rope_theta == 10000.0);
  CHECK(read_config(config_with("rope_scaling", "null"))->rope_scaling == "none");
  CHECK(read_config(config_with("sliding_window", "7"))->sliding_window == 0);  // llama has none

  const Result<ModelHyperparameters> llama3 = read_config(config_with(
      "rope_scaling", R"({"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
                      R"("original_max_position_embeddings":8192})"));
  REQUIRE(llama3.ok());
  CHECK(llama3->rope_scaling == "llama3");
  CHECK(llama3->rope_factor == 8.0);
  CHECK(llama3->rope_low_freq_factor == 1.0);
  CHECK(llama3->rope_high_freq_factor == 4.0);
  CHECK(llama3->rope_original_context == 8192);
  const Result<ModelHyperparameters> linear =
      read_config(config_with("rope_scaling", R"({"type":"linear","factor":2})"));
  REQUIRE(linear.ok());
  CHECK(linear->rope_scaling == "linear");
  CHECK(linear->rope_factor == 2.0);
  const Result<ModelHyperparameters> newer =
      read_config(config_with("rope_parameters", R"({"rope_type":"default","rope_theta":123.0})"));
  REQUIRE(newer.ok());
  CHECK(newer->rope_scaling == "none");
  CHECK(newer->rope_theta == 123.0);
  CHECK(read_config(config_with("rope_scaling", R"({"rope_type":"yarn","factor":2})"))->rope_scaling ==
        "yarn");

  const auto of = [](const std::string& architecture, const std::string& members) {
    std::string text = config_with("model_type", "\"" + architecture + "\"");
    text.back() = ',';
    return read_config(text + members + "}");
  };
  CHECK(of("mistral", R"("sliding_window":null)")->sliding_window == 0);
  CHECK(of("mistral", R"("sliding_window":32)")->sliding_window == 32);
  CHECK(of("mistral", R"("x":0)")->sliding_window == 4096);  // the configuration class's default
  CHECK(of("qwen2", R"("sliding_window":32,"use_sliding_window":false)")->sliding_window == 0);
  CHECK(of("qwen2", R"("sliding_window":32,"use_sliding_window":true)")->sliding_window == 32);
  CHECK(of("qwen3", R"("x":0)")->head_dim == 6);

  const auto bias = [](std::string_view name) { return name == "model.layers.0.self_attn.q_proj.bias"; };
  CHECK(read_hyperparameters(kConfig, "c", bias)->attention_bias);
  const auto norm = [](std::string_view name) { return name == "model.layers.0.self_attn.q_norm.weight"; };
  CHECK(read_hyperparameters(kConfig, "c", norm)->qk_norm);
}

TEST_CASE("a config.json that cannot be served is refused by key and number", "[tensor_source]") {
  struct Case {
    std::string config;
    StatusCode code;
    const char* message;
  };
  const StatusCode corrupt = StatusCode::kCorruptData;
  const StatusCode unsupported = StatusCode::kUnsupported;
  const StatusCode missing = StatusCode::kNotFound;
  const std::vector<Case> cases{
      {"", corrupt, "is no JSON"},
      {"{", corrupt, "is no JSON"},
      {"[]", corrupt, "is a JSON array, must be an object"},
      {std::string(100'000, '[') + std::string(100'000, ']'), corrupt, "is a JSON array"},
      {"{}", missing, "'model_type' is missing"},
      {R"({"model_type":1})", corrupt, "'model_type' is of type number, expected a string"},
      {R"({"model_type":"gpt_neox"})", unsupported,
       "architecture is 'gpt_neox', known are llama, mistral, qwen2, qwen3"},
      {config_with("vocab_size", ""), missing, "'vocab_size' is missing"},
      {config_with("vocab_size", "0"), corrupt, "'vocab_size' is 0, must be in 1..16777216"},
      {config_with("vocab_size", "-5"), corrupt, "'vocab_size' is -5"},
      {config_with("vocab_size", "18446744073709551615"), corrupt, "'vocab_size' is 9223372036854775807"},
      {config_with("vocab_size", "1e3"), corrupt, "'vocab_size' is of type number, expected an integer"},
      {config_with("hidden_size", "\"8\""), corrupt, "'hidden_size' is of type string, expected an integer"},
      {config_with("num_hidden_layers", "5000"), corrupt, "'num_hidden_layers' is 5000, must be in 1..4096"},
      {config_with("num_key_value_heads", "3"), corrupt,
       "2 attention heads are not a multiple of 3 KV heads"},
      {config_with("head_dim", "7"), corrupt, "the head size is 7, must be even"},
      {config_with("head_dim", "1"), corrupt, "'head_dim' is 1, must be in 2..4096"},
      {config_with("rms_norm_eps", "0"), corrupt, "'rms_norm_eps' is 0"},
      {config_with("rms_norm_eps", "true"), corrupt, "'rms_norm_eps' is of type boolean, expected a number"},
      {config_with("rope_theta", "1e300"), corrupt, "'rope_theta' is 1e+300"},
      {config_with("tie_word_embeddings", "1"), corrupt,
       "'tie_word_embeddings' is of type number, expected a boolean"},
      {config_with("rope_scaling", "3"), corrupt, "'rope_scaling' is of type number, expected an object"},
      {config_with("rope_scaling", R"({"rope_type":3})"), corrupt,
       "'rope_scaling.rope_type' is of type number"},
      {config_with("rope_scaling", R"({"rope_type":"linear"})"), missing, "'rope_scaling.factor' is missing"},
      {config_with("rope_scaling", R"({"rope_type":"llama3","factor":8})"), missing,
       "'rope_scaling.low_freq_factor' is missing"},
      {config_with("rope_parameters", R"({"rope_type":"default","partial_rotary_factor":0.5})"), unsupported,
       "'rope_parameters.partial_rotary_factor' is 0.5"},
      {config_with("partial_rotary_factor", "0.25"), unsupported,
       "'partial_rotary_factor' is 0.25, only 1 is known"},
      {config_with("hidden_act", "\"gelu\""), unsupported, "'hidden_act' is 'gelu', only silu is known"},
      {config_with("quantization_config", R"({"quant_method":"awq"})"), unsupported, "'quantization_config'"},
      {config_with("model_type", "\"qwen2\"")
           .replace(0, 1, R"({"use_sliding_window":true,"sliding_window":-1,)"),
       corrupt, "'sliding_window' is -1"},
  };
  for (const Case& bad : cases) {
    CAPTURE(bad.message);
    const Result<ModelHyperparameters> h = read_config(bad.config);
    REQUIRE_FALSE(h.ok());
    CAPTURE(h.status().message());
    CHECK(h.status().code() == bad.code);
    CHECK(contains(h.status().message(), "config.json: "));
    CHECK(contains(h.status().message(), bad.message));
  }
}

TEST_CASE("a real model can be read whole and in parts", "[tensor_source][model]") {
  const char* path = std::getenv("PREFILLSHARE_TEST_MODEL");
  if (path == nullptr) TEST_SKIP("PREFILLSHARE_TEST_MODEL names no GGUF file");
  const std::unique_ptr<TensorSource> source = open_or_fail(path);
  const ModelHyperparameters& h = source->hyperparameters();
  const auto expect = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
    const Result<TensorInfo> info = source->info(name);
    CAPTURE(name, info.status().message());
    REQUIRE(info.ok());
    CHECK(info->rows == rows);
    CHECK(info->cols == cols);
    std::vector<float> row(static_cast<std::size_t>(cols));
    double squares = 0.0;
    for (std::int64_t r = 0; r < rows; ++r) {
      REQUIRE(source->read_rows(name, r, 1, row.data()).ok());
      for (const float x : row) squares += static_cast<double>(x) * static_cast<double>(x);
    }
    const double rms = std::sqrt(squares / static_cast<double>(rows * cols));
    CHECK((rms > 1e-4 && rms < 1e2));  // of trained weights, and not NaN
  };
  expect("model.embed_tokens.weight", h.vocab_size, h.hidden_size);
  expect("model.norm.weight", 1, h.hidden_size);
  if (!h.tied_embeddings) expect("lm_head.weight", h.vocab_size, h.hidden_size);
  for (const std::int64_t layer : {std::int64_t{0}, h.layers - 1}) {
    const std::string prefix = codegemm::concat("model.layers.", layer, ".");
    expect(prefix + "input_layernorm.weight", 1, h.hidden_size);
    expect(prefix + "post_attention_layernorm.weight", 1, h.hidden_size);
    expect(prefix + "self_attn.q_proj.weight", h.heads * h.head_dim, h.hidden_size);
    expect(prefix + "self_attn.k_proj.weight", h.kv_heads * h.head_dim, h.hidden_size);
    expect(prefix + "self_attn.v_proj.weight", h.kv_heads * h.head_dim, h.hidden_size);
    expect(prefix + "self_attn.o_proj.weight", h.hidden_size, h.heads * h.head_dim);
    expect(prefix + "mlp.gate_proj.weight", h.intermediate_size, h.hidden_size);
    expect(prefix + "mlp.up_proj.weight", h.intermediate_size, h.hidden_size);
    expect(prefix + "mlp.down_proj.weight", h.hidden_size, h.intermediate_size);
  }
  CHECK_FALSE(source->contains(codegemm::concat("model.layers.", h.layers, ".input_layernorm.weight")));

  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const std::vector<float> whole = read_all(*source, name);
  std::vector<float> part(static_cast<std::size_t>(2 * h.hidden_size));
  REQUIRE(source->read_rows(name, 3, 2, part.data()).ok());
  CHECK(std::equal(part.begin(), part.end(), whole.begin() + 3 * h.hidden_size));
}
