#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Compiles gemm_test for 64-bit Arm and runs its NEON cases under qemu-user.
#
# usage: aarch64.sh ROOT FOLDER [INCLUDE...]
#
# Exit 4 (skipped) without Debian's g++-aarch64-linux-gnu and qemu-user, or without Catch2 2 as a header.
set -euo pipefail
root=$1
folder=$2
shift 2

compiler=aarch64-linux-gnu-g++
runner=qemu-aarch64
for tool in $compiler $runner; do
  if ! command -v $tool >/dev/null; then
    echo "SKIPPED: needs $tool (Debian packages g++-aarch64-linux-gnu and qemu-user)"
    exit 4
  fi
done
catch=
for include in "$@" /usr/include; do
  [[ -f $include/catch2/catch.hpp ]] && catch=$include/catch2 && break
done
if [[ -z $catch ]]; then
  echo "SKIPPED: needs Catch2 2.13 as a single header (Debian package catch2)"
  exit 4
fi

# Only Catch2 of the host's headers: the others are for another processor.
mkdir -p "$folder/include"
ln -sfn "$catch" "$folder/include/catch2"
$compiler -std=c++20 -O1 -Wall -Wextra -Werror -static -DCODEGEMM_ENABLE_ASSERTS -isystem "$folder/include" \
  -I "$root/include" -I "$root/tests" "$root/tests/codegemm/gemm_test.cpp" "$root/tests/support/main.cpp" \
  -o "$folder/gemm_test"
$runner "$folder/gemm_test" '16-bit tables*,gemm takes the automatic way*'
