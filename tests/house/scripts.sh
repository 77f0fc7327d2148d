#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# scripts.sh ROOT: every script parses, explains itself, and refuses what it does not know with exit code 2
# before it installs, builds or downloads anything.
set -euo pipefail

root=${1:?usage: scripts.sh ROOT}
cd "$root"

faults=0
fault() {
  echo "$*"
  faults=$((faults + 1))
}

while IFS= read -r file; do
  bash -n "$file" || fault "$file: does not parse"
  # Directly, or by way of lib.sh.
  grep -qE '^set -euo pipefail$|^source .*/lib\.sh"$' "$file" || fault "$file: has no 'set -euo pipefail'"
done < <(find scripts tests .ci -type f \( -path 'scripts/*' ! -name '*.txt' -o -path '.ci/run' -o -name '*.sh' \) | LC_ALL=C sort)

for script in demo test bench fetch-model fetch-texts lint fuzz docs; do
  [[ -x scripts/$script ]] || fault "scripts/$script: is not executable"
  if ! text=$("scripts/$script" --help 2>&1); then
    fault "scripts/$script --help: ended with $?"
  elif ! grep -q "^usage: scripts/$script" <<<"$text"; then
    fault "scripts/$script --help: does not begin with its usage"
  fi
  # demo hands what it does not know on to the program.
  [[ $script != demo ]] || continue
  code=0
  text=$("scripts/$script" --no-such-option 2>&1) || code=$?
  ((code == 2)) || fault "scripts/$script --no-such-option: exit code $code, not 2"
  grep -q -- '--no-such-option' <<<"$text" || fault "scripts/$script --no-such-option: the message does not name it"
done
[[ -x .ci/run ]] || fault ".ci/run: is not executable"

# A model that is not there: found before the build, named, exit code 2.
code=0
text=$(scripts/demo --model no/such/model.gguf 2>&1) || code=$?
((code == 2)) && grep -q 'no/such/model.gguf' <<<"$text" || fault "scripts/demo --model no/such/model.gguf: exit code $code: $text"

# An unknown suite: the message lists the known ones.
code=0
text=$(scripts/bench no-such-suite 2>&1) || code=$?
((code == 2)) && grep -q 'no-such-suite' <<<"$text" || fault "scripts/bench no-such-suite: exit code $code: $text"

((faults == 0)) || exit 1
echo "scripts: all parse, explain themselves and refuse nonsense"
