#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# docs.sh ROOT: every public name has a comment (scripts/docs, whose warnings are errors), and one without would be
# found.
set -euo pipefail

root=${1:?usage: docs.sh ROOT}
cd "$root"
version=$(doxygen --version 2>/dev/null || true)
if [[ $version != 1.9.4* ]]; then  # others warn of other things
  echo "SKIPPED: needs doxygen 1.9.4 (Debian package doxygen), has ${version:-none}"
  exit 4
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/docs --output "$work/docs"

# The same settings over one header with one fault each.
settings=$(grep -v '^INPUT' docs/Doxyfile)
doxygen_on() {
  printf '#pragma once\n/// Words.\nnamespace codegemm {\n%b\n}\n' "$1" >"$work/planted.hpp"
  printf '%s\nINPUT = "%s"\nOUTPUT_DIRECTORY = "%s"\n' "$settings" "$work/planted.hpp" "$work/planted" |
    doxygen - >"$work/log" 2>&1
}
faults=0
mkdir "$work/planted"
refuses() {
  if doxygen_on "$1"; then
    echo "not found: $1"
    faults=1
  fi
}
if ! doxygen_on '/// A.\nstruct A {\n  int a;  ///< a\n};\nnamespace detail {\nstruct B {\n  int b;\n};\n}'; then
  cat "$work/log"
  exit 1
fi
refuses 'struct A {\n  int a;  ///< a\n};'
refuses '/// A.\nstruct A {\n  int a;\n};'
refuses 'void f();'
refuses '/// A.\nclass A {\n public:\n  void f();\n};'
refuses 'inline constexpr int kA = 1;'
refuses 'enum class A { kB };'
((faults == 0)) || exit 1
echo "docs: every public name has its comment"
