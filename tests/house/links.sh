#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# links.sh ROOT: every relative link of a Markdown file leads to a file that is there, and to a heading of it where it
# names one; one that does not would be found.
set -euo pipefail
export LC_ALL=C.UTF-8

root=${1:?usage: links.sh ROOT}

# anchors FILE: its headings as links write them, in GitHub's way.
anchors() {
  sed -nE '/^```/,/^```/d; s/^#+ +//p' "$1" | tr '[:upper:]' '[:lower:]' | sed -E "s/[^a-z0-9 _-]//g; s/ /-/g"
}

# check TREE: prints each link that leads nowhere.
check() {
  local file line target path
  while IFS= read -r file; do
    while IFS=: read -r line target; do
      target=${target#](}
      target=${target%)}
      path=${target%%#*}
      path=$(dirname "$file")/${path:-$(basename "$file")}
      if [[ ! -e $1/$path ]]; then
        echo "$file:$line: no file for $target"
      elif [[ $target == *"#"* ]] && ! anchors "$1/$path" | grep -qxF -- "${target#*#}"; then
        echo "$file:$line: no heading for $target"
      fi
    done < <(grep -noE '\]\([^()[:space:]]+\)' "$1/$file" | grep -vE ':\]\([a-z]+:' || true)
  done < <(cd "$1" && find . -name '*.md' -not -path './build*' -not -path './.*/*' | sed 's|^\./||' | LC_ALL=C sort)
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/docs"
printf '# A: `b`, and C'"'"'s\n[x](#a-b-and-cs) [y](docs/b.md#two) [z](docs)\n' >"$work/a.md"
printf '## Two\n[x](../a.md) [y](https://example.org/none)\n' >"$work/docs/b.md"
faults=$(check "$work")
[[ -z $faults ]] || { echo "refused, though right: $faults"; exit 1; }
printf '[x](b.md)\n[y](docs/b.md#three)\n' >>"$work/a.md"
faults=$(check "$work" | tr '\n' ' ')
[[ $faults == "a.md:3: no file for b.md a.md:4: no heading for docs/b.md#three " ]] ||
  { echo "planted faults, but found: $faults"; exit 1; }

faults=$(check "$root")
[[ -z $faults ]] || { echo "$faults"; exit 1; }
echo "links: every link of a Markdown file leads somewhere"
