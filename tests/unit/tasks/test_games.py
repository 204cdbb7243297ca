"""Games: the expert wins from every first position, chance hardly ever does, and rules are kept."""

from __future__ import annotations

import asyncio
from functools import reduce
from itertools import combinations, islice, pairwise
from operator import xor
from random import Random

import numpy as np
import pytest

from mmagent.tasks.games import GAMES, SPARE, Code, Coins, GameTask, Lights, Maze, matches
from mmagent.testing import check_environment, check_task

EVERY = pytest.mark.parametrize("game", GAMES)


@EVERY
def test_the_public_kit_finds_no_fault(game):
    task = GameTask(game)
    asyncio.run(check_task(task, count=6))
    item = next(task.items("test", 1))
    asyncio.run(check_environment(lambda: task.environment(item), list(task.gold(item))))


@EVERY
def test_moves_by_chance_hardly_ever_win(game):
    """Legal moves, not nonsense: what a policy tries before it has learnt anything."""
    random = Random(0)
    kinds = {
        "maze": lambda: random.choice(("up", "down", "left", "right")),
        "lights": lambda: f"{random.randint(1, 5)},{random.randint(1, 5)}",
        "coins": lambda: f"{random.randint(1, 5)},{random.randint(1, 9)}",
        "code": lambda: "".join(random.choice("rgbyp") for _ in range(4)),
    }

    def play(environment) -> bool:
        played = environment.game
        while environment.left > 0 and not (played.won() or played.lost()):
            said = kinds[game]()
            said = said[: len(played.secret)] if game == "code" else said
            environment.left -= played.move(said) is not None  # what is no move is tried again
        return played.won()

    task = GameTask(game)
    won = [play(task.environment(item)) for item in islice(task.items("train", 0), 20 if game == "code" else 60)]
    assert sum(won) / len(won) <= 0.15


@EVERY
def test_every_turn_has_a_picture_that_changes(game):
    task = GameTask(game)

    async def pictures(item):
        environment = task.environment(item)
        out = [(await environment.reset()).images[0]]
        for move in task.gold(item):
            seen = await environment.step(move)
            out += seen.images
        return out

    for item in islice(task.items("train", 0), 3):
        shown = asyncio.run(pictures(item))
        assert len(shown) == len(list(task.gold(item)))
        assert all(not np.array_equal(a, b) for a, b in pairwise(shown))


def test_an_episode_ends_after_some_moves_more_than_the_expert_needs():
    task = GameTask("lights")
    item = next(task.items("train", 0))

    async def dither():
        environment = task.environment(item)
        seen = await environment.reset()
        assert f"You have {len(list(task.gold(item))) + SPARE} moves." in seen.text
        moves = 0
        while not seen.done:
            seen = await environment.step("1,1")
            moves += 1
        return moves, seen

    moves, seen = asyncio.run(dither())
    assert moves == len(list(task.gold(item))) + SPARE
    assert seen.reward == 0.0


def test_a_wall_costs_a_move_and_moves_nobody():
    maze = Maze(2, frozenset({((0, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 0), (1, 1))}), (0, 0), (1, 0))
    assert maze.move("down") == maze.move("up") == maze.move("left") == "There is a wall."
    assert maze.at == (0, 0)
    assert maze.move("jump") is None
    for way in ("right", "down", "left"):
        assert maze.advice() == way
        assert maze.move(way) == ""
    assert maze.won()


def test_lights_are_put_out_in_as_few_presses_as_there_are():
    """Against all sets of presses on the small square."""
    for lit in (frozenset({0}), frozenset({4}), frozenset({0, 2, 4, 6, 8}), frozenset(range(9))):
        fewest = next(
            count
            for count in range(10)
            for cells in combinations(range(9), count)
            if not reduce(lambda state, cell: state ^ _pressed(cell), cells, set(lit))
        )
        assert len(Lights(3, lit).presses()) == fewest


def _pressed(cell: int) -> set[int]:
    row, column = divmod(cell, 3)
    around = ((row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return {r * 3 + c for r, c in around if 0 <= r < 3 and 0 <= c < 3}


def test_the_opponent_of_coins_makes_no_mistake():
    random = Random(1)
    for _ in range(60):
        coins = Coins([random.randint(1, 6) for _ in range(3)])
        heap = random.randrange(3)
        before = reduce(xor, coins.heaps)
        coins.move(f"{heap + 1},{random.randint(1, coins.heaps[heap])}")
        after_mine = reduce(xor, coins.heaps)
        if any(coins.heaps) and after_mine == 0:
            assert coins.lost() or before >= 0
    lost = Coins([1, 2, 3])  # lost for who moves
    while not (lost.won() or lost.lost()):
        lost.move(lost.advice())
    assert lost.lost()
    assert Coins([2]).move("1,3") is None
    assert Coins([2]).move("2,1") is None
    assert Coins([2]).move("1,0") is None


def test_marks_of_a_guess():
    assert matches((0, 1, 2, 3), (0, 1, 2, 3)) == (4, 0)
    assert matches((0, 0, 1, 1), (1, 1, 0, 0)) == (0, 4)
    assert matches((0, 0, 0, 1), (0, 1, 1, 2)) == (1, 1)
    code = Code((0, 1, 2), 5)
    assert code.move("rgx") is code.move("rg") is code.move("rgbb") is None
    assert code.move("b g r") == "1 right, 2 elsewhere."
    for _ in range(7):
        code.move("ppp")
    assert code.lost()


def test_an_unknown_game_is_named():
    with pytest.raises(ValueError, match="game 'chess' is none of maze, lights, coins, code"):
        GameTask("chess")
