// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/block_reader.hpp - a dense model that is held one block at a time.
// Layer: model (host only).
#pragma once

#include <cstdint>
#include <functional>

#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

namespace prefillshare {

/// Reads block `index` of a dense model with its weights, for what holds one block at a time.
using BlockReader = std::function<Result<LlamaLayer<DenseLinear>>(std::int64_t index)>;

}  // namespace prefillshare
