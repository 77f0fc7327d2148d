// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/atomic_file.hpp - a file that appears whole or not at all.
// Layer: io (host only, POSIX).
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <codegemm/base/status.hpp>
#include <codegemm/io/mapped_file.hpp>

namespace codegemm {

/// Writes PATH by way of a temporary file in the same folder: create(), write()..., commit(). Until commit()
/// has returned ok, whatever was at PATH before is still there, and any failure (and the destructor) removes
/// the temporary. Only a killed process can leave one behind: it is named PATH.tmp-PID-NUMBER. A symbolic
/// link at PATH is replaced by the file, not followed.
class AtomicFile {
 public:
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  /// The other has nothing to commit any more.
  AtomicFile(AtomicFile&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, -1)),
        written_(other.written_),
        path_(std::move(other.path_)),
        temporary_(std::exchange(other.temporary_, {})) {}
  /// What this one had not committed is removed; the other has nothing to commit any more.
  AtomicFile& operator=(AtomicFile&& other) noexcept {
    if (this != &other) {
      discard();
      descriptor_ = std::exchange(other.descriptor_, -1);
      written_ = other.written_;
      path_ = std::move(other.path_);
      temporary_ = std::exchange(other.temporary_, {});
    }
    return *this;
  }
  ~AtomicFile() { discard(); }

  /// The folder of `path` must exist. Permissions are the process's usual ones (0666 less its umask).
  [[nodiscard]] static Result<AtomicFile> create(std::string path) {
    static std::atomic<std::uint64_t> counter{0};
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      std::string temporary =
          concat(path, ".tmp-", static_cast<long long>(::getpid()), "-", counter.fetch_add(1));
      const int descriptor = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor >= 0) return AtomicFile(descriptor, std::move(path), std::move(temporary));
      if (errno != EEXIST) return io_error("create", temporary, errno);
    }
    return io_error("create a temporary file beside", path, EEXIST);
  }

  /// Appends. After a failure the temporary is gone and the file can only be thrown away.
  [[nodiscard]] Status write(std::span<const std::byte> bytes) {
    if (descriptor_ < 0)
      return error(StatusCode::kInvalidArgument, "cannot write ", path_, ": no longer open");
    while (!bytes.empty()) {
      const ::ssize_t count = ::write(descriptor_, bytes.data(), std::min(bytes.size(), kMostPerCall));
      if (count < 0) {
        if (errno == EINTR) continue;
        return fail("write", errno, bytes.size());
      }
      written_ += static_cast<std::uint64_t>(count);
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
    return {};
  }
  /// Appends the text as it is.
  [[nodiscard]] Status write(std::string_view text) {
    return write(std::as_bytes(std::span(text.data(), text.size())));
  }

  /// Puts the file in its place: the data reach the disk before the name does.
  [[nodiscard]] Status commit() {
    if (descriptor_ < 0)
      return error(StatusCode::kInvalidArgument, "cannot commit ", path_, ": no longer open");
    if (::fsync(descriptor_) != 0) return fail("flush", errno, 0);
    // Network file systems report a full disk only here.
    const int closed = ::close(std::exchange(descriptor_, -1));
    if (closed != 0 && errno != EINTR) return fail("close", errno, 0);
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0) return fail("replace", errno, 0);
    temporary_.clear();
    return flush_folder();
  }

  /// Bytes written so far.
  [[nodiscard]] std::uint64_t size() const noexcept { return written_; }
  /// The file's name once it is committed.
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  static constexpr int kAttempts = 100;
  static constexpr std::size_t kMostPerCall = std::size_t{1} << 30;  // Linux writes at most 2 GiB at once

  AtomicFile(int descriptor, std::string path, std::string temporary)
      : descriptor_(descriptor), path_(std::move(path)), temporary_(std::move(temporary)) {}

  Status fail(std::string_view verb, int code, std::size_t left) {
    Status status = io_error(verb, path_, code);
    std::string text = concat(status.message(), ", ", written_, " bytes written");
    if (left > 0) text += concat(", ", left, " more to write");
    discard();
    // A folder that vanished meanwhile is a failed write all the same, not a missing input.
    return Status(StatusCode::kIoError, std::move(text), code);
  }

  void discard() noexcept {
    if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
  }

  /// Makes the rename itself durable. The new file is in place already, so a file system that cannot flush a
  /// folder (EINVAL) is no failure.
  Status flush_folder() const {
    const std::size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : slash == 0 ? "/" : path_.substr(0, slash);
    const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return {};  // a folder may be writable and not readable
    const int code = ::fsync(descriptor) == 0 ? 0 : errno;
    ::close(descriptor);
    if (code == 0 || code == EINVAL || code == ENOTSUP) return {};
    return Status(StatusCode::kIoError, io_error("flush the folder", folder, code).message(), code);
  }

  int descriptor_ = -1;
  std::uint64_t written_ = 0;
  std::string path_;
  std::string temporary_;
};

/// The whole of a file in one call.
[[nodiscard]] inline Status write_file(std::string path, std::span<const std::byte> bytes) {
  Result<AtomicFile> file = AtomicFile::create(std::move(path));
  if (!file.ok()) return file.status();
  if (Status status = file->write(bytes); !status.ok()) return status;
  return file->commit();
}
/// Writes a whole file by way of AtomicFile: after a failure the old one is as it was.
[[nodiscard]] inline Status write_file(std::string path, std::string_view text) {
  return write_file(std::move(path), std::as_bytes(std::span(text.data(), text.size())));
}

}  // namespace codegemm
