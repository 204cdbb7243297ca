"""Items of suites are signed so that a sample which gives one away is found, and what only looks like it is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import pytest
from evals_kit import guess_suite

from data_pipelines.record_texts import turns_of
from data_pipelines.worlds import record_of
from evals.__main__ import main
from evals.fingerprint import _watch, fingerprint
from evals.suite import Play, item_key
from evals.suites.miniwob import miniwob
from evals.suites.worlds import worlds
from mmagent.contamination import Fingerprint, Match, Signed
from mmagent.records import Record, decode_image
from mmagent.trajectories import Item, Observation
from mmagent.worlds.catalogue import choose_worlds
from tests.toy_tasks import EchoTask

NAMES = ("counting", "spatial", "text")


def found(known: Fingerprint, record: Record) -> str:
    pictures = [Signed.of(decode_image(image.data, record.key)) for image in record.images]
    match = known.find(turns_of(record), pictures)
    return match.item if match else ""


def test_test_examples_are_found_in_training_records_and_train_examples_are_not():
    known = fingerprint([worlds(NAMES, per_task=6)], progress=False)
    chosen = choose_worlds(NAMES)
    assert sum("#" not in name for name in known.names) == 6 * len(chosen)
    for world in chosen:
        leaks = [found(known, record_of(world, world.example("test", n), "leak")) for n in range(6)]
        assert leaks == [f"worlds-0/worlds/{world.name}/test-{n}" for n in range(6)]
        fresh = [found(known, record_of(world, world.example("train", n), "train")) for n in range(12)]
        assert fresh == [""] * 12


class Episodes(EchoTask):
    """Three screens an item, and at last an answer of some length."""

    def gold(self, item: Item) -> Iterator[str]:
        yield from [str(item.payload)] * 2
        yield " ".join(f"word{item.seed}x{n}" for n in range(20))

    def screens(self, item: Item) -> list[Signed]:
        async def watch() -> list[Observation]:
            environment = self.environment(item)
            return [await environment.reset(), *[await environment.step(str(item.payload)) for _ in range(2)]]

        return [Signed.of(image) for seen in asyncio.run(watch()) for image in seen.images]


def test_later_screens_and_long_answers_of_the_expert_are_found():
    """A record that holds the middle of an episode, or what is to be said at its end, gives the item away as well."""
    task = Episodes(steps=3)

    @contextlib.asynccontextmanager
    async def opened(chosen: Sequence[str]) -> AsyncIterator[list[Episodes]]:
        yield [task]

    suite = replace(guess_suite(per_task=3, names=("echo",)), open=opened, play=Play(4, 8))
    known = fingerprint([suite], progress=False)
    items = [item for _, item in suite.items([task])]
    for item in items:
        name = f"{suite.name}-{suite.seed}/{item_key(task, item)}"
        first, *later = task.screens(item)
        answer = list(task.gold(item))[-1]
        assert known.find([""], [first]).item == name
        for screen in later:
            assert known.find([""], [screen]) == Match(f"{name}#later", "picture")
        assert known.find([answer], []) == Match(f"{name}#answer", "text")
        assert known.find([str(item.payload)], []) is None  # too short to tell
    fresh = next(iter(task.items("train", 0)))
    assert known.find([" ".join(task.gold(fresh))], task.screens(fresh)) is None
    single = fingerprint([replace(suite, play=replace(suite.play, max_steps=1))], progress=False)
    assert sorted(single.names) == sorted(name for name in known.names if not name.endswith("#later"))


@pytest.mark.browser
def test_later_screens_of_a_page_are_found(browser_pool):
    """Training episodes of the same pages are not."""
    suite = miniwob(("click-tab-2", "click-checkboxes"), per_task=3)
    known = fingerprint([suite], progress=False)

    async def watched(split: str) -> list[list[Signed]]:
        async with suite.open(suite.tasks) as tasks:
            shown = []
            for task in tasks:
                for item in islice(task.items(split, 0), 3):
                    seen = await _watch(task, item, await task.demonstrate(item))
                    shown.append([Signed.of(image) for one in seen[1:] for image in one.images])
            return shown

    later = [pictures for pictures in asyncio.run(watched("test")) if pictures]
    assert len(later) >= 3
    assert all(known.find([""], pictures) for pictures in later)
    assert not any(known.find([""], pictures) for pictures in asyncio.run(watched("train")))


@pytest.mark.browser
def test_the_command_signs_screens(tmp_path, capsys, monkeypatch, browser_pool):
    import evals.fingerprint as module
    from evals.suites.pages import page_grounding

    monkeypatch.setattr(module, "SUITES", {"page_grounding": lambda: page_grounding((1,), per_task=3)})
    out = tmp_path / "in" / "judged.npz"
    assert main(["fingerprint", str(out), "page_grounding", "--seeds", "0", "1"]) == 0
    assert "6 items with 6 pictures of 2 suites" in capsys.readouterr().out
    assert {name.partition("/")[0] for name in Fingerprint.load(out).names} == {"page_grounding-0", "page_grounding-1"}
    assert main(["fingerprint", str(out), "nothing"]) == 2
