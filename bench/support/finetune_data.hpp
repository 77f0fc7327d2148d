// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_data.hpp - a task's items as the suite finetune trains on and judges by them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <common/model_tokenizer.hpp>
#include <common/tasks.hpp>
#include <common/text_quantizer.hpp>
#include <common/unwrap.hpp>

#include "finetune_backend.hpp"
#include "finetune_options.hpp"

namespace codegemm::bench {

struct FinetuneItems {
  std::vector<prefillshare::examples::TaskItem> items;
  std::vector<prefillshare::TrainingExample> examples;
  std::vector<Tokens> prompts;
};

/// Items of all parts. Throws UserError where one is longer than `max_tokens` together with its answer.
struct FinetuneData {
  const prefillshare::examples::Task* task = nullptr;
  FinetuneItems train, development, test;
  std::vector<std::int32_t> stop;

  static FinetuneData make(const std::string& name, const FinetuneOptions& o,
                           const prefillshare::examples::Tokenizer& tokenizer) {
    using namespace prefillshare::examples;
    FinetuneData out;
    out.task = find_task(name);
    if (out.task == nullptr) throw UserError(name + ": there is no such task");
    const auto part = [&](TaskPart which, std::int64_t count) {
      FinetuneItems made;
      made.items = task_items(*out.task, which, static_cast<std::size_t>(count), 1);
      made.examples = tokenize(made.items, tokenizer);
      for (const prefillshare::TrainingExample& example : made.examples)
        made.prompts.push_back(example.prompt);
      return made;
    };
    out.train = part(TaskPart::kTrain, o.train_items > 0 ? o.train_items : o.steps * o.batch);
    out.development = part(TaskPart::kDevelopment, o.development_items);
    out.test = part(TaskPart::kTest, o.test_items);
    out.stop = stop_tokens(tokenizer);
    return out;
  }

  /// Of the longest prompt and the longest target, or answer.
  [[nodiscard]] std::int64_t most_tokens(std::int64_t answer_tokens) const {
    std::size_t prompt = 0;
    std::size_t target = static_cast<std::size_t>(answer_tokens);
    for (const FinetuneItems* part : {&train, &development, &test}) {
      for (const prefillshare::TrainingExample& example : part->examples) {
        prompt = std::max(prompt, example.prompt.size());
        target = std::max(target, example.target.size());
      }
    }
    return static_cast<std::int64_t>(prompt + target);
  }

  /// One number for all that is learned and judged.
  [[nodiscard]] std::uint64_t hash() const {
    std::uint64_t out = 0;
    for (const FinetuneItems* part : {&train, &development, &test})
      out = out * 31 + prefillshare::detail::hash_examples(part->examples);
    return out;
  }

  /// The first training items as whole texts, for a quantizer.
  [[nodiscard]] std::vector<Tokens> texts(std::int64_t count) const {
    std::vector<Tokens> out;
    for (const prefillshare::TrainingExample& example : train.examples) {
      if (static_cast<std::int64_t>(out.size()) == count) break;
      Tokens& text = out.emplace_back(example.prompt);
      text.insert(text.end(), example.target.begin(), example.target.end());
    }
    return out;
  }
};

}  // namespace codegemm::bench
