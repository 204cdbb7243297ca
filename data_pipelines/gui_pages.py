"""What pages and apps teach an agent: lessons about a screen, critic data, flaws and repairs, traces, steps, changes.

Every record is a function of seed, split and index. What does not come about (an app whose expert did not reach its
goal, a page without a place for a flaw) is passed over, counted by its reason, and another seed takes its place.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

from data_pipelines.making import BuildError, draws, settings_of
from data_pipelines.screens import conversation, regions
from data_pipelines.web_pages import SIDES
from mmagent.actions import Drag, Finished, Scroll, format_action
from mmagent.browser import Page
from mmagent.chat import Image, Message, assistant, user
from mmagent.geometry import ImageView
from mmagent.prompts import gui_follow_up, gui_prompt, html_prompt, step_prompt, turn
from mmagent.records import EncodedImage, Record, encode_image
from mmagent.worlds.changes import changes
from mmagent.worlds.critic import balanced, claims, next_step
from mmagent.worlds.lessons import LESSONS, frame_box, lessons
from mmagent.worlds.missteps import missteps
from mmagent.worlds.pages import LEVELS, PageSource, Scene, generate, render
from mmagent.worlds.pages.app_kinds import generate_app
from mmagent.worlds.pages.broken import FLAWS, Broken, break_page, own_flaws, repair_request
from mmagent.worlds.questions import Question
from mmagent.worlds.seeds import seed_for
from mmagent.worlds.traces import Trace, TraceError, play

LARGE = ((480, 360), (360, 640), (640, 400), (768, 1024), (1024, 640), (1280, 720))
"""Screens in pixels that tablets, phones and desks have, 221 to 1196 visual tokens of 28 pixels."""
SCALES = (1.25, 1.5, 2.0)
"""Pixels of the image to one of CSS on the screens of phones and of many laptops."""
DENSE = 0.25
"""Share of the pages asked about that are drawn at one of :data:`SCALES`, where enough room is left."""
_LEAST_SIDES = (200, 150)  # pixels of CSS, width first, that a dense screen must leave
APP_SIDES = ((320, 240), (320, 240), (280, 280), (392, 252), (336, 308))
"""Screens that an app can be worked on, small ones."""
FLAW_REQUEST = "What is wrong with the look of this page?"
SOUND = "Nothing is wrong with it."
PAIR_REQUEST = "One of these two pages has a flaw in its look. Which one, and what is it?"
CHANGE_REQUEST = "What has changed from the first screen to the second?"
ACTION_REQUEST = "Which action led there?"
_ATTEMPTS = 20  # seeds tried for one record
_MOST_FAILED = 0.05
"""Share of traces that may fail before a build says that something is wrong with the apps."""
_LEAST_FAILED = 10  # below this nothing is said of shares


class Factory:
    """What the makers of this module share. Languages and screens are drawn anew for every page; ``large`` takes those
    of phones, tablets and desks in."""

    name = ""
    small = SIDES

    def __init__(
        self,
        seed: int,
        languages: Sequence[str] = ("en",),
        large: bool = False,
        block: int = 20,
        split: str = "train",
        **settings: Any,
    ):
        self.seed, self.languages, self.block, self.split = seed, tuple(languages), block, split
        self.sides = (*self.small, *LARGE) if large else self.small
        self.screen = self.small[0]
        self.passed_over: Counter[str] = Counter()
        self._tried = self._failed = 0
        self.settings: dict[str, Any] = settings_of(
            split, seed=seed, languages=list(self.languages), sides=self.sides, block=block, **settings
        )

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        """Block ``number``, record by record. Raises :class:`BuildError` where seed after seed gives nothing."""
        assert page is not None
        records = []
        for n in range(self.block):
            index = number * self.block + n
            random = draws(self.split, self.seed, self.name, index)
            for _ in range(_ATTEMPTS):
                record = await self._record(page, index, random)
                if record is not None:
                    records.append(record)
                    break
            else:
                reasons = dict(self.passed_over)
                raise BuildError(f"{self.name}: {_ATTEMPTS} seeds gave no record at index {index}: {reasons}")
        return records

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        raise NotImplementedError

    def _source(self, random: Random, lowest: int = 1, highest: int = LEVELS) -> PageSource:
        side, level = random.choice(self.sides), random.randint(lowest, highest)
        seed, spoken = seed_for(self.split, random.getrandbits(40)), random.choice(self.languages)
        return generate(seed, *side, difficulty=level, spoken=spoken)

    async def _shown(self, page: Page, random: Random) -> tuple[PageSource, Scene]:
        """A page, now and then on a dense screen: its picture is as large, and what is on it larger."""
        side, level = random.choice(self.sides), random.randint(1, LEVELS)
        fitting = [s for s in SCALES if all(round(a / s) >= least for a, least in zip(side, _LEAST_SIDES, strict=True))]
        scale = random.choice(fitting) if random.random() < DENSE and fitting else 1.0
        width, height = (round(pixels / scale) for pixels in side)
        seed, spoken = seed_for(self.split, random.getrandbits(40)), random.choice(self.languages)
        source = replace(generate(seed, width, height, difficulty=level, spoken=spoken), scale=scale)
        return source, await render(page, source.html, width, height, scale=scale, trusted=True)

    async def _trace(self, page: Page, random: Random, elements: bool) -> Trace | None:
        """A trace that reached its goal, None (and counted) where one did not."""
        side, level = random.choice(self.sides), random.randint(1, LEVELS)
        seed, spoken = seed_for(self.split, random.getrandbits(40)), random.choice(self.languages)
        app = generate_app(seed, *side, difficulty=level, spoken=spoken)
        self._tried += 1
        try:
            return await play(page, app, elements=elements)
        except TraceError as error:
            self.passed_over[f"trace of {error}"] += 1
            self._failed += 1
            if self._failed > max(_LEAST_FAILED, _MOST_FAILED * self._tried):
                reasons = dict(self.passed_over)
                raise BuildError(f"{self.name}: {self._failed} of {self._tried} traces failed: {reasons}") from error
            return None


async def _encoded(*scenes: Scene) -> tuple[EncodedImage, ...]:
    return tuple([await asyncio.to_thread(encode_image, scene.image) for scene in scenes])


class PageLessons(Factory):
    """Questions of all kinds about pages of all kinds, several a screen: reading, captions, perception, grounding,
    referring expressions, states, single clicks."""

    name = "lessons"

    def __init__(self, seed: int, questions: int = 8, weights: Mapping[str, float] = LESSONS, **more: Any):
        self.questions, self.weights = questions, dict(weights)
        super().__init__(seed, questions=questions, weights=self.weights, dense=DENSE, **more)

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        source, scene = await self._shown(page, random)
        asked = lessons(scene, source, random, self.questions, self.weights)
        if not asked:
            self.passed_over["page without a question"] += 1
            return None
        talk, boxes = conversation(asked), regions(scene.elements)
        return Record(f"lesson-{index:06d}", self.name, talk, images=await _encoded(scene), boxes=boxes)


class PageClaims(Factory):
    """Critic data: claims about a screen, as many right as wrong, and what is wrong with those."""

    name = "critic"

    def __init__(self, seed: int, questions: int = 4, **more: Any):
        self.questions = questions
        super().__init__(seed, questions=questions, dense=DENSE, **more)

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        _, scene = await self._shown(page, random)
        said = claims(scene, random, list(balanced(random, self.questions)))
        if not said:
            self.passed_over["page without a claim"] += 1
            return None
        return Record(f"critic-{index:06d}", self.name, conversation(said), images=await _encoded(scene))


class PageFlaws(Factory):
    """Pages with one flaw, in turn: what it is and where (a quarter of these are sound); which of two pages has it;
    the repaired HTML, of pages of at most ``longest`` characters. Kinds of flaws come equally often, and pages that
    have one by themselves are passed over."""

    name = "polish"

    def __init__(self, seed: int, longest: int = 1500, **more: Any):
        self.longest = longest
        super().__init__(seed, longest=longest, **more)

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        kind = ("name", "pair", "repair")[index % 3]
        source = self._source(random, 1, 3 if kind == "repair" else LEVELS)
        if kind == "repair" and len(source.html) > self.longest:
            self.passed_over["page whose HTML is too long"] += 1
            return None
        scene = await render(page, source.html, source.width, source.height, trusted=True)
        flaws = await own_flaws(page, scene)
        if flaws:  # it would be called sound, or have two flaws where one is told
            self.passed_over[f"page with a flaw of its own: {', '.join(flaws)}"] += 1
            return None
        if kind == "name" and index % 4 == 0:
            talk: tuple[Message, ...] = (user(*turn(FLAW_REQUEST, images=1)), assistant(SOUND))
            return self._of(index, talk, await _encoded(scene))
        flaw = FLAWS[index // 3 % len(FLAWS)]  # dealt, as some have a place on fewer pages than others
        broken = await break_page(page, source, random, flaw, scene)
        if broken is None:
            self.passed_over[f"page without a place for a flaw: {flaw}"] += 1
            return None
        if kind == "name":
            where = frame_box(ImageView(broken.scene.size, broken.scene.size), broken.box)
            talk = (user(*turn(FLAW_REQUEST, images=1)), assistant(broken.says), user("Where is it?"), assistant(where))
            return self._of(index, talk, await _encoded(broken.scene))
        if kind == "pair":
            return await self._pair(index, broken, random)
        talk = (user(*turn(repair_request(broken.html), images=1)), assistant(source.html))
        return self._of(index, talk, await _encoded(broken.scene))

    async def _pair(self, index: int, broken: Broken, random: Random) -> Record:
        first = random.random() < 0.5
        shown = (broken.scene, broken.sound) if first else (broken.sound, broken.scene)
        says = f"The {'first' if first else 'second'}. {broken.says}"
        return self._of(index, (user(*turn(PAIR_REQUEST, images=2)), assistant(says)), await _encoded(*shown))

    def _of(self, index: int, talk: tuple[Message, ...], images: tuple[EncodedImage, ...]) -> Record:
        return Record(f"polish-{index:06d}", self.name, talk, images=images)


class PageCode(Factory):
    """Pages of all kinds and the HTML they were rendered from, at most ``longest`` characters."""

    name = "page-code"

    def __init__(self, seed: int, longest: int = 2500, **more: Any):
        self.longest = longest
        super().__init__(seed, longest=longest, **more)

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        source = self._source(random)
        if len(source.html) > self.longest:
            self.passed_over["page whose HTML is too long"] += 1
            return None
        scene = await render(page, source.html, source.width, source.height, trusted=True)
        talk = (user(*html_prompt()), assistant(source.html))
        return Record(f"code-{index:06d}", self.name, talk, images=await _encoded(scene))


class AppTraces(Factory):
    """Whole traces of experts in apps, one turn a step, that reached their goals; the last turn says so."""

    name = "traces"
    small = APP_SIDES

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        trace = await self._trace(page, random, elements=False)
        if trace is None:
            return None
        turns = [user(*gui_prompt(trace.app.goal))]
        for action in trace.actions:
            turns += [assistant(format_action(action)), user(*gui_follow_up())]
        turns.append(assistant(format_action(Finished())))
        images = await _encoded(*trace.scenes)
        return Record(f"trace-{index:06d}", self.name, tuple(turns), images=images, task=f"apps/{trace.app.kind}")


class AppSteps(Factory):
    """One screen of a trace: the next action, given the goal and what was done; or, every third time, whether an action
    that is put forward is the next one."""

    name = "steps"
    small = APP_SIDES

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        trace = await self._trace(page, random, elements=True)
        if trace is None:
            return None
        if index % 3 == 2:
            at = random.randrange(len(trace.actions) + 1)  # to finish is right once the goal is reached
            claim = _judged(trace, at, random, right=index % 2 == 0)
            if claim is None:
                self.passed_over["screen without a wrong step"] += 1
                return None
            talk = conversation([claim])
        else:
            at = random.randrange(len(trace.actions))
            talk = (
                user(*step_prompt(trace.app.goal, trace.actions[:at])),
                assistant(format_action(trace.actions[at])),
            )
        images = await _encoded(trace.scenes[at])
        return Record(f"step-{index:06d}", self.name, talk, images=images, task=f"apps/{trace.app.kind}")


def _judged(trace: Trace, at: int, random: Random, right: bool) -> Question | None:
    """The expert's action, or one that is provably not the next; None where none is."""
    done = trace.actions[:at]
    expert = trace.actions[at] if at < len(trace.actions) else Finished()
    if right:
        return next_step(trace.app.goal, done, expert, expert, "")
    wrong = missteps(trace, at, random)
    if not wrong:
        return None
    chosen = random.choice(wrong)
    return next_step(trace.app.goal, done, chosen.action, expert, chosen.says)


class AppChanges(Factory):
    """Two screens of an app, before and after one action: what has changed, and which action led there, where only one
    could have."""

    name = "changes"
    small = APP_SIDES
    most = 8

    async def _record(self, page: Page, index: int, random: Random) -> Record | None:
        trace = await self._trace(page, random, elements=True)
        if trace is None:
            return None
        told = [changes(before, after) for before, after in pairwise(trace.scenes)]
        fitting = [n for n, said in enumerate(told) if 1 <= len(said) <= self.most]
        if not fitting:
            self.passed_over["trace without a change that few words tell"] += 1
            return None
        at = random.choice(fitting)
        before, after, action, said = trace.scenes[at], trace.scenes[at + 1], trace.actions[at], told[at]
        turns = [user(Image(), Image(), CHANGE_REQUEST), assistant("\n".join(said))]
        if not isinstance(action, Drag | Scroll):  # others would have led there as well
            turns += [user(ACTION_REQUEST), assistant(format_action(action))]
        images = await _encoded(before, after)
        return Record(f"change-{index:06d}", self.name, tuple(turns), images=images, task=f"apps/{trace.app.kind}")


READING: tuple[type[Factory], ...] = (PageLessons, AppChanges, PageCode)
"""Makers for pretraining."""
ACTING: tuple[type[Factory], ...] = (AppTraces, AppSteps, PageClaims, PageFlaws)
"""Makers for supervised fine-tuning."""
NAMES = tuple(maker.name for maker in (*READING, *ACTING))
"""The sources of this module."""
