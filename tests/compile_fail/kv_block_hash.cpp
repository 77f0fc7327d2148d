// SPDX-License-Identifier: Apache-2.0
//
// expect: BlockHash

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/storage.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Hash = prefillshare::LruEviction;
#else
  using Hash = prefillshare::ChainHash;
#endif
  return sizeof(prefillshare::BasicKvAllocator<prefillshare::NoKvStorage, Hash>*) > 0 ? 0 : 1;
}
