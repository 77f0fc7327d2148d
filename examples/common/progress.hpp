// SPDX-License-Identifier: Apache-2.0
//
// examples/common/progress.hpp - one line that says how far a long step is.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>

#include <codegemm/base/text.hpp>

namespace prefillshare::examples {

/// Where a ProgressLine writes, and what time it is there.
struct ProgressOutput {
  std::FILE* file = stderr;
  bool terminal = isatty(STDERR_FILENO) == 1;
  /// Seconds from any moment on.
  std::function<double()> now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
};

/// Shows "LABEL  42/100  42%  1.3 s": rewritten in place on a terminal; in a log file a line each quarter,
/// and each minute that something was done.
class ProgressLine {
 public:
  explicit ProgressLine(std::string label, ProgressOutput to = {})
      : label_(std::move(label)), to_(std::move(to)) {}
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine() {
    if (open_) std::fputc('\n', to_.file);
  }

  /// `done` of `total` units; `detail` is shown behind the numbers.
  void update(std::int64_t done, std::int64_t total, const std::string& detail = {}) {
    if (finished_) return;
    const int percent = total > 0 ? static_cast<int>(done * 100 / total) : 100;
    const int step = to_.terminal ? 1 : 25;
    const double seconds = to_.now() - start_;
    const bool due = !to_.terminal && seconds - shown_at_ >= 60.0;
    if (done < total && percent / step == shown_ / step && !due) return;
    shown_ = percent;
    shown_at_ = seconds;
    std::string line = codegemm::concat(label_, "  ", done, "/", total, "  ", percent, "%");
    if (seconds >= 0.05) {
      char text[32];
      std::snprintf(text, sizeof(text), "  %.1f s", seconds);
      line += text;
    }
    if (!detail.empty()) line += "  " + detail;
    std::fprintf(to_.file, to_.terminal ? "\r\033[K%s" : "%s\n", line.c_str());
    std::fflush(to_.file);
    open_ = to_.terminal;
    if (done >= total) {
      finished_ = true;
      if (open_) std::fputc('\n', to_.file);
      open_ = false;
    }
  }

 private:
  std::string label_;
  ProgressOutput to_;
  bool open_ = false;
  bool finished_ = false;
  int shown_ = -1000;
  double shown_at_ = 0.0;
  double start_ = to_.now();
};

}  // namespace prefillshare::examples
