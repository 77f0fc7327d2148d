// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/rope.hpp - rotary position embedding, numerically as Hugging Face transformers
// does it.
// Layer: attention (host only).
// See: transformers, modeling_rope_utils.py (_compute_default_rope_parameters, _compute_linear_...,
// _compute_llama3_...)
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// How the frequencies were changed for longer contexts.
enum class RopeScaling {
  kNone,
  kLinear,  ///< all frequencies divided by factor
  kLlama3,  ///< low frequencies divided by factor, high ones kept, a smooth step between (Llama 3.1)
};

/// Which two elements of a head turn together.
enum class RopeLayout {
  kHalf,         ///< i and i + head_dim/2: Hugging Face's "rotate half"
  kInterleaved,  ///< 2i and 2i + 1: GGUF files of architecture "llama", whose Q and K rows are permuted so
};

/// Two modules can share a cache only if all of this agrees.
struct RopeConfig {
  int head_dim = 0;                                      ///< elements of a head, even
  double theta = 10000.0;                                ///< base of the frequencies
  RopeLayout layout = RopeLayout::kHalf;                 ///< which elements turn together
  RopeScaling scaling = RopeScaling::kNone;              ///< for longer contexts
  double factor = 1.0;                                   ///< linear, llama3
  double low_freq_factor = 1.0;                          ///< llama3
  double high_freq_factor = 4.0;                         ///< llama3
  std::int64_t original_max_position_embeddings = 8192;  ///< llama3

  /// All of it is equal.
  friend bool operator==(const RopeConfig&, const RopeConfig&) = default;
};

/// kInvalidArgument for numbers that cannot be, named in the text.
[[nodiscard]] inline codegemm::Status validate(const RopeConfig& config) {
  using codegemm::StatusCode;
  const auto wrong = [](const char* field, double value, const char* expected) {
    return codegemm::error(StatusCode::kInvalidArgument, "RopeConfig: ", field, " = ", value, ", expected ",
                           expected);
  };
  if (config.head_dim < 2 || config.head_dim % 2 != 0 || config.head_dim > 1 << 14) {
    return wrong("head_dim", config.head_dim, "an even number from 2 to 16384");
  }
  if (!(config.theta > 0.0) || !std::isfinite(config.theta))
    return wrong("theta", config.theta, "a positive number");
  if (config.scaling == RopeScaling::kNone) return {};
  if (!(config.factor > 0.0) || !std::isfinite(config.factor)) {
    return wrong("factor", config.factor, "a positive number");
  }
  if (config.scaling == RopeScaling::kLinear) return {};
  if (config.scaling != RopeScaling::kLlama3) {
    return codegemm::error(StatusCode::kUnsupported, "RopeConfig: scaling ",
                           static_cast<int>(config.scaling));
  }
  if (!(config.low_freq_factor > 0.0) || !std::isfinite(config.low_freq_factor)) {
    return wrong("low_freq_factor", config.low_freq_factor, "a positive number");
  }
  if (!(config.high_freq_factor > config.low_freq_factor) || !std::isfinite(config.high_freq_factor)) {
    return wrong("high_freq_factor", config.high_freq_factor, "more than low_freq_factor");
  }
  if (config.original_max_position_embeddings < 1) {
    return wrong("original_max_position_embeddings",
                 static_cast<double>(config.original_max_position_embeddings), "1 or more");
  }
  return {};
}

/// The frequency of pair `pair` in [0, head_dim / 2), in radians a position, rounded to fp32 at the places
/// where transformers rounds: it keeps all of this in float32 tensors, and at position 10^5 one unit in the
/// last place of a frequency near 1 is 0.006 radian.
[[nodiscard]] inline float rope_frequency(const RopeConfig& config, int pair) {
  const float exponent = static_cast<float>(2 * pair) / static_cast<float>(config.head_dim);
  const float plain = 1.0F / static_cast<float>(std::pow(config.theta, static_cast<double>(exponent)));
  const auto factor = static_cast<float>(config.factor);
  switch (config.scaling) {
    case RopeScaling::kNone: break;
    case RopeScaling::kLinear: return plain / factor;
    case RopeScaling::kLlama3: {
      const auto context = static_cast<double>(config.original_max_position_embeddings);
      const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / plain;
      if (wavelength > static_cast<float>(context / config.low_freq_factor)) return plain / factor;
      if (wavelength < static_cast<float>(context / config.high_freq_factor)) return plain;
      const float smooth =
          (static_cast<float>(context) / wavelength - static_cast<float>(config.low_freq_factor)) /
          static_cast<float>(config.high_freq_factor - config.low_freq_factor);
      return (1.0F - smooth) * plain / factor + smooth * plain;
    }
  }
  return plain;
}

/// cos and sin of every angle, made once and shared by all layers: [positions][head_dim / 2], fp32, of the
/// fp32 product of position and frequency.
class RopeTable {
 public:
  RopeTable() = default;  // of no positions

  /// kInvalidArgument, kUnsupported, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<RopeTable> create(const RopeConfig& config, std::int64_t positions) {
    if (codegemm::Status status = validate(config); !status.ok()) return status;
    if (positions < 0 || positions > std::int64_t{1} << 32) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "RopeTable: ", positions, " positions");
    }
    RopeTable table;
    table.config_ = config;
    table.positions_ = positions;
    const int pairs = config.head_dim / 2;
    const auto count = static_cast<std::size_t>(positions) * static_cast<std::size_t>(pairs);
    const bool allocated = detail::try_allocate([&] {
      table.cos_.resize(count);
      table.sin_.resize(count);
    });
    if (!allocated) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "RopeTable: no memory for ", positions,
                             " positions of ", pairs, " pairs");
    }
    for (int pair = 0; pair < pairs; ++pair) {
      const float frequency = rope_frequency(config, pair);
      for (std::int64_t position = 0; position < positions; ++position) {
        const float angle = static_cast<float>(position) * frequency;
        const auto at = static_cast<std::size_t>(position * pairs + pair);
        table.cos_[at] = static_cast<float>(std::cos(static_cast<double>(angle)));
        table.sin_[at] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
    return table;
  }

  [[nodiscard]] const RopeConfig& config() const noexcept { return config_; }  ///< what it was made of
  /// Positions 0 .. positions() - 1 are in the table.
  [[nodiscard]] std::int64_t positions() const noexcept { return positions_; }
  /// [head_dim / 2]
  [[nodiscard]] const float* cos(std::int64_t position) const {
    return cos_.data() + position * (config_.head_dim / 2);
  }
  /// [head_dim / 2]
  [[nodiscard]] const float* sin(std::int64_t position) const {
    return sin_.data() + position * (config_.head_dim / 2);
  }

  /// Turns x [T][heads * head_dim] in place; row t is at position first_position + t. For Q and for K.
  /// kNullPointer, kShapeMismatch (columns), kInvalidArgument (a position that the table does not have).
  [[nodiscard]] codegemm::Status apply(codegemm::MatrixView<float> x, std::int64_t first_position) const {
    using codegemm::StatusCode;
    if (x.rows == 0) return {};
    if (x.data == nullptr) return codegemm::error(StatusCode::kNullPointer, "RopeTable::apply: x is null");
    if (x.rows < 0 || x.cols < 0 || config_.head_dim == 0 || x.cols % config_.head_dim != 0 ||
        x.stride < x.cols) {
      return codegemm::error(StatusCode::kShapeMismatch, "RopeTable::apply: x is ", x.rows, " x ", x.cols,
                             " with stride ", x.stride, ", head_dim is ", config_.head_dim);
    }
    if (first_position < 0 || first_position > positions_ - x.rows) {
      return codegemm::error(StatusCode::kInvalidArgument, "RopeTable::apply: ", x.rows,
                             " tokens at position ", first_position, ", the table has ", positions_,
                             " positions");
    }
    for (std::int64_t t = 0; t < x.rows; ++t) {
      float* row = x.row(t);
      for (std::int64_t head = 0; head < x.cols; head += config_.head_dim) {
        if (config_.layout == RopeLayout::kHalf) {
          turn_half(row + head, cos(first_position + t), sin(first_position + t), config_.head_dim / 2);
        } else {
          turn_interleaved(row + head, cos(first_position + t), sin(first_position + t),
                           config_.head_dim / 2);
        }
      }
    }
    return {};
  }

 private:
  static void turn_half(float* head, const float* cos, const float* sin, std::int64_t pairs) {
    float* low = head;
    float* high = head + pairs;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const float a = low[i];
      const float b = high[i];
      low[i] = a * cos[i] - b * sin[i];
      high[i] = b * cos[i] + a * sin[i];
    }
  }
  static void turn_interleaved(float* head, const float* cos, const float* sin, std::int64_t pairs) {
    for (std::int64_t i = 0; i < pairs; ++i) {
      const float a = head[2 * i];
      const float b = head[2 * i + 1];
      head[2 * i] = a * cos[i] - b * sin[i];
      head[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  }

  RopeConfig config_;
  std::int64_t positions_ = 0;
  std::vector<float> cos_;
  std::vector<float> sin_;
};

}  // namespace prefillshare
