"""Apps to fill in, choose and set: forms, menus, dialogs, settings, dates, sliders, cells."""

from __future__ import annotations

from mmagent.worlds.pages.apps import Plan, Step, data
from mmagent.worlds.pages.kit import Kit


def _header(k: Kit) -> str:
    k.rule("h2", f"margin:{k.unit}px;font-size:{round(1.25 * k.size)}px")
    return f"<h2>{k.text(k.words.fresh(k.words.title))}</h2>"


def _fill(k: Kit, n: int, value: str, old: str) -> list[Step]:
    """Write into field ``n``; what stands there goes."""
    steps = [Step("click", f"#f{n}")]
    if old:
        steps.append(Step("hotkey", text="ctrl+a"))
    return [*steps, Step("type", text=value)]


def sign_up(k: Kit) -> Plan:
    """Fields to fill, boxes to tick, one way to choose, a button that sends."""
    u = k.unit
    k.rule("form", f"padding:0 {u}px")
    k.rule(".r", f"margin:{u // 2}px 0")
    columns = 2 if k.width >= 300 else 1
    k.rule(".g", f"display:grid;grid-template-columns:repeat({columns},1fr);gap:0 {u}px")
    names = k.words.several(k.words.of("fields"), k.rows(6, 3.2, 1, 4) * columns)
    old = ["" if k.difficulty < 3 or k.chance(0.6) else k.words.thing() for _ in names]
    ticks = k.words.several(k.words.of("options"), k.count(1, 2))
    ways = k.words.several(k.words.of("cities"), 3) if k.difficulty > 1 and k.height >= 240 else []
    k.field("", filled=False)
    fields = "".join(
        f'<div class="r"><label class="l" for="f{n}">{k.text(name)}</label>'
        f'<input class="f" id="f{n}" autocomplete="off" value="{k.text(value)}"></div>'
        for n, (name, value) in enumerate(zip(names, old, strict=True)))  # fmt: skip
    k.rule("label.l", f"display:block;color:{k.theme.muted}")
    k.rule("label.o", f"margin-right:{u}px")
    boxes = "".join(
        f'<label class="o"><input type="checkbox" id="t{n}"> {k.text(t)}</label>' for n, t in enumerate(ticks)
    )
    radios = "".join(
        f'<label class="o"><input type="radio" name="w" id="w{n}"> {k.text(w)}</label>' for n, w in enumerate(ways)
    )
    send = k.words.say(k.rng.choice(("Send", "Continue", "Create account")))
    body = (
        f'{_header(k)}<form><div class="g">{fields}</div><div class="r">{boxes}</div><div class="r">{radios}</div>'
        f'<div class="r">{k.button(send, primary=True)}</div></form><p id="d" style="display:none">✓</p>'
    )
    script = f"""const names = {data(names)}, ticks = {data(ticks)}, ways = {data(ways)};
    on('form', 'submit', (e, n, event) => {{
      event.preventDefault();
      state.sent = {{fields: names.map((name, n) => $('#f' + n).value), ticks: ticks.map((t, n) => $('#t' + n).checked),
        way: ways.findIndex((w, n) => $('#w' + n).checked)}};
      show('#d', true);
    }});"""
    chosen = sorted(k.rng.sample(range(len(names)), min(len(names), k.count(1, 4))))
    values = {n: k.words.thing() for n in chosen}
    tick = k.rng.randrange(len(ticks)) if k.chance(0.7) else -1
    way = k.rng.randrange(len(ways)) if ways and k.chance(0.7) else -1
    asks = [f'"{names[n]}" = "{value}"' for n, value in values.items()]
    goal = f"Fill in {', '.join(asks)}"
    goal += f'; tick "{ticks[tick]}"' if tick >= 0 else ""
    goal += f'; choose "{ways[way]}"' if way >= 0 else ""
    steps = [step for n, value in values.items() for step in _fill(k, n, value, old[n])]
    steps += [Step("click", f"#t{tick}")] if tick >= 0 else []
    steps += [Step("click", f"#w{way}")] if way >= 0 else []
    steps.append(Step("click", "form button"))
    written, ticked = [values.get(n, value) for n, value in enumerate(old)], [n == tick for n in range(len(ticks))]
    sent = {"fields": written, "ticks": ticked, "way": way}
    return Plan(body, script, f'{goal}; then press "{send}".', tuple(steps), {"state.sent": sent})


def menu_bar(k: Kit) -> Plan:
    """Menus that open at a click, some with menus of their own."""
    t, u = k.theme, k.unit
    names = [k.words.keep(n) for n in k.words.of("menus")[: max(2, min(k.count(3, 6), k.width // (6 * k.size)))]]
    k.rule("nav", f"display:flex;background:{t.surface};border-bottom:1px solid {t.border}")
    k.rule("nav>div", f"padding:{u // 2}px {u}px;position:relative;white-space:nowrap")
    k.rule("nav ul", f"display:none;position:absolute;margin:0;padding:{u // 2}px 0;list-style:none;z-index:9",
           "left:0;top:100%",
           f"background:{t.surface};border:1px solid {t.border};box-shadow:0 2px 6px #0006")  # fmt: skip
    k.rule("nav li", f"padding:{u // 3}px {u}px;position:relative")
    k.rule("nav .on>ul", "display:block")
    k.rule("nav li ul", "left:70%;top:60%")
    words = len({word.casefold() for word in k.words.of("actions")} - {name.casefold() for name in names})
    rows = min(k.rows(3, 1.7, 3, 7), words // len(names))  # a tall screen has room for more than there are words
    deep = k.difficulty >= 3
    tree: list[list[tuple[str, list[str]]]] = []
    for _ in names:
        entries = []
        for n in range(rows if len(tree) else max(2, rows - 1)):
            inner = k.words.several(k.words.of("options"), 2) if deep and n == rows // 2 else []
            entries.append((k.words.new("actions"), inner))
        tree.append(entries)
    bar = []
    for m, (name, entries) in enumerate(zip(names, tree, strict=True)):
        listed = []
        for n, (entry, inner) in enumerate(entries):
            more = "".join(f'<li id="m{m}-{n}-{i}" role="menuitem">{k.text(x)}</li>' for i, x in enumerate(inner))
            sub = f"<ul>{more}</ul>" if inner else ""
            listed.append(f'<li id="m{m}-{n}" role="menuitem">{k.text(entry)}{" ›" if inner else ""}{sub}</li>')
        bar.append(f'<div id="m{m}"><span role="menuitem">{k.text(name)}</span><ul>{"".join(listed)}</ul></div>')
    body = f"<nav>{''.join(bar)}</nav>{_header(k)}<div style='padding:0 {u}px'>{k.paragraph(2)}</div>"
    script = """const close = () => $$('nav .on').forEach(e => e.classList.remove('on'));
    on('nav>div', 'click', (e, n, event) => {
      const hit = event.target.closest('li');
      if (!hit) { const was = e.classList.contains('on'); close(); e.classList.toggle('on', !was); return; }
      if (hit.querySelector('ul')) { hit.classList.toggle('on'); return; }
      state.chosen = hit.id;
      close();
    });"""
    m = k.rng.randrange(len(names))
    n = k.rng.randrange(len(tree[m]))
    entry, inner = tree[m][n]
    steps = [Step("click", f"#m{m}>span"), Step("click", f"#m{m}-{n}")]
    path, chosen = f'"{entry}" in the menu "{names[m]}"', f"m{m}-{n}"
    if inner:
        i = k.rng.randrange(len(inner))
        chosen = f"m{m}-{n}-{i}"
        steps.append(Step("click", f"#{chosen}"))
        path = f'"{inner[i]}" under {path}'
    return Plan(body, script, f"Choose {path}.", tuple(steps), {"state.chosen": chosen})


def confirm(k: Kit) -> Plan:
    """A list whose entries are deleted only after a question."""
    t, u = k.theme, k.unit
    k.rule(
        "article",
        f"display:flex;align-items:center;gap:{u}px;padding:{u // 2}px {u}px;border-bottom:1px solid {t.border}",
    )
    k.rule("article b", "flex:1")
    k.rule(".v", "position:fixed;inset:0;background:#0007")
    k.rule(
        ".q",
        f"position:fixed;left:10%;right:10%;top:{k.rng.randint(15, 35)}%;padding:{u}px",
        f"{k.panel()};background:{t.ground}",
    )
    names = k.words.several(k.words.thing, k.rows(4, 2.4, 2, 7))
    word, keep, sure = k.words.several(k.words.of("actions"), 3)
    rows = "".join(
        f'<article id="a{n}"><b>{k.text(name)}</b>{k.button(word)}</article>' for n, name in enumerate(names)
    )
    why = k.words.several(k.words.of("options"), 2) if k.difficulty >= 3 else []
    boxes = "".join(
        f'<label class="o"><input type="checkbox" id="y{n}"> {k.text(w)}</label> ' for n, w in enumerate(why)
    )
    answers = [f'<button id="no">{k.text(keep)}</button>', f'<button id="yes">{k.text(sure)}</button>']
    k.rng.shuffle(answers)
    body = (
        f'{_header(k)}{rows}<div id="v" style="display:none"><div class="v"></div><div class="q" role="dialog">'
        f'<p id="s"></p>{boxes}<div>{" ".join(answers)}</div></div></div>'
    )
    script = f"""const names = {data(names)};
    state.left = names.map((_, n) => n);
    let asked = null;
    on('article button', 'click', (e, n) => {{
      asked = n;
      $('#s').textContent = {data(word)} + ': ' + names[n] + '?';
      show('#v', true);
    }});
    $('#no').onclick = () => show('#v', false);
    $('#yes').onclick = () => {{
      state.left = state.left.filter(n => n !== asked);
      state.why = $$('.q input').map(e => e.checked);
      $('#a' + asked).remove();
      show('#v', false);
    }};"""
    n = k.rng.randrange(len(names))
    tick = k.rng.randrange(len(why)) if why else -1
    steps = [Step("click", f"#a{n} button")]
    steps += [Step("click", f"#y{tick}")] if why else []
    steps.append(Step("click", "#yes"))
    extra = f', tick "{why[tick]}"' if why else ""
    goal = f'Press "{word}" for "{names[n]}"{extra} and answer "{sure}".'
    left = [m for m in range(len(names)) if m != n]
    return Plan(
        body, script, goal, tuple(steps), {"state.left": left, "state.why": [m == tick for m in range(len(why))]}
    )


def options(k: Kit) -> Plan:
    """Tabs with switches behind them, and a button that saves."""
    t, u = k.theme, k.unit
    tabs = k.words.several(k.words.of("sections"), max(2, min(k.count(2, 4), k.width // (8 * k.size))))
    k.rule("nav", f"display:flex;border-bottom:1px solid {t.border}")
    k.rule("nav div", f"padding:{u // 2}px {u}px;white-space:nowrap")
    k.rule("nav .s", f"color:{t.accent};border-bottom:2px solid {t.accent}")
    k.rule("section", f"padding:{u // 2}px {u}px")
    k.rule(".w", f"display:flex;justify-content:space-between;margin:{u // 2}px 0")
    each = k.rows(6, 1.9, 1, 5)
    names = [k.words.several(k.words.of("options") + k.words.of("fields"), each) for _ in tabs]
    old = [[k.chance(0.4) for _ in range(each)] for _ in tabs]
    parts = []
    for n, (switches, values) in enumerate(zip(names, old, strict=True)):
        rows = "".join(
            f'<div class="w"><label for="s{n}-{m}">{k.text(name)}</label>'
            f'<input type="checkbox" id="s{n}-{m}"{" checked" if value else ""}></div>'
            for m, (name, value) in enumerate(zip(switches, values, strict=True))
        )
        parts.append(f'<section id="p{n}"{"" if n == 0 else " style=display:none"}>{rows}</section>')
    marks = [' class="s" aria-selected="true"' if n == 0 else "" for n in range(len(tabs))]
    bar = "".join(f'<div role="tab" id="t{n}"{marks[n]}>{k.text(tab)}</div>' for n, tab in enumerate(tabs))
    save = k.words.new("actions")
    body = f'<nav>{bar}</nav>{"".join(parts)}<div style="padding:{u}px">{k.button(save, primary=True)}</div>'
    script = f"""const tabs = {len(tabs)}, each = {each};
    on('nav div', 'click', (e, n) => $$('nav div').forEach((tab, m) => {{
      tab.classList.toggle('s', m === n);
      m === n ? tab.setAttribute('aria-selected', 'true') : tab.removeAttribute('aria-selected');
      show('#p' + m, m === n);
    }}));
    on('button', 'click', () => {{ state.saved = Array.from({{length: tabs}}, (_, n) =>
      Array.from({{length: each}}, (_, m) => $('#s' + n + '-' + m).checked)); }});"""
    n = k.rng.randrange(len(tabs))
    flips = sorted(k.rng.sample(range(each), min(each, 1 if k.difficulty < 4 else 2)))
    steps = [Step("click", f"#t{n}")] if n else []
    steps += [Step("click", f"#s{n}-{m}") for m in flips]
    steps.append(Step("click", "button"))
    what = " and ".join(f'switch {"off" if old[n][m] else "on"} "{names[n][m]}"' for m in flips)
    new = [[value != (tab == n and m in flips) for m, value in enumerate(values)] for tab, values in enumerate(old)]
    return Plan(body, script, f'Under "{tabs[n]}", {what}, then press "{save}".', tuple(steps), {"state.saved": new})


def date_field(k: Kit) -> Plan:
    """A field that opens a month, with buttons to the next and the one before."""
    u = k.unit
    tall = max(k.size + 3, min(3 * k.size, (k.height - 9 * k.size) // 6))
    k.rule(
        ".c",
        f"display:none;width:{min(k.width - 4 * u, 22 * k.size)}px",
        f"margin:{u // 2}px {u}px;padding:{u // 2}px;{k.panel()}",
    )
    k.rule(".h", "display:flex;align-items:center;text-align:center")
    k.rule(".h b", "flex:1")
    k.rule(".g", "display:grid;grid-template-columns:repeat(7,1fr);text-align:center")
    k.rule(".g span", f"line-height:{tall}px;height:{tall}px")
    k.rule(".f", f"margin:0 {u}px")
    name = k.words.say("Date")
    k.button("")
    body = (
        f'{_header(k)}<div class="f"><label>{k.text(name)} <input id="f" readonly size="12"></label></div>'
        f'<div class="c"><div class="h"><button id="b">‹</button><b id="t"></b><button id="a">›</button></div>'
        f'<div class="g" id="g"></div></div>'
    )
    year, month = k.rng.randint(1995, 2035), k.rng.randint(1, 12)
    script = f"""const names = {data(k.words.of("months"))};
    let year = {year}, month = {month};
    const draw = () => {{
      $('#t').textContent = names[month - 1] + ' ' + year;
      const first = (new Date(year, month - 1, 1).getDay() + 6) % 7, days = new Date(year, month, 0).getDate();
      $('#g').innerHTML = '<span></span>'.repeat(first) +
        Array.from({{length: days}}, (_, n) => `<span id="d${{n + 1}}">${{n + 1}}</span>`).join('');
    }};
    const turn = by => {{
      const count = year * 12 + month - 1 + by;
      year = Math.floor(count / 12);
      month = count % 12 + 1;
      draw();
    }};
    draw();
    $('#f').onclick = () => {{ $('.c').style.display = 'block'; }};
    $('#b').onclick = () => turn(-1);
    $('#a').onclick = () => turn(1);
    $('#g').onclick = event => {{
      if (!event.target.id.startsWith('d')) return;
      state.date = [year, month, +event.target.id.slice(1)];
      $('#f').value = state.date.join('-');
      $('.c').style.display = 'none';
    }};"""
    away = k.rng.choice((-1, 1)) * k.rng.randint(0, min(4, k.difficulty))
    count = year * 12 + month - 1 + away
    day, wanted = k.rng.randint(1, 28), (count // 12, count % 12 + 1)
    steps = [Step("click", "#f"), *[Step("click", "#a" if away > 0 else "#b")] * abs(away), Step("click", f"#d{day}")]
    label = f"{k.words.of('months')[wanted[1] - 1]} {wanted[0]}"
    return Plan(body, script, f'Set "{name}" to day {day} of {label}.', tuple(steps), {"state.date": [*wanted, day]})


def sliders(k: Kit) -> Plan:
    """Bars to be drawn to one of their ends or their middle."""
    t, u = k.theme, k.unit
    names = k.words.several(k.words.of("columns"), k.rows(4, 3.2, 1, 4))
    wide = k.width - 6 * u
    k.rule("section", f"padding:{u // 2}px {3 * u}px")
    k.rule(".b", f"position:relative;width:{wide}px;height:8px;margin:{u}px 0;border-radius:4px;background:{t.border}")
    k.rule(
        ".k",
        f"position:absolute;top:-5px;width:18px;height:18px;margin-left:-9px;border-radius:50%;background:{t.accent}",
    )
    old = [k.rng.choice((20, 30, 40, 60, 70, 80)) for _ in names]
    parts = "".join(
        f'<section><span>{k.text(name)}: <b id="v{n}">{value}</b></span><div class="b" id="b{n}">'
        f'<div class="k" role="slider" id="k{n}" style="left:{value}%"></div></div></section>'
        for n, (name, value) in enumerate(zip(names, old, strict=True))
    )
    script = f"""state.values = {data(old)};
    let held = null;
    on('.k', 'mousedown', (e, n, event) => {{ held = n; event.preventDefault(); }});
    addEventListener('mouseup', () => {{ if (held !== null) state.done = true; held = null; }});
    addEventListener('mousemove', event => {{
      if (held === null) return;
      const r = $('#b' + held).getBoundingClientRect();
      const value = Math.round(Math.min(1, Math.max(0, (event.clientX - r.left) / r.width)) * 10) * 10;
      state.values[held] = value;
      $('#k' + held).style.left = value + '%';
      $('#v' + held).textContent = value;
    }});"""
    n = k.rng.randrange(len(names))
    value = k.rng.choice([v for v in ((0, 100) if k.difficulty < 3 else (0, 10, 50, 90, 100)) if v != old[n]])
    at = min(max(value / 100, 0.004), 0.996)
    step = Step("drag", f"#k{n}", f"#b{n}", spot=(0.5, 0.5), end=(at, 0.5))
    values = [value if m == n else v for m, v in enumerate(old)]
    goal = f'Drag "{names[n]}" to {value}.'
    return Plan(f"{_header(k)}{parts}", script, goal, (step,), {"state.values": values, "state.done": True})


def cells(k: Kit) -> Plan:
    """A sheet whose cells are written into after a double click."""
    t = k.theme
    columns, rows = max(2, min(k.count(3, 6), k.width // (6 * k.size))), k.rows(3, 1.7, 3, 12)
    k.rule("table", "border-collapse:collapse;width:100%;table-layout:fixed")
    k.rule("td,th", f"border:1px solid {t.border};padding:1px 4px;height:{round(1.4 * k.size)}px;overflow:hidden")
    k.rule("th", f"background:{t.surface};color:{t.muted};font-weight:normal")
    k.rule(
        "td input",
        f"width:90%;font:inherit;border:0;padding:0;outline:2px solid {t.accent};background:{t.ground};color:{t.text}",
    )
    values = [[k.words.number() if k.chance(0.8) else "" for _ in range(columns)] for _ in range(rows)]
    head = "".join(f"<th>{chr(65 + c)}</th>" for c in range(columns))
    body = "".join(
        f"<tr><th>{r + 1}</th>" + "".join(f'<td id="c{r}-{c}">{v}</td>' for c, v in enumerate(row)) + "</tr>"
        for r, row in enumerate(values))  # fmt: skip
    script = """state.written = {};
    on('td', 'dblclick', (cell, n) => {
      if (cell.firstElementChild) return;
      const old = cell.textContent;
      cell.innerHTML = '<input>';
      const field = cell.firstElementChild;
      field.value = old;
      field.focus();
      field.select();
      field.onkeydown = event => {
        if (event.key !== 'Enter') return;
        state.written[cell.id] = field.value;
        cell.textContent = field.value;
      };
    });"""
    places = k.rng.sample([(r, c) for r in range(rows) for c in range(columns)], 1 if k.difficulty < 3 else 2)
    new = [k.words.number() for _ in places]
    steps = [
        step for (r, c), value in zip(places, new, strict=True)
        for step in (Step("double_click", f"#c{r}-{c}"), Step("type", text=value), Step("key", text="Enter"))
    ]  # fmt: skip
    asks = " and ".join(f"{value} into {chr(65 + c)}{r + 1}" for (r, c), value in zip(places, new, strict=True))
    wanted = {f"c{r}-{c}": value for (r, c), value in zip(places, new, strict=True)}
    page = f"<table><tr><th></th>{head}</tr>{body}</table>"
    return Plan(page, script, f"Write {asks}.", tuple(steps), {"state.written": wanted})


FORMS = (sign_up, menu_bar, confirm, options, date_field, sliders, cells)
