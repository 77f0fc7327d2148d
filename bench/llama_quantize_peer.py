#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# Quantizes a GGUF file as llama.cpp (PyPI llama-cpp-python) does it, without an importance matrix, and prints the
# size of the file that it made.
# usage: llama_quantize_peer.py MODEL.gguf OUT.gguf TYPE THREADS     TYPE: Q2_K, Q3_K_M, Q4_K_M, ...
import ctypes
import os
import sys

import llama_cpp


def main():
    model, out, name, threads = sys.argv[1:5]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = int(threads)
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
    params.allow_requantize = True
    part = out + ".part"
    if llama_cpp.llama_model_quantize(model.encode(), part.encode(), ctypes.byref(params)) != 0:
        sys.exit("llama_model_quantize failed")
    os.rename(part, out)
    print(os.path.getsize(out))


main()
