// SPDX-License-Identifier: Apache-2.0
//
// common/text_tokens.hpp - a text file as sequences of tokens, for calibration and for perplexity.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <codegemm/io/mapped_file.hpp>
#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// All tokens of a text file, without BOS or EOS.
[[nodiscard]] inline std::vector<std::int32_t> tokens_of_file(const std::string& path,
                                                              const Tokenizer& tokenizer) {
  const codegemm::MappedFile file = unwrap(codegemm::MappedFile::open(path));
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  return unwrap(tokenizer.encode(text, {false, false}));
}

/// `count` stretches of `length` tokens, spread evenly over `ids` without overlap; fewer where there are not
/// enough. Each begins with BOS where the model wants one, which counts.
[[nodiscard]] inline std::vector<std::vector<std::int32_t>> spread_sequences(
    const std::vector<std::int32_t>& ids, std::int64_t count, std::int64_t length,
    const Tokenizer& tokenizer) {
  const bool bos = tokenizer.adds_bos() && tokenizer.bos() >= 0;
  const std::int64_t own = length - (bos ? 1 : 0);
  const std::int64_t most = own > 0 ? static_cast<std::int64_t>(ids.size()) / own : 0;
  count = std::min(count, most);
  std::vector<std::vector<std::int32_t>> out;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t first = i * most / count * own;
    std::vector<std::int32_t>& sequence = out.emplace_back();
    if (bos) sequence.push_back(tokenizer.bos());
    sequence.insert(sequence.end(), ids.begin() + first, ids.begin() + first + own);
  }
  return out;
}

/// spread_sequences() of a text file, at least one. Throws UserError.
[[nodiscard]] inline std::vector<std::vector<std::int32_t>> sequences_of_file(const std::string& path,
                                                                              std::int64_t count,
                                                                              std::int64_t length,
                                                                              const Tokenizer& tokenizer) {
  const std::vector<std::int32_t> ids = tokens_of_file(path, tokenizer);
  std::vector<std::vector<std::int32_t>> out = spread_sequences(ids, count, length, tokenizer);
  if (out.empty()) {
    throw UserError(
        codegemm::concat(path, ": has ", ids.size(), " tokens, fewer than one sequence of ", length));
  }
  return out;
}

}  // namespace prefillshare::examples
