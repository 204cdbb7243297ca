"""What lmms-eval asks for by the entry point ``lmms_eval.models`` of setup.py."""

from __future__ import annotations


def manifest():
    """Where its model ``mmagent`` is. Imported by lmms-eval alone, so the package is there."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mmagent", chat_class_path="evals.bridges.lmms_model.MmagentModel")
