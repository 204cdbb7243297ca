"""python -m evals.bridges: write a suite as lmms-eval or VLMEvalKit reads it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.bridges.exam import Source
from evals.bridges.export import task_name, write_lmms, write_vlmeval
from mmagent.browser import BrowserError
from mmagent.sandbox import SandboxUnavailable

DESCRIPTION = """Write the questions of a suite of ours for another harness, which then asks our judge.

  python -m evals.bridges lmms-eval worlds FOLDER --tasks motion value --limit 100
  lmms-eval --include_path FOLDER --tasks mmagent_worlds --model mmagent --model_args checkpoint=DIR

  python -m evals.bridges vlmeval worlds FOLDER --tasks motion value --limit 100
  LMUData=FOLDER python -m evals.bridges.vlmeval --data mmagent_worlds --checkpoint DIR --work-dir OUT

Suites of one turn only, and no videos. The harness must run where this library is installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        "python -m evals.bridges", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("harness", choices=("lmms-eval", "vlmeval"), help="who shall read them")
    parser.add_argument("suite", metavar="SUITE", help="see: python -m evals list")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they are written")
    parser.add_argument("--data", default="", metavar="WHERE", help="published data of the suite")
    parser.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="only these tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N items, spread over the tasks")
    args = parser.parse_args(argv)
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit {args.limit}: at least 1")
        source = Source(args.suite, args.data, tuple(args.tasks), args.limit)
        path = {"lmms-eval": write_lmms, "vlmeval": write_vlmeval}[args.harness](source, args.folder)
    except (ValueError, BrowserError, SandboxUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{task_name(source)}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
