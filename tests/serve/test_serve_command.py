"""``python -m mmagent.serve``: the real command on a tiny model, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest

from mmagent.chat import ChatConfig
from mmagent.generation.generator import Generator
from mmagent.generation.http import ChatClient, EndpointRefused, ServerConfig
from mmagent.interop.agent_folder import load_agent, save_agent
from mmagent.serve.options import parse
from mmagent.serve.requests import read_chat
from mmagent.trajectories import Limits, Trajectory
from tests.agent_kit import GEOMETRY, tiny_model, tiny_vocab
from tests.serve.serve_kit import image_part, png, png_url, prompts_of, said

ROOT = Path(__file__).resolve().parents[2]
KEY = "geheim"
MIXED = [{"role": "user", "content": [{"type": "text", "text": "What"}, image_part(png_url(3)), "is it?"]}]


@dataclass
class Command:
    """A server in a process of its own."""

    process: subprocess.Popen
    url: str
    told: str

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def health(self) -> dict:
        with urllib.request.urlopen(self.url + "/health", timeout=10) as response:
            return json.load(response)


@contextlib.contextmanager
def command(folder: Path, *options: str, **environment: str) -> Iterator[Command]:
    argv = [sys.executable, "-m", "mmagent.serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    told = ""
    try:
        while "-d '" not in told:
            line = process.stdout.readline()
            assert line, f"it ended: {told}"
            told += line
        yield Command(process, re.search(r"at (http://\S+)", told)[1], told)
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_agent(path, tiny_model().eval(), tiny_vocab(), GEOMETRY, ChatConfig())
    (path.parent / "pictures").mkdir()
    (path.parent / "pictures" / "a.png").write_bytes(png(3))
    return path


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Command]:
    """One for all tests; at the end it is told to, in the middle of an answer, and leaves as it should."""
    options = "--max-context", "256", "--files", str(folder.parent / "pictures"), "--api-key-variable", "KEY_OF_TEST"
    with command(folder, *options, KEY_OF_TEST=KEY) as running:
        yield running
        stream = running.client().chat.completions.create(
            model="tiny", messages=said("a"), max_tokens=120, stream=True, extra_body={"return_token_ids": True}
        )
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert running.process.wait(20) == 0
        assert running.process.stdout.read().strip().endswith("stopped")


def test_it_asks_for_its_key(server):
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").chat.completions.create(model="tiny", messages=said("a"))


def test_it_tells_what_it_serves_and_the_line_it_tells_runs(server):
    assert "serving tiny at http://127.0.0.1:" in server.told
    assert "161,120" in server.told
    line = server.told[server.told.index("  curl") :].replace("curl", "curl -s", 1)
    line = line.replace("Bearer KEY", f"Bearer {KEY}")
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(answer)["usage"]["completion_tokens"] > 0


def test_the_page_tells_strangers_no_path(server, folder):
    for path in ("/", "/health", "/metrics"):
        with urllib.request.urlopen(server.url + path, timeout=10) as answer:
            assert str(folder.parent) not in answer.read().decode()


def test_it_says_what_the_generator_says(server, folder):
    """Greedy, with a picture: the same tokens as in process, whole and streamed, from a data: and a file: address."""
    agent = load_agent(folder)
    ask = read_chat({"messages": MIXED})
    prompt = asyncio.run(prompts_of(context=256).chat_prompt(ask, int))
    trajectory = Trajectory("mine", "test")
    trajectory.extend(prompt.ids, trainable=False, images=prompt.images)
    limits = Limits(24, 0.0, stop_ids=agent.vocab.stop_ids)
    (expected,) = Generator(agent.model, agent.vocab).generate([(trajectory, limits)])

    asked = {"model": "tiny", "max_tokens": 24, "temperature": 0, "logprobs": True}
    extra = {"extra_body": {"return_token_ids": True}}
    in_file = image_part((folder.parent / "pictures" / "a.png").as_uri())
    for picture in (image_part(png_url(3)), in_file):
        content = [{"type": "text", "text": "What"}, picture, {"type": "text", "text": "is it?"}]
        answer = server.client().chat.completions.create(messages=said(*content), **asked, **extra)
        (choice,) = answer.choices
        assert choice.token_ids == list(expected.ids)
        assert answer.prompt_token_ids == list(prompt.ids)
        assert [t.logprob for t in choice.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-4)
    chunks = list(server.client().chat.completions.create(messages=MIXED, stream=True, **asked, **extra))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert [index for piece in pieces for index in getattr(piece, "token_ids", None) or ()] == list(expected.ids)
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
    assert len([piece for piece in pieces if piece.delta.content]) > 2, "it comes in pieces"


def test_our_own_client_gets_the_same(server, monkeypatch):
    """Whole and streamed; many at once; a wrong key and a wrong model are refused at once, and not tried again."""
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    config = ServerConfig(server.url + "/v1", "tiny", "KEY_OF_TEST", concurrency=2, attempts=3, logprobs=True)
    limits = Limits(24, 0.8, seed=7, top_k=40)

    async def ask() -> None:
        client = ChatClient(config)
        whole, *others = await asyncio.gather(*(client.ask(MIXED, limits) for _ in range(5)))
        assert whole.text
        for other in others:  # decoded in other company: the last bits of log-probs may differ
            assert (other.text, other.cut, other.tokens) == (whole.text, whole.cut, whole.tokens)
            assert other.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
        assert len(whole.logprobs) == whole.tokens
        deltas = [delta async for delta in client.stream(MIXED, limits)]
        assert (deltas[-1].answer.text, deltas[-1].answer.tokens) == (whole.text, whole.tokens)
        assert "".join(delta.text for delta in deltas) == whole.text
        for wrong in (replace(config, model="other"), replace(config, key_variable="NO_KEY_OF_TEST")):
            with pytest.raises(EndpointRefused):
                await ChatClient(wrong).ask(MIXED, limits)

    asyncio.run(ask())


def test_a_stop_string_ends_it(server):
    asked = {"model": "tiny", "messages": said("Hello"), "max_tokens": 40, "seed": 1}
    whole = server.client().chat.completions.create(**asked)
    text = whole.choices[0].message.content
    stop = next(text[n : n + 2] for n in range(8, len(text)) if "\ufffd" not in text[n : n + 2])
    answer = server.client().chat.completions.create(**asked, stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < whole.usage.completion_tokens
    chunks = server.client().chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content


def test_a_seed_gives_the_same_again(server):
    asked = {"model": "tiny", "messages": said("Hello"), "max_tokens": 20, "seed": 4}
    first, second = (server.client().chat.completions.create(**asked) for _ in range(2))
    other = server.client().chat.completions.create(**asked | {"seed": 5})
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    many = server.client().chat.completions.create(**asked, n=2)
    assert [c.message.content for c in many.choices] == [
        first.choices[0].message.content,
        other.choices[0].message.content,
    ]


def test_a_prompt_that_was_seen_is_found_in_the_cache(server):
    asked = {"model": "tiny", "messages": said("one and the same long prompt, " * 4), "max_tokens": 2}
    server.client().chat.completions.create(**asked)
    again = server.client().chat.completions.create(**asked)
    assert again.usage.prompt_tokens_details.cached_tokens >= 32
    assert server.health()["cache"]["tokens_found"] >= 32


def test_who_leaves_frees_the_cache(server):
    for n in range(6):
        stream = server.client().chat.completions.create(
            model="tiny", messages=said(f"Tell {n}"), max_tokens=200, stream=True, n=2, temperature=1.5
        )
        for _, _ in zip(stream, range(n + 1), strict=False):
            pass
        stream.close()
    until = time.monotonic() + 20
    while (health := server.health())["running"] or health["cache"]["blocks_used"]:
        assert time.monotonic() < until, health
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["{folder}/none"], "none: no such folder"),
        (["{folder}", "--max-image-pixels", "1000000000"], "pictures have 1 to 64000000 pixels"),
        (["{folder}", "--files", "{folder}/none"], "none is no folder"),
        (["{folder}", "--max-context", "1000000"], "raise --cache-tokens"),
        (["{folder}", "--api-key-variable", "NO_SUCH_VARIABLE"], "the environment has no NO_SUCH_VARIABLE"),
        (["{folder}", "--max-sequences", "0"], "--max-sequences must be 1 or more, got 0"),
        (["{folder}", "--max-context", "-1"], "--max-context must be 0 or more, got -1"),
        (["{folder}", "--speculate", "-1"], "--speculate must be 0 or more, got -1"),
        (["{folder}", "--timeout", "0"], "--timeout must be positive, got 0.0"),
        (["{folder}", "--port", "70000"], "--port must be 65535 or less, got 70000"),
        (["{folder}", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1, port 0: "),
        (["{folder}", "--device", "nonsense"], "device nonsense: "),
        (["{folder}/config.yaml"], "config.yaml is a file: name its folder"),
        (["{folder}/.."], "holds no config.json and no config.yaml"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(folder, options, told, capsys):
    from mmagent.serve.__main__ import main

    assert main(["--port", "0", *(option.format(folder=folder) for option in options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1


def test_a_run_is_told_from_its_model(folder, tmp_path, capsys):
    """Both have a config.yaml, and the run is the folder that people named."""
    from mmagent.serve.__main__ import main

    shutil.copytree(folder, tmp_path / "run" / "agent")
    shutil.copy(folder / "config.yaml", tmp_path / "run")
    assert main([str(tmp_path / "run"), "--port", "0"]) == 2
    assert f"run's folder: its model is {tmp_path / 'run' / 'agent'}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_is_read(tmp_path, capsys):
    from mmagent.serve.__main__ import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(tmp_path / "not-looked-at"), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1, port {port}: " in error
    assert "--port 0 takes one that is free" in error


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch, capsys):
    from importlib import util

    from mmagent.serve.__main__ import main

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert main([str(folder)]) == 2
    assert "serving needs uvicorn: pip install 'mmagent[serving]'" in capsys.readouterr().err


def test_help_and_defaults():
    assert parse(["folder"]).host == "127.0.0.1", "this machine alone, unless told otherwise"
    assert not parse(["folder"]).fetch_images
    with pytest.raises(SystemExit):
        parse(["folder", "--nonsense"])


@pytest.mark.slow
def test_an_exported_folder_is_served(tmp_path, folder):
    from mmagent.interop.conversion import convert

    convert(folder, tmp_path / "hub", "hub")
    with command(tmp_path / "hub", "--name", "exported") as server:
        answer = server.client("any").chat.completions.create(model="exported", messages=MIXED, max_tokens=4)
        assert answer.usage.completion_tokens > 0


@pytest.mark.slow
def test_hundreds_of_requests_leave_nothing_behind(folder):
    """With pictures and without, whole and streamed, some left in the middle or at once: memory stays flat, the cache
    is free, and a greedy answer is what it was."""

    def some(server: Command, count: int, seed: int) -> None:
        draw = random.Random(seed)
        client = server.client("any")
        for _ in range(count):
            picture = [image_part(png_url(draw.randrange(40)))] if draw.random() < 0.4 else []
            asked = {
                "model": "tiny", "messages": said({"type": "text", "text": "word " * draw.randrange(1, 20)}, *picture),
                "max_tokens": draw.randrange(1, 40), "n": draw.choice([1, 1, 2]), "seed": draw.randrange(9),
            }  # fmt: skip
            if draw.random() < 0.4:
                client.chat.completions.create(**asked)
                continue
            stream = client.chat.completions.create(**asked, stream=True)
            for _, _ in zip(stream, range(draw.choice([0, 1, 3, 100])), strict=False):
                pass
            stream.close()

    def rush(server: Command, count: int, seed: int) -> int:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: some(server, count, seed + n), range(8)))
        until = time.monotonic() + 30
        while (health := server.health())["running"] or health["cache"]["blocks_used"]:
            assert time.monotonic() < until, health
            time.sleep(0.05)
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    with command(folder, "--max-context", "256", "--max-sequences", "6", "--speculate", "2") as server:
        asked = {"model": "tiny", "messages": MIXED, "max_tokens": 20, "temperature": 0}
        first = server.client("any").chat.completions.create(**asked)
        before = rush(server, 12, 0)
        after = rush(server, 25, 100)
        assert after - before < 40 << 20, (before, after)
        again = server.client("any").chat.completions.create(**asked)
        assert again.choices[0].message.content == first.choices[0].message.content
