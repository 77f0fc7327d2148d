#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# layering.sh ROOT: arrows point down only.
#
#   examples -> prefillshare -> codegemm -> codegemm/base; or capi/codegemm_c.h alone
#   capi -> prefillshare/kv, and of codegemm all but io; capi/codegemm_c.h, which is C, includes none of these
#   prefillshare:  sim -> serve -> model, train -> model, model -> attention -> kv -> files beside these folders
#   codegemm:      io, quantize -> core (format, pack, gemm, ...) -> cpu, cuda -> base
#
# Reads every #include of include/, examples/ and capi/, whatever #if it stands under. A .hpp compiles without CUDA, so it
# includes no .cuh and no CUDA header; only codegemm/io and the examples know JSON.
set -euo pipefail

root=${1:?usage: layering.sh ROOT}
cd "$root"

find include examples capi -type f \( -name '*.hpp' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' \) | LC_ALL=C sort |
  xargs awk '
  # The layer of a path as an #include spells it.
  function layer(path,   part) {
    split(path, part, "/")
    if (part[1] == "codegemm") {
      if (path == "codegemm/version.hpp" || part[2] == "base") return "codegemm/base"
      if (part[2] == "io" || part[2] == "quantize" || part[2] == "cpu" || part[2] == "cuda") return "codegemm/" part[2]
      return part[3] == "" ? "codegemm/core" : "codegemm/" part[2]
    }
    if (part[1] == "prefillshare") return part[3] == "" ? "prefillshare/base" : "prefillshare/" part[2]
    if (path == "codegemm_c.h") return "capi/codegemm_c.h"
    if (part[1] == "capi") return "capi"
    if (part[1] == "common") return "examples/common"
    if (part[1] == "support") return "tests"
    return "elsewhere"
  }
  BEGIN {
    core = " codegemm/base codegemm/core codegemm/cpu codegemm/cuda "
    every = core "codegemm/io codegemm/quantize "
    may["codegemm/base"] = " codegemm/base "
    may["codegemm/core"] = may["codegemm/cpu"] = may["codegemm/cuda"] = core
    may["codegemm/io"] = core "codegemm/io "
    may["codegemm/quantize"] = core "codegemm/quantize "
    may["prefillshare/base"] = every "prefillshare/base "
    may["prefillshare/kv"] = may["prefillshare/base"] "prefillshare/kv "
    may["prefillshare/attention"] = may["prefillshare/kv"] "prefillshare/attention "
    may["prefillshare/model"] = may["prefillshare/attention"] "prefillshare/model "
    may["prefillshare/serve"] = may["prefillshare/model"] "prefillshare/serve "
    may["prefillshare/train"] = may["prefillshare/model"] "prefillshare/train "
    may["prefillshare/sim"] = may["prefillshare/serve"] "prefillshare/sim "
    may["examples/common"] = may["prefillshare/serve"] "prefillshare/train prefillshare/sim examples/common "
    may["examples"] = may["examples/common"] "capi/codegemm_c.h "
    may["capi/codegemm_c.h"] = " "
    may["capi"] = core "codegemm/quantize prefillshare/base prefillshare/kv capi capi/codegemm_c.h "
  }
  function fault(text) { print FILENAME ":" FNR ": " text; faults++ }

  FNR == 1 {
    from = FILENAME
    if (from ~ /^include\//) { sub(/^include\//, "", from); from = layer(from) }
    else if (from ~ /^capi\//) from = from ~ /\.h$/ ? "capi/codegemm_c.h" : "capi"
    else from = from ~ /^examples\/common\// ? "examples/common" : "examples"
    if (!(from in may)) fault("is in a folder that has no layer: add it to tests/house/layering.sh")
  }
  /^[ \t]*#[ \t]*include/ {
    included = $0
    sub(/^[ \t]*#[ \t]*include[ \t]*/, "", included)
    if (included ~ /^"/) { fault("includes in quotes: " included ", write <full/path>"); next }
    if (included !~ /^</) { fault("includes what this test cannot read: " included); next }
    sub(/^</, "", included)
    sub(/>.*$/, "", included)
    to = layer(included)
    if (to != "elsewhere" && index(may[from], " " to " ") == 0) {
      fault(from " must not include " to " (" included ")")
    }
    if (FILENAME ~ /\.[hc]pp$/ && (included ~ /\.cuh$/ || included ~ /^(cuda|cub|cute|cutlass|thrust|cooperative_groups)\// ||
        included ~ /^(cuda|curand|cublas|nccl|mma|cooperative_groups|device_launch_parameters)[A-Za-z0-9_]*\.h/)) {
      fault("a .hpp or .cpp compiles without CUDA and must not include " included)
    }
    if (included ~ /^nlohmann\// && from !~ /^(codegemm\/io|examples)/) {
      fault("only codegemm/io and the examples read JSON: " included)
    }
  }
  END { exit faults > 0 }'
echo "layering: all includes point down"
