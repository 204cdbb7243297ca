# The project's virtual environment: sourced by quickstart.sh and test.sh, never run by itself.
#
#   mmagent_environment runtime|test    makes or brings up to date .venv and activates it
#   mmagent_browser                     finds a Chromium, or installs Debian's when it may
#   mmagent_mend_torchvision            makes torchvision's wheel importable beside a CPU torch
#
# A stamp with the hash of the pins makes the second call take no time. MMAGENT_VENV moves the folder,
# PYTHON picks the interpreter. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured as they are.

MMAGENT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
MMAGENT_VENV="${MMAGENT_VENV:-$MMAGENT_ROOT/.venv}"

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() { printf '\033[1merror:\033[0m %s\n' "$*" >&2; exit 1; }

mmagent_python() {  # prints an interpreter of a version that torch has wheels for
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 found${PYTHON:+ (PYTHON=$PYTHON)}." \
        "On Debian: apt-get install python3 python3-venv; elsewhere set PYTHON=/path/to/python3.11"
}

mmagent_has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

mmagent_pip() {  # pip install, its words in a log, one moving line on a terminal; on failure the log's end
    local log="$MMAGENT_VENV/pip.log" pid
    "$MMAGENT_VENV/bin/python" -m pip --disable-pip-version-check install --no-input --progress-bar off "$@" \
        >"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
    if [ -t 1 ]; then
        local started=$SECONDS
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r\033[K    %3d s  %.90s' $((SECONDS - started)) \
                "$(grep -E '^ *(Collecting|Downloading|Building|Installing|Preparing)' "$log" | tail -n 1)"
            sleep 0.5
        done
        printf '\r\033[K'
    fi
    if ! wait "$pid"; then
        trap - INT TERM
        [ "${MMAGENT_PIP_TRIAL:-no}" = yes ] || grep -v '^WARNING: Location' "$log" | tail -n 15 >&2
        return 1
    fi
    trap - INT TERM
}

mmagent_pins() {  # what an environment of a kind was made from
    local files=("$MMAGENT_ROOT/tools/requirements.txt" "$MMAGENT_ROOT/setup.py")
    [ "$1" = test ] && files+=("$MMAGENT_ROOT/tools/requirements-test.txt")
    printf '%s %s %s\n' "$(cat "${files[@]}" | sha256sum | cut -c1-64)" "$MMAGENT_ROOT" \
        "$("$MMAGENT_VENV/bin/python" -c 'import sys; print(sys.version)' | tr '\n' ' ')"
}

mmagent_environment() {
    local kind="$1" python pins stamp
    if [ ! -x "$MMAGENT_VENV/bin/python" ] || ! "$MMAGENT_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(mmagent_python)" || exit 1
        "$python" -c 'import venv, ensurepip' 2>/dev/null \
            || die "$python has no venv module. On Debian: apt-get install python3-venv"
        say "making $MMAGENT_VENV with $("$python" --version)"
        rm -rf "$MMAGENT_VENV"  # left half-made by an interrupted run
        "$python" -m venv "$MMAGENT_VENV" || die "could not make $MMAGENT_VENV (disk full? read-only?)"
    fi
    pins="$(mmagent_pins "$kind")"
    stamp="$MMAGENT_VENV/.mmagent-$kind"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$pins" ]; then
        local started=$SECONDS torch
        torch="$(grep -E '^torch==' "$MMAGENT_ROOT/tools/requirements.txt")"
        if ! mmagent_has_gpu; then
            # First and alone, so that nothing later drags a CUDA build along; the +cpu build where an index has one.
            say "installing $torch for CPU"
            MMAGENT_PIP_TRIAL=yes mmagent_pip "$torch+cpu" || mmagent_pip "$torch" || die "could not install $torch (see above)"
        fi
        say "installing the pinned packages (some minutes the first time, nothing the next)"
        local wanted=(-r "$MMAGENT_ROOT/tools/requirements.txt")
        [ "$kind" = test ] && wanted+=(-r "$MMAGENT_ROOT/tools/requirements-test.txt")
        mmagent_pip "${wanted[@]}" || die "could not install the pinned packages (see above)"
        mmagent_pip --no-deps --no-build-isolation -e "$MMAGENT_ROOT" || die "could not install mmagent itself"
        printf '%s\n' "$pins" >"$stamp"
        [ "$kind" = runtime ] || mmagent_pins runtime >"$MMAGENT_VENV/.mmagent-runtime"  # tests need more, not less
        say "environment ready after $((SECONDS - started)) s"
    fi
    # shellcheck disable=SC1091
    source "$MMAGENT_VENV/bin/activate"
}

mmagent_browser() {
    local found
    found="$(python -c 'from mmagent.browser import find_chromium; print(find_chromium() or "")')" \
        || die "could not look for a browser (see above)"
    if [ -z "$found" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "no Chromium found; installing Debian's chromium-headless-shell and fonts"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            chromium-headless-shell fonts-liberation fonts-dejavu-core fonts-wqy-zenhei; } >"$MMAGENT_VENV/apt.log" 2>&1 </dev/null \
            || say "apt-get failed; its words are in $MMAGENT_VENV/apt.log"
        found="$(python -c 'from mmagent.browser import find_chromium; print(find_chromium() or "")')"
    fi
    if [ -n "$found" ]; then
        say "browser: $found"
    else
        say "no Chromium: everything that needs a browser is left out."
        say "To get it: 'apt-get install chromium-headless-shell fonts-liberation' as root on Debian or Ubuntu's"
        say "'chromium', or any Chromium or Chrome named by the variable MMAGENT_CHROMIUM; then run this again."
    fi
}

mmagent_mend_torchvision() {  # its wheels are built for CUDA; on a CPU torch they miss two operators that nobody here calls
    local said folder
    folder="$("$MMAGENT_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    said="$("$MMAGENT_VENV/bin/python" -c 'import torchvision' 2>&1)" && return
    case "$said" in *"torchvision::nms"*) ;; *) die "torchvision cannot be imported: $said" ;; esac
    cat >"$folder/_torchvision_operators.py" <<'PYTHON'
"""Defines, right before torchvision is imported, the two operators that its CUDA-built wheel misses on a CPU torch."""

import importlib.abc
import sys


class _Before(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys._torchvision_operators = self  # the definitions live as long as it does
        return None


sys.meta_path.insert(0, _Before())
PYTHON
    echo "import _torchvision_operators" >"$folder/_torchvision_operators.pth"
    "$MMAGENT_VENV/bin/python" -c 'import torchvision' || die "torchvision still cannot be imported (see above)"
}
