// SPDX-License-Identifier: Apache-2.0
//
// examples/02_kv_sharing.cpp - one prefilled context, read by three decode modules, out of one block pool.
// The engine's own KV memory stays where it is: the allocator hands out block numbers and a page table.

#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/page_table.hpp>

using namespace prefillshare;

int main() {
  // [guide: allocate]
  // Llama-3.1-8B's cache in blocks of 16 tokens; 256 blocks.
  NoKvStorage storage(KvShape{.layers = 32, .kv_heads = 8, .head_dim = 128, .block_tokens = 16}, 256);
  auto allocator = BasicKvAllocator<NoKvStorage>::create(storage).value();

  std::vector<std::int32_t> document(1000);
  std::iota(document.begin(), document.end(), 0);
  const CacheKey base{"llama-3.1-8b", "v1", /*tenant_salt=*/""};

  Sequence context = allocator->open(base, document).value();  // what is cached of it: nothing yet
  if (!allocator->reserve(context, 1000).ok()) return 1;       // the engine fills these blocks: prefill
  if (!allocator->commit(context, document).ok()) return 1;    // from now on others find them
  // [guide: end]

  // [guide: fork]
  // A planner, a writer and a reviewer; each writes a tail of 40 tokens of its own.
  std::vector<Sequence> forks;
  for (int module = 0; module < 3; ++module) {
    forks.push_back(allocator->fork(context).value());
    if (!allocator->append_private(forks.back(), 40).ok()) return 1;
  }
  // For the engine's attention: which blocks hold whose tokens. 3 times 65, shared ones named 3 times.
  PageTable table;
  const Sequence* const batch[] = {&forks[0], &forks[1], &forks[2]};
  if (!export_page_table(batch, table).ok() || table.indices.size() != 195) return 1;
  // [guide: end]
  const KvStats stats = allocator->stats();
  std::printf("3 contexts of 1040 tokens in %lld blocks, %lld of them shared; a cache each would take %d\n",
              static_cast<long long>(stats.in_use_blocks), static_cast<long long>(stats.shared_blocks),
              3 * 65);
  const Sequence again = allocator->open(base, document).value();
  std::printf("a second session on the same document finds %lld tokens\n",
              static_cast<long long>(again.length()));
}
