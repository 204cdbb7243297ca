"""Each rule alone: what it refuses, what it lets pass, and that it says why."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageFilter

from data_pipelines.filters import (
    PictureRules,
    TextRules,
    blocked_problem,
    blocklist,
    blur_problem,
    check_languages,
    language,
    language_problem,
    length_problem,
    line_shares,
    repeated_share,
    repetition_problem,
    sharpness,
    shipped,
    size_problem,
    top_share,
)
from mmagent.worlds import images
from tests.unit.test_signatures import screen

PROSE = (
    "The harbour was quiet when the first boats came home. Maria counted seven heavy boxes, wrote the number into her "
    "book, and waited for the engineer who had promised to look at the pump before noon. Nobody knew why it had "
    "stopped again; some blamed the salt, others an old bearing, and a few said nothing at all because they had seen "
    "it fail on every cold morning since the spring. By evening the repair was done, and the town slept well."
)


def test_sizes_are_bounded_by_sides_and_aspect():
    rules = PictureRules(least_side=32, most_side=1000, most_aspect=3.0)
    assert size_problem(100, 250, rules) == size_problem(32, 96, rules) == ""
    assert "shorter side below 32" in size_problem(31, 60, rules)
    assert "longer side above 1000" in size_problem(600, 1001, rules)
    assert "3.1 to 1" in size_problem(100, 310, rules)
    assert size_problem(1, 100_000, PictureRules()) == ""
    for bad in ({"least_side": -1}, {"most_aspect": 0.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PictureRules(**bad)


def test_one_threshold_of_sharpness_serves_pages_drawings_and_photographs():
    """At 0.3 all that is sharp passes but a few photographs, and of what a Gaussian of 2 pixels blurred few do."""
    kinds = {
        "pages": [screen(n) for n in range(15)],
        "drawn": [images.draw_scene(n, "train").image for n in range(15)],
        "photos": [images.crop_photo(n, images.PHOTO_KINDS[n % 2], "train").image for n in range(15)],
    }
    sharp = {kind: [sharpness(picture) for picture in pictures] for kind, pictures in kinds.items()}
    blurred = [sharpness(blur(picture, 2)) for pictures in kinds.values() for picture in pictures]
    assert min(sharp["pages"] + sharp["drawn"]) > 0.5
    assert np.mean([value > 0.3 for value in sharp["photos"]]) > 0.9
    assert np.mean([value is None or value < 0.3 for value in blurred]) > 0.85
    assert blur_problem(blur(screen(0), 3), PictureRules(least_sharpness=0.3)).startswith("sharpness 0.")
    assert blur_problem(screen(0), PictureRules(least_sharpness=0.3)) == ""


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(PILImage.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def test_sharpness_of_a_step_and_of_a_ramp():
    step = np.zeros((40, 40, 3), np.uint8)
    step[:, 20:] = 200
    ramp = np.repeat((np.arange(40, dtype=np.uint8) * 5)[None, :, None], 40, 0).repeat(3, 2)
    assert sharpness(step) == pytest.approx(1.0)
    assert sharpness(ramp) == pytest.approx(0.2, abs=0.01)  # a fifth of the rise over five pixels
    assert sharpness(np.full((40, 40, 3), 7, np.uint8)) is None
    assert sharpness(np.zeros((2, 2, 3), np.uint8)) is None
    assert blur_problem(np.full((40, 40, 3), 7, np.uint8), PictureRules(least_sharpness=0.9)) == ""


def test_lengths_in_characters_and_tokens():
    rules = TextRules(least_characters=3, most_characters=10)
    assert length_problem("four", rules) == ""
    assert length_problem("ab", rules) == "2 characters, fewer than 3"
    assert length_problem("a" * 11, rules) == "11 characters, more than 10"
    counted = TextRules(least_tokens=2, tokenizer="t")
    assert length_problem("one", counted, lambda text: len(text.split())) == "1 tokens, fewer than 2"
    with pytest.raises(ValueError, match="needs a tokenizer"):
        TextRules(most_tokens=5)


def test_languages_are_told_where_they_can_be():
    german = "Das Boot kam am frühen Morgen in den Hafen, und niemand hatte es erwartet."
    assert language(PROSE)[0] == "en"
    assert language(german)[0] == "de"
    assert language("点击提交按钮，然后输入你的姓名，最后保存。")[0] == "zh"
    assert language("OK 12") == ("", 0.0)
    rules = TextRules(languages=["en", "zh"])
    assert language_problem(PROSE, rules) == language_problem("OK 12", rules) == ""
    assert language_problem(german, rules).startswith("language de")
    assert language_problem(german, TextRules()) == ""
    check_languages(rules)
    for unknown in ("english", "EN", "en-US"):
        with pytest.raises(ValueError, match=rf"{unknown}' is not known; there are .* de, .* zh"):
            check_languages(TextRules(languages=["en", unknown]))


def test_blocklists_match_whole_words_and_say_none_of_them(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("# remark\nBad Phrase  # why\n\n", encoding="utf-8")
    rules = TextRules(blocklists=["en", str(own)])
    assert blocked_problem("Scunthorpe, Essex, a class in assessment and shiitake", rules) == ""
    assert blocked_problem("a ＢＡＤ   phrase", rules) == "1 words of a blocklist, more than 0"
    assert blocked_problem("a bad  phrase", TextRules(blocklists=[str(own)], most_blocked=1)) == ""
    assert blocked_problem("你这个王八蛋!", TextRules(blocklists=["zh"]))
    assert blocked_problem("anything", TextRules()) == ""
    assert set(shipped()) == {"en", "zh"}
    with pytest.raises(ValueError, match="'xx' is no file"):
        blocklist("xx")
    own.write_text("# nothing\n", encoding="utf-8")
    blocklist.cache_clear()
    with pytest.raises(ValueError, match="holds no phrase"):
        blocklist(str(own))


def test_shares_of_repetition_by_hand():
    assert line_shares("a\nb\na\na\n\nb") == {
        "lines": 3 / 5,
        "line_characters": 3 / 5,
        "paragraphs": 0.0,
        "paragraph_characters": 0.0,
    }
    assert line_shares("one\n\ntwo\n\none")["paragraphs"] == pytest.approx(1 / 3)
    found = ["a", "bb", "a", "bb", "ccc"]
    assert top_share(found, 2) == pytest.approx(2 * 3 / 9)  # "a bb" twice, of 9 letters
    assert top_share(["a", "b", "c"], 2) == 0.0
    assert repeated_share(found, 2) == pytest.approx(6 / 9)  # words that overlapping runs share count once
    assert repeated_share(["x", "x", "x"], 2) == pytest.approx(1.0)
    assert line_shares("")["lines"] == top_share([], 2) == 0.0


def test_repetition_refuses_what_repeats_and_nothing_short():
    rules = TextRules(repetition=True)
    assert repetition_problem(PROSE, rules) == ""
    assert repetition_problem("buy now " * 5, rules) == ""  # too short to be judged
    assert "lines" in repetition_problem("\n".join(["read more here please"] * 20 + [PROSE]), rules)
    assert "commonest run of 2" in repetition_problem("buy now or never " * 30, rules)
    assert "repeated runs of 5" in repetition_problem(f"{PROSE} And so on. {PROSE}", rules)
    assert repetition_problem("buy now " * 100, TextRules()) == ""


def test_a_phrase_is_a_whole_word_where_words_are_parted(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("анус\npédé\n傻瓜\n", encoding="utf-8")
    assert blocklist(str(path)).hits("Древний манускрипт, Янус, encyclopédédie") == 0
    assert blocklist(str(path)).hits("анус. Pédé! 他是傻瓜吗") == 3
