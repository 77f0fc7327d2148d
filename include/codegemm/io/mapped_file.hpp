// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/mapped_file.hpp - a whole file as read-only memory.
// Layer: io (host only, POSIX).
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <codegemm/base/status.hpp>

namespace codegemm {

/// "cannot VERB PATH: No such file or directory (errno 2)". kNotFound where there is no such file, else
/// kIoError.
[[nodiscard]] inline Status io_error(std::string_view verb, std::string_view path, int code) {
  const StatusCode kind = code == ENOENT || code == ENOTDIR ? StatusCode::kNotFound : StatusCode::kIoError;
  return Status(
      kind,
      concat("cannot ", verb, " ", path, ": ", std::generic_category().message(code), " (errno ", code, ")"),
      code);
}

/// A regular file mapped read-only. Move-only; the bytes stay where they are when the owner is moved, and
/// every view into them dies with it. Never empty once opened. A file that another process shortens while it
/// is mapped raises SIGBUS on access: replace model files by rename, as AtomicFile does, never in place.
class MappedFile {
 public:
  MappedFile() = default;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  /// The other becomes empty; bytes() keep their address.
  MappedFile(MappedFile&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        path_(std::move(other.path_)) {}
  /// What this one had mapped is unmapped; the other becomes empty.
  MappedFile& operator=(MappedFile&& other) noexcept {
    if (this != &other) {
      unmap();
      data_ = std::exchange(other.data_, nullptr);
      size_ = std::exchange(other.size_, 0);
      path_ = std::move(other.path_);
    }
    return *this;
  }
  ~MappedFile() { unmap(); }

  /// kNotFound for a missing file, kIoError with errno for one that cannot be read or is no regular file,
  /// kCorruptData for an empty one.
  [[nodiscard]] static Result<MappedFile> open(std::string path) {
    // O_NONBLOCK: opening a FIFO must not wait for its writer. It has no effect on regular files.
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) return io_error("open", path, errno);
    Result<MappedFile> mapped = map(descriptor, std::move(path));
    ::close(descriptor);  // the mapping keeps the file
    return mapped;
  }

  /// All of the file, as long as this object lives.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }  ///< the name it was opened by

 private:
  static Result<MappedFile> map(int descriptor, std::string path) {
    struct stat info {};
    if (::fstat(descriptor, &info) != 0) return io_error("inspect", path, errno);
    if (S_ISDIR(info.st_mode)) return io_error("read", path, EISDIR);
    if (!S_ISREG(info.st_mode)) {
      return Status(StatusCode::kIoError, concat("cannot read ", path, ": not a regular file"), EINVAL);
    }
    if (info.st_size == 0) return error(StatusCode::kCorruptData, path, ": the file is empty (0 bytes)");
    const auto size = static_cast<std::uint64_t>(info.st_size);
    if (size > std::numeric_limits<std::size_t>::max()) return io_error("map", path, EFBIG);
    MappedFile file;
    void* data = ::mmap(nullptr, static_cast<std::size_t>(size), PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) return io_error("map", path, errno);
    file.data_ = static_cast<const std::byte*>(data);
    file.size_ = static_cast<std::size_t>(size);
    file.path_ = std::move(path);
    return file;
  }

  void unmap() noexcept {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
    data_ = nullptr;
    size_ = 0;
  }

  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::string path_;
};

}  // namespace codegemm
