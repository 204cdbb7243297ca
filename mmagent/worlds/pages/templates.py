"""Page templates: each turns a kit into the body of a page that looks like one a person would meet."""

from __future__ import annotations

from collections.abc import Callable

from mmagent.worlds.pages.kit import ICONS, Kit
from mmagent.worlds.pages.templates_life import LIFE
from mmagent.worlds.pages.templates_shop import SHOP
from mmagent.worlds.pages.templates_work import WORK

Template = Callable[[Kit], str]


def login(k: Kit) -> str:
    """A card in the middle: two fields, an option, a button, links."""
    width = min(k.width - 4 * k.unit, 22 * k.size)
    k.rule(
        ".c",
        f"width:{width}px",
        "box-sizing:border-box",
        f"margin:{k.rng.randint(1, 3) * k.unit}px auto",
        f"padding:{k.unit}px {2 * k.unit}px",
        f"{k.panel()}",
    )
    k.rule(".r", f"margin:{k.unit}px 0")
    name = k.words.say(k.rng.choice(("Username", "Email", "Phone", "Account")))
    title = k.rng.choice(("Sign in", "Welcome back", "Member login", "Your account"))
    parts = [k.heading(k.words.say(title))]
    if k.difficulty > 2:
        parts.append(k.paragraph(1, muted=True))
    parts += [k.field(name), k.field(k.words.say("Password"), kind="password")]
    if k.chance(0.7):
        parts.append(k.option(label=k.words.say(k.rng.choice(("Remember me", "Keep me signed in", "Show password")))))
    row = [k.button(k.words.say(k.rng.choice(("Log in", "Continue", "Enter"))), primary=True)]
    if k.difficulty > 1:
        row.append(k.link(k.words.say(k.rng.choice(("Forgot password?", "Need help?")))))
    if k.difficulty > 3:
        row.append(k.link(k.words.say("Create account")))
    return f'<form class="c">{"".join(parts)}<div class="r">{" ".join(row)}</div></form>'


def form(k: Kit) -> str:
    """Labelled fields in one or two columns, options, a choice, and buttons below."""
    columns = min(2, k.columns)
    k.rule("form", f"padding:{k.unit}px {2 * k.unit}px")
    k.rule(".r", f"margin:{k.unit // 2}px 0")
    k.rule(".g", f"display:grid;grid-template-columns:repeat({columns},1fr);gap:0 {2 * k.unit}px")
    fields = k.rows(5, 2.8, 1, 6) * columns
    parts = [k.heading(), f'<div class="g">{"".join(k.field() for _ in range(fields))}</div>']
    if k.difficulty > 1 and k.chance(0.7):
        parts.append(k.option())
    if k.difficulty > 2 and k.chance(0.6):
        choices = k.words.several(k.words.of("cities"), 3)
        parts.append("".join(k.option("radio", label=choice) for choice in choices[: k.count(2, 3)]))
    if k.difficulty > 2 and k.chance(0.6):
        label = k.text(k.words.new("fields"))
        parts.append(
            f'<div class="r"><label>{label} </label>{k.select(k.words.several(k.words.of("cities"), 4))}</div>'
        )
    parts.append(f'<div class="r">{k.buttons(k.count(1, 3))}</div>')
    return f"<form>{''.join(parts)}</form>"


def table(k: Kit) -> str:
    """A heading, a search field or buttons, and rows of values."""
    count = min(2 + k.width // (9 * k.size), k.count(2, 6))
    cells: dict[str, Callable[[], str]] = {"Date": k.words.date, "City": lambda: k.rng.choice(k.words.of("cities")),
        "Price": k.words.price, "Total": k.words.price, "Amount": k.words.price, "Change": k.words.percent,
        "Rate": k.words.percent, "Owner": k.words.name}  # fmt: skip
    titles = k.words.several([c for c in k.words.of("columns") if c != k.words.say("Name")], count - 1)
    lined, padding = k.chance(0.5), max(2, k.unit // 2)
    k.rule("main", f"padding:{k.unit}px")
    k.rule("table", "border-collapse:collapse;width:100%")
    k.rule(
        "td,th", f"padding:{padding}px;text-align:left;border{'' if lined else '-bottom'}:1px solid {k.theme.border}"
    )
    k.rule("th", f"background:{k.theme.surface};color:{k.theme.muted}")
    head = f"<tr><th>{k.say('Name')}</th>{''.join(f'<th>{k.text(t)}</th>' for t in titles)}"
    states = k.chance(0.4)
    action = k.difficulty > 3 and k.chance(0.6)
    rows = []
    for _ in range(k.rows(4, 1.8 if k.width > 400 else 2.1, 2, 14)):
        values = [k.words.fresh(k.words.name if k.width > 300 else k.words.thing)]
        values += [k.words.fresh(cells.get(title, k.words.number)) for title in titles]
        row = "".join(f"<td>{k.text(value)}</td>" for value in values)
        if states:
            row += f"<td>{k.rng.choice(k.words.of('states'))}</td>"
        if action:
            row += f"<td>{k.link(k.words.new('actions'))}</td>"
        rows.append(f"<tr>{row}</tr>")
    head += (f"<th>{k.say('State')}</th>" if states else "") + ("<th></th>" if action else "") + "</tr>"
    bar = k.buttons(k.count(1, 2)) if k.difficulty > 1 and k.chance(0.6) else ""
    return f"<main>{k.heading()}{bar}<table>{head}{''.join(rows)}</table></main>"


def items(k: Kit) -> str:
    """A list of titles with a line below each and an action at the right."""
    k.rule(
        ".i",
        "display:flex",
        "align-items:center",
        f"gap:{k.unit}px",
        f"padding:{k.unit}px",
        f"border-bottom:1px solid {k.theme.border}",
    )
    k.rule(".t", "flex:1")
    k.rule(".m", f"color:{k.theme.muted}")
    pictures, side = k.chance(0.4), 2 * k.size
    action = k.chance(0.7)
    rows = []
    for _ in range(k.rows(3, 3.2, 2, 9)):
        title, line = k.words.fresh(k.words.thing), k.rng.choice((k.words.date, k.words.name, k.words.email))()
        picture = k.figure(side, side) if pictures else ""
        button = k.button() if action else ""
        words = f'<b>{k.text(title)}</b><div class="m">{k.text(line)}</div>'
        rows.append(f'<article class="i">{picture}<div class="t">{words}</div>{button}</article>')
    k.rule("header", f"padding:0 {k.unit}px;background:{k.theme.surface}")
    return f"<header>{k.heading()}</header>{''.join(rows)}"


def cards(k: Kit) -> str:
    """A grid of offers: picture, title, price, button."""
    columns = max(k.columns, 2 if k.width >= 200 else 1)
    wide = (k.width - (columns + 1) * k.unit) // columns
    picture = round(min(wide * 0.5, k.height * 0.25))
    k.rule("main", f"display:grid;grid-template-columns:repeat({columns},1fr);gap:{k.unit}px;padding:{k.unit}px")
    k.rule(".c", f"overflow:hidden;{k.panel()}")
    k.rule(".b", f"padding:{k.unit // 2}px {k.unit}px {k.unit}px")
    k.rule("svg", "display:block")
    rows = max(1, min(k.count(1, 4), int((k.height - 3 * k.size) / (picture + 6.5 * k.size))))
    made = []
    for _ in range(rows * columns):
        body = f"<b>{k.text(k.words.fresh(k.words.thing))}</b><div>{k.text(k.words.fresh(k.words.price))}</div>"
        made.append(f'<article class="c">{k.figure(wide, picture)}<div class="b">{body}{k.button()}</div></article>')
    top = f"<nav>{k.heading(level=3)}</nav>" if k.chance(0.6) else ""
    k.rule("nav", f"padding:0 {k.unit}px")
    return f"{top}<main>{''.join(made)}</main>"


def editor(k: Kit) -> str:
    """A menu bar, perhaps with one menu open over the document, a tool bar, text and a status line."""
    theme = k.theme
    k.rule(
        ".n",
        "display:flex",
        f"gap:{2 * k.unit}px",
        f"padding:{k.unit // 2}px {k.unit}px",
        f"background:{theme.surface}",
        f"border-bottom:1px solid {theme.border}",
    )
    k.rule(".n span", "cursor:pointer")
    menus = list(k.words.of("menus")[: k.count(3, 6)])
    bar = "".join(f'<span role="menuitem">{menu}</span>' for menu in menus[: max(2, k.width // (5 * k.size))])
    tools = " ".join(k.icon() for _ in range(min(k.count(2, 9), k.width // (3 * k.size))))
    k.rule(".d", f"padding:{k.unit}px {2 * k.unit}px")
    paragraphs = "".join(k.paragraph(k.rng.randint(1, 3)) for _ in range(k.rows(7, 3, 1, 7)))
    open_menu = ""
    if k.difficulty > 1 and k.chance(0.6):
        left = k.rng.randint(0, min(len(menus) - 1, 2)) * 4 * k.size
        k.rule(
            "ul",
            "position:absolute",
            f"left:{left + k.unit}px",
            f"top:{2 * k.size}px",
            "margin:0",
            f"padding:{k.unit // 2}px 0",
            "list-style:none",
            "box-shadow:0 2px 6px #0006",
            f"background:{theme.surface}",
            f"border:1px solid {theme.border}",
        )
        k.rule("li", f"padding:{k.unit // 2}px {2 * k.unit}px")
        entries = k.words.several(k.words.of("actions"), k.rows(4, 1.9, 3, 7))
        listed = "".join(f'<li role="menuitem">{k.text(entry)}</li>' for entry in entries)
        open_menu = f"<ul>{listed}</ul>"
    k.rule(
        "footer",
        "position:fixed",
        "bottom:0",
        "width:100%",
        f"background:{theme.surface}",
        f"color:{theme.muted}",
        f"padding:2px {k.unit}px",
    )
    status = (
        f"<footer>{k.say('Page')} {k.rng.randint(1, 40)} · {k.rng.randint(90, 9000)} {k.say('words')}</footer>"
        if k.difficulty > 2
        else ""
    )
    return (
        f'<div class="n">{bar}</div><div class="n">{tools}</div><div class="d">{k.heading()}{paragraphs}</div>'
        f"{open_menu}{status}"
    )


def dialog(k: Kit) -> str:
    """A question over a page that lies in the shade behind it."""
    behind = k.rng.choice((items, table, article))(k) if k.difficulty > 1 else k.paragraph(k.rows(2, 1, 3, 9))
    width = min(k.width - 3 * k.unit, k.rng.randint(16, 26) * k.size)
    top = k.rng.randint(1, max(1, k.height // 4))
    left = k.rng.randint(k.unit, max(k.unit, k.width - width - k.unit))
    k.rule(".v", f"position:fixed;inset:0;background:#000{k.rng.choice('3579')}")
    k.rule(
        ".q",
        "position:fixed",
        f"left:{left}px",
        f"top:{top}px",
        f"width:{width}px",
        "box-sizing:border-box",
        f"padding:{k.unit}px {2 * k.unit}px",
        f"{k.panel()}",
    )
    k.rule(".x", "float:right")
    k.rule(".e", f"text-align:{k.rng.choice(('right', 'left', 'center'))};margin:{k.unit}px 0")
    close = '<button class="x">✕</button>' if k.chance(0.7) else ""
    extra = k.option() if k.difficulty > 2 and k.chance(0.5) else ""
    return (
        f'{behind}<div class="v"></div><div class="q" role="dialog">{close}{k.heading(level=3)}{k.paragraph(1)}{extra}'
        f'<div class="e">{k.buttons(k.count(2, 3))}</div></div>'
    )


def article(k: Kit) -> str:
    """A page to read: navigation, title, byline, paragraphs with links, perhaps a column beside."""
    k.rule("nav", f"display:flex;gap:{2 * k.unit}px;padding:{k.unit}px;background:{k.theme.surface}")
    k.rule("main", f"padding:0 {2 * k.unit}px;display:flex;gap:{2 * k.unit}px")
    k.rule(".m", f"color:{k.theme.muted}")
    links = "".join(k.link() for _ in range(min(k.count(2, 6), k.width // (6 * k.size))))
    byline = f'<div class="m">{k.text(k.words.fresh(k.words.name))}, {k.text(k.words.date())}</div>'
    text = []
    for _ in range(k.rows(6, 3.6, 1, 6)):
        paragraph = k.paragraph(k.rng.randint(2, 3))
        if k.chance(0.5):
            paragraph = paragraph.replace("</p>", f" {k.link(k.words.fresh(k.words.thing))}</p>")
        text.append(paragraph)
    aside = ""
    if k.width >= 480 and k.chance(0.6):
        k.rule("aside", f"width:{12 * k.size}px;padding:{k.unit}px;{k.panel()}")
        k.rule("aside div", f"margin:{k.unit}px 0")
        inner = "".join(f"<div>{k.link(k.words.fresh(k.words.thing))}</div>" for _ in range(k.count(2, 5)))
        aside = f"<aside>{k.heading(level=3)}{inner}</aside>"
    return f"<nav>{links}</nav><main><div>{k.heading(level=1)}{byline}{''.join(text)}</div>{aside}</main>"


def dashboard(k: Kit) -> str:
    """Figures in tiles, a bar chart, and navigation at the side where there is room."""
    theme, tiles = k.theme, min(2 + k.width // 250, k.count(2, 4))
    k.rule("body", f"display:flex;min-height:{k.height}px")
    k.rule("main", f"flex:1;padding:{k.unit}px;min-width:0")
    k.rule(".g", f"display:grid;grid-template-columns:repeat({tiles},1fr);gap:{k.unit}px")
    k.rule(".c", f"padding:{k.unit}px;{k.panel()}")
    k.rule(".c b", f"display:block;font-size:{round(1.4 * k.size)}px")
    k.rule(".m", f"color:{theme.muted}")
    numbers = (k.words.number, k.words.price, k.words.percent)
    made = "".join(f'<div class="c"><span class="m">{k.text(k.words.new("columns"))}</span>'
                   f"<b>{k.text(k.words.fresh(k.rng.choice(numbers)))}</b></div>" for _ in range(tiles))  # fmt: skip
    bars = k.count(3, 8)
    tall = max(30, k.height - 11 * k.size) if k.height < 400 else k.height // 3
    k.rule(".h", f"display:flex;align-items:flex-end;gap:{k.unit // 2}px;height:{tall}px;margin-top:{k.unit}px")
    k.rule(".h div", f"flex:1;background:{theme.accent}")
    chart = "".join(f'<div style="height:{k.rng.randint(10, 95)}%"></div>' for _ in range(bars))
    side = ""
    if k.width >= 220 and k.chance(0.7):
        k.rule(
            "nav",
            f"width:{7 * k.size}px",
            f"padding:{k.unit}px",
            f"background:{theme.surface}",
            f"border-right:1px solid {theme.border}",
        )
        k.rule("nav div", f"margin:{k.unit}px 0;overflow:hidden")
        side = f"<nav>{''.join(f'<div>{k.link()}</div>' for _ in range(k.rows(1, 2.2, 2, 7)))}</nav>"
    return f'{side}<main>{k.heading(level=3)}<div class="g">{made}</div><div class="h">{chart}</div></main>'


def settings(k: Kit) -> str:
    """Tabs, switches, sliders and a choice."""
    theme = k.theme
    tabs = k.words.several(k.words.of("sections"), min(k.count(2, 4), k.width // (7 * k.size)))
    chosen = k.rng.randrange(len(tabs))
    k.rule(".n", f"display:flex;border-bottom:1px solid {theme.border}")
    k.rule(".n div", f"padding:{k.unit}px {2 * k.unit}px")
    k.rule(".n .s", f"border-bottom:2px solid {theme.accent};color:{theme.accent}")
    k.rule("main", f"padding:{k.unit}px {2 * k.unit}px")
    k.rule(".w", f"display:flex;justify-content:space-between;align-items:center;margin:{k.unit}px 0")
    marks = [' aria-selected="true" class="s"' if n == chosen else "" for n in range(len(tabs))]
    shown = "".join(f'<div role="tab"{mark}>{tab}</div>' for tab, mark in zip(tabs, marks, strict=True))
    rows = []
    for n in range(k.rows(5, 2.2, 2, 8)):
        kind = k.rng.choice(("check", "check", "range", "select"))
        label = k.text(k.words.new("options" if kind == "check" else "fields"))
        control = {
            "check": f'<input type="checkbox" id="o{n}"{" checked" if k.chance(0.5) else ""}>',
            "range": f'<input type="range" id="o{n}" value="{k.rng.randint(0, 100)}" style="width:{7 * k.size}px">',
            "select": k.select(k.words.several(k.words.of("cities"), 3)).replace("<select", f'<select id="o{n}"'),
        }[kind]
        rows.append(f'<div class="w"><label for="o{n}">{label}</label>{control}</div>')
    return f'<div class="n">{shown}</div><main>{"".join(rows)}{k.buttons(k.count(1, 2))}</main>'


def messages(k: Kit) -> str:
    """A conversation with a field to answer, or an inbox."""
    theme = k.theme
    k.rule(
        ".b",
        "max-width:70%",
        "width:fit-content",
        f"margin:{k.unit}px",
        f"padding:{k.unit}px",
        f"border-radius:{k.radius + 4}px",
        f"background:{theme.surface}",
        f"border:1px solid {theme.border}",
    )
    k.rule(".y", f"margin-left:auto;background:{theme.accent};color:{theme.on_accent}")
    k.rule("header", f"display:flex;gap:{k.unit}px;align-items:center;padding:{k.unit}px;background:{theme.surface}")
    k.rule("footer", f"display:flex;gap:{k.unit}px;padding:{k.unit}px")
    k.rule("footer .r", "flex:1")
    head = f"<header><b>{k.text(k.words.fresh(k.words.name))}</b>{k.icon() if k.difficulty > 2 else ''}</header>"
    bubbles = "".join(f'<div class="b{k.rng.choice(("", " y"))}">{k.text(k.words.fresh(k.words.sentence))}</div>'
                      for _ in range(k.rows(5, 3, 1, 7)))  # fmt: skip
    send = k.button(k.words.say(k.rng.choice(("Send", "Reply", "Post"))), primary=True)
    return f"{head}{bubbles}<footer>{k.field(k.words.say('Message'), filled=False)}{send}</footer>"


def keypad(k: Kit) -> str:
    """A calculator, a month, or a number pad: many equal buttons with different signs."""
    kind = k.rng.choice(("calculator", "month", "icons"))
    if kind == "calculator":
        signs, columns, top = list("789/456*123-0.=+"), 4, f'<div class="o">{k.text(k.words.number())}</div>'
    elif kind == "month":
        first = k.rng.randint(0, 6)
        signs, columns = [""] * first + [str(day) for day in range(1, k.rng.randint(28, 31) + 1)], 7
        top = f"<b>{k.rng.choice(k.words.of('months'))} {k.rng.randint(2000, 2030)}</b>"
    else:
        signs, columns, top = k.rng.sample(tuple(ICONS), k.count(6, 16)), 4, k.heading(level=3)
    lines = -(-len(signs) // columns)
    tall = max(k.size + 4, min(3 * k.size, int((k.height - 5 * k.size) / lines) - 3))
    k.rule(
        ".k",
        "display:grid",
        f"grid-template-columns:repeat({columns},1fr)",
        "gap:3px",
        f"padding:{k.unit}px",
        f"max-width:{columns * 5 * k.size}px",
    )
    k.button("")
    k.rule(".k button", f"height:{tall}px;padding:0")
    k.rule(".o", f"margin:{k.unit}px;padding:{k.unit}px;text-align:right;font-size:{round(1.5 * k.size)}px;{k.panel()}")
    keys = "".join(f"<button>{sign}</button>" if sign else "<span></span>" for sign in signs)
    return f'{top}<div class="k">{keys}</div>'


def results(k: Kit) -> str:
    """A search field, links with a line of text each, and page numbers."""
    k.rule("form", f"display:flex;gap:{k.unit}px;padding:{k.unit}px;background:{k.theme.surface}")
    k.rule("form .r", "flex:1")
    k.rule("main", f"padding:{k.unit}px")
    k.rule(".m", f"color:{k.theme.muted}")
    k.rule(".s", f"margin:{k.unit}px 0")
    query = k.rng.choice(k.words.of("nouns"))
    field = f'<div class="r"><input class="f" placeholder="{k.say("Search")}" value="{query}"></div>'
    k.field(k.words.say("Search"), filled=True)
    found = "".join(f'<div class="s">{k.link(k.words.fresh(k.words.title))}<div class="m">'
                    f"{k.text(k.words.sentence())}</div></div>" for _ in range(k.rows(5, 2.9, 2, 8)))  # fmt: skip
    count = f'<div class="m">{k.words.number()} {k.say("results")}</div>' if k.difficulty > 1 else ""
    turn = (
        " ".join(k.link(str(n)) for n in range(1, k.count(2, 6))) + " " + k.link(k.words.say("Next"))
        if k.chance(0.6)
        else ""
    )
    return f"<form>{field}{k.button(k.words.say('Search'), primary=True)}</form><main>{count}{found}{turn}</main>"


def banner(k: Kit) -> str:
    """A page with a question about cookies over its lower end, or a notice in its corner."""
    theme, u = k.theme, k.unit
    behind = k.rng.choice((article, items, cards, results))(k)
    place = (
        "left:0;right:0;bottom:0"
        if k.chance(0.6)
        else f"right:{u}px;top:{u}px;width:{min(k.width - 4 * u, 20 * k.size)}px"
    )
    k.rule(
        ".y",
        f"position:fixed;{place}",
        f"padding:{u}px {2 * u}px",
        f"{k.panel()};background:{theme.text};color:{theme.ground}",
    )
    yes, no = k.button(k.words.say("Accept all"), primary=True), k.button(k.words.say("Reject all"))
    more = f" {k.button(k.words.say('Settings'))}" if k.difficulty > 2 else ""
    return f'{behind}<div class="y" role="dialog"><b>{k.say("This page uses cookies.")}</b><br>{yes} {no}{more}</div>'


def dropdown(k: Kit) -> str:
    """A menu over a page: entries with keys, some of them off, lines between them."""
    theme, u = k.theme, k.unit
    behind = k.rng.choice((items, table, article, form))(k)
    rows = k.rows(2, 1.9, 3, 9)
    width = min(k.width - 2 * u, 15 * k.size)
    left, top = (
        k.rng.randint(u, max(u, k.width - width - u)),
        k.rng.randint(u, max(u, k.height - int(rows * 2.2 * k.size))),
    )
    k.rule(
        "menu",
        f"position:fixed;left:{left}px;top:{top}px;width:{width}px;margin:0;padding:{u // 2}px 0;list-style:none",
        f"box-shadow:0 2px 8px #0007;background:{theme.surface}",
        f"border:1px solid {theme.border};border-radius:{k.radius}px",
    )
    k.rule("menu div", f"display:flex;justify-content:space-between;padding:{max(1, u // 3)}px {u}px")
    k.rule("menu hr", f"border:0;border-top:1px solid {theme.border};margin:2px 0")
    k.rule("menu .d", f"color:{theme.border}")
    k.rule("kbd", f"font:inherit;color:{theme.muted}")
    entries = []
    for n in range(rows):
        key = f"<kbd>Ctrl+{chr(65 + k.rng.randrange(26))}</kbd>" if k.chance(0.5) and k.difficulty > 1 else ""
        off = ' class="d" aria-disabled="true"' if k.chance(0.1 * (k.difficulty - 1)) else ""
        line = "<hr>" if n and k.chance(0.2) else ""
        entries.append(f'{line}<div{off}><span role="menuitem">{k.text(k.words.new("actions"))}</span>{key}</div>')
    return f"{behind}<menu>{''.join(entries)}</menu>"


TEMPLATES: dict[str, Template] = {
    template.__name__: template
    for template in (
        *(login, form, table, items, cards, editor, dialog, article, dashboard, settings, messages, keypad, results),
        *(banner, dropdown),
        *WORK,
        *SHOP,
        *LIFE,
    )
}
"""Kinds of pages by name."""
