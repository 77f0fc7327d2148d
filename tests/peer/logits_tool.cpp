// SPDX-License-Identifier: Apache-2.0
//
// tests/peer/logits_tool.cpp - writes our logits for given token ids, for logits_peer.py to compare.
// Usage: logits_tool MODEL IDS.json OUT.bin   IDS.json: [[id, ...], ...]; OUT.bin: fp32 [tokens][vocab],
// prompt by prompt.

#include <cstdio>
#include <exception>
#include <fstream>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/model_loader.hpp>
#include <common/tensor_source.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/model/forward.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

int fail(const Status& status) {
  std::fprintf(stderr, "logits_tool: %s\n", status.message().c_str());
  return 2;
}

int run(const char* model_path, const char* ids_path, const char* out_path) {
  auto source = open_model(model_path);
  if (!source.ok()) return fail(source.status());
  auto loaded = load_model(**source);
  if (!loaded.ok()) return fail(loaded.status());
  const LlamaModel<DenseLinear>& model = *loaded->model;

  std::ifstream in(ids_path);
  const auto prompts = nlohmann::json::parse(in).get<std::vector<std::vector<std::int32_t>>>();
  std::ofstream out(out_path, std::ios::binary);
  codegemm::ThreadPool pool;
  for (const std::vector<std::int32_t>& ids : prompts) {
    const auto tokens = static_cast<std::int64_t>(ids.size());
    const KvShape shape = kv_shape(model.config);
    const std::int64_t blocks = (tokens + shape.block_tokens - 1) / shape.block_tokens;
    auto storage = HostKvStorage::create(shape, blocks);
    if (!storage.ok()) return fail(storage.status());
    auto allocator = KvAllocator::create(*storage);
    if (!allocator.ok()) return fail(allocator.status());
    auto sequence = (*allocator)->open(CacheKey{"logits", "1", ""}, {});
    if (!sequence.ok()) return fail(sequence.status());
    if (Status s = (*allocator)->reserve(*sequence, tokens); !s.ok()) return fail(s);
    auto workspace = ForwardWorkspace::create(model, tokens, tokens, pool.workers());
    if (!workspace.ok()) return fail(workspace.status());
    std::vector<float> logits(static_cast<std::size_t>(tokens * model.config.vocab_size));
    const KvTarget target{&*storage, sequence->blocks(), 0};
    if (Status s =
            forward(model, ids, target, MatrixView<float>(logits.data(), tokens, model.config.vocab_size),
                    *workspace, pool);
        !s.ok()) {
      return fail(s);
    }
    out.write(reinterpret_cast<const char*>(logits.data()),
              static_cast<std::streamsize>(logits.size() * sizeof(float)));
  }
  out.flush();
  if (out.good()) return 0;
  std::fprintf(stderr, "logits_tool: %s: cannot be written\n", out_path);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: logits_tool MODEL IDS.json OUT.bin\n");
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "logits_tool: %s\n", e.what());
    return 2;
  }
}
