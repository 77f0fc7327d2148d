// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/progress_test.cpp - what a progress line writes into a log file and on a terminal.

#include <unistd.h>

#include <cstdio>
#include <string>

#include <common/progress.hpp>
#include <support/catch.hpp>

using prefillshare::examples::ProgressLine;
using prefillshare::examples::ProgressOutput;

namespace {

// A file that is read back, and a clock that goes when it is told to.
struct Output {
  std::FILE* file = std::tmpfile();
  double time = 1000.0;

  Output() { REQUIRE(file != nullptr); }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() { std::fclose(file); }

  ProgressOutput to(bool terminal) {
    return {file, terminal, [this] { return time; }};
  }
  // All that was written since the last call.
  std::string take() {
    std::string out;
    std::rewind(file);
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) out += static_cast<char>(c);
    std::rewind(file);
    REQUIRE(ftruncate(fileno(file), 0) == 0);
    return out;
  }
};

}  // namespace

TEST_CASE("progress in a log file: a line each quarter") {
  Output out;
  ProgressLine line("work", out.to(false));
  for (int done = 0; done <= 100; ++done) line.update(done, 100);
  CHECK(out.take() ==
        "work  0/100  0%\nwork  25/100  25%\nwork  50/100  50%\nwork  75/100  75%\nwork  100/100  100%\n");
}

TEST_CASE("progress in a log file: a line a minute while there is something to tell") {
  std::string text;
  {
    Output out;
    ProgressLine line("work", out.to(false));
    for (int done = 1; done <= 24; ++done) {  // 25 s each, all within the first quarter
      out.time += 25.0;
      line.update(done, 1000, "so far");
    }
    text = out.take();
  }
  CHECK(text ==
        "work  1/1000  0%  25.0 s  so far\n"
        "work  4/1000  0%  100.0 s  so far\n"
        "work  7/1000  0%  175.0 s  so far\n"
        "work  10/1000  1%  250.0 s  so far\n"
        "work  13/1000  1%  325.0 s  so far\n"
        "work  16/1000  1%  400.0 s  so far\n"
        "work  19/1000  1%  475.0 s  so far\n"
        "work  22/1000  2%  550.0 s  so far\n");
}

TEST_CASE("progress: the end is told once, an empty step at once") {
  Output out;
  {
    ProgressLine line("work", out.to(false));
    line.update(7, 7);
    out.time += 100.0;
    line.update(7, 7);
    ProgressLine empty("nothing", out.to(false));
    empty.update(0, 0);
  }
  CHECK(out.take() == "work  7/7  100%\nnothing  0/0  100%\n");
}

TEST_CASE("progress on a terminal: one line, written again at each per cent") {
  Output out;
  {
    ProgressLine line("work", out.to(true));
    line.update(1, 200);
    line.update(1, 200);
    out.time += 90.0;  // no minutes here
    line.update(1, 200);
    line.update(2, 200);
  }  // not at its end: the next output begins on a line of its own
  CHECK(out.take() == "\r\033[Kwork  1/200  0%\r\033[Kwork  2/200  1%  90.0 s\n");
  {
    ProgressLine line("rest", out.to(true));
    line.update(3, 3);
  }
  CHECK(out.take() == "\r\033[Krest  3/3  100%\n");
}
