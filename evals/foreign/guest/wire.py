"""The guest's end of the pipe: requests and answers as JSON with raw bytes behind, each led by its length."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping

LENGTHS = struct.Struct(">II")
"""Bytes of JSON, bytes of data behind it."""


def serve(handlers: Mapping[str, Callable[..., tuple[dict, bytes]]], at_end: Callable[[], object]) -> None:
    """Answer requests ``{"op": name, ...}`` by ``handlers[name](...)`` until the pipe closes, then ``at_end()``. What
    an environment raises is an answer, too. SIGTERM ends it as the pipe does, whatever it is at. What else is printed
    goes to the standard error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        while head := sys.stdin.buffer.read(LENGTHS.size):
            size, _ = LENGTHS.unpack(head)
            request = json.loads(sys.stdin.buffer.read(size))
            try:
                told, data = handlers[request.pop("op")](**request)
            except Exception as error:
                traceback.print_exc()
                told, data = {"error": f"{type(error).__name__}: {error}"[:2000]}, b""
            said = json.dumps(told).encode()
            out.write(LENGTHS.pack(len(said), len(data)) + said + data)
            out.flush()
    finally:
        at_end()
