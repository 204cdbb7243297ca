"""Does an image find its text, and a text its image?"""

from __future__ import annotations

from torch import Tensor


def retrieval(images: Tensor, texts: Tensor, k: int = 1) -> dict[str, float]:
    """Share of pairs ``(N, E)``, ``(N, E)`` of unit vectors whose partner is among the ``k`` nearest, both ways.

    Texts that occur twice count as found when any of their equals is.
    """
    similarity = images @ texts.T
    same_text = (texts @ texts.T) > 1 - 1e-5
    found_text = same_text.gather(1, similarity.topk(k, dim=1).indices).any(dim=1)
    found_image = same_text.gather(1, similarity.T.topk(k, dim=1).indices).any(dim=1)
    return {
        f"image_to_text@{k}": float(found_text.float().mean()),
        f"text_to_image@{k}": float(found_image.float().mean()),
    }
