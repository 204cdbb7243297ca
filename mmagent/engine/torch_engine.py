"""The engine on plain torch: one process, DDP, FSDP2 or HSDP; float32 or bfloat16; clipping; the optimizer's step.

The gradient is the *sum* over micro-batches and ranks. DDP and FSDP2 average over ranks, so the loss is scaled up by
their number first.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import register_dataclass

from mmagent.dist import World, broadcast
from mmagent.engine.config import EngineConfig
from mmagent.engine.experts import SplitExperts, precision
from mmagent.engine.memory import memory_by_role
from mmagent.engine.meshes import RankMesh
from mmagent.engine.optim import few
from mmagent.engine.sharding import local_part, norms
from mmagent.engine.state import (
    gather_state,
    load_state,
    named_norms,
    require_owned_parameters,
    roles_of,
    set_rates,
    sharded_state,
)
from mmagent.protocols import SharesPacks, Trainable
from mmagent.types import ModelOutput, StepOutput, VisionFeatures

for _type in (StepOutput, ModelOutput, VisionFeatures):
    register_dataclass(_type)  # FSDP2 and DDP look inside a module's output for the tensors that need gradients

# DDP must not overwrite buffers such as the router bias at every forward; torch 2.13 renamed the switch
_DDP_SWITCHES = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC = {"forward_sync_buffers" if "forward_sync_buffers" in _DDP_SWITCHES else "broadcast_buffers": False}


class TorchEngine:
    """Trains ``objective`` with ``optimizer``; see :class:`mmagent.protocols.Engine`.

    ``optimizer`` must be fresh and hold every trainable parameter of ``objective``. Freezing and unfreezing between
    steps is seen at the next step.
    """

    shared_state = True  # one state for all ranks: checkpoints store it once

    def __init__(self, objective: nn.Module, optimizer: Optimizer, config: EngineConfig, world: World):
        if config.parallel == "none" and world.size > 1:
            raise ValueError(f"parallel 'none' with {world.size} ranks: each would train alone; use ddp or fsdp2")
        self.objective, self.optimizer, self.config, self.world = objective.to(world.device), optimizer, config, world
        require_owned_parameters(objective, optimizer)
        check_packs(objective, config.context_parallel, world)
        names = {id(p): name for name, p in objective.named_parameters()}
        self._experts: SplitExperts | None = None
        self._reduces_each = False
        if shared := _shared(config, world):
            self._share(RankMesh(world, shared))
        self._take_up_parameters(names)
        if config.parallel == "ddp" and hasattr(optimizer, "replicas"):
            optimizer.replicas = world.size
        self._ddp: DistributedDataParallel | None = None
        self._ddp_trains: tuple[bool, ...] = ()
        self._fsdp_trains: tuple[bool, ...] = ()
        self._reached: set[int] = set()
        self._watched: set[int] = set()
        self.parameters = dict(objective.named_parameters())
        self._roles = roles_of(optimizer)
        self._role_of = {
            id(p): self._roles.index(str(group.get("role", "")))
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self.role_norms: dict[str, float] = {}

    def _share(self, mesh: RankMesh) -> None:
        """Give each rank its part of packs, experts and weights."""
        if self.config.context_parallel > 1:
            assert isinstance(self.objective, SharesPacks)
            self.objective.share_packs(mesh.within("context").get_group())
        if self.config.expert_parallel > 1:
            self._experts = SplitExperts(self.objective, mesh, self.config.expert_parallel)
        if self.config.shards_weights:
            self._shard(mesh)
        elif self._experts is not None:
            self._experts.keep_from(self.objective)

    def _take_up_parameters(self, names: Mapping[int, str]) -> None:
        """Sharding replaces parameters: the optimizer gets those that now have the ``names`` of its own."""
        now = dict(self.objective.named_parameters())
        replaced = any(now[names[id(p)]] is not p for group in self.optimizer.param_groups for p in group["params"])
        assert not (replaced and self.optimizer.state), "the optimizer of sharded parameters must not have stepped yet"
        for group in self.optimizer.param_groups:
            group["params"] = [now[names[id(p)]] for p in group["params"]]

    def _shard(self, mesh: RankMesh) -> None:
        if scalars := [name for name, p in self.objective.named_parameters() if p.ndim == 0]:
            raise ValueError(f"FSDP2 cannot shard scalars; give these the shape (1,): {few(scalars)}")
        for tensor in (*self.objective.parameters(), *self.objective.buffers()):
            if not isinstance(tensor, DTensor):  # experts were dealt out already
                broadcast(tensor.data)  # as DDP does: rank 0 decides the initial weights
        low = torch.bfloat16 if self.config.dtype == "bfloat16" else None
        shards = mesh.within("shards")
        several_copies = shards.size() < self.world.size
        if self._experts is not None:
            self._experts.fully_shard(low, several_copies)
        for module in (*_blocks(self.objective), self.objective):
            over = mesh.copies(shards) if several_copies else shards
            fully_shard(module, mesh=over, mp_policy=precision(module, low))
        if hasattr(self.objective, "set_reduce_scatter_unused_params"):  # torch >= 2.13
            self.objective.set_reduce_scatter_unused_params(True)  # a rank may not have used what its peers did
            self._reduces_each = True

    def _module(self) -> nn.Module:
        """What to call: the objective, or its DDP wrapper, made anew whenever something was frozen or unfrozen."""
        if self.config.parallel != "ddp" or self.world.size == 1:
            return self.objective
        trains = tuple(p.requires_grad for p in self.parameters.values())
        if trains != self._ddp_trains:
            self._ddp = None
            gc.collect()  # the old wrapper hooks into the parameters until it is really gone
            self._ddp = DistributedDataParallel(
                self.objective,
                find_unused_parameters=self.config.allow_unused,
                gradient_as_bucket_view=True,
                **_NO_BUFFER_SYNC,
            )
            self._ddp_trains = trains
        assert self._ddp is not None
        return self._ddp

    def _renew_dtypes(self) -> None:
        """FSDP2 reads once, from what trains in the first step, in which dtypes gradients are reduced and kept.
        A group that was frozen then has none, and would hand on low precision once it trains."""
        trains = tuple(p.requires_grad for p in self.parameters.values())
        if self._fsdp_trains and trains != self._fsdp_trains:
            for group in self._fsdp_groups():
                group._init_mp_dtypes()
        self._fsdp_trains = trains

    def _fsdp_groups(self) -> Iterator[Any]:
        """What FSDP2 gathers and reduces together."""
        for module in self.objective.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                one = [group] if (group := getattr(state, "_fsdp_param_group", None)) else []  # before torch 2.13
                yield from getattr(state, "_fsdp_param_groups", one)

    def _watch(self) -> None:
        """Note what gradients reach: FSDP2 reduces zeros for what a micro-batch does not use, so that one is there in
        the end for each parameter. Whole parameters are there from the first forward on, and stay the same objects."""
        for group in self._fsdp_groups():
            for sharded in group.fsdp_params:
                whole = getattr(sharded, "_unsharded_param", None)
                if whole is not None and whole.requires_grad and id(whole) not in self._watched:
                    self._watched.add(id(whole))
                    whole.register_post_accumulate_grad_hook(
                        lambda _, sharded=sharded: self._reached.add(id(sharded.sharded_param))
                    )

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch. FSDP2 reduces gradients within a copy of the model after each one,
        so that between them no rank keeps more than its shard; else they travel between ranks in the last one only."""
        module = self._module()
        with ExitStack() as stack:
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
            elif isinstance(module, FSDPModule):
                self._renew_dtypes()
                module.set_requires_gradient_sync(last or self._reduces_each)
                module.set_is_last_backward(last or self._reduces_each)  # else a buffer stays until the next
                module.set_requires_all_reduce(last)
            yield
        if last and self.config.allow_unused:
            self._drop_unused()
        elif last:
            self._require_gradients()
        if last and self._experts is not None and self.config.parallel == "ddp":
            self._experts.reduce(self.parameters, self.config.allow_unused)

    def _require_gradients(self) -> None:
        """Here and not in :meth:`step`: between them are collectives, where ranks would wait for a broken one."""
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        filled = {id(p) for p in trained.values()} - self._reached if self._reduces_each else set()
        self._reached.clear()
        if unused := [name for name, p in trained.items() if p.grad is None or id(p) in filled]:
            raise ValueError(
                f"trainable, but no gradient reached: {few(unused)}. Freeze what this stage does not use, "
                f"or set the engine's allow_unused"
            )

    def _drop_unused(self) -> None:
        """A parameter that no rank used has no gradient, as under DDP: one of zeros would let its weights decay."""
        if self._reduces_each:
            trained = [p for p in self.parameters.values() if p.requires_grad]
            used = torch.tensor([float(id(p) in self._reached) for p in trained], device=self.world.device)
            for parameter, times in zip(trained, self.world.all_reduce(used).tolist(), strict=True):
                if not times:
                    parameter.grad = None
            self._reached.clear()

    def forward(self, batch: Any) -> StepOutput:
        """The objective on ``batch`` (already on the device), under autocast when ``dtype`` is bfloat16."""
        training = torch.is_grad_enabled()
        module = self._module() if training else self.objective
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            output = module(batch)
        if isinstance(module, FSDPModule) and not training:
            module.reshard()  # a backward would: what is gathered must not be what is saved or frozen next
        return output

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; the average over ranks that DDP and FSDP2 take becomes a sum."""
        if self._reduces_each:
            self._watch()
        (loss * self.world.size).backward()

    def step(self, lr_scale: float = 1.0, role_scales: Mapping[str, float] | None = None) -> float:
        """Clip, step, zero; returns the global norm before clipping. ``role_scales`` replaces ``lr_scale`` for the
        optimizer's groups of those roles.

        Raises ``FloatingPointError``, before any weight has changed, when the gradient is not finite.
        """
        with_gradient = {name: p for name, p in self.parameters.items() if p.grad is not None}
        roles = [self._role_of[id(p)] for p in with_gradient.values()]
        norm, by_role = norms([p.grad for p in with_gradient.values()], roles, len(self._roles))
        if not torch.isfinite(norm):
            bad = [n for n, p in with_gradient.items() if not torch.isfinite(local_part(p.grad)).all()]
            raise FloatingPointError(f"the gradient norm is {norm.item()}; first seen in {few(bad) or 'another rank'}")
        if self.config.clip_norm and with_gradient:
            share = torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([local_part(p.grad) for p in with_gradient.values()], share)
        set_rates(self.optimizer, lr_scale, role_scales)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total, self.role_norms = named_norms(norm, by_role, self._roles)
        return total

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes on this rank, by kind and role; see :func:`mmagent.engine.memory.memory_by_role`."""
        return memory_by_role(self.parameters.values(), self.optimizer)

    def discard(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self._reached.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, in full tensors on the host of rank 0 (``{}`` elsewhere).

        A collective. Independent of world size and of ``parallel``; learning rates are not state but configuration.
        """
        return {"optimizer": gather_state(self.optimizer, self.parameters)}

    def sharded_state_dict(self) -> dict[str, Any]:
        """The same, as every rank holds it: nothing travels. For checkpoints, which ranks write together."""
        return {"optimizer": sharded_state(self.optimizer, self.parameters)}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take up a state of :meth:`state_dict`, each rank its shard; its tensors may be those in a checkpoint's files.
        ``ValueError`` names what does not fit."""
        load_state(self.optimizer, self.parameters, state["optimizer"], strict)


def check_packs(objective: nn.Module, ranks: int, world: World) -> None:
    """Raises ``ValueError`` where ``ranks`` cannot compute one pack together."""
    if ranks > 1 and not isinstance(objective, SharesPacks):
        name = type(objective).__name__
        raise ValueError(f"context_parallel {ranks}: {name} cannot share packs between ranks, it computes whole ones")
    if ranks != world.context:
        contexts = f"context_parallel {ranks} in a world of contexts of {world.context}"
        raise ValueError(f"{contexts}: make it with_context({ranks})")


def _shared(config: EngineConfig, world: World) -> dict[str, int]:
    """How many neighbouring ranks share what; see :class:`~mmagent.engine.meshes.RankMesh`."""
    sizes = {"context": config.context_parallel, "experts": config.expert_parallel}
    if world.size % config.expert_parallel:
        groups = f"groups of {config.expert_parallel}"
        raise ValueError(f"expert_parallel {config.expert_parallel}: {world.size} ranks do not divide into {groups}")
    sizes = {name: ranks for name, ranks in sizes.items() if ranks > 1}
    if config.shards_weights:
        sizes["shards"] = config.copy_ranks(world) if config.parallel == "hsdp" else world.size
    return sizes


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of the outermost modules that can name them: the objective itself, or the models inside it."""
    if isinstance(module, Trainable):
        yield from module.blocks()
    else:
        for child in module.children():
            yield from _blocks(child)
