"""Signatures recognise what was copied, and tell apart what was changed; the search for judged items likewise."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageDraw

from mmagent.contamination import Fingerprint, Judged, Signed, alike
from mmagent.signatures import minhash, normalise, picture_bits, shingles, text_hash, thumbnail, words


def screen(seed: int, changed: bool = False, side: tuple[int, int] = (320, 240)) -> np.ndarray:
    """A drawn page: bars, words and buttons; ``changed`` moves one of them."""
    random = np.random.default_rng(seed)
    image = PILImage.new("RGB", side, tuple(int(c) for c in random.integers(200, 256, 3)))
    draw = ImageDraw.Draw(image)
    for n in range(8):
        x, y = int(random.integers(0, side[0] - 90)), int(random.integers(0, side[1] - 30))
        x += 40 if changed and n == 3 else 0
        draw.rectangle((x, y, x + 80, y + 22), fill=tuple(int(c) for c in random.integers(0, 256, 3)))
        draw.text((x + 4, y + 5), f"word {random.integers(1000)}", fill="white")
    return np.asarray(image)


def copied(pixels: np.ndarray, scale: float, kind: str, quality: int) -> np.ndarray:
    image = PILImage.fromarray(pixels)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return np.asarray(PILImage.open(buffer).convert("RGB"))


def test_words_are_those_of_people_whatever_case_width_and_script():
    assert words("Ｈｅｌｌｏ,  WORLD! don't 3.5") == ["hello", "world", "don", "t", "3", "5"]
    assert words("点击OK按钮") == ["点", "击", "ok", "按", "钮"]
    assert text_hash("A  b\nC") == text_hash("a b c") != text_hash("a bc")
    assert normalise("ﬁne\tÜBER") == "fine über"


@given(st.lists(st.sampled_from(["a", "b", "cc", "d1"]), max_size=30), st.integers(1, 6))
def test_shingles_are_the_runs_of_words(found, n):
    """As many as there are different runs, and equal for equal runs only: the reference is a set of tuples."""
    size = max(min(n, len(found)), 1)
    runs = {tuple(found[k : k + size]) for k in range(len(found) - size + 1)} if found else set()
    assert len(shingles(" ".join(found), n)) == len(runs)
    assert np.array_equal(shingles(" ".join(found).upper(), n), shingles("  ".join(found), n))


def test_shingles_of_few_or_no_words():
    assert len(shingles("", 5)) == 0
    assert len(shingles("?!", 5)) == 1 == len(shingles("two words", 5))
    assert shingles("two words", 5) != shingles("words two", 5)


@given(st.integers(0, 100), st.integers(1, 100), st.integers(0, 100))
def test_minhash_estimates_the_overlap(shared, mine, yours):
    numbers = np.random.default_rng(0).integers(0, 1 << 63, 301, dtype=np.uint64)
    a = np.concatenate([numbers[:shared], numbers[100 : 100 + mine]])
    b = np.concatenate([numbers[:shared], numbers[200 : 200 + yours]])
    found = (minhash(a, 512) == minhash(b, 512)).mean()
    exact = shared / (shared + mine + yours)
    assert abs(found - exact) < 5 * (max(exact * (1 - exact), 0.01) / 512) ** 0.5  # five standard deviations


def test_minhash_of_a_long_text_is_that_of_its_pieces():
    runs = np.random.default_rng(1).integers(0, 1 << 63, 40_000, dtype=np.uint64)
    whole = minhash(runs)
    assert np.array_equal(whole, np.minimum(minhash(runs[:17]), minhash(runs[17:])))


@pytest.mark.parametrize(
    ("scale", "kind", "quality"),
    [(1.0, "JPEG", 75), (1.0, "JPEG", 40), (0.5, "PNG", 0), (1.5, "JPEG", 75), (0.77, "WEBP", 60)],
)
def test_a_copy_of_a_picture_is_found_and_no_other(scale, kind, quality):
    pages = [screen(seed) for seed in range(20)]
    bits = np.array([picture_bits(page) for page in pages])
    thumbs = np.array([thumbnail(page).ravel() for page in pages])
    for n, page in enumerate(pages):
        found = alike(bits, thumbs, Signed.of(copied(page, scale, kind, quality)))
        assert found.tolist() == [k == n for k in range(20)]


def test_a_moved_button_makes_another_picture():
    for seed in range(20):
        one = Signed.of(screen(seed))
        assert not alike(one.bits[None], one.thumb[None], Signed.of(screen(seed, changed=True)))[0]


def test_flat_pictures_are_plain_and_odd_arrays_are_refused():
    assert Signed.of(np.full((5, 7, 3), 200, np.uint8)).plain
    assert not Signed.of(screen(0)).plain
    with pytest.raises(ValueError, match="uint8"):
        thumbnail(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="uint8"):
        picture_bits(np.zeros((0, 4, 3), np.uint8))


# ---------------------------------------------------------------------------------------------- judged items

STORY = (
    "Maria brought the green kettle on Tuesday. Omar painted the small boat on Friday while Lena counted seven "
    "heavy boxes near the harbour. What is it that Omar painted?"
)
RULES = "Answer with the answer alone, without a sentence around it, in the fewest words you can."


def judged() -> Fingerprint:
    items = [Judged("story/1", f"{STORY}\n{RULES}")]
    items += [Judged(f"screen/{n}", f"Click on thing {n}.\n{RULES}", (Signed.of(screen(n)),)) for n in range(6)]
    items += [Judged("plain/1", "Click on the only button.", (Signed.of(np.full((40, 40, 3), 250, np.uint8)),))]
    items += [Judged(f"board/{n}", f"Click on field {n}.", (Signed.of(screen(90)),)) for n in range(5)]
    items += [Judged("sum/1", "What is 34 plus 58?")]
    return Fingerprint(items)


def test_a_planted_item_is_found_through_its_disguises(tmp_path):
    made = judged()
    made.save(tmp_path / "prints.npz")
    for known in (made, Fingerprint.load(tmp_path / "prints.npz"), Fingerprint.joined([Fingerprint(()), made])):
        assert len(known) == 14
        shouted = STORY.upper().replace(" ", "  \n") + " The small boat."
        assert known.find(["Read this.", f"Once. {shouted}"], []).item == "story/1"
        found = known.find(["What stands there?"], [Signed.of(copied(screen(3), 0.6, "JPEG", 60))])
        assert (found.item, found.by) == ("screen/3", "picture")
        assert known.find([f"Click on thing 3.\n{RULES}"], [Signed.of(screen(3))]).by == "both"
        assert known.find(["Click on field 4."], [Signed.of(screen(90))]).item == "board/4"
        assert known.find(["what is 34 PLUS 58", "92"], []).item == "sum/1"
        flat = [Signed.of(np.full((80, 60, 3), 250, np.uint8))]
        assert known.find(["Click on the only button."], flat).item == "plain/1"


def test_what_only_looks_alike_is_left_alone():
    known = judged()
    assert known.find([RULES, "Click on thing 3."], []) is None  # the form of a question, and a short one of a picture
    assert known.find([f"Click on thing 9.\n{RULES}"], [Signed.of(screen(50))]) is None
    assert known.find(["What is 35 plus 58?"], []) is None
    assert known.find(["Anything else."], [Signed.of(np.full((80, 60, 3), 250, np.uint8))]) is None  # plain
    assert known.find(["Click on field 9."], [Signed.of(screen(90))]) is None  # a board that many items show
    half = " ".join(STORY.split()[:14])
    assert known.find([half], []) is None
    assert Fingerprint(()).find([STORY], [Signed.of(screen(1))]) is None


def test_a_file_that_is_no_fingerprint_is_named(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"x\.npz is no fingerprint"):
        Fingerprint.load(tmp_path / "x.npz")
