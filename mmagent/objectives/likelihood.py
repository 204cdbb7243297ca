"""How likely a model of blocks finds responses: a bound on the negative log-likelihood, with little variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmagent.losses.diffusion import diffusion_loss
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.noise import NoiseConfig, NoiseIds, Response, exactly_masked, generator
from mmagent.objectives.noised import noised, responses
from mmagent.types import PackedBatch


@torch.no_grad()
def likelihood_bound(
    model: AgentModel, batch: PackedBatch, ids: NoiseIds, noise: NoiseConfig, draws: int = 16, together: int = 4
) -> tuple[Tensor, Tensor]:
    """``(N,)`` float64 nats of each document's response, and the standard error of each over ``draws``.

    The mean over draws of ``n / l`` times the cross-entropy of exactly ``l`` of a block's ``n`` places, ``l`` uniform:
    without bias the mean over all orders of saying the block one token at a time, of the negative log-probability of
    saying it so. By blocks the sum of that over blocks, each behind its clean past. With ``noise.fill`` the end of the
    response belongs to what is said. ``together`` draws share a forward, in which the clean text stands once. Raises
    ``ValueError`` for fewer than two draws, which have no spread.
    """
    if draws < 2 or together < 1:
        raise ValueError(f"likelihood: {draws} draws, {together} together; a spread wants two draws at least")
    was, found = model.training, []
    model.eval()
    try:
        for first in range(0, draws, together):
            found += _nats(model, batch, ids, noise, range(first, min(first + together, draws)))
    finally:
        model.train(was)
    each = torch.stack(found)
    return each.mean(0), each.std(0) / draws**0.5


def _nats(
    model: AgentModel, batch: PackedBatch, ids: NoiseIds, noise: NoiseConfig, draws: Sequence[int]
) -> list[Tensor]:
    """Of each draw ``(N,)``."""
    terms = [f"draw {draw}" for draw in draws]

    def corrupt(response: Response) -> list:
        return [
            exactly_masked(response, ids, generator(noise.seed, response.key, "likelihood", draw))._replace(term=term)
            for draw, term in zip(draws, terms, strict=True)
        ]

    said = responses(batch, noise.block, noise.fill, ids.fill, noise.span, ids.ends)
    noisy = noised(batch, said, corrupt, terms, noise.block)
    output = model(noisy.stream, mtp=False, attend=noisy.attend)
    loss = diffusion_loss(output.hidden, model.head_weight, noisy.stream.labels, noisy.weights, ids.barred)
    owner = batch.segments.ids()[noisy.rows]
    nothing = torch.zeros(len(batch.segments), dtype=torch.float64, device=owner.device)
    return [
        nothing.index_add(0, owner, (loss.nll * noisy.weights[term]).double())[: len(batch.keys)].cpu()
        for term in terms
    ]
