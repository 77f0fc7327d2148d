// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/status.hpp>

#include <cerrno>
#include <csignal>
#include <memory>
#include <set>
#include <string>
#include <type_traits>
#include <utility>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <support/catch.hpp>

namespace {

using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;

Result<std::unique_ptr<int>> make(bool well) {
  if (!well) return codegemm::error(StatusCode::kNotFound, "no tensor number ", 7);
  return std::make_unique<int>(42);
}

struct Death {
  int signal = 0;     // 0: it ended by itself
  std::string words;  // what it said on standard error
};

// What `take` does in a process of its own.
template <class Take>
Death death_of(Take&& take) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    std::signal(SIGABRT, SIG_DFL);  // the test framework's would report a failed test
    dup2(ends[1], STDERR_FILENO);
    take();
    _exit(0);
  }
  close(ends[1]);
  Death death;
  char buffer[512];
  for (ssize_t n = 0; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) {
    death.words.append(buffer, static_cast<std::size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  if (WIFSIGNALED(status)) death.signal = WTERMSIG(status);
  return death;
}

}  // namespace

TEST_CASE("status: success is the default, and holds no text") {
  const Status status;
  CHECK(status.ok());
  CHECK(status.code() == StatusCode::kOk);
  CHECK(status.native_code() == 0);
  CHECK(status.message().empty());
  CHECK(status.with_prefix("file.gguf").ok());
  CHECK(status.with_prefix("file.gguf").message().empty());
}

TEST_CASE("status: a failure keeps its code, its native code and its numbers") {
  const Status status(StatusCode::kIoError, "cannot read", ENOENT);
  CHECK_FALSE(status.ok());
  CHECK(status.native_code() == ENOENT);

  const Status further = status.with_prefix("model.gguf").with_prefix("loading");
  CHECK(further.code() == StatusCode::kIoError);
  CHECK(further.native_code() == ENOENT);
  CHECK(further.message() == "loading: model.gguf: cannot read");

  CHECK(codegemm::error(StatusCode::kShapeMismatch, "K = ", 100, " is not a multiple of v = ", 8).message() ==
        "K = 100 is not a multiple of v = 8");
}

TEST_CASE("status: every code has words of its own, and its number is fixed") {
  std::set<std::string> words;
  for (int code = 0; code <= 14; ++code) words.emplace(codegemm::to_string(static_cast<StatusCode>(code)));
  CHECK(words.size() == 15);
  CHECK(words.count("unknown status") == 0);
  CHECK(codegemm::to_string(static_cast<StatusCode>(15)) == "unknown status");
  // They cross the C boundary: a change of any of these breaks its users.
  CHECK(static_cast<int>(StatusCode::kInvalidArgument) == 1);
  CHECK(static_cast<int>(StatusCode::kCorruptData) == 9);
  CHECK(static_cast<int>(StatusCode::kExhausted) == 10);
  CHECK(static_cast<int>(StatusCode::kOutOfMemory) == 14);
}

TEST_CASE("result: holds a value, also one that can only be moved") {
  auto result = make(true);
  REQUIRE(result.ok());
  CHECK(result.status().ok());
  CHECK(**result == 42);
  CHECK(*result->get() == 42);
  const std::unique_ptr<int> taken = std::move(result).value();
  CHECK(*taken == 42);
}

TEST_CASE("result: holds the reason where there is no value") {
  const auto result = make(false);
  CHECK_FALSE(result.ok());
  CHECK(result.status().code() == StatusCode::kNotFound);
  CHECK(result.status().message() == "no tensor number 7");
}

TEST_CASE("result: value() of a failure says what failed and where it was taken, and ends the program") {
  const std::string here = codegemm::concat(__FILE__, ":", __LINE__ + 1, ": value() of a failure: ");
  CHECK(death_of([] { (void)make(false).value(); }).words == here + "not found: no tensor number 7\n");
  CHECK(death_of([] { (void)make(false).value(); }).signal == SIGABRT);

  auto kept = make(false);
  CHECK(death_of([&] { (void)kept.value(); }).signal == SIGABRT);
  const auto& seen = kept;
  const Death death = death_of([&] { (void)seen.value(); });
  CHECK(death.signal == SIGABRT);
  CHECK(death.words.find(": value() of a failure: not found: no tensor number 7\n") != std::string::npos);

  // A text with signs of printf's, and none at all.
  const Result<int> strange = codegemm::error(StatusCode::kIoError, "100%s of %d");
  CHECK(death_of([&] { (void)strange.value(); }).words.find(": input/output error: 100%s of %d\n") !=
        std::string::npos);
  const Result<int> silent = Status(StatusCode::kOutOfMemory, {});
  CHECK(death_of([&] { (void)silent.value(); }).words.find(": value() of a failure: out of memory\n") !=
        std::string::npos);

  const Death none = death_of([] { (void)make(true).value(); });
  CHECK(none.signal == 0);
  CHECK(none.words.empty());
}
