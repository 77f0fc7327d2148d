// SPDX-License-Identifier: Apache-2.0
//
// capi/executor.hpp - the threads behind codegemm_c_executor.
// Layer: capi (host only).
#pragma once

#include <mutex>

#include <codegemm_c.h>
#include <codegemm/base/thread_pool.hpp>

struct codegemm_c_executor {
  explicit codegemm_c_executor(int threads) : pool(threads) {}

  codegemm::ThreadPool pool;
  std::mutex turn;  // a pool runs one loop at a time
};
