# SPDX-License-Identifier: Apache-2.0
"""CodeGemmLinear in place of nn.Linear."""
import torch
from torch import nn

from .library import CodeGemmError, Format
from .ops import gemm, make_workspace
from .quantize import quantize
from .weights import Canonical, PackedWeights


class CodeGemmLinear(nn.Module):
    """y = x W^T (+ bias) with codebook-quantized weights. The canonical arrays are buffers, so that a state dict
    holds them as the official CodeGEMM checkpoints do (NAME.codes, .codebooks, .scales); prepare() packs them
    for the device they are on, after loading and after every move."""

    def __init__(self, format, in_features, out_features, bias=False, dtype=None, device=None):
        super().__init__()
        codes, codebooks, scales = Canonical.shapes(format, out_features, in_features)
        self.format, self.in_features, self.out_features = format, in_features, out_features
        self.register_buffer("codes", torch.zeros(codes, dtype=torch.int32, device=device))
        self.register_buffer("codebooks", torch.zeros(codebooks, dtype=torch.float16, device=device))
        self.register_buffer("scales", torch.zeros(scales, dtype=torch.float16, device=device))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        # Neither saved nor loaded: what the operator works with.
        self.register_buffer("workspace", None, persistent=False)
        self.packed, self.handle = None, 0

    @classmethod
    def from_linear(cls, linear, format, inputs=None, **options):
        """An nn.Linear quantized, on its device; quantize() tells the arguments. prepare() comes next."""
        matrix = quantize(linear.weight, format, inputs, **options)
        bias = linear.bias
        out = cls(matrix.format, matrix.cols, matrix.rows, bias=bias is not None, dtype=linear.weight.dtype,
                  device=linear.weight.device)
        out.codes, out.codebooks, out.scales = matrix.codes, matrix.codebooks, matrix.scales
        if bias is not None:
            out.bias.copy_(bias.detach())
        return out

    def canonical(self):
        return Canonical(self.format, self.out_features, self.in_features, self.codes, self.codebooks, self.scales)

    def pack(self):
        """Packs for the device of the buffers, and returns the PackedWeights. The layer still needs a workspace."""
        self.canonical().check(type(self).__name__)
        self.packed = PackedWeights([self.canonical()], self.codes.device)
        self.handle = self.packed.handle
        return self.packed

    def forward(self, x):
        if self.handle == 0 or self.workspace is None:
            raise CodeGemmError("CodeGemmLinear: call prepare(model) after loading or moving it")
        y = gemm(x, self.handle, self.out_features, self.workspace)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        # .to(device) moves the arrays; .half(), .float() and the like must not change them. What was packed is
        # for another device then.
        arrays = {name: getattr(self, name) for name in ("codes", "codebooks", "scales")}
        workspace, self.workspace = self.workspace, None
        super()._apply(fn, recurse)
        moved = self.codes.device != arrays["codes"].device
        for name, old in arrays.items():
            if getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        if moved:
            self.packed, self.handle = None, 0
        else:
            self.workspace = workspace
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.packed, self.handle = None, 0  # of the weights that were here before

    def __getstate__(self):  # copies and pickles pack again
        return self.__dict__ | {"packed": None, "handle": 0, "format": None,
                                "format_numbers": tuple(getattr(self.format, n) for n in ("v", "m", "b", "g"))}

    def __setstate__(self, state):
        numbers = state.pop("format_numbers")
        super().__setstate__(state)
        self.format = Format(*numbers)

    def extra_repr(self):
        f = self.format
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"m={f.m}, v={f.v}, b={f.b}, g={f.g}")


def codegemm_layers(model):
    """(name, layer) of every CodeGemmLinear in it."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, CodeGemmLinear)]


def prepare(model):
    """Packs every layer that is not, and gives all of them one workspace: the model then runs in one stream (or
    thread) at a time. Returns the model. Call it before torch.compile and before a CUDA graph is captured."""
    layers = codegemm_layers(model)
    if not layers:
        raise CodeGemmError("prepare: the model has no CodeGemmLinear")
    if len({layer.codes.device for _, layer in layers}) > 1:
        raise CodeGemmError("prepare: the layers are on more than one device: prepare the parts, one by one")
    for name, layer in layers:
        if layer.handle == 0:
            try:
                layer.pack()
            except CodeGemmError as error:
                raise CodeGemmError(f"{name}: {error}") from None
    workspace = make_workspace((layer.packed for _, layer in layers), layers[0][1].workspace)
    for _, layer in layers:
        layer.workspace = workspace
    return model
