// SPDX-License-Identifier: Apache-2.0
//
// capi/codegemm_c_kv.cpp - the C API of the KV block allocator, over pages that are the engine's.
// Layer: capi (host only).
#include <codegemm_c.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include <capi/boundary.hpp>
#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/page_table.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/shape.hpp>
#include <prefillshare/kv/storage.hpp>

namespace {

using codegemm::Status;
using codegemm::StatusCode;
using codegemm::c_api::check_pointer;
using codegemm::c_api::check_struct;
using codegemm::c_api::guarded;

static_assert(sizeof(prefillshare::BlockId) == sizeof(int32_t));

/// The engine's pages, of which the allocator knows sizes, and whom to ask for a copy.
class EngineStorage {
 public:
  EngineStorage(const codegemm_c_kv_options& options, const prefillshare::KvShape& shape)
      : options_(options), shape_(shape) {}

  [[nodiscard]] const prefillshare::KvShape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::int64_t blocks() const noexcept { return options_.blocks; }
  [[nodiscard]] std::int64_t bytes_per_block() const noexcept {
    return shape_.bytes_per_block(options_.element_bytes);
  }
  [[nodiscard]] Status copy_block(prefillshare::BlockId destination, prefillshare::BlockId source,
                                  int tokens) {
    const int32_t refused = options_.copy_block(options_.context, destination, source, tokens);
    if (refused == 0) return {};
    return {StatusCode::kIoError,
            codegemm::concat("copy_block of ", tokens, " tokens from block ", source, " to block ",
                             destination, " returned ", refused),
            refused};
  }

 private:
  codegemm_c_kv_options options_;
  prefillshare::KvShape shape_;
};

using Allocator = prefillshare::BasicKvAllocator<EngineStorage, prefillshare::ChainHash,
                                                 prefillshare::LruEviction, std::mutex>;

// Lives as long as the handle or any sequence.
struct Inside {
  Inside(const codegemm_c_kv_options& options, const prefillshare::KvShape& shape)
      : storage(options, shape) {}

  EngineStorage storage;
  std::unique_ptr<Allocator> allocator;  // refers to the storage, so goes first
};

[[nodiscard]] Status check_count(const void* array, const char* name, std::int64_t count,
                                 const char* count_name) {
  if (count < 0) return codegemm::error(StatusCode::kInvalidArgument, count_name, " is ", count);
  return count > 0 ? check_pointer(array, name) : Status();
}

// Whether an array for results has room for what is to be written.
[[nodiscard]] Status check_room(const char* name, std::int64_t capacity, std::int64_t needed) {
  if (capacity >= needed) return {};
  return codegemm::error(StatusCode::kWorkspaceTooSmall, name, " has room for ", capacity,
                         " elements, there are ", needed);
}

}  // namespace

struct codegemm_c_kv {
  std::shared_ptr<Inside> inside;
};

struct codegemm_c_kv_sequence {
  std::shared_ptr<Inside> inside;
  prefillshare::Sequence sequence;  // gives its blocks back, so goes first
};

codegemm_c_status codegemm_c_kv_create(const codegemm_c_kv_options* options, codegemm_c_kv** kv) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(kv, "kv"); !s.ok()) return s;
    *kv = nullptr;
    if (Status s = check_struct(options, "options"); !s.ok()) return s;
    if (Status s = check_pointer(reinterpret_cast<const void*>(options->copy_block), "options: copy_block");
        !s.ok()) {
      return s;
    }
    const prefillshare::KvShape shape{options->layers, options->kv_heads, options->head_dim,
                                      options->block_tokens};
    if (Status s = prefillshare::validate(shape); !s.ok()) return s;
    if (options->element_bytes < 1 || options->element_bytes > 8 || options->reserved != 0) {
      return codegemm::error(StatusCode::kInvalidArgument, "options: element_bytes is ",
                             options->element_bytes, ", expected 1 to 8, reserved is ", options->reserved,
                             ", expected 0");
    }
    const std::int64_t block_bytes = shape.bytes_per_block(options->element_bytes);
    CODEGEMM_ASSERT(block_bytes > 0);  // and below 2^62, by validate()
    const std::int64_t most = std::min<std::int64_t>(std::numeric_limits<std::int32_t>::max() - 1,
                                                     std::numeric_limits<std::int64_t>::max() / block_bytes);
    if (options->blocks < 0 || options->blocks > most) {
      return codegemm::error(StatusCode::kInvalidArgument, "options: blocks is ", options->blocks,
                             ", expected 0 to ", most, " of ", block_bytes, " bytes");
    }
    auto inside = std::make_shared<Inside>(*options, shape);
    auto allocator = Allocator::create(inside->storage);
    if (!allocator.ok()) return allocator.status();
    inside->allocator = *std::move(allocator);
    *kv = std::make_unique<codegemm_c_kv>(codegemm_c_kv{std::move(inside)}).release();
    return {};
  });
}

void codegemm_c_kv_destroy(codegemm_c_kv* kv) { delete kv; }

codegemm_c_status codegemm_c_kv_open(codegemm_c_kv* kv, const char* model_id, const char* model_version,
                                     const char* tenant_salt, const int32_t* tokens, int64_t count,
                                     codegemm_c_kv_sequence** sequence, int64_t* matched) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(sequence, "sequence"); !s.ok()) return s;
    *sequence = nullptr;
    if (Status s = check_pointer(kv, "kv"); !s.ok()) return s;
    if (Status s = check_pointer(model_id, "model_id"); !s.ok()) return s;
    if (Status s = check_pointer(model_version, "model_version"); !s.ok()) return s;
    if (Status s = check_pointer(tenant_salt, "tenant_salt"); !s.ok()) return s;
    if (Status s = check_count(tokens, "tokens", count, "count"); !s.ok()) return s;
    auto handle = std::make_unique<codegemm_c_kv_sequence>();
    handle->inside = kv->inside;
    auto opened = kv->inside->allocator->open({model_id, model_version, tenant_salt},
                                              {tokens, static_cast<std::size_t>(count)});
    if (!opened.ok()) return opened.status();
    handle->sequence = *std::move(opened);
    if (matched != nullptr) *matched = handle->sequence.length();
    *sequence = handle.release();
    return {};
  });
}

codegemm_c_status codegemm_c_kv_reserve(codegemm_c_kv_sequence* sequence, int64_t extra_tokens) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(sequence, "sequence"); !s.ok()) return s;
    return sequence->inside->allocator->reserve(sequence->sequence, extra_tokens);
  });
}

codegemm_c_status codegemm_c_kv_commit(codegemm_c_kv_sequence* sequence, const int32_t* tokens,
                                       int64_t count) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(sequence, "sequence"); !s.ok()) return s;
    if (Status s = check_count(tokens, "tokens", count, "count"); !s.ok()) return s;
    return sequence->inside->allocator->commit(sequence->sequence, {tokens, static_cast<std::size_t>(count)});
  });
}

codegemm_c_status codegemm_c_kv_fork(const codegemm_c_kv_sequence* parent, codegemm_c_kv_sequence** fork) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(fork, "fork"); !s.ok()) return s;
    *fork = nullptr;
    if (Status s = check_pointer(parent, "parent"); !s.ok()) return s;
    auto handle = std::make_unique<codegemm_c_kv_sequence>();
    handle->inside = parent->inside;
    auto forked = parent->inside->allocator->fork(parent->sequence);
    if (!forked.ok()) return forked.status();
    handle->sequence = *std::move(forked);
    *fork = handle.release();
    return {};
  });
}

codegemm_c_status codegemm_c_kv_append_private(codegemm_c_kv_sequence* sequence, int64_t tokens) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(sequence, "sequence"); !s.ok()) return s;
    return sequence->inside->allocator->append_private(sequence->sequence, tokens);
  });
}

codegemm_c_status codegemm_c_kv_truncate(codegemm_c_kv_sequence* sequence, int64_t length) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(sequence, "sequence"); !s.ok()) return s;
    return sequence->inside->allocator->truncate(sequence->sequence, length);
  });
}

void codegemm_c_kv_release(codegemm_c_kv_sequence* sequence) { delete sequence; }

int64_t codegemm_c_kv_length(const codegemm_c_kv_sequence* sequence) {
  return codegemm::c_api::number_of(sequence, "sequence", [&] { return sequence->sequence.length(); });
}

int64_t codegemm_c_kv_reserved(const codegemm_c_kv_sequence* sequence) {
  return codegemm::c_api::number_of(sequence, "sequence", [&] { return sequence->sequence.reserved(); });
}

codegemm_c_status codegemm_c_kv_blocks(const codegemm_c_kv_sequence* sequence, int32_t* ids, int64_t capacity,
                                       int64_t* count) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(sequence, "sequence"); !s.ok()) return s;
    if (Status s = check_pointer(count, "count"); !s.ok()) return s;
    if (Status s = check_count(ids, "ids", capacity, "capacity"); !s.ok()) return s;
    const std::span<const prefillshare::BlockId> blocks = sequence->sequence.blocks();
    *count = std::ssize(blocks);
    std::copy_n(blocks.begin(), std::min(capacity, *count), ids);
    return check_room("ids", capacity, *count);
  });
}

codegemm_c_status codegemm_c_kv_page_table(const codegemm_c_kv_sequence* const* sequences, int64_t count,
                                           int32_t* indptr, int64_t indptr_capacity, int32_t* indices,
                                           int64_t indices_capacity, int32_t* last_page_len,
                                           int64_t last_page_len_capacity, int64_t* pages) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(pages, "pages"); !s.ok()) return s;
    if (Status s = check_count(sequences, "sequences", count, "count"); !s.ok()) return s;
    if (Status s = check_count(indptr, "indptr", indptr_capacity, "indptr_capacity"); !s.ok()) return s;
    if (Status s = check_count(indices, "indices", indices_capacity, "indices_capacity"); !s.ok()) return s;
    if (Status s =
            check_count(last_page_len, "last_page_len", last_page_len_capacity, "last_page_len_capacity");
        !s.ok()) {
      return s;
    }
    std::vector<const prefillshare::Sequence*> all;
    for (std::int64_t i = 0; i < count; ++i) {
      all.push_back(sequences[i] != nullptr ? &sequences[i]->sequence : nullptr);
    }
    prefillshare::PageTable table;
    if (Status s = prefillshare::export_page_table(all, table); !s.ok()) return s;
    *pages = std::ssize(table.indices);
    if (Status s = check_room("indptr", indptr_capacity, std::ssize(table.indptr)); !s.ok()) return s;
    if (Status s = check_room("indices", indices_capacity, *pages); !s.ok()) return s;
    if (Status s = check_room("last_page_len", last_page_len_capacity, count); !s.ok()) return s;
    std::copy(table.indptr.begin(), table.indptr.end(), indptr);
    std::copy(table.indices.begin(), table.indices.end(), indices);
    std::copy(table.last_page_len.begin(), table.last_page_len.end(), last_page_len);
    return {};
  });
}

codegemm_c_status codegemm_c_kv_get_stats(const codegemm_c_kv* kv, codegemm_c_kv_stats* stats) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(kv, "kv"); !s.ok()) return s;
    if (Status s = check_struct(stats, "stats"); !s.ok()) return s;
    const prefillshare::KvStats from = kv->inside->allocator->stats();
    stats->total_blocks = from.total_blocks;
    stats->free_blocks = from.free_blocks;
    stats->cached_blocks = from.cached_blocks;
    stats->in_use_blocks = from.in_use_blocks;
    stats->shared_blocks = from.shared_blocks;
    stats->private_blocks = from.private_blocks;
    stats->sequences = from.sequences;
    stats->bytes_per_block = from.bytes_per_block;
    stats->hit_tokens = from.hit_tokens;
    stats->miss_tokens = from.miss_tokens;
    stats->evicted_blocks = from.evicted_blocks;
    stats->merged_blocks = from.merged_blocks;
    stats->copied_blocks = from.copied_blocks;
    return {};
  });
}
