"""When to prune: stages of a run, pure functions of the step, so that nothing has to be saved or restored."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmagent.sparsity.patterns import PatternConfig


@dataclass
class SparsityConfig:
    """What a run prunes to, and when. ``levels``: sparsities in [0, 1), rising, one a stage; empty prunes nothing.
    ``score`` steps pass before the first, to score by (and, of a model that is new, to learn first), then ``steps`` of
    fine-tuning follow every level, and score for the next. ``roles``: whose matrices; empty for all that have blocks.
    """

    levels: list[float] = field(default_factory=list)
    score: int = 100
    steps: int = 100
    roles: list[str] = field(default_factory=list)
    pattern: PatternConfig = field(default_factory=PatternConfig)

    def __post_init__(self) -> None:
        if any(not 0.0 < level < 1.0 for level in self.levels) or sorted(set(self.levels)) != self.levels:
            raise ValueError(f"sparsity.levels must rise, each between 0 and 1; got {self.levels}")
        if self.score < 1 or self.steps < 1:
            raise ValueError(f"sparsity.score and sparsity.steps must be at least 1, got {self.score}, {self.steps}")
        if self.pattern.pattern == "2:4" and self.levels not in ([], [0.5]):
            raise ValueError(f"sparsity.levels: 2:4 keeps two of four, its levels are [0.5] and not {self.levels}")
        if self.pattern.pattern == "tile-element" and self.levels and self.levels[-1] + self.pattern.delta >= 1.0:
            raise ValueError(
                f"sparsity.levels: {self.levels[-1]} and delta {self.pattern.delta} leave nothing to tiles"
            )

    @property
    def total(self) -> int:
        """Steps of the run that ends with the fine-tuning of its last level; 0 where nothing is pruned."""
        return self.score + self.steps * len(self.levels) if self.levels else 0

    def within(self, steps: int) -> SparsityConfig:
        """Itself. Raises ``ValueError`` where a run of ``steps`` ends before the last level and its fine-tuning."""
        if steps < self.total:
            raise ValueError(
                f"sparsity: {self.score} steps to score and {self.steps} after each of {len(self.levels)} levels are "
                f"{self.total}, the run has {steps}"
            )
        return self

    def stage(self, step: int) -> int:
        """How many levels are reached once ``step`` steps are done."""
        if step < self.score:
            return 0
        return min((step - self.score) // self.steps + 1, len(self.levels))
