// SPDX-License-Identifier: Apache-2.0
//
// What a stranger's program looks like: both libraries, from two units.
#include <codegemm/base/quoted.hpp>
#include <codegemm/base/thread_pool.hpp>
#include <codegemm/format.hpp>
#include <codegemm/version.hpp>
#include <prefillshare/kv/shape.hpp>
#if defined(CONSUMER_HAS_C)
#include <codegemm_c.h>
#endif

#include <atomic>
#include <cstdio>

long long bytes_of_a_token();  // second.cpp

int main() {
  const auto format = codegemm::parse_format("m1v4g128");
  if (!format.ok()) return 1;

  codegemm::ThreadPool pool(2);
  std::atomic<int> done{0};
  codegemm::parallel_for(pool, 8, [&](std::int64_t, int) { ++done; });
  if (done != 8) return 1;

#if defined(CONSUMER_HAS_C)
  if (codegemm_c_abi_version() != CODEGEMM_C_ABI_VERSION) return 1;
#endif

  std::printf("codegemm %d.%d.%d, format %s, %lld KV bytes a token\n", CODEGEMM_VERSION_MAJOR,
              CODEGEMM_VERSION_MINOR, CODEGEMM_VERSION_PATCH,
              codegemm::quoted(codegemm::format_name(*format)).c_str(), bytes_of_a_token());
  return bytes_of_a_token() > 0 ? 0 : 1;
}
