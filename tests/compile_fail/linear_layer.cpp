// SPDX-License-Identifier: Apache-2.0
//
// A model is made of linear layers, and of nothing else.
// expect: LinearLayer

#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Layer = float;
#else
  using Layer = prefillshare::DenseLinear;
#endif
  return prefillshare::LlamaLayer<Layer>{}.input_norm.empty() ? 0 : 1;
}
