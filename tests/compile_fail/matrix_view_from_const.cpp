// SPDX-License-Identifier: Apache-2.0
//
// A view to write to cannot be had from a view to read from.
// expect: MatrixView<const float>
// expect: MatrixView<float>

#include <codegemm/base/matrix_view.hpp>

int main() {
  const float numbers[6] = {};
  const codegemm::MatrixView<const float> readable(numbers, 2, 3);
#if defined(CODEGEMM_FAULT)
  const codegemm::MatrixView<float> writable = readable;
  return static_cast<int>(writable.rows);
#else
  return static_cast<int>(readable.rows) - 2;
#endif
}
