"""python -m evals: judge a checkpoint or an endpoint, compare two runs, write a report."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.baselines import BASELINES, BaselineAgent
from evals.dialects import STYLES, style_of
from evals.endpoint import EndpointAgent, EndpointConfig
from evals.runner import DISK_FULL, EvaluationBroken, Options, evaluate, pins_of
from evals.statistics import Comparison, Estimate
from evals.store import Run, RunError, check_allowed, find_runs, read_run
from evals.suite import EVERY, Agent, Suite, choose_tasks
from evals.suites import SUITES, WITH_DATA
from evals.summary import COSTS, beside_told, compare_runs, compare_slices, costs, summarise
from mmagent.browser import BrowserError, require_chromium
from mmagent.sandbox import SandboxUnavailable

DESCRIPTION = """Judge a multimodal agent.

  python -m evals SUITE... --checkpoint DIR            a folder that training wrote
  python -m evals SUITE... --url URL --model NAME      any OpenAI-compatible endpoint (URL ends in /v1)
  python -m evals list [SUITE...]                      the suites; the tasks of those that are named
  python -m evals compare A B                          two runs (or folders of runs), item by item
  python -m evals report DIR                           write DIR/report.html again
  python -m evals look --checkpoint DIR                does it look at its screen, or click by words alone?
  python -m evals fingerprint FILE [SUITE...]          what must not be trained on, for data_pipelines.curate

A run can be killed at any moment; the same command goes on where it was. Results: OUT/SUITE/items.jsonl,
OUT/SUITE/run.json (what was pinned), OUT/report.html."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 when nothing could be judged, 2 for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"list": _list, "compare": _compare, "report": _report, "look": _look, "fingerprint": _fingerprint}
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        if not argv:
            print(f"{DESCRIPTION}\n", file=sys.stderr)
            raise ValueError("what is judged, and who? `python -m evals list` names the suites, --help all options")
        return _run(argv)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except EvaluationBroken as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads our output has seen enough
        raise
    except OSError as error:  # a folder that cannot be written, a full disk, a hub that is not there
        print(f"error: {_said(error)}", file=sys.stderr)
        return 2
    except (ValueError, BrowserError, SandboxUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _said(error: OSError) -> str:
    """The system's word with the file it is about, where it names one."""
    if error.strerror is None:
        return str(error)
    about = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    full = error.errno in DISK_FULL
    return about + ("; what was judged is kept, the same command goes on once there is room" if full else "")


def _run(argv: Sequence[str]) -> int:
    args = _run_parser().parse_args(argv)
    suites = [_suite(name, args) for name in dict.fromkeys(args.suites)]
    agent = _agent(args)
    for play in (suite.play for suite in suites):
        if args.style and play.acts:
            style_of(args.style, play.phone)
    if any(suite.needs_browser for suite in suites):
        require_chromium()
    name = _slug(args.checkpoint or args.model or args.baseline)
    out = args.out or Path("runs/evals") / (f"{name}-blind" if args.blind else name)
    options = Options(
        limit=args.limit,
        samples=args.samples,
        concurrency=(8 if args.url else 32) if args.concurrency is None else args.concurrency,
        retry_errors=args.retry_errors,
        progress=not args.quiet,
        blind=args.blind,
    )
    runs = []
    for suite in suites:
        if not args.quiet:
            print(f"{suite.name}: {suite.summary}\n  into {out / suite.name}")
            for name, value in pins_of(suite, agent, options).items():
                print(f"  {name}: {value}")
        runs.append(asyncio.run(evaluate(suite, agent, out / suite.name, options)))
    print(_score_table(runs))
    print(f"report: {_write_report(out, [read_run(folder) for folder in find_runs(out)])}")  # those of before, too
    broken = [run for run in runs if run.errors]
    for run in broken:
        row = run.errors[-1]
        print(f"{run.suite}: {len(run.errors)} of {len(run.rows)} failed, --retry-errors tries them again; the last "
              f"one, {row.key}: {row.error}", file=sys.stderr)  # fmt: skip
    return 0 if any(run.judged for run in runs) or not broken else 1


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m evals", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="+", metavar="SUITE", help=f"one or more of: {', '.join(SUITES)}")
    who = parser.add_argument_group("who is judged")
    who.add_argument("--checkpoint", metavar="DIR", help="folder with config.yaml, model.safetensors, tokenizer.json")
    who.add_argument("--url", help="endpoint, up to and including /v1")
    who.add_argument("--model", metavar="NAME", help="the endpoint's name of the model")
    who.add_argument(
        "--style", choices=tuple(STYLES), help="ask for actions in this model's own format, not in ours (endpoints)"
    )
    who.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable of its key")
    who.add_argument("--baseline", choices=BASELINES, help="no model: the gold answers, empty ones, or random ones")
    who.add_argument("--device", default="", help="where a checkpoint runs (default: cuda if there is one, else cpu)")
    how = parser.add_argument_group("how")
    how.add_argument("--limit", type=int, metavar="N", help="at most N items a suite, spread over its tasks")
    how.add_argument("--samples", type=int, default=1, metavar="K", help="tries of each item, for pass@k (default 1)")
    how.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks, named in full or by their ends")
    how.add_argument(
        "--data", action="append", default=[], metavar="[SUITE=]WHERE",
        help="published data of a suite: a folder, datasets:ID, or what `list` says; without, a split made on the spot",
    )  # fmt: skip
    how.add_argument(
        "--clip", metavar="DIR", help="CLIP ViT-B/32 in transformers' form: design2code's fifth score as published"
    )
    how.add_argument("--max-tokens", type=int, metavar="N", help="a turn's tokens, instead of the suite's own; pinned")
    how.add_argument("--temperature", type=float, metavar="T", help="instead of the suite's own; pinned")
    how.add_argument("--concurrency", type=int, metavar="N", help="items at once (default 32, 8 for an endpoint)")
    how.add_argument("--blind", action="store_true", help="show blank screens: what is scored without seeing")
    how.add_argument("--retry-errors", action="store_true", help="run the items again that ended in an error")
    how.add_argument("--out", type=Path, metavar="DIR", help="where results go (default runs/evals/NAME)")
    how.add_argument("--quiet", action="store_true", help="no progress bar, no pins")
    return parser


def _built(name: str, where: str = "", clip: str = "") -> Suite:
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1)
        raise ValueError(f"no suite {name!r}; " + (f"did you mean {near[0]}?" if near else f"see: {', '.join(SUITES)}"))
    return SUITES[name](*[where] * bool(where), **{"clip": clip} if clip else {})


def _suite(name: str, args: argparse.Namespace) -> Suite:
    clip = args.clip if args.clip and name == "design2code" else ""
    suite = _built(name, _data(args).get(name, "") if name in SUITES else "", clip)
    if not suite.tasks:
        raise ValueError(f"suite {name} has no tasks without data. {suite.summary}")
    if args.tasks:
        suite = choose_tasks(suite, args.tasks)
    changes = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    play = dataclasses.replace(suite.play, **{k: v for k, v in changes.items() if v is not None})
    return dataclasses.replace(suite, play=play)


def _data(args: argparse.Namespace) -> dict[str, str]:
    """``{suite: where its data are}``. Raises ``ValueError`` for data, and for a CLIP, that no suite of the command
    reads."""
    if args.clip and "design2code" not in args.suites:
        raise ValueError(f"--clip {args.clip}: only design2code looks at pages with it")
    readers = {name for name in args.suites if name in WITH_DATA}
    found = {}
    for text in args.data:
        name, given, where = text.partition("=")
        if not given or name not in SUITES:  # a path may hold an equals sign
            if not readers:
                raise ValueError(f"--data {text}: {args.suites[0]} takes no data; {', '.join(sorted(WITH_DATA))} do")
            if len(readers) != 1:
                raise ValueError(f"--data {text}: whose is it? SUITE=WHERE, SUITE of {', '.join(sorted(readers))}")
            name, where = next(iter(readers)), text
        if name not in readers:
            why = "is not asked for" if name in WITH_DATA else "takes no data"
            raise ValueError(f"--data {text}: {name} {why}")
        found[name] = where
    return found


def _agent(args: argparse.Namespace) -> Agent:
    if args.style and not args.url:
        raise ValueError("--style is for an endpoint: it wants --url and --model")
    if sum(map(bool, (args.checkpoint, args.url, args.baseline))) != 1:
        raise ValueError("who is judged? one of --checkpoint DIR, --url URL with --model NAME, and --baseline")
    if args.baseline:
        return BaselineAgent(args.baseline)
    if args.url:
        if not args.model:
            raise ValueError("--url wants --model NAME, which the endpoint lists at /models")
        return EndpointAgent(EndpointConfig(args.url, args.model, args.key_variable, style=args.style or ""))
    from evals.local import LocalAgent  # torch models and the generator are not needed for an endpoint

    return LocalAgent.load(args.checkpoint, device=args.device or None)


def _list(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m evals list", description="Show the suites, or the tasks of some.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="its tasks, too")
    named = parser.parse_args(argv).suites
    for name in named or SUITES:
        suite = _built(name)
        print(f"{name:20} version {suite.version}, {_size(suite)}. {suite.summary}")
        print(f"{'':20} judge: {suite.judge}" + ("; needs a browser" if suite.needs_browser else ""))
        if named:
            print("".join(f"  {task}\n" for task in suite.tasks), end="")
    return 0


def _size(suite: Suite) -> str:
    tasks = f"{len(suite.tasks)} task{'s' * (len(suite.tasks) != 1)}"
    if not suite.tasks:
        return "no tasks without --data"
    return f"{tasks}, all items" if suite.per_task >= EVERY else f"{tasks} x {suite.per_task} items"


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m evals compare", description="Run B against run A, item by item.")
    parser.add_argument("a", type=Path, metavar="A", help="a run, or a folder of runs")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PIN", help="compare although this pin differs (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with bars and tables by task, too")
    args = parser.parse_args(argv)
    first, second = ({run.suite: run for run in map(read_run, find_runs(folder))} for folder in (args.a, args.b))
    shared = [name for name in first if name in second]
    if not shared:
        raise RunError(f"no suite in common: {', '.join(first)} against {', '.join(second)}")
    check_allowed(args.allow, [(first[name].pins, second[name].pins) for name in shared])
    results = {name: compare_runs(first[name], second[name], args.allow) for name in shared}
    if args.json:
        told = {
            name: dataclasses.asdict(result)
            | {"costs": {side: costs(summarise(run.rows)) for side, run in (("a", first[name]), ("b", second[name]))}}
            for name, result in results.items()
        }
        print(json.dumps(told, indent=1))
    else:
        for name, result in results.items():
            print(_comparison(name, first[name], second[name], result, args.allow))
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        from evals.report import Section, page
        from evals.report.runs import comparison_body

        names = _apart(str(args.a), str(args.b))
        pairs = {name: dict(zip(names, (first[name], second[name]), strict=True)) for name in shared}
        sections = [Section(name, comparison_body(pair, args.allow)) for name, pair in pairs.items()]
        args.html.write_text(page(f"{names[0]} against {names[1]}", sections), encoding="utf-8")
        print(f"page: {args.html}", file=sys.stderr if args.json else sys.stdout)  # who reads JSON reads nothing else
    return 0


def _apart(a: str, b: str) -> tuple[str, str]:
    """Two folders by the last part of their names that differs."""
    for one, other in zip(reversed(Path(a).parts), reversed(Path(b).parts), strict=False):
        if one != other:
            return one, other
    return f"A: {a}", f"B: {b}"


def _comparison(name: str, a: Run, b: Run, c: Comparison, allow: Sequence[str]) -> str:
    d = c.difference
    lines = [
        f"{name}: A {100 * c.a:.1f} %, B {100 * c.b:.1f} %, difference {100 * d.mean:+.1f} points "
        f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}], p = {c.p_value:.2g}",
        f"  {d.n} items in both: B better on {c.wins}, worse on {c.losses}, equal on {c.ties}",
    ]
    if c.only_a or c.only_b:
        lines.append(f"  left out: {c.only_a} judged in A alone, {c.only_b} in B alone")
    rows = []
    for what, groups in compare_slices(a, b, allow).items():
        for group, part in groups.items():
            d = part.difference
            rows.append([f"{what} {group}", f"{100 * part.a:.1f} %", f"{100 * part.b:.1f} %", f"{100 * d.mean:+.1f}",
                         f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]", str(d.n)])  # fmt: skip
    both = [summarise(run.rows) for run in (a, b)]
    for k in both[0].pass_at.keys() & both[1].pass_at.keys():
        first, second = (summary.pass_at[k] for summary in both)
        rows.append([f"pass@{k}", f"{100 * first:.1f} %", f"{100 * second:.1f} %", f"{100 * (second - first):+.1f}"])
    malformed = [100 * summary.parts.get("malformed", 0.0) for summary in both]
    if any(malformed):
        rows.append(["malformed", *(f"{share:.1f} %" for share in malformed), f"{malformed[1] - malformed[0]:+.1f}"])
    first, second = map(costs, both)
    for name, what in COSTS.items():
        rows.append([what, f"{first[name]:.1f}", f"{second[name]:.1f}", f"{second[name] - first[name]:+.1f}"])
    return "\n".join([*lines, *_aligned([["", "A", "B", "B - A", "95 % interval", "items"], *rows])])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left."""
    count = max(map(len, rows))
    full = [[*row, *[""] * (count - len(row))] for row in rows]
    wide = [max(len(row[n]) for row in full) for n in range(count)]
    lines = []
    for row in full:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], wide[1:], strict=True)]
        lines.append("  ".join([f"  {row[0]:{wide[0]}}", *cells]).rstrip())
    return lines


def _report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m evals report", description="Write DIR/report.html from its runs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder of runs")
    args = parser.parse_args(argv)
    found = find_runs(args.folder)
    if found[0].parent != args.folder and found[0] != args.folder:
        print(f"runs of {found[0].parent}")
    runs = [read_run(folder) for folder in found]
    print(_score_table(runs))
    print(f"report: {_write_report(args.folder, runs)}")
    return 0


def _look(argv: Sequence[str]) -> int:
    from evals.look import main as look  # torch models are not needed for an endpoint

    return look(argv)


def _fingerprint(argv: Sequence[str]) -> int:
    from evals.fingerprint import main as fingerprint

    return fingerprint(argv)


def _write_report(folder: Path, runs: Sequence[Run]) -> Path:
    from evals.report.runs import write_report

    return write_report(runs, folder / "report.html", f"Evaluation: {folder.name}")


def _score_table(runs: Sequence[Run]) -> str:
    """Scores of every run, its tasks and slices; tokens read and written and seconds are means over items."""
    rows = [["", "score", "95 % interval", "items", "errors", "malformed", "read", "written", "seconds"]]

    def scored(name: str, e: Estimate, *more: str) -> None:
        known = [f"{100 * e.mean:.1f} %", f"{100 * e.low:.1f} .. {100 * e.high:.1f}"] if e.n else ["–", ""]
        rows.append([name, *known, str(e.n), *more])

    for run in runs:
        summary = summarise(run.rows)
        malformed = summary.parts.get("malformed")
        share = "" if malformed is None else f"{100 * malformed:.1f} %"
        cost = (f"{summary.prompt_tokens_per_item:.0f}", f"{summary.tokens_per_item:.0f}")
        scored(run.suite, summary.score, str(summary.errors), share, *cost, f"{summary.seconds_per_item:.2f}")
        if len(summary.by_task) > 1:
            for task, estimate in summary.by_task.items():
                scored(f"  {task}", estimate)
        for what, groups in summary.by_slice.items():
            for group, estimate in groups.items():
                scored(f"  {what}: {group}", estimate)
        rows += [[f"  pass@{k}", f"{100 * value:.1f} %"] for k, value in summary.pass_at.items()]
    lines = [line.removeprefix("  ") for line in _aligned(rows)]
    return "\n".join([*lines, *(f"{run.suite}: {told}" for run in runs if (told := beside_told(run)))])


def _slug(name: str) -> str:
    parts = [part for part in re.split(r"[^A-Za-z0-9._-]+", name) if part not in ("", ".", "..")]
    return "-".join(parts[-2:]) or "agent"


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head` has; nothing more can be told to anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
