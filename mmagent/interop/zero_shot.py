"""Classes that are only named: prompt templates, and what the text tower makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.interop.image_text import ImageTextModel

PLAIN = ("{}",)
"""The name alone: for names that are whole captions."""

ENGLISH = (
    "{}.",
    "a picture of {}.",
    "this picture shows {}.",
    "a picture in which {} can be seen.",
    "{}, seen from close by.",
    "{}, seen from far away.",
    "{} in the middle of the picture.",
    "a bright picture of {}.",
    "a dark picture of {}.",
    "a blurred picture of {}.",
    "a tiny picture of {}.",
    "a drawing of {}.",
    "an icon of {}.",
    "a screenshot with {} in it.",
)
"""Whole views, parts, light, quality and media; names bring their own article ("a dog"), or do well without."""

CHINESE = (
    "{}。",
    "一张{}的图片。",
    "图中是{}。",
    "这张图片里可以看到{}。",
    "近处看到的{}。",
    "远处看到的{}。",
    "画面正中的{}。",
    "一张明亮的{}图片。",
    "一张昏暗的{}图片。",
    "一张模糊的{}图片。",
    "一张很小的{}图片。",
    "手绘的{}。",
    "{}的图标。",
    "含有{}的屏幕截图。",
)
"""The same views in Chinese."""


def load_templates(path: Path | str) -> tuple[str, ...]:
    """One template a line, ``{}`` where the name goes; empty lines are left out. Raises ``ValueError`` naming a line
    without ``{}``, or the file where it has no template."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no templates at {path}")
    templates = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip() and "{}" not in line:
            raise ValueError(f"{path}, line {number}: no {{}} in {line.strip()!r}, where the name would go")
        if line.strip():
            templates.append(line.strip())
    if not templates:
        raise ValueError(f"{path} holds no template")
    return tuple(templates)


def class_embeddings(
    model: ImageTextModel, names: Sequence[str | Sequence[str]], templates: Sequence[str] = ENGLISH
) -> Tensor:
    """``(K, E)`` float32 of unit length: for each of K classes the mean, made of unit length, of the embeddings of its
    name in every template (CLIP, arXiv 2103.00020, section 3.1.4). A class may have several names, all of which count.

    Raises ``ValueError`` for no templates, one without ``{}``, or a class without a name.
    """
    if not templates or not names:
        raise ValueError(f"{len(names)} classes and {len(templates)} templates: there is nothing to embed")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}}, where the name would go")
    groups = [[name] if isinstance(name, str) else list(name) for name in names]
    for number, group in enumerate(groups):
        if not group or not all(name.strip() for name in group):
            raise ValueError(f"class {number} has no name, or an empty one: {group}")
    texts = [template.replace("{}", name) for group in groups for name in group for template in templates]
    rows = model.embed_texts(texts).split([len(group) * len(templates) for group in groups])
    return F.normalize(torch.stack([row.mean(dim=0) for row in rows]), dim=-1)
