"""Models from one kind of folder to another, and from a live model to any: piece by piece, whole or not at all.

Between a source (:mod:`mmagent.interop.model_source`) and a target's files only a few million elements are in memory,
whatever the size of the model. Every value is looked at on the way: a NaN is an error that names its tensor. The target
is written aside and moved to its place at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from mmagent import dist
from mmagent.interop.agent_folder import Agent, AgentConfig, check_fit, require_model_folder, write_agent
from mmagent.interop.glm import agent_adapter, text_prefix
from mmagent.interop.glm_config import CONFIG, their_config, write_config, wrote_config
from mmagent.interop.glm_text import decoder_copies
from mmagent.interop.hub_folder import check_code, is_hub, write_hub
from mmagent.interop.live_model import folder_together, is_sharded, live_tensors, load_stored, together
from mmagent.interop.model_source import FORMATS, HUB, NATIVE, Source, open_source
from mmagent.interop.processor_files import check_numbers, write_processor
from mmagent.models.agent_model import AgentModel
from mmagent.models.cogvit import CogViT
from mmagent.ops.tensor_files import Progress, Stored, write_files

SHARD_SIZE = 5 << 30
"""Bytes of a file, as in released checkpoints."""
ROOM = 1.02
"""Free space asked for, in parts of what will be written."""

Watch = Callable[[int, int], None]
"""Told how many bytes of how many are done."""


def convert(
    source: Path | str,
    target: Path | str,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | None = SHARD_SIZE,
    encoder: str = "",
    max_positions: int = 0,
    without_mtp: bool = False,
    overwrite: bool = False,
    trust_code: bool = False,
    watch: Watch | None = None,
) -> list[str]:
    """A folder of one of :data:`~mmagent.interop.model_source.FORMATS` into a new one of the kind ``to``; returns lines
    for people about what was found and left behind.

    ``dtype`` casts the parameters (never the router's bias); None keeps every bit. ``encoder``, ``trust_code``,
    ``without_mtp`` as in :func:`~mmagent.interop.model_source.open_source`, ``max_positions`` as in
    :func:`~mmagent.interop.glm_config.their_config`. Raises ``ValueError`` for a source that is not sound, a model that
    the target cannot express, a target that is there already (unless ``overwrite``, and only a model folder) or for
    which the disk has no room, before anything is written; and naming a tensor that is not finite.
    """
    source, target = Path(source), Path(target)
    if to not in FORMATS:
        raise ValueError(f"{to!r} is not one of {', '.join(FORMATS)}")
    _require_place(source, target, overwrite)
    with open_source(source, encoder=encoder, trust_code=trust_code, without_mtp=without_mtp) as opened:
        plan = Plan(opened, to, max_positions, dtype)
        _require_room(target, plan.nbytes)
        plan.write(target, shard_size, _counting(plan.nbytes, watch))
        return [*opened.notes, *plan.notes, *plan.source.told_vanished()]


def check(
    folder: Path | str, watch: Watch | None = None, *, trust_code: bool = False, without_mtp: bool = False
) -> list[str]:
    """Read a folder of any format whole and write nothing; returns lines for people. ``trust_code``, ``without_mtp``
    as in :func:`~mmagent.interop.model_source.open_source`. Raises ``ValueError`` naming file and tensor of what is
    not sound."""
    with open_source(folder, trust_code=trust_code, without_mtp=without_mtp) as opened:
        notes = opened.notes + (check_code(Path(folder)) if opened.format == HUB else [])
        progress = _counting(sum(tensor.nbytes for tensor in opened.tensors.values()), watch)
        for tensor in opened.tensors.values():
            for _, piece in tensor.chunks():
                tensor.require_finite(piece)
                if progress is not None:
                    progress(piece.numel() * tensor.dtype.itemsize)
        return notes


def export_model(
    folder: Path | str,
    agent: Agent,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | None = SHARD_SIZE,
    max_positions: int = 0,
) -> list[str]:
    """A live model into a new folder of the format ``to``, replacing an older one; returns lines for people.

    Where the model is sharded (FSDP2, expert parallelism, ZeRO-3) tensors are gathered one by one: all ranks call, the
    main one writes. Raises ``ValueError`` for a model that the target cannot express and for a ``folder`` that holds
    something else than a model that this library wrote, before anything is written.
    """
    config = AgentConfig(agent.model.config, agent.geometry, agent.chat, agent.encoder)
    if not agent.encoder and not isinstance(agent.model.encoder, CogViT):
        raise ValueError(f"encoder: name the import path of the factory of {type(agent.model.encoder).__name__}")
    check_fit(config, agent.vocab, str(folder))
    source = Source(NATIVE, config, agent.vocab, live_tensors(agent.model))
    plan = Plan(source, to, max_positions, dtype)
    sharded = is_sharded(agent.model)
    with together(sharded, f"write to {folder}"):
        if not sharded or dist.is_main():
            require_model_folder(Path(folder))
            _require_ours(Path(folder))
    plan.write(Path(folder), shard_size, sharded=sharded)
    return [*plan.notes, *plan.source.told_vanished()]


def load_into(
    model: AgentModel,
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    trust_code: bool = False,
    without_mtp: bool = False,
) -> list[str]:
    """The weights of a folder of any format into a live model of the same architecture, each rank its own part; what is
    on the meta device gets memory on ``device``. ``trust_code``, ``without_mtp`` as in
    :func:`~mmagent.interop.model_source.open_source`. Returns lines for people.

    Raises ``ValueError`` naming what does not fit, before anything is written.
    """
    with open_source(folder, trust_code=trust_code, without_mtp=without_mtp) as opened:
        load_stored(model, opened.tensors, f"{folder} does not fit {type(model).__name__}", device)
        return opened.notes


class Plan:
    """What will stand in a target: ``tensors`` under its names, unread, and ``notes`` for people.

    ``dtype`` casts the source. Raises ``ValueError`` for a model that ``to`` cannot express.
    """

    def __init__(self, source: Source, to: str, max_positions: int = 0, dtype: torch.dtype | None = None):
        self.to, self.notes = to, []
        if to == HUB and source.config.encoder:
            raise ValueError(
                f"{HUB} has no place for the encoder {source.config.encoder}, whose code would have to travel with it: "
                f"use {NATIVE}"
            )
        if to != NATIVE:
            if source.config.model.denoises:
                learnt = f"this model learnt blocks of {source.config.model.denoises}"
                raise ValueError(f"{to} says token by token, and {learnt}: use {NATIVE}")
            check_numbers(source.vocab, to)
        self.source = source = source.cast(dtype)
        if to in (NATIVE, HUB):
            self.tensors = list(source.tensors.values())
            return
        self._theirs = self._their_config(max_positions)
        self.tensors = list(self._their_tensors())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(
        self, folder: Path, shard_size: int | None, progress: Progress | None = None, *, sharded: bool = False
    ) -> None:
        """The whole folder, beside its place and then moved there. ``sharded``: reading is a collective; all ranks
        call, the main one writes."""
        config, vocab = self.source.config, self.source.vocab
        if self.to == NATIVE:
            write_agent(folder, config, vocab, self.tensors, shard_size, progress, sharded=sharded)
            return
        with folder_together(folder, sharded) as beside:
            write_files(beside, self.tensors, shard_size, progress, together=sharded)
            if beside is None:
                return
            if self.to == HUB:
                write_hub(beside, config, vocab, self.source.dtype)
                return
            write_config(beside / CONFIG, self._theirs)
            geometry = None if self.to == "glm4_moe" else config.geometry
            write_processor(beside, vocab, config.chat, geometry, config.model.vocab_size)

    def _their_config(self, max_positions: int) -> dict:
        config = self.source.config
        if config.encoder and self.to != "glm4_moe":
            raise ValueError(f"{self.to} has no place for the encoder {config.encoder}: use {NATIVE}")
        return their_config(
            config.model, self.to, self.source.vocab, chat=config.chat,
            geometry=None if self.to == "glm4_moe" else config.geometry,
            dtype=self.source.dtype, max_positions=max_positions,
        )  # fmt: skip

    def _their_tensors(self) -> Iterable[Stored]:
        config, ours = self.source.config.model, self.source.tensors
        adapter = agent_adapter(config, self.to, mtp=True, experts="each")
        theirs = {t.name: t for rule in adapter.rules for t in rule.stored_theirs(ours[rule.ours])}
        copies = decoder_copies(config.decoder, text_prefix(self.to), config.mtp.modules)
        left = sorted(set(ours) - {rule.ours for rule in adapter.rules})
        assert all(name.startswith(("encoder.", "projector.")) for name in left), f"left behind: {left[:4]}"
        if left:
            whole = self.to == "glm4_moe"
            parts = {name.split(".")[0] if whole else ".".join(name.split(".")[:2]) for name in left}
            self.notes.append(f"left behind, for {self.to} has no place for it: {', '.join(sorted(parts))}")
        if config.mtp.depths > config.mtp.modules or config.mtp.mode != "shared":
            self.notes.append(
                f"MTP of {config.mtp.depths} depths on {config.mtp.modules} module(s), mode {config.mtp.mode!r}: noted "
                f"under 'mmagent' in {CONFIG}, which other libraries do not read"
            )
        if self.to == "glm_ocr" and config.projector.ffn != config.decoder.ffn:
            self.notes.append(
                f"projector.ffn is {config.projector.ffn}, decoder.ffn {config.decoder.ffn}: vLLM (0.32) takes them to "
                f"be equal, and would cut the merger's weights and see something else"
            )
        return [*theirs.values(), *(replace(theirs[name], name=copy) for copy, name in copies.items())]


def _require_place(source: Path, target: Path, overwrite: bool) -> None:
    here, there = source.resolve(), target.resolve()
    if there == here or here in there.parents:
        raise ValueError(f"{target} is the source, or inside it")
    if there in here.parents:
        raise ValueError(f"{target} holds the source {source}: it is not replaced")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} is there already; --overwrite replaces a model folder")
    require_model_folder(target)


def _require_ours(target: Path) -> None:
    """A released model that somebody downloaded is replaced by no export; :func:`convert` does so where it is asked."""
    if (target / CONFIG).is_file() and not wrote_config(target / CONFIG) and not is_hub(target):
        raise ValueError(f"{target} holds a model that was not written here: it is not replaced; name a new folder")


def _require_room(target: Path, nbytes: int) -> None:
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes * ROOM:
        raise ValueError(f"{target} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB")


def _counting(total: int, watch: Watch | None) -> Progress | None:
    if watch is None:
        return None
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        watch(done, total)

    return progress
