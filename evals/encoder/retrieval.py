"""Does an image find its text, and a text its image?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.encoder.intervals import share, share_by_image
from evals.statistics import Estimate

_CELLS = 1 << 24


def retrieval(
    images: Tensor, texts: Tensor, owners: Tensor, captions: Sequence[str], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Estimate]:
    """Recall at ``ks``, both ways, of ``images (I, E)`` and ``texts (J, E)`` of unit length; text j, which reads
    ``captions[j]``, belongs to image ``owners[j]``. The protocol of Karpathy and Fei-Fei (arXiv 1412.2306).

    ``image_to_text@k``: share of images one of whose captions is among the k nearest texts. ``text_to_image@k``: share
    of texts one of whose images is among the k nearest. Captions that read alike are one text, which belongs to all
    their images and takes one place among the nearest. What is equally near counts against: towers which say the same
    of everything score 0. Every image needs a caption.
    """
    if not len(images) or texts.shape != (len(captions), images.shape[1]) or owners.shape != (len(captions),):
        raise ValueError(
            f"retrieval: {tuple(images.shape)} images, {tuple(texts.shape)} texts, {len(captions)} captions, "
            f"{tuple(owners.shape)} owners"
        )
    for name, rows in (("image", images), ("text", texts)):
        if not (finite := rows.isfinite().all(dim=1)).all():
            raise ValueError(f"retrieval: the embedding of {name} {int(finite.int().argmin())} is not finite")
    alone = torch.ones(len(images), dtype=torch.bool)
    alone[owners] = False
    if alone.any():
        raise ValueError(f"retrieval: image {int(alone.int().argmax())} has no caption")
    first: dict[str, int] = {}
    for j, caption in enumerate(captions):
        first.setdefault(caption, j)
    number = {caption: n for n, caption in enumerate(first)}
    text = torch.tensor([number[caption] for caption in captions])
    distinct = texts[torch.tensor(list(first.values()))]
    by_image = _ranks(images, distinct, owners, text)
    by_text = _ranks(distinct, images, text, owners)[text]
    out = {f"image_to_text@{k}": share(by_image < k) for k in ks}
    return out | {f"text_to_image@{k}": share_by_image(by_text < k, owners) for k in ks}


def _ranks(asked: Tensor, offered: Tensor, asked_of: Tensor, offered_of: Tensor) -> Tensor:
    """``(A,)``: how many wrong ones of ``offered`` are at least as near as the nearest right one. ``asked_of`` and
    ``offered_of``, both ``(J,)``, are the pairs that belong together."""
    ranks = []
    block = max(_CELLS // len(offered), 1)
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        mine = (asked_of >= start) & (asked_of < start + len(rows))
        right = torch.zeros(len(rows), len(offered), dtype=torch.bool)
        right[asked_of[mine] - start, offered_of[mine]] = True
        similarity = rows @ offered.T
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)
