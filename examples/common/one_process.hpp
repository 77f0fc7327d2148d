// SPDX-License-Identifier: Apache-2.0
//
// common/one_process.hpp - a session of agents in this process alone: what one of several processes is
// checked against.
// Layer: examples (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/text.hpp>
#include <common/agent_turns.hpp>
#include <common/chooser.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/serve/session.hpp>

namespace prefillshare::examples {

/// Throws UserError unless every call of the session has the answer of `turns` here, too, where `base`
/// prefills and with_decode_module(agent, use) calls use(module). `storage` is nobody else's.
template <class WithDecodeModule>
void check_in_one_process(const PrefillModule<DenseLinear>& base, HostKvStorage& storage, std::int64_t chunk,
                          const std::vector<Turn>& turns, std::int64_t max_tokens, const Tokenizer& tokenizer,
                          codegemm::Executor& executor, WithDecodeModule&& with_decode_module) {
  const std::int64_t context = base.model().config.context_length;
  const std::vector<std::int32_t> stop = stop_tokens(tokenizer);
  const auto allocator = unwrap(KvAllocator::create(storage));
  ForwardWorkspace workspace =
      unwrap(ForwardWorkspace::create(base.model(), chunk, context, executor.workers()));
  SharedSession<DenseLinear> session(base, {allocator.get(), &storage, &workspace, &executor});
  GreedyChooser choose;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    session.append(turns[i].prompt);
    Generation made;
    with_decode_module(turns[i].agent, [&](auto module) {
      ForwardWorkspace own = unwrap(ForwardWorkspace::create(module.model(), 1, context, executor.workers()));
      made = unwrap(session.decode(
          module, own, DecodeLimits{max_tokens, stop},
          [&](std::span<float> logits) { return choose(i + 1, logits); }, [](std::int32_t) { return true; }));
    });
    if (made.tokens != turns[i].answer) {
      throw UserError(codegemm::concat(
          "call ", i + 1, ": one process alone answers otherwise: ", unwrap(tokenizer.decode(made.tokens))));
    }
    session.append(made.tokens);
  }
  std::printf("\nok: the %zu answers of one process alone are the same\n", turns.size());
}

}  // namespace prefillshare::examples
