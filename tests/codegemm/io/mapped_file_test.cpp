// SPDX-License-Identifier: Apache-2.0

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include <codegemm/base/quoted.hpp>
#include <codegemm/io/mapped_file.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <support/catch.hpp>

using codegemm::MappedFile;
using codegemm::Result;
using codegemm::StatusCode;
using namespace codegemm::test;

namespace {
std::string bytes_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}
}  // namespace

TEST_CASE("a mapped file shows the file's bytes and survives being moved", "[io]") {
  const TemporaryFolder folder;
  put_file(folder / "a", std::string("one\0two", 7));
  put_file(folder / "b", "other");
  Result<MappedFile> a = MappedFile::open(folder / "a");
  REQUIRE(a.ok());
  CHECK(bytes_of(*a) == std::string("one\0two", 7));
  CHECK(a->path() == folder / "a");

  const std::byte* where = a->bytes().data();
  MappedFile moved = *std::move(a);
  CHECK(moved.bytes().data() == where);
  Result<MappedFile> b = MappedFile::open(folder / "b");
  REQUIRE(b.ok());
  moved = *std::move(b);
  CHECK(bytes_of(moved) == "other");
  CHECK(MappedFile().bytes().empty());
}

TEST_CASE("a mapping outlives the name of its file", "[io]") {
  const TemporaryFolder folder;
  put_file(folder / "a", "content");
  Result<MappedFile> a = MappedFile::open(folder / "a");
  REQUIRE(a.ok());
  REQUIRE(::unlink((folder / "a").c_str()) == 0);
  CHECK(bytes_of(*a) == "content");
}

TEST_CASE("files that cannot be mapped are named with the reason", "[io]") {
  const TemporaryFolder folder;

  const Result<MappedFile> missing = MappedFile::open(folder / "missing");
  REQUIRE_FALSE(missing.ok());
  CHECK(missing.status().code() == StatusCode::kNotFound);
  CHECK(missing.status().native_code() == ENOENT);
  CHECK(contains(missing.status().message(), folder / "missing"));
  CHECK(contains(missing.status().message(), "No such file or directory"));

  const Result<MappedFile> directory = MappedFile::open(folder.path());
  REQUIRE_FALSE(directory.ok());
  CHECK(directory.status().code() == StatusCode::kIoError);
  CHECK(directory.status().native_code() == EISDIR);
  CHECK(contains(directory.status().message(), folder.path()));

  put_file(folder / "empty", "");
  const Result<MappedFile> empty = MappedFile::open(folder / "empty");
  REQUIRE_FALSE(empty.ok());
  CHECK(empty.status().code() == StatusCode::kCorruptData);
  CHECK(contains(empty.status().message(), (folder / "empty") + ": the file is empty (0 bytes)"));

  REQUIRE(::mkfifo((folder / "fifo").c_str(), 0600) == 0);
  const Result<MappedFile> fifo = MappedFile::open(folder / "fifo");  // and does not wait for a writer
  REQUIRE_FALSE(fifo.ok());
  CHECK(fifo.status().code() == StatusCode::kIoError);
  CHECK(contains(fifo.status().message(), "not a regular file"));

  REQUIRE(::symlink("itself", (folder / "itself").c_str()) == 0);
  const Result<MappedFile> loop = MappedFile::open(folder / "itself");
  REQUIRE_FALSE(loop.ok());
  CHECK(loop.status().code() == StatusCode::kIoError);
  CHECK(loop.status().native_code() == ELOOP);
}

TEST_CASE("a file without read permission is an input/output error", "[io]") {
  const TemporaryFolder folder;
  put_file(folder / "secret", "x");
  REQUIRE(::chmod((folder / "secret").c_str(), 0) == 0);
  REQUIRE(::chmod(folder.path().c_str(), 0755) == 0);
  // Root may read everything: be somebody else for a moment.
  const uid_t user = ::geteuid();
  constexpr uid_t kNobody = 65534;
  if (user == 0 && ::seteuid(kNobody) != 0) TEST_SKIP("root, and may not become another user");
  const Result<MappedFile> secret = MappedFile::open(folder / "secret");
  REQUIRE(::seteuid(user) == 0);
  REQUIRE_FALSE(secret.ok());
  CHECK(secret.status().code() == StatusCode::kIoError);
  CHECK(secret.status().native_code() == EACCES);
  CHECK(contains(secret.status().message(), folder / "secret"));
}

TEST_CASE("quoted text can neither steer a terminal nor fill a log", "[io]") {
  CHECK(codegemm::quoted("blk.0.attn_q") == "'blk.0.attn_q'");
  CHECK(codegemm::quoted("") == "''");
  CHECK(codegemm::quoted("a\x1b[2J\n\x7f") == "'a\\x1b[2J\\x0a\\x7f'");
  CHECK(codegemm::quoted(std::string(100, 'x')) == "'" + std::string(96, 'x') + "...'");
  CHECK(codegemm::quoted(std::string(96, 'x')) == "'" + std::string(96, 'x') + "'");
  CHECK(codegemm::quoted("ab\xe2\x82\xac", 4) == "'ab...'");  // does not cut the euro sign in two
  CHECK(codegemm::quoted("ab\xe2\x82\xac", 5) == "'ab\xe2\x82\xac'");
  CHECK(codegemm::quoted(std::string(10, '\x80'), 6) == "'" + std::string(3, '\x80') + "...'");
}
