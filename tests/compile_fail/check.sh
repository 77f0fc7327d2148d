#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# check.sh FILE COMPILER [FLAGS...]: one program that must not compile. The flags say how to compile without output.
#
# FILE holds a correct program and, where CODEGEMM_FAULT is defined, a wrong one. The correct one must compile, so
# that the fault alone is what the compiler refuses; the wrong one must be refused with a text that matches
# each line "// expect: REGEX" of FILE (extended regular expressions).
set -euo pipefail

file=$1
shift
readonly file

mapfile -t expected < <(sed -n 's|^// expect: ||p' "$file")
if ((${#expected[@]} == 0)); then
  echo "$file: has no line '// expect: REGEX'"
  exit 1
fi

if ! text=$("$@" "$file" 2>&1); then
  printf '%s: does not compile even without the fault:\n%s\n' "$file" "$text"
  exit 1
fi
if text=$("$@" -DCODEGEMM_FAULT "$file" 2>&1); then
  echo "$file: compiles with the fault, and must not"
  exit 1
fi
for pattern in "${expected[@]}"; do
  if ! grep -qE -- "$pattern" <<<"$text"; then
    printf '%s: refused, but not with a text that matches "%s":\n%s\n' "$file" "$pattern" "$text"
    exit 1
  fi
done
