#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Plants one fault after the other in a small tree and wants files.sh to find each, and nothing without.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree log=$work/log
mkdir "$tree"

readonly spdx='// SPDX-License-Identifier: Apache-2.0'
fresh() {
  rm -rf "${tree:?}"/*
  mkdir -p "$tree/include/codegemm" "$tree/examples" "$tree/tests"
  printf '%s\n//\n// codegemm/a.hpp - a.\n// Layer: data.\n#pragma once\n' "$spdx" >"$tree/include/codegemm/a.hpp"
  printf '%s\nint main() {}\n' "$spdx" >"$tree/examples/01_a.cpp"
  printf '%s\nint main() {}\n' "$spdx" >"$tree/tests/a_test.cpp"
}
fails=0
# refuses FILE TEXT: the text, appended to the file.
refuses() {
  fresh
  printf '%b' "$2" >>"$tree/$1"
  if bash "$here/files.sh" "$tree" >"$log"; then
    echo "not found in $1: $2"
    fails=1
  elif ! grep -q "^$1" "$log"; then
    echo "found, but the file is not told: $1: $2"
    cat "$log"
    fails=1
  fi
}

fresh
if ! bash "$here/files.sh" "$tree" >"$log"; then
  echo "a clean tree is refused:"
  cat "$log"
  fails=1
fi
header=include/codegemm/a.hpp
refuses tests/no_license_test.cpp 'int main() {}\n'
refuses scripts.sh '#!/usr/bin/env bash\n'
refuses examples/04_codegemm_gpu.cu "$spdx\n$(printf '//\\n%.0s' {1..59})"
refuses $header '// TO''DO: later\n'
refuses $header '// see /ho''me/somebody/notes\n'
refuses $header '// see ../sha''red/notes\n'
refuses README.md 'from py''pi.org\n'
refuses $header 'int a; \n'
refuses $header '\tint a;\n'
refuses $header 'int a;\r\n'
refuses $header "// $(printf 'x%.0s' {1..110})\n"
refuses $header 'int a;'
refuses $header 'using namespace std;\n'
refuses $header 'inline void f() { throw 1; }\n'
refuses $header 'inline void f() { std::printf("x"); }\n'
refuses tests/a_test.cpp 'std::random_''device seed;\n'
refuses include/codegemm/b.hpp "$spdx\n//\n// Layer: data.\n"
refuses include/codegemm/b.hpp "$spdx\n#pragma once\n"

((fails == 0)) && echo "files.sh finds what it must"
