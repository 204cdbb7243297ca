"""Layers of a trained model that hold what tile-wise sparsity left of them: for inference, nothing of it learns.

A packed model is a model: it is called as before, moved and cast, and its ``state_dict`` is stored like any other. What
its layers look like is its :data:`Layout`, plain numbers that lie beside its weights, from which
:func:`prepare_packed` makes empty layers to load them into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmagent.models.moe import Experts
from mmagent.ops.glu import swiglu
from mmagent.ops.grouped import collect_from_experts, plan_dispatch, scatter_to_experts
from mmagent.ops.tile_packed import STEP, PackedMatrix, Singles, TileBatch, pack, packed_linear, unpack
from mmagent.sparsity.patterns import KEPT, SINGLE, tiles_of


@dataclass(frozen=True)
class MatrixLayout:
    """``(outputs, inputs)`` and the size ``[B, outputs, K]`` of every batch of tiles; ``singles`` beside them."""

    outputs: int
    inputs: int
    batches: tuple[tuple[int, int, int], ...]
    singles: int = 0


Layout = dict[str, dict[str, list[MatrixLayout]]]
"""By the name of a packed module and of its parameter: one entry a matrix, of experts one each."""


class Packed(nn.Module):
    """One sparse matrix as parameters that do not learn and buffers of indices."""

    def __init__(self, layout: MatrixLayout):
        super().__init__()
        self.layout = layout
        self.places: Tensor
        self.register_buffer("places", torch.zeros(layout.outputs, dtype=torch.int64))
        weights = [nn.Parameter(torch.zeros(size), requires_grad=False) for size in layout.batches]
        self.weights = nn.ParameterList(weights)
        for n, (batch, _, reads) in enumerate(layout.batches):
            self.register_buffer(f"inputs_{n}", torch.zeros(batch, reads, dtype=torch.int64))
        self.values = nn.Parameter(torch.zeros(layout.singles), requires_grad=False) if layout.singles else None
        self.register_buffer("starts", torch.zeros(layout.outputs + 1, dtype=torch.int64) if layout.singles else None)
        self.register_buffer("columns", torch.zeros(layout.singles, dtype=torch.int64) if layout.singles else None)

    @classmethod
    def of(cls, packed: PackedMatrix, inputs: int) -> Packed:
        """A module of ``packed``, which reads ``inputs`` values."""
        sizes = tuple((w.shape[0], w.shape[1], w.shape[2]) for w, _ in packed.batches)
        singles = packed.singles.values.numel() if packed.singles else 0
        module = cls(MatrixLayout(packed.places.shape[0], inputs, sizes, singles))
        module.places = packed.places
        for n, (weight, reads) in enumerate(packed.batches):
            module.weights[n] = nn.Parameter(weight.detach(), requires_grad=False)
            setattr(module, f"inputs_{n}", reads)
        if packed.singles is not None:
            module.values = nn.Parameter(packed.singles.values.detach(), requires_grad=False)
            module.starts, module.columns = packed.singles.starts, packed.singles.columns
        return module

    def matrix(self) -> PackedMatrix:
        batches = tuple(TileBatch(w, getattr(self, f"inputs_{n}")) for n, w in enumerate(self.weights))
        singles = None if self.values is None else Singles(self.starts, self.columns, self.values)
        return PackedMatrix(batches, self.places, singles)

    def dense(self) -> Tensor:
        """``(O, I)`` with its zeros."""
        if not self.weights and self.values is None:
            return torch.zeros(self.layout.outputs, self.layout.inputs, device=self.places.device)
        return unpack(self.matrix(), self.layout.inputs)


class Inference(nn.Module):
    """What cannot learn says so, where a run would train all around it."""

    def train(self, mode: bool = True) -> Inference:
        if mode:
            raise ValueError(
                "packed layers do not train: go on from the dense folder (tools/pack.py --dense makes one)"
            )
        return super().train(mode)


class PackedLinear(Inference):
    """``nn.Linear`` with a packed weight."""

    def __init__(self, weight: Packed, bias: nn.Parameter | None):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out = packed_linear(x.reshape(-1, x.shape[-1]), self.weight.matrix(), self.bias)
        return out.view(*x.shape[:-1], -1)


class PackedExperts(Inference):
    """:class:`~mmagent.models.moe.Experts` on one rank, each expert's matrices packed by themselves."""

    group = None

    def __init__(self, gate_up: Sequence[Packed], down: Sequence[Packed]):
        super().__init__()
        self.gate_up, self.down = nn.ModuleList(gate_up), nn.ModuleList(down)

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        dispatch = plan_dispatch(chosen_TK, len(self.gate_up))
        x_ND = scatter_to_experts(x_TD, dispatch, chosen_TK.shape[1])
        served = []
        for x, gate_up, down in zip(x_ND.split(dispatch.counts.tolist()), self.gate_up, self.down, strict=True):
            if x.shape[0]:
                served.append(packed_linear(swiglu(packed_linear(x, gate_up.matrix())), down.matrix()))
        y_ND = torch.cat(served) if served else x_ND
        return collect_from_experts(y_ND, gates_TK, dispatch)


@torch.no_grad()
def pack_model(model: nn.Module, masks: Mapping[str, Tensor], granularity: int, step: int = STEP) -> None:
    """Replace the layers of ``model`` that ``masks`` (by parameter name) are for, in place.

    Raises ``ValueError`` naming a mask that no linear layer or experts have, one of another shape, and a weight that is
    not zero where its mask says so; the model must not be used any more then.
    """
    left = dict(masks)
    for name, module in list(model.named_modules()):
        own = {key: left.pop(f"{name}.{key}" if name else key) for key in _matrices(module) if f"{name}.{key}" in left}
        if own:
            sheets = {key: _packed(module, name, key, own.get(key), granularity, step) for key in _matrices(module)}
            _put(model, name, _packed_module(module, sheets))
    if left:
        raise ValueError(f"masks of {len(left)} parameters that no linear layer and no experts have: {min(left)}")


def _matrices(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Experts):
        return ("gate_up", "down")
    return ("weight",) if isinstance(module, nn.Linear) else ()


def _packed(module: nn.Module, name: str, key: str, mask: Tensor | None, granularity: int, step: int) -> list[Packed]:
    weight = getattr(module, key).detach()
    mask = torch.full(weight.shape, KEPT, dtype=torch.uint8) if mask is None else mask
    if mask.shape != weight.shape:
        raise ValueError(f"{name}.{key}: a mask {tuple(mask.shape)} for a weight {tuple(weight.shape)}")
    mask = mask.to(weight.device)
    sheets = []
    for w, m in zip(weight.view(-1, *weight.shape[-2:]), mask.view(-1, *mask.shape[-2:]), strict=True):
        try:
            sheets.append(Packed.of(pack(w, tiles_of(m, granularity), m == SINGLE, step), w.shape[1]))
        except ValueError as error:
            raise ValueError(f"{name}.{key}: {error}") from error
    return sheets


def _packed_module(module: nn.Module, sheets: Mapping[str, list[Packed]]) -> nn.Module:
    if isinstance(module, Experts):
        if module.group is not None:
            raise ValueError("experts that ranks share cannot be packed: load the folder on one rank")
        return PackedExperts(sheets["gate_up"], sheets["down"])
    bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
    return PackedLinear(sheets["weight"][0], bias)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def layout_of(model: nn.Module) -> Layout:
    """What :func:`prepare_packed` wants to know; empty for a model of which nothing is packed."""
    found: Layout = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            found[name] = {key: [p.layout for p in getattr(module, key)] for key in ("gate_up", "down")}
        elif isinstance(module, PackedLinear):
            found[name] = {"weight": [module.weight.layout]}
    return found


def prepare_packed(model: nn.Module, layout: Layout) -> None:
    """Make the layers of ``layout`` packed ones, without values, where ``model`` has dense ones. Raises ``ValueError``
    naming a layer that is not there or of another size."""
    modules = dict(model.named_modules())
    for name, matrices in layout.items():
        module = modules.get(name)
        if module is None or set(_matrices(module)) != set(matrices):
            raise ValueError(f"{name}: this model has no layer of that name that can be packed")
        for key, sheets in matrices.items():
            shape = getattr(module, key).shape
            if shape[-2:].numel() and any((s.outputs, s.inputs) != tuple(shape[-2:]) for s in sheets):
                raise ValueError(f"{name}.{key}: packed from matrices of another size than {tuple(shape)}")
        device, dtype = getattr(module, next(iter(matrices))).device, getattr(module, next(iter(matrices))).dtype
        with torch.device(device):
            empty = {key: [Packed(sheet).to(dtype) for sheet in sheets] for key, sheets in matrices.items()}
        _put(model, name, _packed_module(module, empty))


@torch.no_grad()
def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` as it was before :func:`pack_model`: dense, with zeros."""
    packed, state = layout_of(model), {}
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name in packed)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside) or name in {f"{n}.bias" for n in packed}:
            state[name] = tensor
    for name, matrices in packed.items():
        for key in matrices:
            held: Any = getattr(modules[name], key)
            parts = [held.dense()] if isinstance(held, Packed) else [part.dense() for part in held]
            state[f"{name}.{key}"] = parts[0] if isinstance(held, Packed) else torch.stack(parts)
    return state
