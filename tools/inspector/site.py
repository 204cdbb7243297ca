"""A folder that a browser opens from disk: an index, blocks of fifty samples that it loads as they are looked at, and
the pictures as files, which the browser loads when they come into sight.

Foreign text is escaped when it is written, and the page's policy lets nothing run but its own script and the blocks
that this loads.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from PIL import Image as PILImage
from tqdm import tqdm

from data_pipelines.documents import DocumentBuilder
from data_pipelines.record_view import Shot, record_view
from data_pipelines.shards import ShardSet, shard_sets
from mmagent.chat import ChatConfig
from mmagent.files import new_folder
from mmagent.geometry import GeometryConfig
from mmagent.html import pieces
from mmagent.packing import Size
from mmagent.records import Record, RecordError, decode_image, from_sample
from mmagent.vocab import Vocab
from tools.inspector.packs import pack_page
from tools.inspector.tokens import LEGEND, token_view

BLOCK = 50
"""Samples of a block, and of a page."""
LONGEST = 2048
"""Pictures with a longer side are shown scaled down to it."""
_SETS = "sets.json"  # in the folder of several sets: their names
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class InspectConfig:
    """``shards``, a set or a folder of sets, to ``to``; ``samples`` 0 shows all. ``packs`` and the tokens of samples
    need a ``tokenizer``."""

    shards: str
    to: Path
    tokenizer: str = ""
    packs: int = 0
    samples: int = 0
    tokens_per_pack: int = 4096
    patches_per_pack: int = 16384


def inspect(config: InspectConfig) -> Path:
    """Write the site, replacing one that stood there, and return its first page. Raises ``ValueError`` for shards or a
    tokenizer that are none, or a folder that holds anything else."""
    if config.packs and not config.tokenizer:
        raise ValueError("--packs: packing counts tokens; name a --tokenizer")
    if config.to.exists() and any(config.to.iterdir()) and not _is_ours(config.to):
        raise ValueError(f"--to {config.to}: holds something else; choose another folder")
    sets = shard_sets(config.shards)
    count = sum(len(_chosen(len(ShardSet(at)), config.samples)) for at in sets)
    with new_folder(config.to) as folder, _bar(count + config.packs * len(sets)) as bar:  # of all sets: many are short
        if sets == [config.shards]:
            _write_site(config, folder, bar)
        else:
            rows = []
            for at in sets:
                name = Path(at).name
                (folder / name).mkdir()
                total = _write_site(replace(config, shards=at), folder / name, bar)
                link = Markup('<a href="{}/index.html">{}</a>').format(quote(name), name)
                rows.append({"set": link, "samples": total})
            told = pieces.page(f"Inspection: {Path(config.shards).name}", [pieces.Section("Sets", pieces.table(rows))])
            (folder / "index.html").write_text(told, encoding="utf-8")
            (folder / _SETS).write_text(json.dumps([Path(at).name for at in sets]), encoding="utf-8")
    return config.to / "index.html"


def _is_ours(folder: Path) -> bool:
    """Whether what stands there was written by an inspection, and nothing else."""
    if (folder / "blocks").is_dir():
        return True
    if not (folder / _SETS).is_file():
        return False
    sets = json.loads((folder / _SETS).read_text(encoding="utf-8"))
    return {path.name for path in folder.iterdir()} <= {"index.html", _SETS, *sets}


def _bar(total: int) -> tqdm:
    return tqdm(total=total, desc="inspect", unit="sample", delay=2.0, file=sys.stderr)


def _chosen(total: int, most: int) -> list[int]:
    """At most so many samples (0: all), drawn evenly."""
    return sorted({int(n) for n in np.linspace(0, total - 1, min(most or total, total))})


def _write_site(config: InspectConfig, folder: Path, bar: tqdm) -> int:
    """The pages of one set; how many samples it has."""
    shards = ShardSet(config.shards)
    vocab = Vocab.load(config.tokenizer) if config.tokenizer else None
    geometry = GeometryConfig()
    total = len(shards)
    for name in ("blocks", "images"):
        (folder / name).mkdir()
    writer = _Writer(shards, folder, vocab, geometry)
    bar.set_description(Path(config.shards).name, refresh=False)
    for n in _chosen(total, config.samples):
        writer.add(n)
        bar.update()
    writer.flush()
    if vocab is not None and config.packs:
        budget = Size(config.tokens_per_pack, config.patches_per_pack)
        told = pack_page(config.shards, config.packs, budget, vocab, geometry, bar.update)
        (folder / "packs.html").write_text(told, encoding="utf-8")
    (folder / "index.html").write_text(_shell(config, writer.index, total), encoding="utf-8")
    return total


class _Writer:
    def __init__(self, shards: ShardSet, folder: Path, vocab: Vocab | None, geometry: GeometryConfig):
        self.shards, self.folder, self.vocab, self.geometry = shards, folder, vocab, geometry
        self.builder = DocumentBuilder(vocab, geometry, ChatConfig()) if vocab is not None else None
        self.index: list[list[object]] = []
        self._cards: list[Markup] = []

    def add(self, number: int) -> None:
        """A card, and a line of the index: key, source, task, boxes and points, tokens."""
        where = self.shards.where(number)
        try:
            record = from_sample(self.shards.read(number))
            card = record_view(record, lambda n: self._shot(record, n, number), where)
            tokens, view = self._tokens(record)
            card += view
            line: list[object] = [record.key, record.source, record.task, len(record.boxes + record.points), tokens]
        except RecordError as error:
            card = Markup(
                '<article class="sample"><header><b>{}</b> {} <span class="quiet small">{}</span></header>'
                "<p>{}: {}</p></article>"
            ).format(error.key, pieces.tag("unusable", "bad"), where, error.field, error.problem)
            line = [error.key, "(unusable)", "", 0, 0]
        self.index.append(line)
        self._cards.append(card)
        if len(self._cards) == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write the block at hand."""
        if self._cards:
            number = (len(self.index) - 1) // BLOCK
            told = _safe_json([str(card) for card in self._cards])
            (self.folder / "blocks" / f"{number:05d}.js").write_text(f"inspection({number}, {told});\n", "utf-8")
            self._cards = []

    def _shot(self, record: Record, n: int, number: int) -> Shot:
        """Pictures are files of their own: as they are, or smaller where they are very large."""
        image = record.images[n]
        pixels = decode_image(image.data, record.key, f"images[{n}]")
        height, width = pixels.shape[:2]
        data, extension = image.data, image.extension
        if max(height, width) > LONGEST:
            shown = PILImage.fromarray(pixels)
            shown.thumbnail((LONGEST, LONGEST))
            buffer = io.BytesIO()
            shown.save(buffer, "JPEG", quality=88)
            data, extension = buffer.getvalue(), "jpg"
        name = f"images/{number:07d}-{n}.{extension}"
        (self.folder / name).write_bytes(data)
        return Shot(name, width, height)

    def _tokens(self, record: Record) -> tuple[int, Markup]:
        if self.builder is None or self.vocab is None:
            return 0, Markup("")
        try:
            draft = self.builder.draft(record)
        except RecordError as error:  # it can be looked at, but not trained on
            told = pieces.tag("cannot be trained on", "bad")
            return 0, Markup('<p class="small">{} {}: {}</p>').format(told, error.field, error.problem)
        trained = draft.trainable.tolist()
        visual = int((draft.input_ids == self.vocab.image_id).sum())
        view = token_view(draft.input_ids.tolist(), trained, draft.grids, self.vocab, self.geometry.merge_size)
        title = f"{len(trained):,} tokens, {sum(trained):,} trained on, {visual:,} visual"
        return len(trained), pieces.details(title, view, "of")


def _shell(config: InspectConfig, index: list[list[object]], total: int) -> str:
    style = (Path(pieces.__file__).parent / "style.css").read_text(encoding="utf-8")
    scripts = (_HERE / "browse.js", Path(pieces.__file__).parent / "samples.js")
    script = "".join(path.read_text(encoding="utf-8") for path in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = ("default-src 'none'", "img-src 'self' file: data:", "style-src 'unsafe-inline'")
    policy = "; ".join([*rules, f"script-src 'sha256-{digest}' 'strict-dynamic'"])
    shown = f"{len(index):,} of {total:,} samples" if len(index) < total else f"{total:,} samples"
    return str(
        Markup((_HERE / "browse.html").read_text(encoding="utf-8")).format(
            policy=policy,
            title=f"Inspection: {Path(config.shards).name}",
            style=Markup(style),
            shown=shown,
            packs=Markup(' · <a href="packs.html">{} packs</a>').format(config.packs) if config.packs else "",
            legend=LEGEND if config.tokenizer else "",
            index=Markup(_safe_json({"block": BLOCK, "rows": index})),
            script=Markup(script),
        )
    )


def _safe_json(value: object) -> str:
    """JSON that may stand inside a script: nothing in it ends one, or begins a comment."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
