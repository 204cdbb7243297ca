"""Mail: answering, writing, putting away, starring what says something, finding a code."""

from __future__ import annotations

from mmagent.worlds.sites.errand import ANSWER, SUBMIT, Data, Draw, Errand, changed, click, fill, row, search


def _mail(d: Draw) -> Data:
    people = d.people(6)
    address = {
        who: who.lower().replace(" ", ".") + "@" + d.pick(("home", "work", "post")) + ".example" for who in people
    }
    letters = []
    for n, subject in enumerate(d.things(d.rng.randint(11, 15)), 1):
        who = people[n % 6] if n <= 6 else d.pick(people)
        code = f"{d.pick('ABCDEFGH')}{d.pick('KLMNPRST')}{d.rng.randint(100, 999)}"
        text = f"{d.words.sentence()} Your code is {code}. {d.words.sentence()}"
        letters.append({"id": n, "folder": "Inbox" if n <= 9 else "Archive", "who": who, "address": address[who],
                        "subject": subject, "text": text, "star": False})  # fmt: skip
    return {"letters": letters}


def _code(letter: Data) -> str:
    return letter["text"].partition("Your code is ")[2][:5]


def _inbox(db: Data) -> list[Data]:
    return [m for m in db["letters"] if m["folder"] == "Inbox"]


def reply(d: Draw) -> Errand:
    """An answer to a letter, with a given text."""
    db = _mail(d)
    letter, text = d.pick(_inbox(db)), d.words.sentence()
    sent = {"id": len(db["letters"]) + 1, "folder": "Sent", "who": letter["who"], "address": letter["address"],
            "subject": f"Re: {letter['subject']}", "text": text, "star": False}  # fmt: skip
    steps = [*search(letter["subject"]), click(f"go|letter|{letter['id']}"), click(f"go|reply|{letter['id']}"),
             *fill(text=text), SUBMIT]  # fmt: skip
    goal = f'Reply to the letter "{letter["subject"]}" from {letter["who"]} with the text "{text}"'
    return Errand("reply", goal, db, changed(db, lambda x: x["letters"].append(sent)), tuple(steps))


def send(d: Draw) -> Errand:
    """A letter to somebody whose address must be looked up."""
    db = _mail(d)
    known, subject, text = d.pick(_inbox(db)), d.things(1)[0], d.words.sentence()
    sent = {"id": len(db["letters"]) + 1, "folder": "Sent", "who": known["who"], "address": known["address"],
            "subject": subject, "text": text, "star": False}  # fmt: skip
    steps = [click(f"go|letter|{known['id']}"), click("go|write"),
             *fill(to=known["address"], subject=subject, text=text), SUBMIT]  # fmt: skip
    goal = (
        f'Write a new letter to {known["who"]}, whose address is in their letters, subject "{subject}", text "{text}"'
    )
    return Errand("send", goal, db, changed(db, lambda x: x["letters"].append(sent)), tuple(steps))


def archive(d: Draw) -> Errand:
    """All letters of one sender leave the inbox."""
    db = _mail(d)
    who = d.pick(sorted({m["who"] for m in _inbox(db)}))
    mine = [m["id"] for m in _inbox(db) if m["who"] == who]
    steps = [step for i in mine for step in (click(f"go|letter|{i}"), click(f"move|{i}|Archive"))]

    def change(x: Data) -> None:
        for i in mine:
            row(x["letters"], id=i)["folder"] = "Archive"

    return Errand("archive", f"Move every letter from {who} in the inbox to the archive.", db, changed(db, change),
                  tuple(steps))  # fmt: skip


def star(d: Draw) -> Errand:
    """A star for the letter of which only the text tells which it is."""
    db = _mail(d)
    letter = d.pick(_inbox(db))
    after = changed(db, lambda x: row(x["letters"], id=letter["id"]).update(star=True))
    steps = (click(f"go|letter|{letter['id']}"), click(f"star|{letter['id']}"))
    goal = f"Put a star on the letter in the inbox, from {letter['who']}, that holds the code {_code(letter)}."
    return Errand("star", goal, db, after, steps)


def delete(d: Draw) -> Errand:
    """A letter of another folder is thrown away."""
    db = _mail(d)
    letter = d.pick([m for m in db["letters"] if m["folder"] == "Archive"])
    after = changed(db, lambda x: row(x["letters"], id=letter["id"]).update(folder="Trash"))
    steps = (click("folder|Archive"), click(f"go|letter|{letter['id']}"), click(f"move|{letter['id']}|Trash"))
    return Errand("delete", f'Delete the letter "{letter["subject"]}", which is in the archive.', db, after, steps)


def code(d: Draw) -> Errand:
    """The code in a letter."""
    db = _mail(d)
    letter = d.pick(db["letters"])
    steps = ([click(f"folder|{letter['folder']}")] if letter["folder"] != "Inbox" else []) + [
        click(f"go|letter|{letter['id']}")
    ]
    goal = f'Which code does the letter "{letter["subject"]}" from {letter["who"]} hold?{ANSWER}'
    return Errand("code", goal, db, db, tuple(steps), _code(letter), tuple(map(_code, db["letters"])))


KINDS = {"reply": reply, "send": send, "archive": archive, "star": star, "delete": delete, "code": code}
