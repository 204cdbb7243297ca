"""What the generator asks of a model's weights before it serves them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

STEADY_EXPERTS = 32
"""With more, products of experts run in a kernel that knows no least number of rows."""


class HalfWritten(RuntimeError):
    """The weights are being exchanged, or were so in part: nothing is served until they are whole."""


class WeightVersions:
    """``of()`` is another one whenever a weight of ``model`` was written to, replaced, or lies elsewhere. Those that
    accelerate brings and takes are not counted. What is written in place through ``.data`` counts no versions, so who
    does that says so (``torch.autograd.graph.increment_version``, or a new version of the generator's policy)."""

    def __init__(self, model: nn.Module):
        self._model, self._found = model, 0
        self._find()

    def _find(self) -> None:
        """Once, and again where a module was replaced: :meth:`of` is asked between two tokens."""
        self._found += 1
        self._modules = tuple(self._model.modules())
        self._parents = [(m, tuple(m._modules.values())) for m in self._modules if m._modules]

    def of(self) -> tuple[int, ...]:
        if any(tuple(module._modules.values()) != children for module, children in self._parents):
            self._find()
        moved = hasattr(self._model, "hf_device_map")  # by accelerate, which makes new ones in inference mode
        numbers = [self._found]
        for module in self._modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    numbers += (0 if local.is_inference() else local._version, 0 if moved else local.data_ptr())
        return tuple(numbers)


def require_whole(model: nn.Module) -> None:
    """Ranks that share weights would have to decode in step, and wait for ever for the first that is done."""
    shared = [
        name
        for name, p in model.named_parameters()
        if hasattr(p, "ds_tensor") or (isinstance(p, DTensor) and p.device_mesh.size() > 1)  # ZeRO-3, FSDP2
    ]
    if shared:
        raise ValueError(
            f"{shared[0]} (and {len(shared) - 1} more) is shared by ranks: generate from a whole copy of the model"
        )


def require_steady(device: torch.device, experts: int) -> None:
    """Whether products of a model with so many experts are known to be the same bits in any company."""
    if device.type != "cpu" or experts > STEADY_EXPERTS:
        raise ValueError(
            f"generator.steady: known of CPUs and up to {STEADY_EXPERTS} experts, not of {device.type} and "
            f"{experts}; leave it false"
        )
