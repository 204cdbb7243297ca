"""What a rank's parameters, gradients and optimizer state hold, by role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from mmagent.engine.sharding import local_part


def memory_by_role(parameters: Iterable[Tensor], optimizer: Optimizer) -> dict[str, dict[str, int]]:
    """Bytes on this rank: ``{"parameters": {role: n}, "gradients": ..., "optimizer": ...}``.

    Of sharded tensors its own share; what is gathered for a moment is not seen. Gradients are counted as they stand
    between backward and step: one for each parameter that trains. Parameters that the optimizer does not hold have the
    role ``other``.
    """
    roles = {id(p): str(group.get("role") or "other") for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Counter[str]] = {"parameters": Counter(), "gradients": Counter(), "optimizer": Counter()}
    for parameter in parameters:
        role, size = roles.get(id(parameter), "other"), local_part(parameter).nbytes
        found["parameters"][role] += size
        found["gradients"][role] += size if parameter.requires_grad else 0
        state = optimizer.state.get(parameter, {}).values()
        found["optimizer"][role] += sum(local_part(value).nbytes for value in state if isinstance(value, Tensor))
    return {kind: {role: size for role, size in sizes.items() if size} for kind, sizes in found.items()}
