"""A trained agent as a folder: what a stage leaves behind, and what evaluation, serving and the next stage read.

``FOLDER/config.yaml``         :class:`AgentConfig`: model, image geometry, chat
``FOLDER/model.safetensors``   every parameter and persistent buffer; of a large model in numbered files with an index
``FOLDER/tokenizer.json``      the vocabulary
``FOLDER/packing.json``        of a packed model alone: what its layers look like (:mod:`mmagent.interop.packed_folder`)

A folder is written beside its place and moved there whole, so a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmagent import dist
from mmagent.chat import ChatConfig
from mmagent.config import load_yaml, to_yaml
from mmagent.files import require_own
from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import EncoderConfig, build_encoder, check_geometry, is_factory, open_encoder
from mmagent.interop.live_model import folder_together, is_sharded, live_tensors, load_stored, together
from mmagent.interop.packed_folder import PACKING, read_layout, write_layout
from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViT
from mmagent.models.packed import prepare_packed
from mmagent.ops.tensor_files import INDEX, WEIGHTS, Progress, Stored, TensorFiles, weight_files, write_files
from mmagent.vocab import Vocab

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"
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
    if config.vocab_size < vocab.size:
        raise ValueError(
            f"the tokenizer has {vocab.size} ids, the model {config.vocab_size}: set model.vocab_size={vocab.size}"
        )
    config = replace(config, image_id=vocab.image_id, vision=vision)
    check_fit(AgentConfig(config, geometry, chat, custom), vocab, encoder or "model")
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
    shard_size: int | None = None,
) -> None:
    """Write the folder, replacing an older one; what holds anything but an agent is not replaced (``ValueError``).

    ``encoder`` is :attr:`Agent.encoder`, which must be there when the model's encoder is no CogViT. ``shard_size``:
    bytes above which the weights are split into numbered files.

    A model that is sharded over ranks is gathered tensor by tensor: all ranks call, the main one writes. Else one rank
    calls; ``weights`` may be the full state dict of a sharded model, gathered before. Raises ``ValueError`` when model
    and vocabulary disagree, before anything is written.
    """
    config = AgentConfig(model.config, geometry, chat, encoder)
    if not encoder and not isinstance(model.encoder, CogViT):
        raise ValueError(f"encoder: name the import path of the factory of {type(model.encoder).__name__}")
    check_fit(config, vocab, str(folder))
    sharded = weights is None and is_sharded(model)
    with together(sharded, f"write to {folder}"):
        if not sharded or dist.is_main():
            require_own(Path(folder), "agent folder", (CONFIG, TOKENIZER, "model*.safetensors"), (INDEX, PACKING))
    tensors = live_tensors(model if weights is None else weights).values()
    write_agent(folder, config, vocab, tensors, shard_size, sharded=sharded, packed=model)


def write_agent(
    folder: Path | str,
    config: AgentConfig,
    vocab: Vocab,
    tensors: Iterable[Stored],
    shard_size: int | None = None,
    progress: Progress | None = None,
    *,
    sharded: bool = False,
    packed: AgentModel | None = None,
) -> None:
    """The folder from its parts, weights piece by piece, as :func:`~mmagent.ops.tensor_files.write_files` does.
    ``sharded``: reading is a collective; all ranks call, the main one writes. ``packed``: the model whose layers these
    are, where some are packed."""
    with folder_together(Path(folder), sharded) as beside:
        write_files(beside, tensors, shard_size, progress, together=sharded)
        if beside is not None:
            vocab.save(beside / TOKENIZER)
            (beside / CONFIG).write_text(to_yaml(config), encoding="utf-8")
            if packed is not None:
                write_layout(beside, packed)


def load_agent(folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Agent:
    """Read a folder of :func:`save_agent`; the model is in evaluation mode. ``dtype`` is that of its parameters: the
    router's bias is float32 always. What the folder names as its encoder is imported: it is for folders of your own.

    The weights go straight from the files to their places. Raises ``ValueError`` naming the file that is missing, or
    the tensors that do not fit.
    """
    folder = Path(folder)
    config, vocab = read_agent_config(folder)
    model = build_agent(config, dtype)
    prepare_packed(model, read_layout(folder))
    with TensorFiles(folder) as files:
        load_stored(model, files, f"{folder} does not fit {type(model).__name__}", device)
    return Agent(model.to(device).eval(), vocab, config.geometry, config.chat, config.encoder)


def read_agent_config(folder: Path) -> tuple[AgentConfig, Vocab]:
    """What stands beside the weights. Raises ``ValueError`` naming the file that is missing, or what does not fit."""
    missing = [name for name in (CONFIG, TOKENIZER) if not (folder / name).is_file()]
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        missing.insert(1 if CONFIG in missing else 0, WEIGHTS)
    if missing:
        raise ValueError(
            f"{folder} is no agent folder: {', '.join(missing)} missing; training leaves one in OUTPUT/agent"
        )
    config = load_yaml(AgentConfig(), folder / CONFIG)
    vocab = Vocab.load(folder / TOKENIZER)
    check_fit(config, vocab, str(folder))
    return config, vocab


def build_agent(config: AgentConfig, dtype: torch.dtype = torch.float32) -> AgentModel:
    """The model of ``config`` on the meta device, but for a custom encoder, which its factory makes; parameters in
    ``dtype``."""
    parts = EncoderConfig(config.model.vision, config.geometry, config.encoder)
    tower = build_encoder(parts) if config.encoder else None
    with torch.device("meta"):
        model = AgentModel(config.model, tower or build_encoder(parts))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def fingerprint(folder: Path | str, whole_up_to: int = 1 << 30, windows: int = 256) -> str:
    """A short digest of an agent folder's content, for pins.

    Weights above ``whole_up_to`` bytes are read in ``windows`` evenly spread 64 KiB pieces, so that a model of
    hundreds of gigabytes is told from the next one in a second.
    """
    digest = hashlib.sha256()
    folder = Path(folder)
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no agent folder: {name} missing")
    weights = weight_files(folder)
    whole = sum(path.stat().st_size for path in weights) <= max(whole_up_to, _PIECE)
    each = max(windows // len(weights), 2)
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    for path in (folder / CONFIG, folder / TOKENIZER, *index, *weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if whole or path not in weights or size <= _PIECE:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            else:
                for n in range(each):
                    file.seek(n * (size - _PIECE) // (each - 1))
                    digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def require_model_folder(target: Path) -> None:
    """Raises ``ValueError`` where ``target`` holds anything but a model, which is all that is replaced. A run's folder
    has a config.yaml as well, and checkpoints and logs below it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file")
    held = {path.name: path for path in target.iterdir()}
    if not held:
        return
    kinds = ((CONFIG, "config.json"), (WEIGHTS, INDEX), (TOKENIZER,))
    missing = [names[0] for names in kinds if not any((target / name).is_file() for name in names)]
    below = sorted(name for name, path in held.items() if path.is_dir() and name != "__pycache__")
    if missing or below:
        why = f"{', '.join(missing)} missing" if missing else f"it holds the folder {below[0]}"
        raise ValueError(f"{target} is no model folder: it is not replaced ({why})")


def check_fit(config: AgentConfig, vocab: Vocab, where: str) -> None:
    """Raises ``ValueError``, headed by ``where``, when model, vocabulary and geometry do not fit."""
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
