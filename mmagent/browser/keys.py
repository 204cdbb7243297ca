"""Names of keys and key combinations, as DevTools' ``Input.dispatchKeyEvent`` wants them."""

from __future__ import annotations

from dataclasses import dataclass

MODIFIERS = {"alt": 1, "ctrl": 2, "control": 2, "meta": 4, "cmd": 4, "shift": 8}
_NAMED = {  # name: (DOM key, virtual key code, text)
    "Backspace": ("Backspace", 8, ""),
    "Tab": ("Tab", 9, "\t"),
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Space": (" ", 32, " "),
    "PageUp": ("PageUp", 33, ""),
    "PageDown": ("PageDown", 34, ""),
    "End": ("End", 35, ""),
    "Home": ("Home", 36, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "Insert": ("Insert", 45, ""),
    "Delete": ("Delete", 46, ""),
    **{f"F{n}": (f"F{n}", 111 + n, "") for n in range(1, 13)},
}
_LOWER = {name.lower(): name for name in _NAMED}
_ALIASES = {"return": "Enter", "esc": "Escape", "del": "Delete", "left": "ArrowLeft", "right": "ArrowRight",
            "up": "ArrowUp", "down": "ArrowDown"}  # fmt: skip
_PUNCTUATION = {";": 186, "=": 187, ",": 188, "-": 189, ".": 190, "/": 191, "`": 192, "[": 219, "\\": 220,
                "]": 221, "'": 222}  # fmt: skip
_SHIFTED = dict(zip('~!@#$%^&*()_+{}|:"<>?', "`1234567890-=[]\\;',./", strict=True))
_MODIFIER_KEYS = {1: ("Alt", "AltLeft", 18), 2: ("Control", "ControlLeft", 17), 4: ("Meta", "MetaLeft", 91),
                  8: ("Shift", "ShiftLeft", 16)}  # fmt: skip
_EDITING = {(2, "a"): "selectAll", (2, "c"): "copy", (2, "v"): "paste", (2, "x"): "cut", (2, "z"): "undo",
            (10, "z"): "redo", (2, "y"): "redo"}  # fmt: skip
"""A headless browser has no desktop to bind these, so the command travels with the key."""

KEYS = tuple(_NAMED)
"""Names accepted beside single characters; case does not matter."""


@dataclass(frozen=True)
class Stroke:
    """One key going down and up with ``modifiers`` (a bit set: alt 1, ctrl 2, meta 4, shift 8) held."""

    key: str
    code: str
    key_code: int
    text: str
    modifiers: int = 0

    def events(self) -> list[dict[str, object]]:
        """Parameters of the ``dispatchKeyEvent`` calls, modifiers going down first and up last."""
        common = {"key": self.key, "code": self.code, "windowsVirtualKeyCode": self.key_code}
        held, out = 0, []
        pressed = [bit for bit in _MODIFIER_KEYS if self.modifiers & bit]
        for bit in pressed:
            held |= bit
            name, code, key_code = _MODIFIER_KEYS[bit]
            out.append({"type": "rawKeyDown", "key": name, "code": code, "windowsVirtualKeyCode": key_code,
                        "modifiers": held})  # fmt: skip
        produces = self.text and not self.modifiers & ~8
        down: dict[str, object] = {**common, "type": "keyDown" if produces else "rawKeyDown", "modifiers": held}
        if produces:
            down["text"] = self.text
        command = _EDITING.get((self.modifiers, self.key.lower()))
        if command:
            down["commands"] = [command]
        out.append(down)
        out.append({**common, "type": "keyUp", "modifiers": held})
        for bit in reversed(pressed):
            held &= ~bit
            name, code, key_code = _MODIFIER_KEYS[bit]
            out.append({"type": "keyUp", "key": name, "code": code, "windowsVirtualKeyCode": key_code,
                        "modifiers": held})  # fmt: skip
        return out


def character(char: str) -> Stroke | None:
    """The stroke that types ``char`` on a US keyboard, or None where that keyboard has no such key."""
    if char in "\r\n":
        return Stroke("Enter", "Enter", 13, "\r")
    if char == "\t":
        return Stroke("Tab", "Tab", 9, "\t")
    if char == " ":
        return Stroke(" ", "Space", 32, " ")
    base = _SHIFTED.get(char, char.lower())
    shift = 8 if base != char else 0
    if base.isascii() and base.isalpha():
        return Stroke(char, f"Key{base.upper()}", ord(base.upper()), char, shift)
    if base.isascii() and base.isdigit():
        return Stroke(char, f"Digit{base}", ord(base), char, shift)
    if base in _PUNCTUATION:
        return Stroke(char, "", _PUNCTUATION[base], char, shift)
    return None


def parse_keys(combination: str) -> Stroke:
    """``"Enter"``, ``"a"``, ``"ctrl+a"``, ``"ctrl+shift+ArrowLeft"`` to one stroke.

    Raises ``ValueError`` naming the part that is no key; a plus sign as the key is written ``"+"``.
    """
    *held, name = combination[:-1].split("+") if combination.endswith("++") else combination.split("+")
    if combination == "+" or combination.endswith("++"):
        held, name = [part for part in (*held, name) if part], "+"
    modifiers = 0
    for part in held:
        if part.strip().lower() not in MODIFIERS:
            raise ValueError(f"{part!r} in {combination!r} is no modifier; known are {sorted(MODIFIERS)}")
        modifiers |= MODIFIERS[part.strip().lower()]
    if len(name) == 1 and name != " ":
        stroke = character(name)
    else:
        lowered = name.strip().lower()
        known = _ALIASES.get(lowered) or _LOWER.get(lowered)
        if known is None:
            raise ValueError(f"{name!r} in {combination!r} is no key; known are single characters and {list(KEYS)}")
        key, key_code, text = _NAMED[known]
        stroke = Stroke(key, known, key_code, text)
    if stroke is None:
        raise ValueError(f"{name!r} in {combination!r} is on no key; use typing for such characters")
    return Stroke(stroke.key, stroke.code, stroke.key_code, stroke.text, modifiers | stroke.modifiers)
