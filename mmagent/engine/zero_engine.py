"""The engine on DeepSpeed's ZeRO (arXiv 1910.02054): optimizer state, gradients, weights spread over ranks.

DeepSpeed partitions, gathers and reduces; norm, clipping and the optimizer's step are ours, so that they are those of
:class:`~mmagent.engine.torch_engine.TorchEngine`. The optimizer works on *slices*: the part of each parameter that lies
in this rank's partition, a flat view that says how the whole is cut (:class:`~mmagent.engine.sharding.Cut`).

Parameters stay in float32, and their values are the one truth: nothing else has to be saved, loaded or averaged. In
bfloat16 the forward runs under autocast. The gradient is the *sum* over micro-batches and ranks: DeepSpeed averages
over ranks, so the loss is scaled up by their number first.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.config import ZERO, EngineConfig
from mmagent.engine.meshes import RankMesh
from mmagent.engine.optim import few
from mmagent.engine.sharding import Cut, local_part, norms, tagged
from mmagent.engine.state import (
    gather_state,
    load_state,
    named_norms,
    require_owned_parameters,
    roles_of,
    set_rates,
    sharded_state,
)
from mmagent.engine.torch_engine import check_packs
from mmagent.protocols import SharesPacks, Trainable
from mmagent.types import StepOutput

_BUCKET = 1 << 28  # elements that are reduced together, at most: a buffer of so many float32


class ZeroEngine:
    """Trains ``objective`` with ``optimizer`` under ZeRO; see :class:`mmagent.protocols.Engine`.

    ``optimizer`` must be fresh and hold every trainable parameter of ``objective``: any that works element by element
    (SGD, AdamW), or ours, whose Muon puts matrices together. What is frozen and unfrozen between steps is seen at the
    next step; DeepSpeed is then set up anew, and state is carried over to the bit.
    """

    shared_state = True  # one state for all ranks: checkpoints store it once

    def __init__(self, objective: nn.Module, optimizer: Optimizer, config: EngineConfig, world: World):
        self._deepspeed = _start_deepspeed(world, config)
        self.stage = ZERO[config.parallel]
        self.objective, self.optimizer, self.config, self.world = objective.to(world.device), optimizer, config, world
        require_owned_parameters(objective, optimizer)
        check_packs(objective, config.context_parallel, world)
        if config.context_parallel > 1:
            assert isinstance(objective, SharesPacks)
            mesh = RankMesh(world, {"context": config.context_parallel})
            objective.share_packs(mesh.within("context").get_group())
        for tensor in (*objective.parameters(), *objective.buffers()):
            dist.broadcast(tensor.data)  # rank 0 decides the initial weights
        self.parameters = dict(objective.named_parameters())
        if odd := [n for n, p in self.parameters.items() if p.dtype != torch.float32]:
            raise ValueError(
                f"{config.parallel} trains float32 parameters (engine.dtype says what they compute in): {few(odd)}"
            )
        self._leaves = list(_leaves(objective)) if self.stage == 3 else []
        self._in_leaves = {id(p) for leaf in self._leaves for p in leaf.parameters()}
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._groups = [[self._names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._roles = roles_of(optimizer)
        self._role_of = {
            name: str(group.get("role", ""))
            for names, group in zip(self._groups, optimizer.param_groups, strict=True)
            for name in names
        }
        self.role_norms: dict[str, float] = {}
        self._slices = {name: _resting(tuple(p.shape), p.device) for name, p in self.parameters.items()}
        self._in_flat: dict[int, list[tuple[str, int]]] = {}
        self._share: Tensor | float = 1.0
        self._engine: Any = None
        self._trains: tuple[bool, ...] = ()
        self._hooks: list[Any] = []
        self._calls: Counter[nn.Module] = Counter()
        self._set_up()

    # ------------------------------------------------------------------------------------------ DeepSpeed's engine

    def _set_up(self) -> None:
        """DeepSpeed for what trains now. A collective."""
        trains = tuple(p.requires_grad for p in self.parameters.values())
        if trains == self._trains:
            return
        if not any(trains):
            raise ValueError(f"{self.config.parallel}: every parameter is frozen, nothing would train")
        self._tear_down()
        for leaf in self._leaves:
            self._deepspeed.utils.set_z3_leaf_module(leaf, True)
        groups = [[self.parameters[n] for n in names if self.parameters[n].requires_grad] for names in self._groups]
        outer = _StepByFlat([{"params": some, "lr": 0.0} for some in groups if some], self._step_flat)
        numel = sum(getattr(p, "ds_numel", p.numel()) for some in groups for p in some)
        config = _deepspeed_config(self.stage, self.config.dtype, min(numel, _BUCKET))
        self._engine, *_ = self._deepspeed.initialize(
            model=self.objective, optimizer=outer, config=config, dist_init_required=False
        )
        self._trains = trains
        if self.stage == 3:
            self._hooks = [m.register_forward_hook(_fetch_before_backward) for m in self.objective.modules()]
            for handle in self._zero._leaf_module_hooks:
                _reduce_after_last_call(handle, self._calls)
            self._hooks += [leaf.register_forward_pre_hook(self._count_call) for leaf in self._zero.leaf_parameters]
        self._cut_anew()

    def _count_call(self, leaf: nn.Module, inputs: tuple[Any, ...]) -> None:
        """How often a leaf's backward will run in this micro-batch: a head for several depths is called as often."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:  # computed again, in a backward
            return
        if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            raise ValueError(
                f"{type(leaf).__name__} is a leaf that trains on inputs that do not: ZeRO-3 would reduce its gradients "
                f"before they are there; train what feeds it, freeze it, or use fsdp2"
            )
        self._calls[leaf] += 1

    def _tear_down(self) -> None:
        if self._engine is None:
            return
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
        for module in self.objective.modules():
            for left in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining"):
                module.__dict__.pop(left, None)  # they would call the engine that is gone
        for parameter in self.parameters.values():
            parameter.grad = None
            if self.stage == 3:
                parameter.ds_tensor.data = parameter.ds_tensor.data.clone()  # not a view of all its group
            else:
                parameter.data = parameter.data.clone()
        self._engine = None
        gc.collect()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _cut_anew(self) -> None:
        """Slices of DeepSpeed's flat partitions replace those before in the optimizer, with their state."""
        self._in_flat, fresh = {}, {}
        for flat, name, start, cut in self._layout():
            stop = start + cut.sizes[self.world.rank]
            fresh[name] = tagged(flat.detach()[start:stop], cut)
            self._in_flat.setdefault(id(flat), []).append((name, start))
        state = self.optimizer.state
        for name, old in self._slices.items():
            new = fresh.setdefault(name, _resting(old.cut.shape, old.device))
            kept = state.pop(old, {})
            if kept and new.cut != old.cut:
                kept = {k: _recut(v, old.cut, new.cut) for k, v in kept.items()}
            if kept:
                state[new] = kept
        self._slices = fresh
        for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [fresh[name] for name in names]

    def _layout(self) -> Iterator[tuple[Tensor, str, int, Cut]]:
        """Of each trained parameter: the partition it lies in, its name, where its part begins there, how it is cut."""
        zero, ranks, rank = self._zero, self.world.size, self.world.rank
        if self.stage == 3:
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                start = 0
                for p in group:
                    yield flat, self._names[id(p)], start, Cut.even(p.ds_shape, ranks)
                    start += p.partition_numel()
            return
        for n, flat in enumerate(zero.single_partition_of_fp32_groups):
            size = zero.partition_size[n]
            for p, begin in zip(zero.round_robin_bit16_groups[n], zero.round_robin_bit16_offsets[n], strict=True):
                bounds = tuple(min(max(r * size - begin, 0), p.numel()) for r in range(ranks + 1))
                start = min(max(begin - rank * size, 0), size)
                yield flat, self._names[id(p)], start, Cut(tuple(p.shape), bounds)

    # ------------------------------------------------------------------------------------------ a step

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch. ZeRO-1 reduces gradients in the last one only; the others must
        after each, as no rank keeps whole gradients."""
        self._set_up()
        self._engine.set_gradient_accumulation_boundary(last)
        self._calls.clear()
        yield

    def forward(self, batch: Any) -> StepOutput:
        """The objective on ``batch`` (already on the device), under autocast when ``dtype`` is bfloat16."""
        output = self._engine(batch)
        if self.stage == 3 and not torch.is_grad_enabled():
            self._zero.empty_partition_cache()  # a backward would release what DeepSpeed keeps for it
        return output

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; the average over ranks that DeepSpeed takes becomes a sum.

        Raises ``ValueError``, before any collective, naming trainable parameters that ``loss`` does not depend on: in
        DeepSpeed's buckets they would shift the gradients of others."""
        reached = _reached(loss)
        lost = [n for n, p in self.parameters.items() if p.requires_grad and id(p) not in reached | self._in_leaves]
        if lost:
            raise ValueError(f"trainable, but no gradient reached: {few(lost)}. Freeze what this stage does not use")
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_scale: float = 1.0, role_scales: Mapping[str, float] | None = None) -> float:
        """Clip, step, zero; returns the global norm before clipping. ``role_scales`` replaces ``lr_scale`` for the
        optimizer's groups of those roles.

        Raises ``FloatingPointError``, before any weight has changed, when the gradient is not finite.
        """
        gradients = dict(self._gradients())
        roles = [self._roles.index(self._role_of[name]) for name in gradients]
        norm, by_role = norms(list(gradients.values()), roles, len(self._roles), pieces=True)
        if not torch.isfinite(norm):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            raise FloatingPointError(f"the gradient norm is {norm.item()}; first seen in {few(bad) or 'another rank'}")
        del gradients  # DeepSpeed frees each group's when it has been stepped
        set_rates(self.optimizer, lr_scale, role_scales)
        clip = self.config.clip_norm
        self._share = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else 1.0
        self._zero.refresh_fp32_params()  # weights may have been loaded since the last step
        self._engine.step()
        assert not self._zero.overflow, "DeepSpeed skipped a step whose gradient is finite"
        # it writes behind autograd's back, and a generator on these weights knows by their versions that they changed
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        total, self.role_norms = named_norms(norm, by_role, self._roles)
        return total

    def _step_flat(self, flat: Tensor) -> None:
        """The optimizer's step for the parameters in one partition, whose gradient DeepSpeed has laid into ``grad``."""
        gradient = flat.grad.mul_(self._share)
        for name, start in self._in_flat[id(flat)]:
            piece = self._slices[name]
            piece.grad = gradient[start : start + piece.numel()]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The reduced gradient of each trained parameter, this rank's piece of it."""
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for n, flat in enumerate(flats):
            names = [name for name, _ in self._in_flat[id(flat)] if self.stage == 3 or self._slices[name].numel()]
            yield from zip(names, zero.averaged_gradients[n], strict=False)  # padding may follow the last

    def discard(self) -> None:
        """Drop the gradients of a step that is not taken: DeepSpeed is set up anew, as it keeps them in many places. A
        collective."""
        self._trains = ()
        self._set_up()

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes on this rank, by kind and role, as :func:`mmagent.engine.memory.memory_by_role` counts them."""
        found: dict[str, Counter[str]] = {"parameters": Counter(), "gradients": Counter(), "optimizer": Counter()}
        for name, parameter in self.parameters.items():
            role, piece = self._role_of[name] or "other", self._slices[name]
            state = sum(v.nbytes for v in self.optimizer.state.get(piece, {}).values() if isinstance(v, Tensor))
            found["parameters"][role] += local_part(parameter).nbytes
            found["optimizer"][role] += state
            if parameter.requires_grad:
                own = piece if self.stage > 1 else parameter
                found["gradients"][role] += own.nbytes
                found["parameters"][role] += 0 if _is_view(piece, parameter) else piece.nbytes  # DeepSpeed's copy
        return {kind: {role: size for role, size in sizes.items() if size} for kind, sizes in found.items()}

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, in full tensors on the host of rank 0 (``{}`` elsewhere).

        A collective. The same as of other engines; learning rates are not state but configuration.
        """
        return {"optimizer": gather_state(self.optimizer, self._slices)}

    def sharded_state_dict(self) -> dict[str, Any]:
        """The same, as every rank holds it: nothing travels. For checkpoints, which ranks write together."""
        return {"optimizer": sharded_state(self.optimizer, self._slices)}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take up a state of :meth:`state_dict`, or of another engine's, each rank its part. ``ValueError`` names what
        does not fit."""
        load_state(self.optimizer, self._slices, state["optimizer"], strict)


class _StepByFlat(Optimizer):
    """What DeepSpeed takes for the optimizer: hands each of its flat partitions that has a gradient on."""

    def __init__(self, groups: list[dict[str, Any]], step_flat: Any):
        super().__init__(groups, {})
        self._step_flat = step_flat

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_flat(flat)


def _resting(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Stands in the optimizer for a parameter that does not train now: nothing of its own, but perhaps state, which
    goes where it is when a checkpoint is loaded, so it must be on the parameter's ``device``."""
    return tagged(torch.empty(0, device=device), Cut.even(shape, dist.size()))


def _is_view(piece: Tensor, parameter: Tensor) -> bool:
    """Whether DeepSpeed's partition of a parameter under ZeRO-3 is what the optimizer steps, and no copy of it."""
    return hasattr(parameter, "ds_tensor") and piece.data_ptr() == parameter.ds_tensor.data_ptr()


def _recut(value: Any, old: Cut, new: Cut) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return new.take(old.gather(value))


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Leaves of the outermost modules that can name them."""
    if isinstance(module, Trainable):
        yield from module.leaves()
    else:
        for child in module.children():
            yield from _leaves(child)


def _fetch_before_backward(module: nn.Module, inputs: Any, output: Any) -> Any:
    """DeepSpeed looks for tensors in tuples, lists and dicts only, to gather a module's own parameters before its
    backward; many outputs here are dataclasses."""
    if not is_dataclass(output) or not torch.is_grad_enabled():
        return output
    return tree_map_only(Tensor, lambda t: module.pre_bwd_fn.apply(t) if t.requires_grad else t, output)


def _reduce_after_last_call(handle: RemovableHandle, calls: Counter[nn.Module]) -> None:
    """DeepSpeed reduces a leaf's gradients after every backward of it, even where only the last leaves them whole."""
    hooks = handle.hooks_dict_ref()
    reduce = hooks[handle.id]

    def reduce_once(leaf: nn.Module, grad_input: Any, grad_output: Any) -> None:
        calls[leaf] -= 1
        if not calls[leaf]:
            reduce(leaf, grad_input, grad_output)

    hooks[handle.id] = reduce_once


def _reached(loss: Tensor) -> set[int]:
    """Ids of the leaves that a backward of ``loss`` would give a gradient."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        todo += [following for following, _ in node.next_functions]
    return found


def _deepspeed_config(stage: int, dtype: str, bucket: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are packs, and steps are ours: it counts for nothing
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 62,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": dtype == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients travel in float32
        },
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,  # between steps no rank holds more than its part
        },
    }


def _start_deepspeed(world: World, config: EngineConfig) -> Any:
    """DeepSpeed, on the process group that is there. It builds nothing."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"engine.parallel={config.parallel} needs DeepSpeed: pip install 'mmagent[deepspeed]'; "
            f"or use ddp, fsdp2 or hsdp"
        ) from error
    from deepspeed import ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    world.mesh()  # a lone process gets a group of its own
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    backend = deepspeed.comm.comm.cdb
    for name in ("all_gather", "reduce_scatter"):  # it calls these by names that torch 2.13 warns of
        if hasattr(torch.distributed, f"{name}_single"):
            setattr(backend, f"{name}_function", getattr(torch.distributed, f"{name}_single"))
    return deepspeed
