"""What makes a distilled encoder good: two teachers or one, hidden patches or all, which standardiser, which mask.

    python -m recipes.ablate_encoder --output runs/ablation --seeds 3 --steps 300

Every seed trains its own small teachers on everything that can be drawn here (scenes, charts, icons, handwritten
digits, photographs that packages ship and, with a Chromium, rendered screens), distils a student for every condition
from the same pictures in the same order, and probes all of them. Kill it at any moment; the same command goes on. It
leaves ``ablation.json``, ``ablation.md`` and ``ablation.svg``: means over seeds with Student's 95 % intervals, and
differences to the first condition, seed by seed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_pipelines.galleries import CLASSES
from mmagent.browser import find_chromium
from recipes.ablation_report import write
from recipes.lineage import Stage
from recipes.plan_command import run_or_exit
from recipes.quickstart_plan import built, encoder, file

TEACHERS = ("siglip2", "dinov3")
CONDITIONS: dict[str, tuple[str, ...]] = {
    "both teachers": (),
    "SigLIP2 alone": (),
    "DINOv3 alone": (),
    "all patches": ("objective.visible_weight=1",),
    "all, SigLIP2 alone": ("objective.visible_weight=1",),
    "all, DINOv3 alone": ("objective.visible_weight=1",),
    "LayerNorm": ("objective.standardise=layer",),
    "mask 50 %": ("mask.ratio=0.5",),
    "mask 75 %": ("mask.ratio=0.75",),
}
"""The first is the reference (PHI-S, loss on hidden patches, 35 % of them); each other one differs in one thing, but
that teachers are also compared with the loss on all patches."""
ALONE = {f"{all_}{name} alone": name.lower() for all_ in ("", "all, ") for name in ("SigLIP2", "DINOv3")}
MIX = {
    "scenes": 0.35,
    "charts": 0.15,
    "icons": 0.15,
    "digits": 0.05,
    "natural": 0.1,
    "scientific": 0.05,
    "panels": 0.05,
    "screens": 0.1,
}


def folder_of(condition: str) -> str:
    """A condition's name in the file system."""
    return condition.lower().replace(" %", "").replace(",", "").replace(" ", "-")


def plan(root: Path, seeds: int, steps: int, processes: int, browser: bool, images: int) -> list[Stage]:
    """All stages in order: data once, then for every seed teachers, students and probes."""
    mixed = tuple(f"mix.{name}={weight}" for name, weight in MIX.items() if browser or name != "screens")
    mixed += (f"sources.screens={root}/data/pretrain/screens",) if browser else ()
    stages = [_data(root, browser)]
    for seed in range(seeds):
        where = root / f"seed{seed}"
        for kind in TEACHERS:
            told = _told(kind, steps)
            shared = (f"tokenizer={root}/data/tokenizer.json", f"seed={seed}", f"data.seed={seed}")
            zero = tuple(f"mix.{name}=0" for name in ("scenes0", "scenes1", "scenes2"))  # what the presets draw
            arguments = ("recipes.teachers", "--preset", kind, *shared, *told, *zero, *mixed, f"output={where / kind}")
            check, about = file("teacher/model.safetensors"), f"train a small {kind} teacher"
            stages.append(Stage(f"teacher-{kind}-{seed}", about, arguments, where / kind, check, steps / 3, processes))
        for condition, changes in CONDITIONS.items():
            kinds = (ALONE[condition],) if condition in ALONE else TEACHERS
            output = where / folder_of(condition)
            arguments = (
                *("recipes.distill_encoder", "--preset", "laptop", f"seed={seed}", f"data.seed={seed}"),
                *(f"teachers.{kind}.source={where / kind}/teacher" for kind in kinds),
                *(f"steps={steps}", "mask.ratio=0.35", "objective.visible_weight=0", "objective.summary_weight=0.1"),
                *(*mixed, f"cache.folder={root}/cache", "cache.batch=16", "save_every=100"),
                *(*changes, f"output={output}"),
            )
            name = f"{folder_of(condition)}-{seed}"
            stages.append(Stage(name, f"distil: {condition}", arguments, output, encoder, steps / 4, processes))
        stages.append(_probes(where, seed, images))
    return stages


def _told(kind: str, steps: int) -> tuple[str, ...]:
    """What stands in for billions of images: what patches show, in words and things, or in materials."""
    objective, classes = {"siglip2": ("alignment", "things"), "dinov3": ("reconstruction", "surfaces")}[kind]
    return (f"classes={classes}", f"{objective}.classes={CLASSES[classes]}", f"steps={2 * steps}")


def _data(root: Path, browser: bool) -> Stage:
    """Vocabulary, and screens where there is a browser."""
    counts = {
        "captions": 400,
        "text": 100,
        "screens": 600 if browser else 0,
        "tiles": 0,
        "pages": 0,
        "html": 0,
        "interleaved": 0,
    }
    samples = tuple(f"pretrain.{name}={count}" for name, count in counts.items())
    samples += tuple(f"sft.{name}=0" for name in ("episodes", "clicks", "html"))
    seen = (f"folder={root}/data", f"browser={'required' if browser else 'none'}")
    arguments = ("data_pipelines.build", "--preset", "debug", *seen, *samples)
    check = built([f"pretrain/{name}" for name, count in counts.items() if count])
    return Stage("data", "a vocabulary, and rendered screens", arguments, root / "data", check, 60, 0)


def _probes(where: Path, seed: int, images: int) -> Stage:
    pairs = tuple(f"{folder_of(condition)}={where / folder_of(condition)}/encoder" for condition in CONDITIONS)
    arguments = ("recipes.probe_encoders", *pairs, f"output={where}/probes", "--images", str(images))
    return Stage(f"probes-{seed}", "what each student knows", arguments, where / "probes", file("probes.json"), 60, 0)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m recipes.ablate_encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="at least two (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of every student (default: %(default)s)")
    parser.add_argument("--images", type=int, default=600, help="training images a probe (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=min(cores, 2), help="a stage (here: %(default)s)")
    args = parser.parse_args()
    if args.seeds < 2 or min(args.steps, args.images, args.processes) < 1:
        parser.error("--seeds must be at least 2, for an interval; --steps, --images and --processes at least 1")
    browser = find_chromium() is not None
    stages = plan(args.output, args.seeds, args.steps, args.processes, browser, args.images)
    run_or_exit(stages, args.output)
    names = {folder_of(condition): condition for condition in CONDITIONS}
    against = {condition: "all patches" for condition in CONDITIONS if condition.startswith("all, ")}
    found = [args.output / f"seed{seed}" / "probes" / "probes.json" for seed in range(args.seeds)]
    print(write(args.output, found, names, against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
