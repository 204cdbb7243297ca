"""Seeded pictures with exact truth: drawn scenes and panels, and crops of the photographs that packages bring.

A scene says what is where in words (its caption: colours, shapes, places), as a class (its main shape), and, pixel by
pixel, as maps of shapes and of materials. Captions never name materials, maps never need words: what a caption
teaches and what dense features must know are different things, as they are for photographs.

Everything is a function of ``(split, seed)`` alone. No two splits share a picture, and no two crops of different splits
a pixel of a photograph; the textures of materials, the widgets and the words are everybody's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmagent.worlds.drawing import COLOURS, LARGEST, article, generator, once, random_size

SHAPES = ("disc", "square", "triangle", "ring", "cross", "diamond", "star", "bar")
MATERIALS = ("plain", "striped", "checked", "dotted", "noisy", "brick", "grass", "gravel")
PLACES = (
    *("top left", "top", "top right", "left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
WIDGETS = ("button", "checkbox", "radio", "field", "slider", "link")

_WORDS = (
    *("ok", "cancel", "send", "open", "save", "next", "back", "menu", "login", "search", "name", "email", "city"),
    *("date", "price", "total", "reply", "share", "delete", "edit", "add", "buy", "cart", "news", "help", "about"),
    *("home", "file", "view", "sort", "filter", "print", "copy", "paste", "undo", "zoom", "play", "stop", "one"),
)
_PHOTOS = {
    "natural": (
        ("skimage", "astronaut.png", "an astronaut in an orange suit before a flag"),
        ("skimage", "chelsea.png", "a tabby cat looking up"),
        ("skimage", "coffee.png", "a cup of coffee on a table"),
        ("skimage", "rocket.jpg", "a rocket on its launch pad"),
        ("skimage", "camera.png", "a man behind a camera on a field"),
        ("skimage", "motorcycle_left.png", "a motorcycle in a garage"),
        ("sklearn", "china.jpg", "a temple with a tiled roof under trees"),
        ("sklearn", "flower.jpg", "a pink flower before dark leaves"),
    ),
    "scientific": (
        ("skimage", "cell.png", "a cell under a microscope"),
        ("skimage", "coins.png", "rows of ancient coins"),
        ("skimage", "hubble_deep_field.jpg", "distant galaxies in a dark sky"),
        ("skimage", "ihc.png", "stained tissue under a microscope"),
        ("skimage", "moon.png", "the surface of the moon"),
        ("skimage", "retina.jpg", "the vessels of a retina"),
        ("skimage", "page.png", "a page of printed text"),
        ("skimage", "text.png", "words written by hand"),
    ),
}
PHOTO_KINDS = tuple(_PHOTOS)
PHOTO_CAPTIONS = tuple(caption for photos in _PHOTOS.values() for *_, caption in photos)


@dataclass(frozen=True)
class Scene:
    """``image (h, w, 3)`` uint8, its ``caption``, of its largest shape the number in :data:`SHAPES`, the number of its
    colour in :data:`COLOURS` and of its place in :data:`PLACES`, and two ``(h, w)`` int64 maps: ``shapes`` (0 for the
    ground, else 1 + shape) and ``materials``."""

    image: np.ndarray
    caption: str
    shape: int
    colour: int
    place: int
    shapes: np.ndarray
    materials: np.ndarray


@dataclass(frozen=True)
class Captioned:
    """``image (h, w, 3)`` uint8 and what it shows, in words."""

    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class _Level:
    """How many shapes, how large (radius over the shorter side), and how many of :data:`MATERIALS` may occur."""

    shapes: tuple[int, int]
    radius: tuple[float, float]
    materials: int


_LEVELS = (_Level((1, 1), (0.22, 0.4), 1), _Level((1, 1), (0.15, 0.3), 8), _Level((1, 3), (0.13, 0.28), 8))
LEVELS = len(_LEVELS)


def draw_scene(seed: int, split: str = "train", size: tuple[int, int] | None = None, level: int | None = None) -> Scene:
    """Coloured shapes of some material on a ground of another. ``size`` is ``(height, width)`` pixels.

    ``level`` 0 shows one large plain shape on a plain ground, 1 one shape of any material, 2 up to three, which may
    hide each other; None draws the level, too.
    """
    random = generator("scene", seed, split)
    drawn = int(random.integers(LEVELS))
    if level is not None and not 0 <= level < LEVELS:
        raise ValueError(f"scenes have levels 0 to {LEVELS - 1}, not {level}")
    rules = _LEVELS[drawn if level is None else level]
    height, width = size or random_size(random)
    names = list(COLOURS)
    tint = int(random.integers(len(names)))
    ground = int(random.integers(rules.materials))
    everywhere = np.ones((height, width), dtype=bool)
    image = _material(MATERIALS[ground], _soften(COLOURS[names[tint]]), everywhere, random).reshape(height, width, 3)
    shapes = np.zeros((height, width), dtype=np.int64)
    materials = np.full((height, width), ground, dtype=np.int64)
    placed: list[tuple[float, int, int, int]] = []
    for _ in range(int(random.integers(rules.shapes[0], rules.shapes[1] + 1))):
        radius = float(random.uniform(*rules.radius)) * min(height, width)
        centre = (float(random.uniform(radius, height - radius)), float(random.uniform(radius, width - radius)))
        shape, colour = int(random.integers(len(SHAPES))), int(random.integers(len(names)))
        colour = (colour + 1) % len(names) if colour == tint else colour
        material = int(random.integers(rules.materials))
        inside = _silhouette(SHAPES[shape], centre, radius, float(random.uniform(-0.5, 0.5)), height, width)
        image[inside] = _material(MATERIALS[material], COLOURS[names[colour]], inside, random)
        shapes[inside], materials[inside] = shape + 1, material
        placed.append((radius, shape, colour, 3 * int(3 * centre[0] / height) + int(3 * centre[1] / width)))
    noise = _noise()[_window(height, width, _noise().shape, random)]
    image = np.clip(image.astype(np.int16) + noise[..., None], 0, 255).astype(np.uint8)
    placed.sort(key=lambda item: -item[0])
    said = ", ".join(f"{article(f'{names[c]} {SHAPES[s]}')} in the {PLACES[p]}" for _, s, c, p in placed)
    _, shape, colour, place = placed[0]
    return Scene(image, f"{said}, on {article(names[tint])} ground", shape, colour, place, shapes, materials)


def draw_panel(seed: int, split: str = "train", size: tuple[int, int] | None = None) -> Captioned:
    """A plain panel with two to five labelled widgets, one below the other: what a page looks like at its simplest."""
    random = generator("panel", seed, split)
    height, width = size or random_size(random)
    shade = int(random.integers(225, 256))
    canvas = Image.new("RGB", (width, height), (shade, shade, min(shade + 5, 255)))
    draw = ImageDraw.Draw(canvas)
    rows = int(random.integers(2, 6))
    said = []
    for row in range(rows):
        widget = WIDGETS[int(random.integers(len(WIDGETS)))]
        word = _WORDS[int(random.integers(len(_WORDS)))]
        top = (row + float(random.uniform(0.1, 0.3))) * height / rows
        left = float(random.uniform(4, width * 0.35))
        said.append(_draw_widget(draw, widget, word, left, top, width, random))
    return Captioned(np.asarray(canvas), "; ".join(said))


def crop_photo(seed: int, kind: str, split: str = "train", size: tuple[int, int] | None = None) -> Captioned:
    """A crop, at a random scale, of one of the photographs of :data:`PHOTO_KINDS` that scikit-image and scikit-learn
    install. The train split sees the left two thirds of every photograph, of the rest validation the upper half and
    test the lower."""
    if kind not in _PHOTOS:
        raise ValueError(f"photo kind {kind!r} is none of {PHOTO_KINDS}")
    random = generator(f"photo-{kind}", seed, split)
    package, name, caption = _PHOTOS[kind][int(random.integers(len(_PHOTOS[kind])))]
    photo = _photo(package, name)
    border, middle = photo.shape[1] * 2 // 3, photo.shape[0] // 2
    rest = photo[:, border:]
    photo = {"train": photo[:, :border], "validation": rest[:middle], "test": rest[middle:]}[split]
    height, width = size or random_size(random)
    largest = min(photo.shape[0] / height, photo.shape[1] / width)
    scale = largest * math.exp(float(random.uniform(math.log(0.35), 0.0)))
    tall, wide = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = int(random.integers(photo.shape[0] - tall + 1)), int(random.integers(photo.shape[1] - wide + 1))
    crop = Image.fromarray(photo[top : top + tall, left : left + wide])
    return Captioned(np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC)), caption)


def _soften(colour: Sequence[int]) -> tuple[int, ...]:
    """Grounds are paler than what stands on them."""
    return tuple(round(0.55 * c + 0.45 * 150) for c in colour)


def _silhouette(
    shape: str, centre: tuple[float, float], radius: float, turn: float, height: int, width: int
) -> np.ndarray:
    """``(height, width)`` bool: the inside of one shape."""
    if shape in ("disc", "ring"):
        outline = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40, endpoint=False)]
    elif shape == "star":
        outline = [
            (
                (1.0 if k % 2 == 0 else 0.42) * math.sin(k * math.pi / 5),
                -(1.0 if k % 2 == 0 else 0.42) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ]
    else:
        outline = {
            "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
            "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
            "diamond": [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)],
            "bar": [(-1.0, -0.32), (1.0, -0.32), (1.0, 0.32), (-1.0, 0.32)],
            "cross": [
                (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
            ],
        }[shape]  # fmt: skip
    cos, sin = math.cos(turn), math.sin(turn)
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)

    def polygon(scale: float, fill: int) -> None:
        points = [
            ((x * cos - y * sin) * scale + centre[1], (x * sin + y * cos) * scale + centre[0]) for x, y in outline
        ]
        draw.polygon(points, fill=fill)

    polygon(radius, 1)
    if shape == "ring":
        polygon(radius * 0.55, 0)
    return np.asarray(canvas)


def _material(name: str, colour: Sequence[int], inside: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """``(n, 3)`` uint8 for the n pixels of ``inside (height, width)``: what they see of a window of the material's
    sheet, between the colour and a darker one."""
    variants = _sheets(name)
    sheet = variants[int(random.integers(len(variants)))]
    window = _window(*inside.shape, sheet.shape, random)
    if name == "plain":
        return np.tile(np.asarray(colour, dtype=np.uint8), (int(inside.sum()), 1))
    shade = 1.0 - 0.55 * sheet[window][inside]
    painted = np.empty((len(shade), 3), dtype=np.uint8)
    for channel, bright in enumerate(np.asarray(colour, dtype=np.float32)):
        np.multiply(shade, bright, out=painted[:, channel], casting="unsafe")
    return painted


def _window(height: int, width: int, shape: Sequence[int], random: np.random.Generator) -> tuple[slice, slice]:
    if height > shape[0] or width > shape[1]:
        raise ValueError(f"pictures are at most {shape[1]}x{shape[0]} pixels, asked for {width}x{height}")
    top, left = int(random.integers(shape[0] - height + 1)), int(random.integers(shape[1] - width + 1))
    return slice(top, top + height), slice(left, left + width)


_SHEET = LARGEST


@once
def _sheets(name: str) -> tuple[np.ndarray, ...]:
    """Variants of one material as ``(512, 512)`` float32 sheets of darkness in [0, 1]."""
    y, x = np.mgrid[0:_SHEET, 0:_SHEET].astype(np.float32)
    random = np.random.default_rng(0)
    if name == "plain":
        return (np.zeros((_SHEET, _SHEET), np.float32),)
    if name in ("brick", "grass", "gravel"):
        photo = _photo("skimage", f"{name}.png")[..., 0].astype(np.float32) / 255.0
        photo = np.clip((photo.mean() - photo) * 2.0 + 0.5, 0.0, 1.0)
        if name == "brick":  # its bricks are as large as a whole picture: bring them to the size of the others
            photo = np.tile(photo[::3, ::3], (4, 4))[:_SHEET, :_SHEET]
        turned = [np.rot90(photo, k) for k in ((0, 2) if name == "brick" else (0, 1, 2, 3))]
        return tuple(np.ascontiguousarray(sheet) for sheet in turned)
    if name == "noisy":
        return (random.random((_SHEET, _SHEET), np.float32),)
    out = []
    for period in (7.0, 9.0, 12.0):
        for angle in np.linspace(0, math.pi, 6, endpoint=False) + 0.1:
            u, v = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
            if name == "striped":
                out.append(((u % period) < period / 2).astype(np.float32))
            elif name == "checked":
                out.append((((u // period) + (v // period)) % 2).astype(np.float32))
            else:
                near = ((u % period) - period / 2) ** 2 + ((v % period) - period / 2) ** 2
                out.append((near < (0.3 * period) ** 2).astype(np.float32))
    return tuple(out)


@once
def _noise() -> np.ndarray:
    return np.random.default_rng(1).normal(0.0, 5.0, (_SHEET, _SHEET)).round().astype(np.int16)


@once
def _photo(package: str, name: str) -> np.ndarray:
    """``(h, w, 3)`` uint8, from the package's own folder: nothing is downloaded."""
    if package == "skimage":
        import skimage

        path = Path(skimage.__file__).parent / "data" / name
    else:
        import sklearn

        path = Path(sklearn.__file__).parent / "datasets" / "images" / name
    if not path.is_file():
        raise ValueError(f"{package} does not bring {name}: {path} is missing")
    return np.asarray(Image.open(path).convert("RGB"))


def _draw_widget(
    draw: ImageDraw.ImageDraw, widget: str, word: str, left: float, top: float, width: int, random: np.random.Generator
) -> str:
    """Draw one widget and say what it is."""
    size = int(random.integers(10, 15))
    font = ImageFont.load_default(size)
    colour = list(COLOURS)[int(random.integers(6))]
    ink, paint = (20, 20, 20), COLOURS[colour]
    length = draw.textlength(word, font=font)
    height = size * 1.5
    right = min(left + length + 14, width - 2)
    if widget == "button":
        draw.rounded_rectangle((left, top, right, top + height), 4, fill=paint)
        draw.text((left + 7, top + 2), word, fill=(255, 255, 255), font=font)
        return article(f"{colour} button {word}")
    if widget == "field":
        draw.rectangle((left, top, width - 6, top + height), fill=(255, 255, 255), outline=(120, 120, 120))
        draw.text((left + 4, top + 2), word, fill=ink, font=font)
        return f"a text field with {word}"
    if widget == "link":
        draw.text((left, top), word, fill=(30, 60, 200), font=font)
        draw.line((left, top + size + 2, left + length, top + size + 2), fill=(30, 60, 200))
        return f"a link {word}"
    if widget == "slider":
        knob = float(random.uniform(left + 6, width - 12))
        draw.line((left, top + 8, width - 6, top + 8), fill=(150, 150, 150), width=3)
        draw.ellipse((knob - 5, top + 3, knob + 5, top + 13), fill=paint)
        return article(f"{colour} slider at {round(10 * (knob - left) / (width - 6 - left))}")
    chosen = bool(random.integers(2))
    box = (left, top, left + size, top + size)
    if widget == "checkbox":
        draw.rectangle(box, fill=(255, 255, 255), outline=(60, 60, 60), width=1)
        if chosen:
            draw.line((left + 2, top + size / 2, left + size / 2, top + size - 3, left + size - 2, top + 2), paint, 2)
    else:
        draw.ellipse(box, fill=(255, 255, 255), outline=(60, 60, 60), width=1)
        if chosen:
            draw.ellipse((left + 3, top + 3, left + size - 3, top + size - 3), fill=paint)
    draw.text((left + size + 4, top - 1), word, fill=ink, font=font)
    return article(f"{'checked' if chosen else 'empty'} {widget} {word}")
