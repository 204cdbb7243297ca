"""What a run does when a step must not be taken: tell, stop, leave the batch out, or go back; and when it collects
garbage.

A loss or gradient that is not finite, or a loss that jumps, is known before the step has moved a weight. What happens
then is a policy (:class:`HealthConfig`) that the :class:`Guard` of every run carries out, on all ranks alike. A step's
number is the number of batches drawn, trained on or not: schedules, logs, checkpoints and the stream stay in step with
one another, and a run of N steps ends where N batches end, whatever happened on the way.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmagent import dist
from mmagent.engine import checkpoint
from mmagent.engine.checkpoint import CheckpointError
from mmagent.protocols import Engine, Forgets, Objective
from mmagent.train import incidents as records
from mmagent.train.incidents import TAKEN, Incident, Refused
from mmagent.train.metrics import Totals, findings_of, keys_of
from mmagent.train.step import train_step
from mmagent.train.watchdog import Watchdog

if TYPE_CHECKING:  # a run makes its guard
    from mmagent.train.run import Run

logger = logging.getLogger(__name__)

MERGED = 3
"""Checkpoints whose weights ``merge`` averages (arXiv 2505.12082)."""
ENOUGH = 10
"""Losses that must be known before one of them can be called a spike."""


@dataclass
class HealthConfig:
    """What is done ``on_not_finite`` (a loss or gradient) and ``on_spike`` (of the loss), before a weight has moved:

    - ``stop``: end with an error that names the documents. The run goes on from its newest checkpoint when started
      again, and meets the same batch.
    - ``skip``: the batch leaves no trace, and training goes on with the next one.
    - ``rollback``: back to the newest whole checkpoint that is older than the batch. Of the ``leave_out`` batches that
      end with the offending one those after the checkpoint are not trained on; what lies before them is trained on
      again. With ``leave_out`` 1 that would be a costly ``skip``: a spike is made by the weights and by the batches
      before it as well, so PaLM left out 200 to 500 (arXiv 2204.02311, section 5.1).
    - ``merge``: the same, with the average of the three newest whole checkpoints (of as many as there are) as weights;
      parameters and buffers such as the router's bias, in float32. Everything else is that of the newest: the
      optimizer's moments are averages over the latest gradients already, and starting them anew would need a warm-up.
    - ``warn``, for a spike only: tell, and train on.

    A spike is a loss above the median of the last ``window`` ones by ``factor`` times their median absolute deviation
    (by a thousandth of the median where that is more). After ``recoveries`` within ``within`` steps the next incident
    stops the run with all that is known: what comes back is no accident.

    ``hang_after`` seconds without a move of some rank the run ends with a dump (:mod:`mmagent.train.watchdog`); 0 waits
    for collectives to fail. The default lies below the 600 s after which they do, and above what a collective may
    rightly wait: for the slowest rank's first step, its data, or its part of a validation or a rollout.
    """

    on_not_finite: str = "stop"
    on_spike: str = "warn"
    window: int = 100
    factor: float = 10.0
    leave_out: int = 200
    recoveries: int = 3
    within: int = 1000
    hang_after: float = 480.0

    def __post_init__(self) -> None:
        for name, choices in (("on_not_finite", ("stop", *TAKEN)), ("on_spike", ("warn", "stop", *TAKEN))):
            if getattr(self, name) not in choices:
                raise ValueError(f"health.{name} {getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.window < ENOUGH:
            raise ValueError(f"health.window must be at least {ENOUGH}, got {self.window}")
        for name in ("leave_out", "recoveries", "within", "factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"health.{name} must be positive, got {getattr(self, name)}")
        if self.hang_after < 0:
            raise ValueError(f"health.hang_after must not be negative, got {self.hang_after}")


class SpikeTest:
    """Losses of late, and the most that the next one may be; see :class:`HealthConfig`."""

    def __init__(self, window: int, factor: float):
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """Infinity until enough losses are known."""
        if len(self.recent) < ENOUGH:
            return math.inf
        median = statistics.median(self.recent)
        usual = statistics.median(abs(value - median) for value in self.recent)
        return median + self.factor * max(usual, 1e-3 * abs(median))


class Guard:
    """Takes a run's steps, and acts by :class:`HealthConfig` on those that must not be taken.

    Every run has one (``run.guard``), and every loop goes by it::

        for step in run.guard.steps(run.resume(total), total):
            taken = run.guard.step(step, objective, engine, micro_batches, lr_scale)
            if taken is None:
                continue  # back at a checkpoint: its next step follows

    It is a part of the run's checkpoints, and keeps ``incidents.jsonl`` beside them
    (:mod:`mmagent.train.incidents`): a run that is killed during or after a recovery ends bit for bit where one that
    was not ends.
    """

    shared_state = True

    def __init__(self, config: HealthConfig, run: Run):
        if "merge" in (config.on_not_finite, config.on_spike) and run.keep < MERGED:
            raise ValueError(f"health: merge averages {MERGED} checkpoints, but keep={run.keep} of them are kept")
        self.config, self.run = config, run
        self.spikes = SpikeTest(config.window, config.factor)
        self.incidents: list[Incident] = []  # without findings, which may be long and lie in the file
        self.path = run.directory / "incidents.jsonl"
        self._known = 0  # the last incident that the checkpoint knows which was loaded last
        self._first, self._back = 0, -1

    def steps(self, first: int, end: int) -> Iterator[int]:
        """Numbers of the steps from ``first``, where the run stands, up to ``end``, each before it is taken. After a
        recovery they go on from the checkpoint. Meanwhile a watchdog looks out for hangs."""
        step, segments = first, self.run.segments
        self._first = first
        with Watchdog(self.run.world, segments, self.run.directory, self.config.hang_after):
            while step < end:
                segments.step = step + 1
                yield step
                step, self._back = (step + 1 if self._back < 0 else self._back), -1

    @property
    def went_back(self) -> bool:
        """Whether the step at hand ended at a checkpoint; the next of :meth:`steps` follows it."""
        return self._back >= 0

    def leaves_out(self, step: int, part: int | None = None) -> bool:
        """Whether for what happened before the update ``part`` of ``step`` is not trained on; without ``part`` whether
        none of the step is, so that its data need only be drawn."""
        return any(incident.action in TAKEN and incident.covers(step, part) for incident in self.incidents)

    def step(
        self,
        step: int,
        objective: Objective,
        engine: Engine,
        micro_batches: Sequence[Any],
        lr_scale: float = 1.0,
        role_scales: Mapping[str, float] | None = None,
        part: int = 0,
    ) -> dict[str, float] | None:
        """Take ``step`` (:func:`~mmagent.train.step.train_step`) and return its record; for a batch that is left out
        only what :meth:`figures` says. None: the run is back at a checkpoint. A collective. ``part`` tells several
        updates of a step apart; once one of them went back, the others return None."""
        if self.went_back:
            return None
        if self.leaves_out(step, part):
            _forget(objective)
            return self.figures(step)
        random = self.run.parts["random"]
        before = random.state_dict()
        judge = partial(self._judge, step, part, objective, micro_batches)
        try:
            result = train_step(
                objective, engine, micro_batches, self.run.world, lr_scale, role_scales, self.run.segments, judge
            )
        except Refused as refused:
            incident = self._decide(refused, step, part)
            if incident.action == "stop":
                raise Refused(refused.kind, incident.reason, refused.findings, self._advice(incident)) from refused
            engine.discard()
            _forget(objective)
            if incident.action == "skip":
                random.load_state_dict(before)
                return self.figures(step)
            self._go_back(incident)
            return None
        self.spikes.recent.append(result.loss)
        return {**result.record(), **self.figures(step)}

    def figures(self, step: int) -> dict[str, float]:
        """``health/``: whether there was a spike, or something not finite, and whether a batch was left out; and the
        recoveries so far. The same whether the step was refused just now or before a restart."""
        here = [incident for incident in self.incidents if incident.step == step]
        before = [incident for incident in self.incidents if incident.step <= step and incident.action in TAKEN]
        return {
            "health/spike": float(any(incident.kind == "spike" for incident in here)),
            "health/not_finite": float(any(incident.kind == "not_finite" for incident in here)),
            "health/left_out": float(any(i.action in TAKEN and i.covers(step, i.part) for i in self.incidents)),
            "health/recoveries": float(len(before)),
        }

    # ------------------------------------------------------------ what is wrong, and what to do

    def _judge(
        self, step: int, part: int, objective: Objective, micro_batches: Sequence[Any], loss: float, totals: Totals
    ) -> None:
        limit = self.spikes.limit()
        if loss <= limit:
            return
        mine = []
        for i, (batch, sums) in enumerate(zip(micro_batches, totals.sums(), strict=True)):
            counts = {term: float(count) for term, count in objective.counts(batch).items()}
            own = sum(objective.weights[term] * sums[term] / count for term, count in counts.items() if count)
            mine.append((i, f"its own loss is {own:.4g}", keys_of(batch), own))
        findings = findings_of([row[:3] for row in mine], self.run.world)
        losses = [own for some in self.run.world.gather_objects([row[3] for row in mine]) for own in some]
        worst = [findings[n] for n in sorted(range(len(losses)), key=lambda n: -losses[n])]
        median = statistics.median(self.spikes.recent)
        reason = f"the loss is {loss:.4g}, above {limit:.4g}; the median of late is {median:.4g}"
        if self.config.on_spike != "warn":
            raise Refused("spike", reason, worst)
        self._note(Incident(self._number(), step, part, "spike", reason, "warn", findings=tuple(worst)))

    def _number(self) -> int:
        return max([self._known, *(incident.number for incident in self.incidents)]) + 1

    def _decide(self, refused: Refused, step: int, part: int) -> Incident:
        """What is to be done, on disk."""
        policy = self.config.on_spike if refused.kind == "spike" else self.config.on_not_finite
        incident = Incident(self._number(), step, part, refused.kind, refused.reason, policy, findings=refused.findings)
        recent = [i for i in self.incidents if i.action in TAKEN and abs(i.step - step) < self.config.within]
        if policy in TAKEN and len(recent) >= self.config.recoveries:
            told = "; ".join(f"step {i.step + 1}: {i.action}, as {i.reason.splitlines()[0]}" for i in recent)
            reason = f"{refused.reason}\nafter {len(recent)} recoveries within {self.config.within} steps ({told})"
            incident = replace(incident, action="stop", reason=reason)
        elif policy in ("rollback", "merge"):
            incident = self._plan(incident)
        self._note(incident)
        return incident

    def _plan(self, incident: Incident) -> Incident:
        """Where to go back to. In a later phase of a recipe no further than to where the phase was taken up: what is
        frozen differs before it."""
        step, merge = incident.step, incident.action == "merge"
        whole = self._whole(step)
        able = [n for n in whole if n >= self._first]
        targets = [n for n in able if merge or n < step] or able
        if not targets:
            why = f"{incident.reason}\nthere is no whole checkpoint at step {step} or before to go back to"
            return replace(incident, action="stop", reason=why)
        to = targets[0]
        merged = tuple(sorted(whole[:MERGED])) if merge else ()
        return replace(incident, to=to, merged=merged, leaves_out=(max(to, step - self.config.leave_out + 1), step))

    def _whole(self, step: int) -> list[int]:
        """Steps of the newest whole checkpoints at or before ``step``, newest first. A collective."""
        self.run.settle()
        found: list[int] = []
        there = [checkpoint.step_of(path) for path in checkpoint.steps(self.run.checkpoints)]
        for number in self.run.world.gather_objects(there)[0]:
            if number > step or len(found) == MERGED:
                continue
            if problem := self._problem(number):
                logger.warning("passed over a checkpoint: %s", problem)
            else:
                found.append(number)
        return found

    def _problem(self, number: int) -> str:
        """What is wrong with the checkpoint of this step; ranks read their shares of it. A collective."""
        world, problem = self.run.world, ""
        try:
            checkpoint.verify(checkpoint.folder_of(self.run.checkpoints, number), world.rank, world.size)
        except CheckpointError as error:
            problem = str(error)
        return next(filter(None, world.gather_objects(problem)), "")

    def _note(self, incident: Incident) -> None:
        """On disk before anything is done, by rank 0; told to people."""
        if self.run.world.is_main:
            records.append_incident(self.path, incident)
            logger.warning("%s", incident.paragraph(self.run.directory))
        self.incidents.append(replace(incident, findings=()))
        dist.barrier()

    def _advice(self, incident: Incident) -> str:
        name = "on_spike" if incident.kind == "spike" else "on_not_finite"
        if (policy := getattr(self.config, name)) in TAKEN:
            return (
                f"health.{name} is {policy} already, and that did not help: look at the learning rate and at the data "
                f"({self.path}); health.recoveries says how often it is tried."
            )
        return (
            f"The batch is in {self.path}. Started again, the run goes on from its newest checkpoint and meets the "
            f"batch again; health.{name}=skip leaves it out, rollback and merge go back before it."
        )

    # ------------------------------------------------------------ going back

    def _go_back(self, incident: Incident) -> None:
        reached = self.run.rollback(incident.to, incident.merged)
        if reached != incident.to:
            raise CheckpointError(f"the checkpoint of step {incident.to} was whole a moment ago, and now is not")
        self._back = incident.to

    def take_up(self) -> None:
        """Called by the run when it has looked for a checkpoint to resume from: repeats a recovery that no checkpoint
        knows of, and forgets what will be seen again. A collective."""
        here, redo = self.run.saved_step, None
        read = self._read() if here else []  # else all will be seen again
        kept = {incident.number: incident for incident in (*self.incidents, *read)} if here else {}
        for incident in kept.values():
            if incident.number > self._known and incident.to >= 0:
                redo = incident
        if redo is not None and self._can_repeat(redo):
            self._go_back(redo)
            here, self._back = redo.to, -1
        stay = [i for _, i in sorted(kept.items()) if i.action in TAKEN or i.step < here]
        self.incidents = [replace(incident, findings=()) for incident in stay]
        if self.run.world.is_main and (read or self.path.exists()):
            records.write_incidents(self.path, stay)  # without a torn line

    def _read(self) -> list[Incident]:
        """The file's incidents, on all ranks. A collective."""
        rows: list[Any] = []
        problem = ""
        if self.run.world.is_main:
            try:
                rows = [incident.to_json() for incident in records.read_incidents(self.path)]
            except ValueError as error:
                problem = str(error)
        rows, problem = self.run.world.gather_objects((rows, problem))[0]
        if problem:
            raise ValueError(problem)
        return [Incident.from_json(row) for row in rows]

    def _can_repeat(self, incident: Incident) -> bool:
        problem = "; ".join(filter(None, map(self._problem, sorted({incident.to, *incident.merged}))))
        if problem and self.run.world.is_main:
            logger.warning(
                "the %s of step %d cannot be repeated (%s): the run goes on from step %d as it was saved; the batches "
                "stay left out", incident.action, incident.step + 1, problem, self.run.saved_step,
            )  # fmt: skip
        return not problem

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Losses of late and the plans so far, in plain values."""
        plans = [i.to_json() for i in self.incidents if i.action in TAKEN]
        return {"known": self._number() - 1, "recent": list(self.spikes.recent), "plans": plans}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Losses as they were; of plans, those already known here stay known. Raises :class:`CheckpointError` for plans
        of another format."""
        try:
            plans = [Incident.from_json(row) for row in state["plans"]]
        except ValueError as error:
            told = "go on with the version that began the run, or delete its checkpoints to train anew"
            raise CheckpointError(f"the checkpoint's plans: {error}; {told}") from error
        self._known = int(state["known"])
        self.spikes.recent.clear()
        self.spikes.recent.extend(state["recent"])
        mine = {incident.number for incident in self.incidents}
        self.incidents += [i for i in plans if i.number not in mine]


def _forget(objective: Objective) -> None:
    if isinstance(objective, Forgets):
        objective.forget()


class CollectGarbage:
    """Run Python's collector every ``interval`` steps on all ranks at once, and not in between: a collection on one
    rank of many stalls them all (MegaScale, arXiv 2402.15627, section 6).

    From the first step on, what was set up is no longer looked at, which makes a collection cheap. The collector is as
    before after the last of ``steps``, and where this hook is let go of earlier, as after an error.
    """

    def __init__(self, interval: int = 100, steps: int | None = None):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval, self.steps = interval, steps
        self._restore: weakref.finalize | None = None

    def __call__(self, step: int, record: dict[str, float]) -> None:
        if self._restore is None and gc.isenabled():
            gc.collect()
            gc.freeze()
            gc.disable()
            self._restore = weakref.finalize(self, _enable)
        if step % self.interval == 0:
            gc.collect()
        if step == self.steps and self._restore is not None:
            self._restore()
            self._restore = None


def _enable() -> None:
    gc.unfreeze()
    gc.enable()
