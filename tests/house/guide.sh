#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# guide.sh ROOT [--fix]: every block of code in docs/guide.md is a region of a program that is tested. A region lies
# between "// [guide: NAME]" and "// [guide: end]" ("#" in CMake and Python files), a block directly below
#
#   <!-- region: FILE NAME -->
#
# and is the region's lines without their common indentation. --fix rewrites the blocks.
set -euo pipefail

root=${1:?usage: guide.sh ROOT [--fix]}
fix=${2:-}
[[ -z $fix || $fix == --fix ]] || { echo "usage: guide.sh ROOT [--fix]"; exit 2; }
cd "$root"
readonly guide=docs/guide.md

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
faults=0
fault() {
  echo "$*"
  faults=$((faults + 1))
}

# region FILE NAME: its lines without their common indentation. Fails where it is not there once and closed.
region() {
  [[ -f $1 ]] || { echo "there is no $1"; return 1; }
  awk -v name="$2" '
    /^[ \t]*(\/\/|#) \[guide: [a-z0-9_]+\]$/ {
      mark = $0
      sub(/^[^\[]*\[guide: /, "", mark)
      sub(/\]$/, "", mark)
      if (mark == "end") { inside = 0; next }
      if (inside) { broken = 1 }
      inside = mark == name
      found += inside
      next
    }
    inside {
      line[++lines] = $0
      if ($0 ~ /[^ ]/) {
        match($0, /^ */)
        if (least == "" || RLENGTH < least) least = RLENGTH
      }
    }
    END {
      if (found != 1 || inside || broken || lines == 0) {
        print found + 0 " regions " name (inside || broken ? ", one without an end" : lines == 0 && found ? ", empty" : "")
        exit 1
      }
      for (i = 1; i <= lines; i++) print substr(line[i], least + 1)
    }' "$1"
}

# One walk over the guide writes it as it should be, and tells where it is not so.
number=0 state=text line='' before='' wanted=$work/guide.md
: >"$wanted"
while before=$line && IFS= read -r line || [[ -n $line ]]; do
  number=$((number + 1))
  case $state in
    block)  # swallowed; what it should be stands in `wanted` already
      if [[ $line == '```' ]]; then
        state=text
        if ! cmp -s "$work/block" "$work/region"; then
          [[ -n $fix ]] || { fault "$guide:$start: differs from $file $name"; diff "$work/block" "$work/region" | head -10; }
        fi
      else
        printf '%s\n' "$line" >>"$work/block"
      fi
      continue ;;
    other)  # a block with no region, told already
      [[ $line != '```' ]] || state=text ;;
    region)
      state=text
      if [[ $line == '```'?* ]]; then
        state=block start=$number
        : >"$work/block"
        { printf '%s\n' "$line"; cat "$work/region"; printf '```\n'; } >>"$wanted"
        continue
      fi
      fault "$guide:$number: no block stands below the region $name" ;;
    text)
      if [[ $line =~ ^'<!-- region: '([^ ]+)' '([a-z0-9_]+)' -->'$ ]]; then
        file=${BASH_REMATCH[1]} name=${BASH_REMATCH[2]}
        if region "$file" "$name" >"$work/region"; then
          printf '%s %s\n' "$file" "$name" >>"$work/used"
          state=region
        else
          fault "$guide:$number: $file: $(<"$work/region")"
          state=missing
        fi
      elif [[ $line == *'region:'* && $line == *'<!--'* ]]; then
        fault "$guide:$number: is no <!-- region: FILE NAME -->"
      elif [[ $line == '```'* ]]; then
        fault "$guide:$number: a block that is no region"
        state=other
      elif [[ $line == '    '* && -z $before ]]; then
        fault "$guide:$number: a block that is no region, by indentation"
      fi ;;
    missing)  # what stands below is left as it is
      state=text
      [[ $line != '```'* ]] || state=other ;;
  esac
  printf '%s\n' "$line" >>"$wanted"
done <"$guide"
[[ $state == text ]] || fault "$guide: ends within a block"

# And no mark is left that the guide does not use.
while IFS=: read -r file _ line; do
  name=${line##*'[guide: '} name=${name%]}
  [[ $name == end ]] || grep -qxF "$file $name" "$work/used" 2>/dev/null || fault "$file: the region $name is not in $guide"
done < <(grep -rnE '^[ ]*(//|#) \[guide: [a-z0-9_]+\]$' examples tests --include='*.cpp' --include='*.cu' --include='*.hpp' \
  --include='*.cuh' --include='*.py' --include=CMakeLists.txt | LC_ALL=C sort)

if [[ -n $fix ]] && ! cmp -s "$wanted" "$guide"; then
  cat "$wanted" >"$guide"
  echo "guide: rewritten"
fi
((faults == 0)) || exit 1
echo "guide: $(wc -l <"$work/used") blocks are what the programs say"
