# SPDX-License-Identifier: Apache-2.0
"""PrefillShare (arXiv 2602.12029) with transformers: a frozen base model fills a cache once, and decode modules, each a
model with weights of its own, generate from it.

The base's cache covers all tokens of the context but the last. A decode module runs that one itself, so that the first
token of its answer is its own; its keys and values from there on are private and die with its cache. An answer joins
the context by append(), and the base prefills it like any other text.

The base's keys and values are read where they lie: a module's cache holds views of them and a tail of its own, and the
attention below takes the two side by side. So any number of modules can be at it at once, at the cost of one prefill
and one copy.
"""
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .library import CodeGemmError

ATTENTION = "shared_prefill"
PREFILL_CHUNK = 512  # tokens a forward pass


class SharedLayer(DynamicLayer):
    """One layer of a decode module's cache: views of the base's keys and values, and a tail of its own."""

    def __init__(self, base_keys, base_values):
        super().__init__()
        self.base_keys, self.base_values = base_keys, base_values

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        keys.shared_layer = self  # for the attention, which gets nothing else of the cache
        return keys, values

    def get_seq_length(self):
        return self.base_keys.shape[-2] + super().get_seq_length()


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Softmax over the base's and the private keys together; no tensor of both is made. Without a shared cache:
    PyTorch's own attention."""
    layer = getattr(key, "shared_layer", None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, tokens, dim = query.shape
    if tokens != 1:
        raise CodeGemmError(f"a decode module takes one token at a time from a shared cache, got {tokens}")
    query = query.reshape(batch, key.shape[1], -1, dim) * (dim**-0.5 if scaling is None else scaling)
    shared = layer.base_keys.shape[-2]
    scores = torch.cat([query @ layer.base_keys.transpose(2, 3), query @ key.transpose(2, 3)], -1)
    weights = torch.softmax(scores.float(), -1).to(query.dtype)
    out = weights[..., :shared] @ layer.base_values + weights[..., shared:] @ value
    return out.reshape(batch, heads, 1, dim).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _reads(config):
    """What of a model its cache depends on."""
    rope = getattr(config, "rope_parameters", None) or {
        "rope_theta": getattr(config, "rope_theta", None), "rope_scaling": getattr(config, "rope_scaling", None)}
    heads = config.num_attention_heads
    return {"vocabulary": config.vocab_size, "layers": config.num_hidden_layers,
            "KV heads": getattr(config, "num_key_value_heads", None) or heads,
            "head size": getattr(config, "head_dim", None) or config.hidden_size // heads, "RoPE": rope}


def check_compatible(base, module):
    """CodeGemmError, with all that differs, if a decode module cannot read the base's cache."""
    ours, theirs = _reads(module.config), _reads(base.config)
    differ = [f"{name} {ours[name]}, the base's {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if differ:
        raise CodeGemmError("the decode module does not fit the base: " + "; ".join(differ))


class SharedSession:
    """The context of one session, shared by all modules that take turns on it. `base` is a transformers model and
    stays as it is."""

    def __init__(self, base):
        self.base, self.cache, self.context = base, DynamicCache(config=base.config), []
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            raise CodeGemmError("a sliding window drops keys that decode modules have to read")

    def append(self, tokens):
        """X := [X; tokens]. Computes nothing yet."""
        self.context.extend(int(token) for token in tokens)

    @torch.no_grad()
    def prefill(self):
        """Brings the base's cache up to all but the last token of the context; returns the tokens computed."""
        if not self.context:
            raise CodeGemmError("prefill of an empty context")
        done = first = self.cache.get_seq_length()
        while done < len(self.context) - 1:
            chunk = self.context[done : min(done + PREFILL_CHUNK, len(self.context) - 1)]
            # The base's own output is not used: one position of logits is the least that it makes.
            self.base(torch.tensor([chunk], device=self.base.device), past_key_values=self.cache, use_cache=True,
                      logits_to_keep=1)
            done += len(chunk)
        return done - first

    def fork(self):
        """A decode module's cache over what is prefilled now. The base's part is a view and never written; what the
        base prefills later is not in it."""
        length = self.cache.get_seq_length()
        layers = []
        for layer in self.cache.layers:
            if length == 0:
                raise CodeGemmError("a context of one token leaves nothing to share: run the module by itself")
            layers.append(SharedLayer(layer.keys[..., :length, :], layer.values[..., :length, :]))
        return Cache(layers=layers)

    @torch.no_grad()
    def decode(self, module, max_tokens, stop=(), choose=None):
        """One module's answer: up to max_tokens tokens, without the stop token that ended it. choose(logits
        [vocabulary]) -> token; greedy by default."""
        check_compatible(self.base, module)
        if module.config._attn_implementation != ATTENTION:
            module.set_attn_implementation(ATTENTION)
        self.prefill()
        own, token, answer = self.fork(), self.context[-1], []
        while len(answer) < max_tokens:
            out = module(torch.tensor([[token]], device=module.device), past_key_values=own, use_cache=True)
            logits = out.logits[0, -1]
            token = int(logits.argmax() if choose is None else choose(logits))
            if token in stop:
                break
            answer.append(token)
        return answer
