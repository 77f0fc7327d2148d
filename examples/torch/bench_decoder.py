# SPDX-License-Identifier: Apache-2.0
"""One decode step of a Llama-3.1-8B in plain PyTorch, for bench.py: random weights, a static KV cache, linear layers of
several kinds. Needs nothing but PyTorch."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from codegemm_torch import Canonical, CodeGemmError, PackedWeights, gemm, make_workspace, parse_format


@dataclass
class Shape:
    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    context: int = 512  # positions of the KV cache
    rope_theta: float = 500000.0
    epsilon: float = 1e-5

    def linears(self):
        """(N, K) of one layer's."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q": (q, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, q),
                "gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner)}


# ---- What is between the linear layers; compiled once, and used by all kinds alike.
def add_norm(h, delta, weight, epsilon: float):
    h = h + delta
    return h, F.rms_norm(h.float(), (h.shape[-1],), weight.float(), epsilon).to(h.dtype)


def attention(q, k, v, keys, values, position, cos, sin):
    """One query of each head over the cache [kv_heads][context][head_dim], into which k and v are put."""
    def rotate(x):
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x.float() * cos[position] + turned.float() * sin[position]).to(x.dtype)

    kv_heads, context, dim = keys.shape
    keys.index_copy_(1, position, rotate(k.view(kv_heads, 1, dim)))
    values.index_copy_(1, position, v.view(kv_heads, 1, dim))
    scores = rotate(q.view(kv_heads, -1, dim)) @ keys.transpose(1, 2)
    scores = scores.float() / math.sqrt(dim)
    scores = scores.masked_fill(torch.arange(context, device=q.device) > position, float("-inf"))
    return (torch.softmax(scores, -1).to(q.dtype) @ values).view(1, -1)


def silu_times(gate, up):
    return F.silu(gate) * up


class Decoder:
    """step() reads `token`, writes `logits` and the next token, and moves `position` on: all in place, to be captured.
    linears[layer](name, x) are the products; the name "gate_up" asks for silu(gate) * up, and "qkv" for all three
    side by side, if `merged`."""

    def __init__(self, shape, glue, table, linears, merged, device="cuda", dtype=torch.float16):
        self.shape, self.linears, self.merged, self.table = shape, linears, merged, table
        self.add_norm, self.attention, self.silu_times = glue
        s = shape
        self.norm = torch.ones(s.hidden, device=device, dtype=dtype)
        cache = (s.kv_heads, s.context, s.head_dim)
        self.cache = [[torch.zeros(cache, device=device, dtype=dtype) for _ in "kv"] for _ in range(s.layers)]
        angles = torch.outer(torch.arange(s.context), s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim))
        self.cos = torch.cat([angles.cos()] * 2, -1).to(device)
        self.sin = torch.cat([angles.sin()] * 2, -1).to(device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.logits = torch.zeros(1, s.vocabulary, device=device, dtype=dtype)

    def begin(self, token=1):
        self.token.fill_(token)
        self.position.zero_()
        for keys, values in self.cache:
            keys.zero_()
            values.zero_()

    def step(self):
        s = self.shape
        sizes = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        h = self.table[self.token]
        delta = torch.zeros_like(h)
        for layer in range(s.layers):
            multiply = self.linears[layer]
            h, x = self.add_norm(h, delta, self.norm, s.epsilon)
            if self.merged:
                q, k, v = multiply("qkv", x).split(sizes, -1)
            else:
                q, k, v = multiply("q", x), multiply("k", x), multiply("v", x)
            x = self.attention(q, k, v, *self.cache[layer], self.position, self.cos, self.sin)
            h, x = self.add_norm(h, multiply("o", x), self.norm, s.epsilon)
            if self.merged:
                x = multiply("gate_up", x)
            else:
                x = self.silu_times(multiply("gate", x), multiply("up", x))
            delta = multiply("down", x)
        _, x = self.add_norm(h, delta, self.norm, s.epsilon)
        self.logits.copy_(x @ self.table.T)
        self.token.copy_(self.logits.argmax(-1))
        self.position.add_(1)

    def tokens_per_second(self, steps=64, rounds=7, graphs=True):
        """By the median round. The GPU's clock of `steps` replays of one captured step."""
        for _ in range(3):  # compiles, builds kernels, and fills the allocator before the capture
            self.begin()
            self.step()
        run = self.step
        if graphs:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            run = graph.replay
        times = []
        for _ in range(rounds + 1):
            self.begin()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(steps):
                run()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / steps)
        return 1.0 / sorted(times[1:])[rounds // 2]

    def first_logits(self, tokens):
        """Logits after each of some given tokens, in float64 [tokens][vocabulary]."""
        self.begin()
        out = []
        for token in tokens:
            self.token.fill_(token)
            self.step()
            out.append(self.logits[0].double().cpu())
        return torch.stack(out)


def random_canonical(name, rows, cols, device):
    """Random weights of about unit gain, so that activations keep their size through all layers."""
    f = parse_format(name)
    shapes = Canonical.shapes(f, rows, cols)
    if f.b not in (8, 16):
        raise CodeGemmError(f"{name}: the benchmark makes codes of 8 or 16 bits")
    codes = torch.randint(-(2**31), 2**31, shapes[0], dtype=torch.int32, device=device)
    books = torch.randn(shapes[1], device=device).half()
    scales = ((0.5 + torch.rand(shapes[2], device=device)) / math.sqrt(cols * f.m)).half()
    return Canonical(f, rows, cols, codes, books, scales)


def dense_layers(shape, weights):
    """nn.Linear's product, on the same weights in fp16; every layer has memory of its own."""
    layers = []
    for _ in range(shape.layers):
        own = {name: w.clone() for name, w in weights.items()}
        layers.append(lambda name, x, own=own: F.linear(x, own[name]))
    return layers


def codegemm_layers(shape, canonical, merged, device="cuda"):
    """The operator's; Q, K and V, and gate and up, in one product each if `merged`."""
    groups = {name: [matrix] for name, matrix in canonical.items()}
    if merged:
        c = canonical
        groups = {"qkv": [c["q"], c["k"], c["v"]], "o": [c["o"]], "gate_up": [c["gate"], c["up"]], "down": [c["down"]]}
    packed = {name: PackedWeights(group, device) for name, group in groups.items()}
    workspace = make_workspace(packed.values())
    layers = []
    for _ in range(shape.layers):
        own = {name: (w.clone(), name == "gate_up", w.rows // 2 if name == "gate_up" else w.rows)
               for name, w in packed.items()}

        def multiply(name, x, own=own):
            weights, swiglu, rows = own[name]
            return gemm(x, weights.handle, rows, workspace, swiglu)

        layers.append(multiply)
    return layers


def aqlm_codes(matrix):
    """Codes [N][K / v][m] of a matrix of 8-bit codes, as the package aqlm has them."""
    words = matrix.codes.long() & 0xFFFFFFFF
    codes = torch.stack([(words >> (8 * i)) & 255 for i in range(4)], 2).flatten(1, 2)
    return codes[:, : matrix.cols // matrix.format.v].permute(2, 1, 0).to(torch.uint8).view(torch.int8).contiguous()


def aqlm_linear(matrix, dtype):
    """The package's layer on the same weights. ImportError or its own errors where its kernels cannot be had."""
    import aqlm
    f = matrix.format
    layer = aqlm.QuantizedLinear(matrix.cols, matrix.rows, f.v, 1, f.m, f.b, bias=False, device=matrix.codes.device,
                                 dtype=dtype)
    layer.codes.data.copy_(aqlm_codes(matrix))
    layer.codebooks.data.copy_(matrix.codebooks.unsqueeze(2))
    layer.scales.data.copy_(matrix.scales.reshape(-1, 1, 1, 1))
    return layer


def aqlm_layers(shape, canonical, dtype=torch.float16):
    layers = []
    for _ in range(shape.layers):
        own = {name: aqlm_linear(matrix, dtype) for name, matrix in canonical.items()}
        layers.append(lambda name, x, own=own: own[name](x))
    return layers
