#!/usr/bin/env bash
# From a fresh clone to a trained agent, on a laptop: environment, browser, then the whole lineage.
# Arguments go to `python -m recipes.quickstart` (--help). Safe to kill and start again at any moment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$MMAGENT_ROOT"
mmagent_environment runtime
mmagent_browser
exec python -m recipes.quickstart "$@"
