// SPDX-License-Identifier: Apache-2.0
//
// examples/common/progress.hpp - one line that says how far a long step is.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

#include <codegemm/base/text.hpp>

namespace prefillshare::examples {

/// Shows "LABEL  42% (1.3 s)" on stderr: rewritten in place on a terminal; in a log file a line each quarter,
/// and each minute that something was done.
class ProgressLine {
 public:
  explicit ProgressLine(std::string label)
      : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) == 1) {}
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine() {
    if (open_) std::fputc('\n', stderr);
  }

  /// `done` of `total` units; `detail` is shown behind the numbers.
  void update(std::int64_t done, std::int64_t total, const std::string& detail = {}) {
    const int percent = total > 0 ? static_cast<int>(done * 100 / total) : 100;
    const int step = terminal_ ? 1 : 25;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const bool due = !terminal_ && seconds - shown_at_ >= 60.0;
    if (done < total && percent / step == shown_ / step && !due) return;
    if (finished_) return;
    shown_ = percent;
    shown_at_ = seconds;
    std::string line = codegemm::concat(label_, "  ", done, "/", total, "  ", percent, "%");
    if (seconds >= 0.05) {
      char text[32];
      std::snprintf(text, sizeof(text), "  %.1f s", seconds);
      line += text;
    }
    if (!detail.empty()) line += "  " + detail;
    std::fprintf(stderr, terminal_ ? "\r\033[K%s" : "%s\n", line.c_str());
    std::fflush(stderr);
    open_ = terminal_;
    if (done >= total) {
      finished_ = true;
      if (open_) std::fputc('\n', stderr);
      open_ = false;
    }
  }

 private:
  std::string label_;
  bool terminal_ = false;
  bool open_ = false;
  bool finished_ = false;
  int shown_ = -1000;
  double shown_at_ = 0.0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace prefillshare::examples
