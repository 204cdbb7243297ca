"""``python -m mmagent.serve CHECKPOINT``; see ``--help``."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence

from mmagent.serve.options import Options, parse

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
    import torch
    import uvicorn

    from mmagent.generation.generator import Generator, GeneratorConfig
    from mmagent.generation.local import LocalPolicy
    from mmagent.serve.app import Service, create_app
    from mmagent.serve.desk import Desk
    from mmagent.serve.fetching import Fetcher
    from mmagent.serve.loading import load
    from mmagent.serve.pictures import Pictures
    from mmagent.serve.policy import Whole
    from mmagent.serve.prompts import Prompts
    from mmagent.serve.status import Served
    from mmagent.serve.wire import Bodies, Connection, Server

    key = _key(options.api_key_variable)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    agent, notes = load(options.checkpoint, device=device, trust_code=options.trust_code)
    for note in notes:
        print(note)
    pictures = Pictures(
        agent.geometry,
        max_pixels=options.max_image_pixels,
        most_bytes=options.max_body,
        files=options.files,
        fetcher=Fetcher(options.max_body) if options.fetch_images else None,
    )
    context = options.max_context or agent.model.config.max_positions or DEFAULT_CONTEXT
    prompts = Prompts(agent.vocab, agent.chat, pictures, context)
    generator = Generator(agent.model, agent.vocab, GeneratorConfig(max_sequences=options.max_sequences, dtype=dtype))
    desk = Desk(Whole(LocalPolicy(generator)), running=options.max_sequences, waiting=options.max_waiting)
    name = options.name or options.checkpoint.resolve().name
    config = uvicorn.Config(
        "", options.host, options.port, http=Connection, ws="none", lifespan="on", log_level="warning",
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=5, timeout_keep_alive=30,
    )  # fmt: skip
    socket = config.bind_socket()
    url = _address(options.host, socket.getsockname()[1])
    parameters = sum(p.numel() for p in agent.model.parameters())
    model_notes = {
        "checkpoint": str(options.checkpoint),
        "parameters": f"{parameters:,}",
        "runs in": f"{dtype} on {device}",
        "thinking": "on" if agent.chat.thinking else "off",
        "context": f"{context:,} tokens",
        "at a time": f"{options.max_sequences} completions, {options.max_waiting} more in line",
        "pictures": _picture_note(options),
    }
    example = _example(url, name, bool(key))
    served = Served(name, model_notes, example)
    bodies = Bodies(options.max_body, _TOGETHER * options.max_body)
    config.app = create_app(Service(served, prompts, desk, bodies, options.timeout, key))

    def ready() -> None:
        told = "".join(f"  {what}: {figure}\n" for what, figure in model_notes.items())
        print(f"serving {name} at {url}\n{told}status: {url}/\nask it:\n{example}", flush=True)

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    Server(config, desk, options.grace, ready).run([socket])
    print("stopped", flush=True)
    return 0


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
    ways += [f"files in {options.files}"] if options.files else []
    ways += ["fetched from public addresses"] if options.fetch_images else []
    return f"{', '.join(ways)}; at most {options.max_image_pixels:,} pixels"


def _example(url: str, name: str, key: bool) -> str:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    quoted = body.replace("'", "'\\''")
    asks = " -H 'Authorization: Bearer KEY'" if key else ""
    return f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{asks} \\\n    -d '{quoted}'"


if __name__ == "__main__":
    sys.exit(main())
