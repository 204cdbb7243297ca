#!/usr/bin/env bash
# What `python tools/bench.py browser` measures ours against: `bash tools/bench_peers.sh`.
#
# Playwright (50 MB, no browser of its own) into the project's environment, and a chromedriver from Debian's packages
# where this may install them. The test suite needs neither.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$MMAGENT_ROOT"

[ "$#" = 0 ] || die "usage: bash tools/bench_peers.sh"
mmagent_environment runtime
mmagent_browser
say "installing $(grep -E '^playwright==' tools/requirements-bench.txt)"
mmagent_pip --no-deps -r tools/requirements-bench.txt || die "could not install the pinned packages (see above)"
driver() { python -c 'from tools.benchmarks.browser import find_driver; print(find_driver())'; }
if ! driver >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "no chromedriver found; installing Debian's chromium-driver"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-driver; } \
        >"$MMAGENT_VENV/apt.log" 2>&1 </dev/null || say "apt-get failed; its words are in $MMAGENT_VENV/apt.log"
fi
found="$(driver 2>&1)" || die "${found##*PeerMissing: }"
say "ready: python tools/bench.py browser ($found)"
