// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/forward.cuh - the Llama-family forward pass on the GPU, over a paged KV cache.
// Layer: model/cuda (host, needs nvcc).
// See: PrefillShare (arXiv 2602.12029) equations 2 to 4: (y, dC) = F(x, C_past).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <prefillshare/attention/append.cuh>
#include <prefillshare/attention/decode.cuh>
#include <prefillshare/attention/decode_append.cuh>
#include <prefillshare/attention/prefill.cuh>
#include <prefillshare/attention/prefill_split.cuh>
#include <prefillshare/kv/device_storage.cuh>
#include <prefillshare/model/after_layer.hpp>
#include <prefillshare/model/cuda/kernels/rms_norm.cuh>
#include <prefillshare/model/cuda/kernels/tokens.cuh>
#include <prefillshare/model/cuda/llama.cuh>
#include <prefillshare/model/cuda/workspace.cuh>

namespace prefillshare::cuda {

/// What a pass computes: new tokens of a batch of sequences, whose table already counts them. All arrays are
/// device memory, read when the kernels run, so that a captured pass may be replayed after they have changed.
struct DeviceBatch {
  const std::int32_t* tokens = nullptr;        ///< [count] ids, sequence after sequence
  std::int64_t count = 0;                      ///< of tokens
  const std::int32_t* query_indptr = nullptr;  ///< [sequences + 1] rows of each; null: one token a sequence
  PageTableView table;                         ///< the sequences' pages, with the new tokens
  SharedPrefixes prefixes;                     ///< what decoding sequences share; where query_indptr is null
  /// Where query_indptr is null: no sequence has more than some kFewKeys keys. Appending and attention are
  /// then one kernel, if there is one for the batch; of more keys two kernels are faster.
  bool few_keys = false;
  /// Where query_indptr is not null: contexts are so long that a pass of few tokens splits their keys over
  /// the card (prefill_split.cuh, whose splits_keys() says which are few).
  bool split_keys = false;
};

namespace detail {

/// One pass on its way into a stream, over a cache of type C.
template <class Linear, class Head, class C>
class DeviceForward {
 public:
  using T = typename Linear::Scalar;

  DeviceForward(const DeviceLlama<Linear, Head>& model, const DeviceBatch& batch,
                const DeviceKvStorage<C>& storage, DeviceWorkspace<T>& workspace, const Device& device,
                cudaStream_t stream)
      : model_(model), c_(model.config), batch_(batch), storage_(storage), ws_(workspace) {
    call_.device = device;
    call_.stream = stream;
    call_.zeroed = {workspace.zeroed.data(), workspace.zeroed.size()};
    call_.scratch = {workspace.scratch.data(), workspace.scratch.size()};
  }

  [[nodiscard]] Status embed() {
    EmbedArgs args;
    args.tokens = batch_.tokens;
    args.table = model_.embedding->data();
    args.out = ws_.hidden.data();
    args.width = static_cast<int>(c_.hidden_size);
    args.vocab = static_cast<int>(c_.vocab_size);
    return start(embed_kernel<T>, args, batch_.count, kEmbedThreads);
  }

  /// Which blocks read which keys, where these are dealt out: once for all layers.
  [[nodiscard]] Status prepare() {
    if (splitting()) {
      return prepare_split(prefill_problem(0), call_.device, ws_.attention.data(), ws_.attention.size(),
                           call_.stream);
    }
    if (!decoding() || at_once()) return {};
    return cuda::prepare(decode_problem(0), call_.device, ws_.attention.data(), ws_.attention.size(),
                         call_.stream);
  }

  /// Q, K and V of one layer; K and V to the cache. Where one kernel does both, attention too.
  [[nodiscard]] Status write_cache(int index) {
    const DeviceLlamaLayer<Linear>& l = layer(index);
    const auto to_qkv = [&](const auto& x) { return l.qkv.forward(x, qkv(), call_); };
    if (Status s = normalized(l.qkv, l.input_norm, batch_.count, nullptr, to_qkv); !s.ok()) return s;
    if (c_.qk_norm) {
      HeadNormArgs args;
      args.x = ws_.qkv.data();
      args.q_weight = l.q_norm.data();
      args.k_weight = l.k_norm.data();
      args.stride = qkv_width();
      args.rows = batch_.count;
      args.q_heads = static_cast<int>(c_.heads);
      args.k_heads = static_cast<int>(c_.kv_heads);
      args.head_dim = static_cast<int>(c_.head_dim);
      args.epsilon = static_cast<float>(c_.rms_epsilon);
      const std::int64_t warps = batch_.count * (c_.heads + c_.kv_heads);
      constexpr int kWarps = kHeadNormThreads / 32;
      if (Status s = start(head_norm_kernel<T>, args, (warps + kWarps - 1) / kWarps, kHeadNormThreads);
          !s.ok())
        return s;
    }
    if (at_once()) return cuda::run(append_and_attend(index), call_.device, call_.stream);
    return cuda::run(append_problem(index), call_.device, call_.stream);
  }

  [[nodiscard]] Status attend(int index) {
    if (at_once()) {
      // write_cache() did it.
    } else if (decoding()) {
      if (Status s = cuda::run(decode_problem(index), call_.device, ws_.attention.data(),
                               ws_.attention.size(), call_.stream);
          !s.ok()) {
        return s;
      }
    } else {
      const PrefillProblem<T, T, C> p = prefill_problem(index);
      const Status s =
          splitting() ? run_split(p, call_.device, ws_.attention.data(), ws_.attention.size(), call_.stream)
                      : cuda::run(p, call_.device, call_.stream);
      if (!s.ok()) return s;
    }
    return layer(index).o.add(MatrixView<const T>(ws_.attended.data(), batch_.count, c_.q_size()), hidden(),
                              call_);
  }

  [[nodiscard]] Status feed_forward(int index) {
    const DeviceLlamaLayer<Linear>& l = layer(index);
    const MatrixView<T> gated(ws_.gated.data(), batch_.count, c_.intermediate_size);
    const auto to_gated = [&](const auto& x) { return l.gate_up.gated(x, gated, call_); };
    if (Status s = normalized(l.gate_up, l.post_attention_norm, batch_.count, nullptr, to_gated); !s.ok())
      return s;
    return l.down.add(gated, hidden(), call_);
  }

  /// Those of each sequence's last token.
  [[nodiscard]] Status head(MatrixView<float> logits) {
    return normalized(model_.head, model_.final_norm, batch_.table.sequences, batch_.query_indptr,
                      [&](const auto& x) { return model_.head.project(x, logits, call_); });
  }

  /// Whether appending and attention of a layer are one kernel.
  [[nodiscard]] bool at_once() const {
    const bool shares = batch_.prefixes.groups > 0 && batch_.table.sequences > 1;
    return batch_.few_keys && decoding() && !shares && serves(append_and_attend(0), call_.device);
  }

 private:
  [[nodiscard]] bool decoding() const { return batch_.query_indptr == nullptr; }
  [[nodiscard]] const DeviceLlamaLayer<Linear>& layer(int index) const {
    return model_.layers[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] std::int64_t qkv_width() const { return c_.q_size() + 2 * c_.kv_size(); }
  [[nodiscard]] MatrixView<T> q() const { return {ws_.qkv.data(), batch_.count, c_.q_size(), qkv_width()}; }
  [[nodiscard]] MatrixView<T> qkv() const { return {ws_.qkv.data(), batch_.count, qkv_width()}; }
  [[nodiscard]] MatrixView<float> hidden() const { return {ws_.hidden.data(), batch_.count, c_.hidden_size}; }
  [[nodiscard]] MatrixView<const T> normed(std::int64_t rows) const {
    return {ws_.normed.data(), rows, c_.hidden_size};
  }
  [[nodiscard]] KvPages<C> pages(int index) const {
    const KvShape& shape = storage_.shape();
    auto out = kv_pages(storage_.layer(index), KvLayout::kNhd, static_cast<std::int32_t>(storage_.blocks()),
                        shape.block_tokens, shape.kv_heads, shape.head_dim);
    out.k_scale = storage_.scales(index).k;
    out.v_scale = storage_.scales(index).v;
    return out;
  }
  [[nodiscard]] bool splitting() const {
    return batch_.split_keys && !decoding() && splits_keys(prefill_problem(0), call_.device);
  }
  [[nodiscard]] AppendProblem<T, C> append_problem(int index) const {
    AppendProblem<T, C> p;
    p.kv = pages(index);
    p.table = batch_.table;
    p.query_indptr = batch_.query_indptr;
    p.q = q();
    p.k = MatrixView<const T>(ws_.qkv.data() + c_.q_size(), batch_.count, c_.kv_size(), qkv_width());
    p.v = MatrixView<const T>(ws_.qkv.data() + c_.q_size() + c_.kv_size(), batch_.count, c_.kv_size(),
                              qkv_width());
    p.heads = static_cast<int>(c_.heads);
    p.rope.frequencies = model_.rope_frequencies.data();
    p.rope.layout = c_.rope.layout;
    p.overlap = true;
    return p;
  }
  [[nodiscard]] DecodeAppendProblem<T, T, C> append_and_attend(int index) const {
    return {append_problem(index), MatrixView<T>(ws_.attended.data(), batch_.count, c_.q_size())};
  }
  [[nodiscard]] PrefillProblem<T, T, C> prefill_problem(int index) const {
    PrefillProblem<T, T, C> p;
    p.kv = pages(index);
    p.table = batch_.table;
    p.query_indptr = batch_.query_indptr;
    p.q = q();
    p.out = MatrixView<T>(ws_.attended.data(), batch_.count, c_.q_size());
    p.heads = static_cast<int>(c_.heads);
    return p;
  }
  [[nodiscard]] DecodeProblem<T, T, C> decode_problem(int index) const {
    DecodeProblem<T, T, C> p;
    p.kv = pages(index);
    p.table = batch_.table;
    p.prefixes = batch_.prefixes;
    p.q = q();
    p.out = MatrixView<T>(ws_.attended.data(), batch_.count, c_.q_size());
    p.heads = static_cast<int>(c_.heads);
    p.overlap = true;
    return p;
  }

  // multiply(the normalized rows of hidden, or each sequence's last): a layer that can normalizes one itself.
  template <class Layer, class Fn>
  [[nodiscard]] Status normalized(const Layer& layer, const DeviceArray<float>& weight, std::int64_t rows,
                                  const std::int32_t* row_ends, Fn&& multiply) {
    if constexpr (NormalizingLayer<Layer>) {
      if (row_ends == nullptr && layer.normalizes(rows, call_.device)) {
        return multiply(NormedRow{ws_.hidden.data(), weight.data(), static_cast<float>(c_.rms_epsilon)});
      }
    }
    if (Status s = norm(weight, rows, row_ends); !s.ok()) return s;
    return multiply(normed(rows));
  }

  // normed[i] = the normalized row i of hidden, or the last row of sequence i.
  [[nodiscard]] Status norm(const DeviceArray<float>& weight, std::int64_t rows,
                            const std::int32_t* row_ends) {
    RmsNormArgs args;
    args.x = ws_.hidden.data();
    args.weight = weight.data();
    args.out = ws_.normed.data();
    args.row_ends = row_ends;
    args.width = static_cast<int>(c_.hidden_size);
    args.epsilon = static_cast<float>(c_.rms_epsilon);
    return start(c_.hidden_size <= 8 * kRmsNormThreads ? rms_norm_kernel<T, 1> : rms_norm_kernel<T, 2>, args,
                 rows, kRmsNormThreads);
  }
  template <class Args>
  [[nodiscard]] Status start(void (*kernel)(Args), const Args& args, std::int64_t blocks, int threads) {
    return detail::start(kernel, args, dim3(static_cast<unsigned>(blocks)), threads, call_.device,
                         call_.stream);
  }

  const DeviceLlama<Linear, Head>& model_;
  const ModelConfig& c_;
  const DeviceBatch& batch_;
  const DeviceKvStorage<C>& storage_;
  DeviceWorkspace<T>& ws_;
  LinearCall call_;
};

}  // namespace detail

/// Puts a pass into the stream: KV of all tokens into the pages and, where asked, the logits of each
/// sequence's last token. logits.rows is 0 (none: a prefill module; the last layer then stops after its KV)
/// or table.sequences; logits.cols = vocab_size. After a layer's KV is in the stream, after_layer(layer) ->
/// Status is called, as IgnoreLayers says: it may record an event that a transport waits for. C, the cache's
/// type: the activations', or Fp8E4M3 with the storage's scales.
///
/// Errors, before anything is launched: kShapeMismatch for logits or a cache of another shape,
/// kInvalidArgument for more tokens or sequences than the workspace has room for; then those of the parts.
/// Looks at no device memory: ids outside of the vocabulary and tables that contradict themselves are the
/// caller's (assertions in debug builds of kernels).
template <class Linear, class Head, class C, class AfterLayer = IgnoreLayers>
[[nodiscard]] Status forward(const DeviceLlama<Linear, Head>& model, const DeviceBatch& batch,
                             const DeviceKvStorage<C>& storage, MatrixView<float> logits,
                             DeviceWorkspace<typename Linear::Scalar>& workspace, const Device& device,
                             cudaStream_t stream, AfterLayer&& after_layer = {}) {
  const ModelConfig& c = model.config;
  const std::int64_t sequences = batch.table.sequences;
  if (batch.count == 0) return {};
  if (batch.count < 0 || batch.count > workspace.max_tokens() || sequences < 1 ||
      sequences > workspace.max_sequences()) {
    return codegemm::error(StatusCode::kInvalidArgument, "forward of ", batch.count, " tokens of ", sequences,
                           " sequences in a workspace for ", workspace.max_tokens(), " of ",
                           workspace.max_sequences());
  }
  if (batch.tokens == nullptr) return codegemm::error(StatusCode::kNullPointer, "forward: tokens is null");
  if (batch.query_indptr == nullptr && batch.count != sequences) {
    return codegemm::error(StatusCode::kShapeMismatch, "forward of ", batch.count, " tokens of ", sequences,
                           " sequences without query_indptr, expected one each");
  }
  const KvShape& kv = storage.shape();
  if (kv.layers != c.layers || kv.kv_heads != c.kv_heads || kv.head_dim != c.head_dim) {
    return codegemm::error(StatusCode::kShapeMismatch, "forward over a cache of ", kv.layers, " layers, ",
                           kv.kv_heads, " K/V heads of ", kv.head_dim, "; the model has ", c.layers, ", ",
                           c.kv_heads, " of ", c.head_dim);
  }
  if (logits.rows != 0 && (logits.rows != sequences || logits.cols != c.vocab_size)) {
    return codegemm::error(StatusCode::kShapeMismatch, "logits are ", logits.rows, " x ", logits.cols,
                           ", the pass has ", sequences, " sequences and the vocabulary ", c.vocab_size);
  }
  detail::DeviceForward<Linear, Head, C> pass(model, batch, storage, workspace, device, stream);
  if (Status s = pass.prepare(); !s.ok()) return s;
  if (Status s = pass.embed(); !s.ok()) return s;
  for (int i = 0; i < static_cast<int>(c.layers); ++i) {
    if (Status s = pass.write_cache(i); !s.ok()) return s;
    if (Status s = after_layer(i); !s.ok()) return s;
    if (i + 1 == c.layers && logits.rows == 0) break;
    if (Status s = pass.attend(i); !s.ok()) return s;
    if (Status s = pass.feed_forward(i); !s.ok()) return s;
  }
  return logits.rows > 0 ? pass.head(logits) : Status();
}

}  // namespace prefillshare::cuda
