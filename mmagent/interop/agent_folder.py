"""A trained agent as a folder: what a stage leaves behind, and what evaluation, serving and the next stage read.

``FOLDER/config.yaml``         :class:`AgentConfig`: model, image geometry, chat
``FOLDER/model.safetensors``   every parameter and persistent buffer
``FOLDER/tokenizer.json``      the vocabulary

A folder is written beside its place and moved there whole, so a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mmagent.chat import ChatConfig
from mmagent.config import load_yaml, to_yaml
from mmagent.files import new_folder
from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import EncoderConfig, build_encoder, check_geometry, is_factory, open_encoder
from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViT
from mmagent.ops.state import load_weights, save_weights
from mmagent.vocab import Vocab

CONFIG, WEIGHTS, TOKENIZER = "config.yaml", "model.safetensors", "tokenizer.json"
_PIECE = 65536


@dataclass
class AgentConfig:
    """What ``config.yaml`` holds. ``encoder`` is the ``custom`` of an encoder's folder
    (:class:`~mmagent.interop.encoder_folder.EncoderConfig`): empty for the CogViT of ``model.vision``."""

    model: AgentModelConfig = field(default_factory=AgentModelConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    encoder: str = ""


class Agent(NamedTuple):
    """A model with everything that must fit it. ``encoder`` as in :class:`AgentConfig`, for :func:`save_agent`."""

    model: AgentModel
    vocab: Vocab
    geometry: GeometryConfig
    chat: ChatConfig
    encoder: str = ""


def new_agent(
    config: AgentModelConfig, vocab: Vocab, geometry: GeometryConfig, chat: ChatConfig, encoder: str = ""
) -> Agent:
    """An agent that has learnt nothing. ``encoder`` is a source of
    :func:`~mmagent.interop.encoder_folder.open_encoder`, whose size and geometry then count (a factory's geometry is
    ``geometry``); empty for a new CogViT of ``config.vision``.

    Raises ``ValueError`` where model, encoder, vocabulary and geometry do not fit: before the training, not after it.
    """
    vision, tower, custom = config.vision, None, ""
    if encoder:
        tower, own, custom = open_encoder(encoder, geometry)
        vision = tower.config if isinstance(tower, CogViT) else vision
        if is_factory(encoder):
            check_geometry(tower, geometry, encoder)
        else:
            geometry = own
    config = replace(config, image_id=vocab.image_id, vision=vision)
    _check_fit(AgentConfig(config, geometry, chat, custom), vocab, encoder or "model")
    return Agent(AgentModel(config, tower), vocab, geometry, chat, custom)


def save_agent(
    folder: Path | str,
    model: AgentModel,
    vocab: Vocab,
    geometry: GeometryConfig,
    chat: ChatConfig,
    *,
    encoder: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder, replacing an older one.

    ``encoder`` is :attr:`Agent.encoder`, which must be there when the model's encoder is no CogViT. ``weights`` is the
    full state dict of a sharded model, gathered by all ranks; one rank writes. Raises ``ValueError`` when model and
    vocabulary disagree, before anything is written.
    """
    folder = Path(folder)
    config = AgentConfig(model.config, geometry, chat, encoder)
    if not encoder and not isinstance(model.encoder, CogViT):
        raise ValueError(f"encoder: name the import path of the factory of {type(model.encoder).__name__}")
    _check_fit(config, vocab, str(folder))
    with new_folder(folder) as beside:
        save_weights(model if weights is None else weights, beside / WEIGHTS)
        vocab.save(beside / TOKENIZER)
        (beside / CONFIG).write_text(to_yaml(config), encoding="utf-8")


def load_agent(folder: Path | str) -> Agent:
    """Read a folder of :func:`save_agent`; the model is on the CPU, in evaluation mode.

    Raises ``ValueError`` naming the file that is missing, or the tensors that do not fit.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no agent folder: {', '.join(missing)} missing; training leaves one in OUTPUT/agent"
        )
    config = load_yaml(AgentConfig(), folder / CONFIG)
    vocab = Vocab.load(folder / TOKENIZER)
    _check_fit(config, vocab, str(folder))
    tower = build_encoder(EncoderConfig(config.model.vision, config.geometry, config.encoder))
    model = AgentModel(config.model, tower)
    load_weights(model, folder / WEIGHTS)
    return Agent(model.eval(), vocab, config.geometry, config.chat, config.encoder)


def fingerprint(folder: Path | str, whole_up_to: int = 1 << 30, windows: int = 256) -> str:
    """A short digest of an agent folder's content, for pins.

    Files above ``whole_up_to`` bytes are read in ``windows`` evenly spread 64 KiB pieces, so that a model of
    hundreds of gigabytes is told from the next one in a second.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{folder} is no agent folder: {name} missing")
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= max(whole_up_to, _PIECE):
                while piece := file.read(1 << 20):
                    digest.update(piece)
            else:
                for n in range(windows):
                    file.seek(n * (size - _PIECE) // (windows - 1))
                    digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def _check_fit(config: AgentConfig, vocab: Vocab, where: str) -> None:
    model, geometry = config.model, config.geometry
    if model.image_id != vocab.image_id:
        raise ValueError(f"{where}: the model's image_id is {model.image_id}, the vocabulary's {vocab.image_id}")
    if model.vocab_size < vocab.size:
        raise ValueError(f"{where}: the model knows {model.vocab_size} ids, the vocabulary has {vocab.size}")
    if not config.encoder and model.vision.patch_values != geometry.patch_values:
        raise ValueError(
            f"{where}: the encoder takes {model.vision.patch_values} values a patch, "
            f"the image geometry makes {geometry.patch_values}"
        )
