"""The command line of the server, as a dataclass and its parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmagent.generation.health import Action

DESCRIPTION = """Serve a checkpoint behind an OpenAI-compatible API.

  python -m mmagent.serve runs/quickstart/rl/agent
  python -m mmagent.serve exported --port 0 --files pictures/ --api-key-variable MY_KEY

CHECKPOINT is a folder: one that training left (config.yaml, model.safetensors, tokenizer.json), or one that
tools/convert.py exported or takes. Whoever can reach the port can ask, so it listens on this machine alone unless told
otherwise; --api-key-variable asks for a key.

  POST /v1/chat/completions   messages with pictures, tools, streaming
  POST /v1/completions        a text or token ids to be continued
  POST /generate              token ids in and out, as SGLang has it
  POST /update_weights_from_disk   a version out of --updates, and no other
  GET  /v1/models, /health, /metrics (Prometheus) and / (a page for people)"""


@dataclass(frozen=True)
class Options:
    """What ``python -m mmagent.serve`` is told; its ``--help`` says what each is."""

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    dtype: str = ""
    device: str = ""
    max_context: int = 0
    max_sequences: int = 32
    cache_tokens: int = 1 << 18
    max_waiting: int = 128
    max_image_pixels: int = 25_000_000
    max_body: int = 32 << 20
    files: Path | None = None
    fetch_images: bool = False
    api_key_variable: str = ""
    timeout: float = 600.0
    grace: float = 30.0
    speculate: int = 0
    watchdogs: str = "none"
    updates: Path | None = None
    steady: bool = False
    record_routing: bool = False
    trust_code: bool = False

    def __post_init__(self) -> None:
        least = dict.fromkeys(("max_sequences", "cache_tokens", "max_image_pixels", "max_body"), 1)
        least |= dict.fromkeys(("max_context", "max_waiting", "grace", "speculate", "port"), 0)
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"--{name.replace('_', '-')} must be {low} or more, got {value}")
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be positive, got {self.timeout}")
        if self.port > 65535:
            raise ValueError(f"--port must be 65535 or less, got {self.port}")


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options of a command line. Ends the program as argparse does; raises ``ValueError`` for a limit that is none."""
    usual = Options(Path())
    parser = argparse.ArgumentParser(
        "python -m mmagent.serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the folder of the model")

    def add(group: argparse._ArgumentGroup, name: str, kind: type, metavar: str, text: str) -> None:
        default = getattr(usual, name.replace("-", "_"))
        shown = f" (default: {default})" if default not in (None, "", 0) else ""
        group.add_argument(f"--{name}", type=kind, metavar=metavar, default=default, help=text + shown)

    where = parser.add_argument_group("where it listens")
    add(where, "host", str, "ADDRESS", "0.0.0.0 for every network of this machine")
    add(where, "port", int, "N", "0 picks a free one and prints it")
    add(where, "api-key-variable", str, "NAME", "environment variable of the key that requests must bring")
    model = parser.add_argument_group("the model")
    add(model, "name", str, "NAME", "what requests call it (default: the folder's name)")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="", help="default: bfloat16 on a GPU")
    add(model, "device", str, "DEVICE", "default: cuda if there is one, else cpu")
    add(model, "speculate", int, "N", "tokens at most that the model's MTP head drafts at a time (default: none)")
    model.add_argument(
        "--watchdogs", choices=tuple(Action), default=usual.watchdogs, type=str,
        help="what becomes of an answer that goes round in circles or is garbled: none counts it, abort ends it with "
        "an error, retry samples it once more, unless it is streamed (default: none)",
    )  # fmt: skip
    model.add_argument("--trust-code", action="store_true", help="import the encoder of its own that CHECKPOINT names")
    training = parser.add_argument_group("for who trains on what it samples")
    add(training, "updates", Path, "FOLDER", "versions of the weights in it are taken when asked for; without it none")
    training.add_argument(
        "--steady", action="store_true", help="a request gets the same to the last bit in any company (CPU; slower)"
    )
    training.add_argument(
        "--record-routing", action="store_true", help="/generate tells the experts of sampled tokens where it is asked"
    )
    limits = parser.add_argument_group("limits")
    add(limits, "max-context", int, "TOKENS", "of a prompt and its answer (default: the model's own, else 8192)")
    add(limits, "max-sequences", int, "N", "completions sampled at a time")
    add(limits, "cache-tokens", int, "N", "places of the key-value cache, which grows up to them")
    add(limits, "max-waiting", int, "N", "completions that may wait in line; those beyond are told to come again (429)")
    add(limits, "max-image-pixels", int, "N", "larger pictures are refused by their header")
    add(limits, "max-body", int, "BYTES", "of a request")
    add(limits, "timeout", float, "SECONDS", "for a request as a whole")
    add(limits, "grace", float, "SECONDS", "that what runs has to end at SIGTERM")
    pictures = parser.add_argument_group("pictures that are not in the request")
    add(pictures, "files", Path, "FOLDER", "file: addresses inside it are read; without it none")
    pictures.add_argument(
        "--fetch-images", action="store_true", help="fetch http: and https: addresses, public ones alone"
    )
    return Options(**vars(parser.parse_args(argv)))
