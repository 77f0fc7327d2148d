# SPDX-License-Identifier: Apache-2.0
"""Compares our fp32 logits with those of transformers on the same GGUF weights.

Prompts of 8, 200 and 1,500 tokens. The argmax must be the same at every position, except where the peer's own two
best logits are closer than the error bound, and the relative error ||ours - peer|| / ||peer|| below 1e-3 in all, and
below it at each position too. Exit code 4: the packages or the model are missing; 1: a difference.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported
SKIPPED = 4
LENGTHS = (8, 200, 1500)
BOUND = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True, help="the program logits_tool")
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--text", default=None, help="a text of more than 1,500 tokens")
    args = parser.parse_args()
    if not os.path.isfile(args.model):
        print(f"SKIPPED: no model at '{args.model}'")
        return SKIPPED
    try:
        import numpy as np
        import torch
        import accelerate  # noqa: F401  transformers needs it to read a GGUF
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        print(f"SKIPPED: {error}")
        return SKIPPED

    logging.disable_progress_bar()
    here = os.path.dirname(os.path.abspath(__file__))
    text_path = args.text or os.path.join(here, "..", "..", "examples", "data", "river_report.txt")
    with open(text_path, encoding="utf-8") as file:
        text = file.read()
    folder, name = os.path.split(os.path.abspath(args.model))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.eval()
    ids = tokenizer(text)["input_ids"]
    if len(ids) < max(LENGTHS):
        print(f"{text_path}: {len(ids)} tokens, the test needs {max(LENGTHS)}")
        return 1
    # Different stretches of the text, so that the short prompts are no prefix of the long one.
    prompts = [ids[40:40 + LENGTHS[0]], ids[300:300 + LENGTHS[1]], ids[:LENGTHS[2]]]

    with tempfile.TemporaryDirectory() as scratch:
        ids_path = os.path.join(scratch, "ids.json")
        out_path = os.path.join(scratch, "logits.bin")
        with open(ids_path, "w", encoding="utf-8") as file:
            json.dump(prompts, file)
        subprocess.run([args.tool, args.model, ids_path, out_path], check=True)
        ours_all = np.fromfile(out_path, dtype=np.float32)

    offset, failed = 0, False
    for prompt in prompts:
        with torch.no_grad():
            peer = model(torch.tensor([prompt])).logits[0].numpy()
        ours = ours_all[offset:offset + peer.size].reshape(peer.shape)
        offset += peer.size
        difference = np.linalg.norm(ours - peer, axis=1)
        size = np.linalg.norm(peer, axis=1)
        whole = float(np.linalg.norm(difference) / np.linalg.norm(size))
        worst = float((difference / size).max())
        two_best = np.sort(peer, axis=1)[:, -2:]
        wrong = [
            t for t in np.nonzero(ours.argmax(axis=1) != peer.argmax(axis=1))[0]
            if not two_best[t, 1] - two_best[t, 0] <= BOUND * np.abs(peer[t]).max()
        ]
        print(f"{len(prompt)} tokens: relative error {whole:.2e}, worst position {worst:.2e}, "
              f"argmax differs at {len(wrong)} positions")
        failed |= bool(wrong) or not whole < BOUND or not worst < BOUND
    if offset != ours_all.size:
        print(f"the tool wrote {ours_all.size} logits, the peer has {offset}")
        failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
