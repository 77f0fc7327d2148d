# SPDX-License-Identifier: Apache-2.0
"""The C API's shared library by ctypes: capi/codegemm_c.h, as much of it as the operator needs."""
import ctypes as c
import os
import weakref

ABI_VERSION = 1
CPU_ALIGNMENT = 64  # CODEGEMM_C_WORKSPACE_ALIGNMENT
CUDA_ALIGNMENT = 256  # CODEGEMM_C_CUDA_ALIGNMENT
CUDA_MAX_PARTS = 4
FP16, BF16, FP32 = 1, 2, 3  # enum codegemm_c_type
SWIGLU = 1  # enum codegemm_c_activation


class Format(c.Structure):
    _fields_ = [(name, c.c_int32) for name in ("v", "m", "b", "g")]


class Matrix(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("format", Format),
        ("rows", c.c_int64),
        ("cols", c.c_int64),
        ("codes", c.c_void_p),
        ("codebooks", c.c_void_p),
        ("scales", c.c_void_p),
        ("code_words", c.c_int64),
        ("codebook_values", c.c_int64),
        ("scale_values", c.c_int64),
    ]


class QuantizeOptions(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("seed", c.c_uint64),
        ("iterations", c.c_int32),
        ("training_rounds", c.c_int32),
        ("encode_rounds", c.c_int32),
        ("refits", c.c_int32),
        ("sample", c.c_int64),
        ("rounds", c.c_int32),
        ("beam", c.c_int32),
        ("codebook_steps", c.c_int32),
        ("reserved", c.c_int32),
        ("tolerance", c.c_double),
        ("damping", c.c_double),
        ("progress", c.c_void_p),
        ("context", c.c_void_p),
    ]


class CudaWeights(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("layout_version", c.c_int32),
        ("parts", c.c_int32),
        ("format", Format),
        ("part_rows", c.c_int64 * CUDA_MAX_PARTS),
        ("cols", c.c_int64),
        ("sets", c.c_int32),
        ("unscale", c.c_float),
        ("data", c.c_void_p),
    ]


class CudaProblem(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("weights", c.POINTER(CudaWeights)),
        ("tokens", c.c_int64),
        ("x", c.c_void_p),
        ("x_stride", c.c_int64),
        ("y", c.c_void_p),
        ("y_stride", c.c_int64),
        ("bias", c.c_void_p),
        ("residual", c.c_void_p),
        ("residual_stride", c.c_int64),
        ("x_type", c.c_int32),
        ("y_type", c.c_int32),
        ("activation", c.c_int32),
        ("flags", c.c_uint32),
    ]


# Arguments of every function that is called, so that ctypes cuts no pointer or size to an int.
_P, _I32, _I64, _SIZE = c.c_void_p, c.c_int32, c.c_int64, c.c_size_t
_SIGNATURES = {
    "parse_format": [c.c_char_p, _P],
    "canonical_sizes": [_P, _I64, _I64, _P, _P, _P],
    "quantize_defaults": [_P],
    "quantize": [_P, _I64, _I64, _I64, _P, _P, _I64, _P, _P, _P],
    "quantized_matrix": [_P, _P],
    "pack": [_P, _P],
    "executor_create": [_I32, _P],
    "workspace_bytes": [_P, _I64, _I32, _P],
    "gemm": [_P, _I64, _P, _I64, _P, _I64, _P, _SIZE, _P],
    "cuda_pack_bytes": [_P, _I32, _P],
    "cuda_pack": [_P, _I32, _P, _SIZE, _P],
    "cuda_query_device": [_I32, _P],
    "cuda_workspace_bytes": [_P, _P, _P],
    "cuda_run": [_P, _P, _P, _SIZE, _P],
}


class CodeGemmError(RuntimeError):
    """A call that the library refused, in its words."""


class Library:
    """One loaded library. `raw` has its functions; call() raises what they say when they fail."""

    def __init__(self, path):
        self.path = path
        try:
            self.raw = c.CDLL(path)
        except OSError as error:
            raise CodeGemmError(f"the CodeGEMM library '{path}' cannot be loaded: {error}") from None
        try:
            version = self.raw.codegemm_c_abi_version
        except AttributeError:
            raise CodeGemmError(f"'{path}' is no CodeGEMM library: it has no codegemm_c_abi_version") from None
        version.restype = c.c_uint32
        if version() != ABI_VERSION:
            raise CodeGemmError(f"'{path}' has ABI version {version()}, this package is for {ABI_VERSION}")
        self.raw.codegemm_c_last_error.restype = c.c_char_p
        self.raw.codegemm_c_status_name.restype = c.c_char_p
        self.raw.codegemm_c_packed_destroy.argtypes = [_P]
        self.raw.codegemm_c_executor_destroy.argtypes = [_P]
        self.raw.codegemm_c_cuda_device_destroy.argtypes = [_P]
        self._calls = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(self.raw, "codegemm_c_" + name, None)
            if function is None:
                raise CodeGemmError(f"'{path}' has no codegemm_c_{name}: it is older than this package")
            function.argtypes, function.restype = arguments, c.c_int32
            self._calls[name] = function
        self.raw.codegemm_c_quantized_destroy.argtypes = [_P]
        self.has_cuda = bool(self.raw.codegemm_c_has_cuda())
        self._executors, self._devices = {}, {}

    def call(self, name, *arguments):
        status = self._calls[name](*arguments)
        if status != 0:
            words = self.raw.codegemm_c_status_name(status).decode()
            raise CodeGemmError(f"{words}: {self.raw.codegemm_c_last_error().decode(errors='replace')}")

    def executor(self, threads):
        """Threads for products on the CPU; they live as long as the library object."""
        if threads not in self._executors:
            made = c.c_void_p()
            self.call("executor_create", threads, c.byref(made))
            weakref.finalize(self, self.raw.codegemm_c_executor_destroy, made)
            self._executors[threads] = made
        return self._executors[threads]

    def cuda_device(self, number):
        """What the library knows of the GPU with this number, which is the current device."""
        if number not in self._devices:
            made = c.c_void_p()
            self.call("cuda_query_device", number, c.byref(made))
            weakref.finalize(self, self.raw.codegemm_c_cuda_device_destroy, made)
            self._devices[number] = made
        return self._devices[number]


_library = None


def load_library(path=None):
    """Loads the shared library, once: `path`, or what CODEGEMM_C_LIBRARY names, or libcodegemm_c.so wherever
    the loader finds it. Later calls give the same one."""
    global _library
    if _library is None:
        asked = path or os.environ.get("CODEGEMM_C_LIBRARY")
        try:
            _library = Library(asked or "libcodegemm_c.so")
        except CodeGemmError as error:
            if asked:
                raise
            raise CodeGemmError(f"{error}; set CODEGEMM_C_LIBRARY to the path of libcodegemm_c.so") from None
    elif path is not None and os.path.realpath(path) != os.path.realpath(_library.path):
        raise CodeGemmError(f"'{_library.path}' is loaded already, asked for '{path}'")
    return _library


def parse_format(name):
    """"m2v8g128" as a Format."""
    out = Format()
    load_library().call("parse_format", name.encode(), c.byref(out))
    return out
