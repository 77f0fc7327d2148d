// SPDX-License-Identifier: Apache-2.0
//
// common/task_arithmetic.hpp - word problems of two steps; the number is judged.
// Layer: examples (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <common/task.hpp>

namespace prefillshare::examples {

namespace detail {

inline constexpr const char* kPeople[] = {"Mara",  "Jonas", "Ines",   "Pavel", "Lena",  "Tariq", "Nora",
                                          "Bruno", "Aiko",  "Samuel", "Zoe",   "Milan", "Rosa",  "Felix",
                                          "Priya", "Oskar", "Clara",  "Idris", "Hanna", "Victor"};
inline constexpr const char* kThings[] = {"marbles", "stamps",  "apples",  "shells", "pencils", "coins",
                                          "buttons", "cookies", "bottles", "cards",  "books",   "beads",
                                          "tickets", "plants",  "stones",  "boxes"};
inline constexpr const char* kPlaces[] = {"at the market", "in the garden",    "on the train",
                                          "at school",     "by the lake",      "in the workshop",
                                          "at the museum", "in the old house", "on the island"};

/// A problem in {who}, {other}, {things} and the numbers {a}, {b}, {c}: (a first b) second c.
struct WordProblem {
  char first;
  char second;
  const char* text;
};
inline constexpr WordProblem kWordProblems[] = {
    {'+', '-',
     "{who} has {a} {things} and finds {b} more. Then {who} gives {c} of them to {other}. How many {things} "
     "does {who} have now?"},
    {'+', '-',
     "On Monday {who} made {a} {things}, on Tuesday {b}. {other} took {c} away. How many {things} are left?"},
    {'+', '-',
     "{who} brought {a} {things} and {other} brought {b}. They lost {c}. How many {things} do they still "
     "have?"},
    {'-', '+',
     "A shelf held {a} {things}. {who} took {b} and {other} put back {c}. How many {things} are on the "
     "shelf?"},
    {'-', '+',
     "{who} owned {a} {things}, sold {b} of them and later bought {c} new ones. How many {things} does {who} "
     "own?"},
    {'-', '+',
     "There were {a} people. {b} of them left, and then {c} others came. How many people are there?"},
    {'-', '-',
     "From {a} {things}, {who} used {b} in the morning and {c} in the evening. How many {things} remain?"},
    {'-', '-',
     "{who} had {a} {things}. {other} borrowed {b}, and {c} broke. How many {things} does {who} have left?"},
    {'+', '+',
     "{who} counted {a} {things}, {other} counted {b}, and the teacher counted {c}. How many {things} were "
     "counted in all?"},
    {'+', '+',
     "In spring there were {a} {things}. Summer added {b} and autumn {c}. How many {things} were there in "
     "the end?"},
    {'*', '+',
     "{who} fills {a} bags with {b} {things} each and has {c} {things} left over. How many {things} are "
     "there in all?"},
    {'*', '+',
     "There are {a} rows of {b} {things}, and {c} more {things} in a corner. How many {things} are there?"},
    {'*', '-',
     "{who} packs {a} crates with {b} {things} each. {other} removes {c}. How many {things} are still "
     "packed?"},
    {'*', '-',
     "Each of {a} children got {b} {things}. Together they gave {c} back. How many {things} do the children "
     "have?"},
};
inline constexpr const char* kAsides[] = {
    "{who} is {d} years old. ", "It is {d} minutes past noon. ", "{other} lives at number {d}. ",
    "The bus number is {d}. ",  "It is {d} degrees outside. ",
};

[[nodiscard]] inline int calculate(int a, char sign, int b) {
  return sign == '+' ? a + b : sign == '-' ? a - b : a * b;
}

/// The last number of `text`; none where there is none or it is no whole number of up to nine digits. A minus
/// right before it is its sign unless a digit stands before that.
[[nodiscard]] inline std::optional<std::int64_t> last_number(std::string_view text) {
  const auto digit = [&](std::size_t i) { return i < text.size() && text[i] >= '0' && text[i] <= '9'; };
  std::size_t end = text.size();
  while (end > 0 && !digit(end - 1)) --end;
  if (end == 0) return std::nullopt;
  std::size_t begin = end;
  const auto joined = [&](std::size_t i) {  // "1,000" and "3.5" are one number
    return digit(i) || ((text[i] == '.' || text[i] == ',') && i > 0 && digit(i - 1) && digit(i + 1));
  };
  while (begin > 0 && joined(begin - 1)) --begin;
  std::int64_t value = 0;
  if (end - begin > 9) return std::nullopt;
  for (std::size_t i = begin; i < end; ++i) {
    if (!digit(i)) return std::nullopt;
    value = value * 10 + (text[i] - '0');
  }
  const bool minus = begin > 0 && text[begin - 1] == '-' && !(begin > 1 && digit(begin - 2));
  return minus ? -value : value;
}

}  // namespace detail

/// "Mara has 37 marbles and finds ..."; the target is "37 + 24 = 61; 61 - 5 = 56. Answer: 56".
[[nodiscard]] inline TaskItem make_arithmetic(TaskRandom& random) {
  const detail::WordProblem& problem = random.pick(detail::kWordProblems);
  const bool product = problem.first == '*';
  int a = 0;
  int b = 0;
  int c = 0;
  int result = 0;
  do {  // all numbers stay small, different and positive
    a = product ? random.between(3, 9) : random.between(12, 79);
    b = product ? random.between(3, 9) : random.between(4, 49);
    c = random.between(3, 39);
    result = detail::calculate(detail::calculate(a, problem.first, b), problem.second, c);
  } while (result < 1 || detail::calculate(a, problem.first, b) < 1 || a == b || b == c || a == c);
  const std::string who = random.pick(detail::kPeople);
  std::string other = random.pick(detail::kPeople);
  while (other == who) other = random.pick(detail::kPeople);
  const std::string things = random.pick(detail::kThings);
  std::string story;
  if (random.chance(40)) {
    const char* const aside = random.pick(detail::kAsides);
    story = fill(aside, {{"who", who}, {"other", other}, {"d", std::to_string(random.between(5, 59))}});
  }
  if (random.chance(25)) story += who + " and " + other + " are " + random.pick(detail::kPlaces) + ". ";
  story += fill(problem.text, {{"who", who},
                               {"other", other},
                               {"things", things},
                               {"a", std::to_string(a)},
                               {"b", std::to_string(b)},
                               {"c", std::to_string(c)}});
  const int middle = detail::calculate(a, problem.first, b);
  TaskItem item;
  item.prompt = "Solve the problem. Write the calculation, then \"Answer: \" and the number.\n" + story;
  item.target = codegemm::concat(a, " ", problem.first, " ", b, " = ", middle, "; ", middle, " ",
                                 problem.second, " ", c, " = ", result, ". Answer: ", result);
  return item;
}

/// The number behind the last "Answer:", or the last number where there is none, is that of the target.
[[nodiscard]] inline bool judge_arithmetic(const std::string& target, const std::string& answer) {
  const std::optional<std::int64_t> right = detail::last_number(target);
  std::string_view text = answer;
  const std::size_t at = text.rfind("Answer:");
  if (at != std::string_view::npos) text.remove_prefix(at);
  return right.has_value() && detail::last_number(text) == right;
}

}  // namespace prefillshare::examples
