"""The wiki: facts over a link, corrections, new articles, old versions, and the larger of two."""

from __future__ import annotations

import copy

from mmagent.worlds.sites.errand import ANSWER, SUBMIT, Data, Draw, Errand, changed, click, fill, row, search
from mmagent.worlds.words import CITIES


def _wiki(d: Draw) -> Data:
    titles, people = d.rng.sample(CITIES, 9), d.people(9)
    numbers = d.rng.sample(range(2000, 99000), 9)
    articles = []
    for n, (title, mayor, number) in enumerate(zip(titles, people, numbers, strict=True), 1):
        twin = titles[n % 9]
        facts = {
            "Inhabitants": str(number),
            "Mayor": mayor,
            "Twin town": f"[{twin}]",
            "River": d.words.fresh(d.words.thing),
        }
        text = f"{title} is a town. {d.words.sentence()} Its twin town is [{twin}]. {d.words.sentence()}"
        articles.append({"id": n, "title": title, "text": text, "facts": facts, "history": []})
    return {"articles": articles}


def _kept(article: Data) -> Data:
    return {name: copy.deepcopy(article[name]) for name in ("title", "text", "facts")}


def hop(d: Draw) -> Errand:
    """A fact of the article that another article links to."""
    db = _wiki(d)
    article = d.pick(db["articles"])
    twin = row(db["articles"], title=article["facts"]["Twin town"].strip("[]"))
    steps = (*search(article["title"]), click(f"go|article|{article['id']}"), click(f"go|article|{twin['id']}"))
    others = tuple(a["facts"]["Mayor"] for a in db["articles"])
    goal = f"Who is the mayor of the twin town of {article['title']}?{ANSWER}"
    return Errand("hop", goal, db, db, steps, twin["facts"]["Mayor"], others)


def correct(d: Draw) -> Errand:
    """A fact of an article is changed."""
    db = _wiki(d)
    article = d.pick(db["articles"])
    fact = d.pick(("Inhabitants", "Mayor", "River"))
    new = {"Inhabitants": str(d.rng.randint(100_000, 999_999)), "Mayor": d.words.name(),
           "River": d.words.fresh(d.words.thing)}[fact]  # fmt: skip
    place = list(article["facts"]).index(fact)
    steps = (*search(article["title"]), click(f"go|article|{article['id']}"), click(f"go|edit|{article['id']}"),
             *fill(**{f"fact{place}": new}), SUBMIT)  # fmt: skip

    def change(x: Data) -> None:
        found = row(x["articles"], id=article["id"])
        found["history"].append(_kept(found))
        found["facts"][fact] = new

    goal = f'In the article {article["title"]}, change the fact "{fact}" to "{new}".'
    return Errand("correct", goal, db, changed(db, change), steps)


def create(d: Draw) -> Errand:
    """A new article."""
    db = _wiki(d)
    title = d.pick([city for city in CITIES if all(city != a["title"] for a in db["articles"])])
    text = d.words.sentence()
    article = {"id": 10, "title": title, "text": text, "facts": {}, "history": []}
    steps = (click("go|new"), *fill(title=title, text=text), SUBMIT)
    goal = f'Write a new article "{title}" with the text "{text}"'
    return Errand("create", goal, db, changed(db, lambda x: x["articles"].append(article)), steps)


def restore(d: Draw) -> Errand:
    """An older version of an article comes back."""
    db = _wiki(d)
    article = d.pick(db["articles"])
    for _ in range(2):
        article["history"].append(_kept(article))
        article["facts"]["Inhabitants"] = str(d.rng.randint(1, 999))
    chosen = d.rng.randrange(2)
    old = article["history"][chosen]["facts"]["Inhabitants"]

    def change(x: Data) -> None:
        found = row(x["articles"], id=article["id"])
        before = _kept(found)
        found.update(copy.deepcopy(found["history"][chosen]))
        found["history"].append(before)

    steps = (*search(article["title"]), click(f"go|article|{article['id']}"), click(f"go|history|{article['id']}"),
             click(f"restore|{article['id']}|{chosen}"))  # fmt: skip
    goal = f"The article {article['title']} was spoilt: restore its version with {old} inhabitants."
    return Errand("restore", goal, db, changed(db, change), steps)


def larger(d: Draw) -> Errand:
    """Which of two towns has more inhabitants."""
    db = _wiki(d)
    one, other = d.rng.sample(db["articles"], 2)
    most = max((one, other), key=lambda a: int(a["facts"]["Inhabitants"]))
    steps = (click(f"go|article|{one['id']}"), click("go|home"), click(f"go|article|{other['id']}"))
    goal = f"Which of {one['title']} and {other['title']} has more inhabitants?{ANSWER}"
    return Errand("larger", goal, db, db, steps, most["title"], (one["title"], other["title"]))


KINDS = {"hop": hop, "correct": correct, "create": create, "restore": restore, "larger": larger}
