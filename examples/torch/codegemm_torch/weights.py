# SPDX-License-Identifier: Apache-2.0
"""Canonical arrays, and the same weights packed for the kernels of one device."""
import ctypes as c
import itertools
import weakref
from dataclasses import dataclass

import torch

from .library import FP16, CodeGemmError, CudaProblem, CudaWeights, Format, Matrix, load_library

CPU_CHUNK = 512  # tokens of one call; more are cut, so that one workspace serves every number of tokens
CUDA_CHUNK = 4096


@dataclass
class Canonical:
    """A quantized matrix of rows x cols as the checkpoint has it: codes int32 [m][ceil((K / v) / w)][N], w = 4
    codes a word for b <= 8, else 2; codebooks fp16 [m][2^b][v]; scales fp16 [ceil(K / g)][N]."""

    format: Format
    rows: int
    cols: int
    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def shapes(f, rows, cols):
        """Of the three arrays. CodeGemmError for a format or shape that cannot be."""
        sizes = [c.c_int64() for _ in range(3)]
        load_library().call("canonical_sizes", c.byref(f), rows, cols, *map(c.byref, sizes))
        words, values, scales = (size.value for size in sizes)
        # Of no rows or columns the sizes tell nothing, and nothing of a quantized layer is empty.
        if 0 in (words, values, scales):
            raise CodeGemmError(f"a quantized layer of {rows} x {cols} has no weights")
        return ((f.m, words // (f.m * rows), rows), (f.m, 2**f.b, f.v), (scales // rows, rows))

    def check(self, name):
        """The tensors have the types and shapes that the format asks for; the codes are looked at by packing."""
        wanted = self.shapes(self.format, self.rows, self.cols)
        for part, dtype, shape in zip(("codes", "codebooks", "scales"),
                                      (torch.int32, torch.float16, torch.float16), wanted):
            tensor = getattr(self, part)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise CodeGemmError(f"{name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, but {self.rows} x "
                                    f"{self.cols} has {dtype} {shape}")

    def host(self):
        """The C struct, and the tensors in host memory that it points to."""
        keep = [t.detach().to("cpu").contiguous() for t in (self.codes, self.codebooks, self.scales)]
        out = Matrix(c.sizeof(Matrix), self.format, self.rows, self.cols, *(t.data_ptr() for t in keep),
                     *(t.numel() for t in keep))
        return out, keep

    def dequantize(self, dtype=torch.float64):
        """W[N][K] by the formula, in plain PyTorch: what every product is compared with."""
        f, vectors = self.format, self.cols // self.format.v
        bits = 8 if f.b <= 8 else 16
        words = self.codes.long() & 0xFFFFFFFF
        codes = torch.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)], 2)
        codes = codes.flatten(1, 2)[:, :vectors]  # [m][K / v][N]
        books = self.codebooks.to(dtype)
        weights = sum(books[i][codes[i]] for i in range(f.m)).permute(1, 0, 2).reshape(self.rows, self.cols)
        group = self.cols if f.g < 0 else f.g
        return weights * self.scales.to(dtype).T.repeat_interleave(group, 1)[:, : self.cols]


_packed = weakref.WeakValueDictionary()  # handle -> PackedWeights
_handles = itertools.count(1)


class PackedWeights:
    """Weights in the layout of one device's kernels. `handle` is the number by which the operator finds them:
    it is good as long as this object is. On a GPU several matrices of the same K and format are merged
    along N (Q, K and V; gate and up)."""

    def __init__(self, matrices, device):
        library = load_library()
        self.device = torch.device(device)
        self.cols = matrices[0].cols
        self.rows = sum(matrix.rows for matrix in matrices)
        structs, keep = zip(*(matrix.host() for matrix in matrices))
        array = (Matrix * len(structs))(*structs)
        if self.device.type == "cpu":
            if len(matrices) != 1:
                raise CodeGemmError(f"{len(matrices)} matrices: only weights on a GPU can be merged")
            self.native = c.c_void_p()
            library.call("pack", array, c.byref(self.native))
            weakref.finalize(self, library.raw.codegemm_c_packed_destroy, self.native)
        elif self.device.type == "cuda":
            if not library.has_cuda:
                raise CodeGemmError(f"'{library.path}' was built without CUDA (CODEGEMM_ENABLE_CUDA)")
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            size = c.c_size_t()
            library.call("cuda_pack_bytes", array, len(structs), c.byref(size))
            buffer = torch.empty(size.value, dtype=torch.uint8)
            self.native = CudaWeights(struct_size=c.sizeof(CudaWeights))
            library.call("cuda_pack", array, len(structs), buffer.data_ptr(), size, c.byref(self.native))
            self._place(buffer.to(self.device))
        else:
            raise CodeGemmError(f"device '{self.device}': products run on cpu and cuda")
        del keep
        self._register()

    def _place(self, data):
        self.data = data  # PyTorch aligns its allocations to 512 bytes
        self.native.data = data.data_ptr()

    def _register(self):
        self.handle = next(_handles)
        _packed[self.handle] = self

    def clone(self):
        """The same weights in other device memory (GPU only)."""
        if self.device.type != "cuda":
            raise CodeGemmError("clone: only weights on a GPU")
        out = object.__new__(PackedWeights)
        out.device, out.cols, out.rows = self.device, self.cols, self.rows
        out.native = CudaWeights.from_buffer_copy(self.native)
        out._place(self.data.clone())
        out._register()
        return out

    def workspace_bytes(self):
        """Enough for every number of tokens."""
        library, size = load_library(), c.c_size_t()
        if self.device.type == "cpu":
            library.call("workspace_bytes", self.native, CPU_CHUNK, torch.get_num_threads(), c.byref(size))
            return size.value
        most = 0
        problem = CudaProblem(struct_size=c.sizeof(CudaProblem), weights=c.pointer(self.native), x_stride=self.cols,
                              y_stride=self.rows, x_type=FP16, y_type=FP16)
        with torch.cuda.device(self.device):
            device = library.cuda_device(self.device.index)
            # Few tokens may need more than many: each number up to where sums of many tiles begin, then some.
            for tokens in [*range(1, 129), *range(160, CUDA_CHUNK + 1, 32)]:
                problem.tokens = tokens
                library.call("cuda_workspace_bytes", c.byref(problem), device, c.byref(size))
                most = max(most, size.value)
        return most


def packed_weights(handle):
    """The weights of a handle; CodeGemmError once they are gone."""
    found = _packed.get(handle)
    if found is None:
        raise CodeGemmError(f"there are no packed weights with the handle {handle}: their layer was freed or moved")
    return found
