// SPDX-License-Identifier: Apache-2.0
//
// bench/finetune.cpp - PrefillShare's claim on a real model, small enough for a CPU: base, fine-tuning with
// its own prefill, fine-tuning on the base's cache, and naive sharing, on a task with exact answers.
// finetune-gpu is the whole of it.

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <cstdio>
#include <memory>
#include <utility>

#include <CLI/CLI.hpp>

#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/run_program.hpp>

#include "support/finetune_cpu_backend.hpp"
#include "support/finetune_suite.hpp"

namespace {

using namespace codegemm::bench;
using prefillshare::examples::unwrap;

int run(const FinetuneOptions& options) {
  const auto pools = make_pools(options);
  const auto tokenizer = unwrap(prefillshare::examples::load_tokenizer(options.model));
  const auto loaded =
      unwrap(prefillshare::examples::load_model(*unwrap(prefillshare::examples::open_model(options.model))));
  Suite frame{"finetune", machine_json(*pools.front()), measure_memory(*pools.front()), {}};
  FinetuneSuite<FinetuneCpuBackend> suite(options, loaded, tokenizer, pools, std::move(frame));
  suite.run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  FinetuneOptions options;  // some minutes on two cores
  options.tasks = {"tools"};
  options.stages = {"claim"};
  options.low_rank = true;
  options.seeds = 1;
  options.rates = {3e-3};
  options.sharing = {};
  options.steps = 32;
  options.batch = 8;
  options.pass_tokens = 1024;
  options.development_items = 8;
  options.test_items = 48;
  options.answer_tokens = 48;
  CLI::App app{"Fine-tunes decode modules on the cache of a frozen base and judges what they answer."};
  add_options(app, options);
  return prefillshare::examples::run_program("finetune", app, argc, argv, [&] { return run(options); });
}
