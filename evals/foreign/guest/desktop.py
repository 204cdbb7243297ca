"""One desktop of OSWorld (``desktop_env.desktop_env.DesktopEnv`` of its checkout, which is where this runs), for
whoever is at the other end of the pipe. The order and the pauses are those of its own ``lib_run_single.py``."""

from __future__ import annotations

import os
import sys
import time

from wire import serve


class Host:
    """Holds the one machine, which is started once and set back for every task."""

    def __init__(self):
        self.env = None

    def open(self, options: dict) -> tuple[dict, bytes]:
        """Start the machine, if that is not done."""
        if self.env is None:
            sys.path.insert(0, os.getcwd())
            from desktop_env.desktop_env import DesktopEnv

            self.env = DesktopEnv(action_space="pyautogui", require_a11y_tree=False, **options)
        return {}, b""

    def reset(self, task: dict, wait: float) -> tuple[dict, bytes]:
        """Set up ``task``; what is seen ``wait`` seconds later."""
        self.env.reset(task_config=task)
        time.sleep(wait)
        return told(self.env._get_obs(), False)

    def step(self, action: str, pause: float) -> tuple[dict, bytes]:
        seen, _, done, _ = self.env.step(action, pause)
        return told(seen, bool(done))

    def evaluate(self, wait: float) -> tuple[dict, bytes]:
        """What the task's own evaluator says, ``wait`` seconds after the last action."""
        time.sleep(wait)
        return {"score": float(self.env.evaluate())}, b""

    def leave(self) -> tuple[dict, bytes]:
        """The machine stays: the next task sets it back."""
        return {}, b""

    def end(self) -> None:
        """Give the machine back."""
        if self.env is not None:
            self.env.close()


def told(seen: dict, done: bool) -> tuple[dict, bytes]:
    """An observation, its screenshot (PNG or JPEG) behind it. OSWorld gives none where its machine did not answer."""
    screen = seen["screenshot"]
    if not screen:
        raise RuntimeError("the machine gave no screenshot")
    return {"done": done}, bytes(screen)


if __name__ == "__main__":
    host = Host()
    serve(
        {name: getattr(host, name) for name in ("open", "reset", "step", "evaluate", "leave")},
        at_end=host.end,
    )
