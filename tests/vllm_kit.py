"""vLLM's OpenAI server as a process of its own, from the environment that ``tools/vllm_environment.sh`` makes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # weights can be loaded
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1",
}  # fmt: skip
START = 900.0
"""Seconds until a server must answer: about 60 on two idle cores."""


def vllm_folder() -> Path:
    """The environment's folder: ``MMAGENT_VLLM``, or ``.vllm`` of the project. Made where a network is said to be there
    (``MMAGENT_TEST_NETWORK=1``); the test is left out where there is neither."""
    folder = Path(os.environ.get("MMAGENT_VLLM", ROOT / ".vllm"))
    if not (folder / ".mmagent-vllm").is_file():
        if os.environ.get("MMAGENT_TEST_NETWORK") != "1":
            pytest.skip(f"no vLLM in {folder}; `bash tools/vllm_environment.sh {folder}` makes it")
        subprocess.run(["bash", str(ROOT / "tools" / "vllm_environment.sh"), str(folder)], check=True)
    return folder


class Server:
    """``post`` a body to a path below the server's address."""

    def __init__(self, url: str):
        self.url = url

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps({"model": "served", **body}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} answered {error.code}: {error.read().decode()[:2000]}") from error

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        values = [
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"vllm:{name}{{", f"vllm:{name} "))
        ]
        assert values, f"no counter {name}"
        return sum(values)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextmanager
def serve(folder: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """A server of the model in ``folder`` in fp32, whose log-probs are those of what it samples from. It and all its
    workers are one process group, which is ended with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(vllm_folder() / "bin" / "vllm"), "serve", str(folder), "--served-model-name", "served",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "8", "--logprobs-mode", "processed_logprobs",
        "--generation-config", "vllm", *options,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT,
        )  # fmt: skip
    server, started = Server(f"http://127.0.0.1:{port}"), time.monotonic()
    try:
        while not server.healthy():
            if process.poll() is not None or time.monotonic() - started > START:
                said = [line for line in log.read_text(errors="replace").splitlines() if "rror" in line]
                raise AssertionError(f"vLLM did not start ({log}):\n" + "\n".join(said[-15:]))
            time.sleep(1)
        yield server
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, first asked and then killed."""
    for how, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.2)
    process.wait(timeout=30)
