// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/loss_batch.cuh - a batch of segments with losses, and what the GPU reads of it.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <prefillshare/train/cuda/cache_forward.cuh>
#include <prefillshare/train/cuda/pass_graphs.cuh>

namespace prefillshare::cuda {

/// LossBatch with prefixes on the device: sequences one after the other in rows, and the tokens that some
/// rows are to predict. Segments cover the rows in order, without gaps; segment i's prefix is the next
/// segments[i].prefix rows of `prefixes`.
template <TrainStorage S>
struct DeviceLossBatch {
  /// As Segment, its prefix in `prefixes`.
  struct Piece {
    std::int64_t count = 0;   ///< rows
    std::int64_t prefix = 0;  ///< tokens before them
  };
  std::vector<std::int32_t> tokens;     ///< [rows]
  std::vector<Piece> segments;          ///< the rows cut into sequences
  std::vector<std::int32_t> loss_rows;  ///< ascending
  std::vector<std::int32_t> labels;     ///< [loss_rows]: the next token at each of them
  DevicePrefixView<S> prefixes;         ///< device memory, read by the pass
  /// [loss_rows][hidden], device memory: what hidden() gives of a teacher at these rows. Its softmax is
  /// learned in place of the labels. Null: no teacher.
  const S* teacher = nullptr;
  const S* teacher_head = nullptr;  ///< [vocab][hidden], device memory: the teacher's output layer
  /// 0 to 1, beside a teacher: how much of what is learned are the labels after all.
  double label_share = 0.0;

  /// No rows, no prefixes, no teacher.
  void clear() {
    tokens.clear();
    segments.clear();
    loss_rows.clear();
    labels.clear();
    prefixes = {};
    teacher = teacher_head = nullptr;
    label_share = 0.0;
  }
};

namespace detail {

/// The batch of the pass at hand on the device, in sizes that few batches differ in.
template <TrainStorage S>
class SentBatch {
 public:
  static constexpr std::int64_t kMostRows = std::int64_t{1} << 20;

  /// Rows of a pass of up to `rows` rows. One more at least: what is padding has a row of its own.
  [[nodiscard]] static std::int64_t padded_rows(std::int64_t rows) { return padded_size(rows + 1, 64); }

  [[nodiscard]] Status allocate(const ModelConfig& config, std::int64_t max_rows, std::int64_t max_context) {
    c_ = config;
    max_rows_ = max_rows;
    max_context_ = max_context;
    const std::int64_t r = padded_rows(max_rows);
    // Tokens, positions, segments and their tiles, loss rows, labels, the rows of each token, and numbers.
    const std::int64_t segments = padded_segments(r + r / kPaddingRows + 1);
    return input_.allocate(3 * r + 4 * segments +
                           2 * (AttentionTiles::most(r * (c_.heads / c_.kv_heads), segments) +
                                AttentionTiles::most(r, segments)) +
                           2 * r + 3 * r + 1 + 3);
  }

  /// Before anything of the batch is used.
  [[nodiscard]] Status check(const ModelConfig& config, const DeviceLossBatch<S>& batch) const {
    const std::int64_t rows = std::ssize(batch.tokens);
    const auto wrong = [](const auto&... parts) {
      return codegemm::error(StatusCode::kInvalidArgument, "LossBatch: ", parts...);
    };
    if (!(config == c_))
      return codegemm::error(StatusCode::kShapeMismatch, "TrainPass: made for another config");
    if (rows > max_rows_) return wrong(rows, " rows, the pass is for ", max_rows_);
    std::int64_t at = 0;
    std::int64_t before = 0;
    for (const auto& s : batch.segments) {
      if (s.count < 1 || s.prefix < 0 || s.prefix + s.count > max_context_ || s.count > rows - at ||
          s.prefix > batch.prefixes.rows - before) {
        return wrong("a segment of ", s.count, " rows at row ", at, " behind ", s.prefix, " of ",
                     batch.prefixes.rows - before, " tokens; rows ", rows, ", context at most ",
                     max_context_);
      }
      at += s.count;
      before += s.prefix;
    }
    if (before > 0 && batch.prefixes.data == nullptr)
      return codegemm::error(StatusCode::kNullPointer, "LossBatch: a prefix without keys or values");
    if (at != rows) return wrong("segments cover ", at, " of ", rows, " rows");
    if (batch.teacher != nullptr && batch.teacher_head == nullptr)
      return codegemm::error(StatusCode::kNullPointer, "LossBatch: a teacher without its output layer");
    if (!(batch.label_share >= 0.0 && batch.label_share <= 1.0))
      return wrong("a share of labels of ", batch.label_share, ", must be in 0..1");
    if (batch.labels.size() != batch.loss_rows.size())
      return wrong(batch.labels.size(), " labels for ", batch.loss_rows.size(), " rows");
    for (const auto* ids : {&batch.tokens, &batch.labels}) {
      for (const std::int32_t id : *ids) {
        if (id < 0 || id >= c_.vocab_size) return wrong("token ", id, ", the vocabulary has ", c_.vocab_size);
      }
    }
    std::int32_t last = -1;
    for (const std::int32_t row : batch.loss_rows) {
      if (row <= last || row >= rows) return wrong("loss row ", row, " behind ", last, ", rows ", rows);
      last = row;
    }
    return {};
  }

  /// What the kernels read of a batch, to the device, in sizes that few batches differ in. Padding is
  /// sequences of their own behind the others, and loss rows of the last row without a gradient.
  [[nodiscard]] Status send(const DeviceLossBatch<S>& batch, float scale, const DeviceRope& rope,
                            cudaStream_t stream) {
    positions_.clear();
    segments_.clear();
    std::int64_t before = 0;
    const auto add = [&](std::int64_t count, std::int64_t prefix) {
      segments_.push_back({static_cast<std::int32_t>(positions_.size()), static_cast<std::int32_t>(count),
                           static_cast<std::int32_t>(prefix), static_cast<std::int32_t>(before)});
      for (std::int64_t i = 0; i < count; ++i) positions_.push_back(static_cast<std::int32_t>(prefix + i));
      before += prefix;
    };
    for (const auto& s : batch.segments) add(s.count, s.prefix);
    const std::int64_t rows = padded_rows(std::ssize(batch.tokens));
    const std::int64_t most = std::min(kPaddingRows, max_context_);
    while (std::ssize(positions_) < rows) add(std::min(most, rows - std::ssize(positions_)), 0);
    tokens_.assign(batch.tokens.begin(), batch.tokens.end());
    tokens_.resize(static_cast<std::size_t>(rows), 0);
    tiles_.assign(segments_, c_.heads / c_.kv_heads);
    const std::int64_t segments = padded_segments(std::ssize(segments_));
    tiles_.pad(rows, c_.heads / c_.kv_heads, segments);
    segments_.resize(static_cast<std::size_t>(segments));
    list_occurrences(tokens_);
    ids_.resize(static_cast<std::size_t>(rows), 0);
    id_begin_.resize(static_cast<std::size_t>(rows) + 1, static_cast<std::int32_t>(rows));
    loss_count_ = batch.loss_rows.empty() ? 0 : std::min(rows, padded_size(std::ssize(batch.loss_rows), 16));
    loss_list_.assign(batch.loss_rows.begin(), batch.loss_rows.end());
    loss_list_.resize(static_cast<std::size_t>(loss_count_), static_cast<std::int32_t>(rows) - 1);
    label_list_.assign(batch.labels.begin(), batch.labels.end());
    label_list_.resize(static_cast<std::size_t>(loss_count_), 0);
    const LossNumbers numbers{scale, static_cast<std::int32_t>(batch.loss_rows.size()),
                              static_cast<float>(batch.label_share)};

    using Ints = std::span<const std::int32_t>;
    if (Status s = input_.begin(); !s.ok()) return s;
    rows_.rows = rows;
    tokens_on_device_ = input_.add(Ints(tokens_));
    rows_.positions = input_.add(Ints(positions_));
    rows_.cos = rope.cos.data();
    rows_.sin = rope.sin.data();
    rows_.tiles.segments = input_.add(std::span<const DeviceSegment>(segments_));
    rows_.tiles.segment_of = input_.add(Ints(tiles_.segment_of));
    rows_.tiles.queries = input_.add(Ints(tiles_.queries));
    rows_.tiles.keys = input_.add(Ints(tiles_.keys));
    rows_.tiles.query_tiles = std::ssize(tiles_.queries) / 2;
    rows_.tiles.key_tiles = std::ssize(tiles_.keys) / 2;
    loss_rows_ = input_.add(Ints(loss_list_));
    labels_ = input_.add(Ints(label_list_));
    embed_.ids = input_.add(Ints(ids_));
    embed_.row_begin = input_.add(Ints(id_begin_));
    embed_.rows = input_.add(Ints(occurrences_));
    numbers_ = input_.add(std::span<const LossNumbers>(&numbers, 1));
    return input_.send(stream);
  }

  // Where the batch that was sent lies. Counts are with their padding.
  [[nodiscard]] const DeviceRows& rows() const noexcept { return rows_; }
  [[nodiscard]] std::size_t segments() const noexcept { return segments_.size(); }
  [[nodiscard]] std::int64_t loss_count() const noexcept { return loss_count_; }
  [[nodiscard]] const std::int32_t* tokens() const noexcept { return tokens_on_device_; }
  [[nodiscard]] const std::int32_t* loss_rows() const noexcept { return loss_rows_; }
  [[nodiscard]] const std::int32_t* labels() const noexcept { return labels_; }
  [[nodiscard]] const LossNumbers* numbers() const noexcept { return numbers_; }
  /// Tokens and the rows that have them, the rest unset.
  [[nodiscard]] const EmbedBackwardArgs& occurrences() const noexcept { return embed_; }

 private:
  static constexpr std::int64_t kPaddingRows = 64;  // of a segment of padding, at most

  [[nodiscard]] static std::int64_t padded_segments(std::int64_t segments) {
    return padded_size(segments, 16);
  }

  /// Where each token occurs, so that one block adds up its gradient: ids in the order of their first rows.
  void list_occurrences(const std::vector<std::int32_t>& tokens) {
    // How often, then where the next one goes.
    counts_.resize(static_cast<std::size_t>(c_.vocab_size));
    ids_.clear();
    id_begin_.assign(1, 0);
    for (const std::int32_t id : tokens) {
      if (counts_[static_cast<std::size_t>(id)]++ == 0) ids_.push_back(id);
    }
    for (const std::int32_t id : ids_) {
      std::int32_t& count = counts_[static_cast<std::size_t>(id)];
      const std::int32_t begin = id_begin_.back();
      id_begin_.push_back(begin + count);
      count = begin;
    }
    occurrences_.resize(tokens.size());
    for (std::size_t row = 0; row < tokens.size(); ++row) {
      const auto at = static_cast<std::size_t>(counts_[static_cast<std::size_t>(tokens[row])]++);
      occurrences_[at] = static_cast<std::int32_t>(row);
    }
    for (const std::int32_t id : ids_) counts_[static_cast<std::size_t>(id)] = 0;
  }

  ModelConfig c_;
  std::int64_t max_rows_ = 0;
  std::int64_t max_context_ = 0;
  PassInput input_;
  DeviceRows rows_;
  const std::int32_t* tokens_on_device_ = nullptr;
  const std::int32_t* loss_rows_ = nullptr;
  const std::int32_t* labels_ = nullptr;
  const LossNumbers* numbers_ = nullptr;
  std::int64_t loss_count_ = 0;
  EmbedBackwardArgs embed_;
  std::vector<std::int32_t> tokens_, loss_list_, label_list_;
  std::vector<std::int32_t> positions_, occurrences_, ids_, id_begin_, counts_;
  std::vector<DeviceSegment> segments_;
  AttentionTiles tiles_;
};

}  // namespace detail
}  // namespace prefillshare::cuda
