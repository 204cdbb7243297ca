"""Any OpenAI-compatible chat endpoint as the one who is judged: same screens, same words, same scoring.

The conversation is built from the environment's observations by `mmagent.prompts`, exactly as for a local model;
a model that was never trained on our format is told the rules once, as system message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from evals.suite import Play, Played
from mmagent.chat import Image, Part, Text, Video
from mmagent.generation.http import ChatClient, ServerConfig, answered, image_part, visible
from mmagent.geometry import GeometryConfig, fit, resize
from mmagent.prompts import shown
from mmagent.protocols import Task
from mmagent.trajectories import Item, Limits, Observation, Status, Trajectory


@dataclass
class EndpointConfig(ServerConfig):
    """Screens are resized by ``geometry`` before they are sent; points are thousandths, so no coordinate depends on
    it."""

    geometry: GeometryConfig = field(default_factory=GeometryConfig)


class EndpointAgent:
    """Plays episodes over ``POST {url}/chat/completions``; an :class:`evals.suite.Agent`."""

    def __init__(self, config: EndpointConfig):
        self.config = config
        self.client = ChatClient(config)

    def pins(self) -> Mapping[str, str]:
        return {
            "policy.model": self.config.model,
            "policy.url": self.config.url,
            "image_geometry": describe_geometry(self.config.geometry),
            "chat": "openai chat completions",
        }

    async def play(self, task: Task, item: Item, play: Play) -> Played:
        """One episode. Raises :class:`EndpointUnavailable` or :class:`EndpointRefused`."""
        environment = task.environment(item)
        trajectory = Trajectory(item.key, task.name)
        messages: list[dict[str, Any]] = [{"role": "system", "content": play.rules}] if play.rules else []
        limits = Limits(play.max_tokens, play.temperature, play.top_p, seed=play.seed)
        words: list[str] = []
        try:
            seen, cut = await environment.reset(), False
            for _ in range(play.max_steps):
                messages.append({"role": "user", "content": self._content(seen)})
                answer = await self.client.ask(messages, limits)
                # ids of a foreign vocabulary are unknown; the trajectory carries their count alone
                trajectory.extend([0] * max(answer.prompt_tokens - len(trajectory), 0), trainable=False)
                trajectory.extend([0] * answer.tokens, trainable=True, logprobs=[0.0] * answer.tokens)
                words.append(answer.text)
                cut = answer.cut
                if cut and not (seen.takes_cut and answered(answer.text)):  # half a sentence is no action
                    break
                messages.append({"role": "assistant", "content": answer.text})
                seen = await environment.step(visible(answer.text))
                trajectory.reward = trajectory.reward if seen.reward is None else seen.reward
                trajectory.parts.update(seen.parts)
                if seen.done or cut:
                    break
            trajectory.status = Status.FINISHED if seen.done and not cut else Status.TRUNCATED
            return Played(trajectory, words)
        finally:
            await environment.close()

    def _content(self, seen: Observation) -> list[dict[str, Any]]:
        images = iter(seen.images)
        return [sent for part in shown(seen) for sent in self._sent(part, images)]

    def _sent(self, part: Part, images: Iterator[np.ndarray]) -> list[dict[str, Any]]:
        """A part as the API takes it; a video as its frames, each with the time that the chat format writes behind."""
        match part:
            case Text(text):
                return [{"type": "text", "text": text}]
            case Image():
                pixels = next(images)
                return [image_part(resize(pixels, *fit(*pixels.shape[:2], self.config.geometry)))]
            case Video(timestamps):
                frames = [part for t in timestamps for part in (Image(), Text(f"{t:.1f} seconds"))]
                return [sent for part in frames for sent in self._sent(part, images)]
        raise ValueError(f"{type(part).__name__} cannot be sent to an endpoint")


def describe_geometry(geometry: GeometryConfig) -> str:
    """One line for the pins: how a screen becomes patches."""
    values = asdict(geometry).items()
    return ", ".join(f"{name} {' '.join(f'{v:g}' for v in np.ravel(value))}" for name, value in values)
