# SPDX-License-Identifier: Apache-2.0
"""CodeGEMM in PyTorch, over the C API's shared library: no extension is compiled. See ../README.md."""
from .checkpoint import load_quantized, quantized_model, read_config
from .library import CodeGemmError, Format, load_library, parse_format
from .linear import CodeGemmLinear, codegemm_layers, prepare
from .ops import gemm, make_workspace
from .quantize import gram_of, quantize
from .weights import Canonical, PackedWeights

__all__ = ["Canonical", "CodeGemmError", "CodeGemmLinear", "Format", "PackedWeights", "codegemm_layers", "gemm",
           "gram_of", "load_library", "load_quantized", "make_workspace", "parse_format", "prepare", "quantize",
           "quantized_model", "read_config"]
