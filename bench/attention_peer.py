#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# Microseconds of PyTorch's scaled_dot_product_attention at the suite kv-gpu's shapes, as a JSON object for
# kv-gpu --torch. Keys and values are contiguous there, not in pages; the fastest backend that takes a shape.
# usage: attention_peer.py FILE
import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def time_us(call, calls, replays=9):
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    times = []
    for _ in range(replays + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return sorted(times[2:])[replays // 2]


def best(heads, kv_heads, batch, queries, context, causal):
    dim = 128
    size = batch * context * kv_heads * dim * 4
    copies = max(1, min(64, int(600e6 / size) + 1)) if queries == 1 else 1
    q = torch.randn(batch, heads, queries, dim, device="cuda", dtype=torch.float16)
    kv = [torch.randn(2, batch, kv_heads, context, dim, device="cuda", dtype=torch.float16) for _ in range(copies)]
    out = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                out[backend.name] = time_us(
                    lambda i: F.scaled_dot_product_attention(
                        q, kv[i % copies][0], kv[i % copies][1], is_causal=causal, enable_gqa=True),
                    max(copies, 4))
        except Exception as error:  # a backend that does not take this shape
            print(f"{backend.name}: {str(error)[:80]}", file=sys.stderr)
    print(heads, batch, queries, context, out, flush=True)
    return min(out.values()) if out else None


def main():
    times = {}
    for heads, kv_heads in ((32, 8), (64, 8)):
        shape = f"{heads}/{kv_heads}/128"
        for context in (2048, 8192, 32768):
            for batch in (1, 4, 16, 64):
                times[f"decode {shape} batch{batch}x{context}"] = best(heads, kv_heads, batch, 1, context, False)
        for tokens in (2048, 4096, 8192):
            times[f"prefill {shape} {tokens}of{tokens}"] = best(heads, kv_heads, 1, tokens, tokens, True)
        # Few tokens at the end of a context: without a mask, since is_causal would begin at its first key.
        for tokens, context in ((16, 32768), (64, 8192), (64, 32768), (256, 32768)):
            times[f"prefill {shape} {tokens}of{context}"] = best(heads, kv_heads, 1, tokens, context, False)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({k: v for k, v in times.items() if v is not None}, file)


main()
