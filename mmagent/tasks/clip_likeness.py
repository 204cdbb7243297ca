"""Design2Code's fifth score (Si et al. 2024): the cosine of CLIP's embeddings of two pages whose text is painted over.

As published: boxes of text are inpainted (Telea 2004, radius 3), the page is squeezed into a square of its shorter side
(Lanczos), and CLIP ViT-B/32 sees it at its own size. The weights are a folder in transformers' form
(``openai/clip-vit-base-patch32``); nothing is fetched. Another CLIP works, too, but its scores are not the published
ones: :attr:`ClipLikeness.size` says which one it is, and :attr:`ClipLikeness.published` whether it is theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.tasks.page_blocks import Box, TooMuchWork

RADIUS = 3
"""Pixels around a point that inpainting looks at."""
MOST_MASKED = 4_000_000
"""Pixels that are painted over at most: a million takes a second or three."""
MOST_PAINTED = 4 * MOST_MASKED
"""The same, where boxes lie upon one another, each for itself."""
PUBLISHED = "ViT/32, 768 wide, 12 layers, 224 pixels to 512 features"
"""The size of CLIP ViT-B/32."""
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of pixels from 0 to 1 (Radford et al. 2021)."""


class ClipLikeness:
    """The model in ``folder``, on the CPU in float32. Raises ``ValueError`` naming what the folder lacks, and
    ``ImportError`` where OpenCV, which paints the text over, is not installed."""

    def __init__(self, folder: str | Path):
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; CLIP is wanted in transformers' form, with safetensors")
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise ValueError(f"{path}: no {name}; CLIP is wanted in transformers' form, with safetensors")
        _inpainting()
        ensure_torchvision()
        from transformers import CLIPModel

        model, told = CLIPModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"{path}: no weights for {missing[0]}; is it a CLIP model?")
        self._tower, self._projection = model.eval().vision_model, model.visual_projection
        self.name = _digest(path / "model.safetensors")
        vision = model.config.vision_config
        self.size = (
            f"ViT/{vision.patch_size}, {vision.hidden_size} wide, {vision.num_hidden_layers} layers, "
            f"{vision.image_size} pixels to {model.config.projection_dim} features"
        )
        self.published = self.size == PUBLISHED

    def embed(self, page: np.ndarray, boxes: Sequence[Box]) -> torch.Tensor:
        """``(width,)`` float32 of length 1, of a page ``(height, width, 3)`` uint8 and its boxes of text as shares.
        Takes seconds on a large page, most of them without the interpreter's lock. Raises what :func:`masked` does."""
        size = self._tower.config.image_size
        seen = masked(page, boxes).resize((size, size), Image.Resampling.BICUBIC)
        pixels = (np.asarray(seen, np.float32) / 255.0 - MEAN) / DEVIATION
        batch = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            embedding = self._projection(self._tower(pixel_values=batch).pooler_output)[0]
        return embedding / embedding.norm()


def masked(page: np.ndarray, boxes: Sequence[Box]) -> Image.Image:
    """``page (height, width, 3)`` uint8 as CLIP is shown it: ``boxes`` (left, top, width, height as shares) painted
    over with what is around them, squeezed into a square. Raises :class:`TooMuchWork` for more than
    :data:`MOST_MASKED` pixels to paint over."""
    height, width = page.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    painted = 0
    for left, top, wide, high in boxes:
        x, y = int(left * width), int(top * height)
        part = mask[y : y + int(high * height), x : x + int(wide * width)]
        painted += part.size
        if painted > MOST_PAINTED:
            raise TooMuchWork(f"{len(boxes)} boxes of text of more than {MOST_PAINTED} pixels together")
        part[...] = 255
    if (over := np.count_nonzero(mask)) > MOST_MASKED:
        raise TooMuchWork(f"{over} pixels of text to paint over, at most {MOST_MASKED} are")
    if boxes:
        page = _inpainting()(np.ascontiguousarray(page), mask, RADIUS)
    side = min(height, width)
    return Image.fromarray(page).resize((side, side), Image.Resampling.LANCZOS)


def _inpainting() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("CLIP's likeness of pages paints over their text: pip install -e '.[clip]'") from error
    return lambda page, mask, radius: cv2.inpaint(page, mask, radius, cv2.INPAINT_TELEA)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
