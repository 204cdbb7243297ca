"""Programs that models write, run where they can harm nothing. Pages that they write go to :mod:`mmagent.browser`."""

from mmagent.sandbox.sandbox import CellLimits, Outcome, Sandbox, SandboxError, SandboxUnavailable

__all__ = ["CellLimits", "Outcome", "Sandbox", "SandboxError", "SandboxUnavailable"]
