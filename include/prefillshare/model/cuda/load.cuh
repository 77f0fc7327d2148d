// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/load.cuh - a dense model from its files to the device, some rows at a time: the
// host never holds a copy of it.
// Layer: model/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/llama.cuh>

namespace prefillshare::cuda {

/// A model's tensors by the names that Hugging Face gives them, rows in the order of rotate-half RoPE; files
/// that are mapped, mostly.
///   info(name)                     Result of something with rows and cols; a vector is one row
///   read_rows(name, first, n, out) rows first .. first + n - 1 as fp32 into out[n][cols]
template <class S>
concept WeightSource = requires(const S& source, std::string_view name, std::int64_t rows, float* out) {
  { source.info(name)->rows } -> std::convertible_to<std::int64_t>;
  { source.info(name)->cols } -> std::convertible_to<std::int64_t>;
  { source.read_rows(name, rows, rows, out) } -> std::same_as<Status>;
};

/// Matrices of fp32 on their way to the device: a part is read and rounded in page-locked memory while the
/// part before it is copied. Movable; one thread at a time. T: __half or __nv_bfloat16.
template <class T>
class WeightStream {
 public:
  /// Parts of up to `values` values; copies are put into the stream. kInvalidArgument, kOutOfMemory,
  /// kCudaError.
  [[nodiscard]] static Result<WeightStream> create(std::int64_t values, cudaStream_t stream) {
    if (values < 1 || values > (std::int64_t{1} << 32)) {
      return codegemm::error(StatusCode::kInvalidArgument, "WeightStream: parts of ", values, " values");
    }
    using codegemm::cuda::cuda_status;
    WeightStream out;
    out.stream_ = stream;
    const auto size = static_cast<std::size_t>(values);
    if (!prefillshare::detail::try_allocate([&] { out.read_.resize(size); })) {
      return codegemm::error(StatusCode::kOutOfMemory, "WeightStream: no memory for ", values, " values");
    }
    for (Slot& slot : out.slots_) {
      void* host = nullptr;
      if (Status s = cuda_status(cudaMallocHost(&host, size * sizeof(T)), "cudaMallocHost"); !s.ok())
        return s;
      slot.host = static_cast<T*>(host);
      if (Status s =
              cuda_status(cudaEventCreateWithFlags(&slot.sent, cudaEventDisableTiming), "cudaEventCreate");
          !s.ok()) {
        return s;
      }
    }
    return out;
  }
  /// `other` is empty then.
  WeightStream(WeightStream&& other) noexcept { swap(other); }
  /// `other` gets what was here.
  WeightStream& operator=(WeightStream&& other) noexcept {
    swap(other);
    return *this;
  }
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;
  ~WeightStream() {
    for (Slot& slot : slots_) {
      if (slot.sent != nullptr) {
        static_cast<void>(cudaEventSynchronize(slot.sent));
        cudaEventDestroy(slot.sent);
      }
      cudaFreeHost(slot.host);
    }
  }

  /// [rows][cols] to device memory at `to`, which stands when the stream gets there.
  /// read(first, count, float* out) -> Status gives rows. kInvalidArgument for a row longer than a part;
  /// errors of read(); kCudaError.
  template <class Read>
  [[nodiscard]] Status put(T* to, std::int64_t rows, std::int64_t cols, Read&& read) {
    using codegemm::cuda::cuda_status;
    const std::int64_t most = cols > 0 ? std::ssize(read_) / cols : 0;
    if (rows < 0 || most < 1) {
      return codegemm::error(StatusCode::kInvalidArgument, "WeightStream: ", rows, " rows of ", cols,
                             " values, parts have ", read_.size());
    }
    for (std::int64_t first = 0; first < rows; first += most) {
      const std::int64_t count = std::min(most, rows - first);
      const auto size = static_cast<std::size_t>(count * cols);
      if (Status s = read(first, count, read_.data()); !s.ok()) return s;
      Slot& slot = slots_[next_];
      next_ = 1 - next_;
      if (Status s = cuda_status(cudaEventSynchronize(slot.sent), "cudaEventSynchronize"); !s.ok()) return s;
      for (std::size_t i = 0; i < size; ++i) slot.host[i] = static_cast<T>(read_[i]);
      if (Status s = cuda_status(cudaMemcpyAsync(to + first * cols, slot.host, size * sizeof(T),
                                                 cudaMemcpyHostToDevice, stream_),
                                 "cudaMemcpyAsync");
          !s.ok()) {
        return s;
      }
      if (Status s = cuda_status(cudaEventRecord(slot.sent, stream_), "cudaEventRecord"); !s.ok()) return s;
    }
    return {};
  }

 private:
  struct Slot {
    T* host = nullptr;  // page-locked
    cudaEvent_t sent = nullptr;
  };

  WeightStream() = default;
  void swap(WeightStream& other) noexcept {
    std::swap(stream_, other.stream_);
    std::swap(read_, other.read_);
    std::swap(slots_, other.slots_);
    std::swap(next_, other.next_);
  }

  cudaStream_t stream_ = nullptr;
  std::vector<float> read_;
  std::array<Slot, 2> slots_;
  std::size_t next_ = 0;
};

namespace detail {

/// Reads tensors by name, keeps the first error and goes on as if nothing was: the caller looks once.
template <class T, WeightSource Source>
class DeviceLoader {
 public:
  DeviceLoader(const Source& source, WeightStream<T>& stream, std::shared_ptr<Cublas> cublas)
      : source_(source), stream_(stream), cublas_(std::move(cublas)) {}

  [[nodiscard]] const Status& status() const noexcept { return status_; }

  /// Matrices of so many columns, one after the other.
  struct Part {
    std::string name;
    std::int64_t rows;
  };
  [[nodiscard]] std::shared_ptr<const DeviceArray<T>> matrix(std::span<const Part> parts, std::int64_t cols) {
    std::int64_t rows = 0;
    for (const Part& part : parts) rows += part.rows;
    auto out = DeviceArray<T>::create(static_cast<std::size_t>(rows * cols));
    keep(out.status());
    if (!status_.ok()) return nullptr;
    std::int64_t at = 0;
    for (const Part& part : parts) {
      if (!expect(part.name, part.rows, cols)) return nullptr;
      keep(stream_.put(out->data() + at * cols, part.rows, cols,
                       [&](std::int64_t first, std::int64_t count, float* to) {
                         return source_.read_rows(part.name, first, count, to);
                       }));
      at += part.rows;
    }
    return std::make_shared<const DeviceArray<T>>(std::move(out).value());
  }
  [[nodiscard]] std::vector<float> vector(const std::string& name, std::int64_t size) {
    std::vector<float> out;
    if (!expect(name, 1, size)) return out;
    out.resize(static_cast<std::size_t>(size));
    keep(source_.read_rows(name, 0, 1, out.data()));
    return out;
  }
  [[nodiscard]] DeviceArray<float> norm(const std::string& name, std::int64_t size) {
    const std::vector<float> values = vector(name, size);
    if (!status_.ok()) return {};
    auto out = DeviceArray<float>::copy_of(values);
    keep(out.status());
    return out.ok() ? std::move(out).value() : DeviceArray<float>();
  }
  /// Parts named without ".weight" and ".bias".
  [[nodiscard]] DeviceDenseLinear<T> linear(std::initializer_list<Part> parts, std::int64_t cols, bool bias) {
    std::vector<Part> weights;
    std::vector<float> offsets;
    std::int64_t rows = 0;
    for (const Part& part : parts) {
      weights.push_back({part.name + ".weight", part.rows});
      rows += part.rows;
      if (!bias) continue;
      const std::vector<float> values = vector(part.name + ".bias", part.rows);
      offsets.insert(offsets.end(), values.begin(), values.end());
    }
    return linear(matrix(weights, cols), rows, cols, offsets);
  }
  [[nodiscard]] DeviceDenseLinear<T> linear(std::shared_ptr<const DeviceArray<T>> weights, std::int64_t rows,
                                            std::int64_t cols, std::span<const float> bias = {}) {
    if (!status_.ok()) return {};
    auto out = DeviceDenseLinear<T>::create(cublas_, std::move(weights), rows, cols, bias);
    keep(out.status());
    return out.ok() ? std::move(out).value() : DeviceDenseLinear<T>();
  }
  void keep(const Status& status) {
    if (status_.ok()) status_ = status;
  }

 private:
  [[nodiscard]] bool expect(const std::string& name, std::int64_t rows, std::int64_t cols) {
    if (!status_.ok()) return false;
    const auto info = source_.info(name);
    keep(info.status());
    if (status_.ok() && (info->rows != rows || info->cols != cols)) {
      keep(codegemm::error(StatusCode::kShapeMismatch, "tensor ", name, " is ", info->rows, " x ", info->cols,
                           ", the config needs ", rows, " x ", cols));
    }
    return status_.ok();
  }

  const Source& source_;
  WeightStream<T>& stream_;
  std::shared_ptr<Cublas> cublas_;
  Status status_;
};

}  // namespace detail

/// A dense model from `source` to the current device, rounded to T as upload() does. Host memory: three parts
/// of `part_values` values (the widest row at least), whatever the model's size. Returns when everything is
/// there. Errors: of the source; kShapeMismatch with the tensor; kOutOfMemory, kCudaError.
template <class T, WeightSource Source>
[[nodiscard]] auto load_dense(const ModelConfig& config, const Source& source, std::shared_ptr<Cublas> cublas,
                              cudaStream_t stream, std::int64_t part_values = std::int64_t{1} << 22)
    -> Result<std::shared_ptr<const DeviceLlama<DeviceDenseLinear<T>>>> {
  using Model = DeviceLlama<DeviceDenseLinear<T>>;
  const ModelConfig& c = config;
  if (Status s = prefillshare::validate(c); !s.ok()) return s;
  const std::int64_t widest = std::max({c.hidden_size, c.intermediate_size, c.q_size()});
  auto parts = WeightStream<T>::create(std::max(part_values, widest), stream);
  if (!parts.ok()) return parts.status();
  detail::DeviceLoader<T, Source> load(source, *parts, std::move(cublas));
  auto out = std::make_shared<Model>();
  out->config = c;
  const typename detail::DeviceLoader<T, Source>::Part table{"model.embed_tokens.weight", c.vocab_size};
  out->embedding = load.matrix(std::span(&table, 1), c.hidden_size);
  for (std::int64_t i = 0; i < c.layers && load.status().ok(); ++i) {
    DeviceLlamaLayer<DeviceDenseLinear<T>>& layer = out->layers.emplace_back();
    const std::string prefix = codegemm::concat("model.layers.", i, ".");
    const std::string attention = prefix + "self_attn.";
    const std::string mlp = prefix + "mlp.";
    layer.input_norm = load.norm(prefix + "input_layernorm.weight", c.hidden_size);
    layer.post_attention_norm = load.norm(prefix + "post_attention_layernorm.weight", c.hidden_size);
    if (c.qk_norm) {
      layer.q_norm = load.norm(attention + "q_norm.weight", c.head_dim);
      layer.k_norm = load.norm(attention + "k_norm.weight", c.head_dim);
    }
    layer.qkv = load.linear({{attention + "q_proj", c.q_size()},
                             {attention + "k_proj", c.kv_size()},
                             {attention + "v_proj", c.kv_size()}},
                            c.hidden_size, c.attention_bias);
    layer.o = load.linear({{attention + "o_proj", c.hidden_size}}, c.q_size(), false);
    layer.gate_up =
        load.linear({{mlp + "gate_proj", c.intermediate_size}, {mlp + "up_proj", c.intermediate_size}},
                    c.hidden_size, false);
    layer.down = load.linear({{mlp + "down_proj", c.hidden_size}}, c.intermediate_size, false);
  }
  out->final_norm = load.norm("model.norm.weight", c.hidden_size);
  out->head = c.tied_embeddings ? load.linear(out->embedding, c.vocab_size, c.hidden_size)
                                : load.linear({{"lm_head", c.vocab_size}}, c.hidden_size, false);
  if (!load.status().ok()) return load.status();
  auto frequencies = upload_rope(c.rope);
  if (!frequencies.ok()) return frequencies.status();
  out->rope_frequencies = std::move(frequencies).value();
  if (Status s = validate(*out); !s.ok()) return s;
  if (Status s = codegemm::cuda::cuda_status(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); !s.ok())
    return s;
  return std::shared_ptr<const Model>(std::move(out));
}

}  // namespace prefillshare::cuda
