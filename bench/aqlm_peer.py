#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# AQLM's CPU kernel (PyPI aqlm, numba) for one token, weights out of memory. Prints 1 when it is ready; then each
# number that it reads is answered with the seconds of so many calls.
# usage: aqlm_peer.py N K VECTOR_LENGTH CODEBOOKS; needs numba, scipy and aqlm (not PyTorch).
import importlib.util
import pathlib
import sys
import time
import types

import numpy as np


class Array(np.ndarray):
    """An array with what the kernel's wrapper asks of a tensor."""

    device = "cpu"

    def numpy(self):
        return np.asarray(self)

    def view(self, kind):
        return np.ndarray.view(self, kind)


def load_kernel():
    """aqlm's numba_kernel, by its file: the package itself wants PyTorch, which the kernel does not need."""
    torch = types.ModuleType("torch")
    torch.Tensor = torch.IntTensor = Array
    torch.int8, torch.uint8, torch.float32 = np.dtype("int8"), np.uint8, np.dtype("float32")
    torch.empty = lambda *shape, device, dtype: np.empty(shape, dtype).view(Array)
    torch.as_tensor = lambda a: a
    sys.modules["torch"] = torch
    home = pathlib.Path(importlib.util.find_spec("aqlm").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("numba_kernel", home / "inference_kernels/numba_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    rows, cols, v, m = (int(a) for a in sys.argv[1:5])
    rng = np.random.default_rng(1)
    kernel = load_kernel()
    codebooks = rng.standard_normal((m, 256, 1, v), dtype=np.float32).view(Array)
    scales = rng.uniform(0.5, 1.0, (rows, 1, 1, 1)).astype(np.float32).view(Array)
    x = rng.standard_normal((1, cols), dtype=np.float32).view(Array)
    count = max(2, -(-256 * 2**20 // (rows * cols // v * m)))
    codes = [rng.integers(0, 256, (cols // v, rows, m), dtype=np.uint8) for _ in range(count)]

    checked = min(rows, 256)
    sums = np.zeros((checked, cols), np.float64)
    for c in range(m):
        some = codes[0][:, :checked, c]
        sums += np.asarray(codebooks)[c, some, 0, :].transpose(1, 0, 2).reshape(checked, cols)
    want = (sums @ np.asarray(x)[0]) * np.asarray(scales).ravel()[:checked]
    # The kernel's threads add to the same sums without a lock: with more than one a few rows come out wrong, more
    # of them in one call than in another.
    for _ in range(30):
        y = kernel.numba_gemm_lut(x, codes[0].view(np.int8).view(Array), codebooks, scales, None)
        if np.linalg.norm(np.asarray(y)[0, :checked] - want) <= 5e-2 * np.linalg.norm(want):
            break
    else:
        sys.exit("wrong result")

    (compiled,) = kernel.COMPILED_KERNELS.values()
    arguments = np.asarray(x)[0], np.asarray(codebooks), np.asarray(scales)
    print(1, flush=True)
    call = 0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            compiled(arguments[0], arguments[1], codes[call % count], arguments[2])
            times.append(time.perf_counter() - start)
            call += 1
        print(*times, flush=True)


main()
