"""Synthetic pages: a seed is a page, what is read from it is there, and words single out what they mean."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest

from mmagent.browser import run_sync
from mmagent.worlds.elements import collector
from mmagent.worlds.languages import NAMES, language
from mmagent.worlds.pages import LEVELS, TEMPLATES, Scene, fonts, generate, render
from mmagent.worlds.pages.kit import Kit
from mmagent.worlds.pages.themes import contrast, luminance
from mmagent.worlds.questions import targets
from mmagent.worlds.seeds import SPLITS, seed_for
from mmagent.worlds.words import Words

SIZE = (320, 240)


def scenes(pool, sources, **options) -> list[Scene]:
    async def run():
        async with pool.page(*SIZE, hide_scrollbars=True) as page:
            return [await render(page, s.html, s.width, s.height, **options) for s in sources]

    return run_sync(run())


@pytest.fixture(scope="module")
def rendered(browser_pool) -> dict[tuple[str, int], Scene]:
    """Every template at the lowest, the middle and the highest difficulty."""
    sources = [generate(7, *SIZE, level, name) for name in TEMPLATES for level in (1, 3, LEVELS)]
    keys = [(source.template, source.difficulty) for source in sources]
    return dict(zip(keys, scenes(browser_pool, sources, trusted=True), strict=True))


def test_a_seed_is_a_page_and_seeds_differ():
    pages = {generate(seed, *SIZE).html for seed in range(200)}
    assert len(pages) == 200
    assert generate(5, *SIZE) == generate(5, *SIZE)
    assert {generate(seed, *SIZE).template for seed in range(600)} == set(TEMPLATES)


def test_no_page_belongs_to_two_splits():
    pages = {split: {generate(seed_for(split, n), *SIZE).html for n in range(100)} for split in SPLITS}
    assert sum(map(len, pages.values())) == len(set.union(*pages.values()))


def test_difficulty_is_graded():
    def mean(level: int, measure) -> float:
        return float(np.mean([measure(generate(seed, 640, 480, level).html) for seed in range(150)]))

    def elements(html: str) -> int:
        return len(re.findall(r"<(button|input|a|td|li|label|select)\b", html))

    counts = [mean(level, elements) for level in range(1, LEVELS + 1)]
    assert all(later > 0.9 * earlier for earlier, later in itertools.pairwise(counts))
    assert counts[-1] > 2 * counts[0]
    dark = [np.mean([Kit(seed, 320, 240, level).theme.dark for seed in range(200)]) for level in (1, LEVELS)]
    assert dark[0] == 0
    assert 0.2 < dark[1] < 0.6


def test_themes_can_be_read():
    for seed in range(300):
        theme = Kit(seed, 320, 240, 1 + seed % LEVELS).theme
        assert contrast(theme.text, theme.ground) > 6, theme
        assert contrast(theme.muted, theme.ground) > 2.2, theme
        assert contrast(theme.accent, theme.ground) > 2.2, theme
        assert contrast(theme.on_accent, theme.accent) > 2.5, theme


def test_html_is_short_closed_and_self_contained():
    for seed in range(100):
        page = generate(seed, *SIZE, 1 + seed % LEVELS)
        assert len(page.html) < 6000, page.template
        assert "http" not in page.html
        assert "<script" not in page.html
        for tag in ("div", "button", "table", "main", "a", "label", "p"):
            assert len(re.findall(rf"<{tag}\b", page.html)) == page.html.count(f"</{tag}>")


@pytest.mark.parametrize("spoken", NAMES)
def test_every_kind_of_page_speaks_every_language(spoken):
    """Phrases of templates are in every lexicon, and English ones stay out of the pages of others."""
    english = {phrase.casefold() for phrase in language("de").phrases if len(phrase) > 6}
    for n, name in enumerate(TEMPLATES):
        html = generate(n, 480, 360, 1 + n % LEVELS, name, spoken).html
        assert html == generate(n, 480, 360, 1 + n % LEVELS, name, spoken).html
        assert ("lang=" in html) == (spoken != "en")
        if spoken in ("zh", "ja", "ru"):
            texts = {text.strip().casefold() for text in re.findall(r">([^<]+)<", html)}
            assert not texts & english, (name, texts & english)
            wordless = ("code", "drawing", "spreadsheet", "keypad")
            assert name in wordless or set(language(spoken).glyphs()) & set(html), name


def test_lexicons_are_whole():
    known = language("en")
    for spoken in NAMES:
        lexicon = language(spoken)
        assert set(lexicon.lists) == set(known.lists)
        assert set(lexicon.formats) == set(known.formats)
        assert spoken == "en" or set(lexicon.phrases) == set(language("de").phrases)
        assert all(len(words) == len(set(words)) for words in lexicon.lists.values()), spoken
        assert {len(lexicon.lists["months"]), len(lexicon.lists["weekdays"])} == {12, 7}
        least = {"nouns": 45, "adjectives": 20, "verbs": 18, "actions": 45, "fields": 25, "cities": 20, "options": 15}
        assert all(len(lexicon.lists[name]) >= count for name, count in least.items()), spoken
    with pytest.raises(ValueError, match="language 'xx' is none of en, zh"):
        language("xx")


@pytest.mark.browser
def test_languages_without_a_font_are_named_with_their_package(browser_pool, monkeypatch):
    async def run() -> dict[str, str]:
        async with browser_pool.page(100, 100) as page:
            return await fonts.lacking(page, tuple(NAMES))

    assert not {"en", "de", "es", "fr"} & set(run_sync(run()))
    monkeypatch.setattr(fonts.Language, "glyphs", lambda spoken: "\uf8f0é" if spoken.code == "zh" else "é")
    found = run_sync(run())
    assert list(found) == ["zh"]
    assert found["zh"].startswith("Chinese: no font draws '\\uf8f0'; install the Debian package fonts-wqy-zenhei")


def test_wrong_requests_are_refused():
    for wrong, says in (
        ({"difficulty": 6}, "difficulty 6"),
        ({"template": "blog"}, "template 'blog'"),
        ({"width": 50}, "50x240"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(**{"seed": 1, "width": 320, "height": 240, **wrong})


@pytest.mark.browser
def test_what_is_read_lies_on_the_screen(rendered):
    for key, scene in rendered.items():
        assert scene.image.shape == (SIZE[1], SIZE[0], 3)
        assert len(scene.elements) >= 2, key
        assert len(scene.lines) >= 2, key
        for thing in (*scene.elements, *scene.lines):
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= SIZE[0], (key, thing)
            assert 0 <= y1 < y2 <= SIZE[1], (key, thing)
            assert re.fullmatch("#[0-9a-f]{6}", thing.color + "")
        for element in scene.elements:
            assert 0 < element.visible <= 1
            assert element.box[0] <= element.point[0] <= element.box[2], (key, element)
            assert element.box[1] <= element.point[1] <= element.box[3], (key, element)


@pytest.mark.browser
def test_text_lines_hold_ink_of_their_colour(rendered):
    checked = 0
    for key, scene in rendered.items():
        for line in scene.lines:
            x1, y1, x2, y2 = line.box
            region = scene.image[y1:y2, x1:x2].reshape(-1, 3).astype(int)
            ground = np.array([int(line.background[n : n + 2], 16) for n in (1, 3, 5)])
            color = np.array([int(line.color[n : n + 2], 16) for n in (1, 3, 5)])
            if (
                abs(luminance(line.color) - luminance(line.background)) < 0.15
                or line.size < 9
                or "password" in line.text
            ):
                continue
            if key[0] == "dialog":
                continue  # the shade over the page behind changes its colours
            nearest = np.abs(region - color).sum(axis=1).min()
            assert nearest < np.abs(ground - color).sum() * 0.6, (key, line)
            checked += 1
    assert checked > 150


@pytest.mark.browser
def test_points_reach_their_elements_and_covered_ones_are_left_out(browser_pool):
    html = """<!DOCTYPE html><body style="margin:0"><button style="position:absolute;left:10px;top:10px">Under</button>
    <button style="position:absolute;left:10px;top:60px;width:200px">Half</button>
    <div style="position:absolute;left:0;top:0;width:120px;height:100px;background:#123456"></div>
    <button style="opacity:0;position:absolute;top:150px">Unseen</button><button hidden>Gone</button>
    <button style="position:absolute;left:900px;top:5px">Outside</button>
    <a href="#" style="position:absolute;top:180px">link <b>bold</b></a></body>"""

    async def run():
        async with browser_pool.page(*SIZE) as page:
            scene = await render(page, html, *SIZE)
            hits = [
                await page.evaluate("(x, y) => document.elementFromPoint(x, y).textContent", *e.point)
                for e in scene.elements
            ]
            return scene, hits

    scene, hits = run_sync(run())
    assert [e.text for e in scene.elements] == ["Half", "", "link bold", "bold"]
    half, box, link, _ = scene.elements
    assert half.role == "button"
    assert 0.3 < half.visible < 0.8
    assert half.point[0] > 120
    assert (box.role, box.background, box.box) == ("box", "#123456", (0, 0, 120, 100))
    assert link.role == "link"
    assert hits[0] == "Half"
    assert hits[2] in ("link bold", "bold")
    assert [line.text for line in scene.lines] == ["link", "bold"]


@pytest.mark.browser
def test_state_and_names_of_fields(browser_pool):
    html = """<label>Mail <input value="a@b.c"></label><label for=c>News</label><input type=checkbox id=c checked>
    <input placeholder="City" disabled><input type=radio aria-label="One"><label>Age</label><input autofocus>
    <select><option>x</option><option selected>Two</option></select><div role=tab aria-selected=true>Tab</div>"""
    (scene,) = scenes(browser_pool, [type("Page", (), {"html": html, "width": 320, "height": 240})()])
    fields = {(e.role, e.text): e for e in scene.elements}
    assert fields["textbox", "Mail"].value == "a@b.c"
    assert fields["checkbox", "News"].checked is True
    assert fields["textbox", "City"].enabled is False
    assert fields["radio", "One"].checked is False
    assert fields["textbox", "Age"].focused is True
    assert fields["combobox", "Two"].value == "Two"
    assert fields["tab", "Tab"].checked is True


@pytest.mark.browser
def test_a_page_cannot_lie_about_what_is_on_it(browser_pool):
    html = "<button>Real</button><script>document.elementFromPoint = Element.prototype.getClientRects = null</script>"
    (scene,) = scenes(browser_pool, [type("Page", (), {"html": html, "width": 320, "height": 240})()])
    assert [e.text for e in scene.elements] == ["Real"]


@pytest.mark.browser
def test_phrases_mean_one_thing_and_most_pages_offer_several(rendered):
    offered = []
    for scene in rendered.values():
        named = targets(scene.elements)
        assert len({target.phrase for target in named}) == len(named)
        offered.append(len(named))
    assert np.mean(offered) > 5
    assert min(offered) >= 1


@pytest.mark.browser
def test_trusted_and_fresh_rendering_agree_and_repeat(browser_pool):
    sources = [generate(seed, *SIZE, 1 + seed % LEVELS) for seed in range(6)]
    fast, again, fresh = (scenes(browser_pool, sources, trusted=t) for t in (True, True, False))
    for one, two, three in zip(fast, again, fresh, strict=True):
        assert (one.image == two.image).all()
        assert (one.image == three.image).all()
        assert one.elements == two.elements == three.elements
        assert one.lines == three.lines


def test_words_do_not_repeat_until_they_run_out():
    words = Words(random.Random(1))
    assert len(set(words.several(("a", "b", "c"), 3))) == 3
    assert words.fresh(("a", "b", "c")) in "abc"
    assert len(set(words.several(words.title, 50))) == 50


def test_the_collector_is_one_function():
    assert collector().startswith("(selector, most) => {")
    assert collector().endswith("}")
