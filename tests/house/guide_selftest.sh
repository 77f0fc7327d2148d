#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Plants one fault after the other in a small tree and wants guide.sh to find each, and --fix to mend what it can.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree log=$work/log
mkdir -p "$tree/docs" "$tree/examples" "$tree/tests"

readonly mark='[guide''. '
program() { printf '%b' "$1" | sed "s/<\([a-z_]*\)>/${mark/./:}\1]/" >"$tree/examples/a.cpp"; }
guide() { printf '%b' "$1" >"$tree/docs/guide.md"; }
readonly good_program='int main() {\n  // <one>\n  int a = 1;\n\n  if (a) {\n    a = 2;\n  }\n  // <end>\n}\n'
readonly good_guide='# G\n\n<!-- region: examples/a.cpp one -->\n```cpp\nint a = 1;\n\nif (a) {\n  a = 2;\n}\n```\ntext\n'

fails=0
passes() {
  if ! bash "$here/guide.sh" "$tree" "${@:2}" >"$log" 2>&1; then
    echo "refused: $1"
    cat "$log"
    fails=1
  fi
}
refuses() {
  if bash "$here/guide.sh" "$tree" >"$log" 2>&1; then
    echo "not found: $1"
    fails=1
  elif ! grep -qE "$2" "$log"; then
    echo "found, but told otherwise than by '$2': $1"
    cat "$log"
    fails=1
  fi
}

program "$good_program"
guide "$good_guide"
passes "a guide as it should be"

guide "${good_guide/a = 2/a = 3}"
refuses "another line" '^docs/guide.md:4: differs from examples/a.cpp one'
passes "what --fix rewrites" --fix
passes "what --fix has rewritten"
printf '%b' "$good_guide" | cmp -s - "$tree/docs/guide.md" || { echo "--fix made another guide"; fails=1; }

guide "${good_guide/  a = 2/    a = 2}"
refuses "other indentation" 'differs'
guide "${good_guide/'int a = 1;\n'/}"
refuses "a line left out" 'differs'
guide "${good_guide/one/two}"
refuses "a region that is not there" '0 regions two'
guide "${good_guide/examples\/a/examples\/b}"
refuses "a file that is not there" 'no examples/b.cpp'
guide "$good_guide"'\n```\nls\n```\n'
refuses "a block that is no region" '^docs/guide.md:13: a block that is no region'
guide "$good_guide"'\n    ls\n'
refuses "an indented block" '^docs/guide.md:13: a block that is no region, by'
guide "$good_guide"'\n<!-- region: examples/a.cpp one -->\n\ntext\n'
refuses "a region without a block" 'no block'
guide "$good_guide"'\n<!-- region examples/a.cpp one -->\n<!-- region: examples/a.cpp -->\n'
refuses "a region that cannot be read" 'is no <!-- region'
guide "${good_guide%'```\ntext\n'}"
refuses "a block without an end" 'ends within'

guide "$good_guide"
program "${good_program/'  // <end>\n'/}"
refuses "a region without an end" 'without an end'
program "${good_program/'  // <end>\n'/'  // <two>\n  // <end>\n'}"
refuses "a region within another" 'without an end'
program "$good_program$good_program"
refuses "a region that is there twice" '2 regions one'
program "$good_program"'// <other>\nint b;\n// <end>\n'
refuses "a region that the guide does not use" 'the region other is not in'

((fails == 0)) || exit 1
echo "guide.sh finds what it must"
