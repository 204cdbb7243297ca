"""GUI element perception: one question about a rendered page that its document answers."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from mmagent.tasks.base import Screens, malformed, score_of
from mmagent.tasks.rendered import PageScenes, alone
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.worlds import grading
from mmagent.worlds.examples import LONGEST, answer_of
from mmagent.worlds.questions import Question, ask

KINDS = {"what": 3.0, "read": 2.0, "where": 2.0, "find": 1.0, "list": 1.0, "colour": 2.0, "count": 1.0}
"""How often each kind of :data:`mmagent.worlds.questions.WEIGHTS` is asked. Not those that yes or no answers."""
NEXT_SCENE = 3 * 10**12
"""Added to a seed whose page leaves nothing to ask: the same split, beyond every other item."""


class PerceptionTask:
    """Pages of ``levels`` difficulty at the size of ``screens``. Boxes are judged by their overlap, what is read by its
    letters, all else word by word."""

    category = "gui-perception"

    def __init__(self, screens: Screens, levels: tuple[int, int] = (1, 5), name: str = "perception"):
        self.name, self.screens = name, screens
        self.scenes = PageScenes(screens, levels)

    def items(self, split: str, seed: int) -> Iterator[Item]:
        return self.scenes.items(self.name, split, seed)

    def environment(self, item: Item) -> PerceptionEnvironment:
        return PerceptionEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        """The answer, found in a browser of its own. Blocks; see :meth:`question` inside a loop."""
        levels, name = self.scenes.levels, self.name

        async def answer(screens: Screens) -> str:
            asked, _ = await PerceptionTask(screens, levels, name).question(item)
            return asked.answer

        yield alone(self.screens.width, self.screens.height, answer)

    async def demonstrate(self, item: Item) -> list[str]:
        """``gold``, in the task's own pages."""
        return [(await self.question(item))[0].answer]

    async def question(self, item: Item) -> tuple[Question, Observation]:
        """What is asked, and the first observation. Pages that leave nothing to ask are passed over."""
        seed = item.seed
        while True:
            scene = await self.scenes.scene(seed)
            if asked := ask(scene.size, scene.elements, scene.lines, Random(item.seed), 1, KINDS):
                return asked[0], Observation(asked[0].question, (scene.image,))
            seed += NEXT_SCENE


def judge(asked: Question, answer: str) -> Score:
    """How right an answer to a question about a page is."""
    if asked.kind in ("where", "find"):
        truth, said = grading.read_box(asked.answer), grading.read_box(answer)
        assert truth is not None, f"{asked.answer!r} is no box"
        if said is None:
            return grading.wrong("malformed")
        iou = grading.overlap(truth, said)
        return Score(iou if iou >= 0.5 else 0.0, {"iou": iou, "right": float(iou >= 0.5)})
    if asked.kind == "read":
        alike = grading.similarity(" ".join(asked.answer.split()), " ".join(answer.split()))
        return Score(alike if alike >= 0.5 else 0.0, {"similarity": alike, "right": float(alike == 1.0)})
    one, other = ([grading.plain(line).casefold() for line in text.splitlines()] for text in (asked.answer, answer))
    if asked.kind == "what":
        other = [line.removeprefix("the ") for line in other]
    return grading.right(one == other)


class PerceptionEnvironment:
    """One question, one answer."""

    def __init__(self, task: PerceptionTask, item: Item):
        self.task, self.item = task, item

    async def reset(self) -> Observation:
        _, seen = await self.task.question(self.item)
        return seen

    async def step(self, action: str) -> Observation:
        answer = answer_of(action)
        if answer is None:
            return malformed(f"no answer of at most {LONGEST} characters, or more than one box")
        asked, _ = await self.task.question(self.item)
        score = judge(asked, answer)
        return Observation("judged", done=True, reward=score.value, parts=score.parts)

    async def close(self) -> None:
        """Nothing is held."""
