"""Noise, packs with noised copies, and the objective over them, against a plain reading of one response at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.noise import (
    Copy,
    Draws,
    NoiseConfig,
    NoiseIds,
    Response,
    acted,
    edited,
    exactly_masked,
    masked,
    revealed,
)
from mmagent.objectives.noised import noised, responses
from mmagent.protocols import Objective
from mmagent.testing import check_objective
from mmagent.trajectories import UnmaskingBatch
from mmagent.types import IGNORE
from tests.diffusion_kit import FILL, IDS, MASK, ROWS, documents, make_model, naive_blocks, predict, with_response
from tests.model_kit import make_document, make_pack


def response(units: list[int], real: int | None = None) -> Response:
    n = len(units)
    flags = np.arange(n) < (n if real is None else real)
    ids = np.where(flags, 5 + np.arange(n) % 7, FILL)
    return Response("k", ids, np.array(units), np.zeros(n, dtype=np.int64), flags, np.arange(n))


def distance(a: list[int], b: list[int]) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_responses_are_cut_from_their_own_first_token_and_filled_to_whole_blocks():
    batch = make_pack(documents(), tail=3)
    said = responses(batch, 4, True, FILL)
    assert [len(r.ids) for r in said] == [12, 8, 8 + 4]
    assert said[0].real.sum() == 9
    assert said[0].ids[9:].tolist() == [FILL] * 3
    assert said[2].run.tolist() == [0] * 8 + [1] * 4
    assert said[2].real.tolist() == [True] * 5 + [False] * 3 + [True] * 4
    for n, r in enumerate(said):
        wanted = naive_blocks(documents()[n]["labels"], 4)
        start = batch.segments.offsets()[n]
        assert [wanted[at - start] for at in r.at] == r.unit.tolist()
    assert [len(r.ids) for r in responses(batch, 0, True, FILL)] == [9, 8, 9]


def test_at_once_the_response_that_ends_a_document_is_filled_to_whole_spans():
    """A prompt that goes on behind an answer leaves it as it is: in the third document, and the first of the fourth."""
    last = with_response(make_document([14], 4, ROWS), 3, 14)
    last["labels"][6:9] = IGNORE
    batch = make_pack([*documents(), last], tail=3)
    said = responses(batch, 0, True, FILL, 6)
    assert [len(r.ids) for r in said] == [9 + 3, 8 + 4, 9, 3 + 6]
    assert said[1].ids[8:].tolist() == [FILL] * 4
    assert said[1].real.tolist() == [True] * 8 + [False] * 4
    assert said[3].run.tolist() == [0] * 3 + [1] * 6
    assert said[3].real.sum() == 3 + 5
    assert [len(r.ids) for r in responses(batch, 0, False, FILL, 6)] == [9, 8, 9, 8]


@pytest.mark.parametrize(("block", "span", "filled"), [(4, 0, [12, 8, 5 + 4]), (0, 6, [12, 8, 9])])
def test_what_ends_with_no_end_is_not_filled(block, span, filled):
    """A text that was cut, or goes on behind a picture: the end of the text would be a lie."""
    texts = documents()
    texts[0]["labels"][17] = texts[0]["ids"][17] = FILL + 2
    for text in texts[1:]:  # neither ends with it
        text["labels"][text["labels"] == FILL + 2] = FILL + 3
    said = responses(make_pack(texts, tail=3), block, True, FILL, span, (FILL + 2,))
    assert [len(r.ids) for r in said] == filled
    assert [int((~r.real).sum()) for r in said] == [3, 0, 0]
    assert [len(set(r.unit.tolist())) for r in said] == ([3, 2, 3] if block else [1, 1, 1])


def test_masks_have_the_chance_they_are_weighed_by():
    rng = np.random.default_rng(0)
    units = [0] * 4 + [1] * 4
    whole = np.array([masked(response(units), IDS, 1e-3, rng).weights for _ in range(20000)])
    # E[1 / p where masked] = 1 at every place; weights reach 1000, so the mean of 160,000 still wanders by 1 %
    assert whole.mean() == pytest.approx(1.0, abs=0.05)
    share = (whole > 0).mean(0)
    np.testing.assert_allclose(share, 0.5, atol=0.02)
    # two units of one response are spread: their chances differ by a half exactly
    chances = [sorted({round(1 / w, 6) for w in row if w}) for row in whole if (row > 0).all()]
    assert all(b - a == pytest.approx(0.4995, abs=1e-3) for a, b in chances)


def test_exactly_l_of_a_block_are_masked_every_l_as_often():
    rng, counts = np.random.default_rng(0), np.zeros(5)
    for _ in range(5000):
        copy = exactly_masked(response([7] * 4), IDS, rng)
        many = int((copy.ids == MASK).sum())
        counts[many] += 1
        assert set(copy.weights.tolist()) <= {0.0, 4 / many}
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:] / 5000, 0.25, atol=0.03)


def test_edits_keep_length_and_stay_within_their_number_and_their_block():
    rng, most = np.random.default_rng(0), 0
    for _ in range(400):
        said = response([0] * 10 + [1] * 10, real=17)
        copy = edited(said, IDS, 0.3, rng)
        assert len(copy.ids) == 20
        assert copy.ids[17:].tolist() == [FILL] * 3
        assert not np.isin(copy.ids, IDS.barred).any()
        by_block = [distance(copy.ids[part].tolist(), said.ids[part].tolist()) for part in (slice(10), slice(10, 20))]
        assert sum(by_block) <= int(17 * 0.3)
        most = max(most, sum(by_block))
        assert (copy.weights == 1).all()
    assert most >= 4
    assert (edited(response([0] * 9), IDS, 0.1, rng).ids == response([0] * 9).ids).all(), "a tenth of nine is no edit"


def test_states_of_a_known_way_mask_what_comes_later():
    rng = np.random.default_rng(0)
    order = np.array([1, 0, 0, 2, 0, 1])
    said, seen, steps = response([0, 0, 0, 0, 1, 1]), set(), np.zeros(6)
    for _ in range(3000):
        state = revealed(said, IDS, order, rng)
        for unit in (slice(0, 4), slice(4, 6)):
            hidden = state.weights[unit] > 0
            assert ((state.ids[unit] == MASK) == hidden).all()
            assert order[unit][hidden].min() > order[unit][~hidden].max(initial=-1)
            assert state.weights[unit].sum() == pytest.approx(len(hidden))
        seen.add(tuple((state.weights[:4] > 0).tolist()))
        step = acted(said, IDS, order, rng)
        steps += step.weights
        assert (step.ids == MASK).sum() >= (step.weights > 0).sum()
    assert len(seen) == 3
    np.testing.assert_allclose(steps / 3000, 1.0, atol=0.1)  # every token acts once in expectation


@pytest.mark.parametrize("fill", [True, False])
def test_one_pass_over_copies_is_every_block_alone_behind_its_clean_past(fill):
    """The independent reading: the prompt and the clean blocks before, then one noised block, nothing else."""
    model, batch = make_model(), make_pack(documents(), tail=2)
    said = responses(batch, 4, fill, FILL)
    rng = np.random.default_rng(3)
    copies = {r.key: [masked(r, IDS, 0.2, rng), edited(r, IDS, 0.5, rng)] for r in said}
    noisy = noised(batch, said, lambda r: copies[r.key], ("mask", "edit"), 4)
    with torch.no_grad():
        hidden = model(noisy.stream, mtp=False, attend=noisy.attend).hidden
    logits = hidden @ model.head_weight.T
    logits[:, list(IDS.barred)] = -torch.inf
    got, start = logits.log_softmax(-1), 0
    for document, r, length in zip(documents(), said, noisy.stream.segments.lengths, strict=False):
        at = start + len(document["ids"])
        blocks, first = naive_blocks(document["labels"], 4), _begin(r, batch)
        for copy in copies[r.key]:
            for unit in sorted(set(r.unit.tolist())):
                inside = np.flatnonzero(r.unit == unit)
                past = [n for n, block in enumerate(blocks) if block < unit]
                ids = torch.cat([document["ids"][past], torch.from_numpy(copy.ids[inside])])
                behind = torch.arange(len(inside)) + document["positions"][:, r.at[inside[0]] - first, None]
                positions = torch.cat([document["positions"][:, past], behind], dim=1)
                wanted = predict(model, document, [*(blocks[n] for n in past), *[unit] * len(inside)], ids, positions)
                there = got[at + torch.from_numpy(inside)]
                torch.testing.assert_close(there, wanted[len(past) :], rtol=2e-4, atol=2e-4)  # sums in another order
            at += len(r.ids)
        start += length


def _begin(r: Response, batch) -> int:
    return batch.segments.offsets()[batch.keys.index(r.key)]


@pytest.mark.parametrize("span", [0, 6])
def test_whole_documents_at_once_are_each_alone_and_share_pictures(span):
    model, batch = make_model(), make_pack(documents(), tail=2)
    said = responses(batch, 0, True, FILL, span)
    rng = np.random.default_rng(3)
    copies = {r.key: [masked(r, IDS, 0.2, rng) for _ in range(2)] for r in said}
    noisy = noised(batch, said, lambda r: copies[r.key], ("mask",), 0)
    noisy.stream.validate(1, 2)
    assert noisy.stream.vision is batch.vision
    with torch.no_grad():
        hidden = model(noisy.stream, mtp=False, attend=noisy.attend).hidden
    logits = hidden @ model.head_weight.T
    logits[:, list(IDS.barred)] = -torch.inf
    got, start = logits.log_softmax(-1), 0
    for document, r in zip(documents(), said, strict=True):
        for copy in copies[r.key]:
            seen, ids, positions = torch.from_numpy(copy.ids), document["ids"].clone(), document["positions"]
            ids[torch.from_numpy(r.at[r.real]) - _begin(r, batch)] = seen[r.real]
            more = int((~r.real).sum())
            assert bool(more) == (span > 0 and document["labels"][-1] != IGNORE)
            ids = torch.cat([ids, seen[~r.real]])
            positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, more + 1)], dim=1)
            wanted = predict(model, document, [0] * len(ids), ids, positions)
            torch.testing.assert_close(got[start : start + len(ids)], wanted, rtol=2e-4, atol=2e-4)
            start += len(ids)


@pytest.mark.parametrize(("block", "span", "edits"), [(4, 0, -1), (4, 0, 0), (0, 0, 0), (0, 6, 0)])
def test_packed_equals_separate(block, span, edits):
    """Sums, counts, metrics and gradients: the noise of a document is its own."""
    config = BlockDiffusionConfig(NoiseConfig(block, span, edits=0.5), copies=2, edits_after=edits)
    objective = BlockDiffusion(make_model(), config, IDS)
    assert isinstance(objective, Objective)
    whole = make_pack(documents(), tail=3)
    parts = [_renamed(make_pack([document]), n) for n, document in enumerate(documents())]
    check_objective(objective, whole, parts, tolerance=5e-4)


def _renamed(batch, n: int):
    return replace(batch, keys=(f"document-{n}",))


def test_loss_is_the_weighted_cross_entropy_of_places_and_prompts_cost_nothing():
    objective = BlockDiffusion(make_model(), BlockDiffusionConfig(NoiseConfig(4)), IDS).train()
    batch = make_pack(documents())
    output, counts = objective(batch), objective.counts(batch)
    assert int(counts["mask"]) == 12 + 8 + 12
    sources = [v for k, v in output.metrics.items() if k.startswith("loss_by_source")]
    assert sum(float(v.numerator) for v in sources) == pytest.approx(float(output.sums["mask"].detach()), rel=1e-5)
    assert sum(float(v.denominator) for v in sources) == float(counts["mask"])
    unsaid = make_pack([{**d, "labels": torch.full_like(d["labels"], IGNORE)} for d in documents()])
    assert float(objective(unsaid).sums["mask"].detach()) == 0
    assert int(objective.counts(unsaid)["mask"]) == 0


def test_every_step_draws_other_noise_and_a_run_that_goes_on_the_same():
    objective = BlockDiffusion(make_model(), BlockDiffusionConfig(NoiseConfig(4), edits_after=2), IDS).train()
    batch, losses = make_pack(documents()), []
    for _ in range(4):
        with torch.no_grad():
            losses.append(float(objective(batch).sums["mask"]))
        assert (int(objective.counts(batch)["edit"]) > 0) == (objective.draws.step >= 2)
        objective.after_step()
    assert len(set(losses)) == 4
    again = Draws()
    objective.draws.load_state_dict({"step": 1})
    assert objective.draws.state_dict() == {"step": 1} != again.state_dict()
    with torch.no_grad():
        assert float(objective(batch).sums["mask"]) == losses[1]
        objective.eval()
        judged = float(objective(batch).sums["mask"])
        objective.draws.step = 9  # edited copies share the pack by now: products of other shapes round otherwise
        assert float(objective(batch).sums["mask"]) == pytest.approx(judged, rel=1e-5)


def test_known_ways_are_learnt_from_their_own_states():
    objective = BlockDiffusion(make_model(), BlockDiffusionConfig(NoiseConfig(4)), IDS).train()
    batch = make_pack(documents())
    order = torch.arange(batch.input_ids.shape[0]) % 3
    known = UnmaskingBatch(batch, torch.where(batch.labels == IGNORE, -1, order))
    assert float(objective(known).sums["mask"].detach()) > 0
    assert objective.counts(known)["mask"] == objective.counts(batch)["mask"]
    with pytest.raises(ValueError, match="order"):
        UnmaskingBatch(batch, order[:-1])


def test_the_state_of_the_routers_moves_with_the_objective():
    objective = BlockDiffusion(make_model(), BlockDiffusionConfig(NoiseConfig(4)), IDS).train()
    objective(make_pack(documents()))
    assert "router/max_vio" in objective.after_step()
    assert objective.router_load is not None
    assert objective.after_step() == {}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NoiseConfig(block=-1), "noise.block"),
        (lambda: NoiseConfig(block=4, span=8), "noise.span 8"),
        (lambda: NoiseConfig(least=0.0), "noise.least"),
        (lambda: NoiseConfig(edits=1.5), "noise.edits"),
        (lambda: BlockDiffusionConfig(copies=0), "copies"),
        (lambda: NoiseIds.of(3, 3, 10), "mask 3 and fill 3"),
        (lambda: NoiseIds.of(2, 3, 10, (3,)), "fill 3 can never"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_copies_of_unknown_shapes_do_not_pass_as_others():
    batch = make_pack(documents())
    said = responses(batch, 4, True, FILL)
    none = noised(batch, said, lambda r: [], ("mask",), 4)
    assert none.stream.segments.lengths == batch.segments.lengths
    kept = noised(batch, said, lambda r: [Copy("mask", r.ids, np.zeros(len(r.ids)))], ("mask",), 4)
    assert bool((kept.stream.labels == IGNORE).all())
