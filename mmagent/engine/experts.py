"""Expert parallelism under the torch engine: who holds which experts, and how their gradients add up.

``ranks`` neighbours hold the experts of a layer together, each its share; the groups of so many ranks are replicas of
one another. All ranks have data of their own. Tokens travel within a group, so the backward has already summed an
expert's gradient over its group; what is left is the sum over replicas.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from mmagent import dist
from mmagent.engine.meshes import RankMesh
from mmagent.engine.sharding import local_part
from mmagent.protocols import ExpertParallel


class SplitExperts:
    """Deals the experts of ``objective`` out to groups of ``ranks``; their parameters become new objects.

    Raises ``ValueError`` where there are none, or where experts do not divide.
    """

    def __init__(self, objective: nn.Module, mesh: RankMesh, ranks: int):
        self.modules = [module for module in objective.modules() if isinstance(module, ExpertParallel)]
        if not self.modules:
            raise ValueError(f"expert_parallel {ranks}: {type(objective).__name__} has no experts that ranks can share")
        self.mesh, self.world = mesh, mesh.world
        for module in self.modules:
            for tensor in module.parameters():
                dist.broadcast(tensor.data)  # rank 0 decides the initial weights, as it does for all others
            module.split_experts(mesh.within("experts"))
        own = {id(p) for module in self.modules for p in module.parameters()}
        self.names = [name for name, p in objective.named_parameters() if id(p) in own]

    def keep_from(self, objective: nn.Module) -> None:
        """Tell DDP to leave these parameters alone."""
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, self.names)

    def fully_shard(self, low: torch.dtype | None, several_copies: bool) -> None:
        """Each share once more over the replicas within a copy of the model, as an FSDP unit of its own, gathered in
        ``low``; with ``several_copies`` gradients are added up over these as well."""
        shards = self.mesh.within("shards", "experts")
        for module in self.modules:
            policy, mesh = precision(module, low), self.mesh.copies(shards) if several_copies else shards
            along = partial(_along, shards.size())
            fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=along)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(float(self.world.size))  # what every other gradient is divided by
            # gloo cannot multiply before it sums; where there is nothing to sum, torch 2.13 would divide twice
            module.set_force_sum_reduction_for_comms(shards.size() > 1)

    def reduce(self, parameters: dict[str, nn.Parameter], allow_unused: bool) -> None:
        """Under DDP: average over all ranks the gradients that the backward has summed within each group.

        With ``allow_unused`` a replica may have no gradient where another has one, and joins with zeros.
        """
        own = [parameters[name] for name in self.names if parameters[name].requires_grad]
        if allow_unused:
            used = torch.tensor([float(p.grad is not None) for p in own], device=self.world.device)
            for parameter, times in zip(own, dist.all_reduce(used).tolist(), strict=True):
                if times and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [local_part(p.grad) for p in own if p.grad is not None]
        dist.all_reduce_each(gradients, self.mesh.within("world", "experts").get_group())
        if gradients:
            torch._foreach_div_(gradients, self.world.size)


def _along(replicas: int, parameter: nn.Parameter) -> Shard:
    """Whole experts where there are enough of them, as Muon then has nothing to gather; else rows or columns."""
    shape = local_part(parameter).shape
    return Shard(next((dim for dim in range(len(shape)) if shape[dim] % replicas == 0), 0))


def precision(module: nn.Module, low: torch.dtype | None) -> MixedPrecisionPolicy:
    """How FSDP2 gathers the parameters of ``module`` (in ``low``, unless it says ``full_precision``) and reduces its
    gradients (in float32)."""
    dtype = None if getattr(module, "full_precision", False) else low
    # without low precision nothing is converted, and torch 2.13 must not try: it fails on what no step has gathered yet
    reduce = None if dtype is None else torch.float32
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)
