// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/status.hpp>

#include <cerrno>
#include <memory>
#include <set>
#include <string>
#include <type_traits>
#include <utility>

#include <support/catch.hpp>

namespace {

using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;

Result<std::unique_ptr<int>> make(bool well) {
  if (!well) return codegemm::error(StatusCode::kNotFound, "no tensor number ", 7);
  return std::make_unique<int>(42);
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
