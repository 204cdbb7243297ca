"""Shuffling and mixing are functions of counters: a permutation every epoch, exact shares, no state but counts."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.mixture import (
    Mixture,
    Source,
    SourceConfig,
    digest,
    open_sources,
    permute,
)
from data_pipelines.stream import StreamConfig
from mmagent.config import ConfigError, resolve


class Shards:
    """As long as a shard set; a mixture asks no more."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(n, size, key) for n in range(size)) == list(range(size))


def test_permute_scatters():
    order = [permute(n, 1000, digest("x")) for n in range(1000)]
    assert order != sorted(order)
    assert order != [permute(n, 1000, digest("y")) for n in range(1000)]
    assert 250 < sum(abs(a - b) for a, b in pairwise(order)) / 999 < 420  # 333 if random
    fixed = sum(n == at for n, at in enumerate(order))
    assert fixed < 8  # one on average
    assert permute(2**40 + 5, 2**40 + 6, 1) < 2**40 + 6  # no table, whatever the size


def test_epochs_use_every_sample_once_in_orders_of_their_own():
    source = Source("s", Shards(50), SourceConfig(), seed=3)
    epochs = [[source.sample(50 * e + n) for n in range(50)] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [Source("s", Shards(50), SourceConfig(), seed=3).sample(n) for n in range(50)] == epochs[0]
    assert [Source("s", Shards(50), SourceConfig(), seed=4).sample(n) for n in range(50)] != epochs[0]


@given(st.integers(1, 5), st.integers(1, 40))
def test_streams_share_an_epoch_without_overlap(streams, size):
    source = Source("s", Shards(size), SourceConfig(), seed=0)
    mixtures = [Mixture([source], n, streams, seed=0, unit=1) for n in range(streams)]
    seen = Counter(mixture.next()[1] for _ in range(size) for mixture in mixtures)
    assert set(seen.values()) == {streams}


def draw(mixture: Mixture, amounts: dict[str, int], count: int) -> list[tuple[str, int]]:
    out = []
    for _ in range(count):
        out.append(mixture.next())
        mixture.take(out[-1][0], amounts[out[-1][0]])
    return out


def share(drawn: list[tuple[str, int]], amounts: dict[str, int], of: str) -> float:
    total = sum(amounts[name] for name, _ in drawn)
    return sum(amounts[name] for name, _ in drawn if name == of) / total


def sources(**weights: float) -> list[Source]:
    return [Source(name, Shards(100), SourceConfig(weight=weight), seed=1) for name, weight in weights.items()]


def test_shares_are_met_at_once_whatever_the_documents_weigh():
    mixture = Mixture(sources(long=1.0, short=3.0), 0, 1, seed=0, unit=1000)
    weigh = {"long": 700, "short": 10}
    assert share(draw(mixture, weigh, 2000), weigh, "long") == pytest.approx(0.25, abs=0.03)
    counts = Counter(name for name, _ in draw(Mixture(sources(a=1.0, b=3.0), 0, 1, 0, 2), {"a": 1, "b": 1}, 400))
    assert abs(counts["a"] - 100) <= 2


def test_weights_change_by_step_in_straight_lines():
    config = SourceConfig(weight=2.0, schedule={10: 1.0, 20: 3.0, 30: 0.0})
    assert [config.at(step) for step in (0, 10, 15, 20, 25, 30, 99)] == [2.0, 2.0, 4.0, 6.0, 3.0, 0.0, 0.0]
    assert SourceConfig(weight=2.0).at(10**9) == SourceConfig(weight=2.0).most == 2.0
    assert config.most == 6.0


def test_a_changed_weight_counts_from_its_step_on_and_makes_up_for_nothing():
    """Not as if it had always been so: a source that comes back does not claim what it missed."""
    changing = Source("a", Shards(100), SourceConfig(schedule={0: 1, 100: 1, 101: 0, 200: 0, 201: 3}), seed=1)
    steady, rising = (
        Source(name, Shards(100), SourceConfig(schedule=schedule), seed=1)
        for name, schedule in (("b", {}), ("c", {0: 0, 300: 0, 400: 1}))
    )
    mixture, weigh, drawn = Mixture([changing, steady, rising], 0, 1, seed=0, unit=300), {"a": 70, "b": 30, "c": 50}, {}
    for step in range(500):
        mixture.at(step)
        drawn[step] = draw(mixture, weigh, 20)

    def of(name: str, first: int, end: int) -> float:
        return share([one for step in range(first, end) for one in drawn[step]], weigh, name)

    # within a document or two of about 900 tokens a step
    assert of("a", 0, 101) == pytest.approx(1 / 2, abs=0.01)
    assert of("a", 101, 201) == 0
    assert of("a", 201, 211) == pytest.approx(3 / 4, abs=0.03)  # at once, and no more
    assert of("a", 201, 301) == pytest.approx(3 / 4, abs=0.01)
    assert of("c", 0, 301) == 0
    assert of("c", 345, 356) == pytest.approx(0.5 / 4.5, abs=0.02)  # half way up
    assert of("c", 400, 500) == pytest.approx(1 / 5, abs=0.01)


def test_streams_do_not_mix_in_step():
    mixtures = [Mixture(sources(a=1.0, b=1.0, c=1.0), n, 8, seed=0, unit=1000) for n in range(8)]
    assert len({mixture.next()[0] for mixture in mixtures}) > 1


@given(st.integers(0, 60))
def test_a_mixture_continues_from_its_counts(stop):
    amounts = {"a": 13, "b": 29}
    whole = Mixture(sources(a=1.0, b=2.0), 1, 3, seed=5, unit=100)
    expected = draw(whole, amounts, 80)
    first, second = (Mixture(sources(a=1.0, b=2.0), 1, 3, seed=5, unit=100) for _ in range(2))
    head = draw(first, amounts, stop)
    second.load_state_dict(first.state_dict())
    assert head + draw(second, amounts, 80 - stop) == expected
    assert second.epoch("b") == whole.epoch("b") == whole.consumed["b"] * 3 / 100


def test_weights_are_checked():
    with pytest.raises(ValueError, match=r"sources\.web\.weight: -1"):
        open_sources({"web": SourceConfig("x", -1.0)}, 0)
    with pytest.raises(ValueError, match=r"all have the weight 0 \(pages, web\).*such as sources\.pages\.weight=1"):
        open_sources({"web": SourceConfig("x", 0.0), "pages": SourceConfig(weight=0)}, 0, "/nowhere")
    with pytest.raises(ValueError, match=r"sources\.web\.weight: inf"):
        open_sources({"web": SourceConfig("x", float("inf"))}, 0)
    with pytest.raises(ValueError, match=r"sources\.web\.schedule\.7: -1"):
        open_sources({"web": SourceConfig("x", schedule={7: -1.0})}, 0)
    with pytest.raises(ValueError, match=r"sources\.web\.schedule: step -7 is negative"):
        open_sources({"web": SourceConfig("x", schedule={-7: 1.0})}, 0)
    with pytest.raises(ValueError, match=r"sources\.web\.path: is empty"):
        open_sources({"web": SourceConfig()}, 0)
    with pytest.raises(ValueError, match=r"sources: /nowhere holds no shards; name a folder"):
        open_sources({}, 0, "/nowhere")
    with pytest.raises(ValueError, match="no folder is given, and no source"):
        open_sources({}, 0)


def test_weights_of_0_are_not_taken_for_missing_shards(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "shard-00000.tar").touch()
    with pytest.raises(ValueError, match="all have the weight 0") as raised:
        open_sources({"web": SourceConfig(weight=0.0)}, 0, str(tmp_path))
    assert "holds no shards" not in str(raised.value)


def test_a_set_in_the_place_of_its_folder_is_told_so(tmp_path, monkeypatch):
    photos = tmp_path / "mine/photos"
    photos.mkdir(parents=True)
    (photos / "shard-00000.tar").touch()
    told = re.escape(f"{photos} is a shard set itself; name the folder that it lies in, {tmp_path}/mine, whose")
    for sources in ({}, {"photos": SourceConfig()}):
        with pytest.raises(ValueError, match=told):
            open_sources(sources, 0, str(photos))
    monkeypatch.chdir(photos)
    with pytest.raises(ValueError, match=re.escape(f"name the folder that it lies in, {tmp_path}/mine, whose")):
        open_sources({}, 0, ".")


def test_steps_of_a_schedule_that_are_not_in_order_are_refused():
    """One of them is mistyped, and the mixture would be another one without a word."""
    problem = r'steps must rise.*: 0, 10000, 2000;.*"sources\.web\.schedule=\{0: 1, 2000: 3, 10000: 2\}"'
    with pytest.raises(ValueError, match=problem):
        open_sources({"web": SourceConfig("x", schedule={0: 1.0, 10000: 2.0, 2000: 3.0})}, 0)


def test_a_misspelt_source_is_told_the_nearest(tmp_path):
    """In place of a source that is silently another one, or of a folder that nobody has heard of."""
    for name in ("screens", "pages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00000.tar").touch()
    with pytest.raises(ValueError, match=r"sources.screns: .* holds no shards of that name; did you mean 'screens'"):
        open_sources({"screns": SourceConfig()}, 0, str(tmp_path))
    with pytest.raises(ValueError, match="there are pages, screens"):
        open_sources({"videos": SourceConfig()}, 0, str(tmp_path))


def test_sources_can_be_named_on_a_command_line():
    config = resolve(StreamConfig(), ["folder=runs/data", "sources.web.weight=2", "sources.web.path=x", "seed=3"])
    assert (config.folder, config.seed) == ("runs/data", 3)
    assert config.sources == {"web": SourceConfig("x", 2.0)}
    config = resolve(StreamConfig(), ["sources.web.schedule={0: 1, 2000: 0.5}"])
    assert config.sources == {"web": SourceConfig(schedule={0: 1.0, 2000: 0.5})}


@pytest.mark.parametrize("value", ["={0:1}", "={0:1,1000:3}", "={a: 1}", "={0.5: 1}", ".0=1"])
def test_a_schedule_that_is_no_mapping_of_steps_is_told_its_syntax(value):
    problem = r'^sources\.web\.schedule: .*like "sources\.web\.schedule=\{0: 1, 1000: 3\}"'
    with pytest.raises(ConfigError, match=problem):
        resolve(StreamConfig(), [f"sources.web.schedule{value}"])


@pytest.mark.parametrize("value", ["{0: 1", "[0, 1]", "1", "[[0, 1], [5, 2]]"])
def test_what_is_no_mapping_at_all_is_told_how_one_is_written(value):
    with pytest.raises(ConfigError, match=r"^sources\.web\.schedule: .*a mapping \{a: 1, b: 2\}, with a blank"):
        resolve(StreamConfig(), [f"sources.web.schedule={value}"])
