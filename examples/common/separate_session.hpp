// SPDX-License-Identifier: Apache-2.0
//
// common/separate_session.hpp - a session of agents again, each with a prefill and a cache of its own: what
// sharing one is compared with.
// Layer: examples (host only).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <common/agent_turns.hpp>
#include <common/progress.hpp>
#include <common/quantized_model.hpp>
#include <common/report.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/serve/session.hpp>

namespace prefillshare::examples {

/// Agent a prefills the whole context with models[a] and decodes from that cache, as separate models have to;
/// no other cache is in `storage`. The answers are those of the shared run, so that both do the same work.
[[nodiscard]] inline Run run_separate(
    const std::vector<Turn>& turns,
    const std::vector<std::shared_ptr<const LlamaModel<CodeGemmLinear>>>& models, std::int64_t context,
    std::int64_t chunk, HostKvStorage& storage, codegemm::Executor& executor) {
  struct Separate {
    PrefillModule<CodeGemmLinear> prefill;
    ForwardWorkspace prefill_workspace;
    DecodeModule<CodeGemmLinear> decode;
    ForwardWorkspace decode_workspace;
  };
  const auto allocator = unwrap(KvAllocator::create(storage));
  std::vector<Separate> members;
  for (std::size_t a = 0; a < models.size(); ++a) {
    PrefillModule<CodeGemmLinear> prefill(models[a], CacheKey{codegemm::concat("agent ", a), "1", ""});
    auto decode = unwrap(factorize(prefill, models[a]));
    members.push_back(
        {std::move(prefill), unwrap(ForwardWorkspace::create(*models[a], chunk, context, executor.workers())),
         std::move(decode), unwrap(ForwardWorkspace::create(*models[a], 1, context, executor.workers()))});
  }
  std::vector<SharedSession<CodeGemmLinear>> sessions;
  sessions.reserve(members.size());
  for (Separate& member : members) {
    sessions.emplace_back(member.prefill,
                          SessionResources{allocator.get(), &storage, &member.prefill_workspace, &executor});
  }
  Run run{"separate prefill per model", {}, 0.0};
  ProgressLine progress("the same session with separate prefill");
  const auto start = std::chrono::steady_clock::now();
  for (const Turn& turn : turns) {
    for (auto& session : sessions) session.append(turn.prompt);
    const double begin = seconds_since(start);
    std::size_t next = 0;
    Separate& member = members[turn.agent];
    Generation made = unwrap(sessions[turn.agent].decode(
        member.decode, member.decode_workspace,
        DecodeLimits{static_cast<std::int64_t>(turn.chosen.size()), {}},
        [&](std::span<float>) { return turn.chosen[next++]; }, [](std::int32_t) { return true; }));
    for (auto& session : sessions) session.append(turn.answer);
    run.calls.push_back(Call{static_cast<int>(turn.agent), turn.turn, begin, std::move(made)});
    progress.update(std::ssize(run.calls), std::ssize(turns), "calls");
  }
  run.seconds = seconds_since(start);
  return run;
}

}  // namespace prefillshare::examples
