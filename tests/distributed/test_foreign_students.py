"""What distillation and alignment need two ranks for: one set of statistics, and gradients everywhere under DDP."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipelines.masking import MaskConfig, mask_patches
from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.backbones import BackboneEncoder, wrap
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.teachers import Teacher
from mmagent.models.text_tower import TextTower, text_debug
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.objectives.distillation import Distillation, DistillationConfig
from mmagent.train.step import train_step
from mmagent.types import MaskedVision, PackedVision, PairedBatch, Segments
from tests.backbone_kit import TIMM, timm_model, transformers_model

SIZES = [(64, 96), (32, 32), (96, 64)]


def pictures(patch: int, seed: int) -> tuple[PackedVision, tuple[torch.Tensor, ...]]:
    random = np.random.default_rng(seed)
    arrays = [random.integers(0, 256, (h * patch // 16, w * patch // 16, 3), dtype=np.uint8) for h, w in SIZES]
    geometry = GeometryConfig(patch, min_tokens=1)
    shown = tuple(torch.from_numpy(a).permute(2, 0, 1) / 255.0 for a in arrays)
    return PackedVision.pack([patchify(a, geometry) for a in arrays]), shown


def masked(patch: int, seed: int) -> MaskedVision:
    vision, shown = pictures(patch, seed)
    random = np.random.default_rng(seed)
    masks = [mask_patches(tuple(grid), 2, MaskConfig(), random) for grid in vision.grids.tolist()]
    return MaskedVision(vision, torch.cat(masks), shown, tuple(f"{seed}/{n}" for n in range(len(SIZES))))


def paired(patch: int, seed: int) -> PairedBatch:
    vision, _ = pictures(patch, seed)
    keys = tuple(f"{seed}/{n}" for n in range(len(SIZES)))
    return PairedBatch(vision, torch.tensor([3, 4, 0, 5, 0, 6, 7, 0]), Segments([3, 2, 3]), keys)


def statistics(world: World, standardise: str) -> dict[str, torch.Tensor]:
    """After a calibration in which the host of the second rank gives every eigenvector the other sign."""
    plain = torch.linalg.eigh

    def turned(matrix: torch.Tensor):
        values, vectors = plain(matrix)
        return values, vectors * (1 - 2 * world.rank)

    torch.linalg.eigh = turned
    torch.manual_seed(0)
    student = CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64, mask_token=True))
    teachers = [Teacher(wrap(transformers_model("dinov2")), "dinov2")]
    objective = Distillation(student, teachers, DistillationConfig(standardise=standardise))
    objective.calibrate([masked(14, world.rank)])
    return dict(objective.heads.named_buffers())


@pytest.mark.parametrize("standardise", ["phi-s", "whiten"])
def test_all_ranks_hold_the_same_statistics(standardise):
    one, other = run_ranks(statistics, 2, standardise)
    assert {name.rpartition(".")[2] for name in one} >= {"mean", "direction", "dispersion", "origin"}
    assert all(torch.equal(tensor, other[name]) and tensor.any() for name, tensor in one.items())


def one_step(world: World, kind: str, task: str) -> list[str]:
    """Trainable parameters that a step left as they were; the engine raises, or DDP waits, where one had no
    gradient."""
    torch.manual_seed(0)
    make = timm_model if kind in TIMM else transformers_model
    backbone = wrap(make(kind))
    patch = backbone.patch_size
    hides = task.startswith("distil") and backbone.maskable
    student = BackboneEncoder(backbone, GeometryConfig(patch, min_tokens=1))
    if task == "align":
        objective = Alignment(student, TextTower(text_debug(50)), AlignmentConfig(width=16))
        batch = paired(patch, world.rank)
    else:
        teacher = Teacher(wrap(transformers_model("siglip2")), "t", summary=task == "distil")
        config = DistillationConfig(blind="token" if hides else "zero", drop=0.3)
        objective = Distillation(student, [teacher], config)
        batch = masked(patch, world.rank)
        objective.calibrate([batch])
    before = {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}
    engine = build_engine(objective, build_optimizer(objective, OptimConfig()), EngineConfig("ddp"), world)
    train_step(objective, engine, [batch, batch], world)
    now = dict(objective.named_parameters())
    return [name for name, value in before.items() if torch.equal(now[name], value)]


TASKS = ("distil", "distil patches", "align")


def one_step_each(world: World, kind: str) -> list[list[str]]:
    return [one_step(world, kind, task) for task in TASKS]


@pytest.mark.parametrize("kind", ["dinov2", "vit_small_patch16_dinov3.lvd1689m"])
def test_every_trainable_parameter_of_a_foreign_student_gets_a_gradient(kind):
    """Also where no teacher asks for the summary, and where nothing is hidden; then the mask token's is zero."""
    for distil, patches, align in run_ranks(one_step_each, 2, kind):
        assert distil == []
        assert patches == []
        assert align == (["encoder.module.embeddings.mask_token"] if kind == "dinov2" else [])
