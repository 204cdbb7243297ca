"""The truth that is read from a page: what covers what, what holds what, and text in scripts without spaces."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from mmagent.browser import run_sync
from mmagent.worlds.elements import Element
from mmagent.worlds.pages import Scene, render
from mmagent.worlds.questions import candidates, targets

pytestmark = pytest.mark.browser
SIZE = (320, 240)


def shown(pool, html: str, size: tuple[int, int] = SIZE) -> Scene:
    async def run() -> Scene:
        async with pool.page(*size, hide_scrollbars=True) as page:
            return await render(page, html, *size)

    return run_sync(run())


def boxes(scene: Scene) -> dict[str, Element]:
    return {element.background: element for element in scene.elements}


def on_top(scene: Scene, one: Element, other: Element) -> str:
    """The colour of the screen in the middle of what two boxes share."""
    x1, y1 = (max(a, b) for a, b in zip(one.box[:2], other.box[:2], strict=True))
    x2, y2 = (min(a, b) for a, b in zip(one.box[2:], other.box[2:], strict=True))
    red, green, blue = scene.image[(y1 + y2) // 2, (x1 + x2) // 2]
    return f"#{red:02x}{green:02x}{blue:02x}"


ORDERS = {  # rules of two boxes that overlap
    "document order": "",
    "a z-index lifts": "#a{z-index:2} #b{z-index:1}",
    "a negative one sinks": "#b{z-index:-1}",
    "in flow lies below what is positioned": "#b{position:static;margin:0 40px}",
    "half transparent makes one": "#a{position:static;opacity:.99;margin:20px} #b{position:static;margin:-30px}",
    "a transform makes a layer": "#a{position:static;transform:translate(9px)} #b{position:static;margin:-30px 20px}",
    "auto between layers": "#a{z-index:auto} #b{z-index:0}",
    "a float lies over a block": "#a{position:static;float:left} #b{position:static;margin:0 20px}",
}
PLAIN = """<!DOCTYPE html><style>div{position:absolute;width:120px;height:60px;left:20px;top:20px}
#b{left:60px;top:40px}#a{background:#ff0000}#b{background:#0000ff}RULES</style>
<body style="margin:0"><div id=a></div><div id=b></div></body>"""


@pytest.mark.parametrize("how", ORDERS)
def test_the_greater_z_is_drawn_later(browser_pool, how):
    """Two boxes that overlap: the pixels of what they share are of the one with the greater z."""
    scene = shown(browser_pool, PLAIN.replace("RULES", ORDERS[how]))
    first, second = boxes(scene)["#ff0000"], boxes(scene)["#0000ff"]
    above = max(first, second, key=lambda element: element.z)
    assert how not in ("a z-index lifts", "a negative one sinks") or above is first
    seen, expected = (
        np.array(list(bytes.fromhex(c[1:])), int) for c in (on_top(scene, first, second), above.background)
    )
    assert np.abs(seen - expected).max() < 9


def test_layers_within_layers(browser_pool):
    """A child of a low layer stays below a higher one, whatever its own z-index."""
    html = """<!DOCTYPE html><style>div{position:absolute;width:100px;height:60px}</style><body style="margin:0">
    <div style="z-index:1;left:10px;top:10px">
    <div style="z-index:999;background:#ff0000;left:30px;top:10px"></div></div>
    <div style="z-index:2;background:#0000ff;left:60px;top:30px"></div>
    <div style="left:10px;top:100px"><div style="z-index:5;background:#00ff00"></div></div>
    <div style="z-index:4;background:#ff00ff;left:60px;top:120px"></div></body>"""
    found = boxes(shown(browser_pool, html))
    assert found["#ff0000"].z < found["#0000ff"].z  # caught in the layer of its parent
    assert found["#00ff00"].z > found["#ff00ff"].z  # its parent makes no layer: it takes part in the page's


HITS = (
    """points => points.map(([x, y]) => document.elementsFromPoint(x, y).map(el => el.dataset.color).filter(Boolean))"""
)


def pile(random: Random, depth: int = 0) -> str:
    """Boxes in boxes of every way to be placed; the innermost have a colour each."""
    place = random.choice(("static", "static", "relative", "absolute", "fixed", "sticky"))
    style = f"position:{place};left:{random.randint(0, 60)}px;top:{random.randint(0, 60)}px;"
    style += f"width:{random.randint(40, 120)}px;height:{random.randint(30, 90)}px;margin:{random.randint(-30, 10)}px;"
    style += random.choice(("", "", f"z-index:{random.randint(-1, 3)};", "opacity:0.5;", "transform:rotate(0deg);"))
    style += random.choice(("", "", "float:left;", "display:inline-block;", "display:flex;", "isolation:isolate;"))
    if depth == 3 or random.random() < 0.3:
        color = f"#{random.randrange(1 << 24):06x}"
        return f'<div data-color="{color}" style="{style}background:{color}"></div>'
    return f'<div style="{style}">{"".join(pile(random, depth + 1) for _ in range(random.randint(1, 3)))}</div>'


def test_z_is_the_order_in_which_the_browser_finds_things(browser_pool):
    """Random piles: whatever lies at a point, the browser's own stack there names it in the order of z."""

    async def run() -> int:
        compared = 0
        async with browser_pool.page(*SIZE, hide_scrollbars=True) as page:
            for seed in range(60):
                html = "<!DOCTYPE html><body>" + "".join(pile(Random(seed * 9 + n)) for n in range(4))
                scene = await render(page, html, *SIZE, trusted=True)
                heights = {element.background: element.z for element in scene.elements}
                points = [(x + 0.5, y + 0.5) for x in range(0, SIZE[0], 8) for y in range(0, SIZE[1], 8)]
                for stack in await page.evaluate(HITS, points):
                    found = [heights[color] for color in stack if color in heights]
                    assert found == sorted(found, reverse=True), (seed, stack)
                    compared += max(0, len(found) - 1)
        return compared

    assert run_sync(run()) > 1000


def test_what_hides_and_what_only_shades(browser_pool):
    html = """<!DOCTYPE html><style>button,div{position:absolute;width:80px;height:30px;left:10px}
    .over{background:#000}</style><body style="margin:0">
    <button style="top:0">Free</button>
    <button style="top:40px">Veiled</button><div class=over style="top:40px;pointer-events:none"></div>
    <button style="top:80px;width:160px">Shaded</button><div class=over style="top:80px;opacity:0.3"></div>
    <button style="top:120px;width:160px">Half</button><div class=over style="top:120px"></div></body>"""
    found = {e.text: e for e in shown(browser_pool, html).elements if e.role == "button"}
    assert (found["Free"].visible, found["Free"].shown) == (1, 1)
    assert (found["Veiled"].visible, found["Veiled"].shown) == (1, 0)  # clicks pass through what hides it
    assert found["Shaded"].visible < 0.7 < found["Shaded"].shown == 1
    assert found["Half"].visible == found["Half"].shown < 0.7
    named = {target.phrase for target in targets(tuple(found.values()))}
    assert named == {'the button "Free"', 'the button "Shaded"', 'the button "Half"'}


def test_reading_leaves_no_trace(browser_pool):
    async def run() -> int:
        async with browser_pool.page(*SIZE) as page:
            await render(page, "<p style='pointer-events:none'>x</p><button>y</button>", *SIZE)
            return await page.evaluate("document.adoptedStyleSheets.length")

    assert run_sync(run()) == 0


def test_groups_hold_their_members(browser_pool):
    html = """<form><h2>Sign in</h2><input aria-label=Name><button>Go</button></form>
    <table><caption>Prices</caption><tr><td>Tea</td><td>3</td></tr><tr><td>Milk</td><td>1</td></tr></table>
    <article><b>Lamp</b><button>Buy</button></article><button>Alone</button>"""
    scene = shown(browser_pool, html)
    held = {(g.role, g.name): [scene.elements[n].text for n in g.members] for g in scene.groups}
    assert held["form", "Sign in"] == ["Sign in", "Name", "Go"]
    assert held["row", "Milk"] == ["Milk", "1"]
    assert held["table", "Prices"] == ["Prices", "Tea", "3", "Milk", "1"]
    assert held["card", "Lamp"] == ["Lamp", "Buy"]
    assert all("Alone" not in members for members in held.values())


def test_scripts_without_spaces_are_read_line_by_line(browser_pool):
    text = "每个城市都有一座图书馆，里面有3本新书和 2 张 old 地图。"
    wide = shown(browser_pool, f"<p style='margin:0;font-size:14px'>{text}</p>", (640, 100))
    assert [line.text for line in wide.lines] == [text]
    narrow = shown(browser_pool, f"<p style='margin:0;font-size:14px;width:90px'>{text}</p>")
    assert len(narrow.lines) > 3
    assert "".join(line.text for line in narrow.lines).replace(" ", "") == text.replace(" ", "")
    for line, after in itertools.pairwise(narrow.lines):
        assert line.box[1] < after.box[1]
        assert line.box[2] <= 90 + 14  # a full stop may hang over


def test_what_stands_in_fields_is_read_and_what_is_cut_is_counted(browser_pool):
    html = """<body style="margin:0"><input value="Ada" style="width:90px"><input placeholder="City">
    <select><option>Tea</option></select><input type=password value=secret>
    <div style="width:60px;overflow:hidden;white-space:nowrap">a line that is cut</div>
    <div style="position:absolute;top:230px">over the edge</div></body>"""
    scene = shown(browser_pool, html)
    texts = [line.text for line in scene.lines]
    assert texts[:3] == ["Ada", "City", "Tea"]
    assert not {"secret", "over the edge"} & set(texts)
    assert [box[1] for box in scene.unread][-1] == 230
    assert len(scene.unread) >= 2
    for line in scene.lines[:3]:
        x1, y1, x2, y2 = line.box
        assert np.ptp(scene.image[y1:y2, x1:x2].astype(int), axis=(0, 1)).max() > 60, line
        ink = np.where(np.ptp(scene.image[y1:y2, max(0, x1 - 3) : x2 + 3].astype(int), axis=(0, 2)) > 60)[0]
        assert ink.size > 0.5 * (x2 - x1)  # it spans the box
    assert shown(browser_pool, "<p>all of it</p>").unread == ()


CUT = {  # text that is there, and not to be read on the screen
    "an ancestor lets all light through": '<div style="opacity:0"><p><span>WORDS</span></p></div>',
    "an ancestor lets nearly all light through": '<div style="opacity:.2"><p style="opacity:.2">WORDS</p></div>',
    "scrolled out of its box": '<div style="height:30px;overflow-y:scroll"><p>one</p><p>WORDS</p></div>',
    "cut at the side": '<div><a href="#" style="display:block;width:60px;overflow:hidden">WORDS</a></div>',
    "cut in half": '<div style="height:14px;overflow:hidden;font-size:24px;line-height:30px">WORDS</div>',
    "for screen readers": '<span style="position:absolute;width:1px;height:1px;overflow:hidden">WORDS</span>',
}


@pytest.mark.parametrize("how", CUT)
def test_text_that_does_not_show_is_no_line_and_no_name(browser_pool, how):
    words = "Constantinople" if "side" in how else "Words"
    scene = shown(browser_pool, "<!DOCTYPE html><body>" + CUT[how].replace("WORDS", words))
    assert words not in [line.text for line in scene.lines]
    assert not any(words in target.phrase for target in targets(scene.elements))


def test_names_that_are_cut_off_are_known(browser_pool):
    html = """<!DOCTYPE html><style>button{overflow:hidden;white-space:nowrap}</style><body>
    <button style="width:60px">Much longer than that</button><button>Whole</button>
    <select style="width:40px"><option>Constantinople</option></select>
    <input aria-label="Long" style="width:40px" value="Constantinople"><input aria-label="Short" value="Rome">
    <p style="position:absolute;left:290px;white-space:nowrap">over the edge</p>"""
    scene = shown(browser_pool, html)
    assert {e.text: e.cut for e in scene.elements} == {
        "Much longer than that": True, "Whole": False, "Constantinople": True, "Long": True, "Short": False,
        "over the edge": True,
    }  # fmt: skip
    assert {t.phrase for t in targets(scene.elements)} == {
        "the first button", 'the button "Whole"', 'the text field "Long"', 'the text field "Short"'
    }  # fmt: skip
    assert [q.answer for q in candidates(SIZE, scene.elements, ())["state"]] == ["Rome"]


def test_a_password_is_read_as_dots(browser_pool):
    scene = shown(browser_pool, '<!DOCTYPE html><body><input type="password" aria-label="Word" value="secret">')
    assert [e.value for e in scene.elements] == ["••••••"]


def test_what_lies_mostly_beyond_the_border_does_not_count(browser_pool):
    html = """<!DOCTYPE html><style>button{position:absolute;left:10px;width:80px;height:40px}</style><body>
    <button style="top:230px">Below</button><button style="top:210px;left:110px">Half</button>"""
    shares = {e.text: e.visible for e in shown(browser_pool, html).elements}
    assert shares == pytest.approx({"Below": 0.25, "Half": 0.75})


def test_fields_written_from_the_right_are_not_guessed(browser_pool):
    html = '<!DOCTYPE html><body style="margin:0"><input style="width:200px;text-align:right" value="42">'
    scene = shown(browser_pool, html)
    assert scene.lines == ()
    assert len(scene.unread) == 1


UNSEEN = {
    "no colour": "<p style='color:transparent'>ghost</p>",
    "next to none": "<p style='color:rgba(0,0,0,.02)'>ghost</p>",
    "no fill": "<p style='-webkit-text-fill-color:transparent'>ghost</p>",
    "the ground's colour": "<p style='color:#fff'>ghost</p>",
    "the colour of its box": "<p style='background:#246;color:#224466'>ghost</p>",
    "the colour of what holds it": "<div style='background:#246'><p style='color:#246'>ghost</p></div>",
    "a figure's": "<svg width=90 height=30><text y=20 fill=none>ghost</text></svg>",
    "a link's": "<a href=# style='color:#fff'>ghost</a>",
}
SEEN = {
    "on a picture of one's own": "<p style='color:#fff;background-image:linear-gradient(#000,#222)'>plain</p>",
    "on another box": "<div style='position:absolute;width:99px;height:40px;background:#000'></div>"
    "<p style='position:absolute;left:4px;top:0;color:#fff'>plain</p>",
    "by its shadow": "<p style='color:#fff;text-shadow:0 0 3px #000'>plain</p>",
    "by its outline": "<p style='color:transparent;-webkit-text-stroke:1px #000'>plain</p>",
    "cut out of a picture": "<p style='color:transparent;background:linear-gradient(#000,#222);"
    "-webkit-background-clip:text'>plain</p>",
    "half through": "<p style='color:rgba(0,0,0,.5)'>plain</p>",
}


@pytest.mark.parametrize("how", UNSEEN)
def test_text_that_nobody_sees_is_not_on_the_page(browser_pool, how):
    scene = shown(browser_pool, f"<!DOCTYPE html><body style='margin:0'>{UNSEEN[how]}<i>rest</i>")
    assert [line.text for line in scene.lines] == ["rest"]
    assert [element.text for element in scene.elements] == ["rest"]
    assert scene.unread == ()


@pytest.mark.parametrize("how", SEEN)
def test_text_that_is_seen_all_the_same_is_on_the_page(browser_pool, how):
    scene = shown(browser_pool, f"<!DOCTYPE html><body style='margin:0'>{SEEN[how]}")
    assert np.ptp(scene.image.astype(int)) > 40
    assert "plain" in [line.text for line in scene.lines]
    assert "plain" in [element.text for element in scene.elements]


def test_controls_whose_text_nobody_sees_are_there_without_it(browser_pool):
    body = """<button style="color:#fff;background:#fff">ghost</button><button>See <b style="color:transparent">not</b>
    </button><input value="ghost" aria-label="Name" style="color:transparent">"""
    scene = shown(browser_pool, f"<!DOCTYPE html><body>{body}")
    assert [(e.role, e.text, e.value) for e in scene.elements if e.role != "text"] == [
        ("button", "", ""), ("button", "See", ""), ("textbox", "Name", "")
    ]  # fmt: skip
    assert [line.text for line in scene.lines] == ["See"]


SWATCHES = """<!DOCTYPE html><body style="margin:0;background:#fff"><style>div{position:absolute}</style>
<div style="left:10px;top:20px;width:36px;height:24px;background:#ff0000"></div>
<div style="left:101px;top:63px;width:29px;height:31px;background:#0000ff"></div>
<div style="left:180px;top:200px;width:200px;height:99px;background:#00c000"></div>
<p style="position:absolute;left:10px;top:120px;margin:0;font:20px sans-serif;color:#c000c0">Mill</p>"""


@pytest.mark.parametrize("scale", [1.0, 1.25, 1.5, 2.0])
def test_boxes_are_in_the_pixels_of_the_picture_at_any_density(browser_pool, scale):
    """Every colour's pixels are found in the picture, and where they are is the element's box."""

    async def run() -> list[Scene]:
        async with browser_pool.page(*SIZE, hide_scrollbars=True) as page:
            dense = await render(page, SWATCHES, *SIZE, scale=scale)
            assert (page.width, page.height, page.scale) == (*SIZE, scale)
            return [dense, await render(page, SWATCHES, *SIZE)]

    scene, plain = run_sync(run())
    assert scene.size == (round(SIZE[1] * scale), round(SIZE[0] * scale))
    assert plain.size == SIZE[::-1]  # the scale is not left behind
    for element in scene.elements:
        if element.role == "box":
            colour = [int(element.background[n : n + 2], 16) for n in (1, 3, 5)]
            ys, xs = np.nonzero((scene.image == colour).all(-1))
            found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert np.abs(np.subtract(element.box, found)).max() <= 1  # a pixel that is covered in part is of neither
            assert (scene.image[int(element.point[1]), int(element.point[0])] == colour).all()
    (text,) = scene.lines
    x1, y1, x2, y2 = text.box
    ys, xs = np.nonzero((np.abs(scene.image.astype(int) - (0xC0, 0, 0xC0)) < 30).all(-1))
    assert x1 <= xs.min() <= xs.max() < x2
    assert y1 <= ys.min() <= ys.max() < y2
    assert xs.max() - xs.min() > 0.8 * (x2 - x1)
    assert text.size == 20 * scale
