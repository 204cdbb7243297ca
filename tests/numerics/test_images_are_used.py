"""What only the image tells must be learnt: documents of equal text whose answers differ by their pictures."""

from __future__ import annotations

import math

import numpy as np
import torch

from mmagent.dist import World
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.geometry import GeometryConfig, patchify
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.packing import pack
from mmagent.train.step import train_step
from mmagent.types import Document

IMAGE, ASK, FIRST = 1, 2, 10
PLACES = 8


def documents() -> list[Document]:
    """White screens of 210 x 160 pixels under a yellow bar, a pale button on each; the answer is its place."""
    out = []
    for place in range(PLACES):
        screen = np.full((210, 160, 3), 255, dtype=np.uint8)
        screen[:50, :, 2] = 0
        row, col = 70 + 80 * (place // 4), 5 + 40 * (place % 4)
        screen[row : row + 30, col : col + 30] = 100
        screen[row + 1 : row + 29, col + 1 : col + 29] = 240
        patched = patchify(screen, GeometryConfig(min_tokens=1))
        slots = patched.patches.shape[0] // 4
        ids = torch.tensor([*[IMAGE] * slots, ASK, FIRST + place])
        trainable = torch.zeros(len(ids), dtype=torch.bool)
        trainable[-1] = True
        out.append(Document(ids, trainable, (patched,), f"place-{place}", "test"))
    return out


def test_a_new_model_learns_to_look():
    """Bright screens nearly alike, at the rate of the laptop's recipes. Where the step of the patch projection is not
    bounded, the mean brightness grows until the encoder says the same of every screen, and the loss stays at log 8."""
    torch.manual_seed(0)
    model = AgentModel(presets.laptop(vocab_size=64, image_id=IMAGE))
    objective = LanguageModeling(model, LanguageModelingConfig())
    world = World(0, 1, 0, torch.device("cpu"))
    optimizer = build_optimizer(model, OptimConfig(lr=2e-3))
    engine = build_engine(objective, optimizer, EngineConfig("none", dtype="bfloat16"), world)
    batch = pack(documents(), image_id=IMAGE, merge_size=2, multiple=1, pad_id=0)
    losses = [train_step(objective, engine, [batch], world).record()["loss/lm"] for _ in range(40)]
    assert losses[-1] < 0.1 * math.log(PLACES), losses[-1]
    with torch.no_grad():
        tokens = model.encoder(batch.vision).tokens.unflatten(0, (PLACES, -1))
    apart = (tokens - tokens.mean(0)).square().mean().sqrt() / tokens.square().mean().sqrt()
    assert apart > 0.05
