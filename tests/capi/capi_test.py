#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The shared library from Python, with nothing but ctypes: a product and a session of the KV allocator.

usage: capi_test.py LIBRARY
"""
import ctypes as c
import random
import struct
import sys

ABI_VERSION = 1
WORKSPACE_ALIGNMENT = 64


class Format(c.Structure):
    _fields_ = [(name, c.c_int32) for name in ("v", "m", "b", "g")]


class Matrix(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("format", Format),
        ("rows", c.c_int64),
        ("cols", c.c_int64),
        ("codes", c.POINTER(c.c_uint32)),
        ("codebooks", c.POINTER(c.c_uint16)),
        ("scales", c.POINTER(c.c_uint16)),
        ("code_words", c.c_int64),
        ("codebook_values", c.c_int64),
        ("scale_values", c.c_int64),
    ]


CopyBlock = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_int32, c.c_int32, c.c_int32)


class KvOptions(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("blocks", c.c_int64),
        ("layers", c.c_int32),
        ("kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("block_tokens", c.c_int32),
        ("element_bytes", c.c_int32),
        ("reserved", c.c_int32),
        ("copy_block", CopyBlock),
        ("context", c.c_void_p),
    ]


class Library:
    """The functions, raising what they say when they fail."""

    def __init__(self, path):
        self.raw = c.CDLL(path)
        self.raw.codegemm_c_abi_version.restype = c.c_uint32
        self.raw.codegemm_c_last_error.restype = c.c_char_p
        self.raw.codegemm_c_status_name.restype = c.c_char_p
        self.raw.codegemm_c_kv_length.restype = c.c_int64
        version = self.raw.codegemm_c_abi_version()
        if version != ABI_VERSION:
            raise RuntimeError(f"ABI version {version}, this script is for {ABI_VERSION}")

    def call(self, name, *arguments):
        status = getattr(self.raw, "codegemm_c_" + name)(*arguments)
        if status != 0:
            words = self.raw.codegemm_c_status_name(status).decode()
            raise RuntimeError(f"{words}: {self.raw.codegemm_c_last_error().decode(errors='replace')}")


def half_bits(value):
    return struct.unpack("<H", struct.pack("<e", value))[0]


def half_value(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def aligned_buffer(size, alignment):
    """A buffer, and where in it an aligned `size` bytes begin."""
    buffer = c.create_string_buffer(size + alignment)
    start = (c.addressof(buffer) + alignment - 1) // alignment * alignment
    return buffer, c.c_void_p(start)


def test_gemm(library):
    rng = random.Random(20260915)
    rows, cols, tokens = 48, 128, 2
    matrix = Matrix(struct_size=c.sizeof(Matrix), rows=rows, cols=cols)
    library.call("parse_format", b"m2v8g64", c.byref(matrix.format))
    f = matrix.format
    assert (f.m, f.v, f.b, f.g) == (2, 8, 8, 64)
    sizes = [c.c_int64() for _ in range(3)]
    library.call("canonical_sizes", c.byref(f), c.c_int64(rows), c.c_int64(cols), *map(c.byref, sizes))
    words, values, scale_values = (size.value for size in sizes)
    codes = (c.c_uint32 * words)(*(rng.getrandbits(32) for _ in range(words)))
    codebooks = (c.c_uint16 * values)(*(half_bits(rng.uniform(-2.0, 2.0)) for _ in range(values)))
    scales = (c.c_uint16 * scale_values)(*(half_bits(rng.uniform(0.01, 0.1)) for _ in range(scale_values)))
    matrix.codes, matrix.codebooks, matrix.scales = codes, codebooks, scales
    matrix.code_words, matrix.codebook_values, matrix.scale_values = words, values - 1, scale_values
    packed, executor = c.c_void_p(), c.c_void_p()
    try:
        library.call("pack", c.byref(matrix), c.byref(packed))
    except RuntimeError as e:
        assert "shape mismatch" in str(e) and str(values) in str(e), e
    else:
        raise AssertionError("a matrix of too few codebook values was packed")
    matrix.codebook_values = values
    library.call("pack", c.byref(matrix), c.byref(packed))
    library.call("executor_create", c.c_int32(2), c.byref(executor))

    x = (c.c_float * (tokens * cols))(*(rng.uniform(-1.0, 1.0) for _ in range(tokens * cols)))
    y = (c.c_float * (tokens * rows))(*([float("nan")] * (tokens * rows)))
    size = c.c_size_t()
    library.call("workspace_bytes", packed, c.c_int64(tokens), c.c_int32(2), c.byref(size))
    _keep, workspace = aligned_buffer(size.value, WORKSPACE_ALIGNMENT)
    library.call("gemm", packed, c.c_int64(tokens), x, c.c_int64(cols), y, c.c_int64(rows), workspace, size, executor)

    error = norm = 0.0
    for n in range(rows):
        weights = []
        for k in range(cols):
            j, total = k // f.v, 0.0
            for book in range(f.m):
                word = codes[(book * (cols // f.v // 4) + j // 4) * rows + n]
                code = word >> (8 * (j % 4)) & 255
                total += half_value(codebooks[(book * 256 + code) * f.v + k % f.v])
            weights.append(total * half_value(scales[k // f.g * rows + n]))
        for t in range(tokens):
            want = sum(x[t * cols + k] * weights[k] for k in range(cols))
            error += (y[t * rows + n] - want) ** 2
            norm += want**2
    assert norm > 0.0 and (error / norm) ** 0.5 < 1e-3, (error, norm)
    library.raw.codegemm_c_packed_destroy(packed)
    library.raw.codegemm_c_executor_destroy(executor)


def test_kv(library):
    copies = []

    def copy_block(_context, destination, source, tokens):
        copies.append((destination, source, tokens))
        return 0

    def open_sequence(tokens):
        sequence, matched = c.c_void_p(), c.c_int64()
        library.call("kv_open", kv, b"base", b"1", b"", (c.c_int32 * len(tokens))(*tokens), c.c_int64(len(tokens)),
                     c.byref(sequence), c.byref(matched))
        return sequence, matched.value

    def page_table(sequences):
        handles = (c.c_void_p * len(sequences))(*sequences)
        indptr, indices = (c.c_int32 * (len(sequences) + 1))(), (c.c_int32 * 16)()
        last, pages = (c.c_int32 * len(sequences))(), c.c_int64()
        library.call("kv_page_table", handles, c.c_int64(len(sequences)), indptr, c.c_int64(len(indptr)), indices,
                     c.c_int64(16), last, c.c_int64(len(last)), c.byref(pages))
        return list(indptr), list(indices)[: pages.value], list(last)

    callback = CopyBlock(copy_block)  # kept as long as the allocator
    options = KvOptions(struct_size=c.sizeof(KvOptions), blocks=8, layers=2, kv_heads=1, head_dim=8, block_tokens=4,
                        element_bytes=2, copy_block=callback)
    kv = c.c_void_p()
    library.call("kv_create", c.byref(options), c.byref(kv))
    prompt = [5, 6, 7, 8, 9, 10]
    base, matched = open_sequence(prompt)
    assert matched == 0
    library.call("kv_reserve", base, c.c_int64(6))
    library.call("kv_commit", base, (c.c_int32 * 6)(*prompt), c.c_int64(6))
    second, matched = open_sequence(prompt)
    assert matched == 4
    fork = c.c_void_p()
    library.call("kv_fork", base, c.byref(fork))
    library.call("kv_append_private", fork, c.c_int64(3))
    assert library.raw.codegemm_c_kv_length(fork) == 9

    indptr, indices, last = page_table([base.value, fork.value, second.value])
    assert indptr == [0, 2, 5, 6] and last == [2, 1, 4], (indptr, last)
    assert indices[0] == indices[2] == indices[5], indices  # the full block is shared
    assert copies == [(indices[3], indices[1], 2)], copies  # the other one went two ways
    try:
        library.call("kv_reserve", fork, c.c_int64(100))
    except RuntimeError as e:
        assert str(e).startswith("exhausted: "), e
    else:
        raise AssertionError("100 tokens were reserved in 8 blocks of 4")
    library.raw.codegemm_c_kv_destroy(kv)  # sequences stay valid
    for sequence in (base, fork, second):
        library.raw.codegemm_c_kv_release(sequence)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    library = Library(sys.argv[1])
    test_gemm(library)
    test_kv(library)
    print("capi_test.py: a product and a KV session through ctypes")


if __name__ == "__main__":
    main()
