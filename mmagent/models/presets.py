"""Model sizes as functions. Every size is the same code; the large ones can be built on the meta device.

Published architectures: GLM-4.5 and GLM-4.5-Air (arXiv 2508.06471, table 1), GLM-OCR (its released config).
"""

from __future__ import annotations

import torch

from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViTConfig, cogvit_403m, cogvit_debug, cogvit_laptop
from mmagent.models.decoder import DecoderConfig
from mmagent.models.moe import MoEConfig
from mmagent.models.mtp import MTPConfig
from mmagent.models.projector import ProjectorConfig


def debug(vocab_size: int = 256, image_id: int = 1) -> AgentModelConfig:
    """Seconds in a test; every mechanism is there."""
    return AgentModelConfig(
        vocab_size=vocab_size,
        image_id=image_id,
        vision=cogvit_debug(),
        projector=ProjectorConfig(ffn=96),
        decoder=DecoderConfig(
            width=32, layers=3, dense_layers=1, heads=4, kv_heads=2, head_dim=8, ffn=64, qk_norm=True, rope_base=1e4,
            moe=MoEConfig(experts=4, top_k=2, shared=1, ffn=32, scale=1.0),
        ),
        mtp=MTPConfig(depths=2),
    )  # fmt: skip


def laptop(vocab_size: int = 2048, image_id: int = 1) -> AgentModelConfig:
    """Trains on two CPU cores within minutes: the quickstart."""
    return AgentModelConfig(
        vocab_size=vocab_size,
        image_id=image_id,
        vision=cogvit_laptop(),
        projector=ProjectorConfig(ffn=256),
        decoder=DecoderConfig(
            width=192, layers=4, dense_layers=1, heads=3, kv_heads=3, head_dim=64, ffn=512, qk_norm=True, rope_base=1e4,
            moe=MoEConfig(experts=4, top_k=2, shared=1, ffn=192, scale=1.0),
        ),
        mtp=MTPConfig(depths=1),
    )  # fmt: skip


def small(vocab_size: int = 32768, image_id: int = 1) -> AgentModelConfig:
    """About 1B parameters with a 403M encoder: one GPU."""
    return AgentModelConfig(
        vocab_size=vocab_size,
        image_id=image_id,
        vision=cogvit_403m(),
        projector=ProjectorConfig(ffn=3072),
        decoder=DecoderConfig(
            width=1024, layers=16, dense_layers=1, heads=16, kv_heads=4, head_dim=64, ffn=4096, qk_norm=True,
            moe=MoEConfig(experts=16, top_k=2, shared=1, ffn=512, scale=1.0),
        ),
        mtp=MTPConfig(depths=2),
    )  # fmt: skip


def glm_ocr() -> AgentModelConfig:
    """GLM-OCR, 0.9B: CogViT, a dense decoder and one MTP module."""
    return AgentModelConfig(
        vocab_size=59392,
        image_id=59280,
        vision=cogvit_403m(),
        projector=ProjectorConfig(ffn=4608),
        decoder=DecoderConfig(
            width=1536, layers=16, dense_layers=16, heads=16, kv_heads=8, head_dim=128, ffn=4608, qkv_bias=False,
            rope_base=1e4, rotary_fraction=1.0, rotary_sections=(16, 24, 24), interleaved_rotary=True,
            sandwich_norm=True,
        ),
        mtp=MTPConfig(depths=1),
    )  # fmt: skip


def glm45_air() -> AgentModelConfig:
    """GLM-4.5-Air's decoder (106B, 12B active) behind the 403M encoder."""
    return AgentModelConfig(
        vision=cogvit_403m(),
        projector=ProjectorConfig(ffn=12288),
        decoder=DecoderConfig(
            width=4096, layers=46, dense_layers=1, heads=96, kv_heads=8, head_dim=128, ffn=10944,
            moe=MoEConfig(experts=128, top_k=8, shared=1, ffn=1408, scale=1.0),
        ),
        mtp=MTPConfig(depths=1),
    )  # fmt: skip


def glm45v() -> AgentModelConfig:
    """GLM-4.5V and GLM-4.6V: GLM-4.5-Air's decoder behind the 24-layer tower of GLM-4.1V (arXiv 2507.01006; sizes as in
    ``Glm4vMoeConfig`` of transformers), without MTP."""
    return AgentModelConfig(
        vision=CogViTConfig(
            width=1536, depth=24, heads=12, ffn=4096, bias=False, qk_norm=False, embedding_norm=True, position_table=24
        ),
        projector=ProjectorConfig(ffn=13696),
        decoder=DecoderConfig(
            width=4096, layers=46, dense_layers=1, heads=96, kv_heads=8, head_dim=128, ffn=10944,
            moe=MoEConfig(experts=128, top_k=8, shared=1, ffn=1408, scale=1.0),
        ),
        mtp=MTPConfig(depths=0),
    )  # fmt: skip


def glm45() -> AgentModelConfig:
    """GLM-4.5's decoder (355B, 32B active) behind the 403M encoder."""
    return AgentModelConfig(
        vision=cogvit_403m(),
        projector=ProjectorConfig(ffn=15360),
        decoder=DecoderConfig(
            width=5120, layers=92, dense_layers=3, heads=96, kv_heads=8, head_dim=128, ffn=12288, qk_norm=True,
            moe=MoEConfig(experts=160, top_k=8, shared=1, ffn=1536, scale=2.5),
        ),
        mtp=MTPConfig(depths=1),
    )  # fmt: skip


def on_meta(config: AgentModelConfig) -> AgentModel:
    """The model without memory: for counting, planning, and materialising under a sharding engine."""
    with torch.device("meta"):
        return AgentModel(config)
