"""The stream: full packs, exact resume at every step, and the same packs on any number of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from data_pipelines.documents import QuarantineConfig, QuarantineError, read_quarantine
from data_pipelines.mixture import SourceConfig
from data_pipelines.shards import ShardWriter
from data_pipelines.stream import PackStream, StreamConfig
from mmagent.chat import Image, Text, assistant, user
from mmagent.dist import World, run_ranks
from mmagent.geometry import GeometryConfig
from mmagent.records import EncodedImage, Record, encode_image
from mmagent.types import PackedBatch
from mmagent.vocab import Vocab

GEOMETRY = GeometryConfig(patch_size=4, min_tokens=2, max_tokens=48)


def screen_record(n: int) -> Record:
    random = np.random.default_rng(n)
    height, width = (int(side) for side in random.integers(16, 60, 2))
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    turns = []
    for turn in range(int(random.integers(1, 4))):
        turns += [user(*([Image()] if turn == 0 else []), f"where is {turn}?"), assistant(f"at {n % 997} {turn}")]
    return Record(f"screen-{n:05d}", "screens", tuple(turns), images=(encode_image(pixels),))


def text_record(n: int) -> Record:
    words = np.random.default_rng(n).integers(0, 1000, int(np.random.default_rng(n).integers(3, 40)))
    return Record(f"text-{n:05d}", "text", parts=(Text(" ".join(map(str, words))),))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for name, make, count in (("screens", screen_record, 90), ("text", text_record, 70)):
        with ShardWriter(root / name, max_samples=25) as writer:
            for n in range(count):
                writer.write(make(n))
    Vocab.train(["where is at 0 1 2 3 4 5 6 7 8 9?"], 300).save(root)
    return root


def config(root: Path, **changes: object) -> StreamConfig:
    sources = {
        "screens": SourceConfig(str(root / "screens"), 3.0),
        "text": SourceConfig(str(root / "text"), 1.0),
    }
    small = StreamConfig(
        sources=sources,
        tokens_per_step=4 * 256,
        tokens_per_microbatch=256,
        patches_per_microbatch=800,
        buffer=24,
        prefetch=0,
        threads=0,
    )
    return replace(small, **changes)


def stream(root: Path, world: World | None = None, **changes: object) -> PackStream:
    return PackStream(config(root, **changes), Vocab.load(root), GEOMETRY, world=world)


def take(packs: PackStream, steps: int) -> list[list[PackedBatch]]:
    return [next(packs) for _ in range(steps)]


def take_each(packs: PackStream, steps: int) -> Iterator[list[PackedBatch]]:
    return (next(packs) for _ in range(steps))


def same(a: PackedBatch, b: PackedBatch) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "labels", "positions", "visual_slots")
    )
    both = a.vision is not None and b.vision is not None
    vision = torch.equal(a.vision.patches, b.vision.patches) if both else a.vision is b.vision
    return tensors and vision and (a.keys, a.sources, a.segments.lengths) == (b.keys, b.sources, b.segments.lengths)


def all_same(a: list[list[PackedBatch]], b: list[list[PackedBatch]]) -> bool:
    return len(a) == len(b) and all(len(x) == len(y) and all(map(same, x, y)) for x, y in zip(a, b, strict=True))


def keys(steps: list[list[PackedBatch]]) -> list[tuple[str, ...]]:
    return [batch.keys for step in steps for batch in step]


def test_steps_hold_full_packs_within_both_budgets(shards):
    packs = stream(shards, buffer=64)
    fills = []
    for step in take(packs, 12):
        assert len(step) == packs.accumulation == 4
        for batch in step:
            assert batch.num_tokens <= 256
            assert batch.num_patches <= 800
            assert batch.tail == 0
        fills.append(packs.metrics["data/fill"])
    assert np.mean(fills) > 0.99
    record = {"loss": 1.0}
    packs.log(12, record)
    assert record == {"loss": 1.0} | packs.metrics
    assert record["time/data"] > 0
    assert 0 < record["data/fill_patches"] < 1
    assert record["data/epoch/screens"] > 0
    assert "4 micro-batches of 256 tokens" in packs.describe()
    assert "screens 75% of 90 samples" in packs.describe()


def test_a_stream_short_of_patches_says_so_once(shards, caplog):
    take(stream(shards), 25)
    assert not caplog.records
    take(stream(shards, patches_per_microbatch=200), 25)
    (warning,) = caplog.records
    advice = re.search(r"patches_per_microbatch 200 is full in \d+% of them; about (\d+) would", warning.getMessage())
    packs = stream(shards, patches_per_microbatch=int(advice[1]))
    assert np.mean([packs.metrics["data/fill"] for _ in take_each(packs, 25)]) > 0.9
    assert len(caplog.records) == 1


def test_a_stream_of_large_documents_does_not_blame_patches(tmp_path, shards, caplog):
    """Two of them exceed a pack by their tokens, and their pictures are small."""
    with ShardWriter(tmp_path / "large") as writer:
        for n in range(12):
            picture = encode_image(np.full((16, 16, 3), n, np.uint8))
            writer.write(Record(f"large-{n}", "large", parts=(Image(), Text(" ".join(["12"] * 70))), images=(picture,)))
    packs = stream(shards, sources={"large": SourceConfig(str(tmp_path / "large"))})
    take(packs, 25)
    assert 0.5 < packs.metrics["data/fill"] < 0.9
    (warning,) = caplog.records
    assert "documents are large for it" in warning.getMessage()
    assert "patches" not in warning.getMessage()
    tokens = packs.metrics["data/fill"] * 1024 / packs.metrics["data/documents"]
    assert f"{tokens:.0f} tokens on average" in warning.getMessage()


def test_a_folder_of_sources_needs_no_paths(shards):
    by_path = stream(shards)
    by_folder = stream(shards, folder=str(shards), sources={"screens": SourceConfig(weight=3.0)})
    assert keys(take(by_path, 3)) == keys(take(by_folder, 3))
    only = stream(shards, folder=str(shards), sources={"screens": SourceConfig(weight=0.0)})
    assert [source.name for source in only.sources] == ["text"]


def test_an_epoch_uses_every_document_once(shards):
    packs = stream(shards, sources={"text": SourceConfig(str(shards / "text"))})
    seen: list[str] = []
    while len(seen) < 70:
        seen += [key for batch in next(packs) for key in batch.keys]
    waiting = [w.draft.record.key for packer in packs._packers.values() for w in packer.waiting]
    counts = {key: (seen + waiting).count(key) for key in set(seen + waiting)}
    assert len(counts) == 70
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_document_starves(shards):
    packs = stream(shards, tokens_per_step=256, buffer=24)
    packer = packs._packers[0]
    latest: dict[int, int] = {}  # the pack by which a document must have left
    for _ in range(120):
        packer._refill()
        for place, w in enumerate(packer.waiting):
            latest.setdefault(id(w), packer.packs + place)
        for w in packer.next().documents:
            assert packer.packs - 1 <= latest.pop(id(w))


@pytest.mark.parametrize("prefetch, threads", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_resume_after_every_step_is_bitwise_equal(shards, prefetch, threads):
    whole = stream(shards)
    states, expected = [], []
    for _ in range(7):
        states.append(json.dumps(whole.state_dict()))
        expected.append(next(whole))
    for stop, state in enumerate(states):
        again = stream(shards, prefetch=prefetch, threads=threads)
        again.load_state_dict(json.loads(state))
        assert all_same(take(again, len(expected) - stop), expected[stop:])
        again.close()


def test_state_is_that_of_the_delivered_step_and_small(shards, tmp_path):
    ahead, plain = stream(shards, prefetch=3, threads=2), stream(shards)
    for _ in range(5):
        assert ahead.state_dict() == plain.state_dict()
        assert all_same([next(ahead)], [next(plain)])
    torch.save(ahead.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == plain.state_dict()
    assert len(json.dumps(plain.state_dict())) < 10_000
    ahead.load_state_dict(ahead.state_dict())  # in the middle of prefetching, which then starts anew
    assert all_same([next(ahead)], [next(plain)])
    ahead.close()


def on_ranks(world: World, root: str, steps: int, state: dict | None, balance: int) -> tuple[list, dict]:
    packs = stream(Path(root), world=world, balance_ranks=balance)
    if state is not None:
        packs.load_state_dict(state)
    return keys(take(packs, steps)), packs.state_dict()


def alone(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def test_the_union_over_ranks_is_the_single_rank_step(shards):
    lone = stream(shards)
    ranks = [stream(shards, world=alone(rank, 2)) for rank in range(2)]
    for _ in range(6):
        together = [batch for packs in ranks for batch in next(packs)]
        single = {batch.keys: batch for batch in next(lone)}
        assert sorted(batch.keys for batch in together) == sorted(single)
        assert all(same(batch, single[batch.keys]) for batch in together)
    assert lone.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()


def test_ranks_of_one_context_read_the_same_packs(shards, tmp_path):
    """Two contexts of two ranks read what two ranks do; one rank of a context logs what is bad."""
    wanted = [take(stream(shards, world=alone(rank, 2)), 3) for rank in range(2)]
    streams = [stream(shards, world=alone(rank, 4).with_context(2)) for rank in range(4)]
    assert "2 contexts of 2 ranks x 2 micro-batches" in streams[0].describe()
    for rank, packs in enumerate(streams):
        assert all_same(take(packs, 3), wanted[rank // 2])
    sources = spoil(shards, tmp_path, 3, "cut")
    quarantine = QuarantineConfig(str(tmp_path / "log"), max_share=1.0)
    for rank in range(4):
        take(stream(shards, sources=sources, quarantine=quarantine, world=alone(rank, 4).with_context(2)), 3)
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"quarantine-0.jsonl", "quarantine-1.jsonl"}


def test_packs_are_dealt_by_cost(shards):
    dealt = [stream(shards, world=alone(rank, 2)) for rank in range(2)]
    in_turn = [stream(shards, world=alone(rank, 2), balance_ranks=1) for rank in range(2)]
    gaps: dict[str, float] = {"dealt": 0.0, "in turn": 0.0}
    weights = dealt[0].weights
    for _ in range(10):
        for name, ranks in (("dealt", dealt), ("in turn", in_turn)):
            loads = []
            for packs in ranks:
                costs = [weights(batch.cost()) for batch in next(packs)]
                assert costs == sorted(costs, reverse=True)
                loads.append(sum(costs))
            gaps[name] += max(loads) - min(loads)
    assert gaps["dealt"] <= gaps["in turn"]


@pytest.mark.parametrize("balance", [1, 8])
def test_the_world_may_change_where_streams_divide(shards, balance):
    lone = stream(shards)
    expected = [sorted(keys([next(lone)])) for _ in range(6)]
    state, got = None, []
    for size in (2, 1, 4):
        if size == 1:
            packs = stream(shards)
            packs.load_state_dict(state)
            results = [(keys(take(packs, 2)), packs.state_dict())]
        else:
            results = run_ranks(on_ranks, size, str(shards), 2, state, balance)
        each = 4 // size
        got += [sorted(k for some, _ in results for k in some[step * each : (step + 1) * each]) for step in range(2)]
        assert all(result[1] == results[0][1] for result in results)
        state = json.loads(json.dumps(results[0][1]))
    assert [[tuple(k) for k in step] for step in got] == expected
    assert state == lone.state_dict()


def test_numbers_that_do_not_divide_are_refused_with_both(shards):
    with pytest.raises(ValueError, match=r"4 logical streams .* 3 ranks"):
        stream(shards, world=alone(0, 3))
    with pytest.raises(ValueError, match=r"4 micro-batches .* 3 logical streams"):
        stream(shards, logical_streams=3)
    with pytest.raises(ValueError, match=r"tokens_per_step 1000 .* tokens_per_microbatch 256"):
        stream(shards, tokens_per_step=1000)
    with pytest.raises(ValueError, match="buffer must be at least 1"):
        stream(shards, buffer=0)


def test_a_checkpoint_that_does_not_fit_is_refused_with_both_values(shards, tmp_path):
    packs = stream(shards)
    next(packs)
    state = packs.state_dict()
    with pytest.raises(ValueError, match="logical_streams: the checkpoint has 4, this run 2"):
        stream(shards, logical_streams=2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed: the checkpoint has 0, this run 9"):
        stream(shards, seed=9).load_state_dict(state)
    with pytest.raises(ValueError, match=r"sources\.screens: the checkpoint has 90 samples .* no such source"):
        stream(shards, sources={"text": SourceConfig(str(shards / "text"))}).load_state_dict(state)
    with ShardWriter(tmp_path) as writer:
        for n in range(69):
            writer.write(text_record(n))
    sources = config(shards).sources | {"text": SourceConfig(str(tmp_path))}
    with pytest.raises(ValueError, match=r"sources\.text: the checkpoint has 70 samples .* this run 69 samples"):
        stream(shards, sources=sources).load_state_dict(state)


def test_shards_that_were_written_anew_at_equal_size_are_refused(tmp_path, caplog):
    def write(said: str) -> None:
        with ShardWriter(tmp_path / "text", max_samples=8) as writer:
            for n in range(20):
                writer.write(Record(f"text-{n}", "text", parts=(Text(f"{said if n == 9 else 'where'} is {n}?"),)))

    write("where")
    Vocab.train(["where is at 0 1 2 3 4 5 6 7 8 9?"], 300).save(tmp_path)
    sources = {"text": SourceConfig(str(tmp_path / "text"))}
    first = stream(tmp_path, sources=sources)
    take(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    stream(tmp_path, sources=sources).load_state_dict(state)
    shutil.rmtree(tmp_path / "text")
    write("there")
    with pytest.raises(
        ValueError, match=r"sources\.text: shard-00001.tar holds other samples .* in as many bytes .1 of 3 shards"
    ):
        stream(tmp_path, sources=sources).load_state_dict(state)
    assert not caplog.records
    del state["contents"]  # as they were written before
    stream(tmp_path, sources=sources).load_state_dict(state)
    assert "is not known" in caplog.text


def test_a_fixed_number_of_logical_streams_allows_larger_steps(shards):
    packs = stream(shards, logical_streams=2)
    first = take(packs, 2)
    larger = stream(shards, logical_streams=2, tokens_per_step=8 * 256)
    larger.load_state_dict(packs.state_dict())
    assert len(next(larger)) == 8
    assert len(first[0]) == 4


def test_a_smaller_budget_refuses_what_waited_and_no_longer_fits(shards, tmp_path):
    packs = stream(shards)
    take(packs, 2)
    log = QuarantineConfig(str(tmp_path), max_share=1.0)
    smaller = stream(shards, tokens_per_step=4 * 80, tokens_per_microbatch=80, quarantine=log)
    smaller.load_state_dict(packs.state_dict())
    assert all(batch.num_tokens <= 80 for step in take(smaller, 3) for batch in step)
    assert {line["reason"] for line in read_quarantine(tmp_path / "quarantine-0.jsonl")} == {"tokens"}


def spoil(root: Path, tmp_path: Path, every: int, how: str) -> dict[str, SourceConfig]:
    """The screens, with every so many images damaged."""
    with ShardWriter(tmp_path / "spoiled", max_samples=30) as writer:
        for n in range(90):
            one = screen_record(n)
            if n % every == 0:
                data = one.images[0].data
                spoiled = {"cut": data[: len(data) * 2 // 3], "aspect": None}[how]
                image = encode_image(np.zeros((1, 900, 3), np.uint8)) if spoiled is None else None
                one = replace(one, images=(image or EncodedImage(spoiled, "png"),))
            writer.write(one)
    return {"screens": SourceConfig(str(tmp_path / "spoiled"))}


@pytest.mark.parametrize("how", ["cut", "aspect"])
def test_bad_samples_are_left_out_counted_and_resumed_over(shards, tmp_path, how):
    settings = {
        "sources": spoil(shards, tmp_path, 15, how),
        "quarantine": QuarantineConfig(str(tmp_path / "log"), max_share=0.2),
    }
    packs = stream(shards, **settings)
    bad = {f"screen-{n:05d}" for n in range(0, 90, 15)}
    states, expected, counts = [], [], []
    for _ in range(9):
        states.append(packs.state_dict())
        expected.append(next(packs))
        counts.append(packs.metrics["data/quarantined"])
        assert all(batch.num_tokens > 0 for batch in expected[-1])
    seen = {key for some in keys(expected) for key in some}
    assert not seen & bad
    lines = read_quarantine(tmp_path / "log" / "quarantine-0.jsonl")
    assert {line["key"] for line in lines} == bad
    assert all(line["reason"] == "images" and line["shard"].startswith("shard-0000") for line in lines)
    assert sum(counts) >= len(bad)
    for stop in (0, 4, 8):
        again = stream(shards, prefetch=1, threads=2, **settings)
        again.load_state_dict(states[stop])
        for n in range(stop, 9):
            assert all_same([next(again)], [expected[n]])
            assert again.metrics["data/quarantined"] == counts[n]
        again.close()
    assert len(read_quarantine(tmp_path / "log" / "quarantine-0.jsonl")) == len(lines)


@pytest.mark.parametrize("how", ["cut", "aspect"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_past_the_share_the_stream_stops_and_stays_stopped(shards, tmp_path, how, prefetch):
    packs = stream(
        shards, sources=spoil(shards, tmp_path, 5, how), prefetch=prefetch, quarantine=QuarantineConfig("", 0.1, 20)
    )
    for _ in range(2):
        with pytest.raises(QuarantineError, match=r"source 'screens': \d+ of \d+ samples are unusable"):
            take(packs, 50)
    packs.close()


def test_pictures_that_no_pack_holds_are_told_with_the_size_that_one_does(shards):
    """A pack of 100 patches holds 25 visual tokens."""
    limits = {"patches_per_microbatch": 100, "quarantine": QuarantineConfig("", 0.01, 20)}
    with pytest.raises(QuarantineError, match=r"; see pictures smaller by geometry\.max_tokens=25 \(or"):
        take(stream(shards, **limits), 50)
    fits = PackStream(config(shards, **limits), Vocab.load(shards), replace(GEOMETRY, max_tokens=25))
    take(fits, 10)
    assert fits.quarantine.total == 0
    limits = {**limits, "patches_per_microbatch": 4}  # one token, and geometry wants two at least
    with pytest.raises(QuarantineError, match=r"; raise the budget of a pack, or leave the source out"):
        take(stream(shards, **limits), 50)


def test_a_source_of_nothing_but_bad_samples_stops_the_run(shards, tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(Record("only", "s", (user("no answer"),)))
    sources = config(shards).sources | {"bad": SourceConfig(str(tmp_path))}
    with pytest.raises(QuarantineError, match="'bad': 200 of 200"):
        take(stream(shards, sources=sources), 50)


def test_every_kind_of_bad_sample_is_named_and_every_odd_one_accepted(shards, tmp_path):
    """Written by plain webdataset, as a user's own shards are."""

    def png(height: int, width: int) -> bytes:
        return encode_image(np.zeros((height, width, 3), np.uint8)).data

    def talk(text: str, **more: object) -> dict[str, object]:
        user_turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return {"source": "s", "messages": [user_turn, {"role": "assistant", "content": "a"}], **more}

    outside = {"boxes": [{"image": 0, "box": [0, 0, 9, 900]}]}
    samples = {
        "fine": {"json": talk("q"), "0.png": png(20, 20)},
        "tiny": {"json": talk("q"), "0.png": png(1, 1)},
        "spelled": {"json": talk("<|image|><|user|></think>"), "0.png": png(20, 20)},
        "no-json": {"0.png": png(20, 20)},
        "bad-json": {"json": b"{", "0.png": png(20, 20)},
        "no-image": {"json": talk("q")},
        "no-picture": {"json": talk("q"), "0.png": b"GIF89a nothing"},
        "truncated": {"json": talk("q"), "0.png": screen_record(1).images[0].data[:-300]},
        "long": {"json": talk("q" * 3000), "0.png": png(20, 20)},
        "banner": {"json": talk("q"), "0.png": png(8, 20_000)},
        "outside": {"json": talk("q", **outside), "0.png": png(20, 20)},
    }
    with webdataset.TarWriter(str(tmp_path / "mixed.tar"), encoder=False) as writer:
        for key, files in samples.items():
            body = {name: v if isinstance(v, bytes) else json.dumps(v).encode() for name, v in files.items()}
            writer.write({"__key__": key, **body})
    log = QuarantineConfig(str(tmp_path / "log"), max_share=1.0)
    packs = stream(shards, sources={"s": SourceConfig(str(tmp_path))}, quarantine=log)
    assert {key for keys_of in keys(take(packs, 3)) for key in keys_of} == {"fine", "tiny", "spelled"}
    lines = read_quarantine(tmp_path / "log" / "quarantine-0.jsonl")
    assert {line["key"]: line["reason"] for line in lines} == {
        "no-json": "json",
        "bad-json": "json",
        "no-image": "images",
        "no-picture": "images",
        "truncated": "images",
        "long": "tokens",
        "banner": "images",
        "outside": "boxes",
    }


def test_a_pack_whose_every_document_fails_is_all_tail(shards, tmp_path):
    data = screen_record(0).images[0].data
    with ShardWriter(tmp_path) as writer:
        for n in range(3):
            cut = EncodedImage(data[: len(data) // 2], "png")
            writer.write(replace(screen_record(0), key=f"k{n}", images=(cut,)))
    packs = stream(shards, sources={"s": SourceConfig(str(tmp_path))}, quarantine=QuarantineConfig("", 1.0))
    for batch in next(packs):
        assert (batch.num_tokens, batch.tail, batch.keys, batch.vision) == (0, 1, (), None)


def test_a_shard_cut_short_is_used_up_to_the_cut_and_logged(shards, tmp_path):
    with ShardWriter(tmp_path / "cut", max_samples=30) as writer:
        for n in range(60):
            writer.write(text_record(n))
    tar = tmp_path / "cut" / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    packs = stream(
        shards,
        sources={"text": SourceConfig(str(tmp_path / "cut"))},
        quarantine=QuarantineConfig(str(tmp_path / "log")),
    )
    take(packs, 4)
    (line,) = read_quarantine(tmp_path / "log" / "quarantine-0.jsonl")
    assert line["shard"].startswith("shard-00001.tar@")
    assert line["reason"] == "torn shard"
    assert packs.metrics["data/torn_shards"] == 1


def test_the_tail_can_be_padded_for_kernels(shards):
    for batch in next(stream(shards, tail_multiple=64)):
        assert batch.input_ids.shape[0] % 64 == 0


def interrupted(future: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_wait_loses_nothing(shards, monkeypatch):
    packs, plain = stream(shards, prefetch=1), stream(shards)
    expected = take(plain, 2)
    take(packs, 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(packs._ahead[0]), "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(packs)
    assert all_same([next(packs)], expected[1:])
    packs.close()


def resident() -> int:
    """Bytes this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat(shards):
    packs, seen = stream(shards, prefetch=2, threads=2), []
    for step in range(1200):
        next(packs)
        if step % 200 == 199:
            seen.append(resident())
    packs.close()
    assert max(seen[1:]) < seen[0] * 1.05 + 8e6


@pytest.mark.gpu
def test_batches_for_an_accelerator_are_pinned(shards):
    batch = next(stream(shards, world=World(0, 1, 0, torch.device("cuda"))))[0]
    assert batch.input_ids.is_pinned()
    moved = batch.to("cuda", non_blocking=True)
    assert same(moved.to("cpu"), batch)
