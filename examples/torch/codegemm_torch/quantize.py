# SPDX-License-Identifier: Apache-2.0
"""Quantizes a weight matrix of PyTorch's, on the CPU: by k-means, or calibrated on inputs of its layer."""
import ctypes as c

import torch

from .library import CodeGemmError, Format, Matrix, QuantizeOptions, load_library, parse_format
from .weights import Canonical

_OPTIONS = [name for name, _ in QuantizeOptions._fields_
            if name not in ("struct_size", "reserved", "progress", "context")]


def gram_of(inputs, features):
    """X^T X in fp32 of inputs [..., features], summed on their device in double."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    if rows.shape[1] != features or rows.shape[0] == 0:
        raise CodeGemmError(f"inputs are {tuple(inputs.shape)}, expected [..., {features}] and one at least")
    out = torch.zeros(features, features, dtype=torch.float64, device=rows.device)
    for part in rows.split(4096):
        part = part.double()
        out += part.T @ part
    return out.float()


def quantize(weight, format, inputs=None, gram=None, **options):
    """`weight` [N, K] as a Canonical on its device. `format` is a name as "m2v8g128" or a Format. Without
    `inputs` the weights' own squared error is made small; with inputs [..., K] of the layer, or their `gram`
    X^T X [K, K], that of its outputs, which takes longer. Options are those of codegemm_c_quantize_options (see
    capi/codegemm_c.h): seed, iterations, training_rounds, rounds, beam, ... The same weight, format and
    options give the same bits on any number of threads. CodeGemmError names what is wrong: a weight that is
    not finite, a K that is no multiple of v."""
    if weight.dim() != 2:
        raise CodeGemmError(f"weight is {tuple(weight.shape)}, expected [rows, cols]")
    if inputs is not None and gram is not None:
        raise CodeGemmError("inputs and gram: only one of them")
    unknown = set(options) - set(_OPTIONS)
    if unknown:
        raise CodeGemmError(f"no option {', '.join(sorted(unknown))}: there are {', '.join(_OPTIONS)}")
    library = load_library()
    f = format if isinstance(format, Format) else parse_format(format)
    rows, cols = weight.shape
    shapes = Canonical.shapes(f, rows, cols)
    if inputs is not None:
        gram = gram_of(inputs, cols)
    host = weight.detach().to("cpu", torch.float32).contiguous()
    if gram is not None:
        if tuple(gram.shape) != (cols, cols):
            raise CodeGemmError(f"gram is {tuple(gram.shape)}, expected ({cols}, {cols})")
        gram = gram.detach().to("cpu", torch.float32).contiguous()
    told = QuantizeOptions(struct_size=c.sizeof(QuantizeOptions))
    library.call("quantize_defaults", c.byref(told))
    for name, value in options.items():
        setattr(told, name, value)
    made, matrix = c.c_void_p(), Matrix(struct_size=c.sizeof(Matrix))
    library.call("quantize", host.data_ptr(), rows, cols, cols, c.byref(f), None if gram is None else gram.data_ptr(),
                 cols, c.byref(told), library.executor(torch.get_num_threads()), c.byref(made))
    try:
        library.call("quantized_matrix", made, c.byref(matrix))
        arrays = []
        for shape, dtype, at in zip(shapes, (torch.int32, torch.float16, torch.float16),
                                    (matrix.codes, matrix.codebooks, matrix.scales)):
            array = torch.empty(shape, dtype=dtype)
            c.memmove(array.data_ptr(), at, array.numel() * array.element_size())
            arrays.append(array.to(weight.device))
    finally:
        library.raw.codegemm_c_quantized_destroy(made)
    return Canonical(f, rows, cols, *arrays)
