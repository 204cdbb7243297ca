"""What tests of diffusion share: a plain reading of who sees whom, written apart from the library's."""

from __future__ import annotations

import torch
from torch import Tensor

from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.noise import NoiseIds
from mmagent.types import IGNORE
from tests.model_kit import make_document, make_pack

MASK, FILL, ROWS = 2, 3, 24
IDS = NoiseIds.of(MASK, FILL, ROWS, barred=(0, 1))


def make_model(rows: int = ROWS, seed: int = 0) -> AgentModel:
    """One that is sure of something: a head of small weights would say all tokens alike."""
    torch.manual_seed(seed)
    model = AgentModel(presets.debug(vocab_size=rows)).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
        model.head_weight.mul_(8)
    return model


def with_response(document: dict, first: int, last: int) -> dict:
    """The text of places ``first`` to ``last`` is the response, and nothing else."""
    labels = torch.full_like(document["labels"], IGNORE)
    labels[first:last] = document["ids"][first:last]
    ids = document["ids"].clone()
    ids[(ids == MASK) | (ids == FILL)] = FILL + 1
    labels = torch.where(labels == IGNORE, labels, ids)
    return {**document, "ids": ids, "labels": labels}


def documents() -> list[dict]:
    """A picture in the prompt, a text, two responses in one."""
    one = with_response(make_document([4, (1, 2, 4), 12], 0, ROWS), 9, 18)
    two = with_response(make_document([11], 1, ROWS), 3, 11)
    three = with_response(make_document([16], 2, ROWS), 2, 7)
    three["labels"][10:14] = three["ids"][10:14]
    return [one, two, three]


def naive_blocks(labels: Tensor, block: int) -> list[int]:
    """The block of each token, counted one by one."""
    out, number, inside = [], -1, 0
    for label in labels.tolist():
        inside = 0 if label == IGNORE else inside + 1
        if label == IGNORE or (inside - 1) % block == 0:
            number += 1
        out.append(number)
    return out


class NaiveAttention:
    """``seen[i][j]`` says who sees whom; a softmax a row and head."""

    def __init__(self, seen: list[list[bool]]):
        self.seen = torch.tensor(seen)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("ihd,jhd->hij", q, keys) / q.shape[-1] ** 0.5
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(~self.seen, -torch.inf).softmax(-1), values)


@torch.no_grad()
def predict(model: AgentModel, document: dict, blocks: list[int], ids: Tensor, positions: Tensor) -> Tensor:
    """``(L, V)`` log-probabilities of a sequence that is alone, tokens seeing their block and those before."""
    alone = make_pack([{**document, "ids": ids, "labels": torch.full_like(ids, IGNORE), "positions": positions}])
    seen = [[theirs <= mine for theirs in blocks] for mine in blocks]
    hidden = model.hidden(model.embed(alone), positions, NaiveAttention(seen))
    logits = hidden @ model.head_weight.T
    logits[:, list(IDS.barred)] = -torch.inf
    return logits.log_softmax(-1)
