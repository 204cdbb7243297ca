"""An exported folder where this library is not: a process that cannot import it, a fresh environment, a server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from mmagent.chat import Image, Message, Text, render, user
from mmagent.generation.generator import Generator
from mmagent.generation.http import ChatClient, HttpPolicy
from mmagent.generation.http_transport import EndpointRefused, ServerConfig
from mmagent.geometry import patchify, visual_tokens
from mmagent.interop.conversion import export_model
from mmagent.trajectories import Limits, Trajectory
from tests.agent_kit import GEOMETRY, tiny_vocab
from tests.interop.hub_kit import tiny_agent

SCRIPT = Path(__file__).with_name("alone.py")
PIXELS = [np.random.default_rng(n).integers(0, 256, (84, 112 + 28 * n, 3), dtype=np.uint8) for n in range(2)]
QUESTION = "What changed from the first <|image|> to the second?"
VOCAB = tiny_vocab()


@pytest.fixture
def exported(tmp_path) -> tuple[Path, list[Path]]:
    export_model(tmp_path / "agent", tiny_agent(), "hub")
    images = [tmp_path / f"{n}.png" for n in range(2)]
    for path, pixels in zip(images, PIXELS, strict=True):
        Picture.fromarray(pixels).save(path)
    return tmp_path / "agent", images


def ours(message: Message, pixels: list[np.ndarray], tokens: int) -> tuple[list[int], list[int]]:
    """Prompt and greedy tokens of our own renderer, geometry and generator."""
    images = [patchify(one, GEOMETRY) for one in pixels]
    counts = [visual_tokens(image.grid, GEOMETRY.merge_size) for image in images]
    trajectory = Trajectory("ours", "toy")
    trajectory.extend(render([message], VOCAB, counts, generate=True).ids, trainable=False, images=images)
    limits = Limits(tokens, 0.0, stop_ids=VOCAB.stop_ids)
    (done,) = Generator(tiny_agent().model, VOCAB).generate([(trajectory, limits)])
    return trajectory.input_ids, list(done.ids)


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    caches = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    return kept | caches | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_alone(python: str, folder: Path, images: list[Path], place: Path) -> None:
    """Run the script there and compare what it says."""
    done = subprocess.run(
        [python, str(SCRIPT), str(folder), *map(str, images)],
        cwd=place, env=environment(place), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    prompt, sampled = ours(user(Image(), QUESTION, Image()), PIXELS, 40)
    assert said["prompt"] == prompt
    assert said["sampled"] == sampled
    assert len(sampled) >= 32
    assert (said["class"], said["hidden"], said["loaded"]) == ("transformers_modules", True, [])
    assert said["tokenizer"] == VOCAB.encode("click(12)")


def test_the_same_tokens_where_this_library_cannot_be_imported(exported, tmp_path):
    run_alone(sys.executable, *exported, tmp_path)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_the_same_tokens_in_a_fresh_environment(exported, tmp_path):
    """torch, transformers and Pillow, and nothing else that they do not ask for."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input"]
    pins = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "pillow")}
    torch = f"torch=={pins.pop('torch')}"
    if subprocess.run([*pip, f"{torch}+cpu"], check=False, timeout=1200).returncode:  # not every index has that build
        subprocess.run([*pip, torch], check=True, timeout=1200)
    subprocess.run([*pip, *(f"{name}=={pin}" for name, pin in pins.items())], check=True, timeout=600)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("mmagent", "torchvision", "timm", "accelerate", "omegaconf") if name in listed]
    run_alone(python, *exported, tmp_path)


# ---------------------------------------------------------------------------------------------- transformers serve

SERVE = (
    "import sys\n"
    "for absent in ('mmagent', 'torchvision', 'timm'):\n"
    "    sys.modules[absent] = None\n"
    "from transformers.cli.transformers import main\n"
    "main()\n"
)


@contextmanager
def serving(folder: Path, place: Path) -> Iterator[str]:
    """The address of ``transformers serve`` on ``folder``, in a process group that is ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--trust-remote-code", "--device", "cpu",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    log = place / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            command, cwd=place, env=environment(place), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"not up after two minutes: {log.read_text()[-3000:]}")
        yield address
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(server.pid, sign)
                server.wait(timeout=10)
                break
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        server.wait(timeout=10)


def ask(address: str, folder: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    body = {"model": str(folder), "messages": messages, "max_tokens": 24, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_transformers_serve_says_what_we_say(exported, tmp_path):
    """A chat with an image by data address, whole and streamed; thinking arrives as reasoning."""
    pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install transformers[serving]")
    folder, images = exported
    address = f"data:image/png;base64,{base64.b64encode(images[0].read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    message = Message("user", (Image(), Text(QUESTION)))
    prompt, sampled = ours(message, PIXELS[:1], 24)
    with serving(folder, tmp_path) as server:
        whole = json.loads(ask(server, folder, messages))
        assert whole["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": 24,
            "total_tokens": len(prompt) + 24,
        }
        (choice,) = whole["choices"]
        assert choice["message"]["content"] == VOCAB.decode(sampled).strip()
        stream = [
            line[6:] for line in ask(server, folder, messages, stream=True).splitlines() if line.startswith("data")
        ]
        deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in stream]
        assert len(deltas) > 4
        half = "\N{REPLACEMENT CHARACTER}"  # a stream holds back what may be the first bytes of a letter
        assert "".join(deltas).strip().rstrip(half) == VOCAB.decode(sampled).strip().rstrip(half)
        thought = json.loads(ask(server, folder, messages, chat_template_kwargs={"enable_thinking": True}))
        assert "reasoning_content" in thought["choices"][0]["message"]
        clients_say(f"{server}/v1", folder, messages, VOCAB.decode(sampled).strip(), len(prompt))


def clients_say(url: str, folder: Path, messages: list[dict[str, Any]], said: str, prompt_tokens: int) -> None:
    """The chat client and the policy over it: whole, streamed, many at a time; and what is wrong is refused."""
    client = ChatClient(ServerConfig(url, str(folder), logprobs=True))  # which this server passes over
    limits = Limits(24, temperature=0.0)

    async def ask_all() -> None:
        answer = await client.ask(messages, limits)
        assert (answer.text, answer.cut, answer.logprobs) == (said, True, ())
        assert (answer.prompt_tokens, answer.tokens) == (prompt_tokens, 24)
        async with aclosing(client.stream(messages, limits)) as stream:
            deltas = [delta async for delta in stream]
        assert len(deltas) > 4
        assert "".join(delta.text for delta in deltas) == deltas[-1].answer.text
        half = "\N{REPLACEMENT CHARACTER}"
        assert deltas[-1].answer.text.strip().rstrip(half) == said.rstrip(half)
        assert (deltas[-1].answer.cut, deltas[-1].answer.tokens) == (True, 24)
        for other in await asyncio.gather(*(client.ask(messages, limits) for _ in range(4))):
            assert other == answer
        row = Trajectory("chat", "toy")
        images = [patchify(PIXELS[0], GEOMETRY)]
        counts = [visual_tokens(image.grid, GEOMETRY.merge_size) for image in images]
        message = Message("user", (Image(), Text(QUESTION)))
        row.extend(render([message], VOCAB, counts, generate=True).ids, trainable=False, images=images)
        done = await HttpPolicy(client, VOCAB, GEOMETRY).complete(row, limits)
        assert (VOCAB.decode(done.ids), done.stopped) == (said, False)
        wrong = ChatClient(ServerConfig(url, "another", attempts=3))
        with pytest.raises(EndpointRefused, match="400"):
            await wrong.ask(messages, limits)

    asyncio.run(ask_all())
