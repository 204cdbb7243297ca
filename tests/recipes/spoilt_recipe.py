"""Supervised fine-tuning in which the last rank's loss of one step is NaN, however often that step is taken: for
test_recovery.py, which launches it as users launch the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mmagent.objectives.language_modeling import LanguageModeling
from mmagent.train.launch import launch
from mmagent.train.run import Run
from mmagent.types import PackedBatch, StepOutput
from recipes import language_stage, sft

BAD = 5
"""Counted from 0."""
runs: list[Run] = []


class Spoilt(LanguageModeling):
    """Spoils what the run that trains it is about to learn."""

    def forward(self, batch: PackedBatch) -> StepOutput:
        output, world = super().forward(batch), runs[-1].world
        if runs[-1].segments.step != BAD + 1 or world.rank + 1 < world.size:
            return output
        return replace(output, sums={name: value * math.nan for name, value in output.sums.items()})


def noting(fit: Callable[..., None]) -> Callable[..., None]:
    def noted(run: Run, *rest: Any, **named: Any) -> None:
        runs.append(run)
        fit(run, *rest, **named)

    return noted


if __name__ == "__main__":
    language_stage.LanguageModeling = Spoilt  # type: ignore[misc]
    language_stage.fit = noting(language_stage.fit)
    launch(sft.main)
