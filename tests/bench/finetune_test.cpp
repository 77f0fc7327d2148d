// SPDX-License-Identifier: Apache-2.0
//
// tests/bench/finetune_test.cpp - the tasks and their judges, specialists' files, and the suite finetune from
// end to end at a toy size.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <bench/support/finetune_cpu_backend.hpp>
#include <bench/support/finetune_suite.hpp>
#include <codegemm/base/thread_pool.hpp>
#include <common/low_rank.hpp>
#include <common/tasks.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>
#include <support/tiny_model.hpp>

using namespace codegemm::bench;
using namespace prefillshare;
using namespace prefillshare::examples;
using prefillshare::test::random_model;
using prefillshare::test::random_tokens;
using prefillshare::test::tiny_config;

namespace {

std::string fresh_folder(const std::string& name) {
  std::string out = (std::filesystem::temp_directory_path() / ("codegemm-" + name)).string();
  std::filesystem::remove_all(out);
  std::filesystem::create_directories(out);
  return out;
}

std::string text_of_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream out;
  out << file.rdbuf();
  return out.str();
}

/// Each byte a token, and one that ends a turn.
Tokenizer byte_tokenizer() {
  TokenizerSpec spec;
  spec.pre = "gpt-2";
  for (int byte = 0; byte < 256; ++byte) {
    std::string& token = spec.tokens.emplace_back();
    utf8_append(token, prefillshare::examples::detail::kByteLetters[static_cast<std::size_t>(byte)]);
  }
  spec.token_types.assign(256, 1);
  spec.tokens.emplace_back("<|im_end|>");
  spec.token_types.push_back(3);
  spec.eos_id = 256;
  spec.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}";
  return unwrap(Tokenizer::create(std::move(spec)));
}

template <class T>
T need(codegemm::Result<T> result) {
  INFO(result.status().message());
  REQUIRE(result.ok());
  return std::move(result).value();
}

}  // namespace

// ---- The tasks.

TEST_CASE("items come from the seed alone, and no answer stands in two parts", "[finetune]") {
  for (const Task& task : kTasks) {
    INFO(task.name);
    const auto train = task_items(task, TaskPart::kTrain, 4000, 1);
    const auto development = task_items(task, TaskPart::kDevelopment, 300, 1);
    const auto test = task_items(task, TaskPart::kTest, 1000, 1);
    REQUIRE(test.size() == 1000);
    const auto again = task_items(task, TaskPart::kTest, 1000, 1);
    const auto other = task_items(task, TaskPart::kTest, 1000, 2);
    std::size_t same = 0;
    for (std::size_t i = 0; i < test.size(); ++i) {
      REQUIRE(test[i].prompt == again[i].prompt);
      REQUIRE(test[i].target == again[i].target);
      same += test[i].prompt == other[i].prompt ? 1U : 0U;
    }
    CHECK(same < 10);
    std::set<std::string> prompts;
    std::set<std::string> answers;
    for (const TaskItem& item : train) {
      CHECK(part_of(item) == TaskPart::kTrain);
      prompts.insert(item.prompt);
      answers.insert(item.target);
    }
    CHECK(prompts.size() == train.size());
    for (const auto* part : {&development, &test}) {
      for (const TaskItem& item : *part) {
        REQUIRE_FALSE(prompts.contains(item.prompt));
        REQUIRE_FALSE(answers.contains(item.target));
      }
    }
    for (const TaskItem& item : development) CHECK(part_of(item) == TaskPart::kDevelopment);
    // A few answers for all would be learned without the prompts.
    std::set<std::string> held_out;
    for (const TaskItem& item : test) held_out.insert(item.target);
    CHECK(held_out.size() > 450);
    for (const TaskItem& item : test) REQUIRE(item.prompt.find('{' + std::string("a}")) == std::string::npos);
  }
}

TEST_CASE("items are the same whatever the compiler", "[finetune]") {
  const std::uint64_t want[] = {0x6214312eb326d6da, 0x5e9e8928626658cb, 0xb7a8eba41cb5a1ab};
  std::size_t at = 0;
  for (const Task& task : kTasks) {
    std::uint64_t state = 0xcbf29ce484222325ULL;
    for (const TaskItem& item : task_items(task, TaskPart::kTest, 200, 1)) {
      for (const char c : item.prompt + item.target)
        state = (state ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
    }
    INFO(task.name);
    CHECK(state == want[at++]);
  }
}

TEST_CASE("a task that has too few items says so", "[finetune]") {
  const Task one{"one", "", [](TaskRandom&) { return TaskItem{"a", "b"}; }, judge_arithmetic};
  CHECK_THROWS_AS(task_items(one, TaskPart::kTrain, 2, 1), UserError);
}

TEST_CASE("a judge takes the right answer, and neither another item's nor one with a changed letter",
          "[finetune]") {
  for (const Task& task : kTasks) {
    INFO(task.name);
    const auto items = task_items(task, TaskPart::kTest, 300, 7);
    for (std::size_t i = 0; i < items.size(); ++i) {
      const std::string& target = items[i].target;
      INFO(target);
      REQUIRE(task.judge(target, target));
      REQUIRE(task.judge(target, " " + target + "\n"));
      REQUIRE_FALSE(task.judge(target, ""));
      const std::string& other = items[(i + 1) % items.size()].target;
      if (other != target && task.judge != judge_arithmetic) REQUIRE_FALSE(task.judge(target, other));
      // In a word problem only the number at the end counts.
      const std::size_t from = task.judge == judge_arithmetic ? target.rfind(' ') : 0;
      for (std::size_t at = from; at < target.size(); ++at) {
        if (std::isalnum(static_cast<unsigned char>(target[at])) == 0) continue;
        std::string changed = target;
        changed[at] = target[at] == '7' ? '8' : '7';
        INFO(changed);
        REQUIRE_FALSE(task.judge(target, changed));
      }
    }
  }
}

TEST_CASE("what counts as the number of a word problem", "[finetune]") {
  const std::string target = "43 - 31 = 12; 12 + 4 = 16. Answer: 16";
  for (const char* right : {"16", "Answer: 16", "The answer is 16.", "Answer: 16 boxes", "it is 12 + 4 = 16",
                            "Answer: 9\nNo. Answer: 16", "Answer:16", "20-16", "20 boxes. Answer: **16**"})
    CHECK(judge_arithmetic(target, right));
  for (const char* wrong :
       {"", "Answer:", "16 + 1 = 17", "Answer: 17 (not 16, but 17)", "Answer: -16", "16.5", "1,600", "116",
        "160", "16 Answer: none", "Answer: 99999999999999999999", "sixteen", "1 6", "Answer: 16 or 17"})
    CHECK_FALSE(judge_arithmetic(target, wrong));
}

TEST_CASE("what counts as the tool call", "[finetune]") {
  const std::string target = R"({"name": "set_timer", "arguments": {"minutes": 7, "label": "tea"}})";
  for (const char* right :
       {R"({"arguments":{"label":"tea","minutes":7},"name":"set_timer"})",
        "```json\n{\"name\": \"set_timer\", \"arguments\": {\"minutes\": 7, \"label\": \"tea\"}}\n```"})
    CHECK(judge_tool_call(target, right));
  for (const char* wrong :
       {"", "{}", "[]", "}{", "set_timer(7, tea)", R"({"name": "set_timer", "arguments": {"minutes": 7}})",
        R"({"name": "set_timer", "arguments": {"minutes": "7", "label": "tea"}})",
        R"({"name": "set_timer", "arguments": {"minutes": 7.0, "label": "tea"}})",
        R"({"name": "set_timer", "arguments": {"minutes": 7, "label": "tea", "more": 1}})",
        R"({"name": "set_timer", "arguments": {"minutes": 7, "label": "tea"}, "more": 1})",
        R"({"name": "set_timer", "arguments": {"minutes": 8, "minutes": 7, "label": "tea"}})",
        R"({"name": "set_alarm", "arguments": {"minutes": 7, "label": "tea"}})",
        R"({"name": "set_timer", "arguments": {"minutes": 7, "label": "Tea"}})",
        R"({"name": "set_timer", "arguments": [7, "tea"]})",
        R"({"name": "set_timer", "arguments": {"minutes": 7, "label": "tea"})",
        R"({"name": "a"} {"name": "set_timer", "arguments": {"minutes": 7, "label": "tea"}})"})
    CHECK_FALSE(judge_tool_call(target, wrong));
  CHECK_FALSE(judge_tool_call(target, std::string(100000, '{') + std::string(100000, '}')));
}

TEST_CASE("what counts as the shell command", "[finetune]") {
  const auto check = [](const char* target, const std::vector<const char*>& right,
                        const std::vector<const char*>& wrong) {
    INFO(target);
    for (const char* answer : right) {
      INFO(answer);
      CHECK(judge_shell_command(target, answer));
    }
    for (const char* answer : wrong) {
      INFO(answer);
      CHECK_FALSE(judge_shell_command(target, answer));
    }
  };
  check("tail -n 5 /data/old/a.log",
        {"tail -n5 /data/old/a.log", "tail -5 /data/old/a.log", "$ tail -n 5 '/data/old/a.log'",
         "```bash\n# the end\ntail -n 5 /data/old/a.log\n```", "`tail /data/old/a.log -n 5`",
         "Use this:\n```\ntail -n 5 /data/old/a.log\n```\nIt shows the end."},
        {"tail -n 5 /data/old/b.log", "tail -n 6 /data/old/a.log", "tail /data/old/a.log",
         "head -n 5 /data/old/a.log", "tail -n 5 /data/old/a.log; rm -r /",
         "tail -n 5 /data/old/a.log | wc -l", "tail -n 5 /data/old/a.log &", "tail -n 5 $(cat x)",
         "tail -n 5 /data/old/a.log > b", "tail -f -n 5 /data/old/a.log", "tail -n 5 /data/old/a.log\nrm x",
         "", "|", "tail -n 5 '/data/old/a.log"});
  CHECK(judge_shell_command("tail -n 5 a.log", "```\ntail -n 5 a.log"));
  check("find /data -name '*.log' -mtime +9", {"find /data -mtime +9 -name \"*.log\""},
        {"find /data -mtime 9 -name '*.log'", "find -name '*.log' -mtime +9", "find /data -name '*.log'",
         "find /data -name '+9' -mtime '*.log'", "find /data -name '*.log' -mtime +9 -delete"});
  check("grep -ri 'paid' /data/x", {"grep -ir paid /data/x", "grep -i -r \"paid\" /data/x"},
        {"grep -r paid /data/x", "grep -ri /data/x paid", "grep -riv paid /data/x", "grep -ri Paid /data/x"});
  check("tar -czf a1.tar.gz /data/x", {"tar -zcf a1.tar.gz /data/x", "tar -c -z -f a1.tar.gz /data/x"},
        {"tar -cf a1.tar.gz /data/x", "tar -xzf a1.tar.gz /data/x", "tar -czf /data/x a1.tar.gz"});
  check("cut -d ',' -f 3 a.csv", {"cut -d, -f3 a.csv", "cut -f 3 -d \",\" a.csv"},
        {"cut -d ';' -f 3 a.csv", "cut -d ',' -f 2 a.csv", "cut -f 3 a.csv"});
  check("sort -n a.txt | tail -n 3", {"sort -n a.txt|tail -3"},
        {"sort a.txt | tail -n 3", "tail -n 3 | sort -n a.txt", "sort -n a.txt",
         "sort -n a.txt | tail -n 3 | cat"});
  check("cp -r /data/a /data/b", {"cp -r /data/a /data/b"}, {"cp -r /data/b /data/a", "cp /data/a /data/b"});
}

// ---- Specialists' files.

namespace {

struct Specialists {
  std::shared_ptr<const LlamaModel<DenseLinear>> base = random_model(tiny_config(), 3);
  Specialist made{"tools", "00ff", {}};
  std::string folder = fresh_folder("specialists");
  std::string path = folder + "/a.safetensors";

  Specialists() {
    codegemm::test::Rng rng(4);
    for_each_linear(*base, [&](const std::string& name, const DenseLinear& layer) {
      if (name == "lm_head" || name.find("mlp.up") != std::string::npos) return;
      made.deltas.push_back({name, 2, 0.5F, rng.normals(2 * layer.cols()), rng.normals(layer.rows() * 2)});
    });
  }

  /// What reading says after the file's tensors and texts were changed.
  Status after(const std::function<void(std::vector<codegemm::SafetensorsTensor>&,
                                        std::vector<codegemm::SafetensorsText>&)>& change) {
    check(write_specialist(path, made));
    const auto file = need(codegemm::SafetensorsFile::open(path));
    std::vector<codegemm::SafetensorsTensor> tensors(file.tensors().begin(), file.tensors().end());
    std::vector<codegemm::SafetensorsText> texts;
    for (const char* key : {"kind", "task", "base", "scale"})
      texts.push_back({key, *file.find_metadata(key)});
    change(tensors, texts);
    check(codegemm::write_safetensors(folder + "/b.safetensors", tensors, texts));
    return read_specialist(folder + "/b.safetensors", *base, "00ff").status();
  }
};

}  // namespace

TEST_CASE("deltas come back from their file as fp16 has them, and merge into the weights", "[finetune]") {
  const Specialists s;
  REQUIRE(write_specialist(s.path, s.made).ok());
  const Specialist read = need(read_specialist(s.path, *s.base, "00ff"));
  CHECK(read.task == "tools");
  REQUIRE(read.deltas.size() == s.made.deltas.size());
  const auto merged = need(merge(*s.base, read.deltas));
  std::size_t at = 0;
  std::size_t changed = 0;
  std::vector<DenseLinear> before;
  for_each_linear(*s.base, [&](const std::string&, const DenseLinear& layer) { before.push_back(layer); });
  for_each_linear(*merged, [&](const std::string& name, const DenseLinear& layer) {
    INFO(name);
    const DenseLinear& old = before[at++];
    const auto delta = std::find_if(s.made.deltas.begin(), s.made.deltas.end(),
                                    [&](const LowRankDelta& d) { return d.name == name; });
    for (std::int64_t n = 0; n < layer.rows(); ++n) {
      for (std::int64_t k = 0; k < layer.cols(); ++k) {
        double want = static_cast<double>(old.weights().row(n)[k]);
        for (std::int64_t r = 0; delta != s.made.deltas.end() && r < 2; ++r) {
          const auto half = [](float x) {
            return static_cast<double>(codegemm::Half::from_float(x).to_float());
          };
          want += 0.5 * half(delta->b[static_cast<std::size_t>(n * 2 + r)]) *
                  half(delta->a[static_cast<std::size_t>(r * layer.cols() + k)]);
        }
        REQUIRE(std::abs(static_cast<double>(layer.weights().row(n)[k]) - want) <= 1e-5);
      }
    }
    changed += delta != s.made.deltas.end() ? 1U : 0U;
  });
  CHECK(changed == s.made.deltas.size());
}

TEST_CASE("a specialist's file that does not fit the base is refused by name", "[finetune]") {
  Specialists s;
  using Tensors = std::vector<codegemm::SafetensorsTensor>;
  using Texts = std::vector<codegemm::SafetensorsText>;
  const auto expect = [&](const Status& status, codegemm::StatusCode code, const std::string& words) {
    INFO(status.message() << " / " << words);
    CHECK(status.code() == code);
    CHECK(status.message().find(words) != std::string::npos);
  };
  CHECK(s.after([](Tensors&, Texts&) {}).ok());
  using codegemm::StatusCode;
  expect(s.after([](Tensors&, Texts& t) { t[2].value = "00fe"; }), StatusCode::kIncompatible, "00fe");
  expect(s.after([](Tensors&, Texts& t) { t[0].value = "a cake"; }), StatusCode::kIncompatible, "a cake");
  for (const char* scale : {"", "nan", "inf", "1x", "one"})
    expect(s.after([&](Tensors&, Texts& t) { t[3].value = scale; }), StatusCode::kCorruptData, "scale");
  expect(s.after([](Tensors& t, Texts&) { t.erase(t.begin() + 1); }), StatusCode::kCorruptData, "lora_B");
  expect(s.after([](Tensors& t, Texts&) { t.clear(); }), StatusCode::kCorruptData, "0 of its 0");
  expect(s.after([](Tensors& t, Texts&) { t[0].name = "model.layers.9.mlp.up_proj.lora_A.weight"; }),
         StatusCode::kCorruptData, "tensors belong");
  expect(s.after([](Tensors& t, Texts&) { std::swap(t[0].shape[0], t[0].shape[1]); }),
         StatusCode::kCorruptData, "must be F16");
  expect(s.after([](Tensors& t, Texts&) { t[0].dtype = codegemm::Dtype::kBF16; }), StatusCode::kCorruptData,
         "BF16");
  expect(s.after([](Tensors& t, Texts&) {
    t[0].shape = {0, 24};
    t[0].data = {};
  }),
         StatusCode::kCorruptData, "rank 0");
  expect(s.after([](Tensors& t, Texts&) {
    t[0].shape = {};
    t[0].data = t[0].data.first(2);
  }),
         StatusCode::kCorruptData, "rank 0");
  std::vector<std::byte> bytes;
  expect(s.after([&](Tensors& t, Texts&) {
    bytes.assign(t[0].data.begin(), t[0].data.end());
    bytes[0] = std::byte{0};
    bytes[1] = std::byte{0x7e};  // NaN
    t[0].data = bytes;
  }),
         StatusCode::kCorruptData, "not finite");
  const std::string whole = text_of_file(s.path);
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{100}, whole.size() - 1}) {
    std::ofstream(s.path, std::ios::binary | std::ios::trunc) << whole.substr(0, size);
    CHECK_FALSE(read_specialist(s.path, *s.base, "00ff").ok());
  }
  CHECK(read_specialist(s.folder + "/none", *s.base, "00ff").status().code() == StatusCode::kNotFound);

  s.made.deltas[0].a[0] = 1e6F;
  expect(write_specialist(s.path, s.made), StatusCode::kInvalidArgument, s.made.deltas[0].name);
  s.made.deltas[0].a.pop_back();
  expect(merge(*s.base, s.made.deltas).status(), StatusCode::kShapeMismatch, s.made.deltas[0].name);
  s.made.deltas[0].name = "model.layers.9.mlp.up_proj";
  expect(merge(*s.base, s.made.deltas).status(), StatusCode::kNotFound, "deltas");
}

// ---- Who trains and generates.

TEST_CASE("answers are the reference's, whatever share of the prompt comes from the base", "[finetune]") {
  const auto base = random_model(tiny_config(), 11);
  const auto tuned = random_model(tiny_config(), 12);
  codegemm::ThreadPool pool(2);
  FinetuneCpuBackend backend = need(FinetuneCpuBackend::create(base, 32, pool));
  const auto module = need(backend.load(tuned));
  codegemm::test::Rng rng(13);
  std::vector<Tokens> prompts;
  for (const std::int64_t length : {1, 2, 9, 20, 26}) prompts.push_back(random_tokens(rng, length, 61));
  for (int i = 0; i < 31; ++i) prompts.push_back(random_tokens(rng, 5, 61));  // more than run at a time
  constexpr std::int64_t kMost = 6;
  const std::vector<std::int32_t> stop = {7, 40};
  for (const double sharing : {0.0, 0.5, 1.0}) {
    const auto answers = need(backend.generate(module, prompts, sharing, kMost, stop));
    REQUIRE(answers.size() == prompts.size());
    for (std::size_t i = 0; i < prompts.size(); i += i < 4 ? 1 : 8) {
      const auto length = static_cast<std::int64_t>(prompts[i].size());
      const auto shared = static_cast<std::size_t>(shared_tokens(length, sharing));
      std::vector<prefillshare::test::ReferenceCache> caches;
      Tokens rest = prompts[i];
      (void)reference_forward(*base, std::span(rest).first(shared), caches);
      rest.erase(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(shared));
      Tokens want;
      while (std::ssize(want) < kMost) {
        const auto logits = reference_forward(*tuned, rest, caches).back();
        const auto token =
            static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
        if (std::find(stop.begin(), stop.end(), token) != stop.end()) break;
        want.push_back(token);
        rest = {token};
      }
      INFO("sharing " << sharing << ", prompt " << i);
      CHECK(answers[i] == want);
    }
  }
  CHECK_FALSE(backend.generate(module, {{prompts[4]}}, 1.0, 7, stop).ok());  // 26 + 7 of 32
  CHECK_FALSE(backend.generate(module, {{Tokens{}}}, 1.0, 1, stop).ok());
}

TEST_CASE("a module that learned its examples on the base's cache answers with them", "[finetune]") {
  const auto base = random_model(tiny_config(), 21);
  codegemm::ThreadPool pool(2);
  FinetuneCpuBackend backend = need(FinetuneCpuBackend::create(base, 32, pool));
  codegemm::test::Rng rng(22);
  std::vector<TrainingExample> examples;
  std::vector<Tokens> prompts;
  std::vector<Tokens> answers;
  for (int i = 0; i < 5; ++i) {
    examples.push_back({random_tokens(rng, 8 + i, 61), random_tokens(rng, 3, 60)});
    prompts.push_back(examples.back().prompt);
    answers.push_back(examples.back().target);
    examples.back().target.push_back(60);
  }
  const std::vector<std::int32_t> stop = {60};
  TrainJob job;
  job.start = base;
  job.examples = examples;
  job.options.steps = 120;
  job.options.batch = 5;
  job.options.pass_tokens = 64;
  job.options.max_tokens = 32;
  job.options.rate = 1e-2;
  job.options.adam.weight_decay = 0.0;
  std::int64_t steps = 0;
  job.progress = [&](const TrainProgress&) { ++steps; };
  for (const ParameterKind kind : {ParameterKind::kFull, ParameterKind::kLowRank}) {
    job.kind = kind;
    job.options.sharing = 1.0;
    const auto module = need(backend.train(job));
    CHECK(need(backend.generate(module, prompts, 1.0, 8, stop)) == answers);
    CHECK(need(backend.loss(module, examples, 1.0)) < 0.1);
    const auto deltas = need(backend.low_rank(module));
    CHECK(deltas.empty() == (kind == ParameterKind::kFull));
    if (kind == ParameterKind::kFull) continue;
    const auto merged = need(merge(*base, deltas));
    const auto dense = need(backend.dense(module));
    double worst = 0.0;
    std::vector<DenseLinear> layers;
    for_each_linear(*dense, [&](const std::string&, const DenseLinear& layer) { layers.push_back(layer); });
    std::size_t at = 0;
    for_each_linear(*merged, [&](const std::string&, const DenseLinear& layer) {
      const float* const one = layer.weights().data;
      const float* const other = layers[at++].weights().data;
      REQUIRE((one != nullptr && other != nullptr));
      for (std::int64_t i = 0; one != nullptr && other != nullptr && i < layer.rows() * layer.cols(); ++i)
        worst = std::max(worst, std::abs(static_cast<double>(one[i] - other[i])));
    });
    CHECK(worst <= 1e-5);
  }
  CHECK(steps == 240);

  job.kind = ParameterKind::kCodebooks;
  CHECK(backend.train(job).status().code() == codegemm::StatusCode::kNullPointer);
  const Matrices matrices = quantize_plainly(*base, unwrap(codegemm::parse_format("m1v4b4g8")), pool);
  job.matrices = &matrices;
  const auto plain = need(backend.load(dequantize_module(*base, matrices)));
  const auto adapted = need(backend.train(job));
  CHECK(need(backend.loss(adapted, examples, 1.0)) < 0.5 * need(backend.loss(plain, examples, 1.0)));
}

// ---- The suite.

namespace {

struct Toy {
  FinetuneOptions options;
  Tokenizer tokenizer = byte_tokenizer();
  LoadedModel loaded;

  // name: of its folder, a test's own, as tests run beside each other.
  explicit Toy(const std::string& name) {
    ModelConfig c = tiny_config();
    c.vocab_size = 257;
    c.hidden_size = 64;
    c.intermediate_size = 64;
    c.heads = 4;
    c.kv_heads = 1;
    c.head_dim = c.rope.head_dim = 16;
    c.layers = 1;
    c.context_length = 512;
    loaded = {random_model(c, 31), "00112233"};
    const std::string folder = fresh_folder("finetune-" + name);
    options.work = folder + "/work";
    options.json_path = folder + "/out.json";
    options.plot = folder + "/out.svg";
    options.specialists = folder + "/specialists";
    options.tasks = {"shell", "arithmetic"};
    options.train_items = 4;
    options.development_items = 2;
    options.test_items = 3;
    options.answer_tokens = 3;
    options.seeds = 2;
    options.rates = {1e-3, 1e-2};
    options.sharing = {0.5};
    options.curve_seeds = 2;
    options.steps = 1;
    options.batch = 1;
    options.pass_tokens = 512;
    options.low_rank_rates = {1e-2};
    options.rank = 2;
    options.formats = {"m1v4b4g64", "m1v4b4g64-calibrated"};
    options.calibration_items = 1;
    options.adapt_steps = 1;
    options.adapt_rates = {1e-3};
    options.threads = 2;
  }
  [[nodiscard]] std::vector<FinetuneRow> run(bool& complete) {
    const auto pools = make_pools(options);
    FinetuneSuite<FinetuneCpuBackend> suite(options, loaded, tokenizer, pools, {"finetune", "toy", {}, {}});
    complete = suite.run();
    return suite.rows();
  }
  [[nodiscard]] nlohmann::json json() const { return nlohmann::json::parse(text_of_file(options.json_path)); }
};

}  // namespace

TEST_CASE("the suite runs all of its methods, stops at its time limit and goes on", "[finetune]") {
  Toy toy("whole");
  bool complete = true;
  toy.options.time_limit = 1e-9;
  CHECK(toy.run(complete).empty());
  CHECK_FALSE(complete);
  CHECK(toy.json()["complete"] == false);

  toy.options.time_limit = 0.0;
  toy.options.stages = {"claim"};
  const auto claim = toy.run(complete);
  CHECK(complete);
  CHECK(claim.size() == std::size_t{2} * 5);  // naive sharing also at 0.5
  toy.options.stages = {"claim", "specialists", "curve", "quantized"};
  const auto rows = toy.run(complete);
  CHECK(complete);

  const std::vector<std::string> methods = {"base",
                                            "full",
                                            "prefillshare",
                                            "naive",
                                            "naive",
                                            "prefillshare",
                                            "prefillshare m1v4b4g64",
                                            "prefillshare m1v4b4g64 adapted",
                                            "prefillshare m1v4b4g64-calibrated",
                                            "prefillshare m1v4b4g64-calibrated adapted",
                                            "low rank",
                                            "low rank m1v2g64"};
  REQUIRE(rows.size() == 2 * methods.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    INFO(i);
    const FinetuneRow& row = rows[i];
    CHECK(row.method == methods[i % methods.size()]);
    CHECK(row.task == toy.options.tasks[i / methods.size()]);
    const std::size_t at = i % methods.size();
    CHECK(row.accuracy.size() == (at >= 1 && at <= 5 ? 2U : 1U));
    CHECK(row.items == 3);
    CHECK((row.rate > 0.0) == (at > 0));
  }
  const nlohmann::json json = toy.json();
  CHECK(json["suite"] == "finetune");
  CHECK(json["complete"] == true);
  CHECK(json["rows"].size() == rows.size());
  CHECK(json["jobs"] == 1);
  REQUIRE(json["stages"].size() == 4);
  for (const nlohmann::json& stage : json["stages"]) {
    const bool claimed = stage["stage"] == "claim";  // in the run before
    CHECK(stage["runs_kept"] == (claimed ? 2 * 7 : 0));
    CHECK(stage["runs"] == (claimed ? 0 : stage["stage"] == "quantized" ? 2 * 4 : 2 * 2));
    CHECK((stage["seconds"].get<double>() > 0.0) != claimed);
    CHECK(stage["seconds"].get<double>() <= json["wall_seconds"].get<double>());
  }
  CHECK(json["rows"][2]["accuracy_mean"].is_number());
  CHECK(text_of_file(toy.options.plot).find("naive") != std::string::npos);
  const std::string specialist = toy.options.specialists + "/shell.safetensors";
  CHECK(need(read_specialist(specialist, *toy.loaded.model, "00112233")).deltas.size() == 7);

  // All is there: nothing is run again. A broken file, or one of another run, is.
  const std::string path = toy.options.work + "/shell-base.json";
  nlohmann::json kept = nlohmann::json::parse(text_of_file(path));
  kept["run"]["accuracy"][0][1] = 12.5;
  std::ofstream(path) << kept;
  CHECK(toy.run(complete)[0].mean() == 12.5);
  for (const char* broken : {"{", "{\"key\": 1}", "[]"}) {
    std::ofstream(path) << broken;
    CHECK(toy.run(complete)[0].mean() != 12.5);
  }
  kept["key"] = "another";
  std::ofstream(path) << kept;
  CHECK(toy.run(complete)[0].mean() != 12.5);
  CHECK(complete);
}

TEST_CASE("runs side by side are those of one after the other", "[finetune]") {
  std::vector<std::vector<FinetuneRow>> tables;
  std::vector<std::map<std::string, nlohmann::json>> runs;  // by their files' names
  for (const std::int64_t jobs : {1, 3}) {
    Toy toy("jobs");
    toy.options.jobs = jobs;
    toy.options.threads = static_cast<int>(jobs);
    toy.options.tasks = {"shell"};
    toy.options.quantized_seeds = 2;
    bool complete = false;
    tables.push_back(toy.run(complete));
    CHECK(complete);
    CHECK(toy.json()["jobs"] == jobs);
    for (const auto& file : std::filesystem::directory_iterator(toy.options.work)) {
      if (file.path().extension() != ".json") continue;
      nlohmann::json run = nlohmann::json::parse(text_of_file(file.path().string()));
      for (const char* time : {"seconds", "tokens_per_second"}) run["run"].erase(time);
      (runs.size() < tables.size() ? runs.emplace_back() : runs.back())[file.path().filename()] = run;
    }
  }
  CHECK(runs[0].size() == 7 + 2 + 2 + 8);
  CHECK(runs[0] == runs[1]);
  REQUIRE(tables[0].size() == tables[1].size());
  for (std::size_t i = 0; i < tables[0].size(); ++i) {
    CHECK(tables[0][i].method == tables[1][i].method);
    CHECK(tables[0][i].rate == tables[1][i].rate);
    CHECK(tables[0][i].accuracy == tables[1][i].accuracy);
    if (tables[0][i].method.find("m1v4b4g64") != std::string::npos) CHECK(tables[0][i].accuracy.size() == 2);
  }
}

TEST_CASE("a rate at which the loss does not stay finite counts as nothing learned", "[finetune]") {
  Toy toy("not-finite");
  toy.options.tasks = {"shell"};
  toy.options.stages = {"claim"};
  toy.options.steps = 3;
  toy.options.seeds = 1;
  toy.options.rates = {1e30};
  bool complete = false;
  const auto rows = toy.run(complete);
  CHECK(complete);
  REQUIRE(rows.size() == 5);
  CHECK(rows[1].mean() == 0.0);
  const nlohmann::json kept = nlohmann::json::parse(
      text_of_file(toy.options.work + "/" + run_name("shell", "full", 1e30, 1) + ".json"));
  CHECK(kept["run"]["loss"] == 1e9);
}

TEST_CASE("the rate is chosen on the development items, by the first seed", "[finetune]") {
  FinetuneOptions options;
  options.tasks = {"tools"};
  options.seeds = 3;
  std::map<std::string, FinetuneRun> runs;
  const auto add = [&](double rate, std::int64_t seed, double development, double loss, double accuracy) {
    FinetuneRun run;
    run.task = "tools";
    run.method = "full";
    run.rate = rate;
    run.seed = seed;
    run.development = development;
    run.loss = loss;
    run.accuracy = {{0.0, accuracy}, {1.0, accuracy / 2}};
    runs[run_name("tools", "full", rate, seed)] = run;
  };
  add(1e-4, 1, 90.0, 0.2, 99.0);
  add(3e-4, 1, 95.0, 0.3, 91.0);
  add(1e-3, 1, 95.0, 0.1, 92.0);
  add(1e-3, 2, 10.0, 9.0, 94.0);
  add(1e-4, 2, 99.0, 0.0, 50.0);
  add(1e-3, 3, 10.0, 9.0, 96.0);
  const FinetuneResults results(options, runs);
  CHECK(results.best_rate("tools", "full") == 1e-3);
  CHECK_FALSE(results.best_rate("tools", "shared").has_value());
  const auto rows = results.rows();
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].mean() == 94.0);
  CHECK(rows[0].deviation() == 2.0);
  CHECK(rows[1].method == "naive");
  CHECK(rows[1].mean() == 47.0);
  CHECK(rows[1].rate == 1e-3);
}
