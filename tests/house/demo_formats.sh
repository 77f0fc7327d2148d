#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# demo_formats.sh ROOT: the demo's agents have formats that the explorer's kept results found worth having: on the
# front of size and perplexity.
set -euo pipefail

root=${1:?usage: demo_formats.sh ROOT}
kept=$root/bench/results/explore-distilled-h200.json
[[ -f $kept ]] || { echo "the explorer's kept results are missing: $kept"; exit 1; }
front=$(sed -n '/"size_front": \[/,/\]/p' "$kept" | grep -o '"m[^ "]*' | tr -d '"')
formats=$(sed -n 's/.*"format": "\([^"]*\)".*/\1/p' "$root/examples/data/agents.json")
[[ -n $front && -n $formats ]] || { echo "no front in $kept, or no formats in agents.json"; exit 1; }
faults=0
for format in $formats; do
  grep -qx "$format" <<<"$front" && continue
  echo "agents.json: $format is not on the front of $kept:" $front
  faults=1
done
((faults == 0)) || exit 1
echo "demo: all formats are on the explorer's front"
