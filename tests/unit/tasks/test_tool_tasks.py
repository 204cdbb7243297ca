"""Tools: what was done is judged, calls that are wrong are answered, and later turns bring pictures."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from mmagent.agent.codec import Codec
from mmagent.agent.rollout import RolloutConfig, roll_out
from mmagent.geometry import GeometryConfig
from mmagent.tasks.functions import FunctionTask
from mmagent.tasks.image_tools import SHOWN, SIDE, WRITING, ImageToolTask, distance_to_line
from mmagent.tasks.index import LONGEST_TEXT, Entry, Index, IndexSession, terms
from mmagent.tasks.search import SearchTask
from mmagent.tasks.tools import MOST_CALLS, ToolError, read_call, write_call
from mmagent.testing import check_environment, check_task
from mmagent.trajectories import Completion, Limits, Status, Trajectory
from mmagent.vocab import Vocab

KINDS = (FunctionTask, SearchTask, ImageToolTask)
VOCAB = Vocab.train(['{"name": "crop", "arguments": {"x1": 12, "y1": 407}} done'], 400)


def played(task, item, actions):
    async def play():
        environment = task.environment(item)
        seen = [await environment.reset()]
        for action in actions:
            seen.append(await environment.step(action))
            if seen[-1].done:
                break
        await environment.close()
        return seen

    return asyncio.run(play())


@pytest.mark.parametrize("kind", KINDS)
def test_the_public_kit_finds_no_fault(kind):
    task = kind()
    asyncio.run(check_task(task, count=task.levels))
    item = next(task.items("train", 3))
    asyncio.run(check_environment(lambda: task.environment(item), [*task.gold(item)]))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_go_in_turn_and_one_may_be_chosen(kind):
    for level in range(kind.levels):
        task = kind(level)
        whole = kind()
        assert task.name == f"{whole.name}/level-{level}"
        item = next(islice(whole.items("test", 0), level, None))
        assert whole.scene(item).told() == task.scene(item).told(), "a level's items are those of the whole"
    with pytest.raises(ValueError, match=f"{kind.name} has levels 0 to {kind.levels - 1}, not 9"):
        kind(9)


def test_splits_share_no_scene():
    for task in (FunctionTask(), SearchTask()):
        train = {task.scene(item).told() for item in islice(task.items("train", 0), 40)}
        assert not train & {task.scene(item).told() for item in islice(task.items("test", 1), 40)}


def test_another_wish_fulfilled_is_wrong():
    task = FunctionTask()
    for item, other in zip(islice(task.items("train", 0), 8), islice(task.items("train", 9), 8), strict=True):
        assert played(task, item, task.gold(other))[-1].reward == 0.0


def test_looking_up_more_does_no_harm_and_doing_more_does():
    task = FunctionTask(1)
    item = next(task.items("train", 0))
    gold, shop = list(task.gold(item)), task.scene(item)
    more = write_call("find_item", item=shop.stock[1][0])
    assert played(task, item, [more, *gold])[-1].reward == 1.0
    order = write_call("order", item=shop.stock[1][0], count=1, city="Oslo")
    assert played(task, item, [order, *gold])[-1].reward == 0.0
    assert played(task, item, [*gold[:-1], *gold])[-1].reward == 0.0, "ordered twice"


WRONG = {
    "no JSON": ('{"name": "order"', "a call must be one line of JSON"),
    "no arguments": ('{"name": "order"}', "and nothing else"),
    "another name": (write_call("oder", item="x"), "'oder' is none of the tools find_person"),
    "missing": (write_call("find_person"), "find_person: 'name' is missing"),
    "too many": (write_call("find_person", name="Anna", age=3), "'age' is none of its arguments name"),
    "another type": (write_call("order", item="x", count="many", city="Oslo"), "count: must be JSON"),
    "nobody": (write_call("find_person", name="Nobody"), "nobody of that name"),
    "a name twice": ('{"name": "find_person", "name": "order", "arguments": {}}', "'name' is said twice"),
    "huge": (write_call("order", item="x", count=10**12, city="Oslo"), "no such item"),
    "deep": ('{"name": "order", "arguments": ' + "[" * 9000 + "}", "a call must be one line of JSON"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_call_is_answered_and_the_episode_goes_on(fault):
    task = FunctionTask()
    item = next(task.items("train", 0))
    call, told = WRONG[fault]
    seen = played(task, item, [call, *task.gold(item)])
    assert seen[1].text.startswith("error: ")
    assert told in seen[1].text
    assert not seen[1].done
    assert (seen[-1].reward, seen[-1].parts["refused"]) == (1.0, 1.0)


def test_calls_are_bounded():
    task = FunctionTask(0)
    item = next(task.items("train", 0))
    (_, seen) = played(task, item, ["\n".join([write_call("find_person", name="Anna")] * 50)])
    assert len(seen.text.splitlines()) == MOST_CALLS + 1
    endless = played(task, item, [write_call("find_person", name="Anna")] * 50)
    assert len(endless) == 1 + task.max_steps
    assert (endless[-1].done, endless[-1].reward) == (True, 0.0)
    assert played(task, item, ["x" * 30_000])[-1].parts == {"malformed": 1.0}


def test_arguments_come_as_texts_or_as_values():
    """The codec hands over texts, a server's model writes values: the same call."""
    assert read_call('{"name": "order", "arguments": {"count": "3"}}') == read_call(write_call("order", count=3))


def test_the_index_ranks_by_rare_words():
    index = Index([Entry("A", "the river and the bridge"), Entry("B", "the bridge of Lumorn"), Entry("C", "a hill")])
    assert index.search("the Lumorn bridge") == [1, 0]
    assert index.search("HILL!") == [2]
    assert index.search("nothing else") == []
    assert Index([]).search("any") == []
    assert index.search("hill " * 100_000) == [2]


def test_the_index_is_bm25():
    """Worked out by hand for one word in two entries of three: idf = ln(1 + 1.5 / 2.5)."""
    index = Index([Entry("x", "a a b"), Entry("y", "a"), Entry("z", "c d")])
    mean = 9 / 3
    expected = np.log(1 + 1.5 / 2.5) * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / mean))
    assert index.scores("a") == pytest.approx([expected, np.log(1.6) * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3)), 0.0])


def scanned(entries: list[Entry], query: str, count: int) -> list[tuple[int, float]]:
    """Every entry scored by itself, word by word in plain Python."""
    bags = [Counter(terms(f"{entry.title} {entry.text}")) for entry in entries]
    often, mean = Counter(word for bag in bags for word in bag), sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        total, length = 0.0, 0.25 + 0.75 * bag.total() / mean
        for word in sorted(set(terms(query)) & bag.keys()):
            weight = math.log(1 + (len(bags) - often[word] + 0.5) / (often[word] + 0.5))
            total += weight * bag[word] * 2.2 / (bag[word] + 1.2 * length)
        scores.append(total)
    ranked = sorted(((score, -n) for n, score in enumerate(scores)), reverse=True)[:count]
    return [(-n, score) for score, n in ranked if score > 0.0]


@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_what_a_scan_of_all_entries_finds(seed):
    """The same entries in the same order with the same bits of score; few words, so that many entries are equal."""
    random = np.random.default_rng(seed)
    words = [f"w{n}" for n in range(12 + 40 * seed)]
    entries = [
        Entry(str(random.choice(words)), " ".join(random.choice(words, random.integers(0, 9)))) for _ in range(300)
    ]
    index = Index(entries)
    for _ in range(60):
        query = " ".join([*random.choice(words, random.integers(0, 6)), "unheard"])
        for count in (1, 3, 50):
            expected = scanned(entries, query, count)
            assert [(n, index.scores(query)[n]) for n in index.search(query, count)] == expected


def test_an_entry_is_read_when_it_is_opened():
    read = []

    def picture() -> np.ndarray:
        read.append(1)
        return np.zeros((4, 5, 3), np.uint8)

    session = IndexSession(Index([Entry("", "long " * 10_000), Entry("Pond", "blue", picture)]), hits=1)
    assert session.call("search", {"query": "pond"}).text == "1: Pond (picture)"
    assert (read, session.opened) == ([], set())
    assert session.call("open", {"number": 1}).images[0].shape == (4, 5, 3)
    assert session.call("search", {"query": "long"}).text == f"0: {'long ' * 20}(passage)"
    told = session.call("open", {"number": 0}).text
    assert told.endswith(f"... {50_000 - LONGEST_TEXT} more characters")
    assert session.opened == {0, 1}
    with pytest.raises(ToolError, match="number must be a whole number from 0 to 1"):
        session.call("open", {"number": 2})


def test_search_brings_pictures_that_the_question_needs():
    task = SearchTask(2)
    item = next(task.items("train", 0))
    seen = played(task, item, task.gold(item))
    assert [len(one.images) for one in seen] == [0, 0, 0, 0, 1, 0]
    land = task.scene(item)
    passages = " ".join(entry.text for entry in land.entries())
    if not land.answer.isdigit():
        assert land.answer not in passages, "only the picture tells"
    hits = seen[1].text.splitlines()
    assert land.path[0] in hits[0]


def test_what_is_written_can_be_read_only_when_enlarged():
    """At first a letter is some two pixels high; the tool's picture shows it ten times as large."""
    task = ImageToolTask(0)
    item = next(task.items("train", 0))
    scene = task.scene(item)
    first, zoomed, _ = played(task, item, task.gold(item))
    assert first.images[0].shape == (SHOWN, SHOWN, 3)
    assert zoomed.images[0].shape[0] == pytest.approx(SHOWN, abs=2)
    assert WRITING * SHOWN / SIDE < 3, "pixels of a letter as it is shown first"
    assert WRITING * 10 * SHOWN / SIDE > 20
    assert scene.answer not in first.text


def test_a_line_is_drawn_for_this_episode_only():
    task = ImageToolTask(2)
    item = next(task.items("train", 0))
    before = task.scene(item).pixels.copy()
    seen = played(task, item, task.gold(item))
    assert not np.array_equal(seen[0].images[0], seen[1].images[0])
    assert np.array_equal(task.scene(item).pixels, before)
    assert played(task, item, [])[0].images[0] is seen[0].images[0], "a group shares its picture"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (write_call("crop", x1=500, y1=500, x2=505, y2=505), "crop: the box must be at least 20 wide"),
        (write_call("crop", x1=900, y1=900, x2=100, y2=100), "crop: the box must be at least 20 wide"),
        (write_call("crop", x1=0, y1=0, x2=999, y2=21), "no strip"),
        (write_call("zoom", x=5, y=1000, factor=4), "zoom: y must be a whole number from 0 to 999"),
        (write_call("zoom", x=5, y=5, factor=10**9), "factor must be a whole number from 2 to 16"),
        (write_call("draw_line", x1=-5, y1=0, x2=3, y2=4), "draw_line: x1 must be"),
    ],
)
def test_image_tools_refuse_what_they_cannot_do(call, told):
    task = ImageToolTask()
    seen = played(task, next(task.items("train", 0)), [call])[-1]
    assert told in seen.text
    assert not seen.images


def test_distances_to_lines():
    assert distance_to_line((5, 3), (0, 0), (10, 0)) == 3
    assert distance_to_line((13, 4), (0, 0), (10, 0)) == 5


class Caller:
    """Says the gold in the policy's own format of calls."""

    version = 0

    def __init__(self, task, item):
        self.gold = list(task.gold(item))

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        said = self.gold.pop(0)
        if not said.startswith("{"):
            ids = [*VOCAB.encode(said), VOCAB.id("<|user|>")]
        else:
            call = json.loads(said)
            ids = [VOCAB.id("<tool_call>"), *VOCAB.encode(call["name"] + "\n")]
            for key, value in call["arguments"].items():
                for mark, text in (("arg_key", key), ("arg_value", str(value))):
                    ids += [VOCAB.id(f"<{mark}>"), *VOCAB.encode(text), VOCAB.id(f"</{mark}>")]
            ids += [VOCAB.id("</tool_call>"), VOCAB.id("<|observation|>")]
        return Completion(tuple(ids), tuple(-0.1 for _ in ids), stopped=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_calls_in_its_own_format_and_sees_the_pictures(kind):
    task = kind(2, declare=False)
    item = next(task.items("train", 0))
    codec = Codec(VOCAB, GeometryConfig(), tools=task.tools)
    config = RolloutConfig(group_size=1, max_steps=8, max_tokens=400, max_context=20_000)
    (done,) = asyncio.run(roll_out([(task, item)], Caller(task, item), codec, config, seed=0))
    assert (done.status, done.reward) == (Status.FINISHED, 1.0)
    assert len(done.images) == {FunctionTask: 0, SearchTask: 1, ImageToolTask: 3}[kind]
    assert done.input_ids.count(VOCAB.id("<|observation|>")) == len(list(task.gold(item))) - 1
