"""Noise for discrete diffusion: what becomes of a response before a model is asked for it.

Two kinds, after LLaDA (arXiv 2502.09992) and Seed Diffusion (arXiv 2508.02193):

- *masks*: each token becomes the mask with probability ``p``. With ``p`` uniform, the sum over masked tokens of the
  cross-entropy, each weighed by ``1 / p``, bounds the negative log-likelihood from above in expectation. The same bound
  has less variance where exactly ``l`` of ``n`` tokens are masked, ``l`` uniform in 1 ... n, and weighed by ``n / l``:
  likelihoods are evaluated so;
- *edits*: some tokens are substituted, inserted and deleted, and the model is asked for all of the response: so it
  learns to doubt what it sees. An insertion and a deletion come in pairs, so that every place keeps its target.

Everything is drawn from a seed made of the document's key, so that noise does not depend on what shares its pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mmagent.dist import stable_seed
from mmagent.vocab import Vocab


@dataclass
class NoiseConfig:
    """``block`` tokens of a response are denoised together behind their clean past; 0: all of a document at once, every
    token seeing every other (LLaDA). ``fill``: what a response lacks to whole blocks is there as places whose target is
    the end of the text, as it is for a decoder that does not know where an answer ends. Where all is denoised at once,
    that is what the response which ends a document lacks to a multiple of ``span`` places; 0: nothing, so the number of
    masks gives its length away. ``least``: the smallest chance of a token to be masked. ``edits``: the largest share of
    a response that an edited copy changes."""

    block: int = 16
    span: int = 0
    fill: bool = True
    least: float = 1e-3
    edits: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError(f"noise.block {self.block} must not be negative")
        if self.span < 0 or (self.span and self.block):
            raise ValueError(f"noise.span {self.span} must not be negative, and goes with block 0, not {self.block}")
        if not 0 < self.least <= 1:
            raise ValueError(f"noise.least {self.least} must lie in (0, 1]: the weight of a token is its inverse")
        if not 0 <= self.edits <= 1:
            raise ValueError(f"noise.edits {self.edits} is no share of a response")


@dataclass(frozen=True)
class NoiseIds:
    """``mask`` stands for what is to be said, ``fill`` behind the end of a response. ``barred`` ids are never
    predicted, the mask among them; ``others`` are those that an edit may put in. ``ends``: ids that a response ends
    with; one that ends with another was cut, or goes on behind a picture. None: all responses are whole."""

    mask: int
    fill: int
    barred: tuple[int, ...]
    others: np.ndarray
    ends: tuple[int, ...] = ()

    @classmethod
    def of_vocab(cls, vocab: Vocab, rows: int) -> NoiseIds:
        """The mask that pads packs, and the end of a text; edits put in what a policy may say. What documents teach
        beside that stays possible: only the mask is never predicted."""
        ids = cls.of(vocab.pad_id, vocab.end_id, rows)
        return replace(ids, others=np.setdiff1d(ids.others, vocab.barred(rows)), ends=vocab.stop_ids)

    @classmethod
    def of(cls, mask: int, fill: int, rows: int, barred: tuple[int, ...] = ()) -> NoiseIds:
        """For a table of ``rows`` ids. ``ValueError`` for a mask that is no row of it, or is the fill."""
        if not 0 <= mask < rows or not 0 <= fill < rows or mask == fill:
            raise ValueError(f"mask {mask} and fill {fill} must be two ids of a table of {rows}")
        never = tuple(sorted({*barred, mask}))
        if fill in never:
            raise ValueError(f"fill {fill} can never be predicted: it is barred")
        return cls(mask, fill, never, np.setdiff1d(np.arange(rows), never))


class Response(NamedTuple):
    """What is to be said in one document, R places: ``ids (R,)`` the targets, ``unit (R,)`` the block of each place (0
    for all where there are none), ``run (R,)`` of which piece of the response it is, ``real (R,)`` false for places
    behind its end, ``at (R,)`` the row in the pack (of the last token before, where not real)."""

    key: str
    ids: np.ndarray
    unit: np.ndarray
    run: np.ndarray
    real: np.ndarray
    at: np.ndarray


class Copy(NamedTuple):
    """A response as the model sees it: ``ids (R,)``, and how much each place's target ``weights (R,)``, 0 for nothing.
    ``term``: the sum of the loss that it belongs to."""

    term: str
    ids: np.ndarray
    weights: np.ndarray


class Draws:
    """How many steps have drawn noise; the same document gets other noise every step. A part of a run's state, so that
    a run which goes on draws what it would have drawn."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])


def generator(seed: int, key: str, what: str, draw: int) -> np.random.Generator:
    """Of one document's noise."""
    return np.random.default_rng(stable_seed("noise", seed, key, what, draw))


def masked(response: Response, ids: NoiseIds, least: float, rng: np.random.Generator) -> Copy:
    """Every place masked with the chance of its unit. Chances are uniform in [``least``, 1] and, over the units of a
    response, spread evenly: each is uniform by itself, and their mean varies less."""
    units, index = np.unique(response.unit, return_inverse=True)
    times = (rng.random() + rng.permutation(len(units)) / max(len(units), 1)) % 1.0
    chance = (least + (1 - least) * times)[index]
    hidden = rng.random(len(chance)) < chance
    return Copy("mask", np.where(hidden, ids.mask, response.ids), np.where(hidden, 1.0 / chance, 0.0))


def exactly_masked(response: Response, ids: NoiseIds, rng: np.random.Generator) -> Copy:
    """Of every unit of n places exactly l masked, l uniform in 1 ... n, each weighed by n / l."""
    weights = np.zeros(len(response.ids))
    for unit in np.unique(response.unit):
        places = np.flatnonzero(response.unit == unit)
        many = int(rng.integers(1, len(places) + 1))
        weights[rng.permutation(places)[:many]] = len(places) / many
    return Copy("mask", np.where(weights > 0, ids.mask, response.ids), weights)


def edited(response: Response, ids: NoiseIds, most: float, rng: np.random.Generator) -> Copy:
    """``floor(n * share)`` operations on the n real places, the share uniform in [0, ``most``]: substitutions, and
    pairs of a deletion and an insertion within a unit, such that each of the three kinds is as frequent. All places,
    those behind the end as well, are targets of weight 1."""
    seen = response.ids.copy()
    real = np.flatnonzero(response.real)
    left = int(len(real) * rng.random() * most)
    while left:
        at = int(rng.choice(real))
        same = real[(response.unit[real] == response.unit[at]) & (response.run[real] == response.run[at])]
        new = int(rng.choice(ids.others))
        if left == 1 or len(same) < 2 or rng.random() < 0.5:
            seen[at] = new
            left -= 1
            continue
        piece = seen[same].tolist()
        del piece[int(at - same[0])]
        piece.insert(int(rng.integers(len(same))), new)
        seen[same] = piece
        left -= 2
    return Copy("edit", seen, np.ones(len(seen)))


def revealed(response: Response, ids: NoiseIds, order: np.ndarray, rng: np.random.Generator) -> Copy:
    """A state of a known way to the response: ``order (R,)`` says at which step of its unit each place was revealed. A
    step of every unit is drawn evenly, and what it and later ones reveal is masked. Targets are what is masked, so that
    a state with more to say weighs no more: 1 / masked places, times the places of the unit."""
    weights = np.zeros(len(response.ids))
    for unit in np.unique(response.unit):
        places = np.flatnonzero(response.unit == unit)
        hidden = places[order[places] >= rng.choice(np.unique(order[places]))]
        weights[hidden] = len(places) / len(hidden)
    return Copy("mask", np.where(weights > 0, ids.mask, response.ids), weights)


def acted(response: Response, ids: NoiseIds, order: np.ndarray, rng: np.random.Generator) -> Copy:
    """A step of a known way, to be made likelier or less likely: a step of every unit is drawn evenly, what it and
    later ones reveal is masked, and what it reveals is the target, weighed by the unit's steps. In expectation that is
    the log-probability of all steps."""
    seen, weights = response.ids.copy(), np.zeros(len(response.ids))
    for unit in np.unique(response.unit):
        places = np.flatnonzero(response.unit == unit)
        steps = np.unique(order[places])
        step = rng.choice(steps)
        seen[places[order[places] >= step]] = ids.mask
        weights[places[order[places] == step]] = len(steps)
    return Copy("policy", seen, weights)
