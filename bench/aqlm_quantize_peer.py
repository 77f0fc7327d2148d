#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# Quantizes one layer with the code of AQLM's authors (github.com/Vahe1994/AQLM, its AQEngine) and prints the relative
# error tr((W - W^) H (W - W^)^T) / tr(W H W^T), in double, and the seconds that it took.
# usage: aqlm_quantize_peer.py AQLM_FOLDER WEIGHTS GRAM N K VECTOR_LENGTH CODEBOOKS BITS
#   WEIGHTS, GRAM: fp32, [N][K] and [K][K]. One scale a row, as AQLM has it. Needs PyTorch.
import argparse
import contextlib
import os
import sys
import time

os.environ["AQ_USE_JIT"] = "0"
os.environ["TQDM_DISABLE"] = "1"
import torch


def main():
    folder, weights, gram = sys.argv[1:4]
    rows, cols, vector, books, bits = map(int, sys.argv[4:9])
    sys.path.insert(0, folder)
    from aq_engine import AQEngine

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)

    def read(path, shape):
        return torch.from_file(path, size=shape[0] * shape[1], dtype=torch.float32).reshape(shape).to(device)

    layer = torch.nn.Linear(cols, rows, bias=False, device=device)
    layer.weight.data.copy_(read(weights, (rows, cols)))
    engine = AQEngine(layer)
    engine.XTX.copy_(read(gram, (cols, cols)))
    # main.py's defaults, and the tolerance of its README.
    options = argparse.Namespace(devices=[device], out_group_size=1, in_group_size=vector, num_codebooks=books,
                                 nbits_per_codebook=bits, codebook_value_nbits=16, codebook_value_num_groups=1,
                                 scale_nbits=0, init_max_iter=100, init_max_points_per_centroid=None, lr=1e-4,
                                 beam_size=1, max_epochs=1000, relative_mse_tolerance=0.01, steps_per_epoch=100,
                                 print_frequency=1 << 30)
    start = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        quantized = engine.quantize(args=options, verbose=False)
    with torch.no_grad():
        exact = layer.weight.double()
        off = exact - quantized().double()
        error = ((off @ engine.XTX) * off).sum() / ((exact @ engine.XTX) * exact).sum()
    print(error.item(), time.monotonic() - start)


main()
