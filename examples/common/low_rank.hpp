// SPDX-License-Identifier: Apache-2.0
//
// common/low_rank.hpp - deltas of low rank that make a specialist out of a base: kept in a small file, merged
// into a decode module.
// Layer: examples (host only).
#pragma once

#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <codegemm/base/numerics.hpp>
#include <codegemm/base/quoted.hpp>
#include <codegemm/io/safetensors.hpp>
#include <codegemm/io/safetensors_writer.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

namespace prefillshare::examples {

/// What decode modules that were made of deltas are quantized to: 4 bits, and a scale for 64 weights.
inline constexpr const char* kSpecialistFormat = "m1v2g64";

/// What is added to one linear layer's weights: scale * B A.
struct LowRankDelta {
  std::string name;       // of the layer: "model.layers.3.mlp.up_proj"
  std::int64_t rank = 0;  // at least 1
  float scale = 1.0F;     // alpha / rank
  std::vector<float> a;   // [rank][K]
  std::vector<float> b;   // [N][rank]
};

/// A task's deltas and the base that they belong to.
struct Specialist {
  std::string task;
  std::string base;  // the fingerprint of LoadedModel
  std::vector<LowRankDelta> deltas;
};

namespace detail {

inline constexpr std::string_view kSpecialistKind = "low-rank deltas of a decode module, version 1";
inline constexpr std::int64_t kMostSpecialistRank = 256;

/// The values of a tensor in fp16. kCorruptData for another type or shape, or a value that is not finite.
[[nodiscard]] inline Result<std::vector<float>> read_halves(const codegemm::SafetensorsFile& file,
                                                            const std::string& name,
                                                            const std::vector<std::int64_t>& shape) {
  const codegemm::SafetensorsTensor* const tensor = file.find(name);
  if (tensor == nullptr)
    return error(StatusCode::kCorruptData, file.name(), ": has no tensor ", codegemm::quoted(name));
  if (tensor->dtype != codegemm::Dtype::kF16 || tensor->shape != shape) {
    return error(StatusCode::kCorruptData, file.name(), ": tensor ", codegemm::quoted(name), " is ",
                 codegemm::to_string(tensor->dtype), " ", codegemm::shape_text(tensor->shape),
                 ", must be F16 ", codegemm::shape_text(shape));
  }
  std::vector<codegemm::Half> halves(tensor->data.size() / sizeof(codegemm::Half));
  if (!halves.empty()) std::memcpy(halves.data(), tensor->data.data(), tensor->data.size());
  std::vector<float> out;
  out.reserve(halves.size());
  for (const codegemm::Half half : halves) {
    out.push_back(half.to_float());
    if (!std::isfinite(out.back()))
      return error(StatusCode::kCorruptData, file.name(), ": tensor ", codegemm::quoted(name),
                   " holds a value that is not finite");
  }
  return out;
}

}  // namespace detail

/// Writes deltas in fp16, whole or not at all. kInvalidArgument for a value that fp16 cannot hold, and errors
/// of write_safetensors().
[[nodiscard]] inline Status write_specialist(const std::string& path, const Specialist& specialist) {
  std::vector<codegemm::SafetensorsTensor> tensors;
  std::deque<std::vector<codegemm::Half>> kept;
  float scale = 1.0F;
  for (const LowRankDelta& delta : specialist.deltas) {
    scale = delta.scale;
    const auto add = [&](const char* part, const std::vector<float>& values,
                         std::vector<std::int64_t> shape) {
      std::vector<codegemm::Half>& halves = kept.emplace_back();
      for (const float value : values) {
        halves.push_back(codegemm::Half::from_float(value));
        if (!std::isfinite(halves.back().to_float())) return false;
      }
      tensors.push_back(
          {delta.name + part, codegemm::Dtype::kF16, std::move(shape), std::as_bytes(std::span(halves))});
      return true;
    };
    const std::int64_t rank = delta.rank;
    if (rank < 1 || delta.scale != specialist.deltas.front().scale ||
        !add(".lora_A.weight", delta.a, {rank, static_cast<std::int64_t>(delta.a.size()) / rank}) ||
        !add(".lora_B.weight", delta.b, {static_cast<std::int64_t>(delta.b.size()) / rank, rank})) {
      return error(StatusCode::kInvalidArgument, path, ": the delta of ", delta.name, " is of rank ", rank,
                   " and scale ", delta.scale, ", or fp16 cannot hold its values");
    }
  }
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(scale));
  const codegemm::SafetensorsText texts[] = {{"kind", std::string(detail::kSpecialistKind)},
                                             {"task", specialist.task},
                                             {"base", specialist.base},
                                             {"scale", text}};
  return codegemm::write_safetensors(path, tensors, texts);
}

/// Reads deltas for a base of that content. Every layer of the blocks that the file names must be one of the
/// base's, of its shape; others of the base stay as they are. kIncompatible for deltas of another base or a
/// file of another kind; kCorruptData names the tensor that is missing, too much or wrong.
[[nodiscard]] inline Result<Specialist> read_specialist(const std::string& path,
                                                        const LlamaModel<DenseLinear>& base,
                                                        const std::string& fingerprint) {
  const Result<codegemm::SafetensorsFile> file = codegemm::SafetensorsFile::open(path);
  if (!file.ok()) return file.status();
  const auto text = [&](const char* key) {
    const std::string* const found = file->find_metadata(key);
    return found != nullptr ? *found : std::string();
  };
  if (text("kind") != detail::kSpecialistKind)
    return error(StatusCode::kIncompatible, path, ": is of the kind ", codegemm::quoted(text("kind")),
                 ", must be ", codegemm::quoted(detail::kSpecialistKind));
  Specialist out{text("task"), text("base"), {}};
  if (out.base != fingerprint) {
    return error(StatusCode::kIncompatible, path, ": belongs to the base ", codegemm::quoted(out.base),
                 ", this one is ", codegemm::quoted(fingerprint));
  }
  const std::string written = text("scale");
  float scale = 0.0F;
  const auto [stop, failed] = std::from_chars(written.data(), written.data() + written.size(), scale);
  if (failed != std::errc() || stop != written.data() + written.size() || !std::isfinite(scale))
    return error(StatusCode::kCorruptData, path, ": 'scale' is ", codegemm::quoted(written));
  std::size_t used = 0;
  Status wrong;
  for_each_linear(base, [&](const std::string& name, const DenseLinear& layer) {
    const codegemm::SafetensorsTensor* const a = file->find(name + ".lora_A.weight");
    if (!wrong.ok() || a == nullptr || name == "lm_head") return;
    const std::int64_t rank = a->shape.empty() ? 0 : a->shape.front();
    if (rank < 1 || rank > detail::kMostSpecialistRank) {
      wrong = error(StatusCode::kCorruptData, path, ": tensor ", codegemm::quoted(a->name), " is of rank ",
                    rank, ", must be 1..", detail::kMostSpecialistRank);
      return;
    }
    Result<std::vector<float>> left = detail::read_halves(*file, a->name, {rank, layer.cols()});
    Result<std::vector<float>> right =
        detail::read_halves(*file, name + ".lora_B.weight", {layer.rows(), rank});
    wrong = !left.ok() ? left.status() : right.status();
    if (!wrong.ok()) return;
    out.deltas.push_back({name, rank, scale, *std::move(left), *std::move(right)});
    used += 2;
  });
  if (!wrong.ok()) return wrong;
  if (out.deltas.empty() || used != file->tensors().size()) {
    return error(StatusCode::kCorruptData, path, ": ", used, " of its ", file->tensors().size(),
                 " tensors belong to layers of the base");
  }
  return out;
}

/// The base with the deltas added to its weights: a decode module of its own. kNotFound and kShapeMismatch
/// name the layer.
[[nodiscard]] inline Result<std::shared_ptr<const LlamaModel<DenseLinear>>> merge(
    const LlamaModel<DenseLinear>& base, std::span<const LowRankDelta> deltas) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  std::map<std::string_view, const LowRankDelta*> by_name;
  for (const LowRankDelta& delta : deltas) by_name.emplace(delta.name, &delta);
  auto out = std::make_shared<LlamaModel<DenseLinear>>(base);
  std::size_t used = 0;
  Status wrong;
  for_each_linear(*out, [&](const std::string& name, DenseLinear& layer) {
    const auto at = by_name.find(name);
    if (!wrong.ok() || at == by_name.end()) return;
    const LowRankDelta& delta = *at->second;
    if (delta.rank < 1 || std::ssize(delta.a) != delta.rank * layer.cols() ||
        std::ssize(delta.b) != layer.rows() * delta.rank) {
      wrong =
          error(StatusCode::kShapeMismatch, name, " is ", layer.rows(), " x ", layer.cols(),
                ", its delta has ", delta.b.size(), " and ", delta.a.size(), " values of rank ", delta.rank);
      return;
    }
    auto values = std::make_shared<std::vector<float>>(*layer.shared_weights());
    Eigen::Map<Matrix>(values->data(), layer.rows(), layer.cols()).noalias() +=
        delta.scale * (Eigen::Map<const Matrix>(delta.b.data(), layer.rows(), delta.rank) *
                       Eigen::Map<const Matrix>(delta.a.data(), delta.rank, layer.cols()));
    layer = DenseLinear(std::move(values), layer.rows(), layer.cols(),
                        std::vector<float>(layer.bias().begin(), layer.bias().end()));
    ++used;
  });
  if (!wrong.ok()) return wrong;
  if (used != by_name.size() || used != deltas.size()) {
    return error(StatusCode::kNotFound, "merge: ", deltas.size(), " deltas, only ", used,
                 " of them are of layers of the base");
  }
  return std::shared_ptr<const LlamaModel<DenseLinear>>(std::move(out));
}

}  // namespace prefillshare::examples
