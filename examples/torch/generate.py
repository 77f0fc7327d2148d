#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Greedy text of a quantized Llama-family model by transformers, its linear layers swapped for CodeGEMM's.

  quantize MODEL FOLDER --method kmeans --kind codegemm --format m2v4g64
  generate.py FOLDER --tokenizer MODEL --prompt "The capital of France is"

MODEL is a GGUF file or a Hugging Face folder; quantize is examples/06_quantize.cpp.
"""
import argparse
import os
import sys
import time

import torch
from transformers import AutoTokenizer

from codegemm_torch import CodeGemmError, codegemm_layers, load_library, quantized_model


def load_tokenizer(path):
    if os.path.isfile(path):
        folder, name = os.path.split(os.path.abspath(path))
        return AutoTokenizer.from_pretrained(folder, gguf_file=name)
    return AutoTokenizer.from_pretrained(path)


def prompt_ids(tokenizer, text, raw):
    """The ids of a prompt: as it is, or as a user's turn in the model's chat template."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
    return tokenizer(turn, add_special_tokens=False)["input_ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="quantized model in CodeGEMM's format")
    parser.add_argument("--tokenizer", help="GGUF file or folder, if the tokenizer is not in FOLDER")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (then in float16)")
    parser.add_argument("--library", help="libcodegemm_c.so; default: CODEGEMM_C_LIBRARY")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()
    try:
        load_library(args.library)
        dtype = torch.float32 if args.device == "cpu" else torch.float16
        model = quantized_model(args.folder, dtype=dtype, device=args.device)
    except CodeGemmError as error:
        sys.exit(f"generate.py: {error}")
    tokenizer = load_tokenizer(args.tokenizer or args.folder)
    print(f"{len(codegemm_layers(model))} layers are CodeGEMM's", file=sys.stderr)
    if args.compile:
        model.forward = torch.compile(model.forward, dynamic=True)
    ids = torch.tensor([prompt_ids(tokenizer, args.prompt, args.raw)], device=args.device)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=args.max_tokens,
                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    made = out[0, ids.shape[1] :]
    print(tokenizer.decode(made, skip_special_tokens=True))
    print(f"{len(made) / (time.perf_counter() - start):.1f} tokens/s, prefill of {ids.shape[1]} included", file=sys.stderr)


if __name__ == "__main__":
    main()
