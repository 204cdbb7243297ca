"""Pages of buying and selling: offers, baskets, plans, filters, invoices, seats and parcels on their way."""

from __future__ import annotations

from mmagent.worlds.pages.kit import Kit
from mmagent.worlds.pages.themes import from_hue


def _stars(k: Kit) -> str:
    full = k.rng.randint(2, 5)
    return f"<span>{'★' * full}{'☆' * (5 - full)} ({k.rng.randint(1, 900)})</span>"


def product(k: Kit) -> str:
    """One offer: its picture, price and stars, a choice of colour and quantity, the button that buys it."""
    t, u, beside = k.theme, k.unit, k.width >= 300
    k.rule("main", f"display:{'grid' if beside else 'block'};grid-template-columns:2fr 3fr;gap:{2 * u}px;padding:{u}px")
    k.rule("svg", f"border-radius:{k.radius}px")
    k.rule(".m", f"font-size:{round(1.5 * k.size)}px;color:{t.accent};margin:{u // 2}px 0")
    k.rule(".s", f"width:{2 * k.size}px;height:{2 * k.size}px;border-radius:50%;border:2px solid {t.border}")
    k.rule(".r", f"display:flex;gap:{u}px;align-items:center;margin:{u}px 0;flex-wrap:wrap")
    k.rule(".q", f"width:{3 * k.size}px;font:inherit;background:{t.surface};color:{t.text};border:1px solid {t.border}")
    wide = k.width * 2 // 5 - 2 * u if beside else k.width - 2 * u
    tall = round(min(k.height * (0.6 if beside else 0.3), wide))
    swatches = "".join(f'<span class="s" style="background:{from_hue(n / 4 + k.rng.random() / 4, 0.5, 0.7)}"></span>'
                       for n in range(k.count(2, 4)))  # fmt: skip
    about = k.paragraph(k.rng.randint(1, 2), muted=True) if k.height >= 240 else ""
    colour = f'<div class="r">{k.say("Colour")}: {swatches}</div>' if k.difficulty > 1 else ""
    name = k.say("Quantity")
    buy = (
        f'<div class="r"><label>{name} <input class="q" type="number" value="{k.rng.randint(1, 9)}"></label>'
        f"{k.button(k.words.say('Add to cart'), primary=True)}</div>"
    )
    stars = _stars(k) if k.chance(0.6) else ""
    price = f'<div class="m">{k.text(k.words.price())}</div>'
    picture = f"<div>{k.figure(wide, tall)}</div>"
    return f"<main>{picture}<div>{k.heading(k.words.thing())}{stars}{price}{colour}{buy}{about}</div></main>"


def basket(k: Kit) -> str:
    """What is to be bought, how many of each, what it comes to."""
    t, u = k.theme, k.unit
    k.rule("article", f"display:flex;gap:{u}px;align-items:center;padding:{u}px;border-bottom:1px solid {t.border}")
    k.rule("article b", "flex:1;min-width:0")
    k.rule(
        "input",
        f"width:{2.5 * k.size}px;font:inherit;background:{t.surface};color:{t.text};border:1px solid {t.border}",
    )
    k.rule("footer", f"padding:{u}px;text-align:right")
    k.rule("footer p", f"margin:{u // 2}px 0")
    k.rule("header", f"padding:0 {u}px")
    rows = []
    for _ in range(k.rows(8, 2.8, 1, 7)):
        side = 2 * k.size
        remove = k.link(k.words.language.say("Remove")) if k.width > 300 else ""
        rows.append(
            f"<article>{k.figure(side, side)}<b>{k.text(k.words.fresh(k.words.thing))}</b>"
            f'<input type="number" value="{k.rng.randint(1, 9)}">'
            f"<span>{k.text(k.words.fresh(k.words.price))}</span>{remove}</article>"
        )
    lines = [("Subtotal", k.words.price()), ("Shipping", k.words.price())] if k.difficulty > 1 else []
    sums = "".join(f"<p>{k.say(name)}: {k.text(price)}</p>" for name, price in lines)
    total = f"<p><b>{k.say('Total')}: {k.text(k.words.price())}</b></p>"
    done = k.button(k.words.say("Checkout"), primary=True)
    return f"<header>{k.heading(k.words.say('Cart'))}</header>{''.join(rows)}<footer>{sums}{total}{done}</footer>"


def pricing(k: Kit) -> str:
    """Two or three plans side by side, the middle one stressed."""
    t, u = k.theme, k.unit
    names = ("Basic", "Plus", "Pro")[: 3 if k.width >= 300 else 2]
    k.rule("main", f"display:grid;grid-template-columns:repeat({len(names)},1fr);gap:{u}px;padding:{u}px")
    k.rule("section", f"padding:{u}px;text-align:center;min-width:0;{k.panel()}")
    k.rule(".s", f"border:2px solid {t.accent}")
    k.rule("h3", f"margin:{u // 2}px 0")
    k.rule(".m", f"font-size:{round(1.5 * k.size)}px;margin:{u // 2}px 0")
    k.rule("small", f"color:{t.muted};display:block")
    lines = k.rows(9, 1.4, 1, 5)
    made = []
    for n, name in enumerate(names):
        what = "".join(f"<div>✓ {k.text(k.words.new('options'))}</div>" for _ in range(max(1, lines - 1 + n % 2)))
        price = f'<div class="m">{k.text(k.words.fresh(k.words.price))}</div>'
        price += f"<small>{k.words.language.say('per month')}</small>"
        choose = k.button(k.words.language.say("Choose"), primary=n == 1)
        made.append(
            f"<section{' class=s' if n == 1 else ''}><h3>{k.say(name)}</h3>{price}{what}<p>{choose}</p></section>"
        )
    k.rule("header", f"padding:0 {u}px")
    return f"<header>{k.heading()}</header><main>{''.join(made)}</main>"


def catalogue(k: Kit) -> str:
    """Filters at the side, an order to choose above, offers in a grid."""
    t, u = k.theme, k.unit
    side = 9 * k.size if k.width >= 320 else 0
    k.rule("body", "display:flex")
    k.rule("aside", f"width:{side}px;flex:none;padding:{u}px;background:{t.surface};box-sizing:border-box")
    k.rule("main", "flex:1;min-width:0")
    k.rule("header", f"padding:{u}px")
    k.rule(".g", f"display:grid;grid-template-columns:repeat({max(2, (k.width - side) // (9 * k.size))},1fr);gap:{u}px",
           f"padding:0 {u}px")  # fmt: skip
    k.rule("article", f"overflow:hidden;min-width:0;{k.panel()}")
    k.rule("svg", "display:block;max-width:100%")
    k.rule("article div", f"padding:{u // 2}px;overflow:hidden")
    columns = max(2, (k.width - side) // (9 * k.size))
    wide = (k.width - side - (columns + 1) * u) // columns
    tall = round(wide * 0.5)
    rows = max(1, min(4, (k.height - 4 * k.size) // (tall + 4 * k.size)))
    offers = "".join(
        f"<article>{k.figure(wide, tall)}<div><b>{k.text(k.words.fresh(k.words.thing))}</b><br>"
        f"{k.text(k.words.fresh(k.words.price))}</div></article>" for _ in range(rows * columns))  # fmt: skip
    marks = "".join(k.option(label=k.words.fresh(k.words.of("cities"))) for _ in range(k.rows(4, 1.8, 2, 7)))
    filters = f"<aside><b>{k.say('Filters')}</b>{marks}{k.button()}</aside>" if side else ""
    choices = [k.words.say(name) for name in ("Price", "Name", "Date")]
    order = f"<header><label>{k.say('Sort by')} {k.select(k.rng.sample(choices, 3))}</label></header>"
    return f'{filters}<main>{order}<div class="g">{offers}</div></main>'


def invoice(k: Kit) -> str:
    """A bill on paper: who pays whom, what for, until when."""
    t, u = k.theme, k.unit
    k.rule("main", f"margin:{u}px auto;max-width:{40 * k.size}px;padding:{u}px {2 * u}px;background:#fff;color:#222;"
           f"border:1px solid {t.border}")  # fmt: skip
    k.rule("table", "border-collapse:collapse;width:100%")
    k.rule("td,th", "padding:2px 4px;border-bottom:1px solid #ccc;text-align:right")
    k.rule("td:first-child,th:first-child", "text-align:left")
    k.rule(".r", "display:flex;justify-content:space-between")
    number = f"{k.rng.randint(1000, 99999)}"
    top = (
        f"{k.heading(k.words.say('Invoice') + ' ' + number)}"
        f'<div class="r"><span>{k.text(k.words.name())}</span><span>{k.say("Date")}: {k.words.date()}</span></div>'
        f'<div class="r"><span>{k.words.new("cities")}</span><span>{k.say("Due")}: {k.words.date()}</span></div>'
    )
    rows = "".join(
        f"<tr><td>{k.text(k.words.fresh(k.words.thing))}</td><td>{k.rng.randint(1, 20)}</td>"
        f"<td>{k.text(k.words.fresh(k.words.price))}</td></tr>" for _ in range(k.rows(8, 1.5, 2, 12)))  # fmt: skip
    head = f"<tr><th>{k.say('Name')}</th><th>{k.say('Quantity')}</th><th>{k.say('Price')}</th></tr>"
    total = f"<tr><th>{k.say('Total')}</th><th></th><th>{k.text(k.words.price())}</th></tr>"
    pay = f"<p>{k.button(k.words.say('Pay now'), primary=True)}</p>" if k.chance(0.6) else ""
    return f"<main>{top}<br><table>{head}{rows}{total}</table>{pay}</main>"


def seats(k: Kit) -> str:
    """Rows of numbered seats, free, taken and chosen."""
    t, u = k.theme, k.unit
    columns = max(4, min(k.count(5, 12), k.width // (3 * k.size)))
    rows = k.rows(6, 1.9, 2, 9)
    k.rule(
        ".g",
        f"display:grid;grid-template-columns:repeat({columns},1fr);gap:3px;padding:{u}px;max-width:{60 * k.size}px",
    )
    k.button("")
    k.rule(".g button", "padding:2px 0")
    k.rule(".g button:disabled", f"background:{t.border};color:{t.muted}")
    k.rule(".g .s", f"background:{t.accent};color:{t.on_accent}")
    k.rule("main", f"padding:{u}px")
    chosen, free = k.rng.randrange(rows * columns), 1 - 0.08 * k.difficulty
    made = []
    for n in range(rows * columns):
        state = ' class="s" aria-selected="true"' if n == chosen else "" if k.chance(free) else " disabled"
        made.append(f"<button{state}>{chr(65 + n // columns)}{n % columns + 1}</button>")
    k.rule("p", f"margin:{u}px 0;color:{t.muted}")
    note = f"<p>■ {k.say('Taken')}: {sum('disabled' in seat for seat in made)}</p>" if k.difficulty > 1 else ""
    go = k.button(k.words.say("Continue"), primary=True)
    return f'<main>{k.heading(k.words.say("Seats"))}<div class="g">{"".join(made)}</div>{note}{go}</main>'


def tracking(k: Kit) -> str:
    """How far an order has come."""
    t, u = k.theme, k.unit
    names = ("Ordered", "Packed", "Shipped", "Delivered")
    at = k.rng.randrange(len(names))
    k.rule("main", f"padding:{u}px {2 * u}px")
    k.rule("ol", f"margin:{u}px 0;padding:0 0 0 {u}px;list-style:none;border-left:2px solid {t.border}")
    k.rule("li", f"margin:{u}px 0;padding-left:{u}px")
    k.rule("li i", f"display:inline-block;width:{k.size}px;height:{k.size}px;border-radius:50%;margin-right:{u}px")
    k.rule("small", f"color:{t.muted}")
    steps = "".join(
        f'<li><i style="background:{t.accent if n <= at else t.border}"></i><b>{k.say(name)}</b> '
        f"<small>{k.words.date() if n <= at else '–'}</small></li>" for n, name in enumerate(names))  # fmt: skip
    what = f"<p>{k.text(k.words.fresh(k.words.thing))} · {k.text(k.words.price())}</p>" if k.difficulty > 1 else ""
    title = f"{k.words.say('Order')} {k.rng.randint(100, 9999)}"
    return f"<main>{k.heading(title)}{what}<ol>{steps}</ol>{k.buttons(k.count(1, 3))}</main>"


SHOP = (product, basket, pricing, catalogue, invoice, seats, tracking)
