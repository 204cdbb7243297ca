"""Function calling: a small shop with people, stock and a post, and a wish that takes one to three calls.

What counts is what was done: the orders and messages at the end are exactly those that the wish asks for, whatever was
looked up on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mmagent.chat import JSON, json_text
from mmagent.tasks.tools import Result, ToolError, ToolTask, tool, whole_numbers, write_call
from mmagent.trajectories import Observation, Score
from mmagent.worlds.passages import pick
from mmagent.worlds.words import CITIES, FIRST_NAMES, NOUNS

MOST = 999
Order = tuple[str, int, str]


@dataclass(frozen=True)
class Person:
    name: str
    city: str
    phone: str


@dataclass(frozen=True)
class Shop:
    """People, ``stock`` (``(item, price, left)``), the ``wish`` in words, and what fulfils it: calls that look
    something up, then what must be ordered and sent."""

    people: tuple[Person, ...]
    stock: tuple[tuple[str, int, int], ...]
    wish: str
    look_ups: tuple[str, ...]
    orders: tuple[Order, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()

    def told(self) -> str:
        return repr(self)


class ShopSession:
    """What was ordered and sent so far."""

    def __init__(self, shop: Shop):
        self.shop = shop
        self.orders: list[Order] = []
        self.messages: list[tuple[str, str]] = []

    def call(self, name: str, arguments: Mapping[str, JSON]) -> Result:
        match name:
            case "find_person":
                found = next((p for p in self.shop.people if p.name == arguments["name"]), None)
                if found is None:
                    raise ToolError("find_person: nobody of that name")
                return Result(json_text({"name": found.name, "city": found.city, "phone": found.phone}))
            case "find_item":
                item = self._item(name, arguments)
                return Result(json_text({"item": item[0], "price": item[1], "left": item[2]}))
            case "order":
                item = self._item(name, arguments)
                (count,) = whole_numbers(name, arguments, ["count"], 1, MOST)
                self.orders.append((item[0], count, str(arguments["city"])))
            case "send_message":
                self.messages.append((str(arguments["phone"]), str(arguments["text"]).strip()))
            case _:
                raise ToolError(f"no tool {name!r}")
        return Result("done")

    def judge(self, answer: str) -> Score:
        same = self.orders == list(self.shop.orders) and self.messages == list(self.shop.messages)
        return Score(float(same), {"right": float(same)})

    def _item(self, name: str, arguments: Mapping[str, JSON]) -> tuple[str, int, int]:
        found = next((one for one in self.shop.stock if one[0] == arguments["item"]), None)
        if found is None:
            raise ToolError(f"{name}: no such item; there are {', '.join(one[0] for one in self.shop.stock)}")
        return found


class FunctionTask(ToolTask[Shop]):
    """0: one call that says all; 1: where somebody lives; 2: a price to be worked out and sent; 3: what depends on what
    is left."""

    name, category, levels = "functions", "function-calling", 4
    tools = (
        tool("find_person", "City and phone number of somebody.", name="string"),
        tool("find_item", "Price of an item, and how many are left.", item="string"),
        tool("order", "Order some of an item to a city.", item="string", count="integer", city="string"),
        tool("send_message", "Send a text to a phone number.", phone="string", text="string"),
    )

    def draw(self, random: np.random.Generator, level: int) -> Shop | None:
        names, cities, items = pick(random, FIRST_NAMES, 4), pick(random, CITIES, 5), pick(random, NOUNS, 5)
        people = tuple(
            Person(name, city, "".join(str(int(d)) for d in random.integers(1, 10, size=7)))
            for name, city in zip(names, cities, strict=False)
        )
        stock = tuple((item, int(random.integers(2, 80)), int(random.integers(3, 40))) for item in items)
        who, (item, price, left), count = people[0], stock[0], int(random.integers(2, 30))
        find, look = write_call("find_person", name=who.name), write_call("find_item", item=item)
        if level == 0:
            wish = f'Order {count} of the item "{item}" to {cities[4]}.'
            return Shop(people, stock, wish, (), orders=((item, count, cities[4]),))
        if level == 1:
            wish = f'Order {count} of the item "{item}" to the city where {who.name} lives.'
            return Shop(people, stock, wish, (find,), orders=((item, count, who.city),))
        if level == 2:
            wish = f'Send {who.name} what {count} of the item "{item}" cost together: the number alone.'
            return Shop(people, stock, wish, (find, look), messages=((who.phone, str(count * price)),))
        wish = f'If there are at least {count} left of the item "{item}", order {count} to the city where {who.name} '
        wish += f"lives. If not, send {who.name} how many are left: the number alone."
        if left >= count:
            return Shop(people, stock, wish, (find, look), orders=((item, count, who.city),))
        return Shop(people, stock, wish, (find, look), messages=((who.phone, str(left)),))

    def session(self, scene: Shop) -> ShopSession:
        return ShopSession(scene)

    def opening(self, scene: Shop) -> Observation:
        return Observation(f'{scene.wish} When it is done, answer with "done".')

    def solve(self, scene: Shop) -> Iterator[str]:
        yield from scene.look_ups
        for item, count, city in scene.orders:
            yield write_call("order", item=item, count=count, city=city)
        for phone, text in scene.messages:
            yield write_call("send_message", phone=phone, text=text)
        yield "done"
