#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tokens a second with CodeGEMM's linear layers, beside PyTorch's and AQLM's (PyPI aqlm), in one run. Prints JSON, the
checks of the outputs first.

  bench.py --device cuda                 a decoder of Llama-3.1-8B's shape with random weights under CUDA graphs; needs
                                         PyTorch, and a library built with CUDA
  bench.py --device cuda --transformers  the same shape as a transformers model, swapped in place
  bench.py --device cpu --model FOLDER   a transformers model from a folder in CodeGEMM's format (examples/06_quantize.cpp)
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch

import codegemm_torch
from bench_decoder import (Decoder, Shape, add_norm, aqlm_layers, aqlm_linear, attention, codegemm_layers, dense_layers,
                           random_canonical, silu_times)
from codegemm_torch import CodeGemmError, PackedWeights, gemm, load_library, make_workspace

SEED = 5


def relative(got, want):
    return float((got - want).norm() / want.norm())


def attempt(what, make):
    """make(), or None and why not: of a peer that is not installed, or does not take what it is asked."""
    try:
        return make(), None
    except Exception as error:  # noqa: BLE001  whatever a peer throws
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        print(f"{what}: left out: {reason}", file=sys.stderr)
        return None, reason


def compiled_glue(out):
    """The functions between the products, fused by torch.compile where that works."""
    plain = (add_norm, attention, silu_times)

    def make():
        glue = tuple(torch.compile(f, dynamic=False) for f in plain)
        small = Shape(hidden=256, inner=512, layers=2, heads=4, kv_heads=2, head_dim=64, vocabulary=512, context=32)
        table = torch.randn(small.vocabulary, small.hidden, device="cuda").half() / 16
        weights = {name: (torch.randn(size, device="cuda") / size[1]**0.5).half() for name, size in small.linears().items()}
        want, got = (Decoder(small, functions, table, dense_layers(small, weights), False).first_logits([1, 2, 3])
                     for functions in (plain, glue))
        if not relative(got, want) < 1e-2:
            raise RuntimeError(f"torch.compile gives another result, {relative(got, want):.1e} off")
        return glue

    glue, reason = attempt("torch.compile", make)
    out["glue"] = "torch.compile" if glue else f"eager ({reason})"
    return glue or plain


def check_products(canonical, aqlm):
    """Relative error of each operator and shape for 1 and 8 tokens against weights in float64."""
    errors = {"codegemm": {}, "aqlm": {}}
    for name in ("k", "q", "gate", "down"):
        matrix = canonical[name]
        weights = matrix.dequantize()
        packed = PackedWeights([matrix], "cuda")
        workspace = make_workspace([packed])
        peer = aqlm_linear(matrix, torch.float16) if aqlm else None
        for tokens in (1, 8):
            x = torch.randn(tokens, matrix.cols, device="cuda").half()
            want = x.double() @ weights.T
            key = f"{matrix.rows}x{matrix.cols}, {tokens} tokens"
            errors["codegemm"][key] = relative(gemm(x, packed.handle, matrix.rows, workspace).double(), want)
            if peer is not None and tokens == 1:
                errors["aqlm"][key] = relative(peer(x).double(), want)
    return errors


def bench_cuda(args, out):
    if not torch.cuda.is_available():
        raise CodeGemmError("no GPU: PyTorch finds none")
    if not load_library().has_cuda:
        raise CodeGemmError(f"'{load_library().path}' was built without CUDA")
    shape = Shape(layers=args.layers)
    out["device"], out["model"] = torch.cuda.get_device_name(), f"Llama-3.1-8B's shape, {shape.layers} layers, random weights"
    out["rows"] = []
    glue = compiled_glue(out)
    table = (torch.randn(shape.vocabulary, shape.hidden, device="cuda") / shape.hidden**0.5).half()
    tokens = torch.randint(0, shape.vocabulary, (8,)).tolist()
    dense_rate = None
    for name in args.formats.split(","):
        canonical = {part: random_canonical(name, *size, "cuda") for part, size in shape.linears().items()}
        f = canonical["q"].format
        aqlm = f.g == -1 and attempt("aqlm", lambda: aqlm_linear(canonical["k"], torch.float16)(
            torch.randn(1, shape.hidden, device="cuda").half()))
        aqlm, reason = aqlm if aqlm else (None, "its formats have one scale a row (g-1)")
        check = {"format": name, "products": check_products(canonical, aqlm is not None)}

        def decoder(layers, merged=False):
            return Decoder(shape, glue, table, layers, merged)

        # The unswapped model, on the weights that the codes stand for.
        weights = {part: matrix.dequantize(torch.float32).half() for part, matrix in canonical.items()}
        dense = decoder(dense_layers(shape, weights))
        del weights
        want = dense.first_logits(tokens)
        if dense_rate is None:
            dense_rate = dense.tokens_per_second()
            out["rows"].append({"linear": "nn.Linear fp16", "tokens_per_s": dense_rate})
        del dense
        kinds = [("codegemm", codegemm_layers(shape, canonical, False), False),
                 ("codegemm merged", codegemm_layers(shape, canonical, True), True)]
        if aqlm is not None:
            kinds.append(("aqlm", aqlm_layers(shape, canonical), False))
        else:
            check["aqlm"] = f"left out: {reason}"
        for kind, layers, merged in kinds:
            model = decoder(layers, merged)
            logits = model.first_logits(tokens)
            check[f"logits, {kind}"] = relative(logits, want)
            check[f"same argmax, {kind}"] = f"{int((logits.argmax(1) == want.argmax(1)).sum())} of {len(tokens)}"
            eager = model.tokens_per_second(steps=8, rounds=3, graphs=False)
            rate, why = attempt(f"{kind} {name} under CUDA graphs", model.tokens_per_second)
            row = {"linear": kind, "format": name, "tokens_per_s": rate, "without_graphs": eager}
            row |= {"note": why} if why else {"x_dense": rate / dense_rate}
            out["rows"].append(row)
            del model
        out["checks"].append(check)
        ok = max(check["products"]["codegemm"].values()) < 2e-3
        ok = ok and all(check[f"logits, {kind}"] < 5e-2 for kind in ("codegemm", "codegemm merged"))
        out["ok"] = out["ok"] and ok
        del kinds, canonical
        torch.cuda.empty_cache()
    if args.transformers:
        import bench_transformers
        bench_transformers.run(out, attempt, layers=args.layers)


def decode_rate(model, prompt, steps, rounds):
    """Greedy tokens a second of a transformers model, after a prompt, by the median round."""
    from transformers import DynamicCache
    times = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            cache = DynamicCache(config=model.config)
            logits = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
            start = time.perf_counter()
            for _ in range(steps):
                logits = model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits
            times.append((time.perf_counter() - start) / steps)
    return 1.0 / statistics.median(times[1:])


def bench_cpu(args, out):
    if not args.model:
        raise CodeGemmError("--device cpu needs --model FOLDER")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise CodeGemmError(f"--device cpu needs transformers: {error}") from None
    swapped = codegemm_torch.quantized_model(args.model)
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32).eval()
    state = {k: v for k, v in swapped.state_dict().items() if not k.endswith((".codes", ".codebooks", ".scales"))}
    layers = codegemm_torch.codegemm_layers(swapped)
    for name, layer in layers:
        state[name + ".weight"] = layer.canonical().dequantize().float()
    dense.load_state_dict(state)
    prompt = torch.randint(0, swapped.config.vocab_size, (24,)).tolist()
    with torch.inference_mode():
        want, got = (model(torch.tensor([prompt])).logits[0].double() for model in (dense, swapped))
    f = layers[0][1].format
    name = f"m{f.m}v{f.v}{'' if f.b == 8 else f'b{f.b}'}g{f.g}"
    off = relative(got, want)
    out["checks"].append({"format": name, "logits": off, "same argmax": f"{int((got.argmax(1) == want.argmax(1)).sum())} "
                          f"of {len(prompt)}"})
    out["ok"] = off < 5e-3
    out["device"], out["threads"] = "cpu", torch.get_num_threads()
    out["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY")
    out["model"] = f"{os.path.basename(os.path.abspath(args.model))}, {len(layers)} layers of {swapped.config.model_type}"
    rate = decode_rate(dense, prompt, args.steps, args.rounds)
    out["rows"] = [{"linear": "nn.Linear fp32", "tokens_per_s": rate}]
    ours = decode_rate(swapped, prompt, args.steps, args.rounds)
    out["rows"].append({"linear": "codegemm", "format": name, "tokens_per_s": ours, "x_dense": ours / rate})

    def swap_aqlm():  # random weights: the same shapes in a format that it has
        for path, layer in layers:
            matrix = random_canonical("m2v8g-1", layer.out_features, layer.in_features, "cpu")
            dense.set_submodule(path, aqlm_linear(matrix, torch.float32))
        x = torch.randn(1, layer.in_features)
        want = x.double() @ matrix.dequantize().T
        off = relative(dense.get_submodule(path)(x).double(), want)
        if not off < 1e-3:  # its threads add to the same sums without a lock
            print(f"aqlm: a product is {off:.1e} off", file=sys.stderr)
        out["checks"].append({"format": "m2v8g-1", "aqlm, one product": off})
        return decode_rate(dense, prompt, args.steps, args.rounds)

    theirs, why = attempt("aqlm", swap_aqlm)
    row = {"linear": "aqlm", "format": "m2v8g-1", "tokens_per_s": theirs}
    out["rows"].append(row | ({"note": f"left out: {why}"} if why else {"x_dense": theirs / rate}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--model", help="quantized folder (cpu)")
    parser.add_argument("--formats", default="m2v8g-1,m2v8g128,m1v4g128", help="cuda: which, with commas")
    parser.add_argument("--transformers", action="store_true", help="cuda: also a transformers model, swapped in place")
    parser.add_argument("--layers", type=int, default=32, help="cuda: fewer for a quick look")
    parser.add_argument("--steps", type=int, default=32, help="cpu: tokens a round")
    parser.add_argument("--rounds", type=int, default=3, help="cpu")
    parser.add_argument("--json", help="also write the results there")
    parser.add_argument("--library", help="libcodegemm_c.so; default: CODEGEMM_C_LIBRARY")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    out = {"suite": "torch", "commit": os.environ.get("CODEGEMM_COMMIT", "unknown"),
           "date": time.strftime("%Y-%m-%d", time.gmtime()), "ok": True, "checks": [], "torch": torch.__version__,
           "cuda": torch.version.cuda}
    try:
        load_library(args.library)
        with torch.inference_mode():
            (bench_cuda if args.device == "cuda" else bench_cpu)(args, out)
    except CodeGemmError as error:
        sys.exit(f"bench.py: {error}")
    text = json.dumps(out, indent=1)
    print(text)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    return 0 if out["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
