"""Before and after: what differs between two screens of one page, in words, from their truth."""

from __future__ import annotations

from collections import Counter

from mmagent.worlds.elements import Element
from mmagent.worlds.pages import Scene
from mmagent.worlds.questions import noun

_LONGEST = 48
_STATEFUL = ("checkbox", "radio", "switch")


def changes(before: Scene, after: Scene) -> list[str]:
    """What became of everything that has a name of its own on both screens, what came and what went: a sentence each.

    Things are known again by kind and text, so only those that bear theirs alone are spoken of. Empty where nothing
    differs that words could tell.
    """
    old, new = _named(before), _named(after)
    said: list[str] = []
    for key, element in new.items():
        if key in old:
            said += _altered(_phrase(key), old[key], element)
    gone = [key for key in old if not _any(after, key)]
    come = [key for key in new if not _any(before, key)]
    said += [f"{_phrase(key)} is gone" for key in gone]
    said += [f"{_phrase(key)} has appeared" for key in come]
    return said


def states(before: Scene, after: Scene) -> list[str]:
    """What holds in ``after`` and did not in ``before`` of fields and of what can be chosen, a phrase each."""
    old = _named(before)
    said: list[str] = []
    for key, element in _named(after).items():
        was = old.get(key)
        if was is None:
            continue
        if was.checked is not element.checked and None not in (was.checked, element.checked):
            word = "checked" if element.role in _STATEFUL else "selected"
            said.append(f"{_phrase(key)} is {'' if element.checked else 'not '}{word}")
        if was.value != element.value and element.role == "textbox":
            said.append(f'{_phrase(key)} contains "{element.value}"' if element.value else f"{_phrase(key)} is empty")
    return said


Key = tuple[str, str]


def _named(scene: Scene) -> dict[Key, Element]:
    keys = [(noun(e), e.text) for e in scene.elements]
    often = Counter(keys)
    return {key: e for key, e in zip(keys, scene.elements, strict=True)
            if key[1] and len(key[1]) <= _LONGEST and often[key] == 1 and e.clear >= 0.5}  # fmt: skip


def _any(scene: Scene, key: Key) -> bool:
    return any((noun(e), e.text) == key for e in scene.elements)


def _phrase(key: Key) -> str:
    return f'the {key[0]} "{key[1]}"'


def _altered(phrase: str, old: Element, new: Element) -> list[str]:
    said = []
    if old.checked is not new.checked and None not in (old.checked, new.checked):
        word = "checked" if new.role in _STATEFUL else "selected"
        said.append(f"{phrase} is {'now' if new.checked else 'no longer'} {word}")
    if old.value != new.value and new.role in ("textbox", "combobox", "spinbutton"):
        said.append(f'{phrase} now contains "{new.value}"' if new.value else f"{phrase} is now empty")
    if old.enabled != new.enabled:
        said.append(f"{phrase} is {'now' if new.enabled else 'no longer'} enabled")
    if new.focused and not old.focused:
        said.append(f"{phrase} has the focus")
    if max(abs(a - b) for a, b in zip(old.box[:2], new.box[:2], strict=True)) >= 4:
        said.append(f"{phrase} has moved")
    return said
