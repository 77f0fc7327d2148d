// SPDX-License-Identifier: Apache-2.0
//
// capi/codegemm_c.cpp - the C API: version, errors, formats, packing (CPU and GPU), the product on the CPU.
// Layer: capi (host only).
#include <codegemm_c.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>

#include <capi/boundary.hpp>
#include <capi/executor.hpp>
#include <capi/matrices.hpp>
#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/base/text.hpp>
#include <codegemm/base/weight_arena.hpp>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/format.hpp>
#include <codegemm/gemm.hpp>
#include <codegemm/pack.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <codegemm/version.hpp>

namespace {

using codegemm::Status;
using codegemm::StatusCode;
using codegemm::c_api::check_aligned;
using codegemm::c_api::check_pointer;
using codegemm::c_api::check_struct;
using codegemm::c_api::guarded;

// The numbers of the header are the library's.
constexpr bool same(int c, StatusCode code) { return c == static_cast<int>(code); }
static_assert(same(CODEGEMM_C_OK, StatusCode::kOk));
static_assert(same(CODEGEMM_C_INVALID_ARGUMENT, StatusCode::kInvalidArgument));
static_assert(same(CODEGEMM_C_SHAPE_MISMATCH, StatusCode::kShapeMismatch));
static_assert(same(CODEGEMM_C_NULL_POINTER, StatusCode::kNullPointer));
static_assert(same(CODEGEMM_C_MISALIGNED, StatusCode::kMisaligned));
static_assert(same(CODEGEMM_C_WORKSPACE_TOO_SMALL, StatusCode::kWorkspaceTooSmall));
static_assert(same(CODEGEMM_C_UNSUPPORTED, StatusCode::kUnsupported));
static_assert(same(CODEGEMM_C_NOT_FOUND, StatusCode::kNotFound));
static_assert(same(CODEGEMM_C_IO_ERROR, StatusCode::kIoError));
static_assert(same(CODEGEMM_C_CORRUPT_DATA, StatusCode::kCorruptData));
static_assert(same(CODEGEMM_C_EXHAUSTED, StatusCode::kExhausted));
static_assert(same(CODEGEMM_C_INCOMPATIBLE, StatusCode::kIncompatible));
static_assert(same(CODEGEMM_C_CANCELLED, StatusCode::kCancelled));
static_assert(same(CODEGEMM_C_CUDA_ERROR, StatusCode::kCudaError));
static_assert(same(CODEGEMM_C_OUT_OF_MEMORY, StatusCode::kOutOfMemory));
static_assert(CODEGEMM_C_WORKSPACE_ALIGNMENT == codegemm::kBufferAlignment);
static_assert(CODEGEMM_C_CUDA_MAX_PARTS == codegemm::cuda::kMaxParts);

// What callers have compiled in. A change of any of these is another ABI.
#if defined(__LP64__)
static_assert(sizeof(codegemm_c_format) == 16);
static_assert(sizeof(codegemm_c_matrix) == 88 && offsetof(codegemm_c_matrix, scale_values) == 80);
static_assert(sizeof(codegemm_c_cuda_weights) == 88 && offsetof(codegemm_c_cuda_weights, data) == 80);
static_assert(sizeof(codegemm_c_cuda_problem) == 96 && offsetof(codegemm_c_cuda_problem, flags) == 92);
static_assert(sizeof(codegemm_c_quantize_options) == 88 &&
              offsetof(codegemm_c_quantize_options, context) == 80);
static_assert(sizeof(codegemm_c_kv_options) == 56 && offsetof(codegemm_c_kv_options, context) == 48);
static_assert(sizeof(codegemm_c_kv_stats) == 112 && offsetof(codegemm_c_kv_stats, copied_blocks) == 104);
#endif

#define CODEGEMM_C_TEXT(x) CODEGEMM_C_TEXT_OF(x)
#define CODEGEMM_C_TEXT_OF(x) #x
constexpr char kVersion[] = CODEGEMM_C_TEXT(CODEGEMM_VERSION_MAJOR) "." CODEGEMM_C_TEXT(
    CODEGEMM_VERSION_MINOR) "." CODEGEMM_C_TEXT(CODEGEMM_VERSION_PATCH);

// Formats and shapes of parts to be merged for the GPU; the first has to be looked at before there is a
// format.
[[nodiscard]] codegemm::Result<codegemm::cuda::PackedLayout> layout_of(const codegemm_c_matrix* matrices,
                                                                       std::int32_t count) {
  if (Status s = check_pointer(matrices, "matrices"); !s.ok()) return s;
  if (count < 1 || count > CODEGEMM_C_CUDA_MAX_PARTS) {
    return codegemm::error(StatusCode::kUnsupported, "cuda pack: ", count, " matrices, but 1 to ",
                           CODEGEMM_C_CUDA_MAX_PARTS, " can be merged");
  }
  std::array<std::int64_t, CODEGEMM_C_CUDA_MAX_PARTS> part_rows = {};
  const codegemm::Format format = codegemm::c_api::format_of(matrices[0].format);
  for (std::int32_t i = 0; i < count; ++i) {
    const codegemm_c_matrix& part = matrices[i];
    const std::string name = codegemm::concat("matrices[", i, "]");
    if (Status s = check_struct(&part, name.c_str()); !s.ok()) return s;
    const codegemm::Format own = codegemm::c_api::format_of(part.format);
    if (auto sizes = codegemm::c_api::sizes_of(own, part.rows, part.cols); !sizes.ok()) {
      return sizes.status().with_prefix(name);
    }
    if (own != format) {
      return codegemm::error(StatusCode::kInvalidArgument, name, " is ", format_name(own),
                             ", matrices[0] is ", format_name(format));
    }
    if (part.cols != matrices[0].cols) {
      return codegemm::error(StatusCode::kShapeMismatch, name, " has K = ", part.cols,
                             ", matrices[0] has K = ", matrices[0].cols);
    }
    part_rows[static_cast<std::size_t>(i)] = part.rows;
  }
  return codegemm::cuda::packed_layout(format, {part_rows.data(), static_cast<std::size_t>(count)},
                                       matrices[0].cols);
}

[[nodiscard]] Status check_tokens(std::int64_t tokens) {
  if (tokens < 0) return codegemm::error(StatusCode::kInvalidArgument, "tokens is ", tokens);
  if (tokens > CODEGEMM_C_MAX_TOKENS) {
    return codegemm::error(StatusCode::kUnsupported, "tokens is ", tokens, ", but at most ",
                           CODEGEMM_C_MAX_TOKENS, " go in one call");
  }
  return {};
}

}  // namespace

struct codegemm_c_packed {
  codegemm::PackedMatrix matrix;
};

struct codegemm_c_arena {
  codegemm::WeightArena memory;
};

namespace {

// A new handle of what `pack` makes of the matrix.
template <class Pack>
Status pack_by(const codegemm_c_matrix* matrix, codegemm_c_packed** packed, Pack&& pack) {
  if (Status s = check_pointer(packed, "packed"); !s.ok()) return s;
  *packed = nullptr;
  if (Status s = check_struct(matrix, "matrix"); !s.ok()) return s;
  const auto view = codegemm::c_api::view_of(*matrix, "matrix");
  if (!view.ok()) return view.status();
  auto made = pack(*view);
  if (!made.ok()) return made.status();
  *packed = std::make_unique<codegemm_c_packed>(codegemm_c_packed{*std::move(made)}).release();
  return {};
}

}  // namespace

// ---- Version and errors.

uint32_t codegemm_c_abi_version(void) { return CODEGEMM_C_ABI_VERSION; }

const char* codegemm_c_version(void) { return kVersion; }

const char* codegemm_c_status_name(codegemm_c_status status) {
  if (status == CODEGEMM_C_INTERNAL_ERROR) return "internal error";
  return codegemm::to_string(static_cast<StatusCode>(status)).data();  // of a literal: ends with 0
}

const char* codegemm_c_last_error(void) { return codegemm::c_api::last_error().text; }

int32_t codegemm_c_last_native_error(void) { return codegemm::c_api::last_error().native; }

// ---- Formats.

codegemm_c_status codegemm_c_parse_format(const char* name, codegemm_c_format* format) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(name, "name"); !s.ok()) return s;
    if (Status s = check_pointer(format, "format"); !s.ok()) return s;
    const auto parsed = codegemm::parse_format(name);
    if (!parsed.ok()) return parsed.status();
    *format = {parsed->v, parsed->m, parsed->b, parsed->g};
    return {};
  });
}

codegemm_c_status codegemm_c_format_name(const codegemm_c_format* format, char* name, size_t capacity) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(format, "format"); !s.ok()) return s;
    if (Status s = check_pointer(name, "name"); !s.ok()) return s;
    const codegemm::Format own = codegemm::c_api::format_of(*format);
    if (Status s = codegemm::validate(own); !s.ok()) return s;
    const std::string text = codegemm::format_name(own);
    if (capacity <= text.size()) {
      return codegemm::error(StatusCode::kWorkspaceTooSmall, "capacity is ", capacity, ", \"", text,
                             "\" needs ", text.size() + 1);
    }
    std::memcpy(name, text.c_str(), text.size() + 1);
    return {};
  });
}

codegemm_c_status codegemm_c_validate_format(const codegemm_c_format* format) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(format, "format"); !s.ok()) return s;
    return codegemm::validate(codegemm::c_api::format_of(*format));
  });
}

// ---- Quantized matrices.

codegemm_c_status codegemm_c_canonical_sizes(const codegemm_c_format* format, int64_t rows, int64_t cols,
                                             int64_t* code_words, int64_t* codebook_values,
                                             int64_t* scale_values) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(format, "format"); !s.ok()) return s;
    if (Status s = check_pointer(code_words, "code_words"); !s.ok()) return s;
    if (Status s = check_pointer(codebook_values, "codebook_values"); !s.ok()) return s;
    if (Status s = check_pointer(scale_values, "scale_values"); !s.ok()) return s;
    const auto sizes = codegemm::c_api::sizes_of(codegemm::c_api::format_of(*format), rows, cols);
    if (!sizes.ok()) return sizes.status();
    *code_words = sizes->code_words;
    *codebook_values = sizes->codebook_values;
    *scale_values = sizes->scale_values;
    return {};
  });
}

codegemm_c_status codegemm_c_validate_matrix(const codegemm_c_matrix* matrix) {
  return guarded([&]() -> Status {
    if (Status s = check_struct(matrix, "matrix"); !s.ok()) return s;
    const auto view = codegemm::c_api::view_of(*matrix, "matrix");
    return view.ok() ? codegemm::validate(*view) : view.status();
  });
}

// ---- The product on the CPU.

codegemm_c_status codegemm_c_pack(const codegemm_c_matrix* matrix, codegemm_c_packed** packed) {
  return guarded([&] {
    return pack_by(matrix, packed,
                   [](const codegemm::QuantizedMatrixView& view) { return codegemm::pack(view); });
  });
}

codegemm_c_status codegemm_c_arena_create(codegemm_c_arena** arena) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(arena, "arena"); !s.ok()) return s;
    *arena = nullptr;
    *arena = std::make_unique<codegemm_c_arena>().release();
    return {};
  });
}

void codegemm_c_arena_destroy(codegemm_c_arena* arena) { delete arena; }

codegemm_c_status codegemm_c_pack_in(const codegemm_c_matrix* matrix, codegemm_c_arena* arena,
                                     codegemm_c_packed** packed) {
  return guarded([&] {
    return pack_by(
        matrix, packed,
        [&](const codegemm::QuantizedMatrixView& view) -> codegemm::Result<codegemm::PackedMatrix> {
          if (Status s = check_pointer(arena, "arena"); !s.ok()) return s;
          return codegemm::pack(view, arena->memory);
        });
  });
}

void codegemm_c_packed_destroy(codegemm_c_packed* packed) { delete packed; }

int64_t codegemm_c_packed_rows(const codegemm_c_packed* packed) {
  return codegemm::c_api::number_of(packed, "packed", [&] { return packed->matrix.rows(); });
}

int64_t codegemm_c_packed_cols(const codegemm_c_packed* packed) {
  return codegemm::c_api::number_of(packed, "packed", [&] { return packed->matrix.cols(); });
}

int64_t codegemm_c_packed_bytes(const codegemm_c_packed* packed) {
  return codegemm::c_api::number_of(packed, "packed",
                                    [&] { return static_cast<std::int64_t>(packed->matrix.bytes()); });
}

codegemm_c_status codegemm_c_executor_create(int32_t threads, codegemm_c_executor** executor) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(executor, "executor"); !s.ok()) return s;
    *executor = nullptr;
    if (threads < 0 || threads > CODEGEMM_C_MAX_THREADS) {
      return codegemm::error(StatusCode::kInvalidArgument, "threads is ", threads, ", expected 0 to ",
                             CODEGEMM_C_MAX_THREADS);
    }
    *executor = std::make_unique<codegemm_c_executor>(threads).release();
    return {};
  });
}

void codegemm_c_executor_destroy(codegemm_c_executor* executor) { delete executor; }

int32_t codegemm_c_executor_threads(const codegemm_c_executor* executor) {
  return codegemm::c_api::number_of(executor, "executor",
                                    [&] { return static_cast<std::int32_t>(executor->pool.workers()); });
}

codegemm_c_status codegemm_c_workspace_bytes(const codegemm_c_packed* packed, int64_t tokens, int32_t threads,
                                             size_t* bytes) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(packed, "packed"); !s.ok()) return s;
    if (Status s = check_pointer(bytes, "bytes"); !s.ok()) return s;
    if (Status s = check_tokens(tokens); !s.ok()) return s;
    if (threads < 1 || threads > CODEGEMM_C_MAX_THREADS) {
      return codegemm::error(threads < 1 ? StatusCode::kInvalidArgument : StatusCode::kUnsupported,
                             "threads is ", threads, ", expected 1 to ", CODEGEMM_C_MAX_THREADS);
    }
    *bytes = codegemm::workspace_bytes(packed->matrix, tokens, threads);
    return {};
  });
}

codegemm_c_status codegemm_c_gemm(const codegemm_c_packed* packed, int64_t tokens, const float* x,
                                  int64_t x_stride, float* y, int64_t y_stride, void* workspace,
                                  size_t workspace_bytes, codegemm_c_executor* executor) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(packed, "packed"); !s.ok()) return s;
    if (Status s = check_pointer(executor, "executor"); !s.ok()) return s;
    if (Status s = check_tokens(tokens); !s.ok()) return s;
    if (Status s = check_aligned(x, alignof(float), "x"); !s.ok()) return s;
    if (Status s = check_aligned(y, alignof(float), "y"); !s.ok()) return s;
    const codegemm::PackedMatrix& w = packed->matrix;
    const std::span<std::byte> room(static_cast<std::byte*>(workspace), workspace_bytes);
    const std::lock_guard turn(executor->turn);
    return codegemm::gemm(w, {x, tokens, w.cols(), x_stride}, {y, tokens, w.rows(), y_stride}, room,
                          executor->pool);
  });
}

// ---- Packing for the GPU, which needs none.

codegemm_c_status codegemm_c_cuda_pack_bytes(const codegemm_c_matrix* matrices, int32_t count,
                                             size_t* bytes) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(bytes, "bytes"); !s.ok()) return s;
    const auto layout = layout_of(matrices, count);
    if (!layout.ok()) return layout.status();
    *bytes = layout->bytes;
    return {};
  });
}

codegemm_c_status codegemm_c_cuda_pack(const codegemm_c_matrix* matrices, int32_t count, void* buffer,
                                       size_t buffer_bytes, codegemm_c_cuda_weights* weights) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(buffer, "buffer"); !s.ok()) return s;
    if (Status s = check_struct(weights, "weights"); !s.ok()) return s;
    const auto layout = layout_of(matrices, count);
    if (!layout.ok()) return layout.status();
    std::array<codegemm::QuantizedMatrixView, CODEGEMM_C_CUDA_MAX_PARTS> views = {};
    codegemm_c_cuda_weights out = {};
    for (std::int32_t i = 0; i < count; ++i) {
      const auto view = codegemm::c_api::view_of(matrices[i], codegemm::concat("matrices[", i, "]"));
      if (!view.ok()) return view.status();
      views[static_cast<std::size_t>(i)] = *view;
      out.part_rows[i] = view->rows;
    }
    if (buffer_bytes < layout->bytes) {
      return codegemm::error(StatusCode::kWorkspaceTooSmall, "buffer has ", buffer_bytes,
                             " bytes, the weights need ", layout->bytes);
    }
    const auto packed = codegemm::cuda::pack({views.data(), static_cast<std::size_t>(count)});
    if (!packed.ok()) return packed.status();
    const codegemm::cuda::DevicePackedView view = packed->view(nullptr);
    out.struct_size = sizeof(out);
    out.layout_version = view.version;
    out.parts = count;
    out.format = matrices[0].format;
    out.cols = view.cols;
    out.sets = view.layout.sets;
    out.unscale = view.unscale;
    std::memcpy(buffer, packed->bytes().data(), packed->bytes().size());
    *weights = out;
    return {};
  });
}

codegemm_c_status codegemm_c_cuda_weights_bytes(const codegemm_c_cuda_weights* weights, size_t* bytes) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(bytes, "bytes"); !s.ok()) return s;
    if (Status s = check_struct(weights, "weights"); !s.ok()) return s;
    const auto view = codegemm::c_api::device_view_of(*weights);
    if (!view.ok()) return view.status();
    *bytes = view->layout.bytes;
    return {};
  });
}
