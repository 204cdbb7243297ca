"""Chart to code: gold scores 1, mistakes cost what they should, and hostile code scores 0 and harms nobody."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import islice

import pytest
from PIL import Image

from mmagent.sandbox import CellLimits, Sandbox, SandboxUnavailable
from mmagent.tasks import chart_to_code
from mmagent.tasks.chart_to_code import (
    PRELOAD,
    ChartBroken,
    ChartToCodeTask,
    GeneratedCharts,
    Mark,
    PublishedCharts,
    color_f1,
    extract_code,
    f1,
    value_f1,
)
from mmagent.testing import check_task
from mmagent.trajectories import Item

RED, BLUE = (255, 0, 0), (0, 0, 255)
BARS = """import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(4, 3))
ax.bar(["a", "b", "c"], [1, 2, 4], color=["#ff0000", "#00ff00", "#0000ff"])
ax.set_title("Sales")
"""


def with_task(work, charts=None):
    async def inside():
        async with Sandbox(preload=PRELOAD) as sandbox:
            return await work(ChartToCodeTask(sandbox, charts or GeneratedCharts()))

    try:
        return asyncio.run(inside())
    except SandboxUnavailable as error:
        pytest.skip(str(error))


class One(GeneratedCharts):
    def chart(self, item):
        from mmagent.tasks.chart_to_code import Chart

        return Chart(BARS)


ITEM = Item("chart-to-code", "x", 0)


@pytest.mark.slow
def test_the_public_kit_finds_no_fault_on_all_kinds(monkeypatch):
    """One of its hostile answers takes all the time that a program has."""
    monkeypatch.setattr(chart_to_code, "LIMITS", replace(chart_to_code.LIMITS, seconds=6.0, cpu_seconds=4.0))

    async def work(task):
        await check_task(task, count=1, seconds=12.0)
        kinds = {(await task.reference(item)).marks[0].kind for item in islice(task.items("train", 1), 12)}
        assert kinds == {"bar", "barh", "line", "pie"}

    with_task(work)


def test_each_mistake_costs_its_part():
    changes = {
        "text": BARS.replace("Sales", "Costs"),
        "type": BARS.replace("ax.bar(", "ax.barh("),
        "color": BARS.replace("#ff0000", "#00ffff"),
        "values": BARS.replace("[1, 2, 4]", "[1, 3, 4]"),
        "nothing": f"{BARS}plt.savefig('out.png', dpi=300)\nplt.close()\n",
        "empty": "import matplotlib.pyplot as plt\nplt.figure()",
    }

    async def work(task):
        return {name: (await task.compare(ITEM, code))[0] for name, code in changes.items()}

    scores = with_task(work, One())
    for name in ("text", "color", "values"):
        parts = scores[name].parts
        assert parts[name] < 1.0, name
        assert {k for k in ("text", "type", "color", "values") if parts[k] < 1} == {name}
    assert scores["type"].parts["type"] == scores["type"].parts["color"] == scores["type"].parts["values"] == 0.0
    assert scores["nothing"].value == 1.0
    assert scores["empty"].value < 0.1
    assert scores["color"].parts["color"] == pytest.approx(2 / 3)
    assert scores["values"].parts["values"] == pytest.approx(2 / 3)


HOSTILE = {
    "no code": "I am sorry, I cannot do that.",
    "a loop": "while True: pass",
    "the network": "import urllib.request; urllib.request.urlopen('http://example.com')",
    "a file": "open('/etc/passwd').read()",
    "a fork": "import os\nwhile True: os.fork()",
    "memory": "x = bytearray(8 << 30)",
    "an end": "import os; os._exit(0)",
    "an exit": "raise SystemExit(0)",
    "a huge figure": "import matplotlib.pyplot as plt; plt.figure(figsize=(2000, 2000))",
    "no figure": "x = 1",
    "a forged figure": "open('figure.png', 'w').write('no'); open('facts.json', 'w').write('[' * 100000)\n"
    "import os; os._exit(0)",
    "forged facts": "from PIL import Image; Image.new('RGB', (9, 9)).save('figure.png')\n"
    "open('facts.json', 'w').write('{\"texts\": 5, \"marks\": {}}')\nimport os; os._exit(0)",
    "links": "import os; os.symlink('/etc/passwd', 'figure.png'); os._exit(0)",
    "broken tools": "import json, matplotlib.figure\njson.dumps = None\nmatplotlib.figure.Figure.draw = None",
}


def test_hostile_code_scores_nothing_and_the_next_is_served(monkeypatch):
    monkeypatch.setattr(chart_to_code, "LIMITS", CellLimits(seconds=6.0, cpu_seconds=3.0))

    async def work(task):
        values = {}
        for name, code in HOSTILE.items():
            environment = task.environment(ITEM)
            await environment.reset()
            limit = asyncio.timeout(30)
            async with limit:
                values[name] = (await environment.step(code)).reward
        good, _ = await task.compare(ITEM, BARS)
        return values, good.value, task.sandbox.started

    values, good, started = with_task(work, One())
    assert values == dict.fromkeys(HOSTILE, 0.0)
    assert (good, started) == (1.0, 1)


def test_a_published_folder(tmp_path):
    (tmp_path / "bar_1.py").write_text(BARS + "plt.savefig('bar_1.pdf')\n")
    (tmp_path / "gone_2.py").write_text("import no_such_library")
    for name in ("bar_1", "gone_2"):
        Image.new("RGB", (12, 10), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "alone.py").write_text("")
    charts = PublishedCharts(tmp_path)
    assert len(charts) == 2

    async def work(task):
        first, second = task.items("test", 0)
        score, _ = await task.compare(first, BARS)
        with pytest.raises(ChartBroken, match="gone_2: its own code draws nothing here: ModuleNotFoundError"):
            await task.compare(second, BARS)
        return (await task.shown(first)).shape, score.value

    assert with_task(work, charts) == ((10, 12, 3), 1.0)
    with pytest.raises(ValueError, match=r"no NAME\.py"):
        PublishedCharts(tmp_path / "none")


def test_figures_by_hand():
    assert f1("aab", "abb") == pytest.approx(2 / 3)
    assert f1("", "") == 1.0
    assert f1("a", "") == 0.0
    reds = [Mark("bar", RED, (1.0,)), Mark("bar", RED, (2.0,))]
    assert color_f1(reds, reds) == 1.0
    assert color_f1(reds, [Mark("bar", BLUE, ()), Mark("bar", RED, ())]) == pytest.approx(0.5)
    assert color_f1(reds, [Mark("line", RED, ())]) == 0.0
    assert value_f1(reds, [Mark("bar", BLUE, (1.02, 2.0))]) == 1.0
    assert value_f1(reds, [Mark("bar", BLUE, (1.1, 2.0, 9.0))]) == pytest.approx(4 / 5)
    assert value_f1([Mark("bar", RED, (1.5,))], [Mark("bar", RED, (1.0, 2.0))]) == 0.0


def test_code_is_found_in_an_answer():
    assert extract_code("Here:\n```python\nx = 1\n```\nDone.") == "x = 1"
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("```py\nx = 1") == "x = 1"
    assert extract_code("  \n") is None
