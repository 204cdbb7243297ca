"""Games with a seed, an expert and a picture in every turn: a maze, lights to put out, coins to take, a code to break.

A game is won or not; an episode gives 1 or 0. As many moves are allowed as the expert needs and a few more, so that
moves by chance hardly ever win.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import xor
from typing import Protocol

import numpy as np

from mmagent.tasks.base import malformed
from mmagent.tasks.seeded import SeededTask
from mmagent.trajectories import Item, Observation
from mmagent.worlds.canvas import Canvas
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.spatial import MOVES, Cell, carve, shortest

SPARE = 3
"""Moves more than the expert needs."""
_PAIR = re.compile(r"\(?\s*(\d{1,2})\s*,\s*(\d{1,2})\s*\)?", re.ASCII)
_GROUND, _INK = (250, 250, 246), (34, 34, 40)


class Game(Protocol):
    """A position. Who plays changes it; ``told()`` is what it was at first. No more than ``most`` moves are made."""

    rules: str
    most: int

    def told(self) -> str: ...

    def fresh(self) -> Game:
        """The same game from its beginning."""
        ...

    def move(self, said: str) -> str | None:
        """Make a move, and say what came of it; None where ``said`` is none, and nothing changed."""
        ...

    def won(self) -> bool: ...

    def lost(self) -> bool: ...

    def advice(self) -> str:
        """An expert's next move, from wherever the game stands, as long as it can be won."""
        ...

    def picture(self) -> np.ndarray:
        """``(height, width, 3)`` uint8 of the position."""
        ...


class Maze:
    """A square of ``side`` x ``side`` cells; ``doors`` are pairs of cells ``(row, column)`` that one walks between."""

    most = 60
    rules = "Lead the blue disc to the green square. Each turn, answer with one of: up, down, left, right."

    def __init__(self, side: int, doors: frozenset[tuple[Cell, Cell]], start: Cell, goal: Cell):
        self.side, self.doors, self.start, self.goal, self.at = side, doors, start, goal, start

    @classmethod
    def draw(cls, random: np.random.Generator, level: int) -> Maze | None:
        """Every cell reaches every other in one way only."""
        side = (3, 4, 6)[level]
        start, goal = (divmod(int(n), side) for n in random.permutation(side * side)[:2])
        maze = cls(side, carve(random, side, side), start, goal)
        return maze if len(shortest(maze.doors, start, goal)) >= (4, 6, 9)[level] else None

    def told(self) -> str:
        return repr((self.side, sorted(self.doors), self.start, self.goal))

    def fresh(self) -> Maze:
        return Maze(self.side, self.doors, self.start, self.goal)

    def move(self, said: str) -> str | None:
        if said not in MOVES:
            return None
        down, right = MOVES[said]
        target = (self.at[0] + down, self.at[1] + right)
        if not self._open(self.at, target):
            return "There is a wall."
        self.at = target
        return ""

    def won(self) -> bool:
        return self.at == self.goal

    def lost(self) -> bool:
        return False

    def advice(self) -> str:
        return shortest(self.doors, self.at, self.goal)[0]

    def picture(self) -> np.ndarray:
        cell, edge = 140 // self.side, 8
        canvas = Canvas(cell * self.side + 2 * edge, cell * self.side + 2 * edge, _GROUND)
        for row, column in product(range(self.side), repeat=2):
            x, y = edge + column * cell, edge + row * cell
            if not self._open((row, column), (row - 1, column)):
                canvas.line([(x, y), (x + cell, y)], 2.0, _INK)
            if not self._open((row, column), (row, column - 1)):
                canvas.line([(x, y), (x, y + cell)], 2.0, _INK)
        far = edge + cell * self.side
        canvas.line([(edge, far), (far, far), (far, edge)], 2.0, _INK)
        x, y = (edge + (n + 0.5) * cell for n in self.goal[::-1])
        canvas.rectangle((x - cell / 3, y - cell / 3, x + cell / 3, y + cell / 3), COLOURS["green"])
        x, y = (edge + (n + 0.5) * cell for n in self.at[::-1])
        canvas.disc(x, y, cell / 4, COLOURS["blue"], _INK)
        return canvas.pixels()

    def _open(self, one: Cell, other: Cell) -> bool:
        return (min(one, other), max(one, other)) in self.doors


def _beside(cell: int, side: int) -> list[int]:
    row, column = divmod(cell, side)
    around = ((row + a, column + b) for a, b in MOVES.values())
    return [r * side + c for r, c in around if 0 <= r < side and 0 <= c < side]


class Lights:
    """A press turns a light and its neighbours over."""

    most = 60
    rules = (
        "Put out all lights (yellow). A press turns a light and those beside, above and below it over. Each turn, "
        "answer with the row and the column to press, counted from 1 at the top left, like 2,3."
    )

    def __init__(self, side: int, lit: frozenset[int]):
        self.side, self.first, self.lit = side, lit, set(lit)

    @classmethod
    def draw(cls, random: np.random.Generator, level: int) -> Lights | None:
        side = (3, 4, 5)[level]
        lights = cls(side, frozenset())
        for cell in random.permutation(side * side)[: int(random.integers(2, 4 + 2 * level))]:
            lights._press(int(cell))
        return cls(side, frozenset(lights.lit)) if lights.lit else None

    def told(self) -> str:
        return repr((self.side, sorted(self.first)))

    def fresh(self) -> Lights:
        return Lights(self.side, self.first)

    def _press(self, cell: int) -> None:
        self.lit ^= {cell, *_beside(cell, self.side)}

    def move(self, said: str) -> str | None:
        pair = _PAIR.fullmatch(said)
        if pair is None or not all(1 <= int(n) <= self.side for n in pair.groups()):
            return None
        self._press((int(pair[1]) - 1) * self.side + int(pair[2]) - 1)
        return ""

    def won(self) -> bool:
        return not self.lit

    def lost(self) -> bool:
        return False

    def presses(self) -> list[int]:
        """The fewest presses that put all out: the lights below a row say what the next row must press, so the first
        row alone is tried."""
        best: list[int] | None = None
        for first in product((False, True), repeat=self.side):
            trial, pressed = Lights(self.side, frozenset(self.lit)), []
            for cell in range(self.side**2):
                wanted = first[cell] if cell < self.side else cell - self.side in trial.lit
                if wanted:
                    trial._press(cell)
                    pressed.append(cell)
            if not trial.lit and (best is None or len(pressed) < len(best)):
                best = pressed
        assert best is not None, f"{self.told()} cannot be put out"
        return best

    def advice(self) -> str:
        row, column = divmod(self.presses()[0], self.side)
        return f"{row + 1},{column + 1}"

    def picture(self) -> np.ndarray:
        cell = 140 // self.side
        canvas = Canvas(cell * self.side + 8, cell * self.side + 8, (60, 60, 70))
        for n in range(self.side**2):
            row, column = divmod(n, self.side)
            x, y = 4 + column * cell, 4 + row * cell
            paint = COLOURS["yellow"] if n in self.lit else (96, 98, 110)
            canvas.rectangle((x + 3, y + 3, x + cell - 3, y + cell - 3), paint)
        return canvas.pixels()


class Coins:
    """Nim against an opponent that makes no mistake; the first position is won for who moves."""

    most = 60
    rules = (
        "In turns, each of us takes one or more coins from one heap; who takes the last coin of all wins. Answer with "
        "the heap, counted from 1 on the left, and how many coins you take, like 2,3."
    )

    def __init__(self, heaps: Sequence[int]):
        self.first, self.heaps, self._mine = tuple(heaps), list(heaps), False

    @classmethod
    def draw(cls, random: np.random.Generator, level: int) -> Coins | None:
        heaps = [int(n) for n in random.integers(3, (6, 8, 9)[level], size=(3, 4, 5)[level])]
        return cls(heaps) if reduce(xor, heaps) else None

    def told(self) -> str:
        return repr(self.first)

    def fresh(self) -> Coins:
        return Coins(self.first)

    def move(self, said: str) -> str | None:
        pair = _PAIR.fullmatch(said)
        if pair is None:
            return None
        heap, count = int(pair[1]) - 1, int(pair[2])
        if not 0 <= heap < len(self.heaps) or not 1 <= count <= self.heaps[heap]:
            return None
        self.heaps[heap] -= count
        if not any(self.heaps):
            self._mine = True
            return ""
        heap, count = self._best()
        self.heaps[heap] -= count
        return f"I take {count} from heap {heap + 1}."

    def won(self) -> bool:
        return self._mine

    def lost(self) -> bool:
        return not self._mine and not any(self.heaps)

    def _best(self) -> tuple[int, int]:
        """The move to a position that is lost for who is next; one coin of the largest heap where there is none."""
        total = reduce(xor, self.heaps)
        for n, heap in enumerate(self.heaps):
            if heap ^ total < heap:
                return n, heap - (heap ^ total)
        return self.heaps.index(max(self.heaps)), 1

    def advice(self) -> str:
        heap, count = self._best()
        return f"{heap + 1},{count}"

    def picture(self) -> np.ndarray:
        canvas = Canvas(132, 36 * len(self.first) + 8, _GROUND)
        for n, heap in enumerate(self.heaps):
            for k in range(heap):
                canvas.disc(22 + 36 * n, 122 - 13 * k, 6, (214, 170, 60), _INK)
            canvas.line([(8 + 36 * n, 129), (36 + 36 * n, 129)], 2.0, _INK)
        return canvas.pixels()


class Code:
    """Mastermind: how many pegs are right, and how many of the others have a colour that is in another place."""

    colours = ("red", "green", "blue", "yellow", "purple", "orange")
    most = 8

    def __init__(self, secret: tuple[int, ...], count: int):
        self.secret, self.count = secret, count
        self.guesses: list[tuple[tuple[int, ...], tuple[int, int]]] = []
        letters = ", ".join(f"{name[0]} {name}" for name in self.colours[:count])
        self.rules = (
            f"Find my row of {len(secret)} colours out of {letters}; a colour may come more than once. Each turn, "
            f"answer with {len(secret)} letters, like {'rgbyp'[: len(secret)]}. I say how many stand right, and how "
            "many more are in the row, but elsewhere."
        )

    @classmethod
    def draw(cls, random: np.random.Generator, level: int) -> Code | None:
        count = (5, 6, 6)[level]
        return cls(tuple(int(n) for n in random.integers(count, size=(3, 4, 4)[level])), count)

    def told(self) -> str:
        return repr((self.secret, self.count))

    def fresh(self) -> Code:
        return Code(self.secret, self.count)

    def move(self, said: str) -> str | None:
        letters = [name[0] for name in self.colours[: self.count]]
        said = said.replace(" ", "").lower()
        if len(said) != len(self.secret) or any(letter not in letters for letter in said):
            return None
        guess = tuple(letters.index(letter) for letter in said)
        marks = matches(guess, self.secret)
        self.guesses.append((guess, marks))
        return f"{marks[0]} right, {marks[1]} elsewhere."

    def won(self) -> bool:
        return bool(self.guesses) and self.guesses[-1][0] == self.secret

    def lost(self) -> bool:
        return len(self.guesses) >= self.most and not self.won()

    def advice(self) -> str:
        """Of some rows that all marks so far allow, the one that leaves fewest of some open at worst."""
        if not self.guesses:
            return "rrgg"[: len(self.secret)]
        rows = product(range(self.count), repeat=len(self.secret))
        left = [row for row in rows if all(matches(guess, row) == marks for guess, marks in self.guesses)]
        tried, others = left[:: len(left) // 12 + 1], left[:: len(left) // 100 + 1]
        best = min(tried, key=lambda row: max(Counter(matches(row, other) for other in others).values()))
        return "".join(self.colours[n][0] for n in best)

    def picture(self) -> np.ndarray:
        canvas = Canvas(18 * self.most + 8, 30 * len(self.secret) + 60, _GROUND)
        for n in range(self.most):
            for k in range(len(self.secret)):
                paint = COLOURS[self.colours[self.guesses[n][0][k]]] if n < len(self.guesses) else None
                canvas.disc(20 + 30 * k, 13 + 18 * n, 7, paint, _INK)
            if n < len(self.guesses):
                told = "{} / {}".format(*self.guesses[n][1])
                canvas.text(30 * len(self.secret) + 14, 13 + 18 * n, told, 11, _INK, "lm", "sans")
        return canvas.pixels()


def matches(guess: Sequence[int], secret: Sequence[int]) -> tuple[int, int]:
    """How many stand right, and how many more are in the row, but elsewhere."""
    right = sum(a == b for a, b in zip(guess, secret, strict=True))
    return right, (Counter(guess) & Counter(secret)).total() - right


GAMES = {"maze": Maze, "lights": Lights, "coins": Coins, "code": Code}


@dataclass(frozen=True)
class Match:
    """A game at its beginning, and the moves with which an expert wins it."""

    game: Game
    moves: tuple[str, ...]

    def told(self) -> str:
        return self.game.told()


class GameTask(SeededTask[Match]):
    """One of :data:`GAMES` at three levels."""

    category, levels = "games", 3

    def __init__(self, game: str, level: int | None = None):
        if game not in GAMES:
            raise ValueError(f"game {game!r} is none of {', '.join(GAMES)}")
        self.game, self.name = game, f"games/{game}"
        super().__init__(level)

    def draw(self, random: np.random.Generator, level: int) -> Match | None:
        game = GAMES[self.game].draw(random, level)
        if game is None or game.won():
            return None
        played, moves = game.fresh(), []
        while not played.won() and not played.lost():
            moves.append(played.advice())
            played.move(moves[-1])
        return Match(game, tuple(moves)) if played.won() else None

    def environment(self, item: Item) -> GameEnvironment:
        match = self.scene(item)
        return GameEnvironment(match.game.fresh(), min(len(match.moves) + SPARE, match.game.most))

    def gold(self, item: Item) -> Iterator[str]:
        yield from self.scene(item).moves


class GameEnvironment:
    """A position in every turn; what is no move ends the game."""

    def __init__(self, game: Game, moves: int):
        self.game, self.left = game, moves

    async def reset(self) -> Observation:
        return Observation(f"{self.game.rules} You have {self.left} moves.", (self.game.picture(),))

    async def step(self, action: str) -> Observation:
        said = action.strip().lower() if len(action) <= 40 else ""
        came = self.game.move(said)
        if came is None:
            return malformed(f"{action.strip()[:40]!r} is no move")
        self.left -= 1
        if self.game.won() or self.game.lost() or self.left <= 0:
            won = self.game.won()
            return Observation("won" if won else "not won", done=True, reward=float(won), parts={"won": float(won)})
        return Observation(came, (self.game.picture(),))

    async def close(self) -> None:
        """Nothing is held."""
