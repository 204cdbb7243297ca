"""Records for tests: small, seeded, cheap to import."""

from __future__ import annotations

import numpy as np

from mmagent.chat import Image, assistant, user
from mmagent.records import Record, encode_image


def record(n: int, images: int = 1, source: str = "test") -> Record:
    """A question about random pixels, different for every ``n``."""
    pixels = np.random.default_rng(n).integers(0, 256, (8 + n % 5, 12, 3), dtype=np.uint8)
    messages = (user(*[Image()] * images, f"question {n}"), assistant(f"answer {n}"))
    return Record(f"sample-{n:06d}", source, messages, images=(encode_image(pixels),) * images)
