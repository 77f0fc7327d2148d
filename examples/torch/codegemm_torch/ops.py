# SPDX-License-Identifier: Apache-2.0
"""The operator codegemm::gemm: y = x W^T into memory of the caller's.

It allocates nothing and synchronizes nothing; on a GPU it puts its kernels into the current stream, so that it may
be captured into a CUDA graph. For inference: it has no gradient.
"""
import ctypes as c

import torch

from .library import BF16, CPU_ALIGNMENT, CUDA_ALIGNMENT, FP16, FP32, SWIGLU, CodeGemmError, CudaProblem, load_library
from .weights import CPU_CHUNK, CUDA_CHUNK, packed_weights

_TYPES = {torch.float16: FP16, torch.bfloat16: BF16, torch.float32: FP32}

_operators = torch.library.Library("codegemm", "DEF")
_operators.define("gemm(Tensor x, Tensor(a!) y, Tensor(b!) workspace, int weights, bool swiglu=False) -> ()",
                  tags=(torch.Tag.needs_fixed_stride_order,))


def _check(x, y, workspace, rows, cols):
    for name, tensor, columns in (("x", x, cols), ("y", y, rows)):
        shape = tensor.shape
        if len(shape) != 2 or shape[1] != columns:
            raise CodeGemmError(f"{name} is {tuple(shape)}, expected [tokens, {columns}]")
        if columns > 1 and tensor.stride(1) != 1:
            raise CodeGemmError(f"{name} has stride {tensor.stride(1)} between columns, expected 1")
    if x.shape[0] != y.shape[0]:
        raise CodeGemmError(f"x has {x.shape[0]} tokens, y has {y.shape[0]}")
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        raise CodeGemmError(f"workspace is {workspace.dtype} {tuple(workspace.shape)}, expected bytes (uint8)")


def _on(device, weights, **tensors):
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise CodeGemmError(f"{name} is on {tensor.device}, the weights {weights} are on {device}")


def _row_stride(tensor):
    # Of one token any stride will do, and PyTorch's may be anything.
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def _gemm_cpu(x, y, workspace, weights, swiglu=False):
    packed = packed_weights(weights)
    _on(packed.device, weights, x=x, y=y, workspace=workspace)
    _check(x, y, workspace, packed.rows, packed.cols)
    if swiglu:
        raise CodeGemmError("swiglu: only on a GPU")
    if x.dtype != torch.float32 or y.dtype != torch.float32:
        raise CodeGemmError(f"x is {x.dtype} and y is {y.dtype}, on the CPU both must be float32")
    library = load_library()
    executor = library.executor(torch.get_num_threads())
    skip = -workspace.data_ptr() % CPU_ALIGNMENT
    x_stride, y_stride = _row_stride(x), _row_stride(y)
    for first in range(0, x.shape[0], CPU_CHUNK):
        library.call("gemm", packed.native, min(CPU_CHUNK, x.shape[0] - first),
                     x.data_ptr() + 4 * first * x_stride, x_stride, y.data_ptr() + 4 * first * y_stride, y_stride,
                     workspace.data_ptr() + skip, max(0, workspace.numel() - skip), executor)


def _gemm_cuda(x, y, workspace, weights, swiglu=False):
    packed = packed_weights(weights)
    _on(packed.device, weights, x=x, y=y, workspace=workspace)
    _check(x, y, workspace, packed.rows // 2 if swiglu else packed.rows, packed.cols)
    if x.dtype not in (torch.float16, torch.bfloat16) or y.dtype not in _TYPES:
        raise CodeGemmError(f"x is {x.dtype} and y is {y.dtype}, on a GPU x must be float16 or bfloat16")
    library, index = load_library(), packed.device.index
    # A cudaStream_t; without the Python object that torch.cuda.current_stream() makes.
    stream = torch._C._cuda_getCurrentRawStream(index)
    problem = CudaProblem(struct_size=c.sizeof(CudaProblem), weights=c.pointer(packed.native), x_type=_TYPES[x.dtype],
                          y_type=_TYPES[y.dtype], activation=SWIGLU if swiglu else 0)
    problem.x_stride, problem.y_stride = _row_stride(x), _row_stride(y)
    with torch.cuda.device(index):
        device = library.cuda_device(index)
        for first in range(0, x.shape[0], CUDA_CHUNK):
            problem.tokens = min(CUDA_CHUNK, x.shape[0] - first)
            problem.x = x.data_ptr() + x.element_size() * first * problem.x_stride
            problem.y = y.data_ptr() + y.element_size() * first * problem.y_stride
            library.call("cuda_run", c.byref(problem), device, workspace.data_ptr(), workspace.numel(), stream)


_operators.impl("gemm", _gemm_cpu, "CPU")
_operators.impl("gemm", _gemm_cuda, "CUDA")


@torch.library.register_fake("codegemm::gemm", lib=_operators)
def _gemm_fake(x, y, workspace, weights, swiglu=False):
    torch._check(x.dim() == 2 and y.dim() == 2 and workspace.dim() == 1,
                 lambda: "codegemm::gemm takes x and y of two dimensions, and a workspace of one")
    torch._check(x.shape[0] == y.shape[0], lambda: f"x has {x.shape[0]} tokens, y has {y.shape[0]}")


def make_workspace(packed, spare=None):
    """A workspace for all of these PackedWeights of one device, zeroed as the GPU's must be. Products that use it
    at the same time, in two streams or threads, need one each. `spare` is given back if it is large enough."""
    packed = list(packed)
    if not packed:
        raise CodeGemmError("a workspace for no weights")
    device = packed[0].device
    alignment = CUDA_ALIGNMENT if device.type == "cuda" else CPU_ALIGNMENT
    size = max(alignment, max(weights.workspace_bytes() for weights in packed) + alignment)
    if spare is not None and spare.device == device and spare.numel() >= size:
        return spare
    return torch.zeros(size, dtype=torch.uint8, device=device)


def gemm(x, weights, rows, workspace, swiglu=False):
    """x W^T as a new tensor: x [..., K], the result [..., rows] in x's type. `weights` is the handle of
    PackedWeights. On the CPU x is converted to float32 for the product where it is something else."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise CodeGemmError("codegemm::gemm has no gradient: call it under torch.no_grad() or inference_mode()")
    shape, dtype = x.shape, x.dtype
    if dtype != torch.float32 and x.device.type == "cpu":
        x = x.float()
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:  # transposed, expanded
        x = x.contiguous()
    y = x.new_empty((x.shape[0], rows))
    torch.ops.codegemm.gemm.default(x, y, workspace, weights, swiglu)
    if y.dtype != dtype:
        y = y.to(dtype)
    return y if len(shape) == 2 else y.view(*shape[:-1], rows)
