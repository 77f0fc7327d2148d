#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""PrefillShare with your own checkpoints: a base model reads a document once, and decode modules answer from its cache.

  shared_prefill.py BASE MODULE... --document FILE --question TEXT [--question TEXT...]

BASE and each MODULE are a Hugging Face folder, a GGUF file, or a folder that examples/06_quantize.cpp wrote (then its
linear layers are CodeGEMM's). They have the same shape; modules may be fine-tuned to read the base's cache
(examples/09_finetune.cpp), which others do the worse the more they differ from the base. The modules take turns,
question by question, on one context.
"""
import argparse
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from codegemm_torch import CodeGemmError, load_library, quantized_model, read_config
from codegemm_torch.shared_prefill import SharedSession
from generate import load_tokenizer, prompt_ids


def load_model(path, device):
    dtype = torch.float32 if device == "cpu" else torch.float16
    if os.path.isfile(path):
        folder, name = os.path.split(os.path.abspath(path))
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).to(device).eval()
    try:
        read_config(path)
    except CodeGemmError:  # not one of ours
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    return quantized_model(path, dtype=dtype, device=device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("modules", nargs="+", metavar="MODULE")
    parser.add_argument("--document", required=True)
    parser.add_argument("--question", action="append", required=True)
    parser.add_argument("--tokenizer", help="GGUF file or folder, if not BASE")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--library", help="libcodegemm_c.so; default: CODEGEMM_C_LIBRARY")
    args = parser.parse_args()
    try:
        load_library(args.library)
        base = load_model(args.base, args.device)
        modules = [load_model(path, args.device) for path in args.modules]
        tokenizer = load_tokenizer(args.tokenizer or args.base)
        with open(args.document, encoding="utf-8") as file:
            document = file.read()
        # [guide: torch_share]
        session = SharedSession(base)
        for turn, question in enumerate(args.question):
            session.append(prompt_ids(tokenizer, f"{document}\n\n{question}" if turn == 0 else question, raw=False))
            for module, name in zip(modules, args.modules):
                start = time.perf_counter()
                computed = session.prefill()  # by the first module's turn; then there is nothing left to do
                first = time.perf_counter()
                answer = session.decode(module, args.max_tokens, stop=[tokenizer.eos_token_id])
                print(f"== {name}: {computed} of {len(session.context)} tokens prefilled in {first - start:.2f} s, "
                      f"{len(answer) / (time.perf_counter() - first):.1f} tokens/s\n{tokenizer.decode(answer)}")
            session.append(answer)  # of the last module: what the next question is asked about
        # [guide: end]
    except (CodeGemmError, OSError) as error:
        sys.exit(f"shared_prefill.py: {error}")


if __name__ == "__main__":
    main()
