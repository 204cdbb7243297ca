"""What the ablation of RL asks, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

JOINT = {
    "math": "worlds/text/arithmetic/level-0",
    "physics": "worlds/physics/motion/level-0",
    "chemistry": "worlds/chemistry/mass/level-0",
    "biology": "worlds/biology/cross/level-0",
    "geometry": "worlds/geometry/angle/level-0",
    "logic-puzzle": "worlds/puzzles/pattern/level-0",
    "chart-qa": "worlds/charts/compare/level-0",
    "table-qa": "worlds/tables/lookup/level-0",
    "ocr": "worlds/documents/read/level-0",
    "formula-ocr": "worlds/formulas/latex/level-0",
    "document-qa": "worlds/documents/lookup/level-0",
    "key-information-extraction": "worlds/documents/fields/level-0",
    "vqa": "worlds/scenes/attribute/level-0",
    "counting": "worlds/counting/objects/level-0",
    "spatial-relation": "worlds/spatial/relation/level-0",
    "multi-image-comparison": "worlds/puzzles/missing/level-0",
    "spot-the-difference": "worlds/puzzles/differences/level-0",
    "geo-guess": "worlds/geo/street/level-0",
    "video-qa": "worlds/videos/direction/level-0",
    "video-temporal-grounding": "worlds/videos/when/level-0",
    "video-tracking": "worlds/videos/track/level-0",
    "box-grounding": "worlds/spatial/box/level-0",
    "pointing": "worlds/spatial/point/level-0",
    "3d-grounding": "worlds/boxes3d/box/level-0",
    "function-calling": "functions/level-0",
    "multimodal-search": "index-search/level-0",
    "visual-tool-use": "search/attribute/crop",
    "instruction-following": "worlds/instructions/rules/level-0",
    "text-code": "programs/level-0",
    "games": "games/maze/level-0",
}
"""A task, of its easiest level, of each category but those of :data:`IN_PAGES`, whose every turn waits for a browser,
and ``ui-to-code``, ``ui-polishing``, ``chart-to-code`` and ``svg-drawing``, whose answers of a hundred tokens and more
cost as much as all the others together."""
IN_PAGES = {
    "gui-perception": "perception",
    "gui-grounding": "grounding",
    "gui-step": "step/click-tab",
    "gui-trajectory": "miniwob/click-tab",
}
"""What the agent that all arms begin with is taught as well."""
NARROW = ("counting", "spatial-relation")
"""Categories that are also trained alone."""
MINIWOB = tuple(
    f"miniwob/{page}"
    for page in (
        *("click-button", "click-dialog", "click-dialog-2", "click-link", "click-option", "click-tab", "click-test"),
        *("click-test-2", "click-widget", "focus-text", "focus-text-2", "grid-coordinate", "click-color"),
        *("click-shape", "identify-shape", "click-collapsible", "click-menu", "click-shades"),
        *("simple-arithmetic", "count-shape"),
    )
)


@dataclass(frozen=True)
class Visual:
    """Screenshots to HTML, cut where they are long; a cut page is judged as it stands."""

    tasks: tuple[str, ...] = ("screenshot-to-html",)
    told: tuple[str, ...] = (
        *("collector.rollout.max_tokens=320", "collector.rollout.max_context=512", "collector.rollout.max_steps=1"),
        "collector.prompts=4",
    )
    judged: tuple[str, ...] = ("max_tokens=320", "max_steps=1")
    arms: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "rvpo": ("collector.rewards.groups={screenshot-to-html: rvpo}",),
            "absolute": ("collector.rewards.weights={screenshot-to-html: {visual: 1}}",),
        }
    )


VISUAL = Visual()


@dataclass(frozen=True)
class Size:
    """``items`` a category of right answers and ``base`` steps for the agent that all begin with, ``steps`` of RL with
    ``prompts`` each, ``fitted`` of the fine-tuning beside it on right answers to as many items; ``judged``: how agents
    are."""

    items: int
    base: int
    steps: int
    prompts: int
    fitted: int
    judged: tuple[str, ...]
    rl: tuple[str, ...]
    sft: tuple[str, ...]

    @property
    def asked(self) -> int:
        """Prompts of a whole run."""
        return self.steps * self.prompts

    def of(self, steps: int) -> Size:
        """With as many steps of RL, and of fine-tuning in proportion; 0: as it is."""
        return replace(self, steps=steps, fitted=-(-steps * self.fitted // self.steps)) if steps else self


LAPTOP_RL = (
    *("--preset", "laptop", "collector.rollout.max_steps=6", "keep=1"),
    *("pages=4", "collector.curriculum.floor=1"),
    *("collector.rollout.max_tokens=64", "collector.rollout.max_context=1024"),
)
LAPTOP_SFT = ("--preset", "laptop", "data.tokens_per_step=2048", "data.tokens_per_microbatch=1024")

SIZES = {
    "laptop": Size(
        items=30,
        base=100,
        steps=8,
        prompts=20,
        fitted=8,
        judged=("per_task=8",),
        rl=LAPTOP_RL,
        sft=LAPTOP_SFT,
    ),
    "evening": Size(
        items=400,
        base=300,
        steps=40,
        prompts=20,
        fitted=40,
        judged=("per_task=64",),  # of 16 counts seven were 1: who always said so counted well
        rl=LAPTOP_RL,
        sft=LAPTOP_SFT,
    ),
    "debug": Size(
        items=1,
        base=2,
        steps=1,
        prompts=2,
        fitted=1,
        judged=("per_task=1", "max_tokens=12", "max_steps=2"),
        rl=("--preset", "debug", "collector.rollout.max_context=1024", "pages=4", "collector.curriculum.floor=1"),
        sft=("--preset", "debug", "data.tokens_per_step=2048", "data.tokens_per_microbatch=2048"),
    ),
}
