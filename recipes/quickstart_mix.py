"""What the quickstart's stages are fed, and what they are judged on."""

from __future__ import annotations

TASKS = (
    "click-test", "click-dialog", "click-dialog-2", "click-tab", "click-button", "click-widget", "focus-text",
    "grid-coordinate",
)  # fmt: skip
"""Pages of MiniWoB++ that the quickstart trains on and is judged on, at seeds apart from each other."""
JUDGED = {"laptop": 20, "debug": 1}
"""Held-out episodes a page."""
BLINDED = {"laptop": 5, "debug": 1}
"""The same, the first of them, shown blank screens."""
PAGES = {"laptop": 8, "debug": 3}
"""Items of the suites on rendered pages."""
ANSWER = 700
"""Most tokens of an answer on those: HTML takes seconds to write, and is cut here."""
REST = {
    "pretrain": dict.fromkeys(("worlds", "code-pairs", "lessons", "changes", "page-code"), 0),
    "sft": dict.fromkeys(("solutions", "traces", "steps", "critic", "polish"), 0),
}
"""What the presets of `data_pipelines.build` hold beyond what so short a training could use."""
SAMPLES = {
    "laptop": {
        "pretrain": {
            "screens": 1600,
            "tiles": 2000,
            "pages": 300,
            "html": 100,
            "captions": 200,
            "interleaved": 60,
            "text": 200,
            **REST["pretrain"],
        },
        "sft": {"episodes": 800, "clicks": 100, "html": 60, **REST["sft"]},
        "validation": {
            "screens": 80,
            "tiles": 32,
            "pages": 10,
            "html": 6,
            "captions": 10,
            "interleaved": 4,
            "text": 10,
            "episodes": 0,
            "clicks": 0,
            **REST["pretrain"],
            **REST["sft"],
        },
    },
    "debug": {
        "pretrain": {
            "screens": 60,
            "tiles": 48,
            "pages": 20,
            "html": 10,
            "captions": 20,
            "interleaved": 20,
            "text": 20,
            **REST["pretrain"],
        },
        "sft": {"episodes": 60, "clicks": 20, "html": 10, **REST["sft"]},
        "validation": {
            "screens": 16,
            "tiles": 16,
            "pages": 4,
            "html": 0,  # none of so few may fit the 512 tokens of that size
            "captions": 4,
            "interleaved": 4,
            "text": 4,
            "episodes": 0,
            "clicks": 0,
            **REST["pretrain"],
            **REST["sft"],
        },
    },
}
VALIDATE = {"laptop": 70, "debug": 3}
"""Steps of pretraining between two looks at held-out samples."""
ASK = {"locate": 8, "step": 2, "where": 1, "what": 1, "state": 0.5, "colour": 0.5, "count": 0.3}
"""Kinds of questions: those about places. Reading takes longer than there is, and its text would cost most tokens."""
SHOWN = {"scenes": 0.2, "panels": 0.1, "tiles": 0.4, "screens": 0.3}
"""What alignment looks at."""
SHARES = {
    "pretrain": {
        "screens": 6,
        "tiles": 1.5,
        "pages": 0.5,
        "html": 0.3,
        "captions": 0.2,
        "interleaved": 0.1,
        "text": 0.1,
    },
    "sft": {"episodes": 5, "clicks": 0.5, "html": 0.2},
}
"""Shares of tokens."""
BLIND = ("captions", "interleaved", "text")
"""What can be made without a browser."""
