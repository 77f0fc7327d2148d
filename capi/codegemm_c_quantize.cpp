// SPDX-License-Identifier: Apache-2.0
//
// capi/codegemm_c_quantize.cpp - the C API: quantizing a matrix, with and without calibration.
// Layer: capi (host only).
#include <codegemm_c.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include <capi/boundary.hpp>
#include <capi/executor.hpp>
#include <capi/matrices.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantize/calibrated.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/quantized_matrix.hpp>

struct codegemm_c_quantized {
  codegemm::QuantizedMatrix matrix;
};

namespace {

using codegemm::Status;
using codegemm::StatusCode;
using codegemm::c_api::check_aligned;
using codegemm::c_api::check_pointer;
using codegemm::c_api::check_struct;
using codegemm::c_api::guarded;

[[nodiscard]] codegemm_c_quantize_options c_defaults() {
  const codegemm::CalibratedOptions own;
  codegemm_c_quantize_options out = {};
  out.struct_size = sizeof(out);
  out.seed = own.kmeans.seed;
  out.iterations = own.kmeans.iterations;
  out.training_rounds = own.kmeans.rounds;
  out.encode_rounds = own.kmeans.encode_rounds;
  out.refits = own.kmeans.refits;
  out.sample = own.kmeans.sample;
  out.rounds = own.rounds;
  out.beam = own.beam;
  out.codebook_steps = own.codebook_steps;
  out.tolerance = own.tolerance;
  out.damping = own.damping;
  return out;
}

[[nodiscard]] codegemm::CalibratedOptions options_of(const codegemm_c_quantize_options& options) {
  codegemm::CalibratedOptions out;
  out.kmeans.seed = options.seed;
  out.kmeans.iterations = options.iterations;
  out.kmeans.rounds = options.training_rounds;
  out.kmeans.encode_rounds = options.encode_rounds;
  out.kmeans.refits = options.refits;
  out.kmeans.sample = options.sample;
  out.rounds = options.rounds;
  out.beam = options.beam;
  out.codebook_steps = options.codebook_steps;
  out.tolerance = options.tolerance;
  out.damping = options.damping;
  if (options.progress != nullptr) {
    const auto tell = [call = options.progress, context = options.context](double share, double) {
      call(context, share);
    };
    out.progress = tell;
    out.kmeans.progress = [tell](double share) { tell(share, 0.0); };
  }
  return out;
}

}  // namespace

codegemm_c_status codegemm_c_quantize_defaults(codegemm_c_quantize_options* options) {
  return guarded([&]() -> Status {
    if (Status s = check_struct(options, "options"); !s.ok()) return s;
    *options = c_defaults();
    return {};
  });
}

codegemm_c_status codegemm_c_quantize(const float* weights, int64_t rows, int64_t cols, int64_t row_stride,
                                      const codegemm_c_format* format, const float* gram, int64_t gram_stride,
                                      const codegemm_c_quantize_options* options,
                                      codegemm_c_executor* executor, codegemm_c_quantized** quantized) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(quantized, "quantized"); !s.ok()) return s;
    *quantized = nullptr;
    if (Status s = check_pointer(format, "format"); !s.ok()) return s;
    if (Status s = check_pointer(executor, "executor"); !s.ok()) return s;
    codegemm_c_quantize_options told = c_defaults();
    if (options != nullptr) {
      if (Status s = check_struct(options, "options"); !s.ok()) return s;
      told = *options;
      if (told.reserved != 0) {
        return codegemm::error(StatusCode::kInvalidArgument, "options: reserved is ", told.reserved,
                               ", expected 0");
      }
    }
    const codegemm::Format own = codegemm::c_api::format_of(*format);
    if (const auto sizes = codegemm::c_api::sizes_of(own, rows, cols); !sizes.ok()) return sizes.status();
    if (rows > 0 && cols > 0) {
      if (Status s = check_pointer(weights, "weights"); !s.ok()) return s;
    }
    if (Status s = check_aligned(weights, alignof(float), "weights"); !s.ok()) return s;
    if (Status s = check_aligned(gram, alignof(float), "gram"); !s.ok()) return s;
    const codegemm::MatrixView<const float> w(weights, rows, cols, row_stride);
    const codegemm::CalibratedOptions how = options_of(told);
    const std::lock_guard turn(executor->turn);
    auto made = gram == nullptr ? codegemm::quantize_kmeans(w, own, how.kmeans, executor->pool)
                                : codegemm::quantize_calibrated(w, {gram, cols, cols, gram_stride}, own, how,
                                                                executor->pool);
    if (!made.ok()) return made.status();
    *quantized = std::make_unique<codegemm_c_quantized>(codegemm_c_quantized{*std::move(made)}).release();
    return {};
  });
}

codegemm_c_status codegemm_c_quantized_matrix(const codegemm_c_quantized* quantized,
                                              codegemm_c_matrix* matrix) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(quantized, "quantized"); !s.ok()) return s;
    if (Status s = check_struct(matrix, "matrix"); !s.ok()) return s;
    const codegemm::QuantizedMatrix& from = quantized->matrix;
    codegemm_c_matrix out = {};
    out.struct_size = sizeof(out);
    out.format = {from.format().v, from.format().m, from.format().b, from.format().g};
    out.rows = from.rows();
    out.cols = from.cols();
    out.codes = from.codes().data();
    out.codebooks = reinterpret_cast<const std::uint16_t*>(from.codebooks().data());
    out.scales = reinterpret_cast<const std::uint16_t*>(from.scales().data());
    out.code_words = static_cast<std::int64_t>(from.codes().size());
    out.codebook_values = static_cast<std::int64_t>(from.codebooks().size());
    out.scale_values = static_cast<std::int64_t>(from.scales().size());
    *matrix = out;
    return {};
  });
}

void codegemm_c_quantized_destroy(codegemm_c_quantized* quantized) { delete quantized; }
