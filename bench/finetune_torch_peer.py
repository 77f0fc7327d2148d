#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
# Full fine-tuning of a Llama of SmolLM2-135M's shape by PyTorch and transformers, eager, AdamW fused, on the
# examples of the suite train-gpu as padded batches: tokens (of prompt and target, no padding) a second,
# milliseconds a step, and gigabytes at most.
# usage: finetune_torch_peer.py bf16|autocast BATCH STEPS
#   bf16: parameters and moments in bf16; autocast: in fp32, products in bf16
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main():
    kind, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        attn_implementation="sdpa", use_cache=False)
    model = LlamaForCausalLM(config).cuda()
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    lengths = [(64 + i * 37 % 81, 8 + i * 13 % 33) for i in range(512)]

    def make(step):
        chosen = [lengths[(step * batch + i) % 512] for i in range(batch)]
        longest = max(p + t for p, t in chosen)
        ids = torch.randint(0, 49152, (batch, longest))
        mask = torch.zeros(batch, longest, dtype=torch.long)
        labels = torch.full((batch, longest), -100)
        for i, (prompt, target) in enumerate(chosen):
            mask[i, :prompt + target] = 1
            labels[i, prompt:prompt + target] = ids[i, prompt:prompt + target]
        return [x.pin_memory() for x in (ids, mask, labels)], sum(p + t for p, t in chosen)

    def step_of(data):
        ids, mask, labels = [x.cuda(non_blocking=True) for x in data]
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    warm = 3
    data = [make(i) for i in range(warm + steps)]
    times, tokens = [], 0
    for i, (batch_data, count) in enumerate(data):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step_of(batch_data).item()
        if i >= warm:
            times.append(time.perf_counter() - start)
            tokens += count
    print(tokens / sum(times), sorted(times)[len(times) // 2] * 1e3, torch.cuda.max_memory_allocated() * 1e-9)


main()
