# SPDX-License-Identifier: Apache-2.0
"""Models in AQLM's and CodeGEMM's formats, against transformers and the package aqlm.

A small model of random weights is quantized and written by our tool, in one file and in shards; transformers must
load it and aqlm must give the same dequantized weights as ours, exactly, and the logits that a dense model of these
weights gives. Then the other way: models whose codes aqlm packed, with 5 to 16 bits, are read by our tool and must
give the weights that aqlm gives. A model converted to CodeGEMM's format and back must be the same bytes, and between
them hold the same weights by the formula of CodeGEMM's kernels. Exit code 4: a package is missing; 1: a difference.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported
os.environ["AQ_USE_JIT"] = "0"
SKIPPED = 4
SEED = 17
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True, help="the program aqlm_tool")
    parser.add_argument("--model", default=None, help="not used: the models are made here")
    args = parser.parse_args()
    try:
        import accelerate  # noqa: F401
        import aqlm
        import torch
        from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        print(f"SKIPPED: {error}")
        return SKIPPED
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(SEED)
    failed = []

    def expect(condition, what):
        print(("ok      " if condition else "FAILED  ") + what)
        if not condition:
            failed.append(what)

    def tool(*arguments):
        subprocess.run([args.tool, *map(str, arguments)], check=True)

    def dequantize(codes, books, scales, bits):
        return _dequantize_weight(unpack_int_data(codes, bits), books.double(), scales.double())

    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as scratch:
        def folder(name):
            path = os.path.join(scratch, name)
            os.makedirs(path, exist_ok=True)
            return path

        dense = LlamaForCausalLM(config).half()
        dense.save_pretrained(folder("dense"))

        # ---- Ours, read by transformers and aqlm.
        for name, shard in (("m2v8g-1", 10**9), ("m1v4b6g-1", 30000), ("m1v8b10g-1", 10**9)):
            made = folder(f"ours-{name}")
            tool("write", folder("dense"), made, name, shard)
            tool("dump", made, os.path.join(scratch, "ours.safetensors"))
            ours = load_file(os.path.join(scratch, "ours.safetensors"))
            loaded, info = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, output_loading_info=True)
            loaded.eval()
            expect(not info["missing_keys"] and not info["unexpected_keys"], f"{name}: transformers finds all tensors")
            layers = {n: m for n, m in loaded.named_modules() if isinstance(m, aqlm.QuantizedLinear)}
            expect(len(ours) == len(layers) == 2 * len(MODULES), f"{name}: {len(layers)} layers are quantized")
            bits = next(iter(layers.values())).nbits_per_codebook
            same = all(torch.equal(dequantize(m.codes, m.codebooks, m.scales, bits), ours[n + ".weight"])
                       for n, m in layers.items())
            expect(same, f"{name}: aqlm dequantizes the same weights")

            twin = LlamaForCausalLM(config).float()
            twin.load_state_dict({k: v.float() for k, v in dense.state_dict().items()} |
                                 {k: v.float() for k, v in ours.items()})
            ids = torch.arange(1, 65).reshape(1, -1)
            with torch.no_grad():
                want = twin.eval()(ids).logits
                try:
                    got = loaded(ids).logits
                except ImportError as error:  # aqlm's kernels for the CPU need more packages
                    print(f"        {name}: no forward pass: {error}")
                    continue
            off = float((got - want).norm() / want.norm())
            expect(off < 1e-5, f"{name}: logits as of the dense twin, relative difference {off:.1e}")

        # ---- aqlm's, read by ours; then converted there and back.
        for bits, count, vec in ((8, 2, 8), (5, 3, 4), (12, 1, 8), (16, 1, 16), (7, 1, 2)):
            name = f"m{count}v{vec}b{bits}"
            theirs, tensors, weights = folder("theirs-" + name), {}, {}
            for layer in range(2):
                for module in MODULES:
                    rows, cols = dense.get_submodule(f"model.layers.{layer}.{module}").weight.shape
                    codes = torch.randint(0, 2**bits, (rows, cols // vec, count))
                    codes[0, 0, 0], codes[-1, -1, -1] = 2**bits - 1, 2**(bits - 1)
                    key = f"model.layers.{layer}.{module}"
                    parts = {
                        "codes": pack_int_data(codes.clone(), bits),
                        "codebooks": torch.randn(count, 2**bits, 1, vec).half(),
                        "scales": torch.rand(rows, 1, 1, 1).half(),
                    }
                    tensors |= {f"{key}.{part}": value for part, value in parts.items()}
                    weights[key] = dequantize(parts["codes"], parts["codebooks"], parts["scales"], bits)
            save_file(tensors, os.path.join(theirs, "model.safetensors"), metadata={"format": "pt"})
            described = config.to_dict() | {"quantization_config": {
                "quant_method": "aqlm", "nbits_per_codebook": bits, "num_codebooks": count, "out_group_size": 1,
                "in_group_size": vec, "linear_weights_not_to_quantize": []}}
            with open(os.path.join(theirs, "config.json"), "w", encoding="utf-8") as file:
                json.dump(described, file)
            tool("dump", theirs, os.path.join(scratch, "read.safetensors"))
            read = load_file(os.path.join(scratch, "read.safetensors"))
            expect(len(read) == len(weights) and all(torch.equal(read[k + ".weight"], w) for k, w in weights.items()),
                   f"{name}: our reader gives aqlm's weights")
            if bits > 8 or 64 % (4 * vec) != 0:
                continue
            tool("convert", theirs, folder("converted-" + name), "codegemm")
            state = load_file(os.path.join(scratch, "converted-" + name, "model.safetensors"))
            with open(os.path.join(scratch, "converted-" + name, "config.json"), encoding="utf-8") as file:
                group = json.load(file)["codegemm"]["group_size"]
            same = True
            for key, want in weights.items():
                words = state[key + ".codes"].long() & 0xFFFFFFFF  # [m][K / v / 4][N]
                codes = torch.stack([(words >> (8 * i)) & 0xFF for i in range(4)], 2).flatten(1, 2)  # [m][K / v][N]
                books = state[key + ".codebooks"].double()
                value = sum(books[c][codes[c]] for c in range(count))  # [K / v][N][v]
                value = value.permute(1, 0, 2).flatten(1)  # [N][K]
                same &= torch.equal(value * state[key + ".scales"].double().T.repeat_interleave(group, 1), want)
            expect(same, f"{name}: the same weights by CodeGEMM's formula, g = {group}")
            tool("convert", folder("converted-" + name), folder("back-" + name), "aqlm")
            back = load_file(os.path.join(scratch, "back-" + name, "model.safetensors"))
            expect(back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back),
                   f"{name}: back in AQLM's format the tensors are the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
