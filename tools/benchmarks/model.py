"""The packed decoder and its loss, forward and backward, against Glm4MoeForCausalLM with the same weights.

`packed row`: its documents in one row, kept apart by positions, which makes a dense mask. `padded`: one row a document.
Documents hold 102 to 512 tokens, 60 % of the longest on average. Then the chunked output head against whole logits:
time, and the most memory that tensors hold at one time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.interop.glm import from_transformers
from mmagent.models.agent_model import AgentModel
from mmagent.models.decoder import PackedAttention
from mmagent.models.moe import Documents
from mmagent.ops.cross_entropy import linear_cross_entropy
from mmagent.ops.shift import shift
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import IGNORE, Segments
from tools.benchmarks.row import Row, Settings, smaller_is_better, throughput

VOCABULARY = 2048


def transformers_model() -> nn.Module:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, moe_intermediate_size=256, num_experts_per_tok=2, n_routed_experts=8,
        n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True, attention_bias=True, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    return Glm4MoeForCausalLM._from_config(config)


def documents(tokens: int) -> list[Tensor]:
    """About ``tokens`` in all; lengths uniform, their mean 0.6 of the longest."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.randint(102, 513, (max(tokens // 307, 1),), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


def our_loss(model: AgentModel, texts: list[Tensor]) -> Tensor:
    ids, segments = torch.cat(texts), Segments([len(t) for t in texts])
    positions = torch.cat([torch.arange(len(t)) for t in texts])
    attend, statistics = PackedAttention(segments), Documents(segments)
    hidden = model.decoder(model.embed_tokens(ids), positions, attend, documents=statistics).hidden
    return linear_cross_entropy(hidden, model.head_weight, shift(ids, 1, segments)).total / ids.shape[0]


def packed_row_loss(model: nn.Module, texts: list[Tensor]) -> Tensor:
    ids, segments = torch.cat(texts), Segments([len(t) for t in texts])
    positions = torch.cat([torch.arange(len(t)) for t in texts])
    logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
    total = F.cross_entropy(logits.float(), shift(ids, 1, segments), ignore_index=IGNORE, reduction="sum")
    return total / ids.shape[0]


def padded_loss(model: nn.Module, texts: list[Tensor]) -> Tensor:
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (ids > 0).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = torch.where(ids > 0, ids, IGNORE)[:, 1:].flatten()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / sum(len(t) for t in texts)


def trained(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        model.zero_grad()

    return step


def rows(settings: Settings) -> Iterator[Row]:
    ensure_torchvision()
    theirs = transformers_model()
    ours = from_transformers(theirs)
    for tokens in (512,) if settings.quick else (1024, 2048, 4096):
        texts = documents(tokens)
        check(ours, theirs, texts)
        mine = trained(ours, lambda t=texts: our_loss(ours, t))
        for peer_name, function in (
            ("transformers, packed row", packed_row_loss),
            ("transformers, padded", padded_loss),
        ):
            peer = trained(theirs, lambda f=function, t=texts: f(theirs, t))
            total = sum(len(t) for t in texts)
            yield throughput(f"decoder, {total} tokens, bf16", mine, peer, peer_name, total, "tokens/s", settings)
    yield from head_rows(settings)


def check(ours: AgentModel, theirs: nn.Module, texts: list[Tensor]) -> None:
    """A comparison of speed is void unless both sides compute the same."""
    with torch.no_grad():
        torch.testing.assert_close(our_loss(ours, texts), packed_row_loss(theirs, texts), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(our_loss(ours, texts), padded_loss(theirs, texts), atol=1e-4, rtol=1e-4)


def head_problem(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 256, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 256, generator=generator).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def head_step(kind: str, tokens: int, vocabulary: int) -> Callable[[], None]:
    hidden, weight, targets = head_problem(tokens, vocabulary)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            if kind == "chunked":
                loss = linear_cross_entropy(hidden, weight, targets).total
            else:
                loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
        loss.backward()
        hidden.grad = weight.grad = None

    return step


def head_rows(settings: Settings) -> Iterator[Row]:
    tokens, vocabulary = (1024, 4096) if settings.quick else (4096, 32768)
    name = f"head and loss, {tokens} tokens, vocabulary {vocabulary}"
    mine, peer = (head_step(kind, tokens, vocabulary) for kind in ("chunked", "whole"))
    yield throughput(name, mine, peer, "whole logits", tokens, "tokens/s", settings)
    yield smaller_is_better(f"{name}: peak", peak_memory(mine), peak_memory(peer), "whole logits", "MiB")


def peak_memory(step: Callable[[], None]) -> float:
    """MiB: the largest running sum of what tensors allocate and free during one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = highest = 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return highest / 2**20
