"""Equal images under different names: those that a test is judged by must not be among those that were fitted."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from data_pipelines.labelled import ImageSet, Subset
from mmagent.records import RecordError

_AT_ONCE = 256  # samples read ahead: an encoded image is small beside a decoded one


def without_copies(train: ImageSet, test: ImageSet, progress: bool = False) -> tuple[ImageSet, int]:
    """``train`` without the images that ``test`` has too, and how many those are.

    Images are equal where their encoded bytes are; a picture that was scaled or encoded anew is another one. Both sets
    are read once and nothing is decoded; samples that cannot be read are nobody's copies. ``progress`` shows bars on
    stderr, which appear after two seconds. Raises ``ValueError`` where nothing is left to fit.
    """
    asked = {found for found in _digests(test, progress) if found is not None}
    kept = [n for n, found in enumerate(_digests(train, progress)) if found not in asked]
    copies = len(train) - len(kept)
    if not kept:
        raise ValueError(f"{train.source} and {test.source} are the same images: nothing is left to fit")
    return (Subset(train, kept, "without images of the test") if copies else train), copies


def _digests(images: ImageSet, progress: bool) -> Iterator[bytes | None]:
    """Of the bytes of every image in order, None for what cannot be read."""

    def digest(index: int) -> bytes | None:
        try:
            return hashlib.blake2b(images[index].data, digest_size=16).digest()
        except RecordError:
            return None  # whoever uses the sample counts it

    bar = tqdm(
        total=len(images), desc=f"{images.source}: looking for copies", unit="image", file=sys.stderr,
        disable=not progress, delay=2.0, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "mmagent-copies") as pool:
        for first in range(0, len(images), _AT_ONCE):
            found = list(pool.map(digest, range(first, min(first + _AT_ONCE, len(images)))))
            yield from found
            bar.update(len(found))
