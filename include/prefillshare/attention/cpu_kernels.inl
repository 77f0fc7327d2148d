// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_kernels.inl - the attention kernels, written once in vector types.
// Included by cpu_kernels.hpp only, once for each instruction set, inside a namespace that defines
//   kLanes    floats of a vector: 4, 8 or 16; with 16 only attend_rows() is used, and head_dim a multiple of 16
//   kVectors  vectors of a register tile's row; kVectors * kLanes divides kKeyTile
// and with the compiler's target set. Templates and inline functions of others are not used here: an
// instance made under this target could be the one the linker keeps for all.

#include <prefillshare/attention/cpu_vectors.inl>
// The parts stand on those before them.
#include <prefillshare/attention/cpu_key_rows.inl>

#include <prefillshare/attention/cpu_many_rows.inl>

#include <prefillshare/attention/cpu_few_rows.inl>
