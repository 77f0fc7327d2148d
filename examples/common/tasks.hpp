// SPDX-License-Identifier: Apache-2.0
//
// common/tasks.hpp - the tasks that decode modules are fine-tuned for, and their items as tokens.
// Layer: examples (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <common/conversation.hpp>
#include <common/task.hpp>
#include <common/task_arithmetic.hpp>
#include <common/task_shell.hpp>
#include <common/task_tools.hpp>
#include <common/tokenizer.hpp>
#include <prefillshare/train/examples.hpp>

namespace prefillshare::examples {

inline constexpr Task kTasks[] = {
    {"arithmetic", "word problems, the number as the answer", make_arithmetic, judge_arithmetic},
    {"tools", "tool calls as JSON", make_tool_call, judge_tool_call},
    {"shell", "one shell command for a request", make_shell_command, judge_shell_command},
};

/// nullptr where there is none of that name.
[[nodiscard]] inline const Task* find_task(std::string_view name) {
  for (const Task& task : kTasks) {
    if (name == task.name) return &task;
  }
  return nullptr;
}

/// The prompt as the user's first message in the model's chat template, the target with the token that ends a
/// turn.
[[nodiscard]] inline TrainingExample tokenize(const TaskItem& item, const Tokenizer& tokenizer) {
  TrainingExample out;
  out.prompt = Conversation(tokenizer).user(item.prompt);
  out.target = unwrap(tokenizer.encode(item.target, {false, false}));
  if (tokenizer.eos() >= 0) out.target.push_back(tokenizer.eos());
  return out;
}

[[nodiscard]] inline std::vector<TrainingExample> tokenize(std::span<const TaskItem> items,
                                                           const Tokenizer& tokenizer) {
  std::vector<TrainingExample> out;
  out.reserve(items.size());
  for (const TaskItem& item : items) out.push_back(tokenize(item, tokenizer));
  return out;
}

/// How many of the answers the task's judge takes.
[[nodiscard]] inline std::int64_t count_right(const Task& task, std::span<const TaskItem> items,
                                              std::span<const std::string> answers) {
  std::int64_t right = 0;
  for (std::size_t i = 0; i < items.size(); ++i) right += task.judge(items[i].target, answers[i]) ? 1 : 0;
  return right;
}

}  // namespace prefillshare::examples
