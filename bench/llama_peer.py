#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# llama.cpp (PyPI llama-cpp-python), by its C functions so that Python costs next to nothing. Prints 1 when it is
# ready; then each line that it reads is answered with the seconds of a prefill and of one decode step behind it.
# usage: llama_peer.py MODEL.gguf THREADS PREFILL_TOKENS DECODE_TOKENS
import sys
import time

import llama_cpp


def main():
    path, (threads, prefill, decode) = sys.argv[1], map(int, sys.argv[2:5])
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_load_model_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit("no model")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = prefill + decode
    params.n_batch = params.n_ubatch = max(prefill, 1)
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_new_context_with_model(model, params)
    vocabulary = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(model))
    tokens = [(i * 7919 + 1000) % vocabulary for i in range(prefill + decode)]

    def run(part):
        array = (llama_cpp.llama_token * len(part))(*part)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part))) != 0:
            sys.exit("llama_decode failed")
        llama_cpp.llama_get_logits_ith(context, -1)[0]  # waits for the result

    print(1, flush=True)
    for _ in sys.stdin:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        run(tokens[:prefill])
        middle = time.perf_counter()
        for token in tokens[prefill:]:
            run([token])
        end = time.perf_counter()
        print(middle - start, (end - middle) / decode, flush=True)


main()
