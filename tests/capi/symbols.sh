#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# symbols.sh LIBRARY HEADER: the shared library exports the functions that the header declares, each of them, and
# nothing else.
set -euo pipefail

library=${1:?usage: symbols.sh LIBRARY HEADER}
header=${2:?usage: symbols.sh LIBRARY HEADER}
if ! command -v nm >/dev/null; then
  echo "SKIPPED: needs nm (Debian package binutils)"
  exit 4
fi

declared=$(grep '^CODEGEMM_C_API ' "$header" | grep -oE 'codegemm_c_[a-z0-9_]+\(' | tr -d '(' | LC_ALL=C sort)
exported=$(nm -D --defined-only "$library" | awk '{ print $NF }' | LC_ALL=C sort)
(($(wc -l <<<"$declared") > 30)) || { echo "the header's declarations are not found: $declared"; exit 1; }
if ! difference=$(diff <(echo "$declared") <(echo "$exported")); then
  echo "declared (<) and exported (>) differ:"
  echo "$difference"
  exit 1
fi
echo "symbols: $(wc -l <<<"$exported"), as declared"
