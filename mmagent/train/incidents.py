"""Steps that were not taken as planned: what was found, where, in which documents, and what was done about it.

They stand in ``incidents.jsonl`` beside a run's checkpoints, one JSON object a line, on disk before anything is done:
what a run does next is a function of its checkpoint and of this file, so a run that is killed in the middle of a
recovery repeats it. To have a batch trained after all, delete its line and the checkpoints after it.
"""

from __future__ import annotations

import copyreg
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmagent.files import write_text
from mmagent.train.logs import read_jsonl

FORMAT = 2
"""Of a row. Those without a number are older, and do not say whether their steps count from 0 or from 1: a plan read
one step off would leave out other batches than those that were, so they are refused."""
TAKEN = ("skip", "rollback", "merge")
"""Actions that change what is trained on; ``warn`` and ``stop`` only tell."""


@dataclass(frozen=True)
class Finding:
    """What one micro-batch of one rank has to do with an incident. ``what`` is for people: ``lm is nan``."""

    rank: int
    micro_batch: int
    what: str
    documents: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"rank {self.rank}, micro-batch {self.micro_batch}: {self.what}; samples: {shortened(self.documents)}"


class Refused(FloatingPointError):
    """A step that must not be taken; raised on all ranks alike, before a weight has moved. ``kind`` is ``not_finite``
    or ``spike``; ``advice`` says what can be done."""

    def __init__(self, kind: str, reason: str, findings: Sequence[Finding], advice: str = "", most: int = 32):
        more = [f"and {len(findings) - most} more micro-batches"] if len(findings) > most else []
        super().__init__("\n".join([reason, *map(str, findings[:most]), *more, *filter(None, [advice])]))
        self.kind, self.reason, self.findings = kind, reason, tuple(findings)

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Incident:
    """``step`` counts from 0, as the loop does: the steps done before it; what people and files are told counts from 1,
    as all logs do. ``part`` is which of a step's updates it was (RL has several). ``number`` grows by one for every
    incident of a run.

    ``action``: ``warn``, ``stop``, ``skip`` (this batch was not trained on), ``rollback`` or ``merge``: back ``to`` a
    checkpoint, with the weights of ``merged`` averaged, the batches of the steps ``leaves_out`` (first and last) not
    trained on.
    """

    number: int
    step: int
    part: int
    kind: str
    reason: str
    action: str
    to: int = -1
    merged: tuple[int, ...] = ()
    leaves_out: tuple[int, int] = (0, -1)
    findings: tuple[Finding, ...] = field(default=(), repr=False)

    def covers(self, step: int, part: int | None) -> bool:
        """Whether it takes the update ``part`` of ``step`` out of training, or (None) all of the step."""
        if self.action == "skip":
            return (step, part) == (self.step, self.part)
        return self.leaves_out[0] <= step <= self.leaves_out[1]

    def paragraph(self, folder: Path, most: int = 3) -> str:
        """For people: what happened, in which documents, what was done, where to look."""
        done = {
            "warn": "Training goes on.",
            "stop": "Training stops here; no weight has moved in this step.",
            "skip": "The batch is left out: no weight moved, and training goes on with the next one.",
            "rollback": f"Back to the checkpoint of step {self.to}",
            "merge": f"Back to step {self.to}, with the average of the checkpoints {_listed(self.merged)} as weights",
        }[self.action]
        if self.action in ("rollback", "merge"):
            first, last = (n + 1 for n in self.leaves_out)
            which = f"batch of step {last} is" if first == last else f"batches of steps {first} to {last} are"
            done += f"; the {which} left out."
        told = "".join(f"\n  {finding}" for finding in self.findings[:most])
        if len(self.findings) > most:
            told += f"\n  and {len(self.findings) - most} more micro-batches"
        look = f"python tools/incidents.py {folder}  (--data FOLDER shows the documents themselves)"
        return f"step {self.step + 1}: {self.reason}.{told}\n{done} To look at them: {look}"

    def to_json(self) -> dict[str, Any]:
        """A row of a log: steps count from 1. Checkpoints (``to``, ``merged``) are called by the steps done."""
        first, last = self.leaves_out
        return {"format": FORMAT, **asdict(self), "step": self.step + 1, "leaves_out": (first + 1, last + 1)}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Incident:
        """Raises ``ValueError`` for a row of another :data:`FORMAT`."""
        row = dict(row)
        if (written := row.pop("format", "of before 2")) != FORMAT:
            raise ValueError(
                f"incident {row.get('number')} (step {row.get('step')}, {row.get('action')}) has the format {written}, "
                f"and this version reads {FORMAT}: it may count steps from another number, and leave out other batches"
            )
        findings = tuple(Finding(**{**f, "documents": tuple(f["documents"])}) for f in row["findings"])
        first, last = row["leaves_out"]
        found = {"step": row["step"] - 1, "leaves_out": (first - 1, last - 1), "merged": tuple(row["merged"])}
        return Incident(**{**row, **found, "findings": findings})


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def shortened(names: Sequence[str], limit: int = 16) -> str:
    """A few of ``names``, and how many more there are."""
    if not names:
        return "unnamed"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_incidents(path: Path) -> list[Incident]:
    """All incidents in the file; a torn last line is left out. Raises ``ValueError`` as
    :func:`~mmagent.train.logs.read_jsonl` does, and for rows of another format."""
    rows = read_jsonl(path)
    try:
        return [Incident.from_json(row) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Read it with the version that wrote it, or delete it") from error


def write_incidents(path: Path, incidents: Sequence[Incident]) -> None:
    """All of them anew, whole or not at all."""
    write_text(path, "".join(json.dumps(incident.to_json()) + "\n" for incident in incidents))


def append_incident(path: Path, incident: Incident) -> None:
    """One more, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(incident.to_json()) + "\n")
        file.flush()
        os.fsync(file.fileno())
