// SPDX-License-Identifier: Apache-2.0
//
// common/spm.hpp - SentencePiece's BPE: neighbours are joined when the join is a token, best score first.
// Layer: examples (host only).
// The vocabularies of Llama 2 and Mistral. A space is U+2581, a character without a token becomes its bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <queue>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <common/tokenizer_spec.hpp>
#include <common/utf8.hpp>

namespace prefillshare::examples::detail {

inline constexpr std::string_view kSpmSpace = "\xE2\x96\x81";  // U+2581, lower one eighth block

/// The byte of "<0x0A>", or -1 for any other text.
[[nodiscard]] constexpr int byte_of_token(std::string_view token) noexcept {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (digit < 0) return -1;
    byte = byte * 16 + digit;
  }
  return byte;
}

/// Joins by score. Holds views into the token texts, which must outlive it.
class SpmMerges {
 public:
  /// `types` as in TokenizerSpec, never empty here; only normal and user-defined tokens take part in joins.
  [[nodiscard]] static Result<SpmMerges> create(const std::vector<std::string>& tokens,
                                                const std::vector<int>& types,
                                                const std::vector<float>& scores, std::int32_t unk_id) {
    SpmMerges out;
    out.unk_id_ = unk_id;
    out.bytes_.fill(-1);
    out.scores_ = scores;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto id = static_cast<std::int32_t>(i);
      if (std::isnan(scores[i])) return error(StatusCode::kCorruptData, "scores[", i, "] is not a number");
      if (types[i] == static_cast<int>(TokenType::kByte)) {
        const int byte = byte_of_token(tokens[i]);
        if (byte < 0) {
          return error(StatusCode::kCorruptData, "tokens[", i, "] ", codegemm::quoted(tokens[i]),
                       " has the type of a byte, but is not written <0xNN>");
        }
        out.bytes_[static_cast<std::size_t>(byte)] = id;
      } else if (types[i] == static_cast<int>(TokenType::kNormal) ||
                 types[i] == static_cast<int>(TokenType::kUserDefined)) {
        out.index_.emplace(tokens[i], id);
        out.longest_ = std::max(out.longest_, tokens[i].size());
      }
    }
    // Without bytes a character outside the vocabulary must at least have the unknown token.
    if (unk_id < 0) {
      for (std::size_t byte = 0; byte < 256; ++byte) {
        if (out.bytes_[byte] < 0) {
          return error(StatusCode::kCorruptData, "tokens: no unknown token, and none for byte ", byte);
        }
      }
    }
    return out;
  }

  /// Appends the tokens of `text`, in which spaces are U+2581 already. Bytes that are not UTF-8 count as
  /// characters.
  void encode(std::string_view text, std::vector<std::int32_t>& ids) const {
    std::vector<Symbol> symbols;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t length = utf8_step(text.substr(at));
      const auto self = static_cast<std::int32_t>(symbols.size());
      symbols.push_back({at, length, self - 1, self + 1});
      at += length;
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;

    std::priority_queue<Candidate> queue;
    const auto consider = [&](std::int32_t left, std::int32_t right) {
      if (left < 0 || right < 0) return;
      const Symbol& a = symbols[static_cast<std::size_t>(left)];
      const std::size_t length = a.length + symbols[static_cast<std::size_t>(right)].length;
      if (length > longest_) return;
      if (const auto found = index_.find(text.substr(a.at, length)); found != index_.end()) {
        queue.push({scores_[static_cast<std::size_t>(found->second)], left, length});
      }
    };
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      consider(static_cast<std::int32_t>(i), static_cast<std::int32_t>(i + 1));
    }
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol& left = symbols[static_cast<std::size_t>(best.left)];
      if (left.length == 0 || left.next < 0) continue;
      Symbol& right = symbols[static_cast<std::size_t>(left.next)];
      if (left.length + right.length != best.length) continue;  // that pair has changed since
      left.length = best.length;
      right.length = 0;
      left.next = right.next;
      if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = best.left;
      consider(left.previous, best.left);
      consider(best.left, left.next);
    }
    for (std::int32_t i = 0; i >= 0; i = symbols[static_cast<std::size_t>(i)].next) {
      const Symbol& symbol = symbols[static_cast<std::size_t>(i)];
      const std::string_view part = text.substr(symbol.at, symbol.length);
      if (const auto found = index_.find(part); found != index_.end()) {
        ids.push_back(found->second);
      } else {
        append_bytes(part, ids);
      }
    }
  }

 private:
  struct Symbol {
    std::size_t at = 0;
    std::size_t length = 0;  // 0: joined into its left neighbour
    std::int32_t previous = -1;
    std::int32_t next = -1;
  };
  struct Candidate {
    float score;
    std::int32_t left;
    std::size_t length;
    bool operator<(const Candidate& other) const noexcept {
      if (score < other.score || other.score < score) return score < other.score;
      return left > other.left;
    }
  };

  void append_bytes(std::string_view part, std::vector<std::int32_t>& ids) const {
    for (const char c : part) {
      if (bytes_[static_cast<unsigned char>(c)] < 0) {
        if (unk_id_ >= 0) ids.push_back(unk_id_);
        return;
      }
    }
    for (const char c : part) ids.push_back(bytes_[static_cast<unsigned char>(c)]);
  }

  SpmMerges() = default;
  TokenIndex index_;
  std::vector<float> scores_;
  std::array<std::int32_t, 256> bytes_{};
  std::size_t longest_ = 0;
  std::int32_t unk_id_ = -1;
};

}  // namespace prefillshare::examples::detail
