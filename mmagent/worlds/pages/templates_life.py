"""Pages of leisure and of little things: people, music, weather, phones, pictures, posts, maps, drawings."""

from __future__ import annotations

import math

from mmagent.worlds.pages.kit import Kit
from mmagent.worlds.pages.themes import from_hue


def _face(k: Kit, name: str, side: int) -> str:
    """A round portrait: the first letters on a colour."""
    k.rule(".o", "display:inline-flex;align-items:center;justify-content:center;border-radius:50%;color:#fff;flex:none")
    letters = "".join(part[0] for part in name.split()[:2])
    look = f"width:{side}px;height:{side}px;background:{from_hue(k.rng.random(), 0.4, 0.5)};font-size:{side // 2 - 1}px"
    return f'<span class="o" style="{look}">{k.text(letters)}</span>'


def profile(k: Kit) -> str:
    """A person: portrait, name, numbers, tabs, a few words."""
    t, u = k.theme, k.unit
    name = k.words.fresh(k.words.name)
    k.rule("header", f"display:flex;gap:{2 * u}px;align-items:center;padding:{u}px;background:{t.surface}")
    k.rule(".n", f"display:flex;border-bottom:1px solid {t.border}")
    k.rule(".n div", f"padding:{u // 2}px {2 * u}px")
    k.rule(".s", f"color:{t.accent};border-bottom:2px solid {t.accent}")
    k.rule("main", f"padding:0 {u}px")
    k.rule("small", f"color:{t.muted}")
    numbers = " · ".join(f"<b>{k.words.number()}</b> <small>{k.say(what)}</small>" for what in ("Posts", "Followers"))
    tabs = k.words.several(k.words.of("sections"), min(k.count(2, 4), k.width // (8 * k.size)))
    chosen = k.rng.randrange(len(tabs))
    bar = "".join(f'<div role="tab"{" aria-selected=true class=s" if n == chosen else ""}>{k.text(tab)}</div>'
                  for n, tab in enumerate(tabs))  # fmt: skip
    follow = k.button(k.words.say("Follow"), primary=True)
    more = f" {k.button(k.words.say('Message'))}" if k.difficulty > 1 else ""
    side = 4 * k.size
    head = f"<header>{_face(k, name, side)}<div>{k.heading(name)}{numbers}<p>{follow}{more}</p></div></header>"
    posts = "".join(k.paragraph(1) for _ in range(k.rows(9, 2.2, 1, 6)))
    return f'{head}<div class="n">{bar}</div><main>{posts}</main>'


def player(k: Kit) -> str:
    """Music: what plays, how far it is, buttons, and what comes next."""
    t, u = k.theme, k.unit
    k.rule("main", f"padding:{u}px;display:{'flex' if k.width > 280 else 'block'};gap:{2 * u}px")
    k.rule("section", "flex:1;min-width:0")
    k.rule(".l", f"height:6px;border-radius:3px;background:{t.border};margin:{u}px 0")
    k.rule(".l div", f"height:6px;border-radius:3px;background:{t.accent};width:{k.rng.randint(5, 95)}%")
    k.rule(
        "article", f"display:flex;justify-content:space-between;padding:{u // 2}px 0;border-bottom:1px solid {t.border}"
    )
    k.rule("small", f"color:{t.muted}")
    side = min(k.width // 3, k.height // 2)
    length = k.rng.randint(120, 400)
    now = k.rng.randint(0, length)
    k.button("")
    signs = "".join(f'<button title="{name}">{sign}</button> '
                    for sign, name in (("«", "Previous"), ("▶", "Play"), ("»", "Next")))  # fmt: skip
    playing = (
        f"<section>{k.figure(side, side)}<br><small>{k.say('Playing now')}</small>{k.heading(level=3)}"
        f"<div>{k.text(k.words.fresh(k.words.name))}</div>"
        f'<div class="l"><div></div></div><small>{now // 60}:{now % 60:02} / {length // 60}:{length % 60:02}</small>'
        f"<p>{signs}</p></section>"
    )
    queue = "".join(
        f"<article><b>{k.text(k.words.fresh(k.words.title))}</b>"
        f"<small>{k.rng.randint(1, 6)}:{k.rng.randint(0, 59):02}</small></article>"
        for _ in range(k.rows(3, 1.9, 2, 10))
    )
    return f"<main>{playing}<section>{queue}</section></main>"


def weather(k: Kit) -> str:
    """The temperature now and on the days to come."""
    u, hue = k.unit, k.rng.uniform(0.52, 0.62)
    high, low = from_hue(hue, 0.42, 0.6), from_hue(hue, 0.3, 0.6)
    k.rule("body", f"margin:0;background:linear-gradient({high},{low});color:#fff;min-height:{k.height}px")
    k.rule("main", f"padding:{u}px;text-align:center")
    k.rule(".t", f"font-size:{3 * k.size}px")
    count = 7 if k.width > 400 else 4
    k.rule(".g", f"display:grid;grid-template-columns:repeat({count},1fr);gap:{u}px;margin-top:{u}px")
    k.rule(".g div", f"background:{from_hue(hue, 0.26, 0.6)};border-radius:{k.radius}px;padding:{u}px 0")
    now = k.rng.randint(-9, 34)
    signs = ("☀", "☁", "☂", "❄")
    days = "".join(f"<div>{day}<br>{k.rng.choice(signs)}<br>{now + k.rng.randint(-5, 5)}°</div>"
                   for day in k.words.of("weekdays")[:count])  # fmt: skip
    rows = "".join(f"<p>{k.text(k.words.new('columns'))}: {k.words.percent().lstrip('+-')}</p>"
                   for _ in range(k.rows(10, 1.8, 0, 4)))  # fmt: skip
    city = k.text(k.words.fresh(k.words.of("cities")))
    return f'<main><h2>{city}</h2><div class="t">{now}°</div><div class="g">{days}</div>{rows}</main>'


def launcher(k: Kit) -> str:
    """The first screen of a phone: round or square signs with names, a dock, a clock."""
    u = k.unit
    columns = max(3, min(6, k.width // (6 * k.size)))
    side = max(20, min(k.width // columns - 2 * u, k.height // 5))
    ground = f"linear-gradient({from_hue(k.rng.random(), 0.3, 0.4)},{from_hue(k.rng.random(), 0.2, 0.4)})"
    k.rule("body", f"margin:0;background:{ground};color:#fff;min-height:{k.height}px")
    k.rule("header", f"display:flex;justify-content:space-between;padding:2px {u}px")
    k.rule(
        "main", f"display:grid;grid-template-columns:repeat({columns},1fr);gap:{u}px;padding:{u}px;text-align:center"
    )
    k.rule("i", f"display:flex;align-items:center;justify-content:center;margin:auto;width:{side}px;height:{side}px",
           f"border-radius:{k.rng.choice((20, 30, 50))}%;font:normal {side // 2}px sans-serif")  # fmt: skip
    k.rule("a", "color:#fff;text-decoration:none;overflow:hidden;white-space:nowrap")
    signs = "✉☎⚙♫☁✎★♥⌂☀⚑✈☕☾☂♞"
    lines = max(1, int((k.height - 2 * k.size) / (side + 1.6 * k.size + u)))
    count = min(columns * lines, k.count(4, 20), len(signs))
    apps = "".join(
        f'<a href="#"><i style="background:{from_hue(k.rng.random(), 0.5, 0.6)}">{sign}</i>'
        f"{k.text(k.words.new('sections'))}</a>"
        for sign in k.rng.sample(signs, count)
    )
    return f"<header><b>{k.words.time()}</b><span>{k.rng.randint(5, 100)}%</span></header><main>{apps}</main>"


def gallery(k: Kit) -> str:
    """Pictures in a grid, with their names below."""
    u, columns = k.unit, max(2, min(5, k.width // (8 * k.size)))
    wide = (k.width - (columns + 1) * u) // columns
    tall = round(wide * k.rng.choice((0.6, 0.75, 1.0)))
    k.rule("main", f"display:grid;grid-template-columns:repeat({columns},1fr);gap:{u}px;padding:{u}px")
    k.rule("svg", f"display:block;border-radius:{k.radius}px")
    k.rule("span", "overflow:hidden;white-space:nowrap;display:block")
    rows = max(1, min(4, int((k.height - 2.5 * k.size) / (tall + 1.6 * k.size + u))))
    made = "".join(f"<article>{k.figure(wide, tall)}<span>{k.text(k.words.fresh(k.words.thing))}</span></article>"
                   for _ in range(rows * columns))  # fmt: skip
    k.rule("header", f"padding:0 {u}px")
    return f"<header>{k.heading(level=3)}</header><main>{made}</main>"


def feed(k: Kit) -> str:
    """Posts of people, one below the other, with what one can do about them."""
    t, u = k.theme, k.unit
    k.rule("article", f"{k.panel()};margin:{u}px auto;padding:{u}px;max-width:{36 * k.size}px")
    k.rule("header", f"display:flex;gap:{u}px;align-items:center")
    k.rule("small", f"color:{t.muted}")
    k.rule("body", "margin:0")
    posts = []
    for _ in range(k.rows(0, 6.5, 1, 5)):
        name = k.words.fresh(k.words.name)
        picture = k.figure(min(k.width - 6 * u, 30 * k.size), 5 * k.size) if k.height > 400 and k.chance(0.5) else ""
        acts = " ".join(
            f"<button>{k.words.language.say(what)} {k.rng.randint(0, 99)}</button>" for what in ("Like", "Comments")
        )
        k.button("")
        posts.append(
            f"<article><header>{_face(k, name, 2 * k.size)}<div><b>{k.text(name)}</b><br>"
            f"<small>{k.words.date()}</small></div></header>{k.paragraph(k.rng.randint(1, 2))}{picture}{acts}</article>"
        )
    return "".join(posts)


def city_map(k: Kit) -> str:
    """Streets and parks from above, pins with names, a field to search and buttons to come closer."""
    t, u, w, h = k.theme, k.unit, k.width, k.height
    light, dark = ("#eceae4", "#ffffff", "#a9d3e8", "#c7e3c0"), ("#2b3036", "#454c55", "#1f3a4d", "#2d4434")
    land, street, water, park = dark if t.dark else light

    def across() -> str:
        first = f"M{k.rng.randint(0, w)} 0L{k.rng.randint(0, w)} {h}"
        second = f"M0 {k.rng.randint(0, h)}L{w} {k.rng.randint(0, h)}"
        return f'<path d="{first}{second}" stroke="{street}" stroke-width="{k.rng.randint(3, 9)}"/>'

    corner = f'x="{k.rng.randint(0, w // 2)}" y="{k.rng.randint(0, h // 2)}"'
    green = f'<rect {corner} width="{w // 4}" height="{h // 4}" fill="{park}"/>'
    bend = f"M0 {k.rng.randint(h // 2, h)}Q{w // 2} {k.rng.randint(0, h)} {w} {k.rng.randint(h // 2, h)}"
    river = f'<path d="{bend}" fill="none" stroke="{water}" stroke-width="{h // 12}"/>'
    roads = "".join(across() for _ in range(k.count(2, 6)))
    k.rule("body", f"margin:0;overflow:hidden;background:{land}")
    k.rule(
        ".s",
        f"position:absolute;left:{u}px;top:{u}px;display:flex;gap:{u}px;width:{min(w - 5 * k.size, 24 * k.size)}px",
    )
    k.rule(".s .r", "flex:1")
    k.rule(".z", f"position:absolute;right:{u}px;bottom:{u}px;display:grid;gap:2px")
    k.rule(".n", f"position:absolute;background:{t.accent};color:{t.on_accent};padding:1px {u // 2}px",
           f"border-radius:{k.radius}px;white-space:nowrap")  # fmt: skip
    pins = []
    for n in range(k.count(2, 6)):
        x, y = k.rng.randint(u, max(u, w - 11 * k.size)), 4 * k.size + n * (h - 7 * k.size) // 6
        pins.append(f'<div class="n" style="left:{x}px;top:{y}px">{k.text(k.words.new("cities"))}</div>')
    field = f'<div class="s">{k.field(k.words.say("Search"), filled=k.chance(0.3))}</div>'
    closer = f'<div class="z">{k.button("+")}{k.button("–")}</div>'
    plan = f'<svg width="{w}" height="{h}" role="img" aria-label="map">{green}{river}{roads}</svg>'
    return f"{plan}{''.join(pins)}{field}{closer}"


def drawing(k: Kit) -> str:
    """A canvas with figures on it, tools at the side and colours below."""
    t, u = k.theme, k.unit
    side = 3 * k.size
    wide, tall = k.width - side - 3 * u, k.height - 3 * k.size - 3 * u
    k.rule("main", f"display:grid;grid-template-columns:{side}px 1fr;gap:{u}px;padding:{u}px")
    k.rule("svg", f"background:#ffffff;border:1px solid {t.border}")
    k.rule("nav", "display:flex;flex-direction:column;gap:3px")
    k.rule("nav button", "padding:2px 0")
    k.rule("footer", f"display:flex;gap:4px;padding:0 {u}px")
    k.rule("footer div", f"width:{round(1.4 * k.size)}px;height:{round(1.4 * k.size)}px;border:1px solid {t.border}")
    colours = ("#e61414", "#008c1e", "#0a14f5", "#faf01e", "#ffa00a", "#821496", "#8c5028", "#000000")
    tools = "".join(k.icon() for _ in range(max(2, min(k.count(2, 7), tall // (2 * k.size)))))
    shapes, columns = [], max(2, k.count(2, 4))
    for n in range(k.count(2, 8)):
        r = max(6, min(wide // columns, tall // 2) // 2 - k.rng.randint(4, 12))
        x = wide * (n % columns) // columns + wide // columns // 2
        y = tall * (n // columns % 2 * 2 + 1) // 4
        colour = k.rng.choice(colours)
        kind = k.rng.choice(("circle", "rect", "ellipse", "polygon"))
        corners = " ".join(f"{round(x + r * math.sin(a))},{round(y - r * math.cos(a))}" for a in (0, 2.1, 4.2))
        shapes.append(
            {
                "circle": f'<circle cx="{x}" cy="{y}" r="{r}" fill="{colour}"/>',
                "rect": f'<rect x="{x - r}" y="{y - r // 2}" width="{2 * r}" height="{r}" fill="{colour}"/>',
                "ellipse": f'<ellipse cx="{x}" cy="{y}" rx="{r}" ry="{r // 2}" fill="{colour}"/>',
                "polygon": f'<polygon points="{corners}" fill="{colour}"/>',
            }[kind]
        )
    row = "".join(f'<div style="background:{colour}"></div>' for colour in colours)
    canvas = f'<svg width="{wide}" height="{tall}">{"".join(shapes)}</svg>'
    return f"<main><nav>{tools}</nav>{canvas}</main><footer>{row}</footer>"


def quiz(k: Kit) -> str:
    """One question, answers to choose from, how far one has come."""
    t, u = k.theme, k.unit
    total = k.rng.randint(4, 20)
    at = k.rng.randint(1, total)
    k.rule("main", f"padding:{u}px {2 * u}px")
    k.rule(".l", f"height:{u}px;background:{t.border};border-radius:{u}px;margin:{u}px 0")
    k.rule(".l div", f"height:{u}px;background:{t.accent};border-radius:{u}px;width:{100 * at // total}%")
    k.rule("label.o", f"display:block;margin:{u}px 0;padding:{u // 2}px {u}px;border:1px solid {t.border}",
           f"border-radius:{k.radius}px")  # fmt: skip
    answers = [k.words.fresh(k.words.title) for _ in range(k.rows(8, 2.2, 2, 6))]
    chosen = k.rng.randrange(len(answers) + 1)
    boxes = "".join(
        f'<label class="o"><input type="radio" name="g"{" checked" if n == chosen else ""}> {k.text(answer)}</label>'
        for n, answer in enumerate(answers))  # fmt: skip
    ask = k.words.sentence().rstrip(".!。！") + "?"
    head = f"<p>{k.say('Question')} {at} {k.say('of')} {total}</p>"
    go = f"<p>{k.button(k.words.say('Answer'), primary=True)}</p>"
    return f'<main>{head}<div class="l"><div></div></div>{k.heading(ask, level=3)}<form>{boxes}{go}</form></main>'


def manual(k: Kit) -> str:
    """Chapters in a tree at the side, one of them open."""
    t, u = k.theme, k.unit
    k.rule("body", f"display:flex;min-height:{k.height}px")
    k.rule(
        "nav", f"width:{10 * k.size}px;flex:none;padding:{u}px;background:{t.surface};border-right:1px solid {t.border}"
    )
    k.rule("nav ul", f"list-style:none;margin:0;padding-left:{u}px")
    k.rule("nav li", f"margin:{u // 2}px 0")
    k.rule("main", f"flex:1;padding:0 {2 * u}px;min-width:0")
    chapters = []
    for _ in range(k.rows(2, 3.6, 2, 6)):
        inner = "".join(f"<li>{k.link(k.words.fresh(k.words.thing))}</li>" for _ in range(k.rng.randint(0, 2)))
        chapters.append(f"<li>{k.link()}{f'<ul>{inner}</ul>' if inner else ''}</li>")
    side = f"<nav><ul>{''.join(chapters)}</ul></nav>" if k.width >= 280 else ""
    text = "".join(k.paragraph(2) for _ in range(k.rows(6, 4, 1, 5)))
    turn = f"<p>{k.button(k.words.say('Back'))} {k.button(k.words.say('Next'), primary=True)}</p>"
    return f"{side}<main>{k.heading(level=1)}{text}{turn}</main>"


def nothing(k: Kit) -> str:
    """A page that is not there."""
    t, u = k.theme, k.unit
    k.rule("main", f"text-align:center;padding:{k.height // 8}px {2 * u}px")
    k.rule(".b", f"font-size:{4 * k.size}px;color:{t.accent};font-weight:bold")
    search = f"<form>{k.field(k.words.say('Search'), filled=False)}</form>" if k.difficulty > 2 else ""
    k.rule("form", f"margin:{u}px auto;max-width:{20 * k.size}px")
    home = k.button(k.words.say("Go home"), primary=True)
    more = f" {k.link(k.words.say('Need help?'))}" if k.difficulty > 1 else ""
    return (
        f'<main><div class="b">404</div>{k.heading(k.words.say("Page not found"))}{k.paragraph(1, muted=True)}'
        f"{search}<p>{home}{more}</p></main>"
    )


LIFE = (profile, player, weather, launcher, gallery, feed, city_map, drawing, quiz, manual, nothing)
