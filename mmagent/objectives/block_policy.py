"""Reinforcement learning of models that say blocks.

What a block says at once has no log-probability token by token, so answers are asked for anew, from states that lead to
them. Where the steps are known that said an answer (:class:`~mmagent.trajectories.UnmaskingBatch`), one of every block
is drawn and its tokens are the targets: in expectation the log-probability of all steps, so that what is reinforced is
the way as well as the answer. Else (:class:`~mmagent.trajectories.PolicyBatch`, of any rollout) every token is asked
for once in each pair of complementary masks (coupled sampling of DiffuCoder, arXiv 2506.20639).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor, nn

from mmagent.losses.diffusion import diffusion_loss
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.noise import Copy, NoiseConfig, NoiseIds, Response, acted, generator, masked
from mmagent.objectives.noised import noised, responses
from mmagent.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig
from mmagent.trajectories import PolicyBatch, UnmaskingBatch
from mmagent.types import PackedBatch, ParamRole, Ratio, StepOutput
from mmagent.vocab import Vocab

Batch = PolicyBatch | UnmaskingBatch


@dataclass
class BlockPolicyConfig:
    """``copies`` of every answer are asked for, each from states of its own: pairs of complementary masks, or so many
    steps of every block."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    copies: int = 2
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1 or not self.noise.block:
            raise ValueError(
                f"policy: wants copies and blocks, got {self.copies} copies of blocks of {self.noise.block}"
            )


class BlockPolicyGradient(nn.Module):
    """Implements :class:`mmagent.protocols.Objective`: REINFORCE, the mean over trajectories of ``-A`` times the mean
    log-probability of their tokens. For what the model itself has just said: no ratio corrects for older weights. Noise
    is a function of what was said alone."""

    depths = 0
    shares_prompts = needs_reference = remembers = False
    critic = None

    def __init__(self, model: AgentModel, config: BlockPolicyConfig, ids: NoiseIds):
        super().__init__()
        self.model, self.config, self.ids = model, config, ids

    @property
    def weights(self) -> Mapping[str, float]:
        return {"policy": 1.0}

    def prepare(self, micro_batches: Sequence[Batch], forward: Callable[[Batch], StepOutput]) -> None:
        """Let the model's ranks agree who encodes which images, where they trade them."""
        self.model.prepare([batch.stream for batch in micro_batches])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Trajectories that said anything."""
        if batch.advantages is None:
            raise ValueError(f"pack of {batch.keys[:3]}...: a policy is reinforced by advantages, and there are none")
        said = sum(len(response.ids) > 0 for response in self._said(batch.stream))
        return {"policy": torch.tensor(said, device=batch.stream.labels.device)}

    def forward(self, batch: Batch) -> StepOutput:
        block = self.config.noise.block
        noisy = noised(batch.stream, self._said(batch.stream), self._corrupt(batch), ("policy",), block)
        output = self.model(noisy.stream, mtp=False, attend=noisy.attend)
        targets, head = noisy.stream.labels, self.model.head_weight
        loss = diffusion_loss(output.hidden, head, targets, noisy.weights, self.ids.barred, self.config.chunk)
        asked = noisy.weights["policy"] != 0
        many = asked.sum().float()
        metrics = {
            "entropy": Ratio((loss.entropy * asked).sum(), many),
            "asked_nll": Ratio((loss.nll * asked).sum(), many),
        }
        return StepOutput({"policy": loss.sums["policy"]}, metrics)

    def roles(self) -> Mapping[str, ParamRole]:
        return {f"model.{name}": role for name, role in self.model.roles().items()}

    def blocks(self) -> Iterable[nn.Module]:
        return self.model.blocks()

    def leaves(self) -> Iterable[nn.Module]:
        return self.model.leaves()

    def after_step(self) -> None:
        """Nothing: the routers' bias stays where supervised training left it."""

    def _said(self, stream: PackedBatch) -> list[Response]:
        return responses(stream, self.config.noise.block, self.config.noise.fill, self.ids.fill)

    def _corrupt(self, batch: Batch) -> Callable[[Response], list[Copy]]:
        assert batch.advantages is not None
        advantages = batch.advantages.cpu().numpy()
        order = batch.order.cpu().numpy() if isinstance(batch, UnmaskingBatch) else None

        def corrupt(response: Response) -> list[Copy]:
            rng = generator(self.config.noise.seed, response.key, response.ids.tobytes().hex(), 0)
            if not len(response.ids):
                return []
            if order is None:
                copies = [copy for _ in range(self.config.copies) for copy in self._pair(response, rng)]
            else:
                copies = [acted(response, self.ids, order[response.at], rng) for _ in range(self.config.copies)]
            return [self._weighed(response, copy, advantages) for copy in copies]

        return corrupt

    def _pair(self, response: Response, rng: np.random.Generator) -> list[Copy]:
        """Of complementary masks: each place is a target in one of the two."""
        first = masked(response, self.ids, self.config.noise.least, rng).weights > 0
        return [
            Copy("policy", np.where(hidden, self.ids.mask, response.ids), hidden.astype(np.float64))
            for hidden in (first, ~first)
        ]

    def _weighed(self, response: Response, copy: Copy, advantages: np.ndarray) -> Copy:
        """What lies behind the end of an answer was never said for good: it stays masked, and is no target."""
        share = advantages[response.at] / (self.config.copies * response.real.sum())
        return Copy(
            "policy",
            np.where(response.real, copy.ids, self.ids.mask),
            np.where(response.real, copy.weights * share, 0.0),
        )


def policy_objective(
    model: AgentModel, config: PolicyGradientConfig, vocab: Vocab
) -> PolicyGradient | BlockPolicyGradient:
    """Who reinforces ``model``: token by token, or by blocks where it denoises. Raises ``ValueError`` naming a setting
    that blocks do not have: what they said at once has no ratio that a loss could clip or a correction could weigh. Of
    a bidirectional model no turn can be asked without its seeing later ones: it is refused as well."""
    rows = model.config.vocab_size
    if not model.config.denoises:
        return PolicyGradient(model, config, vocab.barred(rows))
    if model.config.bidirectional:
        raise ValueError("policy: a bidirectional model cannot be reinforced; teach it blocks (objective.noise.block)")
    usual = PolicyGradientConfig()
    refused = [own.name for own in fields(config) if getattr(config, own.name) != getattr(usual, own.name)]
    if refused:
        raise ValueError(f"policy: {', '.join(refused)} cannot be had of a model that says blocks")
    ids = NoiseIds.of_vocab(vocab, rows)
    return BlockPolicyGradient(model, BlockPolicyConfig(NoiseConfig(model.config.denoises)), ids)
