"""Held-out packs for a validation loss: the mix of a training stream, from shards that it does not train on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from data_pipelines.mixture import Source, SourceConfig, instead, itself
from data_pipelines.stream import PackStream
from mmagent.config import ConfigError
from mmagent.records import RecordError, from_sample
from mmagent.types import PackedBatch


@dataclass
class ValidationConfig:
    """What a validation looks at: ``steps`` of the size and the mix of training, always the same ones.

    The held-out shards of a source lie in the sub-folder of its name in ``folder``, or where ``paths`` says; a source
    of training that has none is left out, one with fewer samples than its share takes repeats them.
    """

    folder: str = ""
    paths: dict[str, str] = field(default_factory=dict)
    steps: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name, path in self.paths.items():
            if not path:
                raise ConfigError(f"validation.paths.{name}: is empty; leave it out, or name the held-out shards")

    def check(self, every: int) -> None:
        """Raises :class:`~mmagent.config.ConfigError` when ``every``, the recipe's ``validate_every``, is negative, or
        0 although held-out shards are named."""
        if every < 0:
            raise ConfigError(f"validate_every: {every} is negative; 0 is never")
        given = ["validation.folder"] if self.folder else [f"validation.paths.{name}" for name in self.paths]
        if given and not every:
            raise ConfigError(f"{given[0]}: would not be looked at; add validate_every=50, or leave it out")


class HeldOut:
    """Call it for this rank's micro-batches of one validation, as many on every rank.

    Every call reads a stream of its own from its beginning, so all calls give the same packs, whatever the number of
    ranks, and ``training`` stays where it is. Unusable samples are left out and logged as in training, in the
    sub-folder ``validation`` of its quarantine; but however many there are, they do not stop the run.
    """

    def __init__(self, config: ValidationConfig, training: PackStream):
        """Raises ``ValueError`` when no source has held-out shards, for a path of a source that training does not
        have, for a shard, under whatever path, that any of its sources trains on, and for held-out shards of a source
        without a usable sample."""
        self.steps, self.training = config.steps, training
        tars = Path(config.folder).glob("*/*.tar") if config.folder else ()
        found = {path.parent.name: str(path.parent) for path in tars}
        trained = {source.name: source for source in training.sources}
        for name in sorted(set(config.paths) - set(trained)):
            raise ValueError(f"validation.paths.{name}: training has no such source; {instead(name, trained)}")
        paths = {name: path for name, path in {**found, **config.paths}.items() if name in trained}
        if not paths:
            if config.folder and (told := itself(config.folder)):
                raise ValueError(f"validation.folder: {config.folder} {told}")
            where = f"{config.folder} holds no shards" if config.folder else "is empty, so there are no held-out shards"
            raise ValueError(f"validation.folder: {where} of {', '.join(trained)}, which this run trains on")
        self.left_out = sorted(set(trained) - set(paths))
        mine = training.config
        quarantine = replace(mine.quarantine, max_share=1.0)  # a few samples are read often: each bad one counts anew
        if quarantine.folder:
            quarantine = replace(quarantine, folder=str(Path(quarantine.folder) / "validation"))
        sources = {name: SourceConfig(path, trained[name].config.most) for name, path in paths.items()}
        self.config = replace(mine, folder="", sources=sources, prefetch=0, quarantine=quarantine)
        seen = {path.resolve(): source.name for source in training.sources for path in source.shards.paths}
        with closing(self._open()) as stream:
            for source in stream.sources:
                for path in source.shards.paths:
                    if path.resolve() in seen:
                        raise ValueError(f"validation: source {seen[path.resolve()]!r} trains on the shard {path}")
                self._find_usable(source)
            self.mix = ", ".join(f"{source.name} ({len(source.shards)} samples)" for source in stream.sources)

    def __call__(self) -> Iterator[PackedBatch]:
        with closing(self._open()) as stream:
            for batches in islice(stream, self.steps):
                yield from batches

    def describe(self) -> str:
        """One line for people."""
        left_out = f"; no held-out shards of {', '.join(self.left_out)}" if self.left_out else ""
        return f"validation: {self.steps} steps of {self.config.tokens_per_step} tokens of {self.mix}{left_out}"

    def _find_usable(self, source: Source) -> None:
        """As no share of bad samples is too large, a stream of nothing else would read them for ever."""
        problem: RecordError | None = None
        for n in range(len(source.shards)):
            try:
                for draft in self.training.builder.drafts(from_sample(source.shards.read(n))):
                    self.training.builder.finish(draft)
            except RecordError as error:
                problem = error
            else:
                return
        count, where = len(source.shards), source.shards.location
        raise ValueError(f"validation: not one of {count} samples in {where} is usable; the last: {problem}")

    def _open(self) -> PackStream:
        mine, builder = self.training, self.training.builder
        return PackStream(self.config, builder.vocab, builder.geometry, builder.chat, mine.world, mine.weights)
