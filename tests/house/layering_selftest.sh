#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Plants one violation after the other and wants layering.sh to find each, and nothing in a clean tree.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

# plant FILE INCLUDE...: the file with those lines, in a fresh tree.
plant() {
  rm -rf "$tree/include" "$tree/examples" "$tree/capi"
  mkdir -p "$tree/include" "$tree/examples" "$tree/capi" "$(dirname "$tree/$1")"
  printf '#include %s\n' "${@:2}" >"$tree/$1"
}
fails=0
refuses() {
  plant "$@"
  if bash "$here/layering.sh" "$tree" >"$tree/log"; then
    echo "not found: $1 includes ${*:2}"
    fails=1
  elif ! grep -q "^$1:1: " "$tree/log"; then
    echo "$1 includes ${*:2}: found, but file and line are not told:"
    cat "$tree/log"
    fails=1
  fi
}
accepts() {
  plant "$@"
  if ! bash "$here/layering.sh" "$tree" >"$tree/log"; then
    echo "wrongly refused: $1 includes ${*:2}"
    cat "$tree/log"
    fails=1
  fi
}

accepts include/codegemm/gemm.hpp '<vector>' '<codegemm/base/status.hpp>' '<codegemm/cpu/gemv.hpp>'
accepts include/codegemm/io/safetensors.hpp '<nlohmann/json.hpp>' '<codegemm/quantized_matrix.hpp>'
accepts include/prefillshare/serve/pipeline.hpp '<prefillshare/kv/allocator.hpp>' '<codegemm/io/safetensors.hpp>'
accepts include/codegemm/cuda/kernels/gemv.cuh '<cuda_fp16.h>' '<cub/cub.cuh>' '<codegemm/cuda/configs.cuh>'
accepts include/prefillshare/sim/cluster.hpp '<prefillshare/serve/router.hpp>' '<prefillshare/kv/allocator.hpp>'
accepts include/prefillshare/kv/shape.hpp '<prefillshare/vocabulary.hpp>'
accepts examples/03_shared_prefill.cpp '<common/gguf.hpp>' '<prefillshare/serve/pipeline.hpp>' '<nlohmann/json.hpp>'
accepts capi/codegemm_c_kv.cpp '<codegemm_c.h>' '<capi/boundary.hpp>' '<prefillshare/kv/allocator.hpp>'
accepts capi/codegemm_c_quantize.cpp '<codegemm_c.h>' '<codegemm/quantize/kmeans.hpp>'
accepts capi/codegemm_c.h '<stddef.h>' '<stdint.h>'

refuses include/codegemm/gemm.hpp '<prefillshare/kv/shape.hpp>'
refuses include/codegemm/base/status.hpp '<codegemm/format.hpp>'
refuses include/codegemm/pack.hpp '<codegemm/io/safetensors.hpp>'
refuses include/codegemm/cpu/gemv.hpp '<codegemm/quantize/kmeans.hpp>'
refuses include/codegemm/quantize/kmeans.hpp '<codegemm/io/safetensors.hpp>'
refuses include/codegemm/io/checkpoint.hpp '<codegemm/quantize/kmeans.hpp>'
refuses include/codegemm/pack.hpp '<nlohmann/json.hpp>'
refuses include/prefillshare/kv/storage.hpp '<prefillshare/attention/paged.hpp>'
refuses include/prefillshare/attention/paged.hpp '<prefillshare/model/config.hpp>'
refuses include/prefillshare/model/llama.hpp '<prefillshare/serve/pipeline.hpp>'
refuses include/prefillshare/vocabulary.hpp '<prefillshare/kv/shape.hpp>'
refuses include/prefillshare/train/adamw.hpp '<prefillshare/sim/workload.hpp>'
refuses include/prefillshare/sim/cluster.hpp '<prefillshare/train/adamw.hpp>'
refuses include/prefillshare/serve/router.hpp '<prefillshare/sim/workload.hpp>'
refuses include/prefillshare/model/llama.hpp '<common/gguf.hpp>'
refuses include/codegemm/pack.hpp '<support/random.hpp>'
refuses include/codegemm/pack.hpp '"format.hpp"'
refuses include/codegemm/gemm.hpp '<cuda_runtime.h>'
refuses include/codegemm/gemm.hpp '<codegemm/gemm.cuh>'
refuses include/prefillshare/kv/storage.hpp '<cub/block/block_scan.cuh>'
refuses include/codegemm/gemm.hpp '<codegemm_c.h>'
refuses capi/codegemm_c.cpp '<prefillshare/serve/session.hpp>'
refuses capi/codegemm_c.cpp '<codegemm/io/safetensors.hpp>'
refuses capi/codegemm_c.h '<codegemm/format.hpp>'
refuses capi/codegemm_c.h '<capi/boundary.hpp>'
refuses include/prefillshare/nowhere/thing.hpp '<vector>'

((fails == 0)) && echo "layering.sh finds what it must"
