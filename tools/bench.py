"""Measure ours beside its peers, and print a table.

    python tools/bench.py AREA [--json FILE] [--plot FILE] [--repeats N] [--quick] [--size small|large] [--peak TFLOPS]
                             [--part PART] [--agent RUN]

AREA is a module of tools/benchmarks with a function ``rows(settings)``. Both sides of a row run in one process, in
turns, so that a busy machine slows both; a row shows their medians, and the spread of the ratio from turn to turn. A
ratio above 1 means that ours is better.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from tools.benchmarks.row import Row, Settings, as_json, device_peak, table, told  # noqa: E402


def areas() -> list[str]:
    """Every module of tools/benchmarks that has rows; read, not imported, for that takes seconds."""
    folder = ROOT / "tools" / "benchmarks"
    return sorted(path.stem for path in folder.glob("*.py") if "\ndef rows(" in path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("area", choices=areas(), help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes only: shows that it runs, not how fast")
    parser.add_argument("--size", choices=("small", "large"), help="of models (default: large on CUDA, else small)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows there (areas that have a picture)")
    parser.add_argument("--part", help="of an area that has several (model)")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of the device, for shares of it (model)")
    parser.add_argument(
        "--agent", type=Path, metavar="RUN", help="a folder of trained agents (generate: of a quickstart, diffusion)"
    )
    args = parser.parse_args(argv)
    module = importlib.import_module(f"tools.benchmarks.{args.area}")
    for option, needed in (("size", "SIZES"), ("plot", "plot"), ("agent", "TAKES_AGENT")):
        if getattr(args, option) and not hasattr(module, needed):
            parser.error(f"{args.area} has no --{option}")
    print(f"{args.area}: {(module.__doc__ or '').strip().splitlines()[0]}", flush=True)
    print(f"{machine()}; {args.repeats} turns a row", flush=True)
    parts = getattr(module, "PARTS", ())
    if args.part and args.part not in parts:
        parser.error(f"{args.area} has no part {args.part!r}" + (f", but {', '.join(parts)}" if parts else ""))
    peak = 1e12 * args.peak if args.peak else device_peak()
    rows: list[Row] = []
    settings = Settings(args.repeats, args.quick, args.size, peak, args.part or "", args.agent)
    for row in module.rows(settings):
        rows.append(row)
        print(f"  {row.name}: {told(row)}", file=sys.stderr, flush=True)
        if args.json:  # row by row: what was measured before somebody stops it is not lost
            args.json.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")
    print(table(rows))
    if args.plot:
        module.plot(rows, args.plot)
    return 0


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} processors"
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads on {device}"


if __name__ == "__main__":
    sys.exit(main())
