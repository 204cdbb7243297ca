"""Apps that hold things: tables to sort, boards, shops, mail, lists, trees, drawings, files."""

from __future__ import annotations

from mmagent.worlds.pages.apps import Plan, Step, data
from mmagent.worlds.pages.kit import Kit


def _header(k: Kit) -> str:
    k.rule("h2", f"margin:{k.unit}px;font-size:{round(1.25 * k.size)}px")
    return f"<h2>{k.text(k.words.fresh(k.words.title))}</h2>"


def sorting(k: Kit) -> Plan:
    """A table that sorts by the head that is clicked, and the other way round at the next click."""
    t, u = k.theme, k.unit
    count, rows = max(2, min(k.count(2, 4), k.width // (8 * k.size))), k.rows(4, 1.9, 3, 9)
    k.rule("table", "border-collapse:collapse;width:100%")
    k.rule("td,th", f"padding:{max(2, u // 2)}px;text-align:left;border-bottom:1px solid {t.border}")
    k.rule("th", f"background:{t.surface};color:{t.muted};cursor:pointer")
    titles = k.words.several(k.words.of("columns"), count)
    names = k.words.several(k.words.thing, rows)
    numbers = [k.rng.sample(range(1, 900), rows) for _ in titles]
    opens = k.words.new("actions")
    head = f"<tr><td>{k.say('Name')}</td>{''.join(f'<th>{k.text(title)}</th>' for title in titles)}</tr>"
    script = f"""const names = {data(names)}, numbers = {data(numbers)}, word = {data(opens)};
    let order = names.map((_, n) => n);
    const draw = () => {{
      $('tbody').innerHTML = order.map(n => `<tr><td><a href="#" data-n="${{n}}">${{names[n]}}</a></td>` +
        numbers.map(column => `<td>${{column[n]}}</td>`).join('') + '</tr>').join('');
      on('tbody a', 'click', (e, n, event) => {{
        event.preventDefault();
        state.opened = +e.dataset.n;
        $('#o').textContent = word + ': ' + e.textContent;
      }});
    }};
    draw();
    on('th', 'click', (e, n) => {{
      const way = state.sort && state.sort[0] === n ? -state.sort[1] : 1;
      state.sort = [n, way];
      order.sort((a, b) => way * (numbers[n][a] - numbers[n][b]));
      $$('th').forEach((h, m) => {{ h.textContent = {data(titles)}[m] + (m === n ? way > 0 ? ' ▲' : ' ▼' : ''); }});
      draw();
    }});"""
    k.rule("a", f"color:{t.accent}")
    body = f'{_header(k)}<table><thead>{head}</thead><tbody></tbody></table><p id="o"></p>'
    column, way = k.rng.randrange(count), k.rng.choice((1, -1))
    steps = [Step("click", f"th:nth-child({column + 2})")] * (1 if way > 0 else 2)
    goal = f'Sort the table by "{titles[column]}", {"smallest" if way > 0 else "largest"} first'
    wanted: dict[str, object] = {"state.sort": [column, way]}
    if k.difficulty >= 3:
        ordered = sorted(range(rows), key=lambda n: way * numbers[column][n])
        steps.append(Step("click", "tbody tr:first-child a"))
        goal += ", then open its first row"
        wanted["state.opened"] = ordered[0]
    return Plan(body, script, f"{goal}.", tuple(steps), wanted)


def board(k: Kit) -> Plan:
    """Cards that are drawn from one column to another."""
    t, u = k.theme, k.unit
    columns = [k.words.say(name) for name in ("To do", "In progress", "Done")]
    k.rule(
        "main",
        f"display:grid;grid-template-columns:repeat(3,1fr);gap:{u // 2}px;padding:{u // 2}px",
        f"height:{k.height - 5 * k.size}px",
    )
    k.rule("section", f"background:{t.surface};padding:{u // 2}px;min-width:0;border:1px solid {t.border}")
    k.rule("article", f"{k.panel()};background:{t.ground};padding:{u // 2}px;margin:{u // 2}px 0")
    k.rule("article.h", "opacity:0.6;position:relative;z-index:9;pointer-events:none")
    names = [k.words.several(k.words.thing, k.rng.randint(1, k.rows(6, 3.4, 1, 4))) for _ in columns]
    ids = [[f"{c}-{n}" for n in range(len(cards))] for c, cards in enumerate(names)]
    body = _header(k) + "<main>" + "".join(
        f'<section id="s{c}"><b>{k.text(title)}</b>'
        + "".join(f'<article id="a{i}">{k.text(n)}</article>' for i, n in zip(ids[c], names[c], strict=True))
        + "</section>"
        for c, title in enumerate(columns)) + "</main>"  # fmt: skip
    script = """let held = null;
    const cards = section => [...section.querySelectorAll('article')].map(card => card.id.slice(1));
    const note = () => { state.board = $$('section').map(cards); };
    note();
    on('article', 'mousedown', (e, n, event) => { held = e; e.classList.add('h'); event.preventDefault(); });
    addEventListener('mousemove', event => { if (held) held.style.translate = '0 -2px'; });
    addEventListener('mouseup', event => {
      if (!held) return;
      const over = document.elementFromPoint(event.clientX, event.clientY).closest('section');
      held.classList.remove('h');
      held.style.translate = '';
      if (over) over.append(held);
      held = null;
      note();
    });"""
    moves = 1 if k.difficulty < 4 else 2
    places, steps, asks = [list(i) for i in ids], [], []
    known = {i: name for c, cards in enumerate(ids) for i, name in zip(cards, names[c], strict=True)}
    for card in k.rng.sample(sorted(known), moves):
        source = next(c for c, cards in enumerate(places) if card in cards)
        target = k.rng.choice([c for c in range(3) if c != source])
        places[source].remove(card)
        places[target].append(card)
        steps.append(Step("drag", f"#a{card}", f"#s{target}", end=(0.5, 0.9)))
        asks.append(f'the card "{known[card]}" to "{columns[target]}"')
    return Plan(body, script, f"Move {', and '.join(asks)}.", tuple(steps), {"state.board": places})


def shopping(k: Kit) -> Plan:
    """Offers that go into a basket, which is then looked at and ordered."""
    t, u = k.theme, k.unit
    columns = max(2, min(4, k.width // (11 * k.size)))
    rows = max(1, min(3, (k.height - 3 * k.size) // (6 * k.size)))
    k.rule(
        "header",
        "display:flex;justify-content:space-between;align-items:center",
        f"padding:{u // 2}px {u}px;background:{t.surface}",
    )
    k.rule("main", f"display:grid;grid-template-columns:repeat({columns},1fr);gap:{u // 2}px;padding:{u // 2}px")
    k.rule("article", f"padding:{u // 2}px;min-width:0;{k.panel()}")
    k.rule("#c", f"display:none;padding:{u}px")
    names = k.words.several(k.words.thing, rows * columns)
    add, go = k.words.new("actions"), k.words.say("Checkout")
    offers = "".join(f'<article><b>{k.text(name)}</b><br>{k.text(k.words.price())}<br>'
                     f'<span id="a{n}">{k.button(add)}</span></article>' for n, name in enumerate(names))  # fmt: skip
    cart = k.words.say("Cart")
    body = (
        f'<header><b>{k.text(k.words.title())}</b><button id="o">{k.text(cart)} (<span id="n">0</span>)</button>'
        f'</header><main>{offers}</main><div id="c"><div id="l"></div>'
        f'<p><button id="g" class="p">{k.text(go)}</button></p></div>'
    )
    script = f"""const names = {data(names)}, basket = {{}};
    on('main span', 'click', (e, n) => {{
      basket[n] = (basket[n] || 0) + 1;
      $('#n').textContent = Object.values(basket).reduce((a, b) => a + b, 0);
    }});
    $('#o').onclick = () => {{
      show('main', false);
      $('#c').style.display = 'block';
      $('#l').innerHTML = Object.entries(basket).map(([n, count]) => `<p>${{count}} × ${{names[n]}}</p>`).join('');
    }};
    $('#g').onclick = () => {{ state.order = basket; $('#l').textContent = '✓'; }};"""
    k.button("", primary=True)
    chosen = k.rng.sample(range(len(names)), min(len(names), 1 if k.difficulty < 3 else 2))
    counts = [k.rng.randint(1, 3) for _ in chosen]
    steps = [Step("click", f"#a{n} button") for n, count in zip(chosen, counts, strict=True) for _ in range(count)]
    steps += [Step("click", "#o"), Step("click", "#g")]
    asks = " and ".join(f'{count} of "{names[n]}"' for n, count in zip(chosen, counts, strict=True))
    order = {str(n): count for n, count in zip(chosen, counts, strict=True)}
    goal = f'Order {asks}: press "{add}" there, open "{cart}" and press "{go}".'
    return Plan(body, script, goal, tuple(steps), {"state.order": order})


def post(k: Kit) -> Plan:
    """An inbox: messages are opened, then answered or put away."""
    t, u = k.theme, k.unit
    k.rule("article", f"padding:{u // 2}px {u}px;border-bottom:1px solid {t.border};overflow:hidden;white-space:nowrap")
    k.rule("small", f"color:{t.muted}")
    k.rule("#m", f"display:none;padding:{u}px")
    k.rule(
        "#m textarea",
        f"width:95%;height:{3 * k.size}px;font:inherit",
        f"background:{t.surface};color:{t.text};border:1px solid {t.border}",
    )
    count = k.rows(2, 2.9, 2, 8)
    names, titles = k.words.several(k.words.name, count), k.words.several(k.words.title, count)
    away, bin_, send = k.words.new("actions"), k.words.new("actions"), k.words.say("Send")
    rows = "".join(f'<article id="a{n}"><b>{k.text(name)}</b><br><small>{k.text(title)}</small></article>'
                   for n, (name, title) in enumerate(zip(names, titles, strict=True)))  # fmt: skip
    body = (
        f'<div id="l">{rows}</div><div id="m"><b id="w"></b><p id="s"></p>{k.paragraph(1)}<textarea></textarea>'
        f'<p><button id="g" class="p">{k.text(send)}</button> <button id="x">{k.text(away)}</button> '
        f'<button id="y">{k.text(bin_)}</button></p></div>'
    )
    k.button("", primary=True)
    script = f"""const names = {data(names)}, titles = {data(titles)};
    let open = null;
    const back = () => {{ show('#l', true); $('#m').style.display = 'none'; }};
    on('article', 'click', (e, n) => {{
      open = n; show('#l', false); $('#m').style.display = 'block';
      $('#w').textContent = names[n]; $('#s').textContent = titles[n];
    }});
    $('#g').onclick = () => {{ state.sent = [open, $('textarea').value]; back(); }};
    $('#x').onclick = () => {{ state.away = open; $('#a' + open).remove(); back(); }};
    $('#y').onclick = () => {{ state.gone = open; $('#a' + open).remove(); back(); }};"""
    n = k.rng.randrange(len(names))
    start, opened = f'Open the message from "{names[n]}"', Step("click", f"#a{n}")
    if k.chance(0.5):
        text = k.words.sentence()
        steps = (opened, Step("click", "#m textarea"), Step("type", text=text), Step("click", "#g"))
        return Plan(body, script, f'{start}, answer "{text}" and press "{send}".', steps, {"state.sent": [n, text]})
    which, word, field = k.rng.choice((("#x", away, "away"), ("#y", bin_, "gone")))
    return Plan(body, script, f'{start} and press "{word}".', (opened, Step("click", which)), {f"state.{field}": n})


def leafing(k: Kit) -> Plan:
    """A list over several pages."""
    t, u = k.theme, k.unit
    each, pages = k.rows(5, 2.0, 2, 6), 2 + k.difficulty // 2
    k.rule("#l a", f"display:block;padding:{u // 2}px {u}px;color:{t.accent};border-bottom:1px solid {t.border}")
    k.rule("footer", f"display:flex;gap:{u}px;align-items:center;padding:{u}px")
    names = k.words.several(k.words.thing, each * pages)
    back, on = k.words.say("Back"), k.words.say("Next")
    k.button("")
    body = (
        f'{_header(k)}<div id="l"></div><footer><button id="b">{k.text(back)}</button><span id="p"></span>'
        f'<button id="n">{k.text(on)}</button></footer>'
    )
    script = f"""const names = {data(names)}, each = {each};
    let page = 0;
    const draw = () => {{
      $('#l').innerHTML = names.slice(page * each, page * each + each).map((name, n) =>
        `<a href="#" id="i${{page * each + n}}">${{name}}</a>`).join('');
      $('#p').textContent = (page + 1) + ' / {pages}';
      on('#l a', 'click', (e, n, event) => {{
        event.preventDefault();
        state.opened = +e.id.slice(1);
        e.style.fontWeight = 'bold';
      }});
    }};
    draw();
    $('#b').onclick = () => {{ page = Math.max(0, page - 1); draw(); }};
    $('#n').onclick = () => {{ page = Math.min({pages - 1}, page + 1); draw(); }};"""
    n = k.rng.randrange(len(names))
    steps = (*[Step("click", "#n")] * (n // each), Step("click", f"#i{n}"))
    return Plan(body, script, f'Find "{names[n]}" in the list, page by page, and open it.', steps, {"state.opened": n})


def tree(k: Kit) -> Plan:
    """Folders in folders, that open at a click."""
    t, u = k.theme, k.unit
    k.rule("ul", f"list-style:none;margin:0;padding-left:{2 * u}px")
    k.rule("li>span", f"display:inline-block;padding:1px {u // 2}px")
    k.rule("li.c>ul", "display:none")
    k.rule(".s", f"background:{t.accent};color:{t.on_accent}")
    room = k.rows(4, 1.5, 4, 12)
    tops = k.words.several(k.words.of("sections"), max(2, min(4, room // 3)))
    inner = [k.words.several(k.words.of("sections"), 2 if k.difficulty >= 3 else 0) for _ in tops]
    leaves = max(1, min(3, room - len(tops) - 2))

    def files() -> list[str]:
        ends = ("pdf", "txt", "png", "csv")
        return k.words.several(lambda: f"{k.rng.choice(k.words.of('nouns'))}.{k.rng.choice(ends)}", leaves)

    shown, paths = [], []
    for a, (top, subs) in enumerate(zip(tops, inner, strict=True)):
        parts = []
        for b, sub in enumerate(subs or [""]):
            found = files()
            paths += [(a, b if subs else -1, n, name) for n, name in enumerate(found)]
            rows = "".join(f'<li id="x{a}-{b}-{n}"><span>{k.text(name)}</span></li>' for n, name in enumerate(found))
            parts.append(
                f'<li class="c" id="y{a}-{b}"><span>▸ {k.text(sub)}</span><ul>{rows}</ul></li>' if subs else rows
            )
        shown.append(f'<li class="c" id="z{a}"><span>▸ {k.text(top)}</span><ul>{"".join(parts)}</ul></li>')
    body = f"{_header(k)}<ul>{''.join(shown)}</ul>"
    script = """on('li>span', 'click', e => {
      if (e.nextElementSibling) { e.parentElement.classList.toggle('c'); return; }
      $$('.s').forEach(s => s.classList.remove('s'));
      e.classList.add('s');
      state.opened = e.parentElement.id;
    });"""
    a, b, n, name = k.rng.choice(paths)
    steps = [Step("click", f"#z{a}>span")]
    where = f'"{tops[a]}"'
    if b >= 0:
        steps.append(Step("click", f"#y{a}-{b}>span"))
        where = f'"{inner[a][b]}" in {where}'
    leaf = f"x{a}-{max(b, 0)}-{n}"
    steps.append(Step("click", f"#{leaf}>span"))
    return Plan(body, script, f'Select the file "{name}" of {where}.', tuple(steps), {"state.opened": leaf})


def painting(k: Kit) -> Plan:
    """A canvas whose figures take the colour that was chosen."""
    t, u = k.theme, k.unit
    colours = {"red": "#e61414", "green": "#008c1e", "blue": "#0a14f5", "yellow": "#faf01e", "purple": "#821496"}
    wide, tall = k.width - 2 * u, k.height - 4 * k.size - 2 * u
    k.rule("header", f"display:flex;gap:{u}px;padding:{u}px")
    k.rule(
        "header div", f"width:{2 * k.size}px;height:{2 * k.size}px;border:2px solid {t.border};box-sizing:border-box"
    )
    k.rule("header .s", f"border-color:{t.text}")
    k.rule("canvas", f"margin:0 {u}px;background:#ffffff;display:block")
    shapes = ["circle", "square", "triangle"]
    k.rng.shuffle(shapes)
    radius = min(wide // 7, tall // 2 - 8)
    spots = [(round(wide * (n + 0.5) / 3), round(tall / 2 + k.rng.randint(-6, 6))) for n in range(3)]
    row = "".join(f'<div id="{name}" title="{name}" style="background:{c}"></div>' for name, c in colours.items())
    body = f'<header>{row}</header><canvas id="c" width="{wide}" height="{tall}"></canvas>'
    script = f"""const shapes = {data(shapes)}, spots = {data(spots)}, r = {radius}, colours = {data(colours)};
    const pen = $('#c').getContext('2d', {{willReadFrequently: true}});
    let chosen = null;
    state.fills = shapes.map(() => '#cccccc');
    const outline = n => {{
      const [x, y] = spots[n], path = new Path2D();
      if (shapes[n] === 'circle') path.arc(x, y, r, 0, 7);
      if (shapes[n] === 'square') path.rect(x - r, y - r, 2 * r, 2 * r);
      const corners = `M${{x}} ${{y - r}}L${{x + r}} ${{y + r}}L${{x - r}} ${{y + r}}Z`;
      if (shapes[n] === 'triangle') path.addPath(new Path2D(corners));
      return path;
    }};
    const draw = () => shapes.forEach((_, n) => {{ pen.fillStyle = state.fills[n]; pen.fill(outline(n)); }});
    draw();
    on('header div', 'click', e => {{
      $$('.s').forEach(s => s.classList.remove('s'));
      e.classList.add('s');
      chosen = colours[e.id];
    }});
    $('#c').onclick = event => {{
      const hit = shapes.findIndex((_, n) => pen.isPointInPath(outline(n), event.offsetX, event.offsetY));
      if (hit >= 0 && chosen) {{ state.fills[hit] = chosen; draw(); }}
    }};
    const two = value => value.toString(16).padStart(2, '0');
    const ink = n => '#' + [...pen.getImageData(...spots[n], 1, 1).data].slice(0, 3).map(two).join('');"""
    chosen = k.rng.sample(range(3), 1 if k.difficulty < 3 else 2)
    names = [k.rng.choice(tuple(colours)) for _ in chosen]
    steps = []
    for n, name in zip(chosen, names, strict=True):
        x, y = spots[n]
        steps += [Step("click", f"#{name}"), Step("click", "#c", spot=((x + 0.5) / wide, (y + 0.5) / tall))]
    asks = " and ".join(f"the {shapes[n]} {name}" for n, name in zip(chosen, names, strict=True))
    wanted = {f"ink({n})": colours[name] for n, name in zip(chosen, names, strict=True)}
    return Plan(body, script, f"Paint {asks}.", tuple(steps), wanted)


def renaming(k: Kit) -> Plan:
    """Files with a menu at the right button: renamed in place, or removed."""
    t, u = k.theme, k.unit
    k.rule("#l div", f"padding:{u // 2}px {u}px;border-bottom:1px solid {t.border}")
    k.rule("#l input", "font:inherit")
    k.rule("menu", f"display:none;position:fixed;margin:0;padding:{u // 2}px 0;width:{11 * k.size}px",
           f"background:{t.surface}", f"border:1px solid {t.border};box-shadow:0 2px 6px #0006")  # fmt: skip
    k.rule("menu div", f"padding:{u // 3}px {u}px")
    names = k.words.several(
        lambda: f"{k.rng.choice(k.words.of('nouns'))}.{k.rng.choice(('txt', 'pdf', 'png'))}", k.rows(5, 2, 2, 7)
    )
    rename, remove, other = k.words.several(k.words.of("actions"), 3)
    entries = [("r", rename), ("x", remove), ("o", other)]
    k.rng.shuffle(entries)
    rows = "".join(f'<div id="a{n}">{k.text(name)}</div>' for n, name in enumerate(names))
    items = "".join(f'<div role="menuitem" id="{i}">{k.text(word)}</div>' for i, word in entries)
    body = f'{_header(k)}<div id="l">{rows}</div><menu>{items}</menu>'
    script = """let at = null;
    state.names = $$('#l div').map(e => e.textContent);
    on('#l div', 'contextmenu', (e, n, event) => {
      event.preventDefault();
      at = n;
      const menu = $('menu');
      menu.style.display = 'block';
      menu.style.left = Math.min(event.clientX, innerWidth - menu.offsetWidth) + 'px';
      menu.style.top = Math.min(event.clientY, innerHeight - menu.offsetHeight) + 'px';
    });
    const shut = () => { $('menu').style.display = 'none'; };
    $('#o').onclick = shut;
    $('#x').onclick = () => { state.names[at] = null; $('#a' + at).style.display = 'none'; shut(); };
    $('#r').onclick = () => {
      const row = $('#a' + at), n = at;
      row.innerHTML = '<input>';
      row.firstElementChild.value = state.names[n];
      row.firstElementChild.focus();
      row.firstElementChild.select();
      row.firstElementChild.onkeydown = event => {
        if (event.key !== 'Enter') return;
        state.names[n] = row.textContent = row.firstElementChild.value;
      };
      shut();
    };"""
    n = k.rng.randrange(len(names))
    first = Step("right_click", f"#a{n}")
    if k.chance(0.3):
        left = [None if m == n else name for m, name in enumerate(names)]
        goal = f'From the context menu of "{names[n]}", choose "{remove}".'
        return Plan(body, script, goal, (first, Step("click", "#x")), {"state.names": left})
    new = f"{k.words.fresh(k.words.of('nouns'))}.txt"
    steps = (first, Step("click", "#r"), Step("type", text=new), Step("key", text="Enter"))
    after = [new if m == n else name for m, name in enumerate(names)]
    goal = f'From the context menu of "{names[n]}", choose "{rename}" and name it "{new}".'
    return Plan(body, script, goal, steps, {"state.names": after})


def long_list(k: Kit) -> Plan:
    """More entries than the box shows: it scrolls."""
    t, u = k.theme, k.unit
    k.rule("#l", f"height:{k.height - 6 * k.size}px;overflow-y:scroll;margin:0 {u}px;{k.panel()}")
    k.rule("#l div", f"padding:{u // 2}px {u}px;border-bottom:1px solid {t.border}")
    k.rule("#l .s", f"background:{t.accent};color:{t.on_accent}")
    names = k.words.several(k.words.thing if k.chance(0.5) else k.words.name, 12 + 6 * k.difficulty)
    rows = "".join(f'<div id="a{n}">{k.text(name)}</div>' for n, name in enumerate(names))
    body = f'{_header(k)}<div id="l">{rows}</div>'
    script = """on('#l div', 'click', (e, n) => {
      $$('.s').forEach(s => s.classList.remove('s'));
      e.classList.add('s');
      state.chosen = n;
    });"""
    n = k.rng.randrange(len(names) // 3, len(names))
    steps = (Step("scroll", "#l", f"#a{n}"), Step("click", f"#a{n}"))
    return Plan(body, script, f'Select "{names[n]}" in the list.', steps, {"state.chosen": n})


def searching(k: Kit) -> Plan:
    """A field that narrows a list, and entries to open."""
    t, u = k.theme, k.unit
    k.rule("header", f"display:flex;gap:{u}px;padding:{u}px;background:{t.surface}")
    k.rule("#l a", f"display:block;padding:{u // 2}px {u}px;color:{t.accent}")
    names = k.words.several(k.words.thing, k.rows(4, 1.7, 3, 9) * 2)
    shown = len(names) // 2
    field = k.words.say("Search")
    k.field("", filled=False)
    body = (
        f'<header><input class="f" id="f" autocomplete="off" placeholder="{k.text(field)}"></header><div id="l"></div>'
    )
    script = f"""const names = {data(names)};
    const draw = text => {{
      const fits = name => name.toLowerCase().includes(text.toLowerCase());
      const found = names.map((name, n) => [name, n]).filter(([name]) => fits(name));
      $('#l').innerHTML = found.slice(0, {shown}).map(([name, n]) => `<a href="#" id="i${{n}}">${{name}}</a>`).join('');
      on('#l a', 'click', (e, n, event) => {{
        event.preventDefault();
        state.opened = +e.id.slice(1);
        e.style.fontWeight = 'bold';
      }});
    }};
    draw('');
    $('#f').onkeydown = event => {{
      if (event.key === 'Enter') draw(state.asked = $('#f').value);
    }};"""
    n = k.rng.randrange(shown, len(names))
    steps = (Step("click", "#f"), Step("type", text=names[n]), Step("key", text="Enter"), Step("click", f"#i{n}"))
    wanted = {"state.asked": names[n], "state.opened": n}
    return Plan(body, script, f'Search for "{names[n]}" and open it.', steps, wanted)


LISTS = (sorting, board, shopping, post, leafing, tree, painting, renaming, long_list, searching)
