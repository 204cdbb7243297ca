"""What happens after a step: validating, saving, leaving; what watches a run. See :data:`mmagent.train.loop.Hook`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.saving import SavingConfig
from mmagent.protocols import Engine, Objective
from mmagent.train.environment import EnvironmentLog
from mmagent.train.health import CollectGarbage, HealthConfig
from mmagent.train.logs import JsonlLog, Progress, Record, RouterLog, TensorBoardLog, WandbLog, read_jsonl
from mmagent.train.metrics import Totals, counts_of, global_counts, mean_losses, of_all_ranks
from mmagent.train.profiling import Profile
from mmagent.train.ranks import RankLog
from mmagent.train.run import Run

if TYPE_CHECKING:  # stages without a language model need not load one
    from mmagent.objectives.routed import RoutedObjective

__all__ = [
    "Every",
    "JsonlLog",
    "LeaveOnSignal",
    "Progress",
    "RouterLog",
    "RunConfig",
    "SaveHook",
    "TensorBoardLog",
    "Validate",
    "WatchConfig",
    "evaluate",
    "read_jsonl",
    "tell",
    "usual_hooks",
]


class Every:
    """Call ``hook`` every ``interval`` steps only, and at the last of ``steps`` when given."""

    def __init__(self, interval: int, hook: Callable[[int, Record], None], steps: int | None = None):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval, self.hook, self.steps = interval, hook, steps
        self.saves = getattr(hook, "saves", False)
        self.segment = getattr(hook, "segment", "hooks")

    def __call__(self, step: int, record: Record) -> None:
        if step % self.interval == 0 or step == self.steps:
            self.hook(step, record)


class SaveHook:
    """Save ``run`` every ``interval`` steps. ``fit`` saves at the end by itself."""

    saves = True

    def __init__(self, run: Run, interval: int):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.run, self.interval = run, interval

    def __call__(self, step: int, record: Record) -> None:
        if step % self.interval == 0:
            self.run.save(step)


class LeaveOnSignal:
    """On SIGTERM (a pre-empted machine, ``torchrun`` shutting down) save after the step at hand and exit with 143.

    One rank's signal is enough: the ranks agree after every step. Further signals change nothing. A process that has
    not come to the end of its step ``patience`` seconds after the signal (its data never come, its peers are gone) says
    where it stands and exits with 143 without saving: the checkpoints are those there were.
    """

    saves = True

    def __init__(self, run: Run, signals: Sequence[signal.Signals] = (signal.SIGTERM,), patience: float = 600.0):
        self.run, self.asked, self.patience = run, False, patience
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            timer = threading.Timer(self.patience, self._leave)
            timer.daemon = True
            timer.start()
        self.asked = True

    def _leave(self) -> None:
        text = f"asked to stop {self.patience:.0f} s ago, and the step at hand does not end: left without saving"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__)
        os._exit(128 + signal.SIGTERM)

    def __call__(self, step: int, record: Record) -> None:
        if self.run.world.sum({"asked": float(self.asked)}, layout="leave")["asked"]:
            self.leave(step)

    def leave(self, step: int) -> NoReturn:
        """Save ``step`` and exit: for all ranks, which have agreed. Of no step there is nothing to save."""
        self.run.finish(step)
        if dist.is_main():
            told = f"saved step {step}; start again to continue" if step else "no step was done; start again to begin"
            print(f"asked to stop: {told}", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)


@dataclass
class WatchConfig:
    """What watches a run beside its log. ``interval``: steps between two gathers of every rank's times and memory (0:
    never); a rank is named as slow that stays ``slow`` (a share) over the median one. ``garbage``: steps between two
    runs of Python's garbage collector (0: whenever Python likes). ``profile``: ``[START, COUNT]`` steps of which every
    operation is timed. ``wandb``: the project of Weights & Biases to report to; empty for none."""

    interval: int = 10
    slow: float = 0.1
    garbage: int = 100
    profile: list[int] = field(default_factory=list)
    wandb: str = ""

    def __post_init__(self) -> None:
        if self.interval < 0 or self.garbage < 0 or self.slow <= 0:
            raise ValueError(f"watch: interval and garbage must not be negative, slow must be positive; got {self}")
        if len(self.profile) not in (0, 2):
            raise ValueError(f"watch.profile: the first step and how many, such as [20,3]; got {self.profile}")


@dataclass
class RunConfig:
    """What the settings of every stage begin with. ``output``: the run's folder. Every ``save_every`` steps a
    checkpoint is written there, and the newest ``keep`` stay. ``tensorboard``: figures also for TensorBoard.
    ``health``: what is done when a step must not be taken, or a rank hangs."""

    output: str = "runs/run"
    seed: int = 0
    save_every: int = 50
    keep: int = 2
    saving: SavingConfig = field(default_factory=SavingConfig)
    tensorboard: bool = False
    watch: WatchConfig = field(default_factory=WatchConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        for name in ("save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run_settings(config: RunConfig) -> dict[str, Any]:
    """The arguments of a :class:`~mmagent.train.run.Run` that are settings."""
    return {"keep": config.keep, "saving": config.saving, "health": config.health}


def usual_hooks(
    run: Run,
    title: str,
    steps: int,
    config: RunConfig,
    *,
    figures: Sequence[str] = ("loss",),
    routed: RoutedObjective | None = None,
    engine: Engine | None = None,
) -> list[Callable[[int, Record], None]]:
    """What a recipe's run is watched by: a line for people, logs beside its checkpoints, saving in time. The load of
    ``routed``'s experts is logged as often as it is saved; ``engine`` says what memory holds."""
    watch, save_every = config.watch, config.save_every
    if watch.profile and watch.profile[0] > steps:
        raise ValueError(f"watch.profile: step {watch.profile[0]} is never reached, the run has {steps}")
    watching = [EnvironmentLog(run), run.log]
    if watch.interval:
        watching.append(RankLog(run, steps, watch.interval, watch.slow, engine))
    watching += [Progress(title, steps, figures=figures), JsonlLog(run.directory / "log.jsonl")]
    if routed is not None:
        watching.append(Every(save_every, RouterLog(run.directory / "router_load.jsonl", routed), steps))
    watching += [TensorBoardLog(run.directory / "tensorboard")] if config.tensorboard else []
    watching += [WandbLog(run.directory, watch.wandb, title, steps, run.config_yaml)] if watch.wandb else []
    watching += [CollectGarbage(watch.garbage, steps)] if watch.garbage else []
    watching += [Profile(run, *watch.profile)] if watch.profile else []
    return [*watching, SaveHook(run, save_every), LeaveOnSignal(run)]


def tell(hooks: Sequence[Callable[[int, Record], None]], run: Run, step: int, record: Record) -> None:
    """Call ``hooks`` in their order after ``step``; the time each takes counts to its segment of ``run``'s."""
    for hook in hooks:
        with run.segments(getattr(hook, "segment", "hooks")):
            hook(step, record)


class Validate:
    """Add ``{prefix}loss``, ``{prefix}loss/<term>`` and metrics over held-out batches to the record.

    ``batches()`` gives this rank's micro-batches, as many on every rank; random generators are left as they were.
    ``engine`` is the one that trains the objective: it brings its precision, and leaves sharded weights sharded.
    ``time/`` and the prefix hold the seconds. Put it before the logs, inside :class:`Every`.
    """

    segment = "validation"

    def __init__(
        self,
        objective: Objective,
        batches: Callable[[], Iterable[Any]],
        world: World,
        engine: Engine,
        prefix: str = "validation/",
    ):
        self.objective, self.batches, self.world, self.engine, self.prefix = objective, batches, world, engine, prefix

    def __call__(self, step: int, record: Record) -> None:
        started = time.perf_counter()
        found = evaluate(self.objective, self.batches(), self.world, self.engine)
        record |= {self.prefix + name: value for name, value in found.items()}
        record["time/" + self.prefix.strip("/")] = time.perf_counter() - started


def evaluate(objective: Objective, batches: Iterable[Any], world: World, engine: Engine) -> dict[str, float]:
    """Losses and metrics of ``objective`` over ``batches`` of all ranks, without gradient and in evaluation mode;
    through its ``engine``, and so in its precision. Raises ``ValueError`` on all ranks where one has more batches than
    another, or the objective refuses one."""
    assert isinstance(objective, nn.Module)
    terms = sorted(objective.weights)
    totals, counts = Totals(), []
    training = objective.training
    objective.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
            for batch, count in _counted(objective, batches, world):
                counts.append(count)
                totals.add(batch, engine.forward(batch.to(world.device, non_blocking=True)))
    finally:
        objective.train(training)
    if not counts:
        raise ValueError("there is no batch to evaluate")
    divisors = global_counts(counts, (), terms, world)
    total = totals.reduce(world)
    loss, losses = mean_losses(total["sum"], divisors, objective.weights)
    return {"loss": loss, **{f"loss/{term}": value for term, value in losses.items()}, **total["metrics"]}


def _counted(
    objective: Objective, batches: Iterable[Any], world: World
) -> Iterator[tuple[Any, Mapping[str, torch.Tensor]]]:
    """Batches with their counts. Ranks agree on each before its forward, in which they may wait for each other."""
    left = iter(batches)
    while True:
        batch = next(left, None)
        counts, refused = counts_of(objective, [batch] if batch is not None else [])
        here = world.sum({"batches": batch is not None, "refused": len(refused)}, layout="evaluate")
        if here["refused"]:
            raise ValueError("\n".join(of_all_ranks(refused, world)))
        if not here["batches"]:
            return
        if here["batches"] != world.size:
            raise ValueError(
                f"ranks bring different numbers of batches to evaluate: {here['batches']:.0f} have one more"
            )
        yield batch, counts[0]
