"""AndroidWorld's protocol against a double that refuses what the real server refuses: what is sent, in which order,
what is a score, what is an error, and how a server that breaks is survived."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from android_double import GOLD, HEIGHT, WIDTH, AndroidDouble, create_suite
from evals_kit import Knows

import evals.foreign.android_world as module
from evals.__main__ import main
from evals.baselines import BaselineAgent
from evals.foreign.android_world import (
    AndroidServer,
    AndroidTask,
    DeviceError,
    Devices,
    Instance,
    Seconds,
    command,
    devices,
)
from evals.runner import Options, evaluate_now
from evals.suites.androidworld import androidworld
from evals.summary import summarise
from mmagent.actions import PHONE_ACTIONS, parse_action
from mmagent.generation.http_transport import EndpointRefused, EndpointUnavailable
from mmagent.geometry import ImageView

OPTIONS = Options(progress=False, retries=2, backoff=0.001, concurrency=8)
SHORT = Seconds(ask=5.0, screen=1.5, act=5.0, prepare=5.0, start=5.0)
VIEW = ImageView((HEIGHT, WIDTH), (HEIGHT, WIDTH))


@contextlib.contextmanager
def running(count=1):
    servers = [AndroidDouble() for _ in range(count)]
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def server():
    with running() as (one,):
        yield one


def knows(combinations=1, seed=30):
    """Reads the number in the goal and does what solves the task."""
    goals = {
        Instance(name, n): task.goal
        for name, made in create_suite(combinations, seed).items()
        for n, task in enumerate(made)
    }

    def solve(task, item):
        (number,) = re.findall(r"\d+", goals[item.payload]) or [""]
        return [action.replace("{}", number) for action in GOLD[item.payload.task]]

    return Knows(solve)


def judge(suite, agent, folder, options=OPTIONS):
    return evaluate_now(suite, agent, folder, options)


def test_gold_scores_one_and_empty_and_random_answers_nothing(server, tmp_path):
    suite = androidworld(server.url, combinations=2)
    gold = judge(suite, knows(2), tmp_path / "gold")
    assert [(row.key, row.error) for row in gold.rows if row.error] == []
    assert summarise(gold.rows).score.mean == 1.0
    assert len(gold.rows) == 10
    assert {row.slices["app"] for row in gold.rows} == {"Clock", "Files", "Markor", "Notes", "System"}
    for kind in ("null", "random"):
        run = judge(androidworld(server.url, max_steps=8), BaselineAgent(kind), tmp_path / kind)
        assert [row.error for row in run.rows if row.error] == []
        assert summarise(run.rows).score.mean <= 0.2
    assert not any(task.initialized for made in server.suite.values() for task in made)  # each was torn down
    assert [error for error in server.errors if "execute_action" not in error] == []  # nothing in the wrong order
    assert gold.pins["suite.data"] == "AndroidWorld's server, 2 instances a task, seed 30; 30 actions a task"


def test_requests_come_in_the_order_of_the_real_client(server, tmp_path):
    suite = androidworld(server.url)
    suite = replace(suite, tasks=("androidworld/ClockStopWatchRunning",))
    server.asked.clear()
    assert judge(suite, knows(), tmp_path).rows[0].value == 1.0
    assert server.asked == [
        "/health", "/suite/reinitialize", "/suite/task_list", "/reset", "/task/goal", "/task/initialize", "/screenshot",
        "/execute_action", "/screenshot", "/execute_action", "/screenshot", "/task/score", "/task/tear_down",
    ]  # fmt: skip
    assert server.said == [
        {"action_type": "open_app", "app_name": "clock"},
        {"action_type": "click", "x": 18, "y": 38},
    ]


def test_what_an_agent_does_and_does_not_end_scores_nothing(server, tmp_path):
    silent = Knows(lambda task, item: ['open_app("clock")', "click(500,479)"])
    suite = replace(androidworld(server.url), tasks=("androidworld/ClockStopWatchRunning",))
    (row,) = judge(suite, silent, tmp_path).rows
    assert (row.value, row.error, row.status) == (0.0, None, "truncated")
    assert server.suite["ClockStopWatchRunning"][0].initialized is False


def test_each_task_has_the_actions_that_a_file_says(server, tmp_path):
    steps = dict.fromkeys(GOLD, 7) | {"ClockStopWatchRunning": 2, "NotesTodoItemCount": 3}
    file = tmp_path / "steps.json"
    file.write_text(json.dumps(steps))
    suite = androidworld(f"{server.url}?steps={file}")
    assert suite.play.max_steps == 7
    assert re.search(r"; steps.json, [0-9a-f]{12}$", suite.data)
    run = judge(suite, knows(), tmp_path / "out")
    values = {row.task.partition("/")[2]: row.value for row in run.rows}
    assert values == dict.fromkeys(GOLD, 1.0) | {"ClockStopWatchRunning": 0.0}  # its last action was one too late
    (row,) = [row for row in run.rows if row.value == 0.0]
    assert (row.error, row.status) == (None, "finished")
    assert row.steps[-1].note == "not ended when its actions were used up"
    file.write_text(json.dumps(steps | {"SystemShade": 0}))
    with pytest.raises(ValueError, match=r"steps.json: does not say how many actions SystemShade has"):
        androidworld(f"{server.url}?steps={file}")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        androidworld(f"{server.url}?steps={tmp_path}/nothing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("click(0,0)", {"action_type": "click", "x": 0, "y": 0}),
        ("click(999,999)", {"action_type": "click", "x": WIDTH - 1, "y": HEIGHT - 1}),
        ("double_click(500.0,250.0)", {"action_type": "double_tap", "x": 18, "y": 20}),
        ("long_press(500,500)", {"action_type": "long_press", "x": 18, "y": 40}),
        ("scroll(1,2,0,5)", {"action_type": "scroll", "direction": "down"}),
        ("scroll(1,2,0,-5)", {"action_type": "scroll", "direction": "up"}),
        ("scroll(1,2,9,5)", {"action_type": "scroll", "direction": "right"}),
        ("scroll(1,2,-9,5)", {"action_type": "scroll", "direction": "left"}),
        ("scroll(1,2,0,0)", None),
        ("drag(500,100,500,900)", {"action_type": "swipe", "direction": "down"}),
        ("drag(500,900,500,100)", {"action_type": "swipe", "direction": "up"}),
        # actuation.py: "left" begins at the left edge, "right" at the right one
        ("drag(100,500,900,500)", {"action_type": "swipe", "direction": "left"}),
        ("drag(900,500,100,500)", {"action_type": "swipe", "direction": "right"}),
        ("drag(100,100,300,250)", {"action_type": "swipe", "direction": "down"}),  # the screen is taller than wide
        ("drag(5,5,5,5)", None),
        ('type("café")', {"action_type": "input_text", "text": "café"}),
        ('type("milk\\n")', {"action_type": "input_text", "text": "milk"}),  # the server's own Enter submits it
        ('type("\\n")', {"action_type": "keyboard_enter"}),
        ('replace("oat milk\\n")', {"action_type": "input_text", "text": "oat milk", "clear_text": True}),
        ('replace("\\n")', None),
        ('key("Enter")', {"action_type": "keyboard_enter"}),
        ('key("Tab")', None),
        ('open_app("Clock")', {"action_type": "open_app", "app_name": "Clock"}),
        ("go_back()", {"action_type": "navigate_back"}),
        ("go_home()", {"action_type": "navigate_home"}),
        ("wait()", {"action_type": "wait"}),
    ],
)
def test_actions_are_told_in_the_words_of_the_server(server, text, told):
    assert command(parse_action(text, PHONE_ACTIONS), VIEW) == told
    if told is not None and told.get("app_name") != "Clock":
        server.phone.execute(told)


def episode(url, actions, task="ClockStopWatchRunning", seconds=None):
    async def inside():
        async with devices([url], 1, 30, seconds) as pool:
            environment = AndroidTask(f"androidworld/{task}", pool, 1, 9).environment(item_of(task))
            try:
                seen = [await environment.reset()]
                for action in actions:
                    seen.append(await environment.step(action))
                return seen
            finally:
                await environment.close()

    return asyncio.run(inside())


def item_of(task):
    return next(AndroidTask(f"androidworld/{task}", Devices([]), 1, 9).items("test", 0))


def test_what_cannot_be_done_is_told_and_the_episode_goes_on(server):
    seen = episode(server.url, ['key("Tab")', 'open_app("nothing")', "fail()"])
    assert [one.text for one in seen[:3]] == [
        "Run the stopwatch.", 'this phone cannot "key(\\"Tab\\")"; nothing was done', "that could not be done",
    ]  # fmt: skip
    assert [one.done for one in seen] == [False, False, False, True]
    assert seen[-1].reward == 0.0
    assert seen[0].images[0].shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(seen[0].images[0], server.phone.pixels())
    (malformed,) = episode(server.url, ["I would click"])[1:]
    assert (malformed.done, malformed.reward, malformed.parts) == (True, 0.0, {"malformed": 1.0})
    (mouse,) = episode(server.url, ["right_click(1,1)"])[1:]
    assert mouse.parts == {"malformed": 1.0}


def test_a_server_that_breaks_midway_is_tried_again_from_the_start(server, tmp_path):
    suite = androidworld(server.url, seconds=SHORT)
    for fault in ("drop", "hang", 503, b'{"pixels": [[[1, 2'):
        server.faults = {"/screenshot": [None, fault], "/execute_action": [None, None, "drop"]}
        run = judge(suite, knows(), tmp_path / str(fault))
        assert [(row.key, row.error) for row in run.rows if row.error] == []
        assert summarise(run.rows).score.mean == 1.0
        assert 2 <= max(row.attempts for row in run.rows) <= 3


def test_a_server_that_was_started_anew_draws_its_tasks_again(server, tmp_path):
    suite = replace(androidworld(server.url, seconds=SHORT), tasks=("androidworld/NotesTodoItemCount",))
    original = server.answer

    def crash(method, path, query, body):
        if path == "/execute_action":
            server.answer = original
            server.restart()  # with seed 42: another number is asked for, which nobody would notice
            server.faults["/screenshot"] = ["drop"]
        return original(method, path, query, body)

    server.answer = crash
    (row,) = judge(suite, knows(), tmp_path).rows
    assert (row.value, row.error, row.attempts) == (1.0, None, 2)
    assert server.asked.count("/suite/reinitialize") == 2


def test_a_server_that_is_gone_is_an_error_and_no_zero(server, tmp_path):
    suite = androidworld(server.url, seconds=replace(SHORT, start=0.5))
    server.faults = {"/screenshot": [None, None, *["drop"] * 100]}
    run = judge(suite, knows(), tmp_path, replace(OPTIONS, give_up_after=100))
    assert [row.value for row in run.rows] == [None] * 5
    assert all("EndpointUnavailable" in row.error and row.attempts == 3 for row in run.rows)
    server.faults.clear()
    again = judge(suite, knows(), tmp_path, replace(OPTIONS, retry_errors=True))
    assert summarise(again.rows).score.mean == 1.0


@pytest.mark.parametrize(
    ("path", "answer", "wrong"),
    [
        ("/task/initialize", 500, "DeviceError: .*/task/initialize.* answered 500"),
        ("/task/goal", b'{"goal": null}', "DeviceError: .* no goal in words"),
        ("/task/score", b'{"score": NaN}', "DeviceError: .* is no number in"),
        ("/task/score", b'{"score": true}', "DeviceError: .* is no number in"),
        ("/task/score", 500, "DeviceError: .* answered 500"),
        ("/screenshot", b'{"pixels": [[[1, 2, 300]]]}', "DeviceError: .* are no picture"),
        ("/screenshot", b'{"pixels": [[1], [2, 3]]}', "DeviceError: .* no pixels"),
        ("/screenshot", b'{"pixels": []}', "DeviceError: .* are no picture"),
        ("/screenshot", b"[]", "EndpointRefused: .* no JSON object"),
        ("/reset", b'{"status": "failure"}', "DeviceError: .* no success but"),
    ],
)
def test_a_server_that_fails_or_says_nonsense_is_an_error_at_once(server, tmp_path, path, answer, wrong):
    suite = replace(androidworld(server.url), tasks=("androidworld/ClockStopWatchRunning",))
    server.faults = {path: [answer]}
    (row,) = judge(suite, knows(), tmp_path).rows
    assert row.value is None
    assert re.match(wrong, row.error)
    assert row.attempts == 1


def test_a_server_that_did_not_come_back_is_waited_for_once(server, monkeypatch):
    waited = []

    async def ready(path, timeout):
        waited.append(timeout)
        if server.down:
            raise EndpointUnavailable("gone")

    monkeypatch.setattr(module, "IMPATIENT", 0.1)
    client = AndroidServer(server.url, SHORT)
    monkeypatch.setattr(client.transport, "ready", ready)
    for down in (False, True, True, False, True):
        server.down = down
        with contextlib.suppress(EndpointUnavailable):
            asyncio.run(client.draw(1, 30))
    assert waited == [5.0, 5.0, 0.1, 0.1, 5.0]


def test_a_screen_is_read_quickly_and_as_a_parser_of_json_reads_it():
    drawn = np.random.default_rng(0).integers(0, 256, (11, 7, 3))
    for shape in ((11, 7), (1, 1), (1, 7), (11, 1)):
        screen = drawn[: shape[0], : shape[1]]
        for separators in ((", ", ": "), (",", ":")):
            body = json.dumps({"pixels": screen.tolist()}, separators=separators).encode()
            assert np.array_equal(module._quick(body), screen)
            assert np.array_equal(module._pixels(body, "x"), screen)
    body = json.dumps({"pixels": drawn.tolist()}, separators=(",", ":")).encode()
    other = [
        body.replace(b",", b",,", 1), body.replace(b"[[[", b"[[[,", 1), body.replace(b"]]]", b",]]]"), body[:-1], b"{}",
        body.replace(b"],[", b"],", 1), body.replace(b"]],[[", b"],[", 1), body.replace(b"]],[[", b"]],[[],[", 1),
        b'{"pixels":[[[1,2,256]]]}', b'{"pixels":[[[1,2,99999999999999999999]]]}', b'{"pixels":[[[1,2,-3]]]}',
        b'{"pixels":[[[1 1,2,3]]]}', b'{"pixels":[[[1,2.5,3]]]}', b'{"pixels":[[[1,2]]]}', b'{"pixels":[[[]]]}',
        b'{"pixels":[[[1,2,3],[1,2,3]],[[1,2,3]]]}', b'{"pixels":[[[1,2,3]]],"more":[[[1,2,3]]]}',
    ]  # fmt: skip
    assert [text for text in other if module._quick(text) is not None] == []


def test_a_task_that_is_not_torn_down_spoils_no_other(server, tmp_path):
    suite = androidworld(server.url)
    server.faults = {"/task/tear_down": [500, 500, None, None, "drop"]}
    run = judge(suite, knows(), tmp_path)
    assert [(row.key, row.error) for row in run.rows if row.error] == []
    assert summarise(run.rows).score.mean == 1.0


def test_a_client_that_was_killed_leaves_nothing_in_the_way(server, tmp_path):
    for made in server.suite.values():
        for task in made:
            task.initialized = True
    assert summarise(judge(androidworld(server.url), knows(), tmp_path).rows).score.mean == 1.0


def test_each_server_plays_one_episode_at_a_time(tmp_path):
    with running(2) as servers:
        suite = androidworld(",".join(one.url for one in servers), combinations=2)
        assert suite.at_once == 2
        run = judge(suite, knows(2), tmp_path)
        assert summarise(run.rows).score.mean == 1.0
        begun = [one.asked.count("/task/initialize") for one in servers]
        assert sum(begun) == 10
        assert min(begun) > 0
        servers[1].suite.pop("SystemShade")
        servers[1].answer = lambda *a, real=servers[1].answer: (
            {"task_list": ["Other"]} if a[1] == "/suite/task_list" else real(*a)
        )
        with pytest.raises(DeviceError, match="has other tasks than"):
            judge(suite, knows(), tmp_path / "other")


def test_wrong_requests_are_refused_and_no_break_on_the_way(server):
    client = AndroidServer(server.url)
    with pytest.raises(EndpointRefused, match="answered 422"):
        asyncio.run(client._get("/task/goal", {"task_type": "ClockStopWatchRunning", "task_idx": "first"}))
    with pytest.raises(EndpointRefused, match="answered 405"):
        asyncio.run(client._post("/screenshot", {}))
    with pytest.raises(DeviceError, match="answered 500"):
        asyncio.run(client.act({"action_type": "right_click", "x": 1, "y": 1}))
    with pytest.raises(DeviceError, match="answered 500"):
        asyncio.run(client.score(Instance("ClockStopWatchRunning", 0)))
    server.down = True
    with pytest.raises(EndpointUnavailable, match="is not ready after 0 s"):
        asyncio.run(AndroidServer(server.url, replace(SHORT, start=0.2)).draw(1, 1))


def test_the_command_takes_a_server_and_lists_the_suite(server, tmp_path, capsys):
    where = ["--data", server.url, "--baseline", "null", "--quiet", "--out", str(tmp_path)]
    assert main(["androidworld", *where, "--tasks", "SystemShade", "--limit", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "androidworld" / "items.jsonl").read_text().splitlines()]
    assert [(row["task"], row["value"]) for row in rows] == [("androidworld/SystemShade", 0.0)]
    assert main(["androidworld", "--baseline", "null"]) == 2
    assert "androidworld has no tasks without data. AndroidWorld on emulators: --data" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tells no gold answers"):
        next(iter(AndroidTask("androidworld/X", Devices([]), 1, 9).gold(item_of("X"))))
