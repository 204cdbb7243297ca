"""The classification of a caption's words from its image alone (SuperClass, arXiv 2411.03313)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmagent import dist
from mmagent.types import Segments


def word_loss(logits: Tensor, text_ids: Tensor, segments: Segments, rarity: Tensor | None = None) -> Tensor:
    """Sum over images of the cross-entropy between ``logits (I, V)`` and the caption's words: ``()``, in float32.

    The target of an image shares its mass over the distinct ids of its caption, the closing end left out: evenly, or
    in proportion to ``rarity (V,)``, all positive (SuperClass, arXiv 2411.03313); an empty caption adds nothing.
    """
    images, words = caption_words(text_ids, segments)
    targets = logits.new_zeros(logits.shape, dtype=torch.float32)
    targets[images, words] = 1.0 if rarity is None else rarity.float()[words]
    total = targets.sum(dim=1, keepdim=True)
    targets = targets / torch.where(total > 0, total, 1.0)
    return -(targets * logits.float().log_softmax(dim=1)).sum()


def caption_words(text_ids: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """``(n,), (n,)``: every inner token's caption and id, repeated ones as often as they stand there. A caption's last
    token, its end, is none."""
    inner = torch.ones_like(text_ids, dtype=torch.bool)
    inner[segments.cu_seqlens[1:].long() - 1] = False
    return segments.ids()[inner], text_ids[inner]


class Rarity(nn.Module):
    """How rare the words of captions are: their inverse document frequency over all captions of all ranks so far.

    The weight of a word that ``f`` of ``n`` captions had is ``log((n + 2) / (f + 1))``: SuperClass's
    ``log(n / (1 + f))`` but for the 2, which keeps all weights positive and, before anything was seen, alike. Counts
    are whole numbers in buffers and join only at the end of a step, so the weights of a step do not depend on how it is
    split, and a checkpoint carries them.
    """

    captions: Tensor
    frequency: Tensor

    def __init__(self, words: int):
        super().__init__()
        self.register_buffer("captions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frequency", torch.zeros(words, dtype=torch.int64))
        self._seen: Tensor | None = None  # of the step so far: captions first, then how many had each word

    def forward(self) -> Tensor:
        """``(V,)`` float32."""
        return torch.log((self.captions + 2).double() / (self.frequency + 1).double()).float()

    @torch.no_grad()
    def count(self, text_ids: Tensor, segments: Segments) -> None:
        """Take in the captions of one micro-batch."""
        if self._seen is None:
            self._seen = self.frequency.new_zeros(1 + len(self.frequency))
        captions, words = caption_words(text_ids, segments)
        had = (captions * len(self.frequency) + words).unique() % len(self.frequency)  # a word counts once a caption
        self._seen[0] += len(segments)
        self._seen[1:] += had.bincount(minlength=len(self.frequency))

    def forget(self) -> None:
        """Drop what was taken in since the last :meth:`end_step`."""
        self._seen = None

    @torch.no_grad()
    def end_step(self) -> None:
        """Add up what all ranks took in since the last call. A collective."""
        seen = self.frequency.new_zeros(1 + len(self.frequency)) if self._seen is None else self._seen
        dist.all_reduce(seen)
        self.captions += seen[0]
        self.frequency += seen[1:]
        self._seen = None
