"""What objectives over a model with experts share: the load of its routers, from the forwards of a step to its end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmagent import dist
from mmagent.losses.balance import max_violation
from mmagent.models.agent_model import AgentModel


class RoutedObjective(nn.Module):
    """Gathers the load of a step and moves the routers' bias by ``bias_rate`` at its end."""

    def __init__(self, model: AgentModel, bias_rate: float):
        super().__init__()
        self.model = model
        self.bias_rate = bias_rate
        # Not a buffer: data-parallel wrappers overwrite buffers with those of rank 0, and this one is a local sum.
        self._load: Tensor | None = None
        self.router_load: Tensor | None = None
        """``(M, E)`` of the last whole step, over all ranks; rows as in ``model.router_names()``."""

    def gather_load(self, load_ME: Tensor) -> None:
        """Of one forward; only those that learn count."""
        if self.training and torch.is_grad_enabled():
            self._load = load_ME if self._load is None else self._load + load_ME

    def forget(self) -> None:
        """Drop the router's load of a step that is not taken."""
        self._load = self.router_load = None

    def after_step(self) -> dict[str, float]:
        """Move the router bias by the load of the whole step over all ranks, forget that load, and say how uneven it
        was (``router/max_vio``: the largest load of a layer over its mean, minus 1)."""
        if self._load is None or not self._load.numel():
            return {}
        load = dist.all_reduce(self._load)
        self._load, self.router_load = None, load
        if self.bias_rate:
            self.model.update_router_bias(load, self.bias_rate)
        violation = max_violation(load).tolist()
        layers = {f"router/max_vio_{layer}": value for layer, value in enumerate(violation)}
        return {"router/max_vio": sum(violation) / len(violation), **layers}
