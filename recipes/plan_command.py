"""A plan as a command of the shell: its errors are lines, its interruption is no error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.lineage import LineageError, Stage, run_lineage
from recipes.processes import Busy


def run_or_exit(stages: Sequence[Stage], root: Path) -> dict[str, float]:
    """:func:`~recipes.lineage.run_lineage`, its titles in bold where somebody reads them. Exits with 1 where a stage
    failed or another run is at work in ``root``, and with 130 on an interrupt."""
    start, end = ("\n\033[1m", "\033[0m") if sys.stdout.isatty() else ("\n", "")
    try:
        return run_lineage(stages, root, say=lambda text: print(f"{start}{text}{end}", flush=True))
    except (LineageError, Busy) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as stopped:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from stopped
