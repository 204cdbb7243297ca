"""Held-out packs: the training mix of other samples, the same at every call and on every number of ranks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipelines.documents import read_quarantine
from data_pipelines.held_out import HeldOut, ValidationConfig
from data_pipelines.mixture import SourceConfig
from data_pipelines.shards import ShardWriter
from mmagent.dist import World, run_ranks
from mmagent.records import EncodedImage
from mmagent.vocab import Vocab
from tests.data_pipelines.test_stream import all_same, keys, screen_record, stream, take, text_record

HELD_OUT = 1000  # the first number of a held-out sample


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for folder, first in ((root, 0), (root / "validation", HELD_OUT)):
        for name, make, count in (("screens", screen_record, 90), ("text", text_record, 70)):
            with ShardWriter(folder / name, max_samples=25) as writer:
                for n in range(first, first + count):
                    writer.write(make(n))
    with ShardWriter(root / "validation" / "poems") as writer:
        writer.write(text_record(5))
    Vocab.train(["where is at 0 1 2 3 4 5 6 7 8 9?"], 300).save(root)
    return root


def held_out(root: Path, steps: int = 2, world: World | None = None, **changes: object) -> HeldOut:
    return HeldOut(ValidationConfig(str(root / "validation"), steps=steps), stream(root, world, **changes))


def test_every_call_gives_the_same_packs_and_training_goes_on(root):
    with closing(stream(root)) as training, closing(stream(root)) as undisturbed:
        packs = HeldOut(ValidationConfig(str(root / "validation"), steps=2), training)
        shown = [*take(training, 1), list(packs()), *take(training, 2), list(packs()), *take(training, 1)]
        assert all_same([shown[1]], [shown[4]])
        assert all_same([shown[n] for n in (0, 2, 3, 5)], take(undisturbed, 4))
        assert training.state_dict() == undisturbed.state_dict()
        assert training.quarantine.seen == undisturbed.quarantine.seen
    assert len(shown[1]) == 2 * training.accumulation
    numbers = {int(key.rpartition("-")[2]) for pack in keys([shown[1]]) for key in pack}
    assert min(numbers) >= HELD_OUT


def test_the_mix_is_that_of_training(root):
    packs = held_out(root, steps=4)
    share: dict[str, int] = {"screens": 0, "text": 0}
    for batch in packs():
        for length, source in zip(batch.segments.lengths, batch.sources, strict=False):  # the tail has no source
            share[source] += length
    assert share["screens"] / sum(share.values()) == pytest.approx(0.75, abs=0.03)
    assert packs.describe() == "validation: 4 steps of 1024 tokens of screens (90 samples), text (70 samples)"


def mine(world: World, root: str) -> list[tuple[str, ...]]:
    return [batch.keys for batch in held_out(Path(root), world=world)()]


def test_ranks_share_the_same_packs_evenly(root):
    alone = keys([list(held_out(root)())])
    for ranks in (2, 4):
        parts = run_ranks(mine, ranks, str(root))
        assert {len(part) for part in parts} == {len(alone) // ranks}
        assert sorted(pack for part in parts for pack in part) == sorted(alone)


def test_a_source_may_lie_elsewhere_or_be_missing(root, tmp_path):
    with closing(stream(root)) as training:
        packs = HeldOut(ValidationConfig(paths={"text": str(root / "validation" / "text")}), training)
    assert packs.describe().endswith("of text (70 samples); no held-out shards of screens")
    assert {source for batch in packs() for source in batch.sources} == {"text"}


def test_what_cannot_be_held_out_is_named(root, tmp_path):
    with closing(stream(root)) as training:
        for config, problem in (
            (ValidationConfig(), "validation.folder: is empty, so there are no held-out shards of screens, text"),
            (ValidationConfig(str(tmp_path)), f"{tmp_path} holds no shards of screens, text"),
            (ValidationConfig(str(root / "text")), f"{root}/text is a shard set itself; name .* {root}, whose"),
            (ValidationConfig(paths={"txt": "x"}), "validation.paths.txt: .* did you mean 'text'"),
            (ValidationConfig(str(root)), "source 'screens' trains on the shard .*/screens/shard-00000.tar"),
        ):
            with pytest.raises(ValueError, match=problem):
                HeldOut(config, training)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        ValidationConfig(steps=0)


def test_a_shard_that_is_trained_on_is_refused_under_any_path(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    (tmp_path / "link").symlink_to(root / "text")
    (tmp_path / "mixed").mkdir()
    for name, folder in (("a", root / "validation" / "text"), ("b", root / "text")):
        (tmp_path / "mixed" / f"{name}.tar").symlink_to(folder / "shard-00001.tar")
    sources = {name: SourceConfig(name) for name in ("screens", "text")}
    with closing(stream(root, sources=sources)) as training:
        for path, owner, shard in (
            (root / "text", "text", root / "text" / "shard-00000.tar"),
            (tmp_path / "link", "text", tmp_path / "link" / "shard-00000.tar"),
            ("text/shard-00001.tar", "text", "text/shard-00001.tar"),
            (tmp_path / "mixed", "text", tmp_path / "mixed" / "b.tar"),
            ("screens", "screens", "screens/shard-00000.tar"),
        ):
            with pytest.raises(ValueError, match=f"source '{owner}' trains on the shard {shard}$"):
                HeldOut(ValidationConfig(paths={"text": str(path)}), training)


def write_screens(folder: Path, good: int) -> None:
    """Held-out screens and, last, one whose image cannot be decoded."""
    bad = screen_record(HELD_OUT)
    with ShardWriter(folder) as writer:
        for n in range(HELD_OUT, HELD_OUT + good):
            writer.write(screen_record(n))
        writer.write(replace(bad, key="bad", images=(EncodedImage(bad.images[0].data[:60], "png"),)))


def test_unusable_samples_are_logged_apart(root, tmp_path):
    write_screens(tmp_path / "screens", good=60)
    sources = {"screens": SourceConfig(str(root / "screens"))}
    with closing(stream(root, sources=sources)) as training:
        quarantine = replace(training.config.quarantine, folder=str(tmp_path / "bad"))
    with closing(stream(root, sources=sources, quarantine=quarantine)) as training:
        packs = HeldOut(ValidationConfig(str(tmp_path), steps=3), training)
        assert len(list(packs())) == len(list(packs()))
        assert training.quarantine.total == 0
    (line,) = read_quarantine(tmp_path / "bad" / "validation" / "quarantine-0.jsonl")
    assert line["key"] == "bad"


def test_a_bad_sample_read_again_and_again_does_not_stop_the_run(root, tmp_path):
    """One in 61 is more than training bears, once the repeats are enough to judge by."""
    write_screens(tmp_path / "screens", good=60)
    with closing(stream(root, sources={"screens": SourceConfig(str(root / "screens"))})) as training:
        assert len(list(HeldOut(ValidationConfig(str(tmp_path), steps=12), training)())) == 12 * training.accumulation


def test_samples_of_which_none_is_usable_are_refused_at_once(root, tmp_path):
    write_screens(tmp_path / "screens", good=0)
    with closing(stream(root)) as training, pytest.raises(ValueError, match=r"not one of 1 samples in .*screens is"):
        HeldOut(ValidationConfig(str(root / "validation"), {"screens": str(tmp_path / "screens")}), training)
