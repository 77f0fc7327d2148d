// SPDX-License-Identifier: Apache-2.0
//
// expect: KvStorage

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/storage.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Storage = int;
#else
  using Storage = prefillshare::NoKvStorage;
#endif
  return sizeof(prefillshare::BasicKvAllocator<Storage>*) > 0 ? 0 : 1;
}
