// SPDX-License-Identifier: Apache-2.0
//
// common/task_shell.hpp - requests and the one shell command that serves each, judged as a shell reads it.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/task.hpp>

namespace prefillshare::examples {

namespace detail {

inline constexpr const char* kTops[] = {"/var/log", "/srv/www", "/var/mail",   "/opt/shop",
                                        "/data",    "/backup",  "/media/disk", "/etc/mail"};
inline constexpr const char* kFolders[] = {"reports", "images", "old",   "cache", "orders", "drafts",
                                           "music",   "tests",  "nginx", "maps",  "photos", "invoices"};
inline constexpr const char* kFiles[] = {"access", "users", "notes", "sales", "events", "errors", "prices",
                                         "list",   "todo",  "names", "stock", "letter", "report", "trips"};
inline constexpr const char* kEndings[] = {"log", "txt", "csv", "md", "json", "conf"};
inline constexpr const char* kWords[] = {"timeout", "failed", "login",  "warning", "admin",  "refused",
                                         "Berlin",  "paid",   "urgent", "denied",  "closed", "retry"};
inline constexpr const char* kRights[] = {"nothing",           "only execute", "only write",
                                          "write and execute", "only read",    "read and execute",
                                          "read and write",    "everything"};

/// The words of a command: quotes taken off, pipes words of their own. False for quotes without an end and
/// for what a single command has no use for (";", "&", redirections, substitutions, several lines).
[[nodiscard]] inline bool shell_words(std::string_view text, std::vector<std::string>& out) {
  bool in_word = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == ' ' || c == '\t') {
      in_word = false;
      continue;
    }
    if (c == '|') {
      out.emplace_back("|");
      in_word = false;
      continue;
    }
    if (std::string_view(";&<>`$\n\r\\").find(c) != std::string_view::npos) return false;
    if (!in_word) out.emplace_back();
    in_word = true;
    if (c == '\'' || c == '"') {
      const std::size_t end = text.find(c, i + 1);
      if (end == std::string_view::npos) return false;
      out.back() += text.substr(i + 1, end - i - 1);
      i = end;
    } else {
      out.back() += c;
    }
  }
  return true;
}

/// The options of a command that take a value.
[[nodiscard]] inline std::string_view valued_options(std::string_view command) {
  if (command == "head" || command == "tail") return "n";
  if (command == "cut") return "df";
  if (command == "sort") return "kt";
  if (command == "tar") return "fC";
  return "";
}

/// A command's words in an order of their own: the name, the options one by one and sorted, what is left in
/// its order. Options that change nothing here stand as they are.
[[nodiscard]] inline std::vector<std::string> sorted_command(const std::vector<std::string>& words) {
  std::vector<std::string> options;
  std::vector<std::string> others;
  const std::string& name = words.front();
  const std::string_view valued = valued_options(name);
  for (std::size_t i = 1; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word.size() < 2 || word[0] != '-' || word[1] == '-') {
      others.push_back(word);
    } else if (name == "find") {  // -name VALUE, -delete
      std::string option = word;
      if (word != "-delete" && i + 1 < words.size()) option += " " + words[++i];
      options.push_back(option);
    } else if ((name == "head" || name == "tail") && word[1] >= '0' && word[1] <= '9') {
      options.push_back("n " + word.substr(1));  // head -5
    } else {
      for (std::size_t at = 1; at < word.size(); ++at) {
        if (valued.find(word[at]) == std::string_view::npos) {
          options.emplace_back(1, word[at]);
          continue;
        }
        std::string value = word.substr(at + 1);
        if (value.empty() && i + 1 < words.size()) value = words[++i];
        options.push_back(codegemm::concat(word[at], " ", value));
        break;
      }
    }
  }
  std::sort(options.begin(), options.end());
  std::vector<std::string> out = {name};
  for (const std::string& option : options) out.push_back("-" + option);
  out.insert(out.end(), others.begin(), others.end());
  return out;
}

/// The same for each command of a pipe; nothing for what is no command.
[[nodiscard]] inline std::vector<std::vector<std::string>> sorted_pipe(std::string_view text) {
  std::vector<std::string> words;
  if (!shell_words(text, words)) return {};
  std::vector<std::vector<std::string>> out;
  std::vector<std::string> one;
  words.emplace_back("|");
  for (std::string& word : words) {
    if (word != "|") {
      one.push_back(std::move(word));
      continue;
    }
    if (one.empty()) return {};
    out.push_back(sorted_command(one));
    one.clear();
  }
  return out;
}

}  // namespace detail

/// "Show the last 20 lines of /var/log/old/access.log."; the target is "tail -n 20 /var/log/old/access.log".
[[nodiscard]] inline TaskItem make_shell_command(TaskRandom& random) {
  /// A command, and ways to ask for it.
  struct Recipe {
    const char* command;
    const char* requests[2];
  };
  static constexpr Recipe kRecipes[] = {
      {"tail -n {n} {file}",
       {"Show the last {n} lines of {file}.", "How does {file} end? {n} lines will do."}},
      {"head -n {n} {file}", {"Show the first {n} lines of {file}.", "Print the top {n} lines of {file}."}},
      {"find {dir} -name '*.{ext}' -mtime +{n}",
       {"Which {ext} files below {dir} are older than {n} days?",
        "List everything in {dir} that ends in .{ext} and was not changed for over {n} days."}},
      {"find {dir} -name '*.{ext}' -size +{n}M",
       {"Find the {ext} files below {dir} that are larger than {n} megabytes.",
        "Which .{ext} files in {dir} take more than {n} MB?"}},
      {"find {dir} -name '*.{ext}' -delete",
       {"Delete all {ext} files below {dir}.", "Get rid of everything in {dir} that ends in .{ext}."}},
      {"grep -n '{word}' {file}",
       {"Show the lines of {file} with {word} and their numbers.",
        "On which lines of {file} does {word} stand?"}},
      {"grep -c '{word}' {file}",
       {"How many lines of {file} have {word} in them?", "Count the lines with {word} in {file}."}},
      {"grep -v '{word}' {file}",
       {"Show the lines of {file} without {word}.", "Print {file} but leave out each line with {word}."}},
      {"grep -ri '{word}' {dir}",
       {"Search all of {dir} for {word}, whatever its case.",
        "Where below {dir} is {word} written, in capitals or not?"}},
      {"grep -rl '{word}' {dir}",
       {"Name the files below {dir} that contain {word}.",
        "In which files of {dir} does {word} occur? Names only."}},
      {"tar -czf {name}.tar.gz {dir}",
       {"Pack {dir} into the compressed archive {name}.tar.gz.",
        "Make {name}.tar.gz, gzipped, out of {dir}."}},
      {"tar -xzf {name}.tar.gz -C {dir}",
       {"Unpack the compressed archive {name}.tar.gz into {dir}.",
        "Extract {name}.tar.gz, which is gzipped, to {dir}."}},
      {"sed 's/{word}/{word2}/g' {file}",
       {"Print {file} with each {word} replaced by {word2}.",
        "Show {file}, but with {word2} wherever {word} stands."}},
      {"cut -d ',' -f {k} {file}",
       {"Print column {k} of {file}, columns are split by commas.",
        "I need the comma separated field {k} of {file}."}},
      {"sort -t ',' -k {k} {file}",
       {"Sort {file} by its column {k}, columns are split by commas.",
        "Put {file} in order of the comma separated field {k}."}},
      {"cp -r {dir} {dir2}", {"Copy the folder {dir} to {dir2}.", "Make a copy of all of {dir} as {dir2}."}},
      {"mv {file} {dir}", {"Move {file} to {dir}.", "{file} belongs into {dir}, put it there."}},
      {"du -sh {dir}",
       {"How much space does {dir} take in all?", "Show the total size of {dir} for humans."}},
      {"wc -{count} {file}", {"Count the {counted} of {file}.", "How many {counted} does {file} have?"}},
      {"sort {file} | uniq -c",
       {"How often does each line occur in {file}?", "Count equal lines of {file}."}},
      {"sort -n {file} | tail -n {n}",
       {"Show the {n} largest numbers in {file}.", "Sort {file} by number and print the last {n} lines."}},
      {"chmod {mode} {file}",
       {"The owner may {mode1} {file}, the group {mode2}, others {mode3}.",
        "Change the rights of {file}: owner {mode1}, group {mode2}, others {mode3}."}},
      {"ln -s {file} {name}",
       {"Make a symbolic link {name} to {file}.", "Let {name} be a symlink that points to {file}."}},
      {"mkdir -p {dir}/{name}",
       {"Create the folder {dir}/{name} and those above it.",
        "Make {dir}/{name}, with all parents that are missing."}},
  };

  const auto folder = [&] {
    std::string out = random.pick(detail::kTops);
    const int depth = random.between(1, 2);
    for (int i = 0; i < depth; ++i) {
      out += '/';
      out += random.pick(detail::kFolders);
    }
    return out;
  };
  const Recipe& recipe = random.pick(kRecipes);
  const char* const request = random.pick(recipe.requests);
  const std::string dir = folder();
  std::string dir2 = folder();
  while (dir2 == dir) dir2 = folder();
  std::string file = random.chance(50) ? folder() + "/" : std::string();
  file += random.pick(detail::kFiles);
  file += '.';
  file += random.pick(detail::kEndings);
  std::string name = random.pick(detail::kFiles);
  name += std::to_string(random.between(1, 99));
  const std::string ext = random.pick(detail::kEndings);
  const std::string word = random.pick(detail::kWords);
  std::string word2 = random.pick(detail::kWords);
  while (word2 == word) word2 = random.pick(detail::kWords);
  const std::string n = std::to_string(random.between(2, 95));
  const std::string k = std::to_string(random.between(2, 9));
  const int owner = random.between(4, 7);
  const int group = random.between(0, 7);
  const int others = random.between(0, 7);
  static constexpr const char* kCounts[] = {"l", "w", "c"};
  static constexpr const char* kCounted[] = {"lines", "words", "bytes"};
  const auto counted = static_cast<std::size_t>(random.between(0, 2));
  const auto filled = [&](const char* text) {
    return fill(text, {{"n", n},
                       {"k", k},
                       {"dir", dir},
                       {"dir2", dir2},
                       {"file", file},
                       {"name", name},
                       {"ext", ext},
                       {"word", word},
                       {"word2", word2},
                       {"count", kCounts[counted]},
                       {"counted", kCounted[counted]},
                       {"mode", codegemm::concat(owner, group, others)},
                       {"mode1", detail::kRights[owner]},
                       {"mode2", detail::kRights[group]},
                       {"mode3", detail::kRights[others]}});
  };
  TaskItem item;
  item.prompt =
      "Write the shell command for the request, on one line, with short options and numeric modes, and "
      "nothing "
      "else.\nRequest: " +
      filled(request);
  item.target = filled(recipe.command);
  return item;
}

/// The same commands with the same options and operands. The order of options does not count, nor does
/// whether they stand together, nor which quotes are used. Of an answer with a code block only the first one
/// counts, without comments; what is left must be one line.
[[nodiscard]] inline bool judge_shell_command(const std::string& target, const std::string& answer) {
  std::string_view text = answer;
  const std::size_t fence = text.find("```");
  if (fence != std::string_view::npos) {
    text.remove_prefix(fence + 3);
    text = text.substr(0, text.find("```"));
    for (const std::string_view language : {"bash\n", "shell\n", "sh\n"}) {
      if (!text.starts_with(language)) continue;
      text.remove_prefix(language.size());
      break;
    }
  }
  std::string_view only;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    while (!line.empty() && line.front() == ' ') line.remove_prefix(1);
    while (!line.empty() && line.back() == ' ') line.remove_suffix(1);
    if (line.empty() || line.front() == '#') continue;
    if (!only.empty()) return false;
    only = line;
  }
  if (only.size() > 2 && only.front() == '`' && only.back() == '`') only = only.substr(1, only.size() - 2);
  if (only.starts_with("$ ")) only.remove_prefix(2);
  const auto got = detail::sorted_pipe(only);
  return !got.empty() && got == detail::sorted_pipe(target);
}

}  // namespace prefillshare::examples
