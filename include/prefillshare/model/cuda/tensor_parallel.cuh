// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/tensor_parallel.cuh - linear layers of which each GPU of a group has a part: with
// them a DeviceLlama of a rank's config runs as ever, prefill, decode graph and all.
// Layer: model/cuda (host, needs nvcc and cuBLAS).
// See: Megatron-LM (arXiv 1909.08053) section 3; prefillshare/model/shard.hpp
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include <cuda_runtime.h>

#include <prefillshare/model/cuda/rank_group.cuh>
#include <prefillshare/model/cuda/upload.cuh>

namespace prefillshare::cuda {

/// A rank's part of a linear layer, of any kind. Cut along N (q, k, v, gate, up) it has outputs of its own,
/// and nothing is exchanged. Cut along K (o, down) the parts' products are summed, in fp32, as they are added
/// to the residual stream: the first rank adds its product to the stream, the others put theirs in its place,
/// and the sum over the ranks is the new stream on all of them. With one rank the plain layer's bits.
template <DeviceLinearLayer Inner, RankGroup Group>
class ParallelLinear {
 public:
  using Scalar = typename Inner::Scalar;  ///< of activations

  ParallelLinear() = default;

  /// A part of the outputs.
  [[nodiscard]] static ParallelLinear by_outputs(Inner layer) {
    ParallelLinear out;
    out.inner_ = std::move(layer);
    return out;
  }
  /// A part of the inputs. The group is the caller's and outlives it.
  [[nodiscard]] static ParallelLinear by_inputs(Inner layer, const Group& group) {
    ParallelLinear out;
    out.inner_ = std::move(layer);
    out.group_ = &group;
    return out;
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return inner_.rows(); }  ///< N of this part
  [[nodiscard]] std::int64_t cols() const noexcept { return inner_.cols(); }  ///< K of this part
  /// Of this part.
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept { return inner_.parameter_bytes(); }
  /// As DeviceLinearLayer says.
  [[nodiscard]] LinearMemory memory(std::int64_t tokens, const Device& device) const {
    return inner_.memory(tokens, device);
  }

  /// As DeviceLinearLayer says; kUnsupported for a part of the inputs, whose sums are fp32.
  [[nodiscard]] Status forward(MatrixView<const Scalar> x, MatrixView<Scalar> y,
                               const LinearCall& call) const {
    return group_ == nullptr ? inner_.forward(x, y, call) : no_sum("forward");
  }
  /// As DeviceLinearLayer says.
  [[nodiscard]] Status project(MatrixView<const Scalar> x, MatrixView<float> y,
                               const LinearCall& call) const {
    if (Status s = inner_.project(x, y, call); !s.ok() || group_ == nullptr) return s;
    return group_->sum(y, call.stream);
  }
  /// As DeviceLinearLayer says; `sum` holds the same on all ranks.
  [[nodiscard]] Status add(MatrixView<const Scalar> x, MatrixView<float> sum, const LinearCall& call) const {
    if (group_ == nullptr) return inner_.add(x, sum, call);
    Status s = group_->rank() == 0 ? inner_.add(x, sum, call) : inner_.project(x, sum, call);
    return s.ok() ? group_->sum(sum, call.stream) : s;
  }
  /// As DeviceLinearLayer says; kUnsupported for a part of the inputs.
  [[nodiscard]] Status gated(MatrixView<const Scalar> x, MatrixView<Scalar> y, const LinearCall& call) const {
    return group_ == nullptr ? inner_.gated(x, y, call) : no_sum("gated");
  }

 private:
  [[nodiscard]] Status no_sum(const char* what) const {
    return codegemm::error(StatusCode::kUnsupported, "ParallelLinear::", what, " of a layer cut along K, ",
                           rows(), " x ", cols(), ": its parts are summed in fp32 only");
  }

  Inner inner_;
  const Group* group_ = nullptr;  // of a part of the inputs
};

/// A rank's rows of the head; the logits of all ranks are gathered, so that each samples the same token.
/// Split rather than kept whole on each GPU: the head stays fp16, and reading all of it would take a fifth of
/// a step of a 70B model at 2 bits on two GPUs.
template <DeviceLinearLayer Inner, RankGroup Group>
class ParallelHead {
 public:
  using Scalar = typename Inner::Scalar;  ///< of activations

  ParallelHead() = default;
  /// `part` has vocab_size / ranks rows. The group is the caller's and outlives it.
  ParallelHead(Inner part, const Group& group)
      : inner_(std::move(part)), group_(&group), rank_(group.rank()), ranks_(group.ranks()) {}

  [[nodiscard]] std::int64_t rows() const noexcept { return inner_.rows() * ranks_; }  ///< of all parts
  [[nodiscard]] std::int64_t cols() const noexcept { return inner_.cols(); }           ///< K
  /// Of this part.
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept { return inner_.parameter_bytes(); }
  /// As DeviceLinearLayer says.
  [[nodiscard]] LinearMemory memory(std::int64_t tokens, const Device& device) const {
    return inner_.memory(tokens, device);
  }

  /// As DeviceLinearLayer says: all logits, on every rank.
  [[nodiscard]] Status project(MatrixView<const Scalar> x, MatrixView<float> y,
                               const LinearCall& call) const {
    const std::int64_t width = inner_.rows();
    if (y.cols != rows()) {
      return codegemm::error(StatusCode::kShapeMismatch, "ParallelHead of ", rows(), " rows: y has ", y.cols,
                             " columns");
    }
    const MatrixView<float> own(y.data + rank_ * width, y.rows, width, y.stride);
    if (Status s = inner_.project(x, own, call); !s.ok()) return s;
    return group_->gather(y, call.stream);
  }
  /// kUnsupported: a head projects.
  [[nodiscard]] Status forward(MatrixView<const Scalar>, MatrixView<Scalar>, const LinearCall&) const {
    return only_projects();
  }
  /// The same.
  [[nodiscard]] Status add(MatrixView<const Scalar>, MatrixView<float>, const LinearCall&) const {
    return only_projects();
  }
  /// The same.
  [[nodiscard]] Status gated(MatrixView<const Scalar>, MatrixView<Scalar>, const LinearCall&) const {
    return only_projects();
  }

 private:
  [[nodiscard]] static Status only_projects() {
    return codegemm::error(StatusCode::kUnsupported, "ParallelHead only projects");
  }

  Inner inner_;
  const Group* group_ = nullptr;
  int rank_ = 0;
  int ranks_ = 1;
};

/// Makes a rank's layers for DeviceLlamaBuilder out of those that shard_layer() has cut. The group is the
/// caller's and outlives the model.
template <class Uploader, RankGroup Group>
class ParallelUploader {
 public:
  using Linear = ParallelLinear<typename Uploader::Linear, Group>;  ///< what is made

  /// Layers are uploaded by `upload`.
  ParallelUploader(Uploader upload, const Group& group) : upload_(std::move(upload)), group_(&group) {}

  /// Parts of the outputs.
  template <class HostLinear>
  [[nodiscard]] Result<Linear> operator()(std::span<const HostLinear* const> parts) const {
    auto made = upload_(parts);
    if (!made.ok()) return made.status();
    return Linear::by_outputs(std::move(made).value());
  }
  /// A part of the inputs, whose product is summed over the ranks.
  template <class HostLinear>
  [[nodiscard]] Result<Linear> summed(std::span<const HostLinear* const> parts) const {
    auto made = upload_(parts);
    if (!made.ok()) return made.status();
    return Linear::by_inputs(std::move(made).value(), *group_);
  }

 private:
  Uploader upload_;
  const Group* group_;
};

/// The same for the head, of which shard_outputs() has cut this rank's rows.
template <class Uploader, RankGroup Group>
class ParallelHeadUploader {
 public:
  using Linear = ParallelHead<typename Uploader::Linear, Group>;  ///< what is made

  /// The head is uploaded by `upload`.
  ParallelHeadUploader(Uploader upload, const Group& group) : upload_(std::move(upload)), group_(&group) {}

  /// This rank's rows.
  template <class HostLinear>
  [[nodiscard]] Result<Linear> operator()(std::span<const HostLinear* const> parts) const {
    auto made = upload_(parts);
    if (!made.ok()) return made.status();
    return Linear(std::move(made).value(), *group_);
  }

 private:
  Uploader upload_;
  const Group* group_;
};

}  // namespace prefillshare::cuda
