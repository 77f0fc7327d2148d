// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/after_layer.hpp - what a forward pass tells of its progress.
// Layer: model (host only).
#pragma once

#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// What a forward pass calls with each layer's number once the KV of all its tokens stands in that layer's
/// pages: a transport may send them while the next layer is computed. An error ends the pass.
struct IgnoreLayers {
  /// Goes on.
  Status operator()(int /*layer*/) const { return {}; }
};

}  // namespace prefillshare
