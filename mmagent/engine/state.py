"""What all engines do with an optimizer beside stepping it: who owns what, its rates, its state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmagent import dist
from mmagent.engine.optim import few
from mmagent.engine.pieces import StoredTensor, shard_of
from mmagent.engine.sharding import as_sharded, gather_like, local_part, whole_shape


def require_owned_parameters(objective: nn.Module, optimizer: Optimizer) -> None:
    """Raises ``ValueError`` naming trainable parameters of ``objective`` that no group of ``optimizer`` holds."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    orphans = [n for n, p in objective.named_parameters() if p.requires_grad and id(p) not in owned]
    if orphans:
        raise ValueError(f"trainable, but not in the optimizer: {few(orphans)}")


def roles_of(optimizer: Optimizer) -> tuple[str, ...]:
    """The roles of the optimizer's groups, each once; "" where a group has none."""
    return tuple(dict.fromkeys(str(group.get("role", "")) for group in optimizer.param_groups))


def named_norms(norm: Tensor, by_role: Tensor, roles: Sequence[str]) -> tuple[float, dict[str, float]]:
    """``norm ()`` and that of each role, ``by_role (R,)``, as numbers; the device is waited for once."""
    total, *each = torch.cat([norm.view(1), by_role]).tolist()
    return total, {role: value for role, value in zip(roles, each, strict=True) if role and value}


def set_rates(optimizer: Optimizer, lr_scale: float, role_scales: Mapping[str, float] | None) -> None:
    """Every group's learning rate is its initial one times ``lr_scale``, or times that of its role in ``role_scales``.
    Raises ``ValueError`` for roles that no group has."""
    scales = dict(role_scales or {})
    if unknown := set(scales) - {group.get("role") for group in optimizer.param_groups}:
        raise ValueError(f"schedules for roles that the optimizer does not have: {few(sorted(unknown))}")
    for group in optimizer.param_groups:
        scale = scales.get(group.get("role", ""), lr_scale)
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale


def gather_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """``{parameter: {key: value}}`` in full tensors on the host of rank 0, ``{}`` elsewhere. A collective.

    ``parameters`` are the optimizer's own: live parameters, or this rank's parts of them."""
    state: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        entries = optimizer.state.get(parameter, {})
        full = {key: gather_like(value, parameter) for key, value in entries.items()}
        if dist.is_main() and full:
            state[name] = full
    return state


def sharded_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The same, as every rank holds it: nothing travels. For checkpoints, which ranks write together."""
    return {
        name: {key: as_sharded(value, parameter) for key, value in entries.items()}
        for name, parameter in parameters.items()
        if (entries := optimizer.state.get(parameter, {}))
    }


def load_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], given: Mapping[str, Mapping[str, Any]], strict: bool
) -> None:
    """Take up what :func:`gather_state` gave, each rank its part; its tensors may be those in a checkpoint's files.
    ``ValueError`` names what does not fit."""
    if strict and (unknown := sorted(set(given) - set(parameters))):
        raise ValueError(f"optimizer state of parameters the model does not have: {few(unknown)}")
    fresh: dict[int, dict[str, Any]] = {}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {id(p): i for i, p in enumerate(order)}
    local = getattr(optimizer, "local_state", False)
    for name, entries in given.items():
        if name not in parameters:
            continue
        parameter = parameters[name]
        for key, value in entries.items():
            if isinstance(value, Tensor | StoredTensor) and value.ndim and tuple(value.shape) != whole_shape(parameter):
                shapes = f"{tuple(value.shape)} for {whole_shape(parameter)}"
                raise ValueError(f"optimizer state {key} of {name} is misshapen: {shapes}")
        shards = {key: shard_of(value, parameter) for key, value in entries.items()}
        fresh[index[id(parameter)]] = {k: local_part(v) if local else v for k, v in shards.items()}
    optimizer.load_state_dict({"state": fresh, "param_groups": optimizer.state_dict()["param_groups"]})
