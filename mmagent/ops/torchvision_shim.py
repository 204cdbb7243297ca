"""Make ``import torchvision`` work where only a CUDA-built wheel exists for a CPU build of torch.

Such a wheel registers its operators from a library that cannot load, and then fails to attach shape
functions to operators that are not there. timm and most transformers model classes import torchvision
unconditionally, so they fail with it. Nothing here is needed, or done, where torchvision imports.
"""

from __future__ import annotations

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_fragments: list[torch.library.Library] = []  # a Library object owns its definitions: keep it alive


def ensure_torchvision() -> None:
    """Import torchvision, defining the two missing operator schemas first if that is what it lacks.

    Call it before the first import of timm or of a transformers model class. The operators themselves
    (non-maximum suppression, native jpeg decoding) stay unavailable where the wheel does not fit.
    """
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            fragment.define(schema)
        _fragments.append(fragment)
        import torchvision  # noqa: F401  (the import is the effect)
