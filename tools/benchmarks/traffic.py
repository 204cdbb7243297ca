"""What the benchmark of generation serves: an agent, the same as a model of transformers, and requests of agents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import nn

from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig, patchify, visual_tokens
from mmagent.interop.agent_folder import Agent
from mmagent.interop.conversion import export_model
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.mtp import MTPConfig
from mmagent.trajectories import Limits, Trajectory
from mmagent.types import PatchedImage
from mmagent.vocab import Vocab

ROOT = Path(__file__).resolve().parents[2]
STOCK, HUB = "glm4v_moe", "hub"
DEVIATION = 0.8
"""Of the logarithm of lengths, of prompts and of outputs."""
GEOMETRY = GeometryConfig(min_tokens=4)
ASPECTS = ((3, 4), (1, 1), (2, 1))
"""Height to width of images, in turn: a window, a crop, a phone."""


@dataclass(frozen=True)
class Size:
    """Which model is served, and what it is asked for. ``prompt`` and ``output``: the least, the middle and the most
    tokens of the mixed requests. ``contexts``: tokens in front of what is decoded. ``group`` rollouts share a prompt of
    ``shared`` tokens; ``turns``: conversations, tokens of the first turn, tokens of the second."""

    preset: str
    vocabulary: int
    requests: int
    prompt: tuple[int, int, int]
    output: tuple[int, int, int]
    contexts: tuple[int, ...]
    concurrency: tuple[int, ...]
    group: int
    shared: int
    turns: tuple[int, int, int]

    def config(self) -> AgentModelConfig:
        return getattr(presets, self.preset)(self.vocabulary)


SIZES = {
    "small": Size(
        "laptop", 2048, 32, (50, 200, 800), (16, 64, 256), (256, 1024, 4096, 16384), (1, 2, 4, 8, 16, 32, 64, 128),
        16, 512, (8, 1024, 64),
    ),
    "large": Size(
        "small", 2048, 32, (50, 400, 3200), (16, 128, 512), (256, 1024, 4096, 16384, 65536),
        (1, 2, 4, 8, 16, 32, 64, 128, 256), 16, 2048, (8, 4096, 256),
    ),
}  # fmt: skip
TINY = Size("debug", 330, 6, (20, 30, 60), (2, 4, 8), (16, 64), (1, 4), 3, 24, (2, 32, 8))


@lru_cache(maxsize=2)
def vocabulary(size: int) -> Vocab:
    """Trained on what the repository says of itself: ``size`` ids, for whose text nobody looks."""
    files = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "LOG.md")
    return Vocab.train([path.read_text(encoding="utf-8") for path in files], size)


def expressible(config: AgentModelConfig) -> AgentModelConfig:
    """The same sizes in what the stock class of GLM-4.5V has: no norms on queries and keys, no MTP, its tower, which is
    as wide inside as the decoder is."""
    tower = {"bias": False, "qk_norm": False, "embedding_norm": True, "ffn": config.decoder.width}
    table = config.vision.position_table or 16
    return replace(
        config,
        vision=replace(config.vision, **tower, position_table=table),
        decoder=replace(config.decoder, qk_norm=False),
        mtp=MTPConfig(depths=0),
    )


def new_agent(config: AgentModelConfig, vocab: Vocab, device: torch.device, seed: int = 0) -> Agent:
    """One that has learnt nothing, whose distributions are far from flat. Ids that ours never samples have no weight in
    the head, so that theirs does not choose them either, and needs no processor that bars them."""
    torch.manual_seed(seed)
    config = replace(config, vocab_size=max(config.vocab_size, vocab.size), image_id=vocab.image_id)
    model = AgentModel(config).eval()
    with torch.no_grad():
        model.head_weight.mul_(20.0)
        model.head_weight[list(vocab.barred(config.vocab_size))] = 0.0
    return Agent(model.to(device), vocab, GEOMETRY, ChatConfig())


def exported(agent: Agent, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``agent`` as transformers loads it from the folder that it was exported to. Of a hub folder the code that lies
    in it runs, which is a copy of this library's. What the export says of stop tokens is left aside."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    path = folder / f"{kind}-{str(dtype).removeprefix('torch.')}"
    export_model(path, agent, kind, dtype=dtype)
    how = {"trust_remote_code": True} if kind == HUB else {}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", **how)
    model.generation_config = GenerationConfig()
    return model.to(agent.model.embedding.weight.device).eval()


# ---------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Requests:
    """``prompts`` and how many tokens each is to be given: ``outputs``. Nothing ends earlier, so that both sides work
    for as many tokens. ``temperature`` 0 is greedy."""

    prompts: tuple[Trajectory, ...]
    outputs: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        return sum(self.outputs)

    def ours(self) -> list[tuple[Trajectory, Limits]]:
        how = {"temperature": self.temperature, "top_p": self.top_p}
        pairs = zip(self.prompts, self.outputs, strict=True)
        return [(prompt, Limits(count, seed=n, **how)) for n, (prompt, count) in enumerate(pairs)]

    def chosen(self, places: Sequence[int]) -> Requests:
        return replace(
            self, prompts=tuple(self.prompts[n] for n in places), outputs=tuple(self.outputs[n] for n in places)
        )

    def cut(self, most: int) -> Requests:
        """The same, of at most so many tokens each."""
        return replace(self, outputs=tuple(min(count, most) for count in self.outputs))


def log_normal(count: int, least: int, middle: int, most: int, seed: int) -> list[int]:
    """Lengths at the quantiles, so that no draw is lucky; cut at both ends, in an order that ``seed`` decides."""
    places = [NormalDist().inv_cdf((n + 0.5) / count) for n in range(count)]
    lengths = [min(max(round(middle * math.exp(DEVIATION * z)), least), most) for z in places]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [lengths[n] for n in order]


def mixed(size: Size, vocab: Vocab, images: bool = True) -> Requests:
    """Requests as agents make them: prompts and answers of log-normal lengths, apart from each other. Of four prompts
    one has one image and one has two, which are half of its tokens."""
    lengths = log_normal(size.requests, *size.prompt, seed=0)
    outputs = log_normal(size.requests, *size.output, seed=1)
    kinds = (1, 0, 2, 0) if images else (0,)
    prompts = [prompt(length, kinds[n % len(kinds)], vocab, n) for n, length in enumerate(lengths)]
    return Requests(tuple(prompts), tuple(outputs))


def equal(count: int, length: int, output: int, vocab: Vocab, images: int = 0) -> Requests:
    """Requests of one length: nothing is padded."""
    prompts = tuple(prompt(length, images, vocab, n) for n in range(count))
    return Requests(prompts, (output,) * count)


def arriving(count: int, over: float, seed: int = 2) -> list[float]:
    """When ``count`` requests come one by one, in seconds: by chance, at a constant rate, the last after ``over``."""
    gaps = -torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()
    times = gaps.cumsum(0) - gaps[0]
    return (times * (over / max(float(times[-1]), 1e-9))).tolist()


def prompt(length: int, images: int, vocab: Vocab, seed: int) -> Trajectory:
    """A user's turn of ``length`` tokens: images of about half of them, then words of no meaning."""
    pictures = [picture(length // (2 * images), 3 * seed + n) for n in range(images)]
    opening, closing = ("[gMASK]", "<sop>", "<|user|>"), ("<|assistant|>",)
    ids = [vocab.id(token) for token in opening]
    for image in pictures:
        slots = [vocab.image_id] * visual_tokens(image.grid, GEOMETRY.merge_size)
        ids += [vocab.id("<|begin_of_image|>"), *slots, vocab.id("<|end_of_image|>")]
    ids += words(length - len(ids) - len(closing), vocab, seed) + [vocab.id(token) for token in closing]
    trajectory = Trajectory(f"prompt-{seed}", "noise")
    trajectory.extend(ids, trainable=False, images=pictures)
    return trajectory


def words(count: int, vocab: Vocab, seed: int) -> list[int]:
    """``count`` ids of plain text."""
    plain = [n for n in range(vocab.size) if not vocab.is_control(n)]
    places = torch.randint(len(plain), (max(count, 0),), generator=torch.Generator().manual_seed(seed))
    return [plain[n] for n in places.tolist()]


def picture(most: int, seed: int) -> PatchedImage:
    """Noise of at most about ``most`` visual tokens."""
    height, width = ASPECTS[seed % len(ASPECTS)]
    unit, scale = GEOMETRY.unit, math.sqrt(max(most, 1) / (height * width))
    sides = (max(int(height * scale), 1) * unit, max(int(width * scale), 1) * unit)
    pixels = np.random.default_rng(seed).integers(0, 256, (*sides, 3), dtype=np.uint8)
    return patchify(pixels, GEOMETRY)
