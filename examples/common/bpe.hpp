// SPDX-License-Identifier: Apache-2.0
//
// common/bpe.hpp - byte-pair merges by rank, and GPT-2's alphabet of 256 printable letters for bytes.
// Layer: examples (host only).
// Merging is O(n log n) in the length of a piece: a linked list of symbols and a heap of candidate pairs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <common/tokenizer_spec.hpp>
#include <common/utf8.hpp>

namespace prefillshare::examples::detail {

/// The letter that stands for each byte in a byte-level vocabulary: itself where it is printable Latin-1,
/// else the next one from U+0100 on (openai/gpt-2, encoder.py, bytes_to_unicode).
[[nodiscard]] constexpr std::array<char32_t, 256> byte_letters() noexcept {
  std::array<char32_t, 256> letters{};
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    letters[byte] = printable ? byte : next++;
  }
  return letters;
}
inline constexpr std::array<char32_t, 256> kByteLetters = byte_letters();

[[nodiscard]] constexpr std::array<std::int16_t, 0x144> letter_bytes() noexcept {
  std::array<std::int16_t, 0x144> bytes{};
  for (auto& byte : bytes) byte = -1;
  for (std::size_t byte = 0; byte < 256; ++byte) bytes[kByteLetters[byte]] = static_cast<std::int16_t>(byte);
  return bytes;
}
inline constexpr std::array<std::int16_t, 0x144> kLetterBytes = letter_bytes();

/// The byte that `letter` stands for, or -1.
[[nodiscard]] constexpr int byte_of_letter(char32_t letter) noexcept {
  return letter < kLetterBytes.size() ? kLetterBytes[letter] : -1;
}

/// The bytes that a token of a byte-level vocabulary stands for. A token with any other letter in it (an
/// added token, which is kept as plain text) stands for its own bytes.
[[nodiscard]] inline std::string bytes_of_token(std::string_view token) {
  std::string out;
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint point = utf8_decode(token.substr(at));
    const int byte = point.length == 0 ? -1 : byte_of_letter(point.value);
    if (byte < 0) return std::string(token);
    out.push_back(static_cast<char>(static_cast<unsigned char>(byte)));
    at += point.length;
  }
  return out;
}

/// The merge list as a table from a pair of ids to its rank and to the id of the joined token.
class BpeMerges {
 public:
  /// Every merge must be "left right" with both parts and their join in the vocabulary.
  [[nodiscard]] static Result<BpeMerges> create(const std::vector<std::string>& merges,
                                                const TokenIndex& index) {
    BpeMerges out;
    out.table_.reserve(merges.size());
    for (std::size_t rank = 0; rank < merges.size(); ++rank) {
      const std::string& merge = merges[rank];
      const std::size_t space = merge.find(' ');
      if (space == std::string::npos || space == 0 || space + 1 == merge.size() ||
          merge.find(' ', space + 1) != std::string::npos) {
        return error(StatusCode::kCorruptData, "merges[", rank, "] ", codegemm::quoted(merge),
                     " is not two tokens with one space");
      }
      const std::string_view left(merge.data(), space);
      const std::string_view right(merge.data() + space + 1, merge.size() - space - 1);
      const std::string joined = std::string(left).append(right);
      std::int32_t ids[3] = {};
      const std::string_view parts[3] = {left, right, joined};
      for (int i = 0; i < 3; ++i) {
        const auto found = index.find(parts[i]);
        if (found == index.end()) {
          return error(StatusCode::kCorruptData, "merges[", rank, "] ", codegemm::quoted(merge), " names ",
                       codegemm::quoted(parts[i]), ", which is not among the ", index.size(), " tokens");
        }
        ids[i] = found->second;
      }
      const Merge entry{static_cast<std::int32_t>(rank), ids[2]};
      if (!out.table_.emplace(key(ids[0], ids[1]), entry).second) {
        return error(StatusCode::kCorruptData, "merges[", rank, "] ", codegemm::quoted(merge),
                     " is there a second time");
      }
    }
    return out;
  }

  /// Joins neighbours, lowest rank first and leftmost among equals, until no pair is in the table.
  void apply(std::vector<std::int32_t>& ids) const {
    if (ids.size() < 2 || table_.empty()) return;
    std::vector<Symbol> symbols(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto at = static_cast<std::int32_t>(i);
      symbols[i] = {ids[i], at - 1, i + 1 < ids.size() ? at + 1 : -1};
    }
    std::priority_queue<Candidate> queue;
    const auto consider = [&](std::int32_t left, std::int32_t right) {
      if (left < 0 || right < 0) return;
      const std::int32_t a = symbols[static_cast<std::size_t>(left)].id;
      const std::int32_t b = symbols[static_cast<std::size_t>(right)].id;
      if (const auto found = table_.find(key(a, b)); found != table_.end()) {
        queue.push({found->second.rank, left, a, b, found->second.id});
      }
    };
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      consider(static_cast<std::int32_t>(i), static_cast<std::int32_t>(i + 1));
    }
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol& left = symbols[static_cast<std::size_t>(best.left)];
      if (left.id != best.left_id || left.next < 0) continue;  // that pair has changed since
      Symbol& right = symbols[static_cast<std::size_t>(left.next)];
      if (right.id != best.right_id) continue;
      left.id = best.joined;
      right.id = -1;
      left.next = right.next;
      if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = best.left;
      consider(left.previous, best.left);
      consider(best.left, left.next);
    }
    ids.clear();
    for (std::int32_t at = 0; at >= 0; at = symbols[static_cast<std::size_t>(at)].next) {
      ids.push_back(symbols[static_cast<std::size_t>(at)].id);
    }
  }

  [[nodiscard]] std::size_t size() const noexcept { return table_.size(); }

 private:
  struct Merge {
    std::int32_t rank = 0;
    std::int32_t id = 0;
  };
  struct Symbol {
    std::int32_t id = -1;  // -1: joined into its left neighbour
    std::int32_t previous = -1;
    std::int32_t next = -1;
  };
  struct Candidate {
    std::int32_t rank, left, left_id, right_id, joined;
    // std::priority_queue gives the greatest first, so "less" is the later merge.
    bool operator<(const Candidate& other) const noexcept {
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  [[nodiscard]] static std::uint64_t key(std::int32_t left, std::int32_t right) noexcept {
    return (std::uint64_t{static_cast<std::uint32_t>(left)} << 32) | static_cast<std::uint32_t>(right);
  }

  BpeMerges() = default;
  std::unordered_map<std::uint64_t, Merge> table_;
};

}  // namespace prefillshare::examples::detail
