"""Model folders of two worlds, ours and the released ones, opened strictly and read under our names.

Opening compares every name, shape and dtype with what the configuration promises, and reads no weights (but for those
that should repeat others). What is read later comes a few million elements at a time, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmagent.chat import ChatConfig, Generation
from mmagent.config import load_yaml
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import CONFIG, TOKENIZER, AgentConfig, build_agent, check_fit, read_agent_config
from mmagent.interop.encoder_folder import EncoderConfig, open_encoder, require_trust
from mmagent.interop.glm import MODELS, agent_adapter, agent_config, text_prefix
from mmagent.interop.glm_config import declared_mtp, not_kept, own_aspect, own_chat, own_mtp, read_config, their_config
from mmagent.interop.hub_folder import CONFIG as THEIRS
from mmagent.interop.hub_folder import is_hub, read_hub
from mmagent.interop.packed_folder import PACKING
from mmagent.interop.processor_files import (
    GENERATION,
    generation,
    other_generation,
    read_chat,
    read_geometry,
    read_template,
)
from mmagent.interop.weights import Adapter
from mmagent.models.cogvit import CogViT, CogViTConfig, cogvit_debug
from mmagent.models.layers import initialise
from mmagent.models.projector import Projector, ProjectorConfig
from mmagent.ops.state import unshared
from mmagent.ops.tensor_files import INDEX, WEIGHTS, Stored, TensorFiles, Vanished, WeightsError, stored
from mmagent.vocab import Vocab

NATIVE, HUB = "native", "hub"
AGENT = "agent"
"""Where a run leaves its model."""
FORMATS = (NATIVE, HUB, *MODELS)


@dataclass
class Source:
    """A model that lies in a folder, or lives: its configuration, and its tensors under our names, unread.

    ``format`` is one of :data:`FORMATS`; ``notes`` are lines for people about what was found;
    ``vanished`` fills while what :meth:`cast` returned is read.
    """

    format: str
    config: AgentConfig
    vocab: Vocab
    tensors: dict[str, Stored]
    notes: list[str] = field(default_factory=list)
    vanished: Vanished = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding table, and of nearly all else."""
        return self.tensors["embedding.weight"].dtype

    def cast(self, dtype: torch.dtype | None) -> Source:
        """Every parameter in ``dtype`` (None: as it is), every buffer in the dtype that its module has it in: the
        router's bias is float32, whatever a trainer made of it."""
        buffers = dict(build_agent(self.config).named_buffers())
        kinds = {name: buffers[name].dtype if name in buffers else dtype or t.dtype for name, t in self.tensors.items()}
        vanished: Vanished = {}
        tensors = {name: tensor.cast(kinds[name], vanished) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, vanished=vanished)

    def told_vanished(self) -> list[str]:
        """A line for people about the values that a cast made zero, where there are any."""
        if not self.vanished:
            return []
        names = list(dict.fromkeys(name for name, *_ in self.vanished))
        count = sum(self.vanished.values())
        return [
            f"{count} values are too small for {self.dtype} and became zero, in {len(names)} tensors: {_few(names)}"
        ]


# ---------------------------------------------------------------------------------------------- opening


@contextmanager
def open_source(
    folder: Path | str, *, encoder: str = "", seed: int = 0, trust_code: bool = False, without_mtp: bool = False
) -> Iterator[Source]:
    """A folder of any of :data:`FORMATS`, compared with its configuration and open for reading within the block.

    ``encoder`` is what a text-only model (``glm4_moe``) shall see with, anything that
    :func:`~mmagent.interop.encoder_folder.open_encoder` takes; without it a tiny CogViT. That one and the projector
    start fresh, by ``seed``. ``trust_code``: a folder of ours, that of the encoder too, may name an encoder that is
    imported and called; without it that is refused. ``without_mtp``: MTP layers that ``config.json`` names and the
    files lack are left out, as stock classes do that save what they loaded; else they are missing. A packed folder is
    for :func:`~mmagent.interop.agent_folder.load_agent` alone, and is refused. Raises
    ``ValueError`` naming file and tensor of what is missing, unknown, misshapen, of a wrong dtype, torn or pickled.
    """
    folder = Path(folder)
    _require_model(folder)
    if (folder / PACKING).is_file():
        raise ValueError(f"{folder} is packed: make it dense first, by tools/pack.py {folder} --dense --into FOLDER")
    if (folder / CONFIG).is_file():
        if encoder:
            raise ValueError(f"{folder} holds an agent with an encoder of its own: it takes no other")
        with TensorFiles(folder) as files:
            config, vocab = read_agent_config(folder)
            if not trust_code:
                require_trust(config.encoder, str(folder))
            yield _open_ours(NATIVE, folder, files, config, vocab)
    elif is_hub(folder):
        if encoder:
            raise ValueError(f"{folder} holds an agent with an encoder of its own: it takes no other")
        with TensorFiles(folder) as files:
            yield _open_ours(HUB, folder, files, *read_hub(folder))
    else:
        with _naming(folder / THEIRS):
            theirs = read_config(folder)
        if not trust_code and encoder and (Path(encoder) / CONFIG).is_file():
            require_trust(load_yaml(EncoderConfig(), Path(encoder) / CONFIG).custom, encoder)
        with TensorFiles(folder) as files:
            yield _open_theirs(folder, theirs, files, encoder, seed, without_mtp)


def _require_model(folder: Path) -> None:
    """Raises ``ValueError`` that says what ``folder`` is, where it is easily taken for a model."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name its folder" if folder.exists() else f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)) and (folder / AGENT / CONFIG).is_file():
        raise ValueError(f"{folder} is a run's folder: its model is {folder / AGENT}")
    if not any((folder / name).is_file() for name in (CONFIG, THEIRS)):
        raise ValueError(
            f"{folder} holds no {THEIRS} and no {CONFIG}: it is no model folder of transformers, nor one that training "
            f"left in OUTPUT/{AGENT}"
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever another library, or a constructor, says about the values in ``path``, as a ``ValueError`` that begins
    with it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        if str(error).startswith(str(path.parent)):
            raise
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def _open_ours(kind: str, folder: Path, files: TensorFiles, config: AgentConfig, vocab: Vocab) -> Source:
    state = unshared(build_agent(config).state_dict(keep_vars=True))
    integers = frozenset(name for name, tensor in state.items() if not tensor.is_floating_point())
    _compare(files, {name: tuple(tensor.shape) for name, tensor in state.items()}, folder, integers)
    return Source(kind, config, vocab, {name: files[name] for name in state})


def _open_theirs(folder: Path, theirs: Any, files: TensorFiles, encoder: str, seed: int, without_mtp: bool) -> Source:
    kind, notes = theirs.model_type, []
    vocab = Vocab.load(folder / TOKENIZER)
    modules = _mtp_modules(folder, theirs, files, notes, without_mtp)
    with _naming(folder / THEIRS):
        mtp = own_mtp(theirs, modules)
    eyes = None
    if kind == "glm4_moe":
        eyes = _eyes(encoder, theirs.hidden_size, seed, notes)
        with _naming(folder / THEIRS):
            config = agent_config(theirs, mtp, vision=eyes.vision, projector=eyes.projector, image_id=vocab.image_id)
    elif encoder:
        raise ValueError(f"{folder} is a {kind} model with an encoder of its own: it takes no other")
    else:
        with _naming(folder / THEIRS):
            config = agent_config(theirs, mtp)
    geometry = eyes.geometry if eyes else own_aspect(theirs, read_geometry(folder, config.vision))
    whole = AgentConfig(config, geometry, _chat(folder, theirs, notes), eyes.custom if eyes else "")
    check_fit(whole, vocab, str(folder))
    packed = any(name.endswith(".mlp.experts.gate_up_proj") for name in files)
    if config.decoder.moe_layers:
        notes.append("experts packed in two tensors a layer" if packed else "experts one by one")
    adapter = agent_adapter(config, kind, mtp=True, experts="packed" if packed else "each")
    with _naming(folder / THEIRS):
        model = build_agent(whole)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {
        name: shape
        for rule in adapter.rules
        for name, shape in zip(rule.theirs, rule.their_shapes(shapes[rule.ours]), strict=True)
    }
    wanted |= {copy: wanted[name] for copy, name in adapter.copies.items() if copy in files}
    _compare(files, wanted, folder)
    _compare_copies(files, adapter, notes)
    single = {name for name, _ in model.named_buffers()}  # the router's bias is float32, whatever a file says
    tensors = {}
    for rule in adapter.rules:
        tensor = rule.stored_ours([files[name] for name in rule.theirs], shapes[rule.ours])
        tensors[rule.ours] = tensor.cast(torch.float32) if rule.ours in single else tensor
    if eyes:
        tensors |= eyes.tensors
    notes += _left_out(folder, theirs, whole, vocab)
    return Source(kind, whole, vocab, {name: tensors[name] for name in shapes}, notes)


def _compare(
    files: TensorFiles, wanted: Mapping[str, tuple[int, ...]], folder: Path, integers: frozenset[str] = frozenset()
) -> None:
    """Raises :class:`WeightsError` naming the tensors, and their files, that ``wanted`` does not describe."""
    problems = []
    if missing := [name for name in wanted if name not in files]:
        problems.append(f"{len(missing)} missing: {_few(missing)}")
    if unknown := [f"{name} ({Path(files[name].place).name})" for name in files if name not in wanted]:
        problems.append(f"{len(unknown)} unknown: {_few(unknown)}")
    wrong = [
        f"{name} ({Path(files[name].place).name}) has shape {files[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in files and files[name].shape != shape
    ]
    for name, tensor in files.items():
        plain = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        if name in wanted and name not in integers and not plain:
            kind = str(tensor.dtype).removeprefix("torch.")
            wrong.append(f"{name} ({Path(tensor.place).name}) is {kind}, no plain floating point")
    if wrong:
        problems.append(f"{len(wrong)} wrong: {_few(wrong)}")
    if problems:
        raise WeightsError(f"{folder}: " + "; ".join(problems))


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _compare_copies(files: TensorFiles, adapter: Adapter, notes: list[str]) -> None:
    """Raises :class:`WeightsError` where a tensor that should repeat another differs from it."""
    there = [copy for copy in adapter.copies if copy in files]
    for copy in there:
        kept = files[adapter.copies[copy]]
        for (at, one), (_, other) in zip(files[copy].chunks(), kept.chunks(), strict=True):
            if one.dtype != other.dtype or not torch.equal(one, other):
                raise WeightsError(
                    f"{copy} in {files[copy].place} should repeat {kept.name} in {kept.place}, but differs from "
                    f"element {at} on: it is no model of this family, which shares them"
                )
    if there:
        notes.append(f"{len(there)} repeated tensors, equal to what they repeat: {_few(there)}")


def _mtp_modules(folder: Path, theirs: Any, files: TensorFiles, notes: list[str], without: bool) -> int:
    """How many MTP layers the files hold. ``without``: those that
    ``config.json`` names were lost, and that is known."""
    layers = getattr(theirs, "text_config", theirs).num_hidden_layers
    prefix, found = text_prefix(theirs.model_type), 0
    while f"{prefix}layers.{layers + found}.eh_proj.weight" in files:
        found += 1
    told = declared_mtp(theirs)
    if without and found:
        raise ValueError(f"{folder} holds {found} MTP layers: without_mtp is for folders that lost them")
    if found < told and not without:
        raise WeightsError(
            f"{folder}: config.json names {told} MTP layers, the files hold {found}; missing: "
            f"{prefix}layers.{layers + found}.eh_proj.weight"
            + (
                "; save_pretrained of a stock class drops them: --without-mtp (without_mtp=True) goes on without"
                if not found else ""
            )
        )  # fmt: skip
    if found and told and found != told:
        raise ValueError(f"{folder}: config.json names {told} MTP layers, the files hold {found}")
    if found != told:
        notes.append(f"config.json names {told} MTP layers, the files hold {found}: that counts")
    return found


def _chat(folder: Path, theirs: Any, notes: list[str]) -> ChatConfig:
    noted = own_chat(theirs)
    chat = read_chat(folder, noted)
    if chat is not None:
        return chat
    text = read_template(folder)
    if text is not None:
        chat = ChatConfig(
            Generation.GLM45 if "/nothink" in text else Generation.GLM47, thinking="enable_thinking" in text
        )
    how = "guessed by its template" if text is not None else "as config.json notes" if noted else "guessed: no template"
    chat = chat or noted or ChatConfig()
    notes.append(f"chat: {chat.generation.value}, thinking {'on' if chat.thinking else 'off'}, {how}")
    return chat


def _left_out(folder: Path, theirs: Any, whole: AgentConfig, vocab: Vocab) -> list[str]:
    """Lines for people about what stands beside their weights and has no place in ours."""
    kind = theirs.model_type
    geometry = None if kind == "glm4_moe" else whole.geometry
    ours = their_config(whole.model, kind, vocab, chat=whole.chat, geometry=geometry)
    how = generation(vocab, whole.model.vocab_size)
    told = {THEIRS: not_kept(theirs, ours), GENERATION: other_generation(folder, how)}
    return [f"{name}: not kept: {', '.join(fields)}" for name, fields in told.items() if fields]


@dataclass(frozen=True)
class _Eyes:
    """What a text-only model gets to see with; ``tensors`` under our names."""

    vision: CogViTConfig | None
    projector: ProjectorConfig
    geometry: GeometryConfig
    custom: str
    tensors: dict[str, Stored]


def _eyes(encoder: str, width: int, seed: int, notes: list[str]) -> _Eyes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        custom = ""
        if encoder:
            tower, geometry, custom = open_encoder(encoder)
        else:
            tower, geometry = CogViT(cogvit_debug()), GeometryConfig()
            initialise(tower)
        config = ProjectorConfig(ffn=3 * width)
        projector = Projector(config, tower.width, tower.merge_size, width)
        initialise(projector)
    notes.append(f"a text model: {encoder or 'a tiny encoder that knows nothing'}, and a projector that knows nothing")
    both = nn.ModuleDict({"encoder": tower, "projector": projector})
    tensors = {name: stored(name, t, encoder or "memory") for name, t in both.state_dict().items()}
    return _Eyes(tower.config if isinstance(tower, CogViT) else None, config, geometry, custom, tensors)
