// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/storage.hpp - where the K and V of the blocks lie.
// Layer: kv (host only).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/shape.hpp>

namespace prefillshare {

/// All that the allocator asks of the memory behind the blocks: its size, and to copy the first `tokens`
/// slots of one block over another's in every layer. Host memory, device memory (copy_block enqueues on the
/// caller's stream) or a file can all serve. A copy that fails leaves the allocator as it was.
template <class Storage>
concept KvStorage = requires(Storage storage, const Storage constant, BlockId block, int tokens) {
  { constant.shape() } -> std::convertible_to<KvShape>;
  { constant.blocks() } -> std::convertible_to<std::int64_t>;
  { constant.bytes_per_block() } -> std::convertible_to<std::int64_t>;
  { storage.copy_block(block, block, tokens) } -> std::same_as<codegemm::Status>;
};

/// One layer's pages in FlashInfer's NHD form, in somebody else's memory:
/// [blocks][2: K, V][block_tokens][kv_heads][head_dim], dense.
template <class T>
struct KvLayerView {
  T* data = nullptr;        ///< [blocks][2][block_tokens][kv_heads][head_dim]
  std::int64_t blocks = 0;  ///< pages
  int block_tokens = 0;     ///< tokens of a page
  int kv_heads = 0;         ///< heads of K and of V
  int head_dim = 0;         ///< elements of a head

  /// Elements from one slot to the next.
  [[nodiscard]] constexpr std::int64_t slot_stride() const noexcept {
    return std::int64_t{kv_heads} * head_dim;
  }
  /// [kv_heads][head_dim] of the token in a slot.
  [[nodiscard]] constexpr T* k(BlockId block, int slot) const noexcept {
    return data + (std::int64_t{2} * block * block_tokens + slot) * slot_stride();
  }
  /// The same of V.
  [[nodiscard]] constexpr T* v(BlockId block, int slot) const noexcept {
    return data + ((std::int64_t{2} * block + 1) * block_tokens + slot) * slot_stride();
  }

  /// A view to read from, out of one to write to.
  constexpr operator KvLayerView<const T>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<T>) {
    return {data, blocks, block_tokens, kv_heads, head_dim};
  }
};

/// fp32 pages of all layers in host memory: [layer][block][2: K, V][block_tokens][kv_heads][head_dim],
/// 64-byte aligned. The memory is not written by create(), so the system gives pages only as they fill.
class HostKvStorage {
 public:
  static constexpr std::size_t kAlignment = 64;  ///< bytes, of the first page

  /// kInvalidArgument for a shape or count that cannot be; kOutOfMemory.
  [[nodiscard]] static codegemm::Result<HostKvStorage> create(const KvShape& shape, std::int64_t blocks) {
    if (const codegemm::Status status = validate(shape); !status.ok()) return status;
    const std::int64_t per_block = shape.bytes_per_block(sizeof(float));  // < 2^62 by validate()
    CODEGEMM_ASSERT(per_block > 0);
    if (blocks < 0 || blocks >= std::numeric_limits<BlockId>::max() ||
        blocks > std::numeric_limits<std::int64_t>::max() / per_block) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "HostKvStorage: ", blocks, " blocks of ",
                             per_block, " bytes");
    }
    HostKvStorage storage;
    storage.shape_ = shape;
    storage.blocks_ = blocks;
    storage.data_.reset(static_cast<float*>(::operator new (static_cast<std::size_t>(blocks * per_block),
                                                            std::align_val_t{kAlignment}, std::nothrow)));
    if (storage.data_ == nullptr) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "HostKvStorage: no memory for ", blocks,
                             " blocks of ", per_block, " bytes");
    }
    return storage;
  }

  [[nodiscard]] const KvShape& shape() const noexcept { return shape_; }  ///< as given
  [[nodiscard]] std::int64_t blocks() const noexcept { return blocks_; }  ///< as given
  /// All layers of a block, K and V.
  [[nodiscard]] std::int64_t bytes_per_block() const noexcept {
    return shape_.bytes_per_block(sizeof(float));
  }

  /// Pages of one layer.
  [[nodiscard]] KvLayerView<float> layer(int index) noexcept { return view<float>(index); }
  /// Pages of one layer, to read from.
  [[nodiscard]] KvLayerView<const float> layer(int index) const noexcept { return view<const float>(index); }

  /// [kv_heads][head_dim] of one token.
  [[nodiscard]] float* k(int index, BlockId block, int slot) noexcept { return layer(index).k(block, slot); }
  /// [kv_heads][head_dim] of one token.
  [[nodiscard]] float* v(int index, BlockId block, int slot) noexcept { return layer(index).v(block, slot); }
  /// The same, to read from.
  [[nodiscard]] const float* k(int index, BlockId block, int slot) const noexcept {
    return layer(index).k(block, slot);
  }
  /// The same, to read from.
  [[nodiscard]] const float* v(int index, BlockId block, int slot) const noexcept {
    return layer(index).v(block, slot);
  }

  /// All of a block, [layer][2: K, V][block_tokens][kv_heads][head_dim], to or from bytes_per_block() bytes.
  [[nodiscard]] codegemm::Status read_block(BlockId block, std::span<std::byte> to) const {
    if (codegemm::Status status = check_bytes(block, to.size()); !status.ok()) return status;
    const std::size_t bytes = to.size() / static_cast<std::size_t>(shape_.layers);
    for (int index = 0; index < shape_.layers; ++index) {
      std::memcpy(to.data() + static_cast<std::size_t>(index) * bytes, layer(index).k(block, 0), bytes);
    }
    return {};
  }
  /// The other direction.
  [[nodiscard]] codegemm::Status write_block(BlockId block, std::span<const std::byte> from) {
    if (codegemm::Status status = check_bytes(block, from.size()); !status.ok()) return status;
    const std::size_t bytes = from.size() / static_cast<std::size_t>(shape_.layers);
    for (int index = 0; index < shape_.layers; ++index) {
      std::memcpy(layer(index).k(block, 0), from.data() + static_cast<std::size_t>(index) * bytes, bytes);
    }
    return {};
  }

  /// The first `tokens` slots of `source` over those of `destination`, K and V, every layer.
  [[nodiscard]] codegemm::Status copy_block(BlockId destination, BlockId source, int tokens) {
    if (destination < 0 || destination >= blocks_ || source < 0 || source >= blocks_ || tokens < 0 ||
        tokens > shape_.block_tokens) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "HostKvStorage: copy of ", tokens,
                             " tokens from block ", source, " to block ", destination, "; there are ",
                             blocks_, " blocks of ", shape_.block_tokens, " tokens");
    }
    if (destination == source || tokens == 0) return {};
    for (int index = 0; index < shape_.layers; ++index) {
      const KvLayerView<float> pages = layer(index);
      const std::size_t bytes =
          static_cast<std::size_t>(tokens * pages.slot_stride()) * sizeof(float);  // slots lie side by side
      std::memcpy(pages.k(destination, 0), pages.k(source, 0), bytes);
      std::memcpy(pages.v(destination, 0), pages.v(source, 0), bytes);
    }
    return {};
  }

 private:
  struct Free {
    void operator()(float* data) const noexcept { ::operator delete (data, std::align_val_t{kAlignment}); }
  };

  HostKvStorage() = default;

  [[nodiscard]] codegemm::Status check_bytes(BlockId block, std::size_t bytes) const {
    if (block >= 0 && block < blocks_ && bytes == static_cast<std::size_t>(bytes_per_block())) return {};
    return codegemm::error(codegemm::StatusCode::kInvalidArgument, "HostKvStorage: ", bytes,
                           " bytes for block ", block, "; there are ", blocks_, " blocks of ",
                           bytes_per_block());
  }
  template <class T>
  [[nodiscard]] KvLayerView<T> view(int index) const noexcept {
    CODEGEMM_ASSERT(index >= 0 && index < shape_.layers);
    const std::int64_t layer_size =
        blocks_ * 2 * shape_.block_tokens * shape_.kv_heads * shape_.head_dim;  // elements
    return {data_.get() + index * layer_size, blocks_, shape_.block_tokens, shape_.kv_heads, shape_.head_dim};
  }

  KvShape shape_;
  std::int64_t blocks_ = 0;
  std::unique_ptr<float, Free> data_;
};
static_assert(KvStorage<HostKvStorage>);

/// Blocks with nothing behind them: for simulators, planners and routers, which need the allocator's
/// decisions but no numbers.
class NoKvStorage {
 public:
  /// So many blocks of that shape; nothing is allocated.
  NoKvStorage(const KvShape& shape, std::int64_t blocks) : shape_(shape), blocks_(blocks) {}

  [[nodiscard]] const KvShape& shape() const noexcept { return shape_; }  ///< as given
  [[nodiscard]] std::int64_t blocks() const noexcept { return blocks_; }  ///< as given
  /// Of pages that held fp32.
  [[nodiscard]] std::int64_t bytes_per_block() const noexcept { return shape_.bytes_per_block(); }
  [[nodiscard]] codegemm::Status copy_block(BlockId, BlockId, int) { return {}; }  ///< nothing to copy

 private:
  KvShape shape_;
  std::int64_t blocks_ = 0;
};
static_assert(KvStorage<NoKvStorage>);

}  // namespace prefillshare
