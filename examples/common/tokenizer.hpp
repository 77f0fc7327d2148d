// SPDX-License-Identifier: Apache-2.0
//
// common/tokenizer.hpp - text to token ids and back.
// Layer: examples (host only).
// Byte-level BPE (GPT-2, Llama 3, Qwen 2, SmolLM) follows Hugging Face's tokenizers, SentencePiece BPE (Llama
// 2, Mistral) follows llama.cpp. Unicode normalization is not done: a text is taken to be in NFC already, as
// llama.cpp takes it.
// See: tests/peer/tokenizer_peer.py, which compares ids line by line.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <common/bpe.hpp>
#include <common/pretokenizer.hpp>
#include <common/spm.hpp>
#include <common/tokenizer_spec.hpp>
#include <common/utf8.hpp>

namespace prefillshare::examples {

namespace detail {

/// The special tokens' texts, to find the longest at a place in a text.
class SpecialTrie {
 public:
  void add(std::string_view text, std::int32_t id) {
    std::size_t node = 0;
    for (const char c : text) {
      const auto [edge, fresh] = nodes_[node].next.emplace(c, nodes_.size());
      node = edge->second;
      if (fresh) nodes_.emplace_back();
    }
    nodes_[node].id = id;
  }
  /// Id and length of the longest text at the start of `text` whose id `accept`s; length 0: none.
  template <class Accept>
  [[nodiscard]] std::pair<std::int32_t, std::size_t> longest(std::string_view text, Accept&& accept) const {
    std::pair<std::int32_t, std::size_t> best{-1, 0};
    std::size_t node = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const auto edge = nodes_[node].next.find(text[i]);
      if (edge == nodes_[node].next.end()) break;
      node = edge->second;
      if (nodes_[node].id >= 0 && accept(nodes_[node].id)) best = {nodes_[node].id, i + 1};
    }
    return best;
  }

 private:
  struct Node {
    std::map<char, std::size_t> next;
    std::int32_t id = -1;
  };
  std::vector<Node> nodes_ = std::vector<Node>(1);
};

}  // namespace detail

struct EncodeOptions {
  bool parse_special =
      true;  ///< "<|im_end|>" in the text becomes that control token; off for text from outside
  std::optional<bool> add_bos;  ///< not set: as the model says
};

/// Made once, then only read: threads may share one.
class Tokenizer {
 public:
  /// Longest text that encode() takes, in bytes.
  static constexpr std::size_t kMaxText = std::size_t{1} << 30;

  /// Checks the whole of `spec`; the message names the field, the index and the numbers.
  /// A byte-level vocabulary must have a token for every printable ASCII byte. Other bytes may be missing (21
  /// are in SmolLM2's): they vanish on encoding, as they do in Hugging Face's tokenizers. See
  /// missing_bytes().
  [[nodiscard]] static Result<Tokenizer> create(TokenizerSpec spec);

  /// Token ids of `text`, which may hold any bytes. What is not UTF-8 becomes one token a byte.
  [[nodiscard]] Result<std::vector<std::int32_t>> encode(std::string_view text,
                                                         const EncodeOptions& options = {}) const;

  /// The bytes that `ids` stand for; not always UTF-8, because a token may be a part of a character.
  /// Control tokens are left out unless `keep_special`. An id outside the vocabulary is kInvalidArgument.
  [[nodiscard]] Result<std::string> decode(std::span<const std::int32_t> ids,
                                           bool keep_special = false) const;

  /// The bytes of one token, "" for a control token unless `keep_special`. `id` must be in [0, size()).
  [[nodiscard]] std::string_view piece(std::int32_t id, bool keep_special = false) const {
    if (!keep_special && is_control(id)) return {};
    return pieces_[static_cast<std::size_t>(id)];
  }

  [[nodiscard]] std::int32_t size() const noexcept { return static_cast<std::int32_t>(pieces_.size()); }
  [[nodiscard]] std::int32_t bos() const noexcept { return spec_.bos_id; }  ///< -1: none
  [[nodiscard]] std::int32_t eos() const noexcept { return spec_.eos_id; }  ///< -1: none
  [[nodiscard]] bool adds_bos() const noexcept { return spec_.add_bos; }
  [[nodiscard]] const std::string& chat_template() const noexcept { return spec_.chat_template; }
  /// The token's text as the vocabulary has it; for the template's bos_token and eos_token. -1 gives "".
  [[nodiscard]] std::string_view token_text(std::int32_t id) const {
    return id < 0 || id >= size() ? std::string_view()
                                  : std::string_view(spec_.tokens[static_cast<std::size_t>(id)]);
  }
  /// The id of a token by its text in the vocabulary, such as "<|im_end|>"; -1: not there.
  [[nodiscard]] std::int32_t find(std::string_view token) const {
    const auto found = index_.find(token);
    return found == index_.end() ? -1 : found->second;
  }
  [[nodiscard]] bool is_control(std::int32_t id) const {
    return spec_.token_types[static_cast<std::size_t>(id)] == static_cast<int>(TokenType::kControl);
  }
  /// Bytes that a byte-level vocabulary has no token for.
  [[nodiscard]] const std::vector<unsigned char>& missing_bytes() const noexcept { return missing_bytes_; }
  /// Whether decode() drops one space at the start, the one that encode() put there.
  [[nodiscard]] bool strips_first_space() const noexcept {
    return spm_.has_value() && spec_.add_space_prefix;
  }

  Tokenizer(Tokenizer&&) = default;
  Tokenizer& operator=(Tokenizer&&) = default;
  // index_ points into spec_.tokens: a move keeps those texts where they are, a copy would not.
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;
  ~Tokenizer() = default;

 private:
  Tokenizer() = default;
  [[nodiscard]] Status create_byte_level();
  [[nodiscard]] Status create_spm();
  // A stretch between special tokens.
  [[nodiscard]] Status encode_text(std::string_view text, std::vector<std::int32_t>& ids) const;
  [[nodiscard]] Status encode_byte_level(std::string_view text, std::vector<std::int32_t>& ids) const;

  TokenizerSpec spec_;
  detail::TokenIndex index_;
  detail::SpecialTrie specials_;
  std::vector<std::string> pieces_;  // [vocabulary] bytes
  std::array<std::int32_t, 256> byte_ids_{};
  std::vector<unsigned char> missing_bytes_;
  std::optional<detail::BpeMerges> bpe_;
  std::optional<PreTokenizer> pre_;
  std::optional<detail::SpmMerges> spm_;
};

/// Turns tokens into text as they come. A character whose bytes are spread over tokens is held back until it
/// is whole; bytes that can no longer become one are passed on as they are.
class StreamDecoder {
 public:
  /// `tokenizer` must outlive this.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool keep_special = false)
      : tokenizer_(&tokenizer), keep_special_(keep_special), at_start_(tokenizer.strips_first_space()) {}

  /// The text that `id` completes; may be empty.
  [[nodiscard]] Result<std::string> push(std::int32_t id) {
    if (id < 0 || id >= tokenizer_->size()) {
      return error(StatusCode::kInvalidArgument, "token id ", id, " is not in a vocabulary of ",
                   tokenizer_->size());
    }
    std::string_view piece = tokenizer_->piece(id, keep_special_);
    if (at_start_ && !piece.empty() && !tokenizer_->is_control(id)) {
      if (piece.front() == ' ') piece.remove_prefix(1);
      at_start_ = false;
    }
    pending_.append(piece);
    const std::size_t ready = pending_.size() - utf8_incomplete_tail(pending_);
    std::string out = pending_.substr(0, ready);
    pending_.erase(0, ready);
    return out;
  }
  /// What is still held back: the start of a character that never came whole.
  [[nodiscard]] std::string finish() { return std::exchange(pending_, {}); }

 private:
  const Tokenizer* tokenizer_;
  bool keep_special_;
  bool at_start_;
  std::string pending_;
};

inline Result<Tokenizer> Tokenizer::create(TokenizerSpec spec) {
  if (Status status = detail::validate_spec(spec); !status.ok()) return status;
  Tokenizer out;
  out.spec_ = std::move(spec);
  if (out.spec_.token_types.empty()) out.spec_.token_types.assign(out.spec_.tokens.size(), 1);
  Result<detail::TokenIndex> index = detail::index_tokens(out.spec_.tokens);
  if (!index.ok()) return index.status();
  out.index_ = std::move(index).value();
  Status made = out.spec_.model == "gpt2" ? out.create_byte_level() : out.create_spm();
  if (!made.ok()) return made;
  for (std::size_t i = 0; i < out.spec_.tokens.size(); ++i) {
    const auto type = static_cast<TokenType>(out.spec_.token_types[i]);
    if (type == TokenType::kControl || type == TokenType::kUserDefined) {
      out.specials_.add(out.spec_.tokens[i], static_cast<std::int32_t>(i));
    }
  }
  return out;
}

inline Status Tokenizer::create_byte_level() {
  Result<PreTokenizer> pre = PreTokenizer::create(spec_.pre);
  if (!pre.ok()) return pre.status();
  pre_.emplace(std::move(pre).value());
  pieces_.resize(spec_.tokens.size());
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    // Special and added tokens are kept as plain text.
    const bool plain = spec_.token_types[i] != static_cast<int>(TokenType::kNormal);
    pieces_[i] = plain ? spec_.tokens[i] : detail::bytes_of_token(spec_.tokens[i]);
  }
  std::size_t printable_missing = 0;
  std::size_t first_missing = 0;
  for (std::size_t byte = 256; byte-- > 0;) {
    std::string letter;
    utf8_append(letter, detail::kByteLetters[byte]);
    byte_ids_[byte] = find(letter);
    if (byte_ids_[byte] >= 0) continue;
    missing_bytes_.insert(missing_bytes_.begin(), static_cast<unsigned char>(byte));
    if (byte >= 0x20 && byte < 0x7F) {
      ++printable_missing;
      first_missing = byte;
    }
  }
  if (printable_missing > 0) {
    return error(StatusCode::kCorruptData, "tokens: ", printable_missing,
                 " of the 95 printable ASCII bytes have no token of their own, the first of them ",
                 first_missing);
  }
  Result<detail::BpeMerges> merges = detail::BpeMerges::create(spec_.merges, index_);
  if (!merges.ok()) return merges.status();
  bpe_.emplace(std::move(merges).value());
  spec_.merges = {};  // only the table is needed from here on
  return {};
}

inline Status Tokenizer::create_spm() {
  Result<detail::SpmMerges> spm =
      detail::SpmMerges::create(spec_.tokens, spec_.token_types, spec_.scores, spec_.unk_id);
  if (!spm.ok()) return spm.status();
  spm_.emplace(std::move(spm).value());
  pieces_.resize(spec_.tokens.size());
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const std::string& token = spec_.tokens[i];
    if (spec_.token_types[i] == static_cast<int>(TokenType::kByte)) {
      pieces_[i].assign(1, static_cast<char>(static_cast<unsigned char>(detail::byte_of_token(token))));
      continue;
    }
    for (std::size_t at = 0; at < token.size();) {
      const bool space = std::string_view(token).substr(at, detail::kSpmSpace.size()) == detail::kSpmSpace;
      pieces_[i].push_back(space ? ' ' : token[at]);
      at += space ? detail::kSpmSpace.size() : 1;
    }
  }
  return {};
}

inline Result<std::vector<std::int32_t>> Tokenizer::encode(std::string_view text,
                                                           const EncodeOptions& options) const {
  if (text.size() > kMaxText) {
    return error(StatusCode::kInvalidArgument, "text of ", text.size(), " bytes; at most ", kMaxText,
                 " are encoded");
  }
  std::vector<std::int32_t> ids;
  if (options.add_bos.value_or(spec_.add_bos)) {
    if (spec_.bos_id < 0) return error(StatusCode::kInvalidArgument, "add_bos: the vocabulary has no bos id");
    ids.push_back(spec_.bos_id);
  }
  const auto accept = [&](std::int32_t id) { return options.parse_special || !is_control(id); };
  std::size_t from = 0;
  for (std::size_t at = 0; at <= text.size(); ++at) {
    const auto [id, length] = at < text.size() ? specials_.longest(text.substr(at), accept)
                                               : std::pair<std::int32_t, std::size_t>{-1, 0};
    if (length == 0 && at < text.size()) continue;
    if (at > from) {
      if (Status status = encode_text(text.substr(from, at - from), ids); !status.ok()) return status;
    }
    if (length == 0) break;
    ids.push_back(id);
    from = at + length;
    at = from - 1;
  }
  return ids;
}

inline Status Tokenizer::encode_text(std::string_view text, std::vector<std::int32_t>& ids) const {
  if (spm_.has_value()) {
    std::string spaced;
    spaced.reserve(text.size() + 8);
    if (spec_.add_space_prefix) spaced.append(detail::kSpmSpace);
    for (const char c : text) {
      if (c == ' ') {
        spaced.append(detail::kSpmSpace);
      } else {
        spaced.push_back(c);
      }
    }
    spm_->encode(spaced, ids);
    return {};
  }
  while (!text.empty()) {
    const std::size_t valid = utf8_valid_prefix(text);
    if (valid > 0) {
      if (Status status = encode_byte_level(text.substr(0, valid), ids); !status.ok()) return status;
    }
    text.remove_prefix(valid);
    if (text.empty()) break;
    if (const std::int32_t id = byte_ids_[static_cast<unsigned char>(text.front())]; id >= 0)
      ids.push_back(id);
    text.remove_prefix(1);
  }
  return {};
}

inline Status Tokenizer::encode_byte_level(std::string_view text, std::vector<std::int32_t>& ids) const {
  std::vector<std::int32_t> symbols;
  std::string letters;
  return pre_->split(text, [&](std::string_view piece) {
    if (spec_.ignore_merges) {
      letters.clear();
      for (const char c : piece) utf8_append(letters, detail::kByteLetters[static_cast<unsigned char>(c)]);
      if (const std::int32_t whole = find(letters); whole >= 0 && !is_control(whole)) {
        ids.push_back(whole);
        return;
      }
    }
    symbols.clear();
    for (const char c : piece) {
      if (const std::int32_t id = byte_ids_[static_cast<unsigned char>(c)]; id >= 0) symbols.push_back(id);
    }
    bpe_->apply(symbols);
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  });
}

inline Result<std::string> Tokenizer::decode(std::span<const std::int32_t> ids, bool keep_special) const {
  StreamDecoder stream(*this, keep_special);
  std::string out;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Result<std::string> text = stream.push(ids[i]);
    if (!text.ok()) return text.status().with_prefix(codegemm::concat("ids[", i, "]"));
    out += *text;
  }
  return out + stream.finish();
}

}  // namespace prefillshare::examples
