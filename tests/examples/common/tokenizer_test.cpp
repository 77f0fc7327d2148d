// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/tokenizer_test.cpp - byte-level and SentencePiece BPE, streaming, bad vocabularies.
// Ids on real vocabularies are compared in tests/peer/tokenizer_peer.py.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/gguf_tokenizer.hpp>
#include <common/tokenizer.hpp>
#include <common/tokenizer_json.hpp>
#include <examples/common/gguf_builder.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace prefillshare::examples;
using Ids = std::vector<std::int32_t>;

namespace {

constexpr int kControl = 3;
constexpr int kUserDefined = 4;

std::string letters(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) utf8_append(out, detail::kByteLetters[static_cast<unsigned char>(c)]);
  return out;
}

/// Ids 0..255: the bytes; then the joins of `merges`, whose sides are bytes; then two special tokens.
TokenizerSpec byte_spec(const std::vector<std::pair<std::string, std::string>>& merges,
                        std::string pre = "gpt-2") {
  TokenizerSpec spec;
  spec.pre = std::move(pre);
  for (int byte = 0; byte < 256; ++byte)
    spec.tokens.push_back(letters(std::string(1, static_cast<char>(byte))));
  for (const auto& [left, right] : merges) {
    spec.tokens.push_back(letters(left + right));
    spec.merges.push_back(letters(left) + " " + letters(right));
  }
  spec.token_types.assign(spec.tokens.size(), 1);
  spec.tokens.insert(spec.tokens.end(), {"<|end|>", "<added>"});
  spec.token_types.insert(spec.token_types.end(), {kControl, kUserDefined});
  return spec;
}

Tokenizer make(TokenizerSpec spec) {
  Result<Tokenizer> tokenizer = Tokenizer::create(std::move(spec));
  INFO(tokenizer.status().message());
  REQUIRE(tokenizer.ok());
  return std::move(tokenizer).value();
}

Ids encode(const Tokenizer& tokenizer, std::string_view text, const EncodeOptions& options = {}) {
  const Result<Ids> ids = tokenizer.encode(text, options);
  INFO(ids.status().message());
  REQUIRE(ids.ok());
  return *ids;
}

/// The pieces that `text` is cut into: with a vocabulary that merges everything, pieces and tokens would be
/// the same.
std::vector<std::string> pieces(std::string_view pre, std::string_view text) {
  Result<PreTokenizer> made = PreTokenizer::create(pre);
  REQUIRE(made.ok());
  std::vector<std::string> out;
  REQUIRE(made->split(text, [&out](std::string_view piece) { out.emplace_back(piece); }).ok());
  return out;
}

/// Ids 0..2 <unk> <s> </s>, 3..258 the bytes, then single characters and joins with scores.
TokenizerSpec spm_spec() {
  TokenizerSpec spec;
  spec.model = "llama";
  spec.add_space_prefix = true;
  spec.unk_id = 0;
  spec.bos_id = 1;
  spec.eos_id = 2;
  spec.add_bos = true;
  spec.tokens = {"<unk>", "<s>", "</s>"};
  spec.token_types = {2, kControl, kControl};
  spec.scores = {0, 0, 0};
  for (int byte = 0; byte < 256; ++byte) {
    constexpr std::string_view kHex = "0123456789ABCDEF";
    const auto value = static_cast<std::size_t>(byte);
    spec.tokens.push_back(std::string("<0x") + kHex[value / 16] + kHex[value % 16] + ">");
    spec.token_types.push_back(6);
    spec.scores.push_back(0);
  }
  const std::pair<std::string, float> entries[] = {{"\u2581", -9},  {"a", -9},   {"b", -9},
                                                   {"c", -9},       {"ab", -2},  {"bc", -1},
                                                   {"\u2581a", -3}, {"abc", -4}, {"\u2581\u2581", -5}};
  for (const auto& [text, score] : entries) {
    spec.tokens.push_back(text);
    spec.token_types.push_back(1);
    spec.scores.push_back(score);
  }
  return spec;
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("UTF-8: well-formed sequences and nothing else") {
  const auto length = [](std::string_view text) { return utf8_decode(text).length; };
  CHECK(utf8_decode("A").value == U'A');
  CHECK(utf8_decode("\xC3\xA9").value == U'\u00E9');
  CHECK(utf8_decode("\xE2\x82\xAC").value == U'\u20AC');
  CHECK(utf8_decode("\xF0\x9F\x99\x82").value == U'\U0001F642');
  for (const std::string_view bad :
       {"", "\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xC3", "\xE2\x82", "\xF0\x9F\x99", "\xC3(", "\xFF"}) {
    CAPTURE(bad);
    CHECK(length(bad) == 0);
  }
  CHECK(utf8_incomplete_tail("a\xE2\x82") == 2);
  CHECK(utf8_incomplete_tail("a\xF0\x9F\x99") == 3);
  CHECK(utf8_incomplete_tail("a\xC3") == 1);
  CHECK(utf8_incomplete_tail("a\xC3\xA9") == 0);
  CHECK(utf8_incomplete_tail("a\xED\xA0") == 0);  // a surrogate: never a character
  CHECK(utf8_incomplete_tail("\x82\x82\x82\x82") == 0);
  // Every code point there and back.
  for (char32_t c = 0; c <= 0x10FFFF; c += c < 0x3000 ? 1 : 97) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    utf8_append(text, c);
    REQUIRE(utf8_decode(text).value == c);
    REQUIRE(utf8_decode(text).length == text.size());
  }
}

TEST_CASE("bytes and their letters are one to one") {
  for (int byte = 0; byte < 256; ++byte) {
    REQUIRE(detail::byte_of_letter(detail::kByteLetters[static_cast<std::size_t>(byte)]) == byte);
  }
  CHECK(detail::kByteLetters[' '] == 0x120);
  CHECK(detail::byte_of_letter(0xAD) == -1);
  CHECK(detail::byte_of_letter(0x144) == -1);
  CHECK(detail::bytes_of_token("\u0120a") == " a");
  CHECK(detail::bytes_of_token("\u65E5") == "\u65E5");
}

TEST_CASE("merges go by rank, then from the left") {
  const Tokenizer tokenizer = make(byte_spec({{"b", "c"}, {"a", "b"}, {"a", "bc"}, {"a", "a"}}));
  CHECK(encode(tokenizer, "abc") == Ids{258});
  CHECK(encode(tokenizer, "ab") == Ids{257});
  CHECK(encode(tokenizer, "aaaaa") == Ids{259, 259, 'a'});
  CHECK(encode(tokenizer, "aab") == Ids{'a', 257});
  CHECK(encode(tokenizer, "").empty());
}

TEST_CASE("pre-tokenizers cut where the models' own do") {
  using Pieces = std::vector<std::string>;
  CHECK(pieces("gpt-2", "I'm 123 it's  ok!\n\n x") ==
        Pieces{"I", "'m", " 123", " it", "'s", " ", " ok", "!", "\n\n", " x"});
  CHECK(pieces("smollm", "a 123 b4") == Pieces{"a", " ", "1", "2", "3", " b", "4"});
  CHECK(pieces("smollm", "x  \u0967\u00B2") == Pieces{"x", "  ", "\u0967", "\u00B2"});
  CHECK(pieces("llama-bpe", "I'M 12345 (x)\r\n\n  y") ==
        Pieces{"I", "'M", " ", "123", "45", " (", "x", ")\r\n\n", " ", " y"});
  CHECK(pieces("qwen2", "12 \n\n a") == Pieces{"1", "2", " \n\n", " a"});
  CHECK(pieces("gpt-2", "a\u00A0\u3000b") == Pieces{"a", "\u00A0", "\u3000", "b"});
  CHECK(pieces("gpt-2", "a\u180Eb") == Pieces{"a", "\u180E", "b"});  // white space no more since Unicode 6.3
  CHECK(pieces("default", "a b") == Pieces{"a", " b"});
  const Result<PreTokenizer> unknown = PreTokenizer::create("tekken");
  REQUIRE_FALSE(unknown.ok());
  CHECK(unknown.status().code() == StatusCode::kUnsupported);
  CHECK(unknown.status().message() ==
        "pre-tokenizer 'tekken' is not known; known are default, gpt-2, llama-bpe, qwen2, smollm");
}

TEST_CASE("special tokens are cut out first; control tokens only on request") {
  const Tokenizer tokenizer = make(byte_spec({}));
  const std::int32_t end = 256, added = 257;
  CHECK(encode(tokenizer, "a<|end|>b<added>") == Ids{'a', end, 'b', added});
  CHECK(encode(tokenizer, "<|end|><|end|>") == Ids{end, end});
  EncodeOptions plain;
  plain.parse_special = false;
  CHECK(encode(tokenizer, "<|end|>", plain) == Ids{'<', '|', 'e', 'n', 'd', '|', '>'});
  CHECK(encode(tokenizer, "<added>", plain) == Ids{added});
  CHECK(*tokenizer.decode(Ids{'a', end, 'b'}) == "ab");
  CHECK(*tokenizer.decode(Ids{'a', end, 'b'}, true) == "a<|end|>b");
  CHECK(tokenizer.find("<|end|>") == end);
  CHECK(tokenizer.find("<|nope|>") == -1);
  // The longest wins.
  TokenizerSpec spec = byte_spec({});
  spec.tokens.push_back("<|end|>>");
  spec.token_types.push_back(kControl);
  CHECK(encode(make(std::move(spec)), "<|end|>>>") == Ids{258, '>'});
}

TEST_CASE("BOS is added as the model says or the caller") {
  TokenizerSpec spec = byte_spec({});
  spec.bos_id = 256;
  spec.add_bos = true;
  const Tokenizer tokenizer = make(spec);
  EncodeOptions without;
  without.add_bos = false;
  CHECK(encode(tokenizer, "a") == Ids{256, 'a'});
  CHECK(encode(tokenizer, "a", without) == Ids{'a'});
  CHECK(tokenizer.token_text(tokenizer.bos()) == "<|end|>");
  EncodeOptions with;
  with.add_bos = true;
  CHECK_FALSE(make(byte_spec({})).encode("a", with).ok());
}

TEST_CASE("bytes that are not UTF-8 become one token each and come back") {
  const Tokenizer tokenizer = make(byte_spec({{"a", "b"}, {"\xC3", "\xA9"}}));
  CHECK(encode(tokenizer, "ab\xFF\xC3\xA9\xC3") == Ids{256, 0xFF, 257, 0xC3});
  codegemm::test::Rng rng(codegemm::test::seed_or(3));
  for (int i = 0; i < 300; ++i) {
    std::string text;
    for (std::int64_t n = rng.below(40); n > 0; --n) text.push_back(static_cast<char>(rng.below(256)));
    CAPTURE(i);
    REQUIRE(*tokenizer.decode(encode(tokenizer, text), true) == text);
  }
}

TEST_CASE("a byte without a token vanishes, as with Hugging Face's tokenizers") {
  TokenizerSpec spec = byte_spec({{"a", "b"}});
  spec.tokens[0x04] = "unused";
  const Tokenizer tokenizer = make(std::move(spec));
  REQUIRE(tokenizer.missing_bytes() == std::vector<unsigned char>{0x04});
  CHECK(encode(tokenizer, "x\x04y") == Ids{'x', 'y'});
}

TEST_CASE("a streamed text never ends inside a character") {
  const Tokenizer tokenizer = make(byte_spec({}));
  StreamDecoder stream(tokenizer);
  std::string out;
  for (const char c : std::string("a\u00E9\U0001F642")) {
    const Result<std::string> part = stream.push(static_cast<unsigned char>(c));
    REQUIRE(part.ok());
    REQUIRE(utf8_valid_prefix(*part) == part->size());
    out += *part;
  }
  CHECK(out == "a\u00E9\U0001F642");
  CHECK(stream.finish().empty());
  CHECK(stream.push(0xF0)->empty());
  CHECK(*stream.push('x') == "\xF0x");  // it can no longer become a character
  CHECK(stream.push(0xC3)->empty());
  CHECK(stream.finish() == "\xC3");
  CHECK(stream.push(256)->empty());
  CHECK_FALSE(stream.push(-1).ok());
  CHECK_FALSE(stream.push(258).ok());
  const Result<std::string> bad = tokenizer.decode(Ids{'a', 999});
  REQUIRE_FALSE(bad.ok());
  CHECK(bad.status().message() == "ids[1]: token id 999 is not in a vocabulary of 258");
}

TEST_CASE("a quarter of a megabyte without a space takes no square time") {
  const Tokenizer bytes = make(byte_spec({{"a", "a"}, {"aa", "aa"}, {"aaaa", "aaaa"}, {" ", " "}}));
  const Tokenizer spm = make(spm_spec());
  const auto start = std::chrono::steady_clock::now();
  for (const char c : {'a', ' ', '1', '\xFF'}) {
    const std::string text(1 << 18, c);
    CHECK(*bytes.decode(encode(bytes, text)) == text);
    CHECK(*spm.decode(encode(spm, text)) == text);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  CHECK(seconds.count() < 60.0);  // square time would take hours
}

TEST_CASE("SentencePiece: scores decide, bytes stand in, a space goes before") {
  const Tokenizer tokenizer = make(spm_spec());
  const auto id = [&](std::string_view token) { return tokenizer.find(token); };
  CHECK(encode(tokenizer, "abc") ==
        Ids{1, id("\u2581a"), id("bc")});  // bc -1, then the prefix's space joins a: -3
  CHECK(encode(tokenizer, "cab") == Ids{1, id("\u2581"), id("c"), id("ab")});
  CHECK(encode(tokenizer, "a  a") == Ids{1, id("\u2581a"), id("\u2581"), id("\u2581a")});
  CHECK(encode(tokenizer, "\u00E9") == Ids{1, id("\u2581"), id("<0xC3>"), id("<0xA9>")});
  CHECK(encode(tokenizer, "</s>a") == Ids{1, 2, id("\u2581a")});
  codegemm::test::Rng rng(codegemm::test::seed_or(8));
  EncodeOptions plain;
  plain.parse_special = false;
  for (int i = 0; i < 300; ++i) {
    std::string text;
    for (std::int64_t n = rng.below(30); n > 0; --n) {
      text += rng.below(3) == 0 ? static_cast<char>(rng.below(256)) : "abc "[rng.below(4)];
    }
    CAPTURE(i);
    REQUIRE(*tokenizer.decode(encode(tokenizer, text, plain)) == text);
  }
}

TEST_CASE("bad vocabularies are refused with the field and the numbers") {
  const auto refused = [](TokenizerSpec spec, const std::string& text,
                          StatusCode code = StatusCode::kCorruptData) {
    const Result<Tokenizer> tokenizer = Tokenizer::create(std::move(spec));
    REQUIRE_FALSE(tokenizer.ok());
    CHECK(tokenizer.status().message() == text);
    CHECK(tokenizer.status().code() == code);
  };
  const auto changed = [](auto change) {
    TokenizerSpec spec = byte_spec({{"a", "b"}});
    change(spec);
    return spec;
  };
  refused({}, "tokens: the vocabulary is empty");
  refused(changed([](auto& s) { s.model = "bert"; }),
          "tokenizer model is 'bert'; known are 'gpt2' and 'llama'", StatusCode::kUnsupported);
  refused(changed([](auto& s) { s.tokens[98] = "a"; }), "tokens[98] 'a' is the same as tokens[97]");
  refused(changed([](auto& s) { s.tokens[98] = "bb"; }),
          "tokens: 1 of the 95 printable ASCII bytes have no token of their own, the first of them 98");
  refused(changed([](auto& s) { s.tokens[98] = ""; }), "tokens[98] is empty");
  refused(changed([](auto& s) { s.tokens[98].assign(5000, 'x'); }),
          "tokens[98] has 5000 bytes, at most 4096 are allowed for its type 1");
  refused(changed([](auto& s) { s.token_types.pop_back(); }), "token_types has 258 entries for 259 tokens");
  refused(changed([](auto& s) { s.token_types[5] = 9; }), "token_types[5] is 9, not one of 1..6");
  refused(changed([](auto& s) { s.merges.push_back("a z9"); }),
          "merges[1] 'a z9' names 'z9', which is not among the 259 tokens");
  refused(changed([](auto& s) { s.merges.push_back("a c"); }),
          "merges[1] 'a c' names 'ac', which is not among the 259 tokens");
  refused(changed([](auto& s) { s.merges.push_back("abc"); }),
          "merges[1] 'abc' is not two tokens with one space");
  refused(changed([](auto& s) { s.merges.push_back(" a"); }),
          "merges[1] ' a' is not two tokens with one space");
  refused(changed([](auto& s) { s.merges.push_back("a b"); }), "merges[1] 'a b' is there a second time");
  refused(changed([](auto& s) { s.bos_id = 259; }), "bos id is 259, but the vocabulary has 259 tokens");
  refused(changed([](auto& s) { s.eos_id = -2; }), "eos id is -2, but the vocabulary has 259 tokens");
  refused(changed([](auto& s) { s.add_bos = true; }), "add_bos is set, but there is no bos id");
  refused(changed([](auto& s) { s.pre = "x"; }),
          "pre-tokenizer 'x' is not known; known are default, gpt-2, llama-bpe, qwen2, smollm",
          StatusCode::kUnsupported);
  TokenizerSpec spm = spm_spec();
  spm.scores.pop_back();
  refused(spm, "scores has 267 entries for 268 tokens");
  spm.scores.push_back(std::numeric_limits<float>::quiet_NaN());
  refused(spm, "scores[267] is not a number");
  spm = spm_spec();
  spm.unk_id = -1;
  spm.token_types[10] = 5;
  refused(spm, "tokens: no unknown token, and none for byte 7");
  spm = spm_spec();
  spm.tokens[10] = "<0xG7>";
  refused(spm, "tokens[10] '<0xG7>' has the type of a byte, but is not written <0xNN>");
}

TEST_CASE("tokenizer.json gives the same tokenizer; what is not known is refused by name") {
  using nlohmann::json;
  const TokenizerSpec spec = byte_spec({{"a", "b"}, {"ab", "c"}}, "smollm");
  json root;
  root["model"] = {{"type", "BPE"}, {"merges", json::array()}, {"vocab", json::object()}};
  for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
    const int type = spec.token_types[i];
    if (type == 1) root["model"]["vocab"][spec.tokens[i]] = i;
    if (type != 1)
      root["added_tokens"].push_back({{"id", i}, {"content", spec.tokens[i]}, {"special", type == kControl}});
  }
  root["model"]["merges"] = {spec.merges[0], {letters("ab"), letters("c")}};
  root["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers",
                            {{{"type", "Digits"}, {"individual_digits", true}},
                             {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}};
  const json config = {
      {"bos_token", {{"content", "<|end|>"}}}, {"eos_token", "<|end|>"}, {"chat_template", "{{ 1 }}"}};
  const auto read = [&](const json& changed) {
    return spec_from_tokenizer_json(changed.dump(), config.dump());
  };

  const Result<TokenizerSpec> got = read(root);
  INFO(got.status().message());
  REQUIRE(got.ok());
  CHECK(got->tokens == spec.tokens);
  CHECK(got->token_types == spec.token_types);
  CHECK(got->merges == spec.merges);
  CHECK(got->pre == "smollm");
  CHECK(got->bos_id == 258);
  CHECK(got->eos_id == 258);
  CHECK_FALSE(got->add_bos);
  CHECK(got->chat_template == "{{ 1 }}");
  CHECK(encode(make(*got), "abc12") == Ids{257, '1', '2'});

  const auto refused = [&](auto change, const std::string& text) {
    json changed = root;
    change(changed);
    const Result<TokenizerSpec> result = read(changed);
    REQUIRE_FALSE(result.ok());
    CAPTURE(result.status().message());
    CHECK(result.status().message().find(text) == 0);
  };
  refused([](json& j) { j["model"]["type"] = "Unigram"; }, "tokenizer.json: model.type is '\"Unigram\"'");
  refused([](json& j) { j["model"]["byte_fallback"] = true; }, "tokenizer.json: model.byte_fallback");
  refused([](json& j) { j["model"]["vocab"]["q!"] = -1; },
          "tokenizer.json: model.vocab: id of token 'q!' is '-1'");
  refused([](json& j) { j["model"]["vocab"]["q!"] = 4000000000U; },
          "tokenizer.json: model.vocab: id of token 'q!'");
  refused([](json& j) { j["model"]["vocab"]["q!"] = 97; }, "tokenizer.json: model.vocab: id 97 belongs to");
  refused([](json& j) { j["model"]["merges"].push_back(7); }, "tokenizer.json: model.merges[2] is '7'");
  refused([](json& j) { j["added_tokens"][0]["rstrip"] = true; },
          "tokenizer.json: added_tokens[0] '\"<|end|>\"' has rstrip");
  refused([](json& j) { j["normalizer"] = {{"type", "Lowercase"}}; }, "tokenizer.json: normalizer is");
  refused([](json& j) { j["pre_tokenizer"] = {{"type", "Whitespace"}}; }, "tokenizer.json: pre_tokenizer is");
  refused([](json& j) { j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; },
          "tokenizer.json: pre_tokenizer");
  refused([](json& j) { j = json::array(); }, "tokenizer.json: model.type is");
  CHECK(spec_from_tokenizer_json(std::string(100000, '['), "").status().message().find("tokenizer.json: ") ==
        0);
  refused(
      [](json& j) {
        for (int i = 0; i < 70; ++i) j["model"] = json::array({j["model"]});
      },
      "tokenizer.json: nested more than 64 deep");
  CHECK(spec_from_tokenizer_json("{", "").status().code() == StatusCode::kCorruptData);
  CHECK(spec_from_tokenizer_json(root.dump(), "[").status().message().find("tokenizer_config.json") == 0);

  json bos = root;  // Llama 3 says so in the post-processor
  bos["post_processor"] = {{"type", "Sequence"},
                           {"processors",
                            {{{"type", "TemplateProcessing"},
                              {"single", {{{"SpecialToken", {{"id", "<|end|>"}, {"type_id", 0}}}}}}}}}};
  CHECK(read(bos)->add_bos);
  CHECK(spec_from_folder("no/such/folder").status().code() == StatusCode::kNotFound);
}

namespace {

/// The metadata of `spec`, but for the keys in `without`.
test::GgufBuilder gguf_of(const TokenizerSpec& spec, const std::string& without = {}) {
  test::GgufBuilder out;
  const auto key = [&](const std::string& name) { return "tokenizer.ggml." + name; };
  const auto wanted = [&](std::string_view name) { return name != without; };
  if (wanted("model")) out.string(key("model"), spec.model);
  if (wanted("pre")) out.string(key("pre"), spec.pre);
  if (wanted("tokens")) out.strings(key("tokens"), spec.tokens);
  if (wanted("merges")) out.strings(key("merges"), spec.merges);
  std::string types = test::GgufBuilder::array(GgufType::kInt32, spec.token_types.size());
  for (const int type : spec.token_types) types += test::raw(type);
  if (wanted("token_type")) out.entry(key("token_type"), GgufType::kArray, types);
  std::string scores = test::GgufBuilder::array(GgufType::kFloat32, spec.scores.size());
  scores += test::raw_all(std::span<const float>(spec.scores));
  if (!spec.scores.empty() && wanted("scores")) out.entry(key("scores"), GgufType::kArray, scores);
  if (spec.bos_id >= 0) out.u32(key("bos_token_id"), static_cast<std::uint32_t>(spec.bos_id));
  return out;
}

Result<TokenizerSpec> read_gguf(const test::GgufBuilder& builder) {
  const std::string bytes = builder.build();
  const Result<GgufFile> file = GgufFile::parse(std::as_bytes(std::span(bytes)), "x.gguf");
  INFO(file.status().message());
  REQUIRE(file.ok());
  return spec_from_gguf(*file);
}

}  // namespace

TEST_CASE("GGUF metadata give the tokenizer; what is missing or of another kind is named") {
  TokenizerSpec spec = byte_spec({{"a", "b"}}, "llama-bpe");
  spec.bos_id = 257;
  const Result<TokenizerSpec> got = read_gguf(gguf_of(spec).string("tokenizer.chat_template", "{{ 1 }}"));
  INFO(got.status().message());
  REQUIRE(got.ok());
  CHECK(got->tokens == spec.tokens);
  CHECK(got->token_types == spec.token_types);
  CHECK(got->merges == spec.merges);
  CHECK(got->bos_id == 257);
  CHECK(got->eos_id == -1);
  CHECK(got->chat_template == "{{ 1 }}");
  CHECK(got->ignore_merges);  // of this pre-tokenizer, as llama.cpp has it
  CHECK(got->add_bos);
  CHECK_FALSE(read_gguf(gguf_of(spec).boolean("tokenizer.ggml.add_bos_token", false))->add_bos);
  CHECK(read_gguf(gguf_of(spec, "pre"))->pre == "default");
  CHECK(read_gguf(gguf_of(spec, "token_type"))->token_types.empty());
  CHECK(read_gguf(gguf_of(spec).u32("tokenizer.ggml.eos_token_id", 0xFFFFFFFF))->eos_id == -1);
  const Result<TokenizerSpec> spm = read_gguf(gguf_of(spm_spec()));
  REQUIRE(spm.ok());
  CHECK(spm->scores == spm_spec().scores);
  CHECK(spm->add_space_prefix);
  CHECK(encode(make(*spm), "ab").size() == 3);

  const auto refused = [](const test::GgufBuilder& builder, const std::string& text) {
    const Result<TokenizerSpec> result = read_gguf(builder);
    REQUIRE_FALSE(result.ok());
    CHECK(result.status().message() == "x.gguf: " + text);
  };
  refused(gguf_of(spec, "model"), "metadata 'tokenizer.ggml.model' is missing");
  refused(gguf_of(spec, "tokens"), "metadata 'tokenizer.ggml.tokens' is missing");
  refused(gguf_of(spec, "merges"), "metadata 'tokenizer.ggml.merges' is missing");
  refused(gguf_of(spm_spec(), "scores"), "metadata 'tokenizer.ggml.scores' is missing");
  refused(gguf_of(spec, "tokens").u32("tokenizer.ggml.tokens", 7),
          "metadata 'tokenizer.ggml.tokens' is the uint32 7, expected an array of strings");
  refused(gguf_of(spec).u32("tokenizer.ggml.eos_token_id", 4000000000U),
          "metadata 'tokenizer.ggml.eos_token_id' is 4000000000, not a token id");
  refused(gguf_of(spec).u32("tokenizer.ggml.eos_token_id", 259),
          "eos id is 259, but the vocabulary has 259 tokens");
  spec.token_types[3] = 1000;
  refused(gguf_of(spec), "token_types[3] is 1000, not one of 1..6");
  spec.token_types.pop_back();
  refused(gguf_of(spec), "token_types has 258 entries for 259 tokens");
}

TEST_CASE("the real model's vocabulary: every line comes back") {
  const char* path = std::getenv("PREFILLSHARE_TEST_MODEL");
  if (path == nullptr || *path == '\0') TEST_SKIP("PREFILLSHARE_TEST_MODEL is not set");
  const Result<GgufFile> file = GgufFile::open(path);
  INFO(file.status().message());
  REQUIRE(file.ok());
  Result<TokenizerSpec> spec = spec_from_gguf(*file);
  INFO(spec.status().message());
  REQUIRE(spec.ok());
  const Tokenizer tokenizer = make(std::move(spec).value());
  const std::string text =
      read_file(std::filesystem::path(__FILE__).parent_path() / "../../data/varied_lines.txt");
  std::size_t lines = 0;
  for (std::size_t at = 0; at < text.size(); ++lines) {
    const std::size_t end = text.find('\n', at);
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    CAPTURE(lines, line);
    const Ids ids = encode(tokenizer, line);
    std::string expected;  // the line without the bytes that this vocabulary has no token for
    for (const char c : line) {
      const auto& missing = tokenizer.missing_bytes();
      if (std::find(missing.begin(), missing.end(), static_cast<unsigned char>(c)) == missing.end())
        expected += c;
    }
    REQUIRE(*tokenizer.decode(ids, true) == expected);
    StreamDecoder stream(tokenizer, true);
    std::string streamed;
    for (const std::int32_t id : ids) streamed += *stream.push(id);
    REQUIRE(streamed + stream.finish() == expected);
  }
  CHECK(lines == 1000);
}
