# SPDX-License-Identifier: Apache-2.0
"""Compares our losses and gradients with those of PyTorch's autograd.

gradients_tool writes small random models (tied with scaled RoPE; biases, head norms and an own head), a batch whose
first tokens are only keys and values of a base, and its losses and gradients in double. Here the same model is written
in plain PyTorch. Every tensor's relative error ||ours - peer|| / ||peer|| must be below 1e-5: RoPE's angles are fp32
on both sides. Exit code 4: PyTorch is missing; 1: a difference.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

SKIPPED = 4
BOUND = 1e-5
FIRST_LOSS_ROW = 9


def read(path):
    """The tensors and texts of a safetensors file."""
    import numpy as np
    import torch
    types = {"F64": np.float64, "I32": np.int32}
    with open(path, "rb") as file:
        data = file.read()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    texts = header.pop("__metadata__")
    tensors = {}
    for name, info in header.items():
        first, end = (8 + length + offset for offset in info["data_offsets"])
        values = np.frombuffer(data[first:end], types[info["dtype"]]).reshape(info["shape"])
        tensors[name] = torch.from_numpy(values.copy())
    return tensors, texts


def losses_of(weights, tensors, texts):
    import torch
    from torch.nn import functional as F
    heads, kv_heads, dim = int(texts["heads"]), int(texts["kv_heads"]), int(texts["head_dim"])
    epsilon = float(texts["epsilon"])
    count, prefix = tensors["tokens"].numel(), tensors["keys"].shape[1]
    pairs = torch.arange(0, dim, 2, dtype=torch.float32)
    frequencies = 1.0 / float(texts["theta"])**(pairs / dim) / float(texts["factor"])
    angles = torch.arange(prefix, prefix + count, dtype=torch.float32)[:, None] * frequencies
    cos, sin = (torch.cat((f(angles), f(angles)), -1).double()[:, None, :] for f in (torch.cos, torch.sin))

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], weights[name + ".weight"], epsilon)

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def turn(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    mask = torch.ones(count, prefix + count, dtype=torch.bool).tril(prefix)
    x = weights["model.embed_tokens.weight"][tensors["tokens"].long()]
    for i in range(int(texts["layers"])):
        p = f"model.layers.{i}."
        y = norm(x, p + "input_layernorm")
        q = linear(y, p + "self_attn.q_proj").view(count, heads, dim)
        k = linear(y, p + "self_attn.k_proj").view(count, kv_heads, dim)
        v = linear(y, p + "self_attn.v_proj").view(count, kv_heads, dim)
        if p + "self_attn.q_norm.weight" in weights:
            q, k = norm(q, p + "self_attn.q_norm"), norm(k, p + "self_attn.k_norm")
        k = torch.cat((tensors["keys"][i], turn(k))).repeat_interleave(heads // kv_heads, 1)
        v = torch.cat((tensors["values"][i], v)).repeat_interleave(heads // kv_heads, 1)
        attended = F.scaled_dot_product_attention(turn(q).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1),
                                                  attn_mask=mask)
        x = x + linear(attended.transpose(0, 1).reshape(count, heads * dim), p + "self_attn.o_proj")
        y = norm(x, p + "post_attention_layernorm")
        x = x + linear(F.silu(linear(y, p + "mlp.gate_proj")) * linear(y, p + "mlp.up_proj"), p + "mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = F.linear(norm(x, "model.norm"), head)[FIRST_LOSS_ROW:]
    return F.cross_entropy(logits, tensors["labels"].long(), reduction="none")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True, help="the program gradients_tool")
    parser.add_argument("--model", default=None, help="not used: the models are made by the tool")
    args = parser.parse_args()
    try:
        import numpy  # noqa: F401
        import torch
    except ImportError as error:
        print(f"SKIPPED: {error}")
        return SKIPPED

    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([args.tool, scratch], check=True)
        for kind in (0, 1):
            tensors, texts = read(os.path.join(scratch, f"{kind}.safetensors"))
            weights = {
                name: values.requires_grad_()
                for name, values in tensors.items() if f"gradient {name}" in tensors
            }
            losses = losses_of(weights, tensors, texts)
            losses.sum().backward()
            pairs = {"losses": (tensors["losses"], losses.detach())}
            for name, values in weights.items():
                pairs[name] = (tensors[f"gradient {name}"], values.grad)
            errors = {
                name: float(torch.linalg.norm(ours - peer) / torch.linalg.norm(peer))
                for name, (ours, peer) in pairs.items()
            }
            worst = max(errors, key=errors.get)
            print(f"model {kind}: {len(weights)} tensors, worst relative error {errors[worst]:.2e} ({worst})")
            failed |= len(weights) < 20 or not all(error < BOUND for error in errors.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
