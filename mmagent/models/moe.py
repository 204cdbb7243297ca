"""Mixture of experts with a sigmoid router that balances itself without an auxiliary gradient.

Router (DeepSeek-V3, arXiv 2412.19437; GLM-4.5, arXiv 2508.06471), in fp32: affinity ``s = sigmoid(W x)``; experts
are *chosen* by ``s + bias`` (optionally only within the best groups) and *weighted* by the unbiased ``s``,
normalised over the chosen and scaled. The bias follows the load between steps and gets no gradient.

Statistics are per document and skip padding, so they do not depend on how documents are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mmagent import dist
from mmagent.models.layers import SwiGLU, matrix_std
from mmagent.ops.glu import swiglu
from mmagent.ops.grouped import (
    collect_from_experts,
    few,
    grouped_linear,
    plan_arrival,
    plan_dispatch,
    scatter_to_experts,
    serve_few,
    sort_by_expert,
    tally,
    unsort_by_expert,
)
from mmagent.ops.precision import no_autocast
from mmagent.types import ParamRole, Segments


@dataclass
class MoEConfig:
    """``experts`` 0 makes the whole decoder dense."""

    experts: int = 0
    top_k: int = 8
    shared: int = 1  # experts that serve every token, as one wide SwiGLU
    ffn: int = 1408
    scale: float = 1.0  # factor on the normalised gates: 2.5 in GLM-4.5 355B
    normalise: bool = True
    groups: int = 1  # experts are chosen within the best `kept_groups` of this many groups
    kept_groups: int = 1

    def __post_init__(self) -> None:
        if self.experts and self.experts % self.groups:
            raise ValueError(f"moe: {self.experts} experts do not divide into {self.groups} groups")
        if self.experts and not 0 < self.top_k <= self.experts // self.groups * self.kept_groups:
            raise ValueError(f"moe: cannot choose {self.top_k} of {self.experts} experts in {self.kept_groups} groups")


class Documents:
    """Which document every token counts for in router statistics; built once a forward.

    ``tail`` padding tokens form the last segment and count for none. With ``depth``, neither do the last so many
    tokens of each document: an MTP head of that depth is fed no token ahead there. (At the one before them it is
    fed the document's last token, and counts, though nothing is left to predict.) Where several ranks compute a slice
    of the stream each, ``rows`` are this one's, and ``total`` sums over those ranks.
    """

    def __init__(
        self,
        segments: Segments,
        tail: int = 0,
        depth: int = 0,
        rows: slice = slice(None),
        total: Callable[[Tensor], Tensor] | None = None,
    ):
        self.segments, self.tail, self.rows, self.total = segments, tail, rows, total
        self.count = len(segments) - (1 if tail else 0)
        ids = segments.ids()
        lengths = torch.tensor(segments.lengths[: self.count], dtype=torch.float32, device=ids.device) - depth
        if depth:
            ends = segments.cu_seqlens[1:].long()[ids] - depth
            ids = torch.where(torch.arange(ids.shape[0], device=ids.device) < ends, ids, self.count)
        self.ids_T = ids[rows]  # `count` where a token counts for no document
        self.inverse_lengths_N = torch.where(lengths > 0, 1.0 / lengths, 0.0)

    def ahead(self, depth: int) -> Documents:
        """For the MTP head of ``depth``."""
        return Documents(self.segments, self.tail, depth, self.rows, self.total)

    def tally(self, chosen_TK: Tensor, experts: int) -> Tensor:
        """``(N, E)`` float32: how often each document chose each expert."""
        flat = (self.ids_T.unsqueeze(1) * experts + chosen_TK).flatten()
        return tally(flat, (self.count + 1) * experts).view(-1, experts)[: self.count].float()


class Routing(NamedTuple):
    """What a router did: ``load (E,)`` tokens without padding, ``balance ()`` sum of the documents' auxiliary losses,
    ``chosen (T, K)`` experts, ``replayed (T, 2)`` float32: how many of the choices prescribed for each token the router
    would have made itself, and how many were prescribed."""

    load: Tensor
    balance: Tensor
    chosen: Tensor
    replayed: Tensor


class Router(nn.Module):
    """Chooses K experts a token by sigmoid score plus a bias that only the choice sees (loss-free balancing)."""

    full_precision = True  # engines that gather weights in bfloat16 leave this one: rounded, it chooses other experts

    def __init__(self, config: MoEConfig, width: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(config.experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=matrix_std(self.weight.shape[1], 0))
        self.bias.zero_()

    def parameter_roles(self, role: str) -> dict[str, ParamRole]:
        return {"weight": ParamRole(role, matrix=True)}

    def forward(
        self, x_TD: Tensor, documents: Documents | None, replay_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Gates ``(T, K)`` fp32 and the routing. ``replay (T, K)`` int64 prescribes experts where not negative."""
        with no_autocast(x_TD.device.type):
            scores = F.linear(x_TD.float(), self.weight.float()).sigmoid()
            chosen = self._choose(scores.detach())
            replayed = scores.new_zeros(scores.shape[0], 2)
            if replay_TK is not None:
                chosen, replayed = _replay(chosen, replay_TK)
            gates = scores.gather(1, chosen)
            if self.config.normalise:
                gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
            load, balance = self._statistics(scores, chosen, documents)
        return gates * self.config.scale, Routing(load, balance, chosen, replayed)

    @torch.no_grad()
    def _choose(self, scores_TE: Tensor) -> Tensor:
        biased = scores_TE + self.bias
        groups, kept = self.config.groups, self.config.kept_groups
        if kept < groups:
            grouped = biased.unflatten(1, (groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(kept, dim=-1).indices
            allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter_(1, best, True)
            biased = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.topk(self.config.top_k, dim=-1).indices

    def _statistics(self, scores: Tensor, chosen: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """Sequence-wise auxiliary loss of DeepSeek-V3, summed over documents: ``sum_e f_e P_e`` with
        ``f_e = E / (K L) * tokens that chose e`` and ``P_e`` the mean normalised affinity."""
        if documents is None:
            return scores.new_zeros(scores.shape[1]), scores.new_zeros(())
        own = counts = documents.tally(chosen, scores.shape[1])
        if documents.total is not None:
            counts = documents.total(own)  # f_e is of the whole document, P_e adds up over its slices
        slope = F.pad(counts * documents.inverse_lengths_N.unsqueeze(1) ** 2, (0, 0, 0, 1))  # 0 for no document
        shares = scores / scores.sum(-1, keepdim=True)
        balance = (shares * slope[documents.ids_T]).sum() * (scores.shape[1] / chosen.shape[1])
        return own.sum(0), balance

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, rate: float) -> None:
        """``bias += rate * sign(mean load - load)``, zero-centred, by the *global* load of the last step."""
        step = torch.sign(load_E.mean() - load_E) * rate
        self.bias += step - step.mean()


def _replay(chosen_TK: Tensor, replay_TK: Tensor) -> tuple[Tensor, Tensor]:
    if replay_TK.shape != chosen_TK.shape:
        raise ValueError(f"replayed experts {tuple(replay_TK.shape)} do not fit {tuple(chosen_TK.shape)} choices")
    recorded = replay_TK >= 0
    same = (replay_TK.unsqueeze(2) == chosen_TK.unsqueeze(1)).any(-1) & recorded
    replayed = torch.stack([same.sum(-1), recorded.sum(-1)], dim=-1).float()
    return torch.where(recorded, replay_TK, chosen_TK), replayed


def check_replay(routed_TMK: Tensor, layers: int, config: MoEConfig) -> None:
    """Raise ``ValueError`` for recorded experts that no router can have chosen: another shape than ``(T, layers,
    top_k)``, an expert there is not, one twice, or a choice recorded in part (-1 stands for a whole one that was not).

    Reads the tensor, so call it while that is on the host.
    """
    if routed_TMK.ndim != 3 or tuple(routed_TMK.shape[1:]) != (layers, config.top_k):
        raise ValueError(
            f"replay: recorded experts {tuple(routed_TMK.shape)} for {layers} MoE layers that choose {config.top_k}"
        )
    rows = routed_TMK.sort(dim=-1).values
    recorded = rows[..., -1] >= 0
    found = {
        "are not all there": (rows < -1).any(-1) | (rows >= config.experts).any(-1),
        "are recorded in part": recorded & (rows[..., 0] < 0),
        "name one twice": recorded & (rows.diff(dim=-1) == 0).any(-1),
    }
    for problem, where in found.items():
        if bool(where.any()):
            token, layer = where.nonzero()[0].tolist()
            raise ValueError(
                f"replay: at token {token}, MoE layer {layer}, experts {routed_TMK[token, layer].tolist()} of "
                f"{config.experts} {problem} ({int(where.sum())} such choices)"
            )


class Experts(nn.Module):
    """All experts' SwiGLUs as two 3-D parameters: ``gate_up (E, 2F, D)`` and ``down (E, D, F)``.

    Once :meth:`split_experts` has dealt them out (expert parallelism), tokens travel to the rank of their expert and
    back. Then every forward is a collective of those ranks, and so is its backward.
    """

    def __init__(self, experts: int, width: int, ffn: int, depth: int):
        super().__init__()
        self.depth = depth
        self.group: ProcessGroup | None = None  # the ranks that share the experts
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * ffn, width))
        self.down = nn.Parameter(torch.empty(experts, width, ffn))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up, std=matrix_std(self.gate_up.shape[2], 0))
        nn.init.normal_(self.down, std=matrix_std(self.down.shape[2], self.depth))

    def parameter_roles(self, role: str) -> dict[str, ParamRole]:
        ffn = self.down.shape[2]
        return {"gate_up": ParamRole(role, matrix=True, splits=(ffn, ffn)), "down": ParamRole(role, matrix=True)}

    def split_experts(self, mesh: DeviceMesh) -> None:
        """Keep this rank's equal share of the experts, as ``DTensor`` parameters over the one-dimensional ``mesh``.

        Raises ``ValueError`` where the experts do not divide by its ranks."""
        experts, ranks = self.gate_up.shape[0], mesh.size()
        if experts % ranks:
            raise ValueError(f"{experts} experts cannot be shared evenly by {ranks} ranks")
        self.group = mesh.get_group()  # not the parameters' mesh: torch takes meshes of the same ranks for the same
        for name, whole in list(self.named_parameters(recurse=False)):
            own = whole.detach().chunk(ranks)[mesh.get_local_rank()].clone()
            shared = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            setattr(self, name, nn.Parameter(shared, requires_grad=whole.requires_grad))

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        if self.group is None and few(x_TD, self.gate_up):
            return serve_few(x_TD, chosen_TK, gates_TK, self.gate_up, self.down)
        dispatch = plan_dispatch(chosen_TK, self.gate_up.shape[0])
        x_ND = scatter_to_experts(x_TD, dispatch, chosen_TK.shape[1])
        if self.group is not None:
            y_ND = self._serve_elsewhere(x_ND, dispatch.counts, self.group)
        else:
            y_ND = _serve(x_ND, self.gate_up, self.down, dispatch.counts)
        return collect_from_experts(y_ND, gates_TK, dispatch)

    def _serve_elsewhere(self, x_ND: Tensor, counts_E: Tensor, group: ProcessGroup) -> Tensor:
        """Rows sorted by expert, and therefore by rank, to where the experts are, and what these make of them."""
        gate_up, down = self.gate_up.to_local(), self.down.to_local()
        going_RE = counts_E.view(-1, gate_up.shape[0])
        ranks = (1,) * going_RE.shape[0]
        coming_RE = dist.all_to_all(going_RE, ranks, ranks, group)
        sends, receives = torch.stack([going_RE.sum(1), coming_RE.sum(1)]).tolist()  # the host cannot do without
        came = dist.all_to_all(x_ND, sends, receives, group)
        arrival = plan_arrival(coming_RE, came.shape[0])
        served = _serve(sort_by_expert(came, arrival), gate_up, down, arrival.counts)
        return dist.all_to_all(unsort_by_expert(served, arrival), receives, sends, group)


def _serve(x_ND: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return grouped_linear(swiglu(grouped_linear(x_ND, gate_up_EFD, counts_E)), down_EDF, counts_E)


class MoE(nn.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: MoEConfig, width: int, depth: int):
        super().__init__()
        self.router = Router(config, width)
        self.experts = Experts(config.experts, width, config.ffn, depth)
        self.shared = SwiGLU(width, config.shared * config.ffn, depth=depth) if config.shared else None

    def forward(
        self, x_TD: Tensor, documents: Documents | None, replay_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        gates, routing = self.router(x_TD, documents, replay_TK)
        out = self.experts(x_TD, routing.chosen, gates)
        return out if self.shared is None else out + self.shared(x_TD), routing
