# SPDX-License-Identifier: Apache-2.0
"""A transformers LlamaForCausalLM of Llama-3.1-8B's shape with random weights, for bench.py: its linear layers are swapped
in place, and it generates. Needs transformers and a GPU."""
import torch

from bench_decoder import Shape, aqlm_linear, random_canonical
from codegemm_torch import CodeGemmLinear, codegemm_layers, prepare

_PARTS = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
          "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}


def dense_model(shape, canonical):
    """The model in fp16, its linear layers with the weights that the codes stand for."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
                         num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
                         vocab_size=shape.vocabulary, max_position_embeddings=8192, rms_norm_eps=shape.epsilon,
                         tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for layer in model.model.layers:
            for path, part in _PARTS.items():
                layer.get_submodule(path).weight.copy_(canonical[part].dequantize(torch.float32))
    return model


def swap(model, make):
    """Every linear layer of the blocks for make(part), layer by layer, in place."""
    for layer in model.model.layers:
        for path, part in _PARTS.items():
            layer.set_submodule(path, make(part))


def swap_codegemm(model, canonical):
    """For CodeGemmLinear. Each kind of layer is packed once, and the others of its kind get copies in memory of their own."""
    packed = {}

    def make(part):
        matrix = canonical[part]
        layer = CodeGemmLinear(matrix.format, matrix.cols, matrix.rows, device="cuda")
        layer.codes, layer.codebooks, layer.scales = matrix.codes, matrix.codebooks, matrix.scales
        layer.packed = packed[part].clone() if part in packed else layer.pack()
        packed[part] = layer.packed
        layer.handle = layer.packed.handle
        return layer

    swap(model, make)
    return prepare(model)


def generated(model, prompt, tokens):
    """Greedy tokens of generate(), and the logits behind the prompt in float64."""
    ids = torch.tensor([prompt], device="cuda")
    logits = model(ids).logits[0, -1].double()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                         do_sample=False)
    return out[0, len(prompt):].tolist(), logits


def tokens_per_second(model, prompt, steps, rounds, graphs):
    """Of single decode steps with a static cache behind the prompt, one captured graph replayed; by the median round."""
    from transformers import StaticCache
    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + (rounds + 2) * steps + 16)
    ids = torch.tensor([prompt], device="cuda")
    model(ids, past_key_values=cache, cache_position=torch.arange(len(prompt), device="cuda"))
    token = torch.tensor([[prompt[-1]]], device="cuda")
    position = torch.tensor([len(prompt)], device="cuda")

    def step():
        logits = model(token, past_key_values=cache, cache_position=position, position_ids=position[None]).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    run = step
    if graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    times = []
    for _ in range(rounds + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(steps):
            run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / steps)
    return 1.0 / sorted(times[1:])[rounds // 2]


def run(out, attempt, name="m2v8g-1", layers=32, steps=32, rounds=5):
    """Rows and checks of the unswapped model, of CodeGemmLinear in it, and of AQLM's layer, into `out`."""
    shape = Shape(layers=layers)
    canonical = {part: random_canonical(name, *size, "cuda") for part, size in shape.linears().items()}
    model = dense_model(shape, canonical)
    prompt = torch.randint(3, shape.vocabulary, (64,)).tolist()
    text, want = generated(model, prompt, 32)
    check = {"model": f"transformers {type(model).__name__}, Llama-3.1-8B's shape, {layers} layers", "format": name}
    dense_rate = None
    for kind in ("nn.Linear fp16", "codegemm", "aqlm"):
        if kind == "codegemm":
            swap_codegemm(model, canonical)
            check["layers swapped"] = len(codegemm_layers(model))
        elif kind == "aqlm":
            done, why = attempt("aqlm", lambda: swap(model, lambda part: aqlm_linear(canonical[part], torch.float16)) or True)
            if not done:
                check["aqlm"] = f"left out: {why}"
                continue
        if kind != "nn.Linear fp16":
            tokens, logits = generated(model, prompt, 32)
            check[f"logits, {kind}"] = float((logits - want).norm() / want.norm())
            check[f"equal greedy tokens at first, {kind}"] = next(
                (i for i, (a, b) in enumerate(zip(tokens, text)) if a != b), len(text))
        row = {"linear": kind, "model": "transformers", "format": name if kind != "nn.Linear fp16" else None}
        eager, why = attempt(f"{kind} without graphs", lambda: tokens_per_second(model, prompt, 8, 3, False))
        row["without_graphs"] = eager
        rate, why = attempt(f"{kind} under CUDA graphs", lambda: tokens_per_second(model, prompt, steps, rounds, True))
        row["tokens_per_s"] = rate
        dense_rate = rate if kind == "nn.Linear fp16" else dense_rate
        if why:
            row["note"] = why
        elif dense_rate and kind != "nn.Linear fp16":
            row["x_dense"] = rate / dense_rate
        out["rows"].append(row)
    out["checks"].append(check)
    # Random weights make logits of nearly one size: they have to agree, near ties need not.
    out["ok"] = out["ok"] and check.get("logits, codegemm", 1.0) < 5e-2
