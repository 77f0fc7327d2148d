// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/block.cuh - one block of a Llama-family decoder over a batch of segments on the
// GPU: forward with its activations kept, and backward.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <prefillshare/model/cuda/kernels/tokens.cuh>
#include <prefillshare/train/cuda/attention.cuh>
#include <prefillshare/train/cuda/trainable.cuh>
#include <prefillshare/train/cuda/weights.cuh>

namespace prefillshare::cuda::detail {

/// The rows that a block computes with, on the device.
struct DeviceRows {
  std::int64_t rows = 0;
  const std::int32_t* positions = nullptr;  // [rows]
  const float* cos = nullptr;               // [positions][head_dim / 2]
  const float* sin = nullptr;               // the same
  const std::int32_t* kv_rows = nullptr;    // [rows], of a cache that all keys are read from; or null
  DeviceAttentionTiles tiles;
};

/// One layer's keys (after RoPE) and values that somebody else made.
template <class S>
struct LayerPrefix {
  const S* keys = nullptr;    // [cache rows][stride]
  const S* values = nullptr;  // the same
  std::int64_t stride = 0;
};

/// What a block's forward pass writes and its backward pass reads.
template <class S>
struct BlockActivations {
  float* x = nullptr;          // [rows][hidden], its input
  float* mid = nullptr;        // [rows][hidden], behind attention
  S* normed = nullptr;         // [rows][hidden]
  S* raw = nullptr;            // [rows][q + 2 kv], before the head norms; qkv without these
  S* qkv = nullptr;            // [rows][q + 2 kv]
  S* attended = nullptr;       // [rows][q]
  float* lse = nullptr;        // [rows][heads], or null: no backward pass
  S* normed2 = nullptr;        // [rows][hidden]
  S* both = nullptr;           // [rows][2 * intermediate], gate and up
  S* act = nullptr;            // [rows][intermediate]
  S* keys = nullptr;           // where attention reads keys: in qkv, or a cache
  S* values = nullptr;         // the same
  std::int64_t kv_stride = 0;  // of keys and values
};

/// What a pass needs besides, for one block at a time.
template <class S>
struct BlockScratch {
  S* y = nullptr;               // [rows][hidden], what a block adds last
  S* d_act = nullptr;           // [rows][intermediate]
  S* d_normed = nullptr;        // [rows][hidden]
  S* d_attended = nullptr;      // [rows][q]
  S* d_qkv = nullptr;           // [rows][q + 2 kv]
  float* delta = nullptr;       // [rows][heads]
  float* bias_parts = nullptr;  // [kColumnParts][q + 2 kv]
};

/// Rows of one block, each launch in `ts`.
template <class S>
class BlockLaunches {
 public:
  BlockLaunches(TrainStream& ts, const ModelConfig& c, const DeviceRows& rows) : ts_(ts), c_(c), r_(rows) {}

  /// sum = x + delta where delta is given; out = its norm where out is given.
  void norm(const float* x, const S* delta, float* sum, const float* weight, S* out) {
    NormArgs args;
    args.x = x;
    args.delta = delta;
    args.sum = sum;
    args.weight = weight;
    args.out = out;
    args.rows = r_.rows;
    norm(args);
  }
  void norm(NormArgs args) {
    args.width = static_cast<int>(c_.hidden_size);
    args.epsilon = static_cast<float>(c_.rms_epsilon);
    const std::int64_t blocks = narrow() ? (args.rows + kRowsOfBlock - 1) / kRowsOfBlock : args.rows;
    with_norm_shape(
        [&](auto warps, auto pairs) { ts_.start(norm_kernel<S, warps, pairs>, args, blocks, kNormThreads); });
  }
  /// The blocks, and so the parts, of a backward norm over `rows`.
  [[nodiscard]] int norm_parts(std::int64_t rows) const {
    const std::int64_t of_block = narrow() ? kRowsOfBlock : 1;
    return static_cast<int>(std::min<std::int64_t>(kNormParts, (rows + of_block - 1) / of_block));
  }
  void norm_backward(NormBackwardArgs args) {
    args.width = static_cast<int>(c_.hidden_size);
    args.epsilon = static_cast<float>(c_.rms_epsilon);
    with_norm_shape([&](auto warps, auto pairs) {
      ts_.start(norm_backward_kernel<S, warps, pairs>, args, norm_parts(args.rows), kNormThreads);
    });
  }

  /// Q, K and V of normed; `a` says where they go.
  void project(const DeviceBlockWeights<S>& w, const BlockActivations<S>& a) {
    ts_.nt(a.normed, w.qkv, a.raw, r_.rows, width(), c_.hidden_size);
    HeadsArgs args;
    args.shape = shape(w);
    args.in = a.raw;
    args.q = a.qkv;
    args.q_stride = width();
    args.k = a.keys;
    args.v = a.values;
    args.kv_stride = a.kv_stride;
    args.kv_rows = r_.kv_rows;
    if (turns_alone(args.shape)) {
      turn(args, 1.0F, a.keys != a.qkv + c_.q_size());
      return;
    }
    const std::int64_t heads = r_.rows * (c_.heads + 2 * c_.kv_heads);
    ts_.start(heads_kernel<S>, args, (heads + kHeadWarps - 1) / kHeadWarps, kHeadThreads);
  }

  /// From Q, K and V to what the block adds last, in scratch.y; its output is mid + y.
  void finish(const DeviceBlockWeights<S>& w, const BlockActivations<S>& a, const BlockScratch<S>& scratch,
              const LayerPrefix<S>& prefix) {
    attend<S>(ts_, attention(a, prefix), r_.tiles);
    ts_.nt(a.attended, w.o, scratch.y, r_.rows, c_.hidden_size, c_.q_size());
    norm(a.x, scratch.y, a.mid, w.post_attention_norm, a.normed2);
    ts_.nt(a.normed2, w.gate_up, a.both, r_.rows, 2 * c_.intermediate_size, c_.hidden_size);
    SwiGluArgs args;
    args.both = a.both;
    args.out = a.act;
    args.rows = r_.rows;
    args.out_stride = c_.intermediate_size;
    args.width = static_cast<int>(c_.intermediate_size);
    ts_.start(swiglu_kernel<S>, args,
              (r_.rows * (c_.intermediate_size / 8) + kColumnThreads - 1) / kColumnThreads, kColumnThreads);
    ts_.nt(a.act, w.down, scratch.y, r_.rows, c_.hidden_size, c_.intermediate_size);
  }

  /// dx[rows][hidden], with its copy dx_low in S, goes from the gradient of the block's output to that of its
  /// input; the weights' are added to g. `norm_sums`: parts of both norms' gradients, kNormParts of each, or
  /// null; `head_sums`: of the head norms', or null. Uses a.both up.
  void backward(const DeviceBlockWeights<S>& w, const DeviceBlockGradients& g, const BlockActivations<S>& a,
                const BlockScratch<S>& scratch, const LayerPrefix<S>& prefix, float* dx, S* dx_low,
                float* norm_sums, float* head_sums) {
    const std::int64_t rows = r_.rows;
    const std::int64_t h = c_.hidden_size;
    const std::int64_t wide = c_.intermediate_size;
    ts_.tn(dx_low, a.act, g.down, rows, h, wide);
    ts_.nn(dx_low, w.down, scratch.d_act, rows, h, wide);
    SwiGluBackwardArgs swiglu;
    swiglu.d = scratch.d_act;
    swiglu.both = a.both;
    swiglu.rows = rows;
    swiglu.width = static_cast<int>(wide);
    ts_.start(swiglu_backward_kernel<S>, swiglu, (rows * (wide / 8) + kElementThreads - 1) / kElementThreads,
              kElementThreads);
    ts_.tn(a.both, a.normed2, g.gate_up, rows, 2 * wide, h);
    ts_.nn(a.both, w.gate_up, scratch.d_normed, rows, 2 * wide, h);
    NormBackwardArgs norm;
    norm.x = a.mid;
    norm.weight = w.post_attention_norm;
    norm.dy = scratch.d_normed;
    norm.dx = dx;
    norm.dx_low = low_of(dx, dx_low);
    norm.parts = norm_sums == nullptr ? nullptr : norm_sums + kNormParts * h;
    norm.rows = rows;
    norm.add = true;
    norm_backward(norm);

    ts_.tn(dx_low, a.attended, g.o, rows, h, c_.q_size());
    ts_.nn(dx_low, w.o, scratch.d_attended, rows, h, c_.q_size());
    AttentionArgs attention_args = attention(a, prefix);
    attention_args.dout = scratch.d_attended;
    attention_args.dq = scratch.d_qkv;
    attention_args.dk = scratch.d_qkv + c_.q_size();
    attention_args.dv = scratch.d_qkv + c_.q_size() + c_.kv_size();
    attention_args.delta = scratch.delta;
    attend_backward<S>(ts_, attention_args, r_.tiles);
    heads_backward(w, a, scratch, head_sums);
    if (g.qkv_bias != nullptr) column_sums(scratch.d_qkv, rows, width(), scratch.bias_parts, g.qkv_bias);
    ts_.tn(scratch.d_qkv, a.normed, g.qkv, rows, width(), h);
    ts_.nn(scratch.d_qkv, w.qkv, scratch.d_normed, rows, width(), h);
    norm.x = a.x;
    norm.weight = w.input_norm;
    norm.parts = norm_sums;
    norm_backward(norm);
  }

  /// out[groups][width] += the parts of each group, in order; `stride` parts lie between groups.
  void add_parts(const float* parts, std::int64_t groups, int stride, int count, std::int64_t width,
                 float* out) {
    AddPartsArgs args;
    args.parts = parts;
    args.out = out;
    args.stride = stride;
    args.count = count;
    args.width = static_cast<int>(width);
    ts_.start(add_parts_kernel<0>, args,
              dim3(static_cast<unsigned>((width + kAddPartsThreads - 1) / kAddPartsThreads),
                   static_cast<unsigned>(groups)),
              kAddPartsThreads);
  }

  [[nodiscard]] int head_parts() const {
    const std::int64_t warps = r_.rows * (c_.heads + c_.kv_heads);
    return static_cast<int>(std::min<std::int64_t>((warps + kHeadWarps - 1) / kHeadWarps, kHeadParts));
  }

 private:
  static constexpr std::int64_t kRowsOfBlock = kNormThreads / 32;

  [[nodiscard]] bool narrow() const { return c_.hidden_size <= kNormWarpWidth; }
  /// body(warps of a row, pairs of a thread).
  template <class Body>
  void with_norm_shape(Body&& body) const {
    using std::integral_constant;
    if (c_.hidden_size <= 64 * kNormFewPairs) {
      body(integral_constant<int, 1>{}, integral_constant<int, kNormFewPairs>{});
    } else if (narrow()) {
      body(integral_constant<int, 1>{}, integral_constant<int, kNormPairs>{});
    } else {
      body(integral_constant<int, kNormThreads / 32>{}, integral_constant<int, kNormPairs>{});
    }
  }
  [[nodiscard]] std::int64_t width() const { return c_.q_size() + 2 * c_.kv_size(); }
  /// Where S is fp32 the copy is the gradient itself.
  [[nodiscard]] static void* low_of(float* dx, S* dx_low) {
    return static_cast<const void*>(dx) == static_cast<const void*>(dx_low) ? nullptr : dx_low;
  }

  void heads_backward(const DeviceBlockWeights<S>& w, const BlockActivations<S>& a,
                      const BlockScratch<S>& scratch, float* head_sums) {
    if (turns_alone(shape(w))) {
      HeadsArgs args;
      args.shape = shape(w);
      args.in = args.q = scratch.d_qkv;
      args.k = scratch.d_qkv + c_.q_size();
      args.q_stride = args.kv_stride = width();
      turn(args, -1.0F, false);
      return;
    }
    HeadsBackwardArgs args;
    args.shape = shape(w);
    args.raw = a.raw;
    args.d = scratch.d_qkv;
    args.parts = head_sums;
    const std::int64_t warps = r_.rows * (c_.heads + c_.kv_heads);
    const std::int64_t blocks = (warps + kHeadWarps - 1) / kHeadWarps;
    ts_.start(heads_backward_kernel<S>, args,
              c_.qk_norm ? std::min<std::int64_t>(blocks, kHeadParts) : blocks, kHeadThreads);
  }
  void turn(const HeadsArgs& heads, float direction, bool values) {
    TurnArgs args;
    args.heads = heads;
    args.direction = direction;
    args.values = values;
    const std::int64_t threads = r_.rows * (c_.heads + (values ? 2 : 1) * c_.kv_heads) * (c_.head_dim / 16);
    ts_.start(turn_kernel<S>, args, (threads + kHeadThreads - 1) / kHeadThreads, kHeadThreads);
  }

  [[nodiscard]] HeadsShape shape(const DeviceBlockWeights<S>& w) const {
    HeadsShape s;
    s.bias = w.qkv_bias;
    s.q_norm = w.q_norm;
    s.k_norm = w.k_norm;
    s.cos = r_.cos;
    s.sin = r_.sin;
    s.positions = r_.positions;
    s.rows = r_.rows;
    s.heads = static_cast<int>(c_.heads);
    s.kv_heads = static_cast<int>(c_.kv_heads);
    s.head_dim = static_cast<int>(c_.head_dim);
    s.epsilon = static_cast<float>(c_.rms_epsilon);
    s.half = c_.rope.layout == RopeLayout::kHalf;
    return s;
  }
  [[nodiscard]] AttentionArgs attention(const BlockActivations<S>& a, const LayerPrefix<S>& prefix) const {
    AttentionArgs args;
    args.q = a.qkv;
    args.k = r_.kv_rows == nullptr ? a.keys : nullptr;
    args.v = r_.kv_rows == nullptr ? a.values : nullptr;
    args.prefix_k = prefix.keys;
    args.prefix_v = prefix.values;
    args.stride = width();
    args.kv_stride = a.kv_stride;
    args.prefix_stride = prefix.stride;
    args.out = a.attended;
    args.lse = a.lse;
    args.rows = r_.rows;
    args.heads = static_cast<int>(c_.heads);
    args.kv_heads = static_cast<int>(c_.kv_heads);
    args.head_dim = static_cast<int>(c_.head_dim);
    return args;
  }
  void column_sums(const S* d, std::int64_t rows, std::int64_t width, float* parts, float* out) {
    ColumnSumsArgs args;
    args.d = d;
    args.parts = parts;
    args.rows = rows;
    args.width = static_cast<int>(width);
    ts_.start(column_sums_kernel<S>, args,
              dim3(static_cast<unsigned>((width + kAddPartsThreads - 1) / kAddPartsThreads), kColumnParts),
              kAddPartsThreads);
    add_parts(parts, 1, kColumnParts, kColumnParts, width, out);
  }

  TrainStream& ts_;
  const ModelConfig& c_;
  const DeviceRows& r_;
};

}  // namespace prefillshare::cuda::detail
