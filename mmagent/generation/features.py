"""What images look like to the language model, kept by their content: an image that comes again, in another turn or
from another client, is not encoded again."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mmagent.generation.dispatch import computes_on
from mmagent.models.agent_model import AgentModel
from mmagent.types import PackedVision, PatchedImage

T = TypeVar("T")


class ImageFeatures:
    """Visual embeddings by :meth:`key`, at most ``most_tokens`` of them beyond those in use; the longest unused go."""

    def __init__(self, model: AgentModel, at_once: int, most_tokens: int):
        self.model, self.at_once, self.most_tokens = model, at_once, most_tokens
        self.merge_size = model.encoder.merge_size
        self.unit = self.merge_size**2
        self._keys: dict[int, tuple[weakref.ref[PatchedImage], bytes]] = {}
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.encoded = 0  # images that went through the encoder

    def key(self, image: PatchedImage) -> bytes:
        """Equal for images of equal pixels and grid. Each object is read once."""
        known = self._keys.get(id(image))
        if known is not None and known[0]() is image:
            return known[1]
        said = hashlib.blake2b(repr((image.grid, image.patches.dtype)).encode(), digest_size=16)
        said.update(memoryview(image.patches.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        number, keys = id(image), self._keys
        self._keys[number] = (weakref.ref(image, lambda _: keys.pop(number, None)), said.digest())
        return self._keys[number][1]

    def tokens(self, image: PatchedImage) -> int:
        """How many visual tokens it is."""
        return image.patches.shape[0] // self.unit

    def encode(self, images: Sequence[PatchedImage]) -> list[Tensor]:
        """``(tokens, D)`` of each image; each content is encoded once, ``at_once`` tokens at a time."""
        keys = [self.key(image) for image in images]
        wanted = dict(zip(keys, images, strict=True))
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        missing = [key for key in wanted if key not in found]
        for part in chunks(missing, lambda key: self.tokens(wanted[key]), self.at_once):
            device = computes_on(self.model.embedding)
            visual = self.model.encode(PackedVision.pack([wanted[key] for key in part]).to(device))
            sizes = [self.tokens(wanted[key]) for key in part]
            # copies: a part that is kept longer than the others would keep all of them
            found.update((key, x.clone()) for key, x in zip(part, visual.split(sizes), strict=True))
            self.encoded += len(part)
        for key in wanted:
            if key in missing and not bool(found[key].isfinite().all()):
                continue  # it makes who asked for it sick, and may be as it should the next time
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        self._shrink()
        return [found[key] for key in keys]

    def _shrink(self) -> None:
        held = sum(tokens.shape[0] for tokens in self._kept.values())
        while held > self.most_tokens and self._kept:
            _, tokens = self._kept.popitem(last=False)
            held -= tokens.shape[0]

    def forget(self) -> None:
        """The weights changed."""
        self._kept.clear()


def chunks(things: Sequence[T], size: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Consecutive runs of things whose sizes add up to at most ``budget``, at least one thing each."""
    run: list[T] = []
    total = 0
    for thing in things:
        if run and total + size(thing) > budget:
            yield run
            run, total = [], 0
        run.append(thing)
        total += size(thing)
    if run:
        yield run
