"""BrowserGym as a gym client: our actions in its words, a guest that breaks, and the real package where it is there."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from evals_kit import Knows
from PIL import Image

from evals.__main__ import main
from evals.baselines import BaselineAgent
from evals.foreign import browser_gym
from evals.foreign.browser_gym import GymTask, Seconds, call
from evals.foreign.guests import SCRIPTS, Guest, GuestFailed, GuestGone, guests
from evals.runner import Options, evaluate_now
from evals.suites.browsergym import browsergym
from evals.summary import summarise
from mmagent.actions import MAX_TEXT, Type, parse_action
from mmagent.browser import find_chromium
from mmagent.geometry import ImageView

HERE = Path(__file__).parent
REAL = importlib.util.find_spec("browsergym") is not None
OPTIONS = Options(progress=False, retries=1, backoff=0.001, concurrency=4)
VIEW = ImageView((300, 400), (300, 400))
GOLD = {
    "form": ["click(150,100)", 'hotkey("ctrl+a")', 'type("new")', 'key("Enter")'],
    "mouse": ["click(150,330)", "double_click(150,330)", "right_click(150,330)", "middle_click(150,330)",
              "triple_click(150,330)", "move(150,800)", "drag(100,330,100,800)", "scroll(700,200,0,200)"],
    "answer": ["wait()", 'finished("7")'],
    "missing": ['fail("it is not there")'],
}  # fmt: skip


def knows():
    """Does what solves each task of the page."""
    return Knows(lambda task, item: GOLD.get(task.name.rpartition(".")[2], ["wait()"]))


@pytest.fixture(autouse=True)
def page_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))


@pytest.fixture(scope="module")
def suite():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
        return browsergym("gym_page", max_steps=10)


def only(suite, *names):
    return replace(suite, tasks=tuple(f"browsergym/{name}" for name in names))


PAGE = tuple(f"page.{kind}" for kind in GOLD)


@pytest.mark.skipif(REAL, reason="BrowserGym is there: the slow test below has the real page")
def test_gold_scores_one_and_empty_and_random_answers_nothing(suite, tmp_path):
    assert set(only(suite, *PAGE).tasks) < set(suite.tasks)
    gold = evaluate_now(only(suite, *PAGE), knows(), tmp_path / "gold", OPTIONS)
    assert [(row.key, row.error) for row in gold.rows if row.error] == []
    assert {row.task: row.value for row in gold.rows} == dict.fromkeys(only(suite, *PAGE).tasks, 1.0)
    assert {row.slices["benchmark"] for row in gold.rows} == {"page"}
    assert re.fullmatch(r"gym_page \((playwright [0-9.]+, )?gymnasium [0-9.]+\)", gold.pins["suite.data"])
    for kind in ("null", "random"):
        run = evaluate_now(only(suite, *PAGE), BaselineAgent(kind), tmp_path / kind, OPTIONS)
        assert [row.error for row in run.rows if row.error] == []
        assert summarise(run.rows).score.mean == 0.0


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not REAL, reason="browsergym-core is not installed")
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_the_real_browsergym_understands_every_action(tmp_path, monkeypatch):
    from playwright.sync_api import sync_playwright

    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "browsers"))
    with sync_playwright() as playwright:  # it looks nowhere else, and a headless one has another name
        full = Path(playwright.chromium.executable_path)
        try:
            playwright.chromium.launch()
        except Exception as error:
            (headless,) = re.findall(r"(/\S*headless[_-]shell\S*)", str(error))[:1] or [str(full)]
    for path in {full, Path(headless)}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(find_chromium())
    seconds = Seconds(open=300.0, reset=300.0, step=120.0)
    suite = only(browsergym("gym_page", max_steps=10, seconds=seconds), *PAGE)
    run = evaluate_now(suite, knows(), tmp_path / "gold", OPTIONS)
    assert {row.key: row.error for row in run.rows if row.error} == {}
    assert {row.task: row.value for row in run.rows} == dict.fromkeys(suite.tasks, 1.0)
    assert all("failed" not in step.note for row in run.rows for step in row.steps)
    run = evaluate_now(suite, BaselineAgent("null"), tmp_path / "null", OPTIONS)
    assert summarise(run.rows).score.mean == 0.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("click(0,999)", "mouse_click(0.2, 299.85)"),
        ("click(500.0,250.0)", "mouse_click(200.0, 75.0)"),
        ("double_click(500,500)", "mouse_dblclick(200.2, 150.15)"),
        ("triple_click(500,500)", "mouse_tripleclick(200.2, 150.15)"),
        ("right_click(500,500)", "mouse_click(200.2, 150.15, 'right')"),
        ("middle_click(500,500)", "mouse_click(200.2, 150.15, 'middle')"),
        ("move(500,500)", "mouse_move(200.2, 150.15)"),
        ("drag(0,0,500.0,500.0)", "mouse_drag_and_drop(0.2, 0.15, 200.0, 150.0)"),
        ("scroll(500,500,-100,200)", "scroll_at(200.2, 150.15, -40, 60)"),
        ('type("a\\"b\'c\\nd\\\\")', "keyboard_type('a\"b\\'c\\nd\\\\')"),
        ('key("Enter")', "keyboard_press('Enter')"),
        ('key("\\"")', "keyboard_press('\"')"),
        ('hotkey("ctrl+shift+a")', "keyboard_press('Control+Shift+a')"),
        ('hotkey("alt++")', "keyboard_press('Alt++')"),
        ("wait()", "noop()"),
        ('finished("7")', "send_msg_to_user('7')"),
        ("finished()", "send_msg_to_user('')"),
        ('fail("no")', "report_infeasible('no')"),
    ],
)
def test_actions_are_told_in_the_words_of_browsergym(text, told):
    assert call(parse_action(text), VIEW) == told


@pytest.mark.skipif(not REAL, reason="browsergym-core is not installed")
def test_its_own_parser_reads_what_is_typed_as_it_was_meant():
    from browsergym.core.action.parsers import highlevel_action_parser

    for text in ("# no comment", 'say("x")', "'''", "\\", "a\nb\tc", "café 日本 \U0001f600", "x" * MAX_TEXT):
        ((name, (read,)),) = highlevel_action_parser.parse_string(call(Type(text), VIEW), parse_all=True).as_list()
        assert (name, read) == ("keyboard_type", text)


def play(name, actions, seconds=None, pool_size=1):
    async def inside():
        async with guests("gym_env", "", None, pool_size) as pool:
            task = GymTask(f"browsergym/{name}", ["gym_page"], pool, seconds)
            environment = task.environment(next(iter(task.items("test", 0))))
            try:
                seen = [await environment.reset()]
                for action in actions:
                    seen.append(await environment.step(action))
                return seen
            finally:
                await environment.close()
                await environment.close()

    return asyncio.run(inside())


@pytest.mark.skipif(REAL, reason="the double's own words")
def test_errors_and_messages_are_shown_and_whoever_ends_has_ended():
    seen = play("page.answer", ["click(1,1)", 'hotkey("meta+Enter")', "finished()"])
    assert seen[0].text == "Which number is shown?"
    assert seen[0].images[0].shape == (300, 400, 3)
    assert seen[1].text == "A number, please."
    assert [one.done for one in seen] == [False, False, False, True]
    assert seen[-1].reward == 0.0
    (said,) = play("page.form", ['finished("it is done")'])[1:]
    assert (said.done, said.reward) == (True, 0.0)
    (malformed,) = play("page.form", ["keyboard_type('new')"])[1:]
    assert malformed.parts == {"malformed": 1.0}


@pytest.mark.skipif(REAL, reason="the double's own words")
def test_pictures_of_a_goal_come_before_the_screen_and_stray_words_harm_nothing():
    first = play("broken.shows", [])[0]
    assert [image.shape for image in first.images] == [(1, 1, 3), (300, 400, 3)]
    assert play("broken.talks", ["wait()"])[1].text == ""


def test_a_goals_picture_is_shown_on_white_and_one_that_cannot_be_read_is_named():
    def shown(data):
        part = {"type": "image_url", "image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
        return browser_gym._goal([{"type": "text", "text": "Like this."}, part], "page.form")

    file = io.BytesIO()
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(file, "PNG")
    words, (picture,) = shown(file.getvalue())
    assert (words, picture.shape, picture.min()) == ("Like this.", (2, 3, 3), 255)
    with pytest.raises(ValueError, match=r"page\.form: goal: cannot decode image"):
        shown(b"no picture")


@pytest.mark.parametrize(
    ("kind", "wrong", "attempts"),
    [
        ("raises", r"GuestFailed: .*'reset' failed with RuntimeError: no such site", 1),
        ("blank", r"GuestFailed: .* a screen of shape \[0, 4, 3\]", 1),
        ("dies", r"GuestGone: .* broke at 'reset' \(IncompleteReadError", 2),
        ("hangs", r"GuestGone: .* no answer to 'reset' within 1 s", 2),
    ],
)
def test_a_guest_that_breaks_is_an_error_and_spoils_no_other(suite, tmp_path, kind, wrong, attempts):
    both = replace(only(browsergym("gym_page", seconds=Seconds(60.0, 1.0, 60.0)), f"broken.{kind}", "page.form"))
    if REAL:
        both = only(both, f"broken.{kind}")
    run = evaluate_now(both, knows(), tmp_path, replace(OPTIONS, concurrency=1))
    rows = {row.task.rpartition(".")[2]: row for row in run.rows}
    assert rows[kind].value is None
    assert re.match(wrong, rows[kind].error), rows[kind].error
    assert rows[kind].attempts == attempts
    assert REAL or rows["form"].value == 1.0


STUBBORN = """
import signal, sys, time
sys.path.insert(0, {folder!r})
from wire import serve
def leave():
    {deaf}
    time.sleep(60)
serve({{"leave": leave}}, at_end=lambda: None)
"""


@pytest.mark.parametrize("deaf", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["leaving", "ending"])
def test_a_guest_that_is_given_back_when_time_is_up_is_ended(tmp_path, monkeypatch, deaf):
    """An item may be over its time while it closes: the guest was in nobody's hands then, and lived on."""
    (tmp_path / "slow.py").write_text(STUBBORN.format(folder=str(SCRIPTS), deaf=deaf))
    monkeypatch.setattr("evals.foreign.guests.SCRIPTS", tmp_path)

    async def work() -> None:
        async with guests("slow", "", None, 1, grace=5.0) as pool:
            guest = await pool.take()
            closing = asyncio.create_task(pool.give_back(guest))
            for _ in range(2 if deaf != "pass" else 1):  # while it leaves, and while it is ended
                await asyncio.sleep(1)
                closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            await asyncio.wait_for(guest._process.wait(), 2)  # killed, and not waited for
            other = await asyncio.wait_for(pool.take(), 5)  # there is room
            await other.stop()
            await pool.give_back(other)

    asyncio.run(work())


def test_a_guest_ends_with_who_asked_it():
    async def inside():
        guest = await Guest.start("gym_env")
        await guest.ask("known", 60.0, modules=[])
        with pytest.raises(GuestFailed, match="ModuleNotFoundError: No module named 'nothing_like_it'"):
            await guest.ask("known", 60.0, modules=["nothing_like_it"])
        await guest.stop()
        with pytest.raises(GuestGone, match="was given up before"):
            await guest.ask("known", 60.0, modules=[])
        return guest._process.returncode

    assert asyncio.run(inside()) == 0  # by itself, when it was asked to


@pytest.mark.parametrize("program", ["cat", "true"])
def test_a_program_that_is_no_guest_is_found_out(program):
    """By what it says, or by its having ended before it was asked: whichever is seen first."""

    async def inside():
        guest = await Guest.start("wire", python=f"/bin/{program}")  # shows the script, or nothing
        with pytest.raises(GuestGone, match=rf"{program}: broke at 'known' \("):
            await guest.ask("known", 60.0, modules=[])
        return guest._process.returncode is not None

    assert asyncio.run(inside())


def test_the_command_takes_modules_and_refuses_what_cannot_be_run(tmp_path, capsys):
    assert main(["browsergym", "--baseline", "null"]) == 2
    assert "browsergym has no tasks without data. BrowserGym's environments: --data" in capsys.readouterr().err
    assert main(["browsergym", "--baseline", "null", "--data", "gym_page@/nowhere/python"]) == 2
    assert "/nowhere/python in" in capsys.readouterr().err
    if not REAL:
        where = ["--data", f"gym_page@{sys.executable}", "--quiet", "--out", str(tmp_path)]
        assert main(["browsergym", *where, "--baseline", "null", "--tasks", "page.form"]) == 0
        rows = [json.loads(line) for line in (tmp_path / "browsergym" / "items.jsonl").read_text().splitlines()]
        assert [(row["task"], row["value"]) for row in rows] == [("browsergym/page.form", 0.0)]
