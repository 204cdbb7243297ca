"""Muon for hidden matrices and AdamW for everything else, in one optimizer.

The model says which parameter is what (:class:`mmagent.types.ParamRole`); nothing is read off a name. All arithmetic
runs on local shards, but that a matrix is orthogonalised as a whole: ranks share this work, each takes some matrices,
gets their parts and hands out the updates (as arXiv 2502.16982 distributes Muon), so nothing is computed twice.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from mmagent import dist
from mmagent.engine.sharding import cut_of, local_part, whole_shape
from mmagent.protocols import Trainable
from mmagent.types import ParamRole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Keller Jordan, https://kellerjordan.github.io/posts/muon)."""

_BATCH_ELEMENTS = 1 << 24  # matrices of one shape are orthogonalised together up to this many elements


@dataclass
class OptimConfig:
    """``lr`` is that of AdamW; Muon's updates are scaled to the same root mean square, so both share it.

    ``role_lr`` multiplies it per role, e.g. ``{encoder: 0.1}``; roles not named keep 1. ``muon=False`` trains the
    matrices with AdamW, too; from scratch, a patch projection at such a rate drowns images in their mean brightness.
    ``newton_schulz_dtype`` is "bfloat16" or, for tests and doubts, "float32".
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    role_lr: dict[str, float] = field(default_factory=dict)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon: bool = True
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    newton_schulz_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.newton_schulz_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"newton_schulz_dtype {self.newton_schulz_dtype!r} is neither bfloat16 nor float32")
        if self.lr <= 0 or self.weight_decay < 0 or any(m < 0 for m in self.role_lr.values()):
            raise ValueError(f"optim: lr must be positive, weight_decay and role_lr not negative; got {self}")


def build_optimizer(model: Trainable, config: OptimConfig) -> MuonAdamW:
    """An optimizer over *all* parameters of ``model``, frozen ones included, so that they can be unfrozen later.

    Raises ``ValueError`` for parameters without a role, roles without a parameter, and unknown roles in ``role_lr``.
    """
    assert isinstance(model, nn.Module)
    roles = model.roles()
    _check_roles(model, roles, config.role_lr)
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        role = roles[name]
        muon = role.matrix and config.muon
        if muon:
            _check_matrix(name, parameter, role.splits)
        decay = config.weight_decay if role.decay else 0.0
        groups.setdefault((role.role, muon, decay, role.splits if muon else ()), []).append(parameter)
    return MuonAdamW(
        [
            {
                "params": sorted(parameters, key=lambda p: tuple(p.shape)),  # equal shapes are batched together
                "lr": config.lr * config.role_lr.get(role, 1.0),
                "role": role,
                "muon": muon,
                "weight_decay": decay,
                "splits": splits,
            }
            for (role, muon, decay, splits), parameters in groups.items()
        ],
        config,
    )


def _check_roles(model: nn.Module, roles: Mapping[str, ParamRole], role_lr: Mapping[str, float]) -> None:
    names = {name for name, _ in model.named_parameters()}
    if missing := sorted(names - set(roles)):
        raise ValueError(f"{type(model).__name__}.roles() says nothing of {few(missing)}")
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := sorted(set(roles) - every):
        raise ValueError(f"{type(model).__name__}.roles() names what is no parameter: {few(unknown)}")
    check_known(role_lr, (role.role for role in roles.values()), "role_lr")


def check_known(asked: Iterable[str], roles: Iterable[str], where: str) -> None:
    """Raises ``ValueError`` for a role asked for by ``where`` that is none of ``roles``, with the nearest one."""
    known = sorted(set(roles))
    for role in asked:
        if role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the model has {', '.join(known)}"
            raise ValueError(f"{where} names the unknown role {role!r}; {hint}")


def _check_matrix(name: str, parameter: Tensor, splits: tuple[int, ...]) -> None:
    if parameter.ndim < 2:
        raise ValueError(f"{name} of shape {tuple(parameter.shape)} is no matrix, nor a batch of matrices, for Muon")
    if splits and sum(splits) != parameter.shape[-2]:
        raise ValueError(f"{name}: splits {splits} do not add up to its {parameter.shape[-2]} rows")


def few(names: Iterable[str], limit: int = 8) -> str:
    """The first ``limit`` names and how many more there are: for error messages."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class MuonAdamW(Optimizer):
    """Each group is either Muon's (``group["muon"]``) or AdamW's; state holds plain tensors, local where parameters are
    shards (FSDP2) or cut (:class:`~mmagent.engine.sharding.Cut`)."""

    local_state = True  # says so to the engine, which gathers it for checkpoints
    replicas = 1
    """Ranks with the same plain parameters and gradients, which then share the work on them; the engine knows."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig):
        self.config = config
        for group in groups:
            group.setdefault("initial_lr", group["lr"])
        # "fused" also tells Optimizer.load_state_dict to put AdamW's step counts on the device
        super().__init__(groups, {"muon": False, "splits": (), "weight_decay": config.weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient. A collective wherever ranks share any."""
        assert closure is None, "closures re-evaluate the loss, which train_step owns"
        shared: dict[_Sharing, list[_Unit]] = {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self._adamw(parameters, group)
                continue
            self._momenta(parameters)
            for alike in _neighbours(parameters):
                ranks = _Sharing.of(alike[0], self.replicas)
                batches = _batches(alike, ranks.number)
                if ranks.number > 1:
                    shared.setdefault(ranks, []).extend(_Unit(batch, group) for batch in batches)
                else:
                    for batch in batches:
                        self._apply(batch, group, self._muon(batch, group))
        for ranks, units in shared.items():
            self._share(units, ranks)

    def _share(self, units: Sequence[_Unit], ranks: _Sharing) -> None:
        """Every unit of work goes to one rank. A collective of those that hold the parameters."""
        owners = _owners([unit.cost for unit in units], ranks.number)
        for turn in _turns([unit.elements for unit in units], owners, ranks.number):
            work: list[list[tuple[int, _Unit]]] = [[] for _ in ranks.copies]  # of each copy: which shard does what
            for n in sorted(turn, key=lambda n: owners[n]):
                work[owners[n] // ranks.shards].append((owners[n] % ranks.shards, units[n]))
            updates = self._updates(work[ranks.copy], ranks)
            for copy, some in enumerate(work):
                parameters = [(p, unit.group) for _, unit in some for p in unit.parameters]
                sizes = [local_part(p).numel() for p, _ in parameters]
                flat = updates if copy == ranks.copy else updates.new_empty(sum(sizes))
                if len(ranks.copies) > 1 and flat.numel():  # as bytes: gloo knows no bfloat16
                    dist.broadcast(flat.view(torch.uint8), ranks.copies[copy], ranks.copy_group)
                for (p, group), update in zip(parameters, flat.split(sizes), strict=True):
                    local = local_part(p)
                    local.mul_(1 - group["lr"] * group["weight_decay"])
                    local.add_(update.view(local.shape).to(local.dtype), alpha=-group["lr"])

    def _updates(self, work: Sequence[tuple[int, _Unit]], ranks: _Sharing) -> Tensor:
        """Flat, this rank's parts of the updates of ``work``, that of one copy in order of its owners: parts travel to
        the owner, who joins them, and come back as parts of what it made. Every element travels twice at most."""
        dtype = getattr(torch, self.config.newton_schulz_dtype)
        pieces = [self._nesterov(p).to(dtype).flatten() for _, unit in work for p in unit.parameters]
        sends = [0] * ranks.shards
        for owner, unit in work:
            sends[owner] += sum(local_part(p).numel() for p in unit.parameters)
        mine = [unit for owner, unit in work if owner == ranks.shard]
        sizes = [[ranks.sizes(p)[shard] for unit in mine for p in unit.parameters] for shard in range(ranks.shards)]
        receives = [sum(of_shard) for of_shard in sizes]
        given = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=ranks.device)
        arrived = ranks.swap(given, sends, receives).split(receives)
        by_matrix = zip(*(rows.split(size) for rows, size in zip(arrived, sizes, strict=True)), strict=True)
        wholes = iter([torch.cat(parts) for parts in by_matrix])
        made: list[Tensor] = []
        for unit in mine:
            shape = whole_shape(unit.parameters[0])
            joined = torch.stack([next(wholes).view(shape) for _ in unit.parameters])
            made += self._orthogonal(joined, unit.group).flatten(1).unbind()
        parts = [whole.split([size[i] for size in sizes]) for i, whole in enumerate(made)]
        back = [some[shard] for shard in range(ranks.shards) for some in parts]
        return ranks.swap(torch.cat(back) if back else given[:0], receives, sends)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:  # empty shards too: every rank must have what checkpoints gather from all
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(local_part(p))
                self.state[p]["exp_avg_sq"] = torch.zeros_like(local_part(p))
            if not local_part(p).numel():  # what is cut anew, or loaded from rank 0's, may have elements here
                self.state[p]["step"] += 1
        parameters = [p for p in parameters if local_part(p).numel()]
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        adamw(
            [local_part(p) for p in parameters],
            [local_part(p.grad) for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.config.eps,
            maximize=False,
        )

    def _momenta(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(local_part(p))
            self.state[p]["momentum"].lerp_(local_part(p.grad), 1 - self.config.momentum)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Updates ``(N, *matrix)`` of a batch of parameters of one shape: gather, orthogonalise by logical matrix."""
        dtype = getattr(torch, self.config.newton_schulz_dtype)
        return self._orthogonal(torch.stack([_gather(self._nesterov(p).to(dtype), p) for p in parameters]), group)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        """This rank's part of what is orthogonalised: the gradient, and the momentum that has taken it in already."""
        return local_part(parameter.grad).lerp(self.state[parameter]["momentum"], self.config.momentum)

    def _orthogonal(self, parameters: Tensor, group: dict[str, Any]) -> Tensor:
        """Of whole ``(N, *parameter)``, each logical matrix orthogonalised and scaled: ``(N, *matrix)``."""
        stacked = _as_matrices(parameters)
        pieces = stacked.split(list(group["splits"] or (stacked.shape[-2],)), dim=-2)
        scaled = []
        for piece in pieces:
            scale = 0.2 * math.sqrt(max(piece.shape[-2:]))  # root mean square of an AdamW update: arXiv 2502.16982
            scaled.append(orthogonalise(piece, self.config.newton_schulz_steps) * scale)
        return torch.cat(scaled, dim=-2)

    def _apply(self, parameters: list[Tensor], group: dict[str, Any], updates: Tensor) -> None:
        """Decay, and add this rank's part of each update."""
        for p, update in zip(parameters, updates, strict=True):
            local = local_part(p)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            whole = update.view(p.shape) if p.ndim > 3 else update  # experts may be here in part, kernels never
            local.add_(_keep(whole, p).to(local.dtype), alpha=-group["lr"])


def orthogonalise(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for ``(..., A, B)``, in the dtype given.

    Singular values end between about 0.7 and 1.2, not at 1: the coefficients trade exactness for speed.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def _as_matrices(stacked: Tensor) -> Tensor:
    """Of ``(N, *parameter)``: a kernel of a convolution ``(out, in, ...)`` is one matrix ``(out, in * ...)``, a
    three-dimensional parameter a batch of matrices."""
    return stacked.flatten(2) if stacked.ndim > 4 else stacked


class _Unit(NamedTuple):
    """Parameters of one shape and group, orthogonalised together by one rank."""

    parameters: list[Tensor]
    group: dict[str, Any]

    @property
    def elements(self) -> int:
        return len(self.parameters) * math.prod(whole_shape(self.parameters[0]))

    @property
    def cost(self) -> float:
        """The shorter side once more than there are elements."""
        shape = whole_shape(self.parameters[0])
        sides = (shape[0], math.prod(shape[1:])) if len(shape) > 3 else shape[-2:]
        return self.elements * min(sides)


@dataclass(frozen=True)
class _Sharing:
    """The ranks that share the work on some matrices: each of ``shards`` (of ``shard_group``) holds a part of one copy,
    and ``copies`` are the ranks that hold the same part as this one (of ``copy_group``), by their numbers in the world.
    This rank is the one at ``copy`` and ``shard``. No group means all ranks."""

    device: torch.device
    copies: tuple[int, ...] = (0,)
    shards: int = 1
    copy: int = 0
    shard: int = 0
    copy_group: ProcessGroup | None = None
    shard_group: ProcessGroup | None = None

    @classmethod
    def of(cls, parameter: Tensor, replicas: int) -> _Sharing:
        """``replicas``: ranks that hold the same plain parameters. Batches of matrices that are sharded (experts) are
        shared already: every rank has other ones."""
        device = parameter.device
        if (cut := cut_of(parameter)) is not None:
            return cls(device, shards=len(cut.sizes), shard=dist.rank())
        if not isinstance(parameter, DTensor):
            return cls(device, tuple(range(replicas)), copy=dist.rank()) if replicas > 1 else cls(device)
        if parameter.ndim == 3:
            return cls(device)
        mesh, *(*before, last) = parameter.device_mesh, *parameter.placements
        assert (last, before) in ((Shard(0), []), (Shard(0), [Replicate()])), parameter.placements  # FSDP2's, HSDP's
        *copy, shard = mesh.get_coordinate() or ()
        shards = cls(device, shards=mesh.size(-1), shard=shard, shard_group=mesh.get_group(mesh.ndim - 1))
        if not copy:
            return shards
        return replace(shards, copies=tuple(mesh.mesh[:, shard].tolist()), copy=copy[0], copy_group=mesh.get_group(0))

    @property
    def number(self) -> int:
        return len(self.copies) * self.shards

    def sizes(self, parameter: Tensor) -> list[int]:
        """Elements of each shard; one after the other they are the whole."""
        if (cut := cut_of(parameter)) is not None:
            return cut.sizes
        rows, row = parameter.shape[0], math.prod(parameter.shape[1:])
        each = -(-rows // self.shards)
        return [row * max(min(each, rows - shard * each), 0) for shard in range(self.shards)]

    def swap(self, rows: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """:func:`mmagent.dist.all_to_all` among the shards of a copy."""
        return rows if self.shards == 1 else dist.all_to_all(rows, sends, receives, self.shard_group)


def _owners(costs: list[float], ranks: int) -> list[int]:
    """Which rank does each piece of work: the heaviest first, always to whom has least."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[n] = loads.index(min(loads))
        loads[owners[n]] += costs[n]
    return owners


def _turns(sizes: list[int], owners: list[int], ranks: int) -> list[list[int]]:
    """The work of one turn after the other: of each rank as much as stays within :data:`_BATCH_ELEMENTS`, or one."""
    turns: list[list[int]] = []
    filled = [(0, 0)] * ranks  # of each rank, its last turn and the elements in it
    for n, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        turn, held = filled[owner]
        if held and held + size > _BATCH_ELEMENTS:
            turn, held = turn + 1, 0
        filled[owner] = (turn, held + size)
        turns += [[] for _ in range(turn + 1 - len(turns))]
        turns[turn].append(n)
    return turns


def _neighbours(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of equal shape and sharding."""
    for _, alike in groupby(parameters, key=lambda p: (whole_shape(p), _placements(p))):
        yield list(alike)


def _batches(alike: list[Tensor], ranks: int) -> Iterator[list[Tensor]]:
    """As many together as keeps a batch small, and leaves each of ``ranks`` its part."""
    most = min(_BATCH_ELEMENTS // max(math.prod(whole_shape(alike[0])), 1), -(-len(alike) // ranks))
    for start in range(0, len(alike), max(most, 1)):
        yield alike[start : start + max(most, 1)]


def _placements(parameter: Tensor) -> tuple[Any, ...]:
    return (parameter.device_mesh, *parameter.placements) if isinstance(parameter, DTensor) else ()


def _gather(local: Tensor, parameter: Tensor) -> Tensor:
    """Of this rank's part of a batch of matrices whole ones: a share of those that are cut through."""
    if not isinstance(parameter, DTensor):
        return local
    if (cut := _cut_along(parameter)) is None:
        return local
    shares, own = _shares(local.shape[0], cut)
    parts = dist.all_to_all(local, shares, [shares[own]] * len(shares), cut.group)
    return torch.cat(parts.view(len(shares), shares[own], *local.shape[1:]).unbind(), dim=cut.dim)


def _keep(whole: Tensor, parameter: Tensor) -> Tensor:
    """The way back: this rank's part of what :func:`_gather` gave."""
    if not isinstance(parameter, DTensor):
        return whole
    if (cut := _cut_along(parameter)) is None:
        return whole
    shares, own = _shares(parameter.to_local().shape[0], cut)
    parts = torch.cat(whole.chunk(len(shares), dim=cut.dim))
    return dist.all_to_all(parts, [shares[own]] * len(shares), shares, cut.group)


class _Cut(NamedTuple):
    """Matrices of a batch lie cut along their dimension ``dim`` over the ranks of ``group``."""

    dim: int
    group: ProcessGroup


def _cut_along(parameter: DTensor) -> _Cut | None:
    """How a batch of matrices is cut through, if it is: where ranks that share experts have replicas, but too few
    experts for whole ones."""
    mesh, placements = parameter.device_mesh, parameter.placements
    cuts = [_Cut(p.dim, mesh.get_group(n)) for n, p in enumerate(placements) if getattr(p, "dim", 0)]
    assert len(cuts) < 2, placements
    return cuts[0] if cuts else None


def _shares(matrices: int, cut: _Cut) -> tuple[list[int], int]:
    """How many of so many matrices each rank of the group takes, as evenly as they go, and which rank this is."""
    ranks = cut.group.size()
    return [(matrices + n) // ranks for n in range(ranks)], cut.group.rank()
