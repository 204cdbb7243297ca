"""Which MiniWoB++ pages run here, what they are about, and why the others do not run."""

from __future__ import annotations

from mmagent.worlds.miniwob.experts import TASKS

UNTAUGHT: tuple[str, ...] = (
    "button-delay", "buy-ticket", "choose-date-nodelay", "click-menu", "count-sides", "daily-calendar", "drag-circle",
    "drag-items", "drag-items-grid", "drag-shapes", "drag-shapes-2", "drag-single-shape", "drag-sort-numbers",
    "draw-circle", "draw-line", "highlight-text", "highlight-text-2", "hot-cold", "hover-shape", "multi-layouts",
    "resize-textarea", "search-engine", "text-editor", "use-autocomplete", "use-autocomplete-nodelay",
)  # fmt: skip
"""Pages that run and have no expert: they can be judged and trained on by their own reward, not demonstrated. Each
showed the same for the same seed and actions in all of several pairs of episodes, on used and on fresh pages."""
RUNNING: tuple[str, ...] = tuple(sorted((*TASKS, *UNTAUGHT)))
_UNSTEADY = "did not show the same again for the same seed and actions"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("chase-circle", "moving-items", "simon-says", "stock-market", "drag-cube"), "moves by the clock"),
    **dict.fromkeys(("copy-paste", "copy-paste-2"), "needs a clipboard, which all pages of a browser share"),
    **dict.fromkeys(("click-pie", "click-pie-nodelay"), "re-inserts its first slice whenever the pointer enters it"),
    **dict.fromkeys(
        ("choose-list", "click-scroll-list", "enter-date", "enter-time", "form-sequence-3"),
        "opens a window of the browser's own, of which no picture comes",
    ),
    **dict.fromkeys(
        (
            "book-flight", "book-flight-nodelay", "choose-date", "choose-date-easy", "choose-date-medium",
            "click-menu-2", "email-inbox", "email-inbox-delete", "email-inbox-forward", "email-inbox-forward-nl",
            "email-inbox-forward-nl-turk", "email-inbox-important", "email-inbox-nl-turk", "email-inbox-noscroll",
            "email-inbox-reply", "email-inbox-star-reply", "order-food", "scroll-text", "scroll-text-2",
            "social-media", "social-media-all", "social-media-some", "terminal", "tic-tac-toe", "use-colorwheel",
            "use-colorwheel-2", "use-slider-2",
        ),
        _UNSTEADY,
    ),
}  # fmt: skip
"""Pages that are in the package and do not run here, and why: an environment must be a function of seed and actions."""
_BEGINNINGS = (
    ("click-checkboxes", "forms"), ("click-tab", "menus"),
    ("click-collapsible", "menus"), ("click-menu", "menus"), ("click-option", "forms"), ("click-list", "menus"),
    ("click-scroll", "menus"), ("click", "clicking"), ("button", "clicking"), ("focus-text", "clicking"),
    ("hover", "clicking"), ("drag", "dragging and drawing"), ("draw", "dragging and drawing"),
    ("highlight", "dragging and drawing"), ("resize", "dragging and drawing"), ("use-slider", "dragging and drawing"),
    ("use", "forms"), ("choose", "forms"), ("daily-calendar", "forms"), ("enter", "typing"), ("login", "typing"),
    ("text", "typing"), ("unicode", "typing"), ("find-word", "reading"), ("read-table", "reading"),
    ("phone-book", "reading"), ("search-engine", "reading"), ("multi", "forms"), ("form", "forms"),
    ("number-checkboxes", "forms"), ("sign-agreement", "forms"), ("buy-ticket", "forms"),
    ("navigate-tree", "menus"),
    ("bisect", "shapes and places"), ("circle", "shapes and places"), ("right-angle", "shapes and places"),
    ("grid", "shapes and places"), ("find-midpoint", "shapes and places"), ("identify-shape", "shapes and places"),
    ("count", "shapes and places"), ("hot-cold", "shapes and places"),
)  # fmt: skip
_REST = "numbers"


def group_of(page: str) -> str:
    """What a page is about. Raises ``ValueError`` for one that does not run."""
    if page not in RUNNING:
        why = LEFT_OUT.get(page)
        raise ValueError(f"MiniWoB++ page {page!r} does not run here" + (f": it {why}" if why else ""))
    return next((group for beginning, group in _BEGINNINGS if page.startswith(beginning)), _REST)
