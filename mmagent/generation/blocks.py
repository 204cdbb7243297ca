"""Whose the blocks of the key-value cache are, and what is in them. Numbers only: the tensors are in
:mod:`mmagent.generation.paged`.

A block holds ``block_tokens`` places. It is *owned* by as many sequences as hold a reference to it; it is *known* when
it is full and the key of its content is told, and then later sequences that begin alike find it (:meth:`match`). A
block that nobody owns is free; if it is known it stays to be found, until room is needed: the one longest unused goes
first. A block is never written by anyone while two own it.

The key of a block says all that its keys and values depend on: the ids of its tokens, what the images in it show, and
the key of the block before it (:class:`ChainKeys`). So equal keys mean equal content, whoever computed it.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class OutOfBlocks(RuntimeError):
    """No block is free: somebody has to give some up, or wait."""


class BlockPool:
    """Blocks numbered from 0 to ``blocks``; more may be added (:meth:`grow`). Low numbers are given out first, so that
    what is in use lies together."""

    def __init__(self, blocks: int, block_tokens: int):
        if blocks < 0 or block_tokens < 1:
            raise ValueError(f"a pool of {blocks} blocks of {block_tokens} tokens cannot be")
        self.block_tokens = block_tokens
        self.owners = [0] * blocks
        self._unknown = list(range(blocks))  # free, and nothing to be found in them; a heap
        self._found: OrderedDict[int, None] = OrderedDict()  # free and known, the longest unused first
        self._key: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def free(self) -> int:
        """Blocks that :meth:`take` can give."""
        return len(self._unknown) + len(self._found)

    @property
    def unknown(self) -> int:
        """Those of them in which nothing is to be found."""
        return len(self._unknown)

    @property
    def known(self) -> int:
        """Blocks whose content can be found."""
        return len(self._key)

    def grow(self, blocks: int) -> None:
        """Have ``blocks`` in all."""
        assert blocks >= len(self), "a pool does not shrink"
        for block in range(len(self), blocks):
            heapq.heappush(self._unknown, block)
        self.owners.extend([0] * (blocks - len(self)))

    def take(self, count: int) -> list[int]:
        """``count`` blocks of which the caller is the only owner. Raises :class:`OutOfBlocks`, and gives none then."""
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks are wanted and {self.free} of {len(self)} are free")
        taken = []
        for _ in range(count):
            if self._unknown:
                block = heapq.heappop(self._unknown)
            else:
                block, _ = self._found.popitem(last=False)
                self._forget(block)
            assert not self.owners[block], "a block that is owned was free"
            self.owners[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each of ``blocks``, which are owned already."""
        for block in blocks:
            assert self.owners[block] > 0, "only what is owned can be shared"
            self.owners[block] += 1

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The known blocks of the longest run of ``keys`` from the first on; the caller owns them, too."""
        blocks = []
        for key in keys:
            block = self._block.get(key)
            if block is None:
                break
            if not self.owners[block]:
                del self._found[block]
            self.owners[block] += 1
            blocks.append(block)
        return blocks

    def matching(self, keys: Sequence[bytes]) -> int:
        """How many blocks :meth:`match` would give."""
        count = 0
        for key in keys:
            if key not in self._block:
                break
            count += 1
        return count

    def tell(self, block: int, key: bytes) -> None:
        """``block`` is full and will not be written again; ``key`` says what is in it. Where another block is known by
        that key already, this one stays unknown."""
        assert self.owners[block] > 0, "told of a block that is free"
        assert block not in self._key, "told of a block that is known"
        if key not in self._block:
            self._key[block], self._block[key] = key, block

    def untell(self, blocks: Sequence[int]) -> None:
        """What is in ``blocks``, which are owned, is not found any more."""
        for block in blocks:
            assert self.owners[block] > 0, "only what is owned can be in doubt"
            if block in self._key:
                self._forget(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each of a sequence's ``blocks``. Of those that are free then, the later ones of the
        sequence go sooner: what begins a sequence is of use to more others."""
        for block in reversed(blocks):
            assert self.owners[block] > 0, "a block was given up twice"
            self.owners[block] -= 1
            if self.owners[block]:
                continue
            if block in self._key:
                self._found[block] = None
            else:
                heapq.heappush(self._unknown, block)

    def forget(self) -> None:
        """Nothing can be found any more (the weights changed); who owns blocks keeps them."""
        for block in self._found:
            heapq.heappush(self._unknown, block)
        self._found.clear()
        self._key.clear()
        self._block.clear()

    def clear(self) -> None:
        """Nobody owns anything any more, and nothing can be found."""
        self.owners = [0] * len(self)
        self._unknown = list(range(len(self)))
        self._found.clear()
        self._key.clear()
        self._block.clear()

    def _forget(self, block: int) -> None:
        del self._block[self._key.pop(block)]

    def check(self, owned: Sequence[Sequence[int]]) -> None:
        """Assert that the blocks are accounted for, where ``owned`` has the blocks of every sequence there is."""
        count = [0] * len(self)
        for blocks in owned:
            assert len(set(blocks)) == len(blocks), "a sequence has a block twice"
            for block in blocks:
                count[block] += 1
        assert count == self.owners, "owners are not those that own"
        free = [*self._unknown, *self._found]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {block for block, owners in enumerate(self.owners) if not owners}, "a block leaked"
        assert {key: block for block, key in self._key.items()} == self._block, "keys and blocks disagree"
        assert set(self._found) <= self._key.keys()
        assert not set(self._unknown) & self._key.keys()


class ChainKeys:
    """Keys of a sequence's blocks, one after another as it grows."""

    def __init__(self, block_tokens: int, image_id: int):
        self.block_tokens, self.image_id = block_tokens, image_id
        self.keys: list[bytes] = []

    def extend(self, ids: Sequence[int], images: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """Keys of all full blocks of a sequence of ``ids``, which begins as it did before. ``images``: where in it each
        image's first visual token stands, in order, and the key of what it shows."""
        size = self.block_tokens
        for n in range(len(self.keys), len(ids) // size):
            said = hashlib.blake2b(self.keys[-1] if self.keys else b"", digest_size=16)
            said.update(np.asarray(ids[n * size : (n + 1) * size], dtype=np.int64).tobytes())
            for at, key in images:
                if n * size <= at < (n + 1) * size:
                    said.update(at.to_bytes(8, "little") + key)
            self.keys.append(said.digest())
        return self.keys
