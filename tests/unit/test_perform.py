"""Actions of the action space as a page sees them."""

from __future__ import annotations

import pytest

from mmagent.actions import Click, Fail, Finished, LongPress, MiddleClick, Move, TripleClick, Type
from mmagent.browser import perform, run_sync
from mmagent.geometry import ImageView

VIEW = ImageView((120, 240), (120, 240))
PAGE = """<body style="margin:0"><input id=i value="old words" style="position:absolute;left:10px;top:10px;width:200px">
<div id=hover style="position:absolute;left:20px;top:60px;width:50px;height:40px">...</div><script>
window.log = [];
addEventListener('auxclick', e => log.push(['aux', e.button, e.clientX, e.clientY]));
addEventListener('click', e => log.push(['click', e.detail, e.clientX, e.clientY]));
document.getElementById('hover').addEventListener('mouseenter', () => log.push(['over']));
</script>"""


@pytest.mark.browser
def test_each_action_reaches_the_page_where_it_says(browser_pool):
    async def work():
        async with browser_pool.page(240, 120) as page:
            await page.set_content(PAGE)
            await perform(page, TripleClick(500, 170), VIEW)
            await perform(page, Type("new"), VIEW)
            value = await page.evaluate("document.getElementById('i').value")
            before = await page.evaluate("log.splice(0)")
            await perform(page, Move(200, 600), VIEW)
            await perform(page, MiddleClick(900, 900), VIEW)
            await perform(page, Click(900.0, 850.0), VIEW)
            for ending in (Finished("x"), Fail("y")):
                await perform(page, ending, VIEW)
            with pytest.raises(TypeError, match="LongPress"):
                await perform(page, LongPress(1, 1), VIEW)
            return value, before, await page.evaluate("log")

    value, before, after = run_sync(work())
    assert value == "new"
    assert [entry[1] for entry in before] == [1, 2, 3]
    assert after == [["over"], ["aux", 1, 216, 108], ["click", 1, 216, 102]]
