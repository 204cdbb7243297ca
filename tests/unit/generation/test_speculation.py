"""Drafts of the MTP head change how fast tokens come, and never which ones or how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmagent.generation import generator as generator_module
from mmagent.generation import speculation
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.generation.sequences import PROBE, Hopes
from mmagent.models.agent_model import AgentModel, logits
from mmagent.models.mtp import MODES, MTPConfig
from mmagent.packing import pack
from mmagent.trajectories import Completion, Limits, Trajectory
from tests.agent_kit import GEOMETRY, model_with, picture, prompt, recompute, tiny_model, tiny_vocab

STOPS = tiny_vocab().stop_ids


def prompts() -> list[Trajectory]:
    shared = picture(1)
    return [
        prompt("click the red button", (shared,), key="a"),
        prompt("", (picture(2, 56, 56), picture(3, 84, 56)), key="b"),
        prompt("words alone", key="c"),
        prompt("a much longer request about the field " * 3, (picture(4),), key="d"),
    ]


def ask(model: AgentModel, limits: list[Limits], rows: list[Trajectory] | None = None, **config) -> list[Completion]:
    generator = Generator(model, tiny_vocab(), GeneratorConfig(**config))
    done = generator.generate(list(zip(prompts() if rows is None else rows, limits, strict=True)))
    generator.pool.check([])
    return done


def recorded(generator: Generator, right: list[list[int]] | None = None) -> list[tuple[list[int], int, list[int]]]:
    """Filled as it decodes: the tokens of a sequence when drafts were made, how many were fed, and the drafts. With
    ``right``, whole sequences, what stands there is tried in place of every draft, so that all of them stay."""
    out: list[tuple[list[int], int, list[int]]] = []
    draft = generator.drafter.draft

    def spy(run, wanted):
        made = draft(run, wanted)
        for row, sequence in enumerate(run.sequences):
            if made is not None and wanted.drafts[row]:
                here = made.ids[row, : wanted.drafts[row]]
                out.append((list(sequence.ids), int(run.fed[row]), here.tolist()))
                if right is not None:
                    known = len(sequence.ids)
                    (whole,) = [ids for ids in right if ids[:known] == sequence.ids]
                    here.copy_(torch.tensor(whole[known : known + len(here)]))
        return made

    generator.drafter.draft = spy
    return out


@pytest.mark.parametrize(
    ("mode", "depths", "tied"), [("shared", 1, True), ("fused", 2, True), ("masked", 3, False), ("shared", 3, True)]
)
def test_greedy_tokens_are_those_without_drafts(mode, depths, tied):
    model = model_with(MTPConfig(depths=depths, tied=tied, mode=mode))
    limits = [Limits(9 + 7 * n, 0.0, stop_ids=STOPS) for n in range(4)]
    plain = ask(model, limits, record_routing=True)
    for speculate, least in ((1, 0.0), (3, 0.35), (5, 0.0)):
        drafted = ask(model, limits, speculate=speculate, speculate_least=least, record_routing=True)
        for a, b in zip(plain, drafted, strict=True):
            assert (a.ids, a.stopped, a.reason) == (b.ids, b.stopped, b.reason)
            assert b.logprobs == pytest.approx(a.logprobs, abs=4e-6)  # logits, up to 60, are rounded to float32
            assert all(map(torch.equal, a.routed_experts, b.routed_experts))


@pytest.mark.parametrize(
    ("mode", "depths", "tied", "config"),
    [(mode, 1, True, {}) for mode in MODES]
    + [("shared", 2, True, {"prefill_tokens": 7}), ("fused", 3, False, {"prefill_tokens": 30})],
)
def test_what_a_depth_drafts_is_what_it_was_trained_to_say(mode, depths, tied, config):
    """Every draft against the training's forward over all that was known when it was made."""
    model, vocab = model_with(MTPConfig(depths=depths, tied=tied, mode=mode)), tiny_vocab()
    generator = Generator(model, vocab, GeneratorConfig(speculate=depths, speculate_least=0.0, **config))
    made = recorded(generator)
    rows = prompts()
    generator.generate([(row, Limits(12, 0.0)) for row in rows])
    assert len(made) > 15
    check_drafts(model, vocab, rows, made)


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize(("depths", "speculate"), [(1, 1), (1, 3), (2, 2), (3, 3)])
def test_what_it_drafts_behind_drafts_that_stayed_is_as_good(depths, speculate, steady):
    """Then the head is fed several tokens of a sequence at once and asked for its state at the last of them. A head
    that is not trained is seldom right, so what it said is written down and what is right is tried in its place."""
    model, vocab, rows = model_with(MTPConfig(depths=depths)), tiny_vocab(), prompts()
    asked = [(row, Limits(5 + 9 * n, 0.0)) for n, row in enumerate(rows)]
    plain = [list(done.ids) for done in Generator(model, vocab).generate(asked)]
    config = GeneratorConfig(speculate=speculate, speculate_least=0.0, steady=steady)
    generator = Generator(model, vocab, config)
    right = [[*row.input_ids, *ids] for row, ids in zip(rows, plain, strict=True)]
    made = recorded(generator, right)
    assert [list(done.ids) for done in generator.generate(asked)] == plain
    stayed = sum(count for (_, _, what), count in generator.drafter.stats.items() if what == "accepted")
    assert stayed > 10
    check_drafts(model, vocab, rows, [(ids, fed, drafts[:depths]) for ids, fed, drafts in made])


def check_drafts(model, vocab, rows, made) -> None:
    """Each against the training's forward."""
    barred = list(vocab.barred(model.config.vocab_size))
    for ids, fed, drafts in made:
        (row,) = [row for row in rows if row.input_ids == ids[: len(row)]]
        whole = Trajectory("whole", "toy")
        whole.extend([*ids, *drafts], trainable=False, images=row.images)
        batch = pack([whole.document()], image_id=vocab.image_id, merge_size=GEOMETRY.merge_size)
        with torch.no_grad():
            hidden = model(batch).mtp_hidden
        for depth, draft in enumerate(drafts, start=1):
            scores = logits(model, hidden[depth - 1][fed - 1 : fed])[0]
            scores[barred] = float("-inf")
            assert draft == int(scores.argmax()), (row.key, fed, depth)


def test_the_head_computes_no_more_of_a_prompt_than_its_keys_and_values():
    """Nobody asks for the last depth's states there: attention and experts of a whole block would be for nothing."""
    model = model_with(MTPConfig(depths=2, tied=False))
    generator = Generator(model, tiny_vocab(), GeneratorConfig(speculate=2, speculate_least=0.0, reuse=False))
    fed: dict[int, list[int]] = {1: [], 2: []}
    for depth in fed:
        norm = model.mtp.module_for(depth).block.ffn_norm
        norm.register_forward_pre_hook(lambda _, args, rows=fed[depth]: rows.append(args[0].shape[0]))
    row, made = prompts()[0], recorded(generator)
    generator.generate([(row, Limits(10, 0.0))])
    assert fed[1][0] == len(row)  # the second depth goes on from each of these
    assert sum(fed[2]) == sum(len(drafts) > 1 for *_, drafts in made) > 0  # for second drafts alone


def test_a_found_prefix_is_as_good_to_the_head_as_its_own(monkeypatch):
    """Later turns draft what they would without a cache, whatever filled it."""
    monkeypatch.setitem(generator_module.BLOCK_TOKENS, "cpu", 4)
    model = model_with(MTPConfig(depths=2))
    rows = {reuse: prompts() for reuse in (True, False)}
    made = {}
    for reuse, episodes in rows.items():
        generator = Generator(model, tiny_vocab(), GeneratorConfig(speculate=3, speculate_least=0.0, reuse=reuse))
        made[reuse] = recorded(generator)
        for turn in range(3):
            for episode in episodes:  # one by one: the same rounds either way
                (done,) = generator.generate([(episode, Limits(10 + turn, 0.0))])
                assert (done.cached_tokens > 4) == bool(turn and reuse)  # four begin every prompt
                episode.extend(done.ids, trainable=True, logprobs=done.logprobs)
                episode.extend(tiny_vocab().encode("and then"), trainable=False)
    assert made[True] == made[False]


def test_drafts_of_a_sampled_sequence_leave_its_distribution_alone():
    """Two tokens of 6,000 draws against their exact probabilities; with a head that is often wrong."""
    model, vocab = model_with(MTPConfig(depths=1), seed=3), tiny_vocab()
    with torch.no_grad():
        model.head_weight.mul_(0.25)
    ask_for = prompt("words")
    draws = 6000
    generator = Generator(model, vocab, GeneratorConfig(max_sequences=2000, speculate=2, speculate_least=0.0))
    rows = [(prompt("words", key=str(n)), Limits(3, 1.0, seed=n, top_k=6)) for n in range(draws)]
    pairs = [done.ids[:2] for done in generator.generate(rows)]
    stats = generator.drafter.stats
    assert 0.05 < stats["text_only", 1, "accepted"] / stats["text_only", 1, "tried"] < 0.95

    def probabilities(*behind: int) -> torch.Tensor:
        whole = Trajectory("whole", "toy")
        whole.extend([*ask_for.input_ids, *behind], trainable=False)
        batch = pack([whole.document()], image_id=vocab.image_id, merge_size=2)
        with torch.no_grad():
            scores = logits(model, model(batch, mtp=False).hidden[-1:])[0]
        scores[list(vocab.barred(model.config.vocab_size))] = float("-inf")
        best = scores.topk(6).indices
        return torch.zeros_like(scores).index_copy_(0, best, scores[best].softmax(0)).double()

    first = probabilities()
    expected = {(a, b): float(first[a] * p[b]) for a in first.nonzero().flatten().tolist()
                for p in [probabilities(a)] for b in p.nonzero().flatten().tolist()}  # fmt: skip
    counts = dict.fromkeys(expected, 0)
    for pair in pairs:
        counts[pair] += 1  # a KeyError is a token that was impossible
    cells = [pair for pair, share in expected.items() if share * draws >= 5]
    rest = draws - sum(counts[pair] for pair in cells), draws * (1 - sum(expected[pair] for pair in cells))
    chi2 = sum((counts[pair] - draws * expected[pair]) ** 2 / (draws * expected[pair]) for pair in cells)
    chi2 += (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    freedom = len(cells)
    assert freedom >= 15
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)  # five deviations of a chi-square


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_what_is_drafted_or_drawn_in_its_stead_are_the_trainer_s(temperature):
    model, rows = model_with(MTPConfig(depths=2)), prompts()
    generator = Generator(model, tiny_vocab(), GeneratorConfig(speculate=3, speculate_least=0.0))
    limits = [Limits(40, temperature, seed=n, top_p=0.9 if n % 2 else 1.0) for n in range(len(rows))]
    done = generator.generate(list(zip(rows, limits, strict=True)))
    stats = generator.drafter.stats
    assert all(0 < stats[context, 1, "accepted"] < stats[context, 1, "tried"] for context in speculation.CONTEXTS)
    for row, completion in zip(rows, done, strict=True):
        row.extend(completion.ids, trainable=True, logprobs=completion.logprobs)
        expected = recompute(model, row, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs, dtype=expected.dtype), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_is_pushed_out_goes_on_with_the_same_tokens(temperature, monkeypatch):
    """Drafts, verdicts and draws are numbered by their place, so a step back changes none of them."""
    monkeypatch.setitem(generator_module.BLOCK_TOKENS, "cpu", 4)
    model = model_with(MTPConfig(depths=2))
    limits = [Limits(43, temperature, seed=n) for n in range(4)]
    settings = {"speculate": 3, "speculate_least": 0.2}
    plenty = ask(model, limits, **settings)
    tight = Generator(model, tiny_vocab(), GeneratorConfig(cache_tokens=160, prefill_tokens=16, **settings))
    done = tight.generate(list(zip(prompts(), limits, strict=True)))
    assert tight.counts["preempted"] > 1
    assert [c.ids for c in done] == [c.ids for c in plenty]
    tight.pool.check([])


def test_the_head_of_a_steady_row_reads_as_many_tokens_at_a_time_in_any_company():
    """It reads them when drafts are wanted; once, when any row wanted some. Sampled tokens hang on a draft's last bit,
    though hardly ever."""
    model, rows = tiny_model(), prompts()[:3]
    limits = [Limits(60, 1.0, seed=3), Limits(60, 1.0, seed=4), Limits(45, 0.7, seed=5)]

    def shares(chosen: list[int]) -> dict[tuple[str, int, int], torch.Tensor]:
        generator, out = Generator(model, tiny_vocab(), GeneratorConfig(speculate=2, steady=True)), {}
        say = generator.drafter._say

        def spy(run, at_rows, at, hidden, sampled):
            ids, share = say(run, at_rows, at, hidden, sampled)
            for n, row in enumerate(at_rows.tolist()):
                sequence = run.sequences[row]
                out[sequence.prompt.key, len(sequence.ids), at] = share[n].clone()
            return ids, share

        generator.drafter._say = spy
        generator.generate([(rows[n], limits[n]) for n in chosen])
        return out

    together = shares([0, 1, 2])
    for n in range(3):
        alone = shares([n])
        assert max(length for _, length, _ in alone) > len(rows[n]) + 2 * PROBE, "it has to stop drafting for a while"
        assert all(torch.equal(together[what], share) for what, share in alone.items())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steady_rows_draft_the_same_bits_in_any_company(temperature):
    model = tiny_model()

    def play(order: list[int], most: int = 256) -> dict[int, Completion]:
        rows = prompts()
        config = GeneratorConfig(most, speculate=2, steady=True, record_routing=True)
        generator = Generator(model, tiny_vocab(), config)
        done = generator.generate([(rows[n], Limits(12, temperature, seed=n)) for n in order])
        assert sum(count for (*_, kind), count in generator.drafter.stats.items() if kind == "tried")
        return dict(zip(order, done, strict=True))

    whole = play([0, 1, 2, 3])
    for order, most in (([3, 2, 1, 0], 256), ([2], 256), ([1, 3], 256), ([0, 1, 2, 3], 1)):
        for n, completion in play(order, most).items():
            assert (completion.ids, completion.logprobs) == (whole[n].ids, whole[n].logprobs), (order, n)


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_next_likeliest_are_tried_beside_a_draft(depth, steady, monkeypatch):
    """Fewer forwards for the same tokens, numbers and later turns; within the blocks that a request may have."""
    monkeypatch.setattr(speculation, "ROWS", 31)  # so that three requests with three drafts have some, too
    monkeypatch.setitem(generator_module.BLOCK_TOKENS, "cpu", 4)
    model = model_with(MTPConfig(depths=1))
    rounds, answers = {}, {}
    for width in (1, 4, 9):
        settings = {"speculate": depth, "speculate_least": 0.0, "speculate_width": width, "steady": steady}
        generator = Generator(model, tiny_vocab(), GeneratorConfig(record_routing=True, **settings))
        verdicts, judge = [], generator.drafter.judge
        generator.drafter.judge = lambda *given, judge=judge, verdicts=verdicts: (
            verdicts.append(judge(*given)) or verdicts[-1]
        )
        found, rows = [], prompts()[:3]
        for _ in range(2):
            done = generator.generate([(row, Limits(30 + n, 0.0)) for n, row in enumerate(rows)])
            found += done
            for row, completion in zip(rows, done, strict=True):
                row.extend(completion.ids, trainable=True, logprobs=completion.logprobs)
                row.extend(tiny_vocab().encode("and then"), trainable=False)
        generator.pool.check([])
        rounds[width], answers[width] = len(verdicts), found
        stats = generator.drafter.stats
        instead = sum(int(verdict.instead.sum()) for verdict in verdicts)
        assert (instead > 0) == (width > 1)
        assert instead == sum(count for (*_, kind), count in stats.items() if kind == "instead")
    assert rounds[9] <= rounds[4] < rounds[1]
    for width in (4, 9):
        for a, b in zip(answers[1], answers[width], strict=True):
            assert a.ids == b.ids
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-5)
            assert all(map(torch.equal, a.routed_experts, b.routed_experts))


def test_what_is_sampled_has_drafts_alone():
    generator = Generator(model_with(MTPConfig(depths=1)), tiny_vocab(), GeneratorConfig(speculate=2))
    limits = [Limits(20, temperature, seed=n) for n, temperature in enumerate((0.0, 1.0))]
    generator.generate(list(zip(prompts()[:2], limits, strict=True)))
    assert not any(count for (*_, kind), count in generator.drafter.stats.items() if kind == "instead")


def test_more_is_tried_the_less_the_head_is_sure(monkeypatch):
    """With all it says on one token there is nothing to try beside that, and another draft behind it; with little on
    each, others beside the first and nothing behind."""
    model, tried = model_with(MTPConfig(depths=2, tied=False)), {}
    row, plain = prompts()[0], None
    for factor in (1e4, 0.1):
        sharp = model_with(MTPConfig(depths=2, tied=False))
        sharp.load_state_dict(model.state_dict())
        with torch.no_grad():  # of the head's own states, so that what is answered stays
            for depth in (1, 2):
                sharp.mtp.module_for(depth).norm.weight.mul_(factor)
        generator = Generator(sharp, tiny_vocab(), GeneratorConfig(speculate=2, speculate_least=0.25))
        monkeypatch.setattr(speculation, "BESIDE", 0.05 if factor > 1 else 1e-6)
        monkeypatch.setattr(Hopes, "judged", lambda *_: None)  # by what the head says alone
        made, judge = [], generator.drafter.judge
        generator.drafter.judge = lambda run, drafts, fed, made=made, judge=judge: (
            made.append((int(drafts.counts), sum(map(len, drafts.others[0])), fed.hidden.shape[0]))
            or judge(run, drafts, fed)
        )
        (done,) = generator.generate([(row, Limits(24, 0.0))])
        plain = plain or done.ids
        assert done.ids == plain
        assert all(rows == 1 + drafts + others for drafts, others, rows in made)
        tried[factor] = made[:-2]  # at the end there is no use for two
    assert {(drafts, others) for drafts, others, _ in tried[1e4]} == {(2, 0)}
    assert {drafts for drafts, *_ in tried[0.1]} == {1}
    assert min(others for _, others, _ in tried[0.1]) > 3


def test_scores_are_computed_of_what_is_read_alone(monkeypatch):
    """Of what was tried in place of drafts, only of the one that was right."""
    monkeypatch.setattr(speculation, "BESIDE", 0.0)
    config = GeneratorConfig(speculate=1, speculate_least=0.0, speculate_width=12)
    generator = Generator(model_with(MTPConfig(depths=1)), tiny_vocab(), config)
    counted, scores, verdicts, judge = [], generator.runner.scores, [], generator.drafter.judge
    generator.runner.scores = lambda hidden, barred: counted.append(len(hidden)) or scores(hidden, barred)

    def watched(run, drafts, fed):
        before = len(counted)
        verdict = judge(run, drafts, fed)
        verdicts.append((counted[before:], int(drafts.counts), bool(verdict.instead)))
        return verdict

    generator.drafter.judge = watched
    for row in prompts():
        generator.generate([(row, Limits(60, 0.0))])
    assert {instead for *_, instead in verdicts} == {True, False}
    assert all(rows == [made + 1] + [1] * instead for rows, made, instead in verdicts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_beside_many_greedy_requests_nothing_is_drafted(temperature):
    """Until some of them have ended; what is sampled must not hang on its company, so it keeps its drafts."""
    model = model_with(MTPConfig(depths=1))
    limits = [Limits(12 + 8 * n, temperature, seed=n) for n in range(4)]
    settings = {"speculate": 2, "speculate_least": 0.0}
    generator = Generator(model, tiny_vocab(), GeneratorConfig(speculate_requests=2, **settings))
    beside, draft = [], generator.drafter.draft
    generator.drafter.draft = lambda run, wanted: (
        beside.append((len(run), int(wanted.drafts.max()))) or draft(run, wanted)
    )
    done = generator.generate(list(zip(prompts(), limits, strict=True)))
    drafted = {rows for rows, most in beside if most}
    assert drafted == ({1, 2} if temperature == 0 else {1, 2, 3, 4})
    assert {rows for rows, _ in beside} == {1, 2, 3, 4}
    plenty = ask(model, limits, **settings)
    assert [c.ids for c in done] == [c.ids for c in plenty]
    if temperature == 0:
        assert [c.ids for c in done] == [c.ids for c in ask(model, limits)]


def test_a_draft_is_made_where_others_beside_it_are_right():
    wrong = Hopes(2)
    for _ in range(60):
        wrong.judged(1, 0, instead=True)
    assert wrong.depth(0.35) == 1, "not two: the second draft stands behind a first that is wrong"


def test_a_hopeless_head_is_asked_rarely_and_a_good_one_often():
    bad, good = Hopes(4), Hopes(4)
    for _ in range(40):
        bad.judged(bad.depth(0.35), 0)
        good.judged(good.depth(0.35), good.depth(0.35))
    assert good.depth(0.35) == 4
    asked = []
    for _ in range(PROBE * 4):
        asked.append(bad.depth(0.35))
        bad.judged(asked[-1], 0)
    assert 1 <= sum(asked) <= 4
    for _ in range(30):  # and comes to hope again
        made = bad.depth(0.35) or 1
        bad.judged(made, made)
    assert bad.depth(0.35) >= 2


def test_what_cannot_draft_says_so():
    with pytest.raises(ValueError, match="no MTP head"):
        Generator(model_with(MTPConfig(depths=0)), tiny_vocab(), GeneratorConfig(speculate=1))
    with pytest.raises(ValueError, match="at most 15 drafts"):
        Generator(tiny_model(), tiny_vocab(), GeneratorConfig(speculate=16))
    for count in ("speculate_width", "speculate_requests"):
        with pytest.raises(ValueError, match="speculate_width and speculate_requests at least 1"):
            GeneratorConfig(speculate=1, **{count: 0})
    with pytest.raises(ValueError, match="speculate_least"):
        GeneratorConfig(speculate=1, speculate_least=1.0)
