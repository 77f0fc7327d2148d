// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/generator.cuh - greedy answers of a decode module for many prompts at once, from
// the weights that training has on the GPU: what a fine-tuning is judged by.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: PrefillShare (arXiv 2602.12029) section 3, equations 5 and 6; prefillshare/model/cuda/modules.cuh
// serves
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/cache_forward.cuh>
#include <prefillshare/train/examples.hpp>

namespace prefillshare::cuda {

/// Generates with a base and decode modules that read its cache. One thread, one stream. S: TrainStorage.
template <TrainStorage S>
class DeviceGenerator {
 public:
  /// For modules of config `c` on a base of config `base`, up to max_sequences prompts at a time, and up to
  /// max_tokens tokens of a prompt and its answer together. kIncompatible, kInvalidArgument for numbers
  /// below 1, kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceGenerator> create(const ModelConfig& base, const ModelConfig& c,
                                                      std::int64_t max_sequences, std::int64_t max_tokens,
                                                      const Device& device, cudaStream_t stream) {
    if (max_sequences < 1 || max_sequences > 65535 || max_tokens < 2) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceGenerator for ", max_sequences,
                             " sequences of ", max_tokens, " tokens");
    }
    if (Status s = check_compatible(base, c); !s.ok()) return s;
    constexpr std::int64_t kPassTokens = 16384;
    const std::int64_t rows = std::max({kPassTokens, max_sequences, max_tokens});
    auto prefill = detail::CacheForward<S>::create(base, rows, max_tokens, 0, device, stream);
    if (!prefill.ok()) return prefill.status().with_prefix("DeviceGenerator");
    auto decode = detail::CacheForward<S>::create(c, rows, max_tokens, max_sequences, device, stream);
    if (!decode.ok()) return decode.status().with_prefix("DeviceGenerator");
    DeviceGenerator out(*std::move(prefill), *std::move(decode));
    out.max_sequences_ = max_sequences;
    out.max_tokens_ = max_tokens;
    detail::Allocations memory;
    memory.make(out.chosen_, kStepsAtOnce * max_sequences);
    if (Status s = memory.finish(); !s.ok()) return s.with_prefix("DeviceGenerator");
    return out;
  }

  /// Answers in the prompts' order: `base` runs the first shared_tokens(prompt, sharing) tokens of each, the
  /// module the rest and all that it generates, the largest logit (the lowest id among equals) each time. An
  /// answer ends before the first token of `stop`, or after `most` tokens. kInvalidArgument for an empty
  /// prompt, or more than max_tokens; kOutOfMemory, kCudaError.
  [[nodiscard]] Result<std::vector<std::vector<std::int32_t>>> generate(
      const detail::DeviceWeightsView<S>& base, const detail::DeviceWeightsView<S>& module,
      std::span<const std::vector<std::int32_t>> prompts, double sharing, std::int64_t most,
      std::span<const std::int32_t> stop) {
    std::vector<std::vector<std::int32_t>> answers(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const std::int64_t length = std::ssize(prompts[i]);
      if (length >= 1 && most >= 1 && length + most <= max_tokens_) continue;
      return codegemm::error(StatusCode::kInvalidArgument, "prompt ", i, ": a prompt of ", length,
                             " tokens and an answer of up to ", most, ", at most ", max_tokens_, " together");
    }
    const auto at_once = static_cast<std::size_t>(max_sequences_);
    for (std::size_t first = 0; first < prompts.size(); first += at_once) {
      const std::size_t count = std::min(at_once, prompts.size() - first);
      if (Status s = generate_some(base, module, prompts.subspan(first, count), sharing, most, stop,
                                   std::span(answers).subspan(first, count));
          !s.ok()) {
        return s.with_prefix(codegemm::concat("prompts from ", first));
      }
    }
    return answers;
  }

 private:
  static constexpr std::int64_t kStepsAtOnce = 4;  // between two looks at which sequences have ended

  DeviceGenerator(detail::CacheForward<S> prefill, detail::CacheForward<S> decode)
      : prefill_(std::move(prefill)), decode_(std::move(decode)) {}

  [[nodiscard]] Status generate_some(const detail::DeviceWeightsView<S>& base,
                                     const detail::DeviceWeightsView<S>& module,
                                     std::span<const std::vector<std::int32_t>> prompts, double sharing,
                                     std::int64_t most, std::span<const std::int32_t> stop,
                                     std::span<std::vector<std::int32_t>> answers) {
    // Sequence i has rows of its own in the cache, for its prompt and its answer.
    std::int64_t rows = 0;
    std::vector<detail::CachedPiece> of_base;
    std::vector<detail::CachedPiece> pieces;
    for (const std::vector<std::int32_t>& prompt : prompts) {
      const std::int64_t length = std::ssize(prompt);
      const std::int64_t shared = shared_tokens(length, sharing);
      const auto row = static_cast<std::int32_t>(rows);
      const std::span<const std::int32_t> all(prompt);
      if (shared > 0) of_base.push_back({all.first(static_cast<std::size_t>(shared)), 0, row});
      pieces.push_back(
          {all.subspan(static_cast<std::size_t>(shared)), static_cast<std::int32_t>(shared), row});
      rows += length + most;
    }
    const Result<detail::CacheTarget<S>> reserved = decode_.reserve(cache_, rows);
    if (!reserved.ok()) return reserved.status();
    detail::CacheTarget<S> cache = *reserved;
    cache.spare = 0;  // sizes seldom come again here
    if (Status s = prefill_.run_in_passes(base, of_base, cache); !s.ok()) return s;
    std::int32_t* const chosen = chosen_.data();
    std::int64_t done = 0;
    Status status = decode_.in_passes(pieces, max_sequences_, [&](std::span<const detail::CachedPiece> some) {
      Status s = decode_.run(module, some, cache, chosen + done, nullptr);
      done += std::ssize(some);
      return s;
    });
    if (!status.ok()) return status;

    std::vector<std::size_t> going(prompts.size());  // the sequences in the batch
    for (std::size_t i = 0; i < going.size(); ++i) going[i] = i;
    for (std::size_t i = 0; i < pieces.size(); ++i)
      pieces[i].position = static_cast<std::int32_t>(prompts[i].size()) - 1;
    std::int64_t rounds = 1;  // of tokens that are on the device, `going` of each
    std::int64_t generated = 0;
    std::vector<std::int32_t> tokens;
    while (true) {
      const auto count = static_cast<std::int64_t>(going.size());
      tokens.resize(static_cast<std::size_t>(rounds * count));
      detail::TrainStream& ts = decode_.train_stream();
      ts.copy(tokens.data(), chosen, tokens.size() * sizeof(std::int32_t), cudaMemcpyDeviceToHost);
      ts.synchronize();
      if (Status s = ts.take(); !s.ok()) return s;
      generated += rounds;
      std::vector<std::size_t> left;
      std::vector<detail::CachedPiece> next;
      last_.clear();
      for (std::size_t i = 0; i < going.size(); ++i) {
        std::vector<std::int32_t>& answer = answers[going[i]];
        bool ended = false;
        for (std::int64_t round = 0; round < rounds && !ended; ++round) {
          const std::int32_t token = tokens[static_cast<std::size_t>(round * count) + i];
          ended = std::find(stop.begin(), stop.end(), token) != stop.end();
          if (!ended) answer.push_back(token);
        }
        if (ended || std::ssize(answer) >= most) continue;
        left.push_back(going[i]);
        next.push_back(pieces[i]);
        last_.push_back(answer.back());
      }
      if (left.empty()) return {};
      going = std::move(left);
      pieces = std::move(next);
      // The pieces' tokens: those that were chosen last; later rounds read them on the device.
      for (std::size_t i = 0; i < pieces.size(); ++i) pieces[i].tokens = std::span(&last_[i], 1);
      rounds = std::min(kStepsAtOnce, most - generated);
      const std::int64_t now = std::ssize(going);
      for (std::int64_t round = 0; round < rounds; ++round) {
        for (detail::CachedPiece& p : pieces) ++p.position;
        const std::int32_t* const from = round == 0 ? nullptr : chosen + (round - 1) * now;
        if (Status s = decode_.run(module, pieces, cache, chosen + round * now, from); !s.ok()) return s;
      }
    }
  }

  detail::CacheForward<S> prefill_;
  detail::CacheForward<S> decode_;
  std::int64_t max_sequences_ = 0;
  std::int64_t max_tokens_ = 0;
  DeviceArray<S> cache_;
  DeviceArray<std::int32_t> chosen_;  // [kStepsAtOnce][sequences]
  std::vector<std::int32_t> last_;
};

}  // namespace prefillshare::cuda
