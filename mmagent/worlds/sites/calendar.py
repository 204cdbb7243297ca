"""The calendar: new events, others moved, deleted or looked up, and a free hour."""

from __future__ import annotations

from mmagent.worlds.sites.errand import ANSWER, SUBMIT, Data, Draw, Errand, changed, choose, click, fill, row

PLACES = ("Room Oak", "Room Elm", "Room Ash", "Hall", "Library", "Garden", "Studio", "Roof")


def _calendar(d: Draw) -> Data:
    taken: set[tuple[int, int]] = set()
    events = []
    for n, title in enumerate(d.things(d.rng.randint(8, 12)), 1):
        while True:
            day, hour, length = d.rng.randint(1, 28), d.rng.randint(8, 15), d.rng.randint(1, 2)
            hours = {(day, hour + extra) for extra in range(length)}
            if not hours & taken:
                break
        taken |= hours
        events.append({"id": n, "title": title, "day": day, "hour": hour, "length": length, "place": d.pick(PLACES)})
    return {"month": d.pick(("February 2027", "February 2038", "February 2049")), "events": events}


def _clock(hour: int) -> str:
    return f"{hour:02}:00"


def _hours(length: int) -> str:
    return "1 hour" if length == 1 else f"{length} hours"


def _filled(event: Data) -> list:
    return [
        *fill(title=event["title"], day=str(event["day"])), *choose(hour=event["hour"], length=event["length"]),
        *fill(place=event["place"]), SUBMIT,
    ]  # fmt: skip


def add(d: Draw) -> Errand:
    """A new event with all its fields."""
    db = _calendar(d)
    event = {"id": len(db["events"]) + 1, "title": d.words.fresh(d.words.thing), "day": d.rng.randint(1, 28),
             "hour": d.rng.randint(8, 18), "length": d.rng.randint(1, 3), "place": d.pick(PLACES)}  # fmt: skip
    goal = (
        f'Add the event "{event["title"]}" on day {event["day"]} at {_clock(event["hour"])} for '
        f"{_hours(event['length'])}, place {event['place']}."
    )
    after = changed(db, lambda x: x["events"].append(event))
    return Errand("add", goal, db, after, (click("go|new"), *_filled(event)))


def move(d: Draw) -> Errand:
    """Another day and hour for an event that is found in the list."""
    db = _calendar(d)
    event = d.pick(db["events"])
    day = d.pick([n for n in range(1, 29) if n != event["day"]])
    hour = d.pick([n for n in range(8, 19) if n != event["hour"]])
    steps = (click("go|list"), click(f"go|event|{event['id']}"), *fill(day=str(day)), *choose(hour=hour), SUBMIT)
    after = changed(db, lambda x: row(x["events"], id=event["id"]).update(day=day, hour=hour))
    return Errand("move", f'Move "{event["title"]}" to day {day} at {_clock(hour)}.', db, after, steps)


def remove(d: Draw) -> Errand:
    """The event of a day and hour goes."""
    db = _calendar(d)
    event = d.pick(db["events"])
    steps = (click("go|list"), click(f"go|event|{event['id']}"), click(f"remove|{event['id']}"))
    after = changed(db, lambda x: x.update(events=[e for e in x["events"] if e["id"] != event["id"]]))
    goal = f"Delete the event that begins at {_clock(event['hour'])} on day {event['day']}."
    return Errand("remove", goal, db, after, steps)


def place(d: Draw) -> Errand:
    """Where an event takes place."""
    db = _calendar(d)
    event = d.pick(db["events"])
    goal = f'Where does "{event["title"]}" take place?{ANSWER}'
    return Errand("place", goal, db, db, (click(f"go|day|{event['day']}"),), event["place"], PLACES)


def free(d: Draw) -> Errand:
    """A new event at the first free hour of a day."""
    db = _calendar(d)
    day = d.pick(sorted({e["day"] for e in db["events"]}))
    busy = {e["hour"] + extra for e in db["events"] if e["day"] == day for extra in range(e["length"])}
    hour = next(n for n in range(8, 19) if n not in busy)
    event = {"id": len(db["events"]) + 1, "title": d.words.fresh(d.words.thing), "day": day, "hour": hour, "length": 1,
             "place": d.pick(PLACES)}  # fmt: skip
    goal = (
        f'Day {day}: add "{event["title"]}", 1 hour, place {event["place"]}, at the first full hour from 08:00 on that '
        "is free."
    )
    after = changed(db, lambda x: x["events"].append(event))
    return Errand("free", goal, db, after, (click(f"go|day|{day}"), click(f"go|new|{day}"), *_filled(event)))


KINDS = {"add": add, "move": move, "remove": remove, "place": place, "free": free}
