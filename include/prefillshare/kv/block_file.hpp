// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/block_file.hpp - blocks of equal size in a file without a name.
// Layer: kv (host only).
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <utility>

#include <codegemm/base/status.hpp>
#include <codegemm/base/text.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare::detail {

// The lowest tier of a copy engine. Movable. Different blocks may be read and written by several threads at
// once.
class BlockFile {
 public:
  BlockFile() = default;
  BlockFile(BlockFile&& other) noexcept
      : file_(std::exchange(other.file_, -1)), block_bytes_(other.block_bytes_) {}
  BlockFile& operator=(BlockFile&& other) noexcept {
    std::swap(file_, other.file_);
    std::swap(block_bytes_, other.block_bytes_);
    return *this;
  }
  BlockFile(const BlockFile&) = delete;
  BlockFile& operator=(const BlockFile&) = delete;
  ~BlockFile() {
    if (file_ >= 0) ::close(file_);
  }

  // In `folder`, gone when its owner is. kOutOfMemory; kIoError with errno.
  [[nodiscard]] static codegemm::Result<BlockFile> create(const std::string& folder, std::int64_t blocks,
                                                          std::int64_t block_bytes) {
    BlockFile out;
    out.block_bytes_ = block_bytes;
    std::string path;
    if (!try_allocate([&] { path = folder + "/prefillshare-kv-XXXXXX"; })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "copy engine: no memory for a file's name");
    }
    out.file_ = ::mkstemp(path.data());
    if (out.file_ < 0) return failed(path, ": cannot be made");
    if (::unlink(path.c_str()) != 0 || ::ftruncate(out.file_, blocks * block_bytes) != 0) {
      return failed(path, ": cannot be sized");
    }
    return out;
  }

  [[nodiscard]] codegemm::Status read(std::int32_t block, std::span<std::byte> bytes) const {
    return transfer(block, bytes, [this](std::span<std::byte> part, off_t at) {
      return ::pread(file_, part.data(), part.size(), at);
    });
  }
  [[nodiscard]] codegemm::Status write(std::int32_t block, std::span<std::byte> bytes) const {
    return transfer(block, bytes, [this](std::span<std::byte> part, off_t at) {
      return ::pwrite(file_, part.data(), part.size(), at);
    });
  }

 private:
  template <class... Parts>
  [[nodiscard]] static codegemm::Status failed(const Parts&... parts) {
    const int number = errno;
    return {codegemm::StatusCode::kIoError,
            codegemm::detail::text_if_memory([&] { return codegemm::concat(parts...); }), number};
  }
  template <class Call>
  [[nodiscard]] codegemm::Status transfer(std::int32_t block, std::span<std::byte> bytes,
                                          const Call& call) const {
    auto at = static_cast<off_t>(std::int64_t{block} * block_bytes_);
    while (!bytes.empty()) {
      const ssize_t done = call(bytes, at);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) return failed("copy engine: block ", block, " of the file");
      bytes = bytes.subspan(static_cast<std::size_t>(done));
      at += done;
    }
    return {};
  }

  int file_ = -1;
  std::int64_t block_bytes_ = 0;
};

}  // namespace prefillshare::detail
