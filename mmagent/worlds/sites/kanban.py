"""The board: cards dragged, made, given away, ticked off, deleted and counted."""

from __future__ import annotations

from mmagent.worlds.pages.apps import Step
from mmagent.worlds.sites.errand import ANSWER, SUBMIT, Data, Draw, Errand, changed, choose, click, fill, row

COLUMNS = ("Ideas", "Next", "Doing", "Done")


def _board(d: Draw) -> Data:
    people = [name.split()[0] for name in d.people(4)]
    while len(set(people)) < 4:
        people = [name.split()[0] for name in d.people(4)]
    cards = []
    for n, title in enumerate(d.things(d.rng.randint(8, 12)), 1):
        steps = [{"text": text, "done": d.rng.random() < 0.3} for text in d.things(d.rng.choice((0, 2, 3)))]
        cards.append({"id": n, "title": title, "column": n % 4, "owner": d.pick(people), "due": d.rng.randint(1, 28),
                      "steps": steps})  # fmt: skip
    return {"columns": list(COLUMNS), "people": people, "cards": cards}


def drag(d: Draw) -> Errand:
    """Two cards are drawn into other columns."""
    db = _board(d)
    cards = d.rng.sample(db["cards"], 2)
    to = [d.pick([n for n in range(4) if n != card["column"]]) for card in cards]
    steps = tuple(
        Step("drag", f'[data-card="{card["id"]}"]', f'[data-column="{n}"]', spot=(0.94, 0.88), end=(0.5, 0.6))
        for card, n in zip(cards, to, strict=True)
    )

    def change(x: Data) -> None:
        for card, n in zip(cards, to, strict=True):
            row(x["cards"], id=card["id"])["column"] = n

    asked = " and ".join(f'"{card["title"]}" to {COLUMNS[n]}' for card, n in zip(cards, to, strict=True))
    return Errand("drag", f"Move the card {asked}.", db, changed(db, change), steps)


def create(d: Draw) -> Errand:
    """A new card with all its fields."""
    db = _board(d)
    card = {"id": len(db["cards"]) + 1, "title": d.words.fresh(d.words.thing), "column": d.rng.randrange(4),
            "owner": d.pick(db["people"]), "due": d.rng.randint(1, 28), "steps": []}  # fmt: skip
    column = COLUMNS[card["column"]]
    steps = (click("go|new"), *fill(title=card["title"]), *choose(column=column, owner=card["owner"]),
             *fill(due=str(card["due"])), SUBMIT)  # fmt: skip
    goal = f'Make a card "{card["title"]}" in {column} for {card["owner"]}, due on day {card["due"]}.'
    return Errand("create", goal, db, changed(db, lambda x: x["cards"].append(card)), steps)


def assign(d: Draw) -> Errand:
    """Another owner and due day for a card."""
    db = _board(d)
    card = d.pick(db["cards"])
    owner, due = d.pick([p for p in db["people"] if p != card["owner"]]), d.rng.randint(1, 28)
    steps = (click(f"go|card|{card['id']}"), *choose(owner=owner), *fill(due=str(due)), SUBMIT)
    after = changed(db, lambda x: row(x["cards"], id=card["id"]).update(owner=owner, due=due))
    return Errand("assign", f'Give the card "{card["title"]}" to {owner}, due on day {due}.', db, after, steps)


def tick(d: Draw) -> Errand:
    """All open steps of a card are ticked off."""
    db = _board(d)
    open_ = [k for k in db["cards"] if any(not s["done"] for s in k["steps"])]
    if not open_:
        return tick(d)
    card = d.pick(open_)
    left = [n for n, s in enumerate(card["steps"]) if not s["done"]]
    steps = (click(f"go|card|{card['id']}"), *(click(f"tick|{card['id']}|{n}") for n in left))

    def change(x: Data) -> None:
        for step in row(x["cards"], id=card["id"])["steps"]:
            step["done"] = True

    goal = f'Tick off everything that is still open on the card "{card["title"]}".'
    return Errand("tick", goal, db, changed(db, change), steps)


def remove(d: Draw) -> Errand:
    """A card goes."""
    db = _board(d)
    card = d.pick(db["cards"])
    after = changed(db, lambda x: x.update(cards=[k for k in x["cards"] if k["id"] != card["id"]]))
    steps = (click(f"go|card|{card['id']}"), click(f"remove|{card['id']}"))
    return Errand("remove", f'Delete the card "{card["title"]}".', db, after, steps)


def due(d: Draw) -> Errand:
    """On which day a card is due, which only the card itself tells."""
    db = _board(d)
    card = d.pick(db["cards"])
    goal = f'On which day is the card "{card["title"]}" due? Answer with the number alone.'
    steps = (click(f"go|card|{card['id']}"),)
    return Errand("due", goal, db, db, steps, str(card["due"]), tuple(str(n) for n in range(1, 29)))


def count(d: Draw) -> Errand:
    """How many cards somebody has on the whole board."""
    db = _board(d)
    owner = d.pick(db["people"])
    number = sum(k["owner"] == owner for k in db["cards"])
    goal = f"How many cards does {owner} have on the board?{ANSWER}"
    return Errand("count", goal, db, db, (), str(number), tuple(str(n) for n in range(30)))


KINDS = {
    "drag": drag, "create": create, "assign": assign, "tick": tick, "remove": remove, "due": due, "count": count,
}  # fmt: skip
