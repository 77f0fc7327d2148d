// SPDX-License-Identifier: Apache-2.0
//
// bench/multi_gpu.cu - suite multi-gpu: what several GPUs add. Parts, each as far as the GPUs here allow:
//   link      bytes a second from one GPU to another, by copy engine and by kernel: the peak
//   sums      time of a sum over the ranks, by peer memory and by NCCL
//   handoff   base caches at the shapes of Llama-3.1-8B from a prefill GPU to a decode GPU: alone, and layer
//             by layer under the prefill; time to the first token, and that the text is one GPU's
//   logits    a small model of codes spread over the GPUs against the same on one
//   parallel  decode at the shapes of Llama-3.1-70B, 2 bits a weight, on 1, 2, 4, ... GPUs
//   killed    a prefill process killed in the middle of a hand-off: what becomes of its blocks and session
// With one GPU, handoff and killed run between two pools on it.
//
// usage: multi-gpu [--json FILE] [--quick] [--part NAME]... [--steps N]
//   FILE keeps the rows of parts that are not run.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/multi_gpu_handoff.cuh"
#include "support/multi_gpu_killed.cuh"
#include "support/multi_gpu_link.cuh"
#include "support/multi_gpu_logits.cuh"
#include "support/multi_gpu_parallel.cuh"

namespace {

using namespace codegemm::bench;
using namespace codegemm::bench::multi;

// What the file of results holds.
nlohmann::json read_results(const std::string& path) {
  std::ifstream file(path);
  if (path.empty() || !file) return {};
  auto out = nlohmann::json::parse(file, nullptr, false);
  return out.is_object() && out.contains("rows") ? out : nlohmann::json();
}

// After each row, so that what fails later costs none. Rows of parts that do not run now stay.
void keep(const Options& options, const nlohmann::json& before, MemorySpeed memory, const Rows& now) {
  if (options.json.empty()) return;
  nlohmann::json rows = nlohmann::json::array();
  if (!before.is_null()) {
    for (const auto& row : before["rows"]) {
      if (std::find(options.parts.begin(), options.parts.end(), row.value("part", "")) == options.parts.end())
        rows.push_back(row);
    }
    memory.read_gb_per_s = std::max(memory.read_gb_per_s, before.value("read_gb_per_s", 0.0));
    memory.copy_gb_per_s = std::max(memory.copy_gb_per_s, before.value("copy_gb_per_s", 0.0));
  }
  for (const auto& row : now.rows) rows.push_back(row);
  const Suite frame{"multi-gpu", describe_card(device_of(0)), memory, {}};
  check(write_text(frame_json(frame, std::move(rows)).dump(2) + '\n', options.json));
}

int program(int argc, char** argv) {
  Options options;
  int child = -1;
  parse(argc, argv,
        {{"--json", Option::value(options.json)},
         {"--quick", Option::flag([&] { options.quick = true, options.steps = 25; })},
         {"--part", Option::value([&](const char* text) { options.parts.emplace_back(text); })},
         {"--steps", Option::value(options.steps)},
         {"--child", Option::value(child)}});
  if (child >= 0) return killed_child(child);
  if (options.steps < 5) throw std::runtime_error("--steps from 5 on");
  const std::vector<std::string> known = {"killed", "link", "sums", "handoff", "logits", "parallel"};
  if (options.parts.empty()) options.parts = known;
  for (const std::string& part : options.parts) {
    if (std::find(known.begin(), known.end(), part) == known.end())
      throw std::runtime_error("unknown part " + part);
  }
  const auto wanted = [&](const char* part) {
    return std::find(options.parts.begin(), options.parts.end(), part) != options.parts.end();
  };
  const int gpus = gpu_count();
  if (gpus == 0) throw std::runtime_error("no GPU");
  const nlohmann::json before = read_results(options.json);
  MemorySpeed memory;
  Rows rows;
  rows.added = [&] { keep(options, before, memory, rows); };
  if (wanted("killed")) run_killed(gpus, rows);
  const int to = gpus > 1 ? 1 : 0;
  enable_peers(gpus);
  const Device device = device_of(0);
  if (wanted("link")) {
    const Stream stream;
    memory = measure_bandwidth(stream.get, device.multiprocessors);
    if (gpus > 1) static_cast<void>(link_peak(to, &rows));
  }
  if (wanted("sums")) {
    for (int ranks = 2; ranks <= std::min(gpus, 8); ranks *= 2) {
      Peers peers(ranks, {});
      measure_sums<PeerGroup>(
          "peer memory", ranks,
          [&](int r) -> const PeerGroup& { return peers.groups[static_cast<std::size_t>(r)]; }, rows);
#ifdef PREFILLSHARE_WITH_NCCL
      Communicators comms(ranks);
      std::vector<NcclGroup> groups;
      for (ncclComm_t comm : comms.comms) groups.push_back(take(NcclGroup::create(comm)));
      measure_sums<NcclGroup>(
          "nccl", ranks, [&](int r) -> const NcclGroup& { return groups[static_cast<std::size_t>(r)]; },
          rows);
#endif
    }
  }
  if (wanted("handoff")) {
    const double peak = gpus > 1 ? link_peak(to, nullptr) : 0.0;
    HandoffSuite suite(options, to, peak, rows);
    for (const std::int64_t context : {1024, 4096, 16384}) {
      if (options.quick && context > 1024) break;
      suite.run(context);
    }
  }
  if (wanted("logits")) run_logits(gpus, rows);
  if (wanted("parallel")) run_parallel(options, gpus, rows);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // Read when CUDA and NCCL start; multicast stays off whatever the machine offers.
  setenv("NCCL_NVLS_ENABLE", "0", 1);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  return run_suite("multi-gpu", argc, argv, program);
}
