"""Worlds as training data: records that are seeded, valid and of their own split and stage, in every kind of source."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from data_pipelines.build import laptop, makers
from data_pipelines.documents import DocumentBuilder
from data_pipelines.worlds import PAIRED, CodePairs, WorldQuestions
from mmagent.chat import Box, ChatConfig, Image, Text, Thinking
from mmagent.geometry import GeometryConfig
from mmagent.records import from_sample, to_sample
from mmagent.vocab import Vocab
from mmagent.worlds.catalogue import all_worlds


def made(maker, number=0):
    return asyncio.run(maker.make(number, None))


@pytest.mark.parametrize("maker", [WorldQuestions(names=["counting", "text"]), CodePairs(block=8)], ids=["ask", "pair"])
def test_blocks_are_seeded_and_valid(maker):
    records = made(maker, 1)
    assert records == made(maker, 1)
    assert len({record.key for record in records}) == maker.block == len(records)
    assert not {record.key for record in records} & {record.key for record in made(maker, 2)}
    for record in records:
        assert from_sample(to_sample(record)) == record
        assert record.source == maker.name


def test_blocks_made_at_once_are_those_made_one_by_one():
    """In threads, as a build makes them: fonts and the setter of formulas are shared."""
    maker = WorldQuestions(names=["formulas", "documents", "code", "tables"], block=13)

    async def at_once():
        return await asyncio.gather(*(maker.make(number, None) for number in range(6)))

    assert asyncio.run(at_once()) == [made(maker, number) for number in range(6)]


def test_worlds_and_their_levels_come_in_turn():
    maker = WorldQuestions(names=["counting", "svg"], block=30)
    keys = [record.key.rsplit("/", 1) for record in made(maker)]
    assert set(Counter(name for name, _ in keys).values()) == {6}
    assert {key.split("-")[1] for name, key in keys if name == "counting/objects"} == {"0", "1", "2", "3"}
    assert len(WorldQuestions().worlds) == len(all_worlds())


def test_solutions_think_before_they_answer():
    plain, thinking = (made(WorldQuestions(names=["geometry"], block=6, reasoning=r)) for r in (False, True))
    for one, other in zip(plain, thinking, strict=True):
        assert one.answer == other.answer
        assert [type(part) for part in one.messages[-1].parts] == [Box]
        assert [type(part) for part in other.messages[-1].parts] == [Thinking, Box]


def test_pairs_hold_the_picture_before_and_behind_its_code():
    maker = CodePairs(block=2 * len(PAIRED))
    records = made(maker)
    assert {record.key.rsplit("/", 1)[0] for record in records} == set(PAIRED)
    orders = Counter(tuple(type(part) for part in record.parts) for record in records)
    assert orders == {(Image, Text): len(PAIRED), (Text, Image): len(PAIRED)}
    builder = DocumentBuilder(Vocab.train(["a < b"], 300), GeometryConfig(), ChatConfig())
    assert all(len(builder.document(record).images) == 1 for record in records[:4])


def test_stages_and_splits_share_no_example():
    """By their indices and by what they show."""
    config = laptop()
    found = {}
    for stage, known in makers(config).items():
        for maker in known:
            if maker.name in ("worlds", "solutions", "code-pairs"):
                records = made(maker)
                found[stage, maker.name] = {(r.key, r.answer, tuple(i.data for i in r.images)) for r in records}
    assert set(found) == {
        ("pretrain", "worlds"), ("pretrain", "code-pairs"), ("sft", "solutions"), ("validation", "worlds"),
        ("validation", "code-pairs"), ("validation", "solutions"),
    }  # fmt: skip
    wanted = {"pretrain": config.pretrain, "sft": config.sft, "validation": config.validation}
    assert all(wanted[stage][name] > 0 for stage, name in found)
    keys = {where: {key for key, *_ in rows} for where, rows in found.items()}
    assert not keys["pretrain", "worlds"] & keys["sft", "solutions"]
    shown = {where: {(answer, data) for _, answer, data in rows if data} for where, rows in found.items()}
    assert not shown["validation", "worlds"] & (shown["pretrain", "worlds"] | shown["sft", "solutions"])
