// SPDX-License-Identifier: Apache-2.0
//
// common/answer_printer.hpp - an answer on stdout while it is made.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <cstdio>

#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// Prints tokens as text, each as soon as its characters are whole, and a new line in the end.
class AnswerPrinter {
 public:
  explicit AnswerPrinter(const Tokenizer& tokenizer) : stream_(tokenizer) {}

  void push(std::int32_t token) { print(unwrap(stream_.push(token)).c_str()); }
  void end() { print((stream_.finish() + "\n").c_str()); }

 private:
  static void print(const char* text) {
    std::fputs(text, stdout);
    std::fflush(stdout);
  }

  StreamDecoder stream_;
};

}  // namespace prefillshare::examples
