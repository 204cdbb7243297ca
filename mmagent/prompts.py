"""What an agent is told: the one place where a task's turn becomes the parts of a user message.

Demonstrations, rollouts and evaluation all build their turns here, so a policy is asked at test time
exactly as it was taught. The wording is short on purpose: every token of it is paid in each rollout, and
a trained policy learns the action space from its demonstrations. A model that was never trained on our
format is told the rules once, by :func:`system_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmagent.actions import Action, format_action
from mmagent.chat import Image, Message, Part, Text

if TYPE_CHECKING:
    from mmagent.trajectories import Observation

HTML_REQUEST = "Write the HTML of this page."


def turn(text: str, images: int = 0) -> tuple[Part, ...]:
    """A user turn as every environment's observation is shown: images first, then text, if there is any."""
    return (*(Image() for _ in range(images)), *((Text(text),) if text else ()))


def shown(seen: Observation) -> tuple[Part, ...]:
    """The user turn that an observation is: its layout where it has one, else :func:`turn`."""
    return seen.layout or turn(seen.text, len(seen.images))


def gui_prompt(utterance: str) -> tuple[Part, ...]:
    """First turn of a GUI episode: the screen, then what to do on it."""
    return turn(utterance, images=1)


def gui_follow_up(note: str = "") -> tuple[Part, ...]:
    """Every later turn: the screen after the action; the goal stays in the history."""
    return turn(note, images=1)


def step_prompt(goal: str, done: Sequence[Action]) -> tuple[Part, ...]:
    """One screen on the way to ``goal``, and what was ``done`` before it, as text: the next action is asked for."""
    before = f" So far: {'; '.join(map(format_action, done))}." if done else ""
    return turn(f"{goal}{before} What is the next action?", images=1)


def grounding_text(phrase: str) -> str:
    """The request of a grounding item: one click on what ``phrase`` describes."""
    return f"Click {phrase}."


def grounding_prompt(phrase: str) -> tuple[Part, ...]:
    """The one turn of a grounding item."""
    return turn(grounding_text(phrase), images=1)


def html_prompt() -> tuple[Part, ...]:
    """The one turn of a screenshot-to-HTML item."""
    return turn(HTML_REQUEST, images=1)


def system_prompt(rules: str) -> Message:
    """For a model not trained on our format: ``rules`` (an action space in words) as the system message."""
    return Message("system", (Text(rules),))
