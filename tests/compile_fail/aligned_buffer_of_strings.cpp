// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: AlignedBuffer T must be trivially copyable

#include <codegemm/base/aligned_buffer.hpp>

#include <string>

int main() {
#if defined(CODEGEMM_FAULT)
  codegemm::AlignedBuffer<std::string> buffer;
#else
  codegemm::AlignedBuffer<float> buffer;
#endif
  return buffer.reserve(4) ? 0 : 1;
}
