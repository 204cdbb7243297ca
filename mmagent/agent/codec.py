"""Between an environment's observations and a policy's tokens: token in, token out, pixels included.

A trajectory only ever grows. What was sampled is kept as it was sampled and never tokenised again; the text that
an environment receives is derived from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmagent.chat import (
    Box,
    ChatConfig,
    Tool,
    completion_text,
    forced_answer,
    json_text,
    next_turn,
    observation,
    render,
    still_thinking,
    user,
)
from mmagent.geometry import GeometryConfig, patchify, visual_tokens
from mmagent.prompts import shown, system_prompt
from mmagent.replies import parse_reply
from mmagent.trajectories import Observation, Trajectory
from mmagent.types import PatchedImage
from mmagent.vocab import Vocab

REMEMBERED = 64
"""Screens whose patches are kept: all rollouts of a group look at the same first one."""


class Codec:
    """``vocab``, image ``geometry`` and ``chat`` template of one policy; ``rules`` become a system message, ``tools``
    are declared before it.

    A trajectory only grows, so what a policy thought stays in its context when a user speaks again, where the template
    would drop it. ``codec.chat`` says so (``preserve_thinking``): save a policy with it, and servers show it the
    contexts that it was trained on.
    """

    def __init__(
        self,
        vocab: Vocab,
        geometry: GeometryConfig,
        chat: ChatConfig | None = None,
        *,
        rules: str = "",
        tools: Sequence[Tool] = (),
    ):
        chat = chat or ChatConfig()
        self.vocab, self.geometry = vocab, geometry
        self.chat = replace(chat, preserve_thinking=chat.preserve_thinking or chat.thinking)
        self.rules, self.tools = rules, tuple(tools)
        self._patched: OrderedDict[int, tuple[object, PatchedImage]] = OrderedDict()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a policy's turn."""
        return self.vocab.stop_ids

    def open(self, trajectory: Trajectory, seen: Observation) -> None:
        """Write the first observation, and the opening of the policy's turn."""
        images = [self.patch(image) for image in seen.images]
        messages = [system_prompt(self.rules)] if self.rules else []
        messages.append(user(*shown(seen)))
        ids = render(messages, self.vocab, self._tokens(images), self.chat, tools=self.tools, generate=True).ids
        trajectory.extend(ids, trainable=False, images=images)

    def reply(self, trajectory: Trajectory, seen: Observation) -> None:
        """Write a later observation behind what the policy said, and the opening of its next turn.

        It is a tool's answer where the policy called one, else a turn of the user.
        """
        images = [self.patch(image) for image in seen.images]
        parts = shown(seen)
        last = trajectory.input_ids[-1]
        roles = {self.vocab.id(f"<|{role}|>"): role for role in ("user", "observation")}
        called = bool(parse_reply(self.turns(trajectory)[-1], self.vocab, self.chat).calls)
        role = roles.get(last, "observation" if called else "user")
        message = observation(*parts) if role == "observation" else user(*parts)
        ids = next_turn(message, self.vocab, self._tokens(images), self.chat, role_sampled=last in roles)
        trajectory.extend(ids, trainable=False, images=images)

    def text(self, ids: Sequence[int]) -> str:
        """What a completion says to the environment: without thinking and control tokens, and of an answer in a box
        what the box holds alone. Who says more than one box has not said which is meant: all of the text is judged.

        Calls of tools follow the text, one JSON object ``{"name": ..., "arguments": {...}}`` a line, argument values
        as the texts they are; nothing is made of a malformed one.
        """
        reply = parse_reply(ids, self.vocab, self.chat)
        if reply.problem or not reply.calls:
            boxes = [] if reply.problem else [part.text for part in reply.said if isinstance(part, Box)]
            return boxes[0].strip() if len(boxes) == 1 else completion_text(ids, self.vocab, self.chat)
        calls = [json_text({"name": call.name, "arguments": dict(call.arguments)}) for call in reply.calls]
        return "\n".join([reply.text, *calls] if reply.text else calls)

    def answers(self, ids: Sequence[int]) -> bool:
        """Whether a completion, perhaps a cut one, is past its thinking."""
        return not still_thinking(ids, self.vocab, self.chat)

    def force_answer(self, trajectory: Trajectory) -> list[int]:
        """End the thinking at the end of ``trajectory``: the policy goes on with its answer. Returns what was written,
        which is not trained on."""
        ids = forced_answer(self.vocab)
        trajectory.extend(ids, trainable=False)
        return ids

    def turns(self, trajectory: Trajectory) -> list[list[int]]:
        """The ids of every turn that the policy took, an end of thinking that was forced on it included."""
        forced = forced_answer(self.vocab)
        turns: list[list[int]] = []
        read: list[int] = []  # since the policy last spoke
        for token, sampled in zip(trajectory.input_ids, trajectory.trainable, strict=True):
            if not sampled:
                read.append(token)
                continue
            if not turns or read not in ([], forced):
                turns.append([])
            elif read:
                turns[-1] += forced
            turns[-1].append(token)
            read = []
        return [*turns[:-1], turns[-1] + forced] if turns and read == forced else turns

    def actions(self, trajectory: Trajectory) -> list[str]:
        """The text of every turn that the policy took."""
        return [self.text(ids) for ids in self.turns(trajectory)]

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
