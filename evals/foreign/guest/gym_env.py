"""One environment of gymnasium with the interface of BrowserGym, for whoever is at the other end of the pipe."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import gymnasium
import numpy as np
from wire import serve

NAMESPACE = "browsergym/"
PACKAGES = ("browsergym-core", "playwright", "gymnasium")


def mouse_tripleclick(x: float, y: float):
    """
    Triple click a location with the left button.

    Examples:
        mouse_tripleclick(5, 236)
    """
    x, y = map_coordinates(page, x, y)  # noqa: F821 - BrowserGym pastes this source where both are known
    page.mouse.click(x, y, click_count=3)  # noqa: F821


class Host:
    """Holds the one environment that is open."""

    def __init__(self):
        self.env = None

    def known(self, modules: list[str]) -> tuple[dict, bytes]:
        """What ``modules`` register, and the versions that decide what it looks like."""
        for module in modules:
            importlib.import_module(module)
        ids = sorted(name for name in gymnasium.registry if name.startswith(NAMESPACE))
        versions = {name: _version(name) for name in (*PACKAGES, *(module.replace(".", "-") for module in modules))}
        return {"ids": ids, "versions": {name: found for name, found in versions.items() if found}}, b""

    def open(self, modules: list[str], name: str) -> tuple[dict, bytes]:
        """Make the environment ``name``, in place of the one before. By default BrowserGym's has no mouse."""
        self.leave()
        for module in modules:
            importlib.import_module(module)
        options = {}
        if importlib.util.find_spec("browsergym") and importlib.util.find_spec("browsergym.core"):
            from browsergym.core.action.highlevel import HighLevelActionSet

            subsets = ["chat", "infeas", "coord", "custom"]
            actions = HighLevelActionSet(subsets, custom_actions=[mouse_tripleclick], strict=True, demo_mode="off")
            options = {"action_mapping": actions.to_python_code}
        # what is seen is checked by the one who asked, and the checker steps once more where a value has no space
        self.env = gymnasium.make(name, disable_env_checker=True, **options)
        return {}, b""

    def reset(self, seed: int) -> tuple[dict, bytes]:
        seen, _ = self.env.reset(seed=seed)
        return told(seen, 0.0, False)

    def step(self, action: str) -> tuple[dict, bytes]:
        seen, reward, terminated, truncated, _ = self.env.step(action)
        return told(seen, float(reward), bool(terminated or truncated))

    def leave(self) -> tuple[dict, bytes]:
        env, self.env = self.env, None
        if env is not None:
            env.close()
        return {}, b""


def told(seen: dict, reward: float, done: bool) -> tuple[dict, bytes]:
    """An observation of BrowserGym without its trees, the screenshot as raw bytes behind it."""
    screen = np.ascontiguousarray(seen["screenshot"][..., :3], dtype=np.uint8)
    return {
        "shape": screen.shape,
        "goal": list(seen["goal_object"]) or [{"type": "text", "text": seen["goal"]}],
        "chat": [{"role": one["role"], "message": one["message"]} for one in seen["chat_messages"]],
        "fault": seen["last_action_error"],
        "reward": reward,
        "done": done,
    }, screen.tobytes()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    host = Host()
    serve({"known": host.known, "open": host.open, "reset": host.reset, "step": host.step, "leave": host.leave},
          at_end=host.leave)  # fmt: skip
