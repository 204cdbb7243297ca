"""What discrete diffusion is compared on, and the ablation at its smallest."""

from __future__ import annotations

import json
import sys
from itertools import islice
from unittest import mock

import pytest
import torch

from mmagent.agent.unmasking import Way
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.trajectories import Completion
from recipes import ablate_diffusion
from recipes.diffusion_arms import Bench
from recipes.diffusion_report import FIGURES, gather, write
from recipes.diffusion_tasks import KINDS, alike, document, exact, packs, prompt, questions, told, vocabulary
from recipes.diffusion_ways import follow, tried


def test_questions_of_the_splits_are_never_the_same_and_kinds_come_in_turn():
    train, test = (list(islice(questions(split, 0), 600)) for split in ("train", "test"))
    assert not {asked.question for asked in train} & {asked.question for asked in test}
    assert [asked.kind for asked in test[:8]] == [*KINDS, *KINDS]
    again = list(islice(questions("train", 0), 600))
    assert again == train
    assert len({asked.key for asked in (*train, *test)}) == 1200


def test_edits_ask_for_what_they_say():
    for asked in islice(questions("test", 1), 200):
        if asked.kind == "page edit":
            page, instruction = asked.question.rsplit("\n", 1)
            assert asked.answer != page
            if instruction.startswith("remove "):
                assert asked.answer == page.replace(f"<li>{instruction[7:]}</li>\n", "")
            elif instruction.startswith("item "):
                old, new = instruction[5:].split(" becomes ")
                assert asked.answer == page.replace(f"<li>{old}</li>", f"<li>{new}</li>")
        if asked.kind == "function":
            assert compile(asked.answer, "said", "exec")


def test_the_right_answer_is_judged_right_and_others_are_not():
    vocab = vocabulary()
    asked = next(questions("test", 0))
    ids = tuple(told(asked, vocab))
    right = Completion(ids, (0.0,) * len(ids), True)
    assert exact(asked, right, vocab) == alike(asked, right, vocab) == 1
    assert exact(asked, Completion(ids[:-1], (0.0,) * (len(ids) - 1), False), vocab) == 0
    assert exact(asked, Completion(ids[2:], (0.0,) * (len(ids) - 2), True), vocab) == 0
    assert 0.5 < alike(asked, Completion(ids[4:], (0.0,) * (len(ids) - 4), True), vocab) < 1
    one = document(asked, vocab)
    assert tuple(one.input_ids[one.trainable].tolist()) == ids
    pack = next(packs("train", 0, vocab, 512))
    assert pack.num_tokens <= 512
    assert len(pack.keys) > 2


def test_the_report_compares_seed_by_seed(tmp_path):
    for n, arm in enumerate(ablate_diffusion.ARMS):
        for seed in range(2):
            figures = dict.fromkeys(FIGURES, n + 0.5 * seed) | ({"followed": 7.0 * seed} if "orders" in arm else {})
            (tmp_path / f"{arm.replace(' ', '-')}-{seed}.json").write_text(json.dumps(figures))
    tables = write(tmp_path, ablate_diffusion.ARMS, 2)
    assert "edits in the noise: edits - masks | +1.000 [+1.000, +1.000]" in tables
    assert "edits, where they can mend: edits revised - masks revised | +1.000 [+1.000, +1.000]" in tables
    assert "best orders: best orders - any orders | -1.000 [-1.000, -1.000]" in tables
    assert "best orders: own right answers to [0, 7] questions, by seed" in tables
    assert "<svg" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=r"edits-2\.json is missing"):
        gather(tmp_path, ["edits"], 3)


def test_who_never_was_right_has_no_orders_to_follow():
    """Then nothing is learnt, and the report says of how many questions it was."""
    bench = Bench(vocabulary(), 0)
    vocab = bench.vocab
    model = AgentModel(presets.debug(vocab_size=vocab.size)).eval()
    model.config.image_id, model.config.denoises = vocab.image_id, 8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with mock.patch("recipes.diffusion_ways.WAYS", 1), mock.patch("recipes.diffusion_arms.MOST", 8):
        groups = tried(bench, model, 800)
    assert groups == []
    follow(bench, model, groups, 800, 1e-3, "best")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_few_own_answers_are_not_seen_for_ever():
    """One answer over and over unlearns all else; with enough of them the budget ends it."""
    bench = Bench(vocabulary(), 0)
    model = AgentModel(presets.debug(vocab_size=bench.vocab.size))
    groups = []
    for asked in islice(questions("train", 0), 60):
        ids = tuple(told(asked, bench.vocab))
        steps = tuple(n % 8 for n in range(len(ids)))
        groups.append(
            [Way(prompt(asked, bench.vocab), Completion(ids, (0.0,) * len(ids), True, revealed=steps), 0.0, 1.0)]
        )
    with mock.patch("recipes.diffusion_ways.fit") as fit:
        follow(bench, model, groups[:1], 1_000_000, 1e-3, "best")
        follow(bench, model, groups, 2000, 1e-3, "best")
    few, many = (len(call.args[2]) for call in fit.call_args_list)
    assert few == 4
    assert many == 3  # of some 500 tokens and their masked answers


@pytest.mark.slow
def test_the_ablation_runs_goes_on_and_reports(tmp_path, capsys):
    told_size = ["--tokens", "6000", "--rounds", "1", "--questions", "4", "--seeds", "2"]
    with mock.patch.object(sys, "argv", ["ablate", "--output", str(tmp_path), *told_size]):
        assert ablate_diffusion.main() == 0
        first = capsys.readouterr().out
        assert first.count("exact ") >= 18
        assert ablate_diffusion.main() == 0
    assert "seed 0" not in capsys.readouterr().out  # nothing is trained twice
    assert "best orders" in (tmp_path / "report.html").read_text()
