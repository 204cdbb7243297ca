"""Pruning while a run trains: scores from its gradients, masks at the end of each stage, zeros that stay zeros.

**Where gradients are seen.** The score of a weight is ``(gradient * weight)^2``, summed over the steps of a stage
(arXiv 2008.13006). The gradient is taken where the optimizer takes it, by a hook that torch calls before
``optimizer.step``, and nothing in the step or in an engine knows of it:

- *accumulation*: there it is the gradient of the whole step, the sum over its micro-batches and ranks. Squares of parts
  do not add up to the square of the sum, so anything earlier would give scores that depend on how a batch was split;
- *clipping*: it has been clipped. One factor for all weights changes no ranking within a step, and of a stage it bounds
  what a single step can say: unclipped, the square of one spike outvotes a hundred ordinary steps;
- *sharding*: each rank sees its shard (``DTensor``), and keeps scores and masks in the same shards. Only at the end of
  a stage are scores gathered, in float32 on the host of every rank, to be ranked together;
- *refused steps* (not finite, spikes) never reach the optimizer, and so leave no trace in the scores;
- *mixed precision*: parameters and their gradients are float32 here, whatever the forward ran in.

Gradients of weights that are gone are made zero before the optimizer's step, so that its moments forget them, and the
weights after it (a Muon step mixes all entries of a matrix, and decay and momentum move what has no gradient). The
norm that the engine clips by and logs still counts them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmagent import dist
from mmagent.engine.optim import few
from mmagent.engine.pieces import shard_of
from mmagent.engine.sharding import as_sharded, gather_like, local_part, shard_like, whole_shape
from mmagent.interop.packed_folder import save_masks
from mmagent.models.layers import encoder_roles, trainable_blocks
from mmagent.ops.state import check_weights, shapes_of
from mmagent.sparsity.patterns import density, make_masks, restored
from mmagent.sparsity.stages import SparsityConfig


def prunable(model: nn.Module, roles: list[str] | None = None) -> dict[str, str]:
    """Names of the matrices inside the model's blocks to their roles: those of attention, feed-forwards and experts.

    What a model says is no matrix (embeddings, heads, norms), what stands outside of blocks (the embedding of patches,
    projectors), and what computes in full precision (routers) is left alone: a few thousandths of the products, and
    what everything else goes through. Raises ``ValueError`` naming a role in ``roles`` of which nothing is left.
    """
    declared = encoder_roles(model)
    inside = {
        id(parameter)
        for owner in (model, *model.children())  # an agent that takes images in chunks has no blocks in its encoder
        for block in trainable_blocks(owner)
        for module in block.modules()
        if not getattr(module, "full_precision", False)
        for parameter in module.parameters(recurse=False)
    }
    found = {
        name: declared[name].role
        for name, p in model.named_parameters()
        if id(p) in inside and declared[name].matrix and len(whole_shape(p)) in (2, 3)
    }
    if without := [role for role in roles or [] if role not in found.values()]:
        there = ", ".join(sorted(set(found.values()))) or "none"
        raise ValueError(f"sparsity.roles: no matrix in a block has the role {few(without)}; there are {there}")
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with matrices in them: nothing can be pruned")
    return {name: role for name, role in found.items() if not roles or role in roles}


class Sparsifier:
    """Scores, prunes and keeps pruned, as ``config`` says. Make it after the engine, with the optimizer that it was
    given; one of a run's parts, after the model, and of its hooks: after those that validate, so that what is judged
    at the end of a stage is what that stage made of its level, and before those that log.

    A config without levels does nothing. The record gets ``sparsity/asked`` and ``sparsity/density``, which is counted:
    of the weights that the step was taken with.
    """

    shared_state = True
    segment = "sparsity"

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: SparsityConfig):
        self.model, self.config, self.stage = model, config, 0
        self.roles: dict[str, str] = {}
        self.scores: dict[str, Tensor] = {}  # this rank's parts, as all tensors here
        self.masks: dict[str, Tensor] = {}
        self.reached: dict[str, int] = {}  # steps of this stage in which a gradient reached each matrix
        self.density = 1.0
        self._stepped = False
        if not config.levels:
            return
        self.roles = prunable(model, config.roles)
        parameters = self._parameters()
        if any(hasattr(p, "ds_tensor") for p in parameters.values()):
            raise ValueError(
                "sparsity: ZeRO-3 keeps weights and gradients in buffers of its own; use ddp, fsdp2 or hsdp"
            )
        for name, p in parameters.items():
            self.scores[name] = torch.zeros_like(local_part(p), dtype=torch.float32, requires_grad=False)
            self.masks[name] = torch.ones_like(self.scores[name], dtype=torch.uint8)
            self.reached[name] = 0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _parameters(self) -> dict[str, nn.Parameter]:
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self.roles}

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        """Score by the gradients that the optimizer is about to use, and take away those of weights that are gone."""
        self._stepped = True
        for name, p in self._parameters().items():
            if p.grad is None:
                continue
            gradient, weight = local_part(p.grad), local_part(p)
            change = gradient * weight
            self.scores[name].addcmul_(change, change)
            self.reached[name] += 1
            if self.stage:
                gradient.mul_(self.masks[name] != 0)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self.stage:
            for name, p in self._parameters().items():
                local_part(p).mul_(self.masks[name] != 0)

    def __call__(self, step: int, record: dict[str, float]) -> None:
        """Prune where a stage ends with ``step``: a hook, and a collective then."""
        if not self.config.levels:
            return
        if not self._stepped and not record.get("health/left_out"):
            raise ValueError(
                "sparsity: a step was taken, but not by the optimizer that scores were to be seen at: engines such as "
                "ZeRO step another one; use ddp, fsdp2 or hsdp"
            )
        self._stepped = False
        record["sparsity/asked"] = self.config.levels[self.stage - 1] if self.stage else 0.0
        record["sparsity/density"] = self.density
        if self.config.stage(step) > self.stage:
            self.prune(self.config.stage(step))
            self._tell(step)

    @torch.no_grad()
    def prune(self, stage: int) -> None:
        """Make masks for the level of ``stage`` (from 1) from the scores so far, and begin new scores. A collective.
        Raises ``ValueError`` naming matrices that no gradient reached since the last time."""
        if idle := [name for name, steps in self.reached.items() if not steps]:
            raise ValueError(
                f"sparsity: no gradient reached {few(idle)} in this stage, and what has no score would go first; leave "
                f"frozen roles out of sparsity.roles"
            )
        parameters = self._parameters()
        whole = {name: gather_like(as_sharded(self.scores[name], p), p) for name, p in parameters.items()}
        masks = make_masks(whole, self.config.levels[stage - 1], self.config.pattern)
        for name, p in parameters.items():
            agreed = masks[name].to(self.scores[name].device)
            dist.broadcast(agreed)  # replicas that differ in a bit of a score must not differ in a mask
            self.masks[name] = local_part(shard_like(agreed, p)).clone()
            self.scores[name].zero_()
            self.reached[name] = 0
        self.stage = stage
        self._after()
        self.density = density(masks)

    def whole_masks(self) -> dict[str, Tensor]:
        """All masks as full tensors on the host of every rank, by the model's parameter names. A collective."""
        return {
            name: gather_like(as_sharded(self.masks[name], p), p).to(torch.uint8)
            for name, p in self._parameters().items()
        }

    def leave(self, weights: Mapping[str, Tensor], path: Path, part: str = "") -> dict[str, Tensor]:
        """``weights``, gathered by all ranks, with zeros where they were dropped: averages of steps and of checkpoints
        remember what was there before. The main rank writes the masks to ``path``, those of the child module ``part``
        by their names in it, or all. A collective. Without levels nothing is done."""
        masks = self.whole_masks()
        if masks and dist.is_main():
            prefix = f"{part}." if part else ""
            save_masks(
                path,
                {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)},
                self.config.pattern,
            )
        return {n: t * (masks[n] != 0).to(t.device) if n in masks else t for n, t in weights.items()}

    @property
    def parts(self) -> dict[str, Sparsifier]:
        """What a run keeps of it: itself, to be listed after the model; nothing without levels."""
        return {"sparsity": self} if self.config.levels else {}

    def _tell(self, step: int) -> None:
        masks = self.whole_masks()
        if not dist.is_main():
            return
        config = self.config
        by_role = {r: density({n: masks[n] for n, own in self.roles.items() if own == r}) for r in self.roles.values()}
        each = {name: density({name: mask}) for name, mask in masks.items()}
        least = min(each, key=lambda name: each[name])
        parts = ", ".join(f"{role} {100 * share:.1f} %" for role, share in by_role.items())
        alone = f", {100 * restored(masks):.1f} % as single weights" if restored(masks) else ""
        total = sum(mask.numel() for mask in masks.values())
        print(
            f"sparsity: step {step}, {config.pattern.pattern} to {100 * config.levels[self.stage - 1]:g} %: "
            f"{100 * self.density:.2f} % of {total:,} weights are left{alone} ({parts}); "
            f"least in {least}, {100 * each[least]:.1f} %",
            file=sys.stderr,
            flush=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """Stage, and on rank 0 scores and masks in full tensors on the host. A collective where they are sharded."""
        full = {
            kind: {n: gather_like(t, self._parameters()[n]) for n, t in own.items()} for kind, own in self._tensors()
        }
        return self._plain() | {kind: own if dist.is_main() else {} for kind, own in full.items()}

    def sharded_state_dict(self) -> dict[str, Any]:
        """The same, as every rank holds it: nothing travels."""
        parameters = self._parameters()
        return self._plain() | {
            kind: {name: as_sharded(t, parameters[name]) for name, t in own.items()} for kind, own in self._tensors()
        }

    def _tensors(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return ("scores", self.scores), ("masks", self.masks)

    def _plain(self) -> dict[str, Any]:
        return {"stage": self.stage, "density": self.density, "reached": dict(self.reached)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and make zero in the model what its masks say: load the model first. Raises
        ``ValueError`` where the state is of other matrices, or its stage is not one of the config's."""
        parameters = self._parameters()
        wanted = {name: whole_shape(p) for name, p in parameters.items()}
        for kind, own in self._tensors():
            check_weights(wanted, shapes_of(state[kind]), f"sparsity: {kind} of {type(self.model).__name__}")
            for name, tensor in own.items():
                tensor.copy_(local_part(shard_of(state[kind][name], parameters[name])))
        if state["stage"] > len(self.config.levels):
            raise ValueError(f"sparsity.levels: the checkpoint is at level {state['stage']} of {self.config.levels}")
        self.stage, self.density = int(state["stage"]), float(state["density"])
        self.reached = {name: int(steps) for name, steps in state["reached"].items()}
        self._stepped = False
        self._after()
