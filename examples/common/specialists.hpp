// SPDX-License-Identifier: Apache-2.0
//
// common/specialists.hpp - the specialists of the demo: a few held-out requests of each one's task, answered
// by the base and by the specialist from one cache.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/low_rank.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/progress.hpp>
#include <common/quantized_model.hpp>
#include <common/tasks.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/serve/session.hpp>

namespace prefillshare::examples {

/// The files of a folder that end in .safetensors, by their names; none where there is no such folder.
[[nodiscard]] inline std::vector<std::string> specialist_files(const std::string& folder) {
  std::vector<std::string> out;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(folder, none)) {
    if (entry.path().extension() == ".safetensors") out.push_back(entry.path().string());
  }
  std::sort(out.begin(), out.end());
  return out;
}

/// What one specialist and the base made of the same requests.
struct SpecialistScore {
  std::string task;
  std::int64_t items = 0;
  std::int64_t base_right = 0;
  std::int64_t right = 0;
};

[[nodiscard]] inline nlohmann::json scores_json(const std::vector<SpecialistScore>& scores) {
  nlohmann::json out = nlohmann::json::array();
  for (const SpecialistScore& s : scores) {
    out.push_back({{"task", s.task},
                   {"format", kSpecialistFormat},
                   {"items", s.items},
                   {"base_right", s.base_right},
                   {"right", s.right}});
  }
  return out;
}

/// Shows and judges them: `items` held-out requests for each specialist of `folder`, its deltas merged into
/// the base's weights and quantized, what the quantizer made being kept in `cache`. Files made for another
/// base are left out, with a line that says so. Throws UserError for files that are damaged.
class SpecialistRound {
 public:
  SpecialistRound(const LoadedModel& loaded, const Tokenizer& tokenizer,
                  const PrefillModule<DenseLinear>& base, std::string cache, Executor& executor)
      : loaded_(loaded), tokenizer_(tokenizer), base_(base), cache_(std::move(cache)), executor_(executor) {}

  [[nodiscard]] std::vector<SpecialistScore> run(const std::string& folder, std::size_t items) {
    std::vector<SpecialistScore> out;
    for (const std::string& path : specialist_files(folder)) {
      const Result<Specialist> read = read_specialist(path, *loaded_.model, loaded_.fingerprint);
      if (read.status().code() == StatusCode::kIncompatible) {
        std::printf("\n%s; it is left out\n", read.status().message().c_str());
        continue;
      }
      const Specialist specialist = unwrap(read);
      const Task* const task = find_task(specialist.task);
      if (task == nullptr)
        throw UserError(codegemm::concat(path, ": there is no task ", codegemm::quoted(specialist.task)));
      out.push_back(one(*task, specialist, items));
    }
    return out;
  }

 private:
  static constexpr std::int64_t kAnswerTokens = 64;

  [[nodiscard]] SpecialistScore one(const Task& task, const Specialist& specialist, std::size_t items) {
    LoadedModel merged{unwrap(merge(*loaded_.model, specialist.deltas)), fingerprint_of(specialist)};
    ProgressLine progress(codegemm::concat(task.name, ": quantizing to ", kSpecialistFormat));
    const auto model = unwrap(quantized_model(
        merged, unwrap(codegemm::parse_format(kSpecialistFormat)), cache_, executor_,
        [&](std::int64_t done, std::int64_t total) { progress.update(done, total, "layers"); }));
    const auto module = unwrap(factorize(base_, model));
    const auto base_module = unwrap(factorize(base_, loaded_.model));

    const std::vector<TaskItem> asked = task_items(task, TaskPart::kTest, items, 1);
    std::vector<std::vector<std::int32_t>> prompts;
    std::size_t longest = 0;
    for (const TaskItem& item : asked) {
      prompts.push_back(Conversation(tokenizer_).user(item.prompt));
      longest = std::max(longest, prompts.back().size());
    }
    const std::int64_t context = static_cast<std::int64_t>(longest) + kAnswerTokens;
    auto workspace = unwrap(ForwardWorkspace::create(*model, 1, context, executor_.workers()));
    auto base_workspace = unwrap(ForwardWorkspace::create(*loaded_.model, static_cast<std::int64_t>(longest),
                                                          context, executor_.workers()));
    const KvShape shape = kv_shape(base_.config());
    HostKvStorage storage = unwrap(HostKvStorage::create(shape, 2 * (context / shape.block_tokens + 2)));

    std::printf("\n== %s: %s, low rank over the base, %s ==\n", task.name, task.title, kSpecialistFormat);
    SpecialistScore score{task.name, static_cast<std::int64_t>(items), 0, 0};
    for (std::size_t i = 0; i < items; ++i) {
      const auto allocator = unwrap(KvAllocator::create(storage));
      SharedSession<DenseLinear> session(base_, {allocator.get(), &storage, &base_workspace, &executor_});
      session.append(prompts[i]);
      const std::string by_base = answer(session, base_module, base_workspace);  // both from the same cache
      const std::string by_specialist = answer(session, module, workspace);
      const bool base_right = task.judge(asked[i].target, by_base);
      const bool right = task.judge(asked[i].target, by_specialist);
      score.base_right += base_right ? 1 : 0;
      score.right += right ? 1 : 0;
      std::printf("request:    %s\nbase:       %s %s\nspecialist: %s %s\n",
                  one_line(request_of(asked[i].prompt)).c_str(), base_right ? "right" : "WRONG",
                  one_line(by_base).c_str(), right ? "right" : "WRONG", one_line(by_specialist).c_str());
      std::fflush(stdout);
    }
    std::printf("right:      base %lld of %lld, specialist %lld of %lld\n",
                static_cast<long long>(score.base_right), static_cast<long long>(items),
                static_cast<long long>(score.right), static_cast<long long>(items));
    return score;
  }

  template <LinearLayer Linear>
  [[nodiscard]] std::string answer(SharedSession<DenseLinear>& session, const DecodeModule<Linear>& module,
                                   ForwardWorkspace& workspace) {
    const std::vector<std::int32_t> stop = stop_tokens(tokenizer_);
    const Generation made = unwrap(session.decode(
        module, workspace, DecodeLimits{kAnswerTokens, stop},
        [](std::span<float> logits) {
          return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
        },
        [](std::int32_t) { return true; }));
    return unwrap(tokenizer_.decode(made.tokens, false));
  }

  /// Names the quantized weights in the cache folder: the base's content and the deltas'.
  [[nodiscard]] std::string fingerprint_of(const Specialist& specialist) const {
    detail::Fingerprint deltas;
    for (const LowRankDelta& delta : specialist.deltas) {
      deltas.add(delta.a);
      deltas.add(delta.b);
      deltas.add(std::span(&delta.scale, 1));
    }
    return loaded_.fingerprint + "-" + deltas.text();
  }

  /// The last line of a prompt, without what tells it from the instruction.
  [[nodiscard]] static std::string request_of(const std::string& prompt) {
    const std::string line = prompt.substr(prompt.rfind('\n') + 1);
    const std::string mark = "Request: ";
    return line.starts_with(mark) ? line.substr(mark.size()) : line;
  }

  /// Cut to one line of a terminal.
  [[nodiscard]] static std::string one_line(std::string text) {
    constexpr std::size_t kMost = 110;
    std::replace(text.begin(), text.end(), '\n', ' ');
    if (text.size() <= kMost) return text;
    std::size_t end = kMost;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) --end;  // not within a letter
    return text.substr(0, end) + "...";
  }

  const LoadedModel& loaded_;
  const Tokenizer& tokenizer_;
  const PrefillModule<DenseLinear>& base_;
  std::string cache_;
  Executor& executor_;
};

}  // namespace prefillshare::examples
