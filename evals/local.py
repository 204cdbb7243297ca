"""A trained checkpoint, or the model of a running training, as the one who is judged: in process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evals.endpoint import describe_geometry
from evals.suite import Play, Played
from mmagent.agent.codec import Codec
from mmagent.agent.rollout import Episode, RolloutConfig, run_freely
from mmagent.generation.block_decoding import make_generator
from mmagent.generation.generator import GeneratorConfig
from mmagent.generation.local import LocalPolicy
from mmagent.interop.agent_folder import Agent, fingerprint, load_agent
from mmagent.ops.devices import chosen_device
from mmagent.protocols import Task
from mmagent.trajectories import Item, Trajectory


class LocalAgent:
    """Plays episodes with the rollouts that training uses, through the local generator; an :class:`evals.suite.Agent`.

    ``name`` says whose weights these are. Episodes end at ``max_context`` tokens.
    """

    def __init__(self, agent: Agent, name: str, *, generator: GeneratorConfig | None = None, max_context: int = 8192):
        self.codec = Codec(agent.vocab, agent.geometry, agent.chat)
        self.generator = make_generator(agent.model, agent.vocab, generator)
        self._pins = {
            "policy.checkpoint": name,
            "image_geometry": describe_geometry(agent.geometry),
            "chat": f"{agent.chat.generation.value}, thinking {'on' if agent.chat.thinking else 'off'}",
        }
        self._max_context = max_context
        self._policy: LocalPolicy | None = None

    @classmethod
    def load(cls, folder: Path | str, *, device: str | None = None, dtype: str | None = None) -> LocalAgent:
        """The agent in ``folder``, on ``device`` (default: a GPU if there is one), decoding in ``dtype`` (bfloat16 on a
        GPU, else float32). Raises ``ValueError`` naming what is missing, or a device that is not here."""
        device = chosen_device(device)
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        agent = load_agent(folder)
        agent.model.to(device)
        name = f"{Path(folder).resolve().name} ({fingerprint(folder)}, {dtype})"
        return cls(agent, name, generator=GeneratorConfig(dtype=dtype))

    def pins(self) -> Mapping[str, str]:
        return self._pins

    async def play(self, task: Task, item: Item, play: Play) -> Played:
        config = RolloutConfig(
            group_size=1,
            max_steps=play.max_steps,
            max_tokens=play.max_tokens,
            max_context=self._max_context,
            temperature=play.temperature,
            top_p=play.top_p,
        )
        trajectory = Trajectory(item.key, task.name)
        episode = Episode(task, item, self.codec, config, trajectory, play.seed)
        await run_freely([episode], self._policy_here(), 1)
        return Played(trajectory, self._words(trajectory))

    def _policy_here(self) -> LocalPolicy:
        """One policy for all episodes: what they ask at the same time is decoded together."""
        if self._policy is None:
            self._policy = LocalPolicy(self.generator)
        return self._policy

    def _words(self, trajectory: Trajectory) -> list[str]:
        return [self.codec.vocab.decode(turn) for turn in self.codec.turns(trajectory)]
