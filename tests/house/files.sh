#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# files.sh ROOT: what every file of this repository has, and what none has.
set -euo pipefail
export LC_ALL=C.UTF-8

root=${1:?usage: files.sh ROOT}
cd "$root"

# In a checkout the files git knows or would add; in an unpacked archive all of them but build folders.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1 && [[ $(git rev-parse --show-prefix) == "" ]]; then
  mapfile -t files < <(git ls-files --cached --others --exclude-standard | LC_ALL=C sort -u)
else
  mapfile -t files < <(find . -type f -not -path './build*' -not -path './.git/*' | sed 's|^\./||' | LC_ALL=C sort)
fi

faults=0
fault() {
  echo "$*"
  faults=$((faults + 1))
}
# found WHAT REGEX FILE...: a fault for each line that matches.
found() {
  local line
  (($# > 2)) || return 0
  while IFS= read -r line; do
    fault "$line    <- $1"
  # Lines that scripts read ("// test: ...") are as long as they are.
  done < <(grep -nHIE -- "$2" "${@:3}" | grep -vE '^[^:]*:[0-9]*:// (test|expect): ' | cut -c1-160 || true)
}

text=() code=() sources=() headers=() library=() tests=()
for file in "${files[@]}"; do
  [[ -f $file ]] || continue  # deleted, not yet committed
  case $file in
    examples/data/* | bench/results/* | LICENSE | *.json | fuzz/corpus/* | *.gguf | *.safetensors) ;;
    *) text+=("$file") ;;
  esac
  case $file in
    examples/data/* | tests/data/*) ;;  # text to be read by a tokenizer may hold any word
    *.hpp | *.cuh | *.cpp | *.cu | *.h | *.c | *.py | *.cmake | *CMakeLists.txt | *.md | scripts/* | *.sh) code+=("$file") ;;
  esac
  case $file in
    *.hpp | *.cuh | *.cpp | *.cu | *.h | *.c) sources+=("$file") ;;
  esac
  case $file in
    include/*.hpp | include/*.cuh | examples/common/*.hpp | capi/*.hpp) headers+=("$file") ;;
  esac
  case $file in
    include/codegemm/base/macros.hpp) ;;
    include/*.hpp | include/*.cuh) library+=("$file") ;;
  esac
  case $file in
    tests/*.cpp | tests/*.cu | tests/*.c | tests/*.py) tests+=("$file") ;;
  esac
done

# Every source, script and build file says its license, near the top.
for file in "${text[@]}"; do
  case $file in
    *.md | .gitignore | .editorconfig | .clang-format | .clang-tidy | *.txt)
      [[ $file == *CMakeLists.txt ]] || continue ;;
    tests/*/data/* | *.jsonl | *.svg) continue ;;
  esac
  head -n 4 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' || fault "$file: has no SPDX line in its first four lines"
done

# The drop-in call on a GPU is a program that is read in one go.
for file in examples/*_codegemm_gpu.cu; do
  [[ ! -e $file ]] || (($(wc -l <"$file") < 60)) || fault "$file: has $(wc -l <"$file") lines, 60 are too many"
done

# The patterns are written so that this file does not match itself.
found "unfinished work" '\b(TO''DO|FIX''ME|XX''X|HA''CK)\b' "${code[@]}"
found "the path of somebody's machine" '(^|[^A-Za-z0-9_.}$/-])/(wo''rk|ro''ot|ho''me|Us''ers|mn''t)/' "${text[@]}"
found "a path that exists on one machine only" '\.\./sha''red/|\.lib''rary/|/tmp/d''l/' "${text[@]}"
found "a package registry's host" 'py''pi\.org|python''hosted|deb\.deb''ian\.org|snapshot\.deb''ian' "${text[@]}"
found "white space at the end of the line" '[ 	]+$' "${text[@]}"
found "CRLF" $'\r$' "${text[@]}"
found "a tab" $'\t' "${sources[@]}"
found "longer than 110 columns" '^.{111,}$' "${sources[@]}"
found "using namespace in a header" '^[ ]*using namespace ' "${headers[@]}"
found "an exception thrown by a library header" '^([^/"]|/[^/])*\bthrow\b' "${library[@]}"
found "printing in a library header" 'std::(cout|cerr|printf|puts)\b' "${library[@]}"
found "a seed that is not written down" 'random_''device|srand\(|np\.random\.rand' "${tests[@]}"
for file in "${headers[@]}"; do
  grep -q '^#pragma once$' "$file" || fault "$file: has no #pragma once"
  grep -qE '^// Layer: ' "$file" || [[ $file == examples/* ]] || fault "$file: its head names no layer"
done
for file in "${text[@]}"; do
  [[ ! -s $file || $(tail -c1 "$file" | od -An -c | tr -d ' ') == '\n' ]] || fault "$file: does not end with a newline"
done

if ((faults > 0)); then
  echo "files: $faults faults"
  exit 1
fi
echo "files: ${#files[@]} are as they should be"
