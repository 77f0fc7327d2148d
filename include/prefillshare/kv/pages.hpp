// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/pages.hpp - pages of any element type and layout, in anybody's memory.
// Layer: kv (host only; the memory may be a device's).
// See: https://docs.flashinfer.ai/tutorials/kv_layout.html
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/element.hpp>
#include <prefillshare/kv/shape.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// The order within a block: NHD is [2: K, V][block_tokens][kv_heads][head_dim], HND
/// [2: K, V][kv_heads][block_tokens][head_dim].
enum class KvLayout : std::uint8_t { kNhd, kHnd };

/// What a page holds, and in which order.
struct KvPageFormat {
  KvElement element = KvElement::kFp32;  ///< type of the numbers
  KvLayout layout = KvLayout::kNhd;      ///< their order

  /// Both are equal.
  friend bool operator==(const KvPageFormat&, const KvPageFormat&) = default;
};

/// From one element of a layer to the next, in elements. Rows of head_dim are dense.
struct KvStrides {
  std::int64_t block = 0;  ///< from a block to the next
  std::int64_t part = 0;   ///< from K to V
  std::int64_t slot = 0;   ///< from a token to the next
  std::int64_t head = 0;   ///< from a head to the next

  /// Position of a head's first element; part_of: 0 is K, 1 is V.
  [[nodiscard]] constexpr std::int64_t at(BlockId block_id, int part_of, int slot_of,
                                          int head_of) const noexcept {
    return block_id * block + part_of * part + slot_of * slot + head_of * head;
  }
  /// All of it is equal.
  friend constexpr bool operator==(const KvStrides&, const KvStrides&) = default;
};

/// Dense pages. The shape is valid.
[[nodiscard]] constexpr KvStrides dense_strides(const KvShape& shape, KvLayout layout) noexcept {
  const std::int64_t part = std::int64_t{shape.block_tokens} * shape.kv_heads * shape.head_dim;
  if (layout == KvLayout::kNhd)
    return {2 * part, part, std::int64_t{shape.kv_heads} * shape.head_dim, shape.head_dim};
  return {2 * part, part, shape.head_dim, std::int64_t{shape.block_tokens} * shape.head_dim};
}

/// The pages of one layer, for kernels of any kind: base pointer, strides, and for fp8 what a stored number
/// is to be multiplied by.
struct KvPages {
  void* base = nullptr;     ///< the caller's
  KvPageFormat format;      ///< type and order
  KvStrides strides;        ///< in elements
  std::int64_t blocks = 0;  ///< pages
  int block_tokens = 0;     ///< tokens of a page
  int kv_heads = 0;         ///< heads of K and of V
  int head_dim = 0;         ///< elements of a head
  float k_scale = 1.0F;     ///< a K is its stored number times this
  float v_scale = 1.0F;     ///< the same for V
};

/// Copies bytes from one place of the pages' memory to another; the places do not overlap. memcpy for host
/// memory; for a device's it enqueues on the stream that the attention of these pages runs on.
template <class Copy>
concept KvByteCopy = requires(Copy copy, void* to, const void* from, std::size_t bytes) {
  { copy(to, from, bytes) } -> std::same_as<codegemm::Status>;
};

/// memcpy: for pages in host memory.
struct CopyHostBytes {
  /// Never fails.
  codegemm::Status operator()(void* to, const void* from, std::size_t bytes) const {
    std::memcpy(to, from, bytes);
    return {};
  }
};

/// A storage for the allocator over the caller's pages, which outlive it: plain base pointers and strides. Of
/// the memory only `Copy` touches anything, so it may be a device's. K and V of a layer have one scale each.
template <KvByteCopy Copy = CopyHostBytes>
class PageStorage {
 public:
  /// `bases` has one pointer for each layer. kInvalidArgument, kNullPointer, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<PageStorage> create(const KvShape& shape, std::int64_t blocks,
                                                            const KvPageFormat& format,
                                                            std::span<void* const> bases, Copy copy = {}) {
    return create(shape, blocks, format, dense_strides(shape, format.layout), bases, std::move(copy));
  }
  /// With strides of the caller's: no two elements may share a place.
  [[nodiscard]] static codegemm::Result<PageStorage> create(const KvShape& shape, std::int64_t blocks,
                                                            const KvPageFormat& format,
                                                            const KvStrides& strides,
                                                            std::span<void* const> bases, Copy copy = {}) {
    using codegemm::StatusCode;
    if (codegemm::Status status = validate(shape); !status.ok()) return status;
    if (blocks < 0 || blocks >= std::numeric_limits<BlockId>::max() || std::ssize(bases) != shape.layers) {
      return codegemm::error(StatusCode::kInvalidArgument, "PageStorage: ", blocks, " blocks, ", bases.size(),
                             " base pointers for ", shape.layers, " layers");
    }
    if (std::min({strides.block, strides.part, strides.slot, strides.head}) < shape.head_dim) {
      return codegemm::error(StatusCode::kInvalidArgument, "PageStorage: strides ", strides.block, ", ",
                             strides.part, ", ", strides.slot, ", ", strides.head, " for rows of ",
                             shape.head_dim);
    }
    for (std::size_t i = 0; i < bases.size(); ++i) {
      if (bases[i] == nullptr) {
        return codegemm::error(StatusCode::kNullPointer, "PageStorage: the pages of layer ", i, " are null");
      }
    }
    PageStorage storage(std::move(copy));
    storage.shape_ = shape;
    storage.blocks_ = blocks;
    const bool allocated = detail::try_allocate([&] {
      for (void* base : bases) {
        storage.layers_.push_back(
            {base, format, strides, blocks, shape.block_tokens, shape.kv_heads, shape.head_dim, 1.0F, 1.0F});
      }
    });
    if (!allocated) return codegemm::error(StatusCode::kOutOfMemory, "PageStorage: no memory");
    return storage;
  }

  [[nodiscard]] const KvShape& shape() const noexcept { return shape_; }  ///< as given
  [[nodiscard]] std::int64_t blocks() const noexcept { return blocks_; }  ///< as given
  /// All layers of a block, K and V.
  [[nodiscard]] std::int64_t bytes_per_block() const noexcept {
    return shape_.bytes_per_block(bytes_of(format().element));
  }
  /// The same in all layers.
  [[nodiscard]] const KvPageFormat& format() const noexcept { return layers_.front().format; }
  /// Of one layer, for kernels.
  [[nodiscard]] const KvPages& pages(int layer) const noexcept {
    return layers_[static_cast<std::size_t>(layer)];
  }

  /// What K and V of a layer were divided by when they were written (fp8: their largest magnitude over 448).
  /// Before anything is written. kInvalidArgument unless both are positive and finite.
  [[nodiscard]] codegemm::Status set_scales(int layer, float k_scale, float v_scale) {
    const auto good = [](float scale) { return scale > 0.0F && scale <= std::numeric_limits<float>::max(); };
    if (layer < 0 || layer >= shape_.layers || !good(k_scale) || !good(v_scale)) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "PageStorage: scales ", k_scale, " and ",
                             v_scale, " of layer ", layer);
    }
    layers_[static_cast<std::size_t>(layer)].k_scale = k_scale;
    layers_[static_cast<std::size_t>(layer)].v_scale = v_scale;
    return {};
  }

  /// The first `tokens` slots of `source` over those of `destination`, K and V, every layer.
  [[nodiscard]] codegemm::Status copy_block(BlockId destination, BlockId source, int tokens) {
    if (destination < 0 || destination >= blocks_ || source < 0 || source >= blocks_ || tokens < 0 ||
        tokens > shape_.block_tokens) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "PageStorage: copy of ", tokens,
                             " tokens from block ", source, " to block ", destination, "; there are ",
                             blocks_, " blocks of ", shape_.block_tokens, " tokens");
    }
    if (destination == source) return {};
    return for_each_run(
        tokens, [&](std::byte* base, const KvStrides& strides, std::int64_t offset, std::size_t bytes) {
          const std::int64_t size = bytes_of(format().element);
          return copy_(base + (destination * strides.block + offset) * size,
                       base + (source * strides.block + offset) * size, bytes);
        });
  }
  /// All of a block, to or from bytes_per_block() bytes in memory that Copy reaches; for copy engines.
  [[nodiscard]] codegemm::Status read_block(BlockId block, std::span<std::byte> to) const {
    return move_block(block, to.size(), [&](std::byte* page, std::size_t at, std::size_t bytes) {
      return copy_(to.data() + at, page, bytes);
    });
  }
  /// The other direction.
  [[nodiscard]] codegemm::Status write_block(BlockId block, std::span<const std::byte> from) {
    return move_block(block, from.size(), [&](std::byte* page, std::size_t at, std::size_t bytes) {
      return copy_(page, from.data() + at, bytes);
    });
  }

 private:
  explicit PageStorage(Copy copy) : copy_(std::move(copy)) {}

  /// visit(base, strides, first element from the block's, bytes) for each run of a block that is dense in
  /// memory, as long as they are, in the order layer, part, head, slot.
  template <class Visit>
  [[nodiscard]] codegemm::Status for_each_run(int tokens, Visit&& visit) const {
    if (tokens == 0) return {};
    const std::int64_t size = bytes_of(format().element);
    for (const KvPages& layer : layers_) {
      auto* const base = static_cast<std::byte*>(layer.base);
      const KvStrides& s = layer.strides;
      const bool by_slot =
          s.head == layer.head_dim && s.slot == std::int64_t{layer.kv_heads} * layer.head_dim;
      const bool by_head = s.slot == layer.head_dim;  // one head's slots side by side
      const int heads = by_slot ? 1 : layer.kv_heads;
      const int slots = by_slot || by_head ? 1 : tokens;
      const std::int64_t run = by_slot   ? std::int64_t{tokens} * s.slot
                               : by_head ? std::int64_t{tokens} * layer.head_dim
                                         : std::int64_t{layer.head_dim};
      for (int part = 0; part < 2; ++part) {
        for (int head = 0; head < heads; ++head) {
          for (int slot = 0; slot < slots; ++slot) {
            codegemm::Status status =
                visit(base, s, s.at(0, part, slot, head), static_cast<std::size_t>(run * size));
            if (!status.ok()) return status;
          }
        }
      }
    }
    return {};
  }
  template <class Move>
  [[nodiscard]] codegemm::Status move_block(BlockId block, std::size_t size, Move&& move) const {
    if (block < 0 || block >= blocks_ || size != static_cast<std::size_t>(bytes_per_block())) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "PageStorage: ", size,
                             " bytes for block ", block, "; there are ", blocks_, " blocks of ",
                             bytes_per_block());
    }
    std::size_t at = 0;
    return for_each_run(shape_.block_tokens, [&](std::byte* base, const KvStrides& strides,
                                                 std::int64_t offset, std::size_t bytes) {
      const std::int64_t element = block * strides.block + offset;
      codegemm::Status status = move(base + element * bytes_of(format().element), at, bytes);
      at += bytes;
      return status;
    });
  }

  KvShape shape_;
  std::int64_t blocks_ = 0;
  std::vector<KvPages> layers_;
  Copy copy_;
};
static_assert(KvStorage<PageStorage<>>);

/// Writes K or V of one token, [kv_heads][head_dim] in fp32, into pages in host memory: divided by the scale,
/// rounded to nearest even. part: 0 is K, 1 is V.
inline void store_token(const KvPages& pages, BlockId block, int slot, int part,
                        std::span<const float> values) {
  CODEGEMM_ASSERT(std::ssize(values) == std::int64_t{pages.kv_heads} * pages.head_dim);
  const float scale = part == 0 ? pages.k_scale : pages.v_scale;
  for (int head = 0; head < pages.kv_heads; ++head) {
    const std::int64_t row = pages.strides.at(block, part, slot, head);
    for (int i = 0; i < pages.head_dim; ++i) {
      const float value = values[static_cast<std::size_t>(head) * static_cast<std::size_t>(pages.head_dim) +
                                 static_cast<std::size_t>(i)];
      store_element(pages.format.element, static_cast<std::byte*>(pages.base), row + i, value / scale);
    }
  }
}
/// And back.
inline void load_token(const KvPages& pages, BlockId block, int slot, int part, std::span<float> values) {
  CODEGEMM_ASSERT(std::ssize(values) == std::int64_t{pages.kv_heads} * pages.head_dim);
  const float scale = part == 0 ? pages.k_scale : pages.v_scale;
  for (int head = 0; head < pages.kv_heads; ++head) {
    const std::int64_t row = pages.strides.at(block, part, slot, head);
    for (int i = 0; i < pages.head_dim; ++i) {
      values[static_cast<std::size_t>(head) * static_cast<std::size_t>(pages.head_dim) +
             static_cast<std::size_t>(i)] =
          scale * load_element(pages.format.element, static_cast<const std::byte*>(pages.base), row + i);
    }
  }
}

}  // namespace prefillshare
