"""Between an environment's observations and a policy's tokens: token in, token out, pixels included.

A trajectory only ever grows. What was sampled is kept as it was sampled and never tokenised again; the text that
an environment receives is derived from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mmagent.chat import ChatConfig, completion_text, next_turn, render, user
from mmagent.geometry import GeometryConfig, patchify, visual_tokens
from mmagent.prompts import system_prompt, turn
from mmagent.types import Observation, PatchedImage, Trajectory
from mmagent.vocab import Vocab

REMEMBERED = 64
"""Screens whose patches are kept: all rollouts of a group look at the same first one."""


class Codec:
    """``vocab``, image ``geometry`` and ``chat`` template of one policy; ``rules`` become a system message."""

    def __init__(self, vocab: Vocab, geometry: GeometryConfig, chat: ChatConfig | None = None, *, rules: str = ""):
        self.vocab, self.geometry, self.chat, self.rules = vocab, geometry, chat or ChatConfig(), rules
        self._patched: OrderedDict[int, tuple[object, PatchedImage]] = OrderedDict()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a policy's turn."""
        return self.vocab.stop_ids

    def open(self, trajectory: Trajectory, seen: Observation) -> None:
        """Write the first observation, and the opening of the policy's turn."""
        images = [self.patch(image) for image in seen.images]
        messages = [system_prompt(self.rules)] if self.rules else []
        messages.append(user(*turn(seen.text, len(images))))
        ids = render(messages, self.vocab, self._tokens(images), self.chat, generate=True).ids
        trajectory.extend(ids, trainable=False, images=images)

    def reply(self, trajectory: Trajectory, seen: Observation) -> None:
        """Write a later observation behind what the policy said, and the opening of its next turn."""
        images = [self.patch(image) for image in seen.images]
        message = user(*turn(seen.text, len(images)))
        said = trajectory.input_ids[-1] == self.vocab.id("<|user|>")
        ids = next_turn(message, self.vocab, self._tokens(images), self.chat, role_sampled=said)
        trajectory.extend(ids, trainable=False, images=images)

    def text(self, ids: Sequence[int]) -> str:
        """What a completion says to the environment: without thinking and control tokens."""
        return completion_text(ids, self.vocab)

    def answers(self, ids: Sequence[int]) -> bool:
        """Whether a completion, perhaps a cut one, is past its thinking."""
        return not self.chat.thinking or self.vocab.id("</think>") in ids

    def actions(self, trajectory: Trajectory) -> list[str]:
        """The text of every turn that the policy took."""
        spans: list[list[int]] = []
        before = False
        for token, sampled in zip(trajectory.input_ids, trajectory.trainable, strict=True):
            if sampled and not before:
                spans.append([])
            if sampled:
                spans[-1].append(token)
            before = sampled
        return [self.text(span) for span in spans]

    def patch(self, pixels: object) -> PatchedImage:
        """Patches of a screen. The same array gives the same object, so that a group shares one image."""
        if not isinstance(pixels, np.ndarray):
            raise ValueError(f"an observation's image must be a (height, width, 3) array, got {type(pixels).__name__}")
        known = self._patched.get(id(pixels))
        if known is None:
            known = self._patched[id(pixels)] = (pixels, patchify(pixels, self.geometry))
            if len(self._patched) > REMEMBERED:
                self._patched.popitem(last=False)
        return known[1]

    def _tokens(self, images: Sequence[PatchedImage]) -> list[int]:
        return [visual_tokens(image.grid, self.geometry.merge_size) for image in images]
