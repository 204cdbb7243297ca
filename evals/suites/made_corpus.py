"""A small corpus with questions, drawn, in the layout that :mod:`evals.corpus_sets` reads."""

from __future__ import annotations

import json
from pathlib import Path

from mmagent.files import write_text
from mmagent.records import encode_image
from mmagent.tasks.search import Land, SearchTask

SEED = 710
"""Of the lands, which no other suite draws with it."""
LANDS = 12
"""Of all levels of :class:`mmagent.tasks.search.SearchTask` in turn; each gives a question in words, and one about a
picture where three emblems tell three of its cities apart."""


def make_corpus(folder: Path) -> None:
    """Write the corpus into ``folder``."""
    (folder / "images").mkdir(parents=True)
    (folder / "qrels").mkdir()
    entries: list[dict[str, str]] = []
    queries: list[dict[str, object]] = []
    qrels = ["query-id\tcorpus-id\tscore"]

    def ask(text: str, answer: str, relevant: list[str], image: str = "") -> None:
        key = f"q{len(queries)}"
        queries.append({"_id": key, "text": text, "answers": [answer]} | ({"image": image} if image else {}))
        qrels.extend(f"{key}\t{entry}\t1" for entry in relevant)

    for land in _lands():
        keys = {}
        for entry in land.entries():
            key = keys[entry.title] = f"d{len(entries)}"
            row = {"_id": key, "title": entry.title, "text": entry.text}
            if pictures := entry.shown():
                row["image"] = f"images/{key}.png"
                (folder / row["image"]).write_bytes(encode_image(pictures[0]).data)
            entries.append(row)
        ask(land.question, land.answer, [keys[title] for title in land.path])
        first, *others = land.cities[:3]
        if len({city.emblem for city in (first, *others)}) == 3:
            names = sorted(city.name for city in (first, *others))
            text = f"This is the emblem of {names[0]}, {names[1]} or {names[2]}. In which year was that city founded?"
            emblem = keys[f"Emblem of {first.name}"]
            ask(text, str(first.founded), [emblem, keys[first.name]], f"images/{emblem}.png")
    for name, rows in (("corpus", entries), ("queries", queries)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / "qrels" / "test.tsv", "\n".join(qrels) + "\n")


def _lands() -> list[Land]:
    """Lands of which no two know the same name: a question about one must have one answer in all of them."""
    tasks = [SearchTask(level) for level in range(SearchTask.levels)]
    items = [task.items("test", SEED) for task in tasks]
    known: set[str] = set()
    found: list[Land] = []
    while len(found) < LANDS:
        level = len(found) % len(tasks)
        land = tasks[level].scene(next(items[level]))
        names = {name for city in land.cities for name in (city.name, city.river)} | {who for who, _, _ in land.people}
        if not names & known:
            known |= names
            found.append(land)
    return found
