"""The shop: buying, finding the cheapest, wishes, the basket, cancelling, prices, and what is not sold."""

from __future__ import annotations

from mmagent.worlds.sites.errand import ANSWER, SUBMIT, Data, Draw, Errand, changed, choose, click, fill, row, search

PAGE = 6
"""Products on a page."""
CATEGORIES = ("Kitchen", "Garden", "Office", "Travel")


def _shop(d: Draw) -> Data:
    names = d.things(d.rng.randint(14, 22))
    prices = d.rng.sample(range(305, 9900), len(names))
    products = [
        {"id": n, "name": name, "category": d.pick(CATEGORIES), "price": price, "rating": d.rng.randint(1, 5),
         "text": d.words.sentence()}
        for n, (name, price) in enumerate(zip(names, prices, strict=True), 1)
    ]  # fmt: skip
    orders = []
    for n in range(1, 4):
        mine = d.rng.sample(products, 2)
        lines = {str(p["id"]): d.rng.randint(1, 3) for p in sorted(mine, key=lambda p: p["id"])}
        orders.append({"id": n, "name": d.words.name(), "address": _address(d), "delivery": "Standard", "state": "open",
                       "lines": lines})  # fmt: skip
    return {"products": products, "basket": {}, "wishes": [], "orders": orders}


def _address(d: Draw) -> str:
    return f"{d.rng.randint(1, 99)} {d.pick(('High', 'Mill', 'Park', 'Lake'))} Street"


def _price(cents: int) -> str:
    return f"${cents / 100:.2f}"


def buy(d: Draw) -> Errand:
    """Several pieces of a product, ordered with name, address and delivery."""
    db = _shop(d)
    product, count = d.pick(db["products"]), d.rng.randint(2, 5)
    name, address, delivery = d.words.name(), _address(d), d.pick(("Standard", "Express", "Pick-up"))
    order = {"id": 4, "name": name, "address": address, "delivery": delivery, "state": "open",
             "lines": {str(product["id"]): count}}  # fmt: skip
    steps = [
        *search(product["name"]), click(f"go|product|{product['id']}"), *fill(count=str(count)), SUBMIT,
        click("go|basket"), click("go|checkout"), *fill(name=name, address=address), *choose(delivery=delivery), SUBMIT,
    ]  # fmt: skip
    goal = f'Buy {count} pieces of "{product["name"]}" for {name}, {address}, with delivery "{delivery}".'
    return Errand("buy", goal, db, changed(db, lambda x: x["orders"].append(order)), tuple(steps))


def cheapest(d: Draw) -> Errand:
    """The cheapest product of a category that is good enough goes into the basket."""
    db = _shop(d)
    db["products"][0]["rating"] = 3  # one at least is good
    good = [p for p in db["products"] if p["rating"] >= 3]
    category = d.pick(sorted({p["category"] for p in good}))
    best = min((p for p in good if p["category"] == category), key=lambda p: p["price"])
    cheaper = sum(p["category"] == category and p["price"] < best["price"] for p in db["products"])
    turn = [click(f"page|{cheaper // PAGE}")] if cheaper >= PAGE else []
    steps = [click(f"category|{category}"), click("sort|Price"), *turn, click(f"go|product|{best['id']}"), SUBMIT]
    goal = f"Put one piece of the cheapest product in {category} that has at least three stars into the basket."
    return Errand("cheapest", goal, db, changed(db, lambda x: x["basket"].update({str(best["id"]): 1})), tuple(steps))


def wishes(d: Draw) -> Errand:
    """The list of wishes loses one product and gains two."""
    db = _shop(d)
    old, *new = d.rng.sample(db["products"], 3)
    db["wishes"] = [old["id"]]
    steps = [click("go|wishes"), click(f"unwish|{old['id']}"), click("go|home")]
    for product in new:
        steps += [*search(product["name"]), click(f"go|product|{product['id']}"), click(f"wish|{product['id']}")]
        steps.append(click("go|home"))
    goal = f'Remove "{old["name"]}" from the wishes and add "{new[0]["name"]}" and "{new[1]["name"]}".'
    after = changed(db, lambda x: x.update(wishes=sorted(p["id"] for p in new)))
    return Errand("wishes", goal, db, after, tuple(steps))


def basket(d: Draw) -> Errand:
    """A basket that is filled already is changed."""
    db = _shop(d)
    out, more, kept = d.rng.sample(db["products"], 3)
    counts = {out["id"]: 1, more["id"]: d.rng.randint(1, 2), kept["id"]: d.rng.randint(1, 3)}
    db["basket"] = {str(i): counts[i] for i in sorted(counts)}
    wanted = counts[more["id"]] + d.rng.randint(1, 2)
    steps = [click("go|basket"), click(f"drop|{out['id']}")]
    steps += [click(f"more|{more['id']}")] * (wanted - counts[more["id"]])

    def change(x: Data) -> None:
        del x["basket"][str(out["id"])]
        x["basket"][str(more["id"])] = wanted

    goal = f'In the basket, remove "{out["name"]}" and make it {wanted} pieces of "{more["name"]}". Do not order yet.'
    return Errand("basket", goal, db, changed(db, change), tuple(steps))


def cancel(d: Draw) -> Errand:
    """The order that a product is part of is cancelled."""
    db = _shop(d)
    order = d.pick(db["orders"])
    others = {key for o in db["orders"] if o is not order for key in o["lines"]}
    mine = next((key for key in order["lines"] if key not in others), None)
    if mine is None:
        return cancel(d)
    name = row(db["products"], id=int(mine))["name"]
    after = changed(db, lambda x: row(x["orders"], id=order["id"]).update(state="cancelled"))
    steps = (click("go|orders"), click(f"cancel|{order['id']}"))
    return Errand("cancel", f'Cancel the order that "{name}" is part of.', db, after, steps)


def price(d: Draw) -> Errand:
    """What a product costs."""
    db = _shop(d)
    product = d.pick(db["products"])
    goal = f'What does "{product["name"]}" cost?{ANSWER}'
    prices = tuple(f"{p['price'] / 100:.2f}" for p in db["products"])
    return Errand("price", goal, db, db, tuple(search(product["name"])), _price(product["price"])[1:], prices)


def missing(d: Draw) -> Errand:
    """A product that is not sold: nothing can be done, which is to be said."""
    db = _shop(d)
    gone = db["products"].pop(d.rng.randrange(len(db["products"])))
    if any(str(gone["id"]) in order["lines"] for order in db["orders"]):
        return missing(d)
    goal = f'Put one piece of "{gone["name"]}" into the basket.'
    return Errand("missing", goal, db, db, tuple(search(gone["name"])), possible=False)


KINDS = {
    "buy": buy, "cheapest": cheapest, "wishes": wishes, "basket": basket, "cancel": cancel, "price": price,
    "missing": missing,
}  # fmt: skip
