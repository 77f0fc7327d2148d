# SPDX-License-Identifier: Apache-2.0
"""Model folders in the official CodeGEMM format, as examples/06_quantize.cpp writes them (--kind codegemm)."""
import json
import os

import torch
from torch import nn

from .library import CodeGemmError, Format
from .linear import CodeGemmLinear, prepare

_PARTS = ("codes", "codebooks", "scales")


def read_config(folder):
    """config.json of a quantized model, and its Format."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise CodeGemmError(f"{path}: {error}") from None
    numbers = config.get("codegemm") if isinstance(config, dict) else None
    if not isinstance(numbers, dict):
        raise CodeGemmError(f"{path}: has no 'codegemm': is no model in CodeGEMM's format (quantize --kind codegemm)")
    values = []
    for name in ("vec_len", "num_codebooks", "nbits_per_codebook", "group_size"):
        value = numbers.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**30:
            raise CodeGemmError(f"{path}: codegemm: '{name}' is {value!r}, expected a positive integer")
        values.append(value)
    if values[2] > 8:
        raise CodeGemmError(f"{path}: codegemm: nbits_per_codebook is {values[2]}, codes have at most 8 bits")
    return config, Format(*values)


def read_tensors(folder):
    """All tensors of the folder's safetensors, one file or shards."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    try:
        if os.path.exists(index):
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        tensors = {}
        for name in names:
            if os.path.basename(name) != name:
                raise CodeGemmError(f"{index}: the shard '{name}' is not in the folder")
            tensors |= load_file(os.path.join(folder, name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CodeGemmError(f"{folder}: cannot be read: {error}") from None
    return tensors


def load_quantized(model, folder):
    """Swaps the linear layers of a model for those that the folder has quantized, in place, layer by layer, and loads
    its other tensors (embeddings, norms). The model is one of the same shape, such as transformers gives for the
    folder's config.json; what does not fit is an error that names it, and the model may then be half swapped."""
    _, f = read_config(folder)
    tensors = read_tensors(folder)
    quantized = sorted(name[: -len(".codes")] for name in tensors if name.endswith(".codes"))
    if not quantized:
        raise CodeGemmError(f"{folder}: has no quantized layer")
    for name in quantized:
        missing = [part for part in _PARTS if f"{name}.{part}" not in tensors]
        if missing:
            raise CodeGemmError(f"{folder}: '{name}' has no {', '.join(missing)}")
        try:
            parent = model.get_submodule(name.rpartition(".")[0])
            old = model.get_submodule(name)
        except AttributeError:
            raise CodeGemmError(f"{folder}: the model has no layer '{name}'") from None
        if not isinstance(old, (nn.Linear, CodeGemmLinear)):
            raise CodeGemmError(f"{folder}: '{name}' is a {type(old).__name__} in the model, not a linear layer")
        new = CodeGemmLinear(f, old.in_features, old.out_features, bias=old.bias is not None,
                             dtype=old.bias.dtype if old.bias is not None else None)
        for part in _PARTS:
            setattr(new, part, tensors.pop(f"{name}.{part}"))
        new.canonical().check(name)
        if old.bias is not None:
            new.bias = old.bias
        place = old.codes if isinstance(old, CodeGemmLinear) else old.weight
        setattr(parent, name.rpartition(".")[2], new.to(place.device))
    arrays = {f"{name}.{part}" for name in quantized for part in _PARTS}
    try:
        found = model.load_state_dict(tensors, strict=False)  # shapes are compared all the same
    except RuntimeError as error:
        raise CodeGemmError(f"{folder}: {error}") from None
    missing = [key for key in found.missing_keys if key not in arrays]
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        missing = [key for key in missing if key != "lm_head.weight"]
        model.tie_weights()
    if missing or found.unexpected_keys:
        raise CodeGemmError(f"{folder}: tensors that are not there: {missing[:3]}, that the model does not know: "
                            f"{found.unexpected_keys[:3]}")
    return prepare(model)


def quantized_model(folder, dtype=torch.float32, device="cpu"):
    """The transformers model of such a folder, ready to generate. (float16 or bfloat16 on a GPU.)"""
    from transformers import AutoConfig, AutoModelForCausalLM
    read_config(folder)  # with our words, before transformers sees it
    # [guide: torch_swap]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return load_quantized(model.to(device).eval(), folder)
    # [guide: end]
