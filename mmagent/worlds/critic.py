"""Critic data: claims about a screen, right or wrong in one detail, and what is wrong with them.

A model that judges what was read, which element was taken and what is to be done next needs both: claims that hold and
claims that nearly do. Callers say which it shall be, so that half of them are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from mmagent.actions import Action, Click, format_action
from mmagent.geometry import ImageView
from mmagent.worlds.elements import Box, Element
from mmagent.worlds.lessons import frame_box
from mmagent.worlds.pages import Scene
from mmagent.worlds.questions import COLORS, Question, Target, candidates, color_name, noun, same_place, targets
from mmagent.worlds.referring import expressions

RIGHT = "Right."
"""The answer to a claim that holds; others begin with "Wrong:" and say what is."""
_ASKS = " Is that right?"
_ALIKE = (
    "O0o",
    "l1",
    "1I",
    "S5",
    "B8",
    "Z2",
    "G6",
    "rn",
    "ce",
    "uv",
    "mn",
    "hb",
    "il",
    "49",
    "17",
    "38",
    "日目",
    "未末",
    "大太",
    "人入",
)


def misread(text: str, random: Random) -> str | None:
    """``text`` with one character, or two neighbours, as a hurried reader takes them; None where none invites it.

    Never a small l for a large I or the other way round, which some fonts draw alike: that would be no error.
    """
    places = [n for n, char in enumerate(text) if any(char in group for group in _ALIKE)]
    swaps = [n for n in range(len(text) - 1) if text[n].isalpha() and text[n + 1].isalpha() and text[n] != text[n + 1]]
    digits = [n for n, char in enumerate(text) if char.isdecimal() and char.isascii()]
    ways: list[Callable[[], str]] = []
    if places:
        ways.append(lambda: _alike(text, random.choice(places), random))
    if digits:
        ways.append(lambda: _digit(text, random.choice(digits), random))
    if swaps:
        ways.append(lambda: _swapped(text, random.choice(swaps)))
    return random.choice(ways)() if ways else None


def _alike(text: str, at: int, random: Random) -> str:
    others = sorted({c for group in _ALIKE if text[at] in group for c in group if c != text[at]})
    return text[:at] + random.choice(others) + text[at + 1 :]


def _digit(text: str, at: int, random: Random) -> str:
    return text[:at] + random.choice([d for d in "0123456789" if d != text[at]]) + text[at + 1 :]


def _swapped(text: str, at: int) -> str:
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def claims(scene: Scene, random: Random, truths: Sequence[bool]) -> list[Question]:
    """Claims about ``scene``, each of another kind and place, true or not as ``truths`` say; fewer where it has not
    enough to say."""
    view = ImageView(scene.size, scene.size)
    named = targets(scene.elements)
    makers: list[Callable[[bool], Question | None]] = [
        lambda right: _reading(scene, view, random, right),
        lambda right: _place(named, view, random, right),
        lambda right: _what(named, scene, view, random, right),
        lambda right: _count(scene, random, right),
        lambda right: _colour(named, random, right),
        lambda right: _state(named, random, right),
        lambda right: _click(scene, view, random, right),
    ]
    random.shuffle(makers)
    made: list[Question] = []
    for maker in makers:
        if len(made) == len(truths):
            break
        claim = maker(truths[len(made)])
        if claim is not None and not any(c.box and claim.box and same_place(c.box, claim.box) for c in made):
            made.append(claim)
    return made


def _claim(kind: str, text: str, right: bool, instead: str, box: Box | None = None) -> Question:
    return Question(f"claim_{kind}", text + _ASKS, RIGHT if right else f"Wrong: {instead}", box)


def _reading(scene: Scene, view: ImageView, random: Random, right: bool) -> Question | None:
    lines = [line for line in scene.lines if 3 <= len(line.text) <= 60]
    if not lines:
        return None
    line = random.choice(lines)
    said = line.text if right else misread(line.text, random)
    if said is None or (said == line.text) != right:
        return None
    text = f'The text at {frame_box(view, line.box)} reads "{said}".'
    return _claim("text", text, right, f'it reads "{line.text}".', line.box)


def _apart(one: Element, other: Element) -> bool:
    """Whether two boxes share nothing."""
    a, b = one.box, other.box
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def _pair(named: Sequence[Target], random: Random) -> tuple[Target, Target] | None:
    """Two things that lie apart, alike ones first: those are mistaken for each other."""
    if not named:
        return None
    meant = random.choice(named)
    others = [t for t in named if _apart(t.element, meant.element)]
    alike = [t for t in others if t.element.role == meant.element.role]
    return (meant, random.choice(alike or others)) if others else None


def _place(named: Sequence[Target], view: ImageView, random: Random, right: bool) -> Question | None:
    pair = _pair(named, random)
    if pair is None:
        return None
    (phrase, element), other = pair
    said = element if right else other.element
    text = f"{phrase[0].upper()}{phrase[1:]} is at {frame_box(view, said.box)}."
    return _claim("place", text, right, f"it is at {frame_box(view, element.box)}.", element.box)


def _what(named: Sequence[Target], scene: Scene, view: ImageView, random: Random, right: bool) -> Question | None:
    pair = _pair([t for t in named if _alone_there(t.element, scene.elements)], random)
    if pair is None:
        return None
    (phrase, element), other = pair
    x, y = view.to_frame(*element.point)
    said = phrase if right else other.phrase
    return _claim("what", f"At {x},{y} is {said}.", right, f"there is {phrase}.", element.box)


def _alone_there(element: Element, elements: Sequence[Element]) -> bool:
    x, y = element.point
    here = [e for e in elements if e.box[0] <= x < e.box[2] and e.box[1] <= y < e.box[3]]
    return len(here) == 1


def _count(scene: Scene, random: Random, right: bool) -> Question | None:
    counted = list(candidates(scene.size, scene.elements, ())["count"])
    if not counted:
        return None
    asked = random.choice(counted)
    true = int(asked.answer)
    said = true if right else max(0, true + random.choice((-2, -1, 1, 2)))
    if said == true and not right:
        said = true + 1
    kind = asked.question.split('"')[1]
    return _claim("count", f'There are {said} elements of kind "{kind}".', right, f"there are {true}.")


def _colour(named: Sequence[Target], random: Random, right: bool) -> Question | None:
    spoken = ("button", "link", "tab", "heading")
    known = [(t, color_name(t.element.color)) for t in named if t.element.role in spoken]
    known = [(target, name) for target, name in known if name is not None]
    if not known:
        return None
    (phrase, element), name = random.choice(known)
    said = name if right else random.choice(sorted(set(COLORS) - {name}))
    return _claim("colour", f"The text of {phrase} is {said}.", right, f"it is {name}.", element.box)


def _state(named: Sequence[Target], random: Random, right: bool) -> Question | None:
    known = [t for t in named if t.element.checked is not None or (t.element.role == "textbox" and not t.element.cut)]
    if not known:
        return None
    phrase, element = random.choice(known)
    first = phrase[0].upper() + phrase[1:]
    if element.checked is not None:
        word = "checked" if element.role in ("checkbox", "radio", "switch") else "selected"
        said = word if element.checked is right else f"not {word}"
        true = word if element.checked else f"not {word}"
        return _claim("state", f"{first} is {said}.", right, f"it is {true}.", element.box)
    value = element.value
    held = value if right else misread(value, random) if value else random.choice(("7", "Ada"))
    if held is None or (held == value) != right:
        return None
    true = f'"{value}"' if value else "nothing"
    text = f"{first} contains {f'{chr(34)}{held}{chr(34)}' if held else 'nothing'}."
    return _claim("state", text, right, f"it contains {true}.", element.box)


def _click(scene: Scene, view: ImageView, random: Random, right: bool) -> Question | None:
    """A click for an instruction: on what is meant, or on something else that could be taken for it."""
    pair = _pair([*targets(scene.elements), *expressions(scene.elements, scene.groups)], random)
    if pair is None:
        return None
    (phrase, element), other = pair
    proper, missed = (format_action(Click(*view.to_frame(*e.point))) for e in (element, other.element))
    text = f"To click {phrase}, the action is {proper if right else missed}."
    return _claim("click", text, right, f"that hits {describe_hit(other.element)}; it is {proper}.", element.box)


def describe_hit(element: Element) -> str:
    """What was hit, in the words of its kind and text."""
    text = f' "{element.text}"' if 0 < len(element.text) <= 40 else ""
    return f"a {noun(element)}{text}" if not text else f"the {noun(element)}{text}"


def next_step(goal: str, done: Sequence[Action], proposed: Action, expert: Action, hit: str) -> Question:
    """Whether ``proposed`` is the next step to ``goal`` after what was ``done``; ``hit`` says what it comes to."""
    before = f" So far: {'; '.join(map(format_action, done))}." if done else ""
    right = proposed == expert
    text = f"Goal: {goal}{before} The next action is {format_action(proposed)}."
    return _claim("step", text, right, f"that {hit}; it is {format_action(expert)}.")


def balanced(random: Random, count: int) -> Iterator[bool]:
    """``count`` truths, as many right as wrong (one more of either when odd), in random order."""
    truths = [n % 2 == 0 for n in range(count)] if random.random() < 0.5 else [n % 2 == 1 for n in range(count)]
    random.shuffle(truths)
    return iter(truths)
