#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# parts.sh ROOT [COMPILER]: whoever wants one part alone gets that part alone. The entry header of each compiles where
# nothing lies but the folders named here (no Eigen either), and how long that takes is printed; a machine under load
# makes no test fail.
set -euo pipefail

root=${1:?usage: parts.sh ROOT [COMPILER]}
compiler=${2:-c++}
cd "$root/include"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

faults=0
# part NAME ENTRY ALLOWED...: folders (with all that lies directly in them) and files.
part() {
  local name=$1 entry=$2 path alone=$work/$1 begin end log headers
  shift 2
  for path in "$@"; do
    mkdir -p "$alone/$(dirname "$path")"
    if [[ -d $path ]]; then
      mkdir -p "$alone/$path"
      find "$path" -maxdepth 1 -type f -exec cp {} "$alone/$path/" \;
    else
      cp "$path" "$alone/$path"
    fi
  done
  printf '#include <%s>\n' "$entry" >"$work/$name.cpp"
  begin=${EPOCHREALTIME/./}
  if ! log=$("$compiler" -std=c++20 -O0 -fsyntax-only -I"$alone" "$work/$name.cpp" 2>&1); then
    # Which header asks for what is not of the part.
    grep -E 'error: |included from|from ' <<<"$log" | head -8 | sed "s|$alone/||"
    echo "$name: <$entry> does not compile with $* alone"
    faults=$((faults + 1))
    return 0
  fi
  end=${EPOCHREALTIME/./}
  headers=$("$compiler" -std=c++20 -MM -I"$alone" "$work/$name.cpp" | grep -oE "[^ ]+\.(hpp|inl)" | grep -c "^$alone/")
  printf '%-10s <%s>: %d headers, %d ms\n' "$name" "$entry" "$headers" $(((end - begin) / 1000))
}

part codegemm codegemm/gemm.hpp codegemm codegemm/base codegemm/cpu
part allocator prefillshare/kv/allocator.hpp codegemm/base prefillshare/kv
# The router reads prefixes' hashes and events, and nothing that holds KV.
part router prefillshare/serve/router.hpp codegemm/base prefillshare/vocabulary.hpp prefillshare/serve \
  prefillshare/kv/cache_key.hpp prefillshare/kv/events.hpp prefillshare/kv/try_allocate.hpp
part simulator prefillshare/sim/cluster.hpp codegemm/base prefillshare/vocabulary.hpp prefillshare/kv \
  prefillshare/serve prefillshare/sim

# It would be found: the allocator does not compile without its own folder's base.
if (part broken prefillshare/kv/allocator.hpp prefillshare/kv && ((faults == 0))) >/dev/null; then
  echo "parts.sh does not notice a header that is missing"
  faults=$((faults + 1))
fi

((faults == 0)) || exit 1
echo "parts: each compiles alone"
