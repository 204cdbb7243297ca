"""Pages of work: mail, calendars, boards, files, code, spreadsheets, steps, records and charts."""

from __future__ import annotations

from mmagent.worlds.pages.kit import Kit
from mmagent.worlds.pages.themes import from_hue


def mail(k: Kit) -> str:
    """Folders at the side, messages with sender, subject and time; unread ones are bold."""
    t, u = k.theme, k.unit
    k.rule("body", f"display:flex;min-height:{k.height}px")
    k.rule(
        "nav", f"width:{8 * k.size}px;flex:none;padding:{u}px;background:{t.surface};border-right:1px solid {t.border}"
    )
    k.rule("nav a", f"display:block;margin:{u}px 0;white-space:nowrap")
    k.rule("main", "flex:1;min-width:0")
    k.rule("article", f"display:flex;gap:{u}px;padding:{u}px;border-bottom:1px solid {t.border}")
    k.rule("article>div", "flex:1;min-width:0;overflow:hidden;white-space:nowrap")
    k.rule("small", f"color:{t.muted}")
    k.rule("header", f"padding:{u}px")
    folders = [("Inbox", k.rng.randint(1, 40)), ("Drafts", 0), ("Sent", 0), ("Trash", 0)][: k.count(2, 4)]
    side = k.button(k.words.say("Compose"), primary=True)
    side += "".join(k.link(k.words.say(name) + (f" {count}" if count else "")) for name, count in folders)
    rows = []
    for _ in range(k.rows(2, 2.9, 2, 14)):
        tag = "b" if k.chance(0.4) else "span"
        sender, subject = k.text(k.words.fresh(k.words.name)), k.text(k.words.fresh(k.words.title))
        box = '<input type="checkbox">' if k.difficulty > 2 else ""
        rows.append(
            f"<article>{box}<div><{tag}>{sender}</{tag}><br><small>{subject}</small></div>"
            f"<small>{k.words.time()}</small></article>"
        )
    tools = f"<header>{' '.join(k.icon() for _ in range(k.count(1, 4)))}</header>" if k.difficulty > 1 else ""
    aside = f"<nav>{side}</nav>" if k.width >= 240 else ""
    return f"{aside}<main>{tools}{''.join(rows)}</main>"


def calendar(k: Kit) -> str:
    """A week with events, or a month in squares; buttons turn the pages."""
    t, u, days = k.theme, k.unit, k.words.of("weekdays")
    k.rule("header", f"display:flex;gap:{u}px;align-items:center;padding:{u}px")
    k.rule("header b", "flex:1")
    month = f"{k.rng.choice(k.words.of('months'))} {k.rng.randint(2000, 2030)}"
    head = f"<header><b>{month}</b>{k.button('‹')}{k.button(k.words.say('Today'))}{k.button('›')}</header>"
    columns = 7 if k.width >= 300 else 3
    k.rule(".g", f"display:grid;grid-template-columns:repeat({columns},1fr);border-top:1px solid {t.border}")
    tall = int(k.height - 6.5 * k.size)
    lines = max(1, min(5 if k.chance(0.5) else 1, tall // (3 * k.size)))
    k.rule(
        ".g div", f"border-right:1px solid {t.border};border-bottom:1px solid {t.border};min-width:0;overflow:hidden"
    )
    k.rule(".d", f"height:{tall // lines}px;padding:1px;box-sizing:border-box")
    k.rule(".g p", f"margin:1px 0;padding:1px 3px;border-radius:{k.radius}px;white-space:nowrap;overflow:hidden")
    k.rule(".w", f"padding:2px {u // 2}px;color:{t.muted};background:{t.surface}")
    first, cells = k.rng.randint(1, 4), []
    for n in range(lines * columns):
        events = k.rng.choices((0, 1, 2), (5, 4, k.difficulty))[0] if tall // lines > 3 * k.size else 0
        made = "".join(
            f'<p style="background:{from_hue(k.rng.random(), 0.85, 0.6)};color:#222">'
            f"{k.text(k.words.new('nouns').capitalize())}</p>" for _ in range(events))  # fmt: skip
        today = f' style="background:{t.surface};font-weight:bold"' if n == lines * columns // 2 else ""
        cells.append(f'<div class="d"{today}>{first + n}{made}</div>')
    names = "".join(f'<div class="w">{day}</div>' for day in days[:columns])
    return f'{head}<div class="g">{names}{"".join(cells)}</div>'


def kanban(k: Kit) -> str:
    """Columns of cards with tags, from to do to done."""
    t, u = k.theme, k.unit
    names = ("To do", "In progress", "Done")[: 3 if k.width >= 300 else 2]
    k.rule("main", f"display:grid;grid-template-columns:repeat({len(names)},1fr);gap:{u}px;padding:0 {u}px")
    k.rule("section", f"background:{t.surface};padding:{u}px;border-radius:{k.radius}px;min-width:0")
    k.rule("article", f"{k.panel()};background:{t.ground};padding:{u}px;margin:{u}px 0")
    k.rule("i", f"font-style:normal;font-size:{max(8, k.size - 2)}px;padding:0 {u // 2}px;border-radius:{k.radius}px")
    columns = []
    for name in names:
        cards = []
        for _ in range(k.rng.randint(1, k.rows(4.5, 3.4, 1, 6))):
            color = from_hue(k.rng.random(), 0.8, 0.6)
            tag = f'<br><i style="background:{color};color:#222">{k.rng.choice(k.words.of("states"))}</i>'
            cards.append(f"<article>{k.text(k.words.fresh(k.words.thing))}{tag if k.difficulty > 1 else ''}</article>")
        add = k.link("+ " + k.words.language.say("Add card")) if k.difficulty > 2 else ""
        columns.append(f"<section><b>{k.say(name)}</b>{''.join(cards)}{add}</section>")
    k.rule("h2", f"margin:{u}px;font-size:{round(1.3 * k.size)}px")
    return f"<h2>{k.text(k.words.fresh(k.words.title))}</h2><main>{''.join(columns)}</main>"


def files(k: Kit) -> str:
    """Folders and files with size and date, or as tiles; where one is stands above."""
    t, u = k.theme, k.unit
    k.rule("header", f"padding:{u}px;background:{t.surface};border-bottom:1px solid {t.border}")
    path = " / ".join(k.link() for _ in range(k.count(1, 3)))
    bar = f"<header>{path}</header><header>{k.button(k.words.say('New folder'), primary=True)} {k.button()}</header>"
    ends = ("pdf", "txt", "png", "csv", "zip", "mp3", "doc")
    names = [f"{k.words.fresh(lambda: k.rng.choice(k.words.of('nouns')))}" for _ in range(k.rows(5, 1.9, 3, 14))]
    shown = [
        (name, "") if k.chance(0.3) else (f"{name}.{k.rng.choice(ends)}", k.words.number() + " kB") for name in names
    ]
    if k.chance(0.4) and k.width >= 240:
        side = 3 * k.size
        k.rule("main", f"display:flex;flex-wrap:wrap;gap:{u}px;padding:{u}px")
        k.rule("article", f"width:{7 * k.size}px;text-align:center;overflow:hidden;padding:{u // 2}px")
        k.rule("i", f"display:block;margin:auto;width:{side}px;height:{side}px;border-radius:{k.radius}px")
        tiles = "".join(f'<article><i style="background:{t.accent if not size else t.border}"></i>'
                        f"<span>{k.text(name)}</span></article>" for name, size in shown)  # fmt: skip
        return f"{bar}<main>{tiles}</main>"
    k.rule("table", "border-collapse:collapse;width:100%")
    k.rule("td,th", f"text-align:left;padding:{max(2, u // 2)}px {u}px;border-bottom:1px solid {t.border}")
    k.rule("th", f"color:{t.muted}")
    rows = "".join(
        f"<tr><td>{k.text(name)}</td><td>{size or '–'}</td><td>{k.words.date()}</td></tr>" for name, size in shown
    )
    head = f"<tr><th>{k.say('Name')}</th><th>{k.say('Size')}</th><th>{k.say('Modified')}</th></tr>"
    return f"{bar}<table>{head}{rows}</table>"


def code(k: Kit) -> str:
    """A program in its editor: tabs, numbered lines in colours, a status line."""
    t, u = k.theme, k.unit
    ground, text = ("#1e1e2e", "#d8dee9") if k.chance(0.6) else ("#fdfdfd", "#24292e")
    words = ("#ff79a8", "#8be9fd", "#f1c07a") if ground == "#1e1e2e" else ("#a626a4", "#0b62c4", "#8a5a00")
    k.rule("header", f"display:flex;background:{t.surface};color:{t.text}")
    k.rule("header div", f"padding:{u // 2}px {u}px;border-right:1px solid {t.border}")
    k.rule("header .s", f"border-bottom:2px solid {t.accent}")
    k.rule("pre", f"margin:0;padding:{u}px;background:{ground};color:{text};min-height:{k.height - 4 * k.size}px",
           "box-sizing:border-box", f"font:{k.size}px/1.45 monospace;overflow:hidden")  # fmt: skip
    k.rule("u", "text-decoration:none;opacity:0.5;margin-right:1em")
    k.rule("footer", f"position:fixed;bottom:0;width:100%;background:{t.accent};color:{t.on_accent};padding:2px {u}px")

    def paint(word: str, kind: int) -> str:
        return f'<span style="color:{words[kind]}">{word}</span>'

    names = [
        f"{k.rng.choice(('load', 'draw', 'read', 'make', 'sort', 'find'))}_{n}" for n in ("row", "page", "item", "key")
    ]
    forms = (
        lambda: f"{paint('def', 0)} {paint(k.rng.choice(names), 1)}(x, n):",
        lambda: f"    total = n * {k.rng.randint(2, 99)}",
        lambda: f"    {paint('if', 0)} x &gt; {k.rng.randint(1, 9)}:",
        lambda: f"        {paint('return', 0)} {paint(k.rng.choice(names), 1)}(x)",
        lambda: f"    {paint('for', 0)} key {paint('in', 0)} table:",
        lambda: f"    name = {paint(repr(k.rng.choice(('left', 'tea', 'north', 'blue'))), 2)}",
    )
    count = max(4, int((k.height - 5 * k.size) / (1.45 * k.size)))
    lines = "\n".join(f"<u>{n:2}</u>{k.rng.choice(forms)()}" for n in range(1, count + 1))
    ends = k.words.several([f"{name}.py" for name in names], 3)[: 3 if k.width > 280 else 2]
    tabs = "".join(f'<div role="tab"{" class=s" if n == 0 else ""}>{name}</div>' for n, name in enumerate(ends))
    place = f"{k.rng.randint(1, 400)}:{k.rng.randint(1, 80)}"
    return f"<header>{tabs}</header><pre>{lines}</pre><footer>{ends[0]} · {place}</footer>"


def spreadsheet(k: Kit) -> str:
    """Numbered rows and lettered columns, a cell chosen, its content above."""
    t = k.theme
    columns = max(3, min(k.count(3, 9), k.width // (5 * k.size)))
    rows = k.rows(4, 1.55, 4, 24)
    k.rule("table", "border-collapse:collapse;width:100%")
    k.rule("td,th", f"border:1px solid {t.border};padding:1px 4px;white-space:nowrap;overflow:hidden")
    k.rule("th", f"background:{t.surface};color:{t.muted};font-weight:normal")
    k.rule("td", "text-align:right")
    k.rule(".s", f"outline:2px solid {t.accent};outline-offset:-2px")
    k.rule("header", f"display:flex;gap:{k.unit}px;padding:{k.unit // 2}px;background:{t.surface}")
    at = (k.rng.randrange(rows), k.rng.randrange(columns))
    kinds = [k.words.thing if k.width > 400 else k.words.number, *[k.words.number] * (columns - 1)]
    cells = [[k.words.fresh(kind) for kind in kinds] for _ in range(rows)]
    head = "".join(f"<th>{chr(65 + c)}</th>" for c in range(columns))
    body = "".join(
        f"<tr><th>{r + 1}</th>"
        + "".join(f"<td{' class=s' if (r, c) == at else ''}>{k.text(cells[r][c])}</td>" for c in range(columns))
        + "</tr>"
        for r in range(rows)
    )
    name = f"{chr(65 + at[1])}{at[0] + 1}"
    bar = f"<header><b>{name}</b><span>{k.text(cells[at[0]][at[1]])}</span></header>"
    tools = f"<header>{' '.join(k.icon() for _ in range(k.count(2, 6)))}</header>" if k.difficulty > 2 else ""
    return f"{tools}{bar}<table><tr><th></th>{head}</tr>{body}</table>"


def wizard(k: Kit) -> str:
    """One of several steps: where one is, fields of this step, back and on."""
    t, u = k.theme, k.unit
    steps = k.words.several(k.words.of("sections"), min(k.count(3, 5), k.width // (7 * k.size)))
    at = k.rng.randrange(len(steps))
    k.rule("ol", f"display:flex;gap:{u}px;margin:0;padding:{u}px;list-style:none;background:{t.surface}")
    k.rule("ol span", f"color:{t.muted}")
    k.rule("ol .s", f"color:{t.accent};font-weight:bold")
    k.rule("form", f"padding:{u}px {2 * u}px")
    k.rule(".r", f"margin:{u}px 0")
    trail = "".join(f'<li><span{" class=s" if n == at else ""}>{n + 1}. {k.text(name)}</span></li>'
                    for n, name in enumerate(steps))  # fmt: skip
    fields = "".join(k.field() for _ in range(k.rows(7, 3, 1, 5)))
    place = f"{k.say('Step')} {at + 1} {k.say('of')} {len(steps)}"
    ways = [k.button(k.words.say("Back"))] if at else []
    ways.append(k.button(k.words.say("Next" if at < len(steps) - 1 else "Done"), primary=True))
    return (
        f"<ol>{trail}</ol><form><p>{place}</p>{k.heading(steps[at])}{fields}"
        f'<div class="r">{" ".join(ways)}</div></form>'
    )


def log(k: Kit) -> str:
    """Lines of a terminal with times and levels."""
    ground, text = k.rng.choice((("#0b0e11", "#d5dde3"), ("#001b26", "#c9d8d8"), ("#ffffff", "#1f2328")))
    levels = {"INFO": "#2f9e6e", "WARN": "#c98a00", "ERROR": "#e5484d", "DEBUG": "#7d8590"}
    k.rule("body", f"margin:0;background:{ground}")
    k.rule("pre", f"margin:0;padding:{k.unit}px;color:{text};font:{k.size}px/1.4 monospace;white-space:pre-wrap")
    count = max(3, int((k.height - 2 * k.unit) / (1.4 * k.size)) - k.rng.randint(3, 6))
    lines, hour = [], k.rng.randint(0, 20)
    for n in range(count):
        level = k.rng.choices(tuple(levels), (6, 2, 1, 2))[0]
        clock = f"{hour:02}:{(7 * n) // 60:02}:{(7 * n) % 60:02}"
        what = k.text(k.rng.choice((k.words.thing, k.words.title))())
        lines.append(f'{clock} <b style="color:{levels[level]}">{level}</b> {what} {k.rng.randint(1, 999)}')
    k.rule("header", f"display:flex;gap:{k.unit}px;padding:{k.unit}px;background:{k.theme.surface}")
    bar = f"<header>{k.field(k.words.say('Search'), filled=k.chance(0.3))}{k.button()}</header>"
    return f"{bar}<pre>{chr(10).join(lines)}</pre>"


def analytics(k: Kit) -> str:
    """A line drawn over months, figures beside it, and a table where there is room."""
    t, u = k.theme, k.unit
    wide, tall = k.width - 4 * u, max(60, round(k.height * 0.42))
    k.rule("main", f"padding:{u}px {2 * u}px")
    k.rule("svg", f"display:block;{k.panel()}")
    k.rule(".g", f"display:flex;gap:{2 * u}px;margin:{u}px 0")
    k.rule("small", f"color:{t.muted};display:block")
    points, names = k.count(5, 12), k.words.of("months")
    heights = [k.rng.uniform(0.15, 0.85) * tall for _ in range(points)]
    xs = [round(wide * (n + 0.5) / points) for n in range(points)]
    path = " ".join(f"{x},{round(y)}" for x, y in zip(xs, heights, strict=True))
    grid = "".join(f'<path d="M0 {round(tall * f)}H{wide}" stroke="{t.border}"/>' for f in (0.25, 0.5, 0.75))
    dots = "".join(
        f'<circle cx="{x}" cy="{round(y)}" r="3" fill="{t.accent}"/>' for x, y in zip(xs, heights, strict=True)
    )
    chart = (
        f'<svg width="{wide}" height="{tall}" role="img" aria-label="line chart">{grid}'
        f'<polyline points="{path}" fill="none" stroke="{t.accent}" stroke-width="2"/>{dots}</svg>'
    )
    figures = "".join(
        f"<div><small>{k.text(k.words.new('columns'))}</small><b>{k.text(k.words.fresh(k.words.number))}</b></div>"
        for _ in range(min(4, k.count(2, 4), k.width // (6 * k.size)))
    )
    span = f"{names[0]} – {names[k.rng.randint(3, 11)]}"
    below = f'<div class="g">{figures}</div>{k.buttons(k.count(1, 2))}'
    return f"<main>{k.heading()}<small>{span}</small>{chart}{below}</main>"


WORK = (mail, calendar, kanban, files, code, spreadsheet, wizard, log, analytics)
