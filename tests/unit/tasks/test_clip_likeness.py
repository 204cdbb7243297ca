"""Design2Code's fifth score: what CLIP is shown, its numbers against transformers' own route, and what is refused."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.__main__ import main
from evals.suites.coding import design2code
from mmagent.browser import BrowserPool, find_chromium
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.tasks.base import Screens
from mmagent.tasks.design2code import SIZE, Design2CodeTask, GeneratedDesigns

pytest.importorskip("cv2")
from mmagent.tasks import clip_likeness
from mmagent.tasks.clip_likeness import ClipLikeness, masked
from mmagent.tasks.page_blocks import TooMuchWork

BOXES = [(0.25, 0.5, 0.5, 0.25)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP of random weights: both towers, as published folders have them."""
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, "vocab_size": 64, "max_position_embeddings": 8},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    return path


def page(seed: int = 0, height: int = 120, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def test_text_is_painted_over_and_the_page_becomes_a_square():
    plain = np.full((120, 80, 3), (200, 220, 240), np.uint8)
    written = plain.copy()
    written[60:90, 20:60] = 0
    shown = masked(written, BOXES)
    assert shown.size == (80, 80)
    assert abs(np.asarray(shown, int) - (200, 220, 240)).max() < 10  # rounding adds up, from the rim inwards
    assert (np.asarray(masked(written, [])) < 100).any()  # nothing is painted over that is no text


def test_embeddings_are_those_of_the_whole_model_by_its_own_preparation(folder):
    """A resize of 8-bit pixels and a forward in float32, both ways: equal but for rounding, of 1e-6 or so."""
    from transformers import CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    clip, whole = ClipLikeness(folder), CLIPModel.from_pretrained(folder).eval()
    for seed in range(3):
        small = masked(page(seed), BOXES).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.array(small), dtype=torch.float64).permute(2, 0, 1) / 255
        mean, deviation = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
        with torch.inference_mode():
            seen = whole.get_image_features(pixel_values=pixels[None].float()).pooler_output
            expected = torch.nn.functional.normalize(seen, dim=-1)[0]
        torch.testing.assert_close(clip.embed(page(seed), BOXES), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_the_mean_is_of_the_five_published_scores(folder):
    clip = ClipLikeness(folder)

    async def work():
        async with BrowserPool() as pool:
            screens = Screens(pool, *SIZE, 2, scripts=False)
            task = Design2CodeTask(screens, GeneratedDesigns(screens), clip=clip)
            item = next(iter(task.items("test", 3)))
            (gold,) = task.gold(item)
            empty = "<html><body style='background: #345'></body></html>"
            found = [await task.judge(item, html) for html in (gold, empty)]
            reference = await task.reference(item)
            await screens.close()
            return found, reference

    (gold, empty), reference = asyncio.run(work())
    assert set(gold.score.parts) == {"block", "text", "position", "color", "clip"}
    assert gold.score.value == pytest.approx(1.0, abs=1e-6)
    boxes = [block.box for block in reference.blocks]
    cosine = float(clip.embed(empty.seen.image, []) @ clip.embed(reference.image, boxes))
    assert empty.score.parts["clip"] == pytest.approx(cosine, abs=1e-6)
    assert empty.score.value == pytest.approx(
        max(cosine, 0.0) / 5, abs=1e-6
    )  # no block: a fifth of CLIP's, as published


def test_the_weights_are_pinned(folder):
    clip = ClipLikeness(folder)
    judge = design2code(clip=folder).judge
    assert clip.name in judge
    assert clip.size == "ViT/8, 32 wide, 2 layers, 32 pixels to 16 features"
    assert f"not of the published size, by {clip.size}" in judge
    assert "CLIP's likeness, as published" not in judge
    assert "in place of CLIP's" in design2code().judge


def test_only_vit_b_32_is_the_published_model(folder, monkeypatch):
    monkeypatch.setattr(clip_likeness, "PUBLISHED", "ViT/8, 32 wide, 2 layers, 32 pixels to 16 features")
    assert "CLIP's likeness, as published, by ViT/8, 32 wide" in design2code(clip=folder).judge
    from transformers import CLIPConfig

    base = CLIPConfig()  # transformers' defaults are those of openai/clip-vit-base-patch32
    vision = base.vision_config
    sizes = vision.patch_size, vision.hidden_size, vision.num_hidden_layers, vision.image_size, base.projection_dim
    monkeypatch.undo()
    assert tuple(map(int, re.findall(r"\d+", clip_likeness.PUBLISHED))) == sizes


@pytest.mark.parametrize(
    "boxes",
    [[(0.0, 0.0, 1.0, 1.0)], [(0.0, n / 10, 1.0, 0.1) for n in range(10)], [(0.1, 0.1, 0.8, 0.8)] * 4096],
    ids=["one", "many", "upon one another"],
)
def test_too_much_text_is_not_painted_over(boxes):
    """Painting over takes a second or more a million pixels: an answer must not hold an evaluation up for minutes."""
    started = time.process_time()
    with pytest.raises(TooMuchWork, match="pixels"):
        masked(np.zeros((16384, 1920, 3), np.uint8), boxes)
    assert time.process_time() - started < 1.0


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_too_large_an_answer_scores_0_and_too_large_a_reference_is_an_error(folder, monkeypatch):
    clip = ClipLikeness(folder)

    async def work():
        async with BrowserPool() as pool:
            screens = Screens(pool, *SIZE, 2, scripts=False)
            task = Design2CodeTask(screens, GeneratedDesigns(screens), clip=clip)
            item = next(iter(task.items("test", 3)))
            reference = await task.reference(item)
            height, width = reference.image.shape[:2]
            area = sum(block.box[2] * block.box[3] for block in reference.blocks) * height * width
            monkeypatch.setattr(clip_likeness, "MOST_MASKED", int(2 * area))
            written = "<html><body>" + "<p style='font-size:80px'>Words that fill it</p>" * 20 + "</body></html>"
            large = await task.judge(item, written)
            monkeypatch.setattr(clip_likeness, "MOST_MASKED", 10)
            task = Design2CodeTask(screens, GeneratedDesigns(screens), clip=clip)
            with pytest.raises(ValueError, match=f"{item.key}: CLIP cannot be shown the reference: .* at most 10 are"):
                await task.judge(item, written)
            await screens.close()
            return large

    large = asyncio.run(work())
    assert (large.score.value, large.score.parts) == (0.0, {"too_large": 1.0})
    assert large.seen is not None


def test_what_is_no_clip_is_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no config\.json"):
        ClipLikeness(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        ClipLikeness(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for visual_projection"):
        ClipLikeness(tmp_path)
    assert main(["svg_code", "--baseline", "gold", "--clip", str(folder), "--out", str(tmp_path / "out")]) != 0
    assert "only design2code" in capsys.readouterr().err
