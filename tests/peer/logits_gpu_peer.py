# SPDX-License-Identifier: Apache-2.0
"""Compares the GPU's fp16 logits with those of transformers on the same weights.

Random prompts of 9, 200 and 1,500 tokens, read in chunks of 37 and their last eight tokens decoded. transformers runs
in fp32, and in fp16 on the same GPU as a yardstick: the relative error ||ours - peer|| / ||peer|| must be at most 1.5
times that of transformers in fp16 over all rows, and below 3e-2 (behind random tokens the first rows are the worst for
both). Exit code 4: packages, a GPU or the model are missing;
1: a difference.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

SKIPPED = 4
LENGTHS = (9, 200, 1500)
STEP = 37
DECODED = 8
BOUND = 3e-2


def positions(length):
    """Tokens behind which the tool writes logits."""
    ends = list(range(STEP, length - DECODED, STEP)) + [length - DECODED]
    return [end - 1 for end in ends] + list(range(length - DECODED, length))


def peer_model(path):
    """transformers' model with the weights that the tool has written, in fp32."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        tensors = head.pop("tensors")
        theta = head.pop("rope_theta")
        config = LlamaConfig(**head, rope_theta=theta, rope_parameters={"rope_type": "default", "rope_theta": theta})
        model = LlamaForCausalLM(config).to(torch.float32)
        state = {}
        for tensor in tensors:
            values = np.fromfile(file, dtype=np.float32, count=tensor["rows"] * tensor["cols"])
            matrix = torch.from_numpy(values).reshape(tensor["rows"], tensor["cols"])
            state[tensor["name"]] = matrix.reshape(-1) if tensor["rows"] == 1 else matrix
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise RuntimeError(f"weights missing {missing}, not wanted {unexpected}")
    model.tie_weights()
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True, help="the program logits_gpu_tool")
    parser.add_argument("--model", required=True, help="a GGUF file of the Llama family")
    args = parser.parse_args()
    if not os.path.isfile(args.model):
        print(f"SKIPPED: no model at '{args.model}'")
        return SKIPPED
    try:
        import numpy as np
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"SKIPPED: {error}")
        return SKIPPED
    if not torch.cuda.is_available():
        print("SKIPPED: no GPU")
        return SKIPPED
    random = np.random.default_rng(5)
    prompts = [random.integers(0, 49000, length).tolist() for length in LENGTHS]
    with tempfile.TemporaryDirectory() as scratch:
        ids, out, weights = (os.path.join(scratch, name) for name in ("ids.json", "logits.bin", "weights.bin"))
        with open(ids, "w", encoding="utf-8") as file:
            json.dump(prompts, file)
        done = subprocess.run([args.tool, args.model, ids, str(STEP), out, weights], check=False)
        if done.returncode != 0:
            return done.returncode
        ours_all = np.fromfile(out, dtype=np.float32)
        model = peer_model(weights)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model.to("cuda")

    def logits_of(prompt):
        with torch.no_grad():
            rows = model(torch.tensor([prompt], device="cuda")).logits[0][positions(len(prompt))]
        return rows.float().cpu().numpy()

    want = [logits_of(prompt) for prompt in prompts]
    model = model.to(torch.float16)
    low = [logits_of(prompt) for prompt in prompts]
    offset, failed = 0, False
    for prompt, peer, half in zip(prompts, want, low):
        ours = ours_all[offset:offset + peer.size].reshape(peer.shape)
        offset += peer.size
        size = np.linalg.norm(peer)
        error = float(np.linalg.norm(ours - peer) / size)
        yardstick = float(np.linalg.norm(half - peer) / size)
        decoded = float(np.linalg.norm(ours[-DECODED:] - peer[-DECODED:]) / np.linalg.norm(peer[-DECODED:]))
        same = float((ours.argmax(axis=1) == peer.argmax(axis=1)).mean())
        print(f"{len(prompt)} tokens, {len(peer)} rows: relative error {error:.2e} (decoded rows {decoded:.2e}); "
              f"transformers in fp16 {yardstick:.2e}; the same largest logit in {100 * same:.1f}% of rows")
        failed |= not error < BOUND or not decoded < BOUND or not error <= 1.5 * yardstick
    if offset != ours_all.size:
        print(f"the tool wrote {ours_all.size} logits, the peer has {offset}")
        failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
