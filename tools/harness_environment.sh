#!/usr/bin/env bash
# lmms-eval and VLMEvalKit beside the project's packages: `bash tools/harness_environment.sh [FOLDER]` (default: .harnesses).
#
# For the slow tests of evals/bridges and for trying those: a minute and 700 MB the first time, nothing the next. FOLDER
# sees all that is installed in the project's .venv and changes nothing there.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PROJECT_VENV="$(realpath -m "${MMAGENT_VENV:-$ROOT/.venv}")"
MMAGENT_VENV="$(realpath -m "${1:-$ROOT/.harnesses}")"
source "$ROOT/tools/env.sh"

[ "$#" -le 1 ] || die "usage: bash tools/harness_environment.sh [FOLDER]"
[ "$MMAGENT_VENV" != "$PROJECT_VENV" ] || die "$MMAGENT_VENV is the project's environment; name another"
[ -x "$PROJECT_VENV/bin/python" ] || die "no $PROJECT_VENV/bin/python; run tools/quickstart.sh, or name the project's environment by MMAGENT_VENV"

PINS="$ROOT/tools/requirements-harnesses.txt"
STAMP="$MMAGENT_VENV/.mmagent-harnesses"
OURS="$MMAGENT_VENV/.mmagent-harnesses-folder"  # written first: what an interrupted build left may be made anew
if [ -e "$MMAGENT_VENV" ] && [ ! -e "$OURS" ]; then
    [ -d "$MMAGENT_VENV" ] && [ -z "$(ls -A "$MMAGENT_VENV")" ] \
        || die "$MMAGENT_VENV is there already and was not made by this script; name a new folder"
fi
WANTED="$(cat "$PINS" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-64) $PROJECT_VENV"
if [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; then
    say "lmms-eval and VLMEvalKit are ready in $MMAGENT_VENV"
    exit 0
fi

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }

started=$SECONDS
say "making $MMAGENT_VENV beside $PROJECT_VENV"
mkdir -p "$MMAGENT_VENV" && : >"$OURS" || die "could not write to $MMAGENT_VENV"
find "$MMAGENT_VENV" -mindepth 1 -maxdepth 1 ! -path "$OURS" -exec rm -rf {} + || die "could not empty $MMAGENT_VENV"
"$PROJECT_VENV/bin/python" -m venv "$MMAGENT_VENV" || die "could not make $MMAGENT_VENV (disk full? read-only?)"
say "installing $(grep -E '^lmms-eval==' "$PINS") and $(grep -E '^ms-vlmeval==' "$PINS")"
mmagent_pip --no-deps -r "$PINS" || die "could not install the pinned packages (see above)"
# Only now, so that pip never sees, and never touches, what the project's environment holds.
site "$PROJECT_VENV" >"$(site "$MMAGENT_VENV")/_project.pth"
# lmms-eval finds our model by this entry point, which an environment made before it does not have
entry="$(site "$MMAGENT_VENV")/mmagent_bridges-0.dist-info"
mkdir -p "$entry"
printf 'Metadata-Version: 2.1\nName: mmagent-bridges\nVersion: 0\n' >"$entry/METADATA"
printf '[lmms_eval.models]\nmmagent = evals.bridges.lmms_entry:manifest\n' >"$entry/entry_points.txt"
echo "$ROOT" >"$(site "$MMAGENT_VENV")/_mmagent.pth"
mmagent_mend_torchvision
said="$(HF_HUB_OFFLINE=1 "$MMAGENT_VENV/bin/python" -c 'import lmms_eval.evaluator, vlmeval.dataset, evals.bridges.vlmeval' 2>&1)" \
    || die "they cannot be imported: $(printf '%s' "$said" | tail -n 5)"
printf '%s\n' "$WANTED" >"$STAMP"
say "lmms-eval and VLMEvalKit are ready in $MMAGENT_VENV after $((SECONDS - started)) s"
