// SPDX-License-Identifier: Apache-2.0
//
// expect: EvictionPolicy

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/storage.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Policy = prefillshare::ChainHash;
#else
  using Policy = prefillshare::LruEviction;
#endif
  return sizeof(prefillshare::BasicKvAllocator<prefillshare::NoKvStorage, prefillshare::ChainHash, Policy>*) >
                 0
             ? 0
             : 1;
}
