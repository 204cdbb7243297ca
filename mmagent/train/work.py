"""How ranks share the work of a step: packs dealt by what they cost this model, images encoded where there is time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from mmagent.balance import CostWeights
from mmagent.dealing import Dealt
from mmagent.dist import World
from mmagent.engine.config import EngineConfig
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import EncoderCost, cost_weights
from mmagent.models.vision_balance import VisionBalanceConfig, balance_vision


@dataclass
class WorkConfig:
    """``deal``: finished packs change ranks where the heaviest of all ranks gains at least ``min_gain`` by it (a stream
    deals within its small groups before, without traffic). ``vision``: encoder work alone moves. ``weights``: measured
    ones (:func:`mmagent.balance.fit_weights`) in place of counted operations; a ``vision`` on ``auto`` then wants its
    ``operations_per_byte`` in the same unit a byte."""

    deal: bool = True
    min_gain: float = 0.02
    weights: CostWeights | None = None
    vision: VisionBalanceConfig = field(default_factory=VisionBalanceConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"work.min_gain {self.min_gain} must lie in [0, 1)")


class Work:
    """``weights``: what packs cost ``model`` while ``frozen`` roles do not learn and those in ``recompute`` compute
    their activations twice; ``engine`` says where its ranks wait for one another. From now on the model's ranks trade
    images. Made by all ranks."""

    def __init__(
        self,
        config: WorkConfig,
        engine: EngineConfig,
        model: AgentModel,
        world: World,
        frozen: Collection[str] = (),
        recompute: Collection[str] = (),
    ):
        self.config, self.world, self.meets = config, world, engine.meets_in_micro_batches
        counted = cost_weights(model.config, frozen, recompute, EncoderCost.of(model.encoder))
        self.weights = config.weights or counted
        model.images = balance_vision(config.vision, world, self.weights, int(model.encoder.merge_size), self.meets)

    @property
    def dealing(self) -> dict[str, Any]:
        """Settings of :func:`~mmagent.agent.batching.rank_batches`, where there is no stream."""
        weights = self.weights if self.config.deal else None
        return {"weights": weights, "min_gain": self.config.min_gain, "meets": self.meets}

    def dealt(self, stream: Any) -> Iterator[Any]:
        """``stream``, its packs dealt over all ranks. Its state stays where it is."""
        if not self.config.deal or self.world.size == 1:
            return stream
        return Dealt(stream, self.world, self.weights, self.config.min_gain, self.meets)
