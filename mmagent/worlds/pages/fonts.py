"""Which languages the fonts of this machine can draw, asked of the browser that is to draw them."""

from __future__ import annotations

from collections.abc import Sequence

from mmagent.browser import Page
from mmagent.worlds.languages import NAMES, Language, language

PACKAGES = {"zh": "fonts-wqy-zenhei (or fonts-noto-cjk)", "ja": "fonts-noto-cjk (or fonts-wqy-zenhei)"}
"""Debian packages with the glyphs of a language; of those that are not named, any of the usual ones."""
OTHERS = "fonts-dejavu-core"
_UNASSIGNED = "\u0378\U000e0fff"  # code points that mean nothing, so that no font has them
_BLANKS = """(glyphs, missing) => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 24;
  const paint = canvas.getContext('2d', {willReadFrequently: true});
  const picture = char => {
    paint.clearRect(0, 0, 24, 24);
    paint.font = '18px sans-serif';
    paint.fillText(char, 2, 19);
    return paint.getImageData(0, 0, 24, 24).data.join();
  };
  const nothing = new Set([...missing].map(picture));
  return [...glyphs].filter(char => nothing.has(picture(char))).join('');
}"""


async def undrawable(page: Page, spoken: Language) -> str:
    """The characters of a language that the browser of ``page`` has no font for: it draws them all as one empty box."""
    return str(await page.evaluate(_BLANKS, spoken.glyphs(), _UNASSIGNED, isolated=True))


async def lacking(page: Page, codes: Sequence[str]) -> dict[str, str]:
    """Languages that cannot be drawn here, and what to do about it, in words."""
    out = {}
    for code in codes:
        if missing := await undrawable(page, language(code)):
            package = PACKAGES.get(code, OTHERS)
            out[code] = f"{NAMES[code]}: no font draws {missing[:8]!r}; install the Debian package {package}"
    return out
