// SPDX-License-Identifier: Apache-2.0

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/io/atomic_file.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <support/catch.hpp>

using codegemm::AtomicFile;
using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;
using namespace codegemm::test;

namespace {

/// The process can write no file beyond `bytes`, as on a full disk, and is told so instead of killed.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    if (::getrlimit(RLIMIT_FSIZE, &before_) != 0) throw std::runtime_error("getrlimit");
    rlimit limit = before_;
    limit.rlim_cur = bytes;
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) throw std::runtime_error("setrlimit");
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

}  // namespace

TEST_CASE("an atomic file appears on commit and replaces the old one", "[io]") {
  const TemporaryFolder folder;
  put_file(folder / "a", "old");
  Result<AtomicFile> file = AtomicFile::create(folder / "a");
  REQUIRE(file.ok());
  REQUIRE(file->write("new ").ok());
  REQUIRE(file->write(std::string_view()).ok());
  REQUIRE(file->write("text").ok());
  CHECK(file->size() == 8);
  CHECK(get_file(folder / "a") == "old");
  REQUIRE(file->commit().ok());
  CHECK(get_file(folder / "a") == "new text");
  CHECK(folder.list() == std::vector<std::string>{"a"});

  // Afterwards it takes nothing more.
  CHECK(file->write("x").code() == StatusCode::kInvalidArgument);
  CHECK(file->commit().code() == StatusCode::kInvalidArgument);
  CHECK(get_file(folder / "a") == "new text");
}

TEST_CASE("an atomic file that is not committed leaves nothing", "[io]") {
  const TemporaryFolder folder;
  put_file(folder / "a", "old");
  {
    Result<AtomicFile> file = AtomicFile::create(folder / "a");
    REQUIRE(file.ok());
    REQUIRE(file->write("half").ok());
    CHECK(folder.list().size() == 2);
    AtomicFile moved = *std::move(file);  // one owner, one removal
    Result<AtomicFile> other = AtomicFile::create(folder / "a");
    REQUIRE(other.ok());
    moved = *std::move(other);
    CHECK(folder.list().size() == 2);
  }
  CHECK(folder.list() == std::vector<std::string>{"a"});
  CHECK(get_file(folder / "a") == "old");
}

TEST_CASE("write_file in the current folder needs no slash in its name", "[io]") {
  const TemporaryFolder folder;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  const Status status = codegemm::write_file("plain", std::string_view("text"));
  std::filesystem::current_path(before);
  REQUIRE(status.ok());
  CHECK(get_file(folder / "plain") == "text");
}

TEST_CASE("an atomic file has the usual permissions", "[io]") {
  const TemporaryFolder folder;
  const mode_t before = ::umask(027);
  const Status status = codegemm::write_file(folder / "a", std::string_view("text"));
  ::umask(before);
  REQUIRE(status.ok());
  struct stat info {};
  REQUIRE(::stat((folder / "a").c_str(), &info) == 0);
  CHECK((info.st_mode & 0777) == 0640);
}

TEST_CASE("a disk that is full leaves the old file and nothing else", "[io]") {
  const TemporaryFolder folder;
  put_file(folder / "a", "old");
  const std::string big(200'000, 'x');
  Status status;
  {
    const FileSizeLimit limit(70'000);
    Result<AtomicFile> file = AtomicFile::create(folder / "a");
    REQUIRE(file.ok());
    REQUIRE(file->write(std::string_view(big).substr(0, 50'000)).ok());
    status = file->write(big);
    // The failed file is gone already, before its owner is.
    CHECK(folder.list() == std::vector<std::string>{"a"});
    CHECK_FALSE(file->commit().ok());
  }
  REQUIRE_FALSE(status.ok());
  CHECK(status.code() == StatusCode::kIoError);
  CHECK(status.native_code() == EFBIG);
  CAPTURE(status.message());
  CHECK(contains(status.message(), folder / "a"));
  CHECK(contains(status.message(), "File too large"));
  CHECK(contains(status.message(), "70000 bytes written, 180000 more to write"));
  CHECK(get_file(folder / "a") == "old");
  CHECK(folder.list() == std::vector<std::string>{"a"});
}

TEST_CASE("an atomic file that cannot be put in its place is an error and leaves nothing", "[io]") {
  const TemporaryFolder folder;
  const Result<AtomicFile> nowhere = AtomicFile::create(folder / "missing/a");
  REQUIRE_FALSE(nowhere.ok());
  CHECK(nowhere.status().native_code() == ENOENT);
  CHECK(contains(nowhere.status().message(), folder / "missing/a"));

  std::filesystem::create_directory(folder / "folder");
  const Status onto_folder = codegemm::write_file(folder / "folder", std::string_view("text"));
  REQUIRE_FALSE(onto_folder.ok());
  CHECK(onto_folder.code() == StatusCode::kIoError);
  CHECK(onto_folder.native_code() == EISDIR);
  CHECK(contains(onto_folder.message(), "4 bytes written"));
  CHECK(folder.list() == std::vector<std::string>{"folder"});

  // The folder vanishes between create and commit.
  Result<AtomicFile> late = AtomicFile::create(folder / "folder/a");
  REQUIRE(late.ok());
  REQUIRE(late->write("text").ok());
  std::filesystem::remove_all(folder / "folder");
  const Status status = late->commit();
  REQUIRE_FALSE(status.ok());
  CHECK(status.code() == StatusCode::kIoError);
  CHECK(status.native_code() == ENOENT);
  CHECK(folder.list().empty());
}
