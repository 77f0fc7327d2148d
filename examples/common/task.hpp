// SPDX-License-Identifier: Apache-2.0
//
// common/task.hpp - a task with exact answers: items made from a seed, and a judge.
// Layer: examples (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// A request and the answer to it.
struct TaskItem {
  std::string prompt;
  std::string target;
};

/// The same draws from the same seed on every machine (SplitMix64, Steele et al. 2014).
class TaskRandom {
 public:
  explicit TaskRandom(std::uint64_t seed) : state_(seed) {}

  [[nodiscard]] std::uint64_t next() noexcept {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31U);
  }
  /// In low..high.
  [[nodiscard]] int between(int low, int high) noexcept {
    return low + static_cast<int>(next() % static_cast<std::uint64_t>(high - low + 1));
  }
  [[nodiscard]] bool chance(int percent) noexcept { return between(0, 99) < percent; }
  /// One of an array.
  template <class Array>
  [[nodiscard]] const auto& pick(const Array& from) noexcept {
    return from[next() % std::size(from)];
  }

 private:
  std::uint64_t state_;
};

struct Task {
  const char* name;                      // "arithmetic"
  const char* title;                     // what it does, for a reader
  TaskItem (*make)(TaskRandom& random);  //
  bool (*judge)(const std::string& target, const std::string& answer);
};

/// `text` with each {name} replaced by its value. A name without a value stays as it is.
[[nodiscard]] inline std::string fill(
    std::string_view text, std::initializer_list<std::pair<std::string_view, std::string>> values) {
  std::string out;
  while (!text.empty()) {
    const std::size_t open = text.find('{');
    const std::size_t close = open == std::string_view::npos ? open : text.find('}', open);
    if (close == std::string_view::npos) break;
    const std::string_view name = text.substr(open + 1, close - open - 1);
    out += text.substr(0, open);
    bool found = false;
    for (const auto& [key, value] : values) {
      if (key != name) continue;
      out += value;
      found = true;
      break;
    }
    if (!found) out += text.substr(open, close - open + 1);
    text.remove_prefix(close + 1);
  }
  return out.append(text);
}

/// The parts of a task's items. No answer of one part is an answer in another.
enum class TaskPart { kTrain, kDevelopment, kTest };

/// Which part an item belongs to; its answer decides: a tenth is for tests, a tenth for development.
[[nodiscard]] inline TaskPart part_of(const TaskItem& item) {
  std::uint64_t state = 0xcbf29ce484222325ULL;  // FNV-1a
  for (const char c : item.target) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  const std::uint64_t tenth = TaskRandom(state).next() % 10;
  return tenth == 0 ? TaskPart::kTest : tenth == 1 ? TaskPart::kDevelopment : TaskPart::kTrain;
}

/// `count` items of that part, no prompt twice, the same for the same seed. Throws UserError where the task
/// has not so many.
[[nodiscard]] inline std::vector<TaskItem> task_items(const Task& task, TaskPart part, std::size_t count,
                                                      std::uint64_t seed) {
  TaskRandom random(seed * 3 + static_cast<std::uint64_t>(part));
  std::vector<TaskItem> out;
  std::set<std::string> seen;
  std::size_t tries = 0;
  while (out.size() < count) {
    if (++tries > 1000 + 100 * count) {
      throw UserError(codegemm::concat(task.name, ": no more than ", out.size(), " of ", count,
                                       " different items were found"));
    }
    TaskItem item = task.make(random);
    if (part_of(item) != part || !seen.insert(item.prompt).second) continue;
    out.push_back(std::move(item));
  }
  return out;
}

}  // namespace prefillshare::examples
