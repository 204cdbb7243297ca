"""``python -m mmagent.serve CHECKPOINT``; see ``--help``."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmagent.serve.options import Options, parse

if TYPE_CHECKING:
    from mmagent.serve.desk import Desk
    from mmagent.serve.prompts import Prompts

EXTRA = ("fastapi", "uvicorn")
DEFAULT_CONTEXT = 8192
_TOGETHER = 8
"""Bodies of the largest size that may be in memory at once."""
_CONNECTIONS = 2048


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after an orderly end, 2 for what the user can mend."""
    try:
        options = parse(argv)
        _require_extra()
        return serve(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _require_extra() -> None:
    from importlib.util import find_spec

    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise ValueError(f"serving needs {' and '.join(missing)}: pip install 'mmagent[serving]', or -e '.[serving]'")


def serve(options: Options) -> int:
    """Load the model, listen, and return when told to stop. Raises ``ValueError`` and ``OSError`` before it listens."""
    key = _key(options.api_key_variable)
    with _bound(options.host, options.port) as listener:  # before a large model has been read in vain
        _serve(options, listener, key)
    print("stopped", flush=True)
    return 0


def _serve(options: Options, listener: socket.socket, key: str) -> None:
    import uvicorn

    from mmagent.serve.app import Service, create_app
    from mmagent.serve.status import Served
    from mmagent.serve.updating import Updates
    from mmagent.serve.wire import Bodies, Connection, Server

    prompts, desk, notes = _model(options)
    updates = Updates(options.updates, desk.policy) if options.updates else None
    listening = uvicorn.Config(
        "", options.host, options.port, http=Connection, ws="none", lifespan="on", log_level="warning",
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=5, timeout_keep_alive=30,
    )  # fmt: skip
    url = _address(options.host, listener.getsockname()[1])
    name = options.name or options.checkpoint.resolve().name
    served = Served(name, notes, _example(url, name, bool(key)))
    bodies = Bodies(options.max_body, _TOGETHER * options.max_body)
    listening.app = create_app(Service(served, prompts, desk, bodies, options.timeout, key, updates))

    if not key and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"whoever reaches {options.host} may ask: --api-key-variable asks for a key", file=sys.stderr)

    def ready() -> None:
        told = "".join(f"  {what}: {figure}\n" for what, figure in notes.items())
        print(f"serving {name} at {url}\n{told}status: {url}/\nask it:\n{served.example}", flush=True)

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    Server(listening, desk, options.grace, ready).run([listener])


def _bound(host: str, port: int) -> socket.socket:
    """A place that nobody else can take, where nobody is heard yet. Raises ``OSError`` naming it."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        free = "; --port 0 takes one that is free" if error.errno == errno.EADDRINUSE else ""
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}{free}") from error
    return bound


def _model(options: Options) -> tuple[Prompts, Desk, dict[str, str]]:
    """What prepares prompts, who completes them, and lines for people about both."""
    from mmagent.generation.block_decoding import make_generator
    from mmagent.generation.generator import GeneratorConfig
    from mmagent.generation.health import HealthConfig
    from mmagent.generation.local import LocalPolicy
    from mmagent.generation.token_endpoints import UNKNOWN
    from mmagent.ops.devices import chosen_device
    from mmagent.serve.desk import Desk
    from mmagent.serve.fetching import Fetcher
    from mmagent.serve.loading import load
    from mmagent.serve.pictures import Pictures
    from mmagent.serve.prompts import Prompts

    device = chosen_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if options.max_context > options.cache_tokens:
        raise ValueError(
            f"a context of {options.max_context} does not fit a cache of {options.cache_tokens}: raise --cache-tokens"
        )
    agent, found = load(options.checkpoint, device=device, trust_code=options.trust_code)
    for line in found:
        print(line)
    usual = min(agent.model.config.max_positions or DEFAULT_CONTEXT, options.cache_tokens)
    context = options.max_context or usual
    pictures = Pictures(
        agent.geometry,
        max_pixels=options.max_image_pixels,
        most_bytes=options.max_body,
        files=options.files,
        fetcher=Fetcher(options.max_body) if options.fetch_images else None,
    )
    config = GeneratorConfig(
        options.max_sequences, cache_tokens=options.cache_tokens, dtype=dtype, speculate=options.speculate,
        health=HealthConfig(options.watchdogs), steady=options.steady, record_routing=options.record_routing,
    )  # fmt: skip
    generator = make_generator(agent.model, agent.vocab, config)
    policy = LocalPolicy(generator, UNKNOWN if options.updates else 0)
    notes = {
        "folder": options.checkpoint.resolve().name,  # where it lies is nothing for a page that anybody may look at
        "parameters": f"{sum(p.numel() for p in agent.model.parameters()):,}",
        "runs in": f"{dtype} on {device}",
        "thinking": "on" if agent.chat.thinking else "off",
        "context": f"{context:,} tokens",
        "at a time": f"{options.max_sequences} completions, {options.max_waiting} more in line",
        "pictures": _picture_note(options),
        "weights": f"taken from {options.updates.resolve().name}" if options.updates else "as they are",
    }
    desk = Desk(policy, running=options.max_sequences, waiting=options.max_waiting)
    return Prompts(agent.vocab, agent.chat, pictures, context), desk, notes


def _key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"--api-key-variable: the environment has no {variable}, or it is empty")
    return key


def _address(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _picture_note(options: Options) -> str:
    ways = ["in requests"]
    ways += [f"files in {options.files.resolve().name}"] if options.files else []
    ways += ["fetched from public addresses"] if options.fetch_images else []
    return f"{', '.join(ways)}; at most {options.max_image_pixels:,} pixels"


def _example(url: str, name: str, key: bool) -> str:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    quoted = body.replace("'", "'\\''")
    asks = " -H 'Authorization: Bearer KEY'" if key else ""
    return f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{asks} \\\n    -d '{quoted}'"


if __name__ == "__main__":
    sys.exit(main())
