"""Clean shard sets with everything that the house knows: what its suites judge by, and its own image-text towers.

    python -m recipes.curate folders=[data/mine/pretrain] to=data/clean \\
        suites=[miniwob,worlds] rules.least_score=0.2 image_text=runs/align/image_text

It is ``data_pipelines.curate``, which see, with two things that data pipelines may not know. Items of ``suites`` (all
of them with ``suites=[all]``, published ones with ``chartqa=FOLDER``) are signed, once, into ``TO/judged.npz`` and not
trained on. A picture is scored against what is said of it by the cosine of ``image_text``: the folder that
recipes.align_encoder leaves behind, or a CLIP or SigLIP of transformers. What a good score is depends on the model:
``python tools/benchmarks/quality.py score`` measures it on pairs of yours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from data_pipelines.curate import CurateConfig, Curation, curate, pairs, safe, text
from data_pipelines.curated import JUDGED, check_free
from data_pipelines.making import BuildError
from evals.fingerprint import SIGNED, fingerprint
from evals.suite import Suite
from evals.suites import SUITES, named_suite
from mmagent.config import ConfigError, parse_cli
from mmagent.files import write_text
from mmagent.interop.image_text import ImageTextModel, load_image_text
from mmagent.ops.devices import chosen_device


@dataclass
class Config(CurateConfig):
    """``suites`` are not trained on; ``image_text``, on ``device``, scores pairs for ``rules.least_score``."""

    suites: list[str] = field(default_factory=list)
    image_text: str = ""
    device: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted({name.partition("=")[0] for name in self.suites} - {*SUITES, "all"}):
            raise ValueError(f"suites: there is no {unknown[0]!r}; there are all, {', '.join(SUITES)}")
        if (self.rules.least_score is None) != (not self.image_text):
            raise ValueError("rules.least_score and image_text need each other")


class TowerScorer:
    """The cosine of an image-text model between each picture and its text, in [-1, 1]."""

    def __init__(self, model: ImageTextModel, fingerprint: str = ""):
        self.model, self.fingerprint = model, fingerprint

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """One for each pair."""
        return (self.model.embed_images(images) * self.model.embed_texts(texts)).sum(dim=1).tolist()


def _sign(suites: Sequence[Suite], known: Path) -> None:
    """Write ``known``, unless it holds these suites already: as many items of the same tasks, signed as we do now."""
    told = known.with_suffix(".json")
    of = [[s.name, s.version, s.seed, s.per_task, list(s.tasks), s.data] for s in suites]
    wanted = json.dumps({"signed": SIGNED, "suites": of}) + "\n"
    if known.is_file() and told.is_file() and told.read_text(encoding="utf-8") == wanted:
        return
    known.parent.mkdir(parents=True, exist_ok=True)
    told.unlink(missing_ok=True)  # what is killed in between is signed again
    fingerprint(suites).save(known)
    write_text(told, wanted)


def digest_of(source: str, model: ImageTextModel) -> str:
    """Of everything in the folder that a ``model`` was loaded from, or of its weights where ``source`` is a hub id:
    another model of the same name would score otherwise."""
    digest, folder = hashlib.blake2b(digest_size=8), Path(source)
    if folder.is_dir():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                told = hashlib.file_digest(file, "blake2b").hexdigest()
            digest.update(f"{path.relative_to(folder)}:{told}\n".encode())
        return digest.hexdigest()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def clean(config: Config) -> Curation:
    """Sign the suites where that is not done, and curate."""
    plain = CurateConfig(**{f.name: getattr(config, f.name) for f in fields(CurateConfig)})
    if config.suites:
        check_free(Path(config.to))
        known = Path(config.to) / JUDGED[0]
        given = dict.fromkeys(name for name in config.suites if name != "all")
        held = {name.partition("=")[0] for name in given}
        rest = [name for name in SUITES if name not in held] if "all" in config.suites else []
        _sign([named_suite(name, SUITES) for name in (*rest, *given)], known)
        rules = replace(plain.rules, evaluations=[*plain.rules.evaluations, str(known)])
        plain = replace(plain, rules=rules)
    scorer = None
    if config.image_text:
        device = chosen_device(config.device)
        model = load_image_text(config.image_text)
        known_by = digest_of(config.image_text, model)
        scorer = TowerScorer(model.to(device), known_by)
    return curate(plain, scorer)


def _preset(config: CurateConfig) -> Config:
    return Config(**{f.name: getattr(config, f.name) for f in fields(CurateConfig)})


def main(argv: Sequence[str] | None = None) -> None:
    """Curate, and print what came of it."""
    presets = {make.__name__: (lambda make=make: _preset(make())) for make in (safe, pairs, text)}
    config = parse_cli(presets, __doc__ or "", argv)
    try:
        result = clean(config)
    except (BuildError, ConfigError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(result.table())
    unscored = f", {result.unscored} of them not scored" if result.unscored else ""
    print(f"{config.to}: {result.kept} of {result.seen} samples kept{unscored}")
    if problem := result.problem(config.max_torn):
        raise SystemExit(f"error: {problem}")


if __name__ == "__main__":
    main()
