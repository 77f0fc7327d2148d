# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the scripts share: messages, packages, folders. Sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
# Where downloads and the peers' environment lie, outside the checkout.
cache=${PREFILLSHARE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/var/cache}/.cache}/prefillshare}
[[ $cache == /* ]] || cache=$PWD/$cache
export PREFILLSHARE_CACHE=$cache  # absolute, for the scripts that one script calls
readonly cache

say() { printf '%s\n' "$*" >&2; }
# Exit code 2: what was asked for cannot be done, and the text says what to change.
fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# print_usage: the comment at the head of the running script, from its "usage:" line to its end.
print_usage() { sed -n '/^# usage: /,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$0"; }

cores() { nproc 2>/dev/null || echo 2; }

readonly packages_build=(g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev)
readonly packages_programs=(libcli11-dev libpcre2-dev)
readonly packages_tests=(catch2 git)
readonly packages_mpi=(libopenmpi-dev openmpi-bin)
readonly packages_clang=(clang libclang-rt-dev clang-format)
readonly packages_bench=(libbenchmark-dev)
readonly packages_lint=(clang-format clang-tidy)
readonly packages_docs=(doxygen)

# need_packages WHAT PACKAGE...: installs the Debian packages that are missing, or says how to.
need_packages() {
  local what=$1 package missing=()
  shift
  if [[ ! -e /etc/debian_version ]] || ! command -v dpkg-query >/dev/null; then
    say "Not a Debian system: $what needs what Debian calls: $*"
    return 0
  fi
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true) == installed ]] || missing+=("$package")
  done
  ((${#missing[@]} > 0)) || return 0

  local install="apt-get install -y --no-install-recommends ${missing[*]}"
  if ((EUID != 0)); then
    fail "these Debian packages are missing for $what. As root:
  $install"
  fi
  say "Installing from Debian for $what: ${missing[*]}"
  local log
  log=$(mktemp)
  # A package list that is a little old often still serves; an empty one never does.
  if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive $install; } >"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" >&2
    rm -f "$log"
    fail "could not install ${missing[*]} (above: what apt-get said). By hand: $install"
  fi
  rm -f "$log"
}

# A python3 with pip. One from elsewhere (pyenv, conda) that has it serves as well as Debian's.
need_pip() {
  python3 -m pip --version >/dev/null 2>&1 || need_packages "downloading the model" python3 python3-pip ca-certificates
  python3 -m pip --version >/dev/null 2>&1 || fail "needs python3 with pip, and 'python3 -m pip --version' does not work"
}

need_commands() {
  local command
  for command in "$@"; do
    command -v "$command" >/dev/null || fail "needs the program $command, which is not on the PATH"
  done
}

# mib_free FOLDER: free space in MiB where FOLDER is, or will be.
mib_free() {
  local folder=$1
  while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
  df -Pm "$folder" | awk 'NR == 2 { print $4 }'
}
