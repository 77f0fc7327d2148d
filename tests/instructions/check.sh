#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Counts the instructions of a few multiplications and compares them with counts.txt: a slow-down shows however
# noisy the machine is. More than 5% above the kept count fails; as much below it asks for a new count.
#
# usage: check.sh ROOT FOLDER COMPILER
#
# Exit 4 (skipped) without valgrind, AVX2, or counts for this compiler. The lines to keep are printed.
set -euo pipefail
root=$1
folder=$2
compiler=$3
here=$root/tests/instructions

skip() {
  echo "SKIPPED: $*"
  exit 4
}
command -v valgrind >/dev/null || skip "needs valgrind (Debian package valgrind)"
grep -qw avx2 /proc/cpuinfo 2>/dev/null || skip "needs a processor with AVX2"
if "$compiler" --version | grep -q clang; then name=clang; else name=gcc; fi
name=$name-$("$compiler" -dumpversion | cut -d. -f1)

mkdir -p "$folder"
"$compiler" -std=c++20 -O2 -DNDEBUG -I "$root/include" -I "$root/tests" "$here/gemm_tool.cpp" -pthread \
  -o "$folder/gemm_tool"

status=0
known=0
while read -r format rows cols tokens by kept; do
  [[ $format == \#* || -z $format ]] && continue
  [[ $by == "$name" ]] || continue
  known=1
  count=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
    --toggle-collect=counted_call "$folder/gemm_tool" "$format" "$rows" "$cols" "$tokens" 2>&1 |
    sed -n 's/.*Collected : \([0-9]*\).*/\1/p')
  [[ -n $count ]] || { echo "FAILED: callgrind counted nothing for $format"; exit 1; }
  echo "$format $rows $cols $tokens $name $count   (kept: $kept, $((100 * count / kept))%)"
  if ((count * 100 > kept * 105)); then
    echo "FAILED: $format, $rows x $cols, $tokens token(s): $count instructions, more than $kept + 5%"
    status=1
  elif ((count * 100 < kept * 95)); then
    echo "less than the kept count by more than 5%: put $count into tests/instructions/counts.txt"
  fi
done <"$here/counts.txt"
((known)) || skip "counts.txt has no line for $name"
exit $status
