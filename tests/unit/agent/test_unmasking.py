"""Ways: which are kept, how their speed is judged, and what of them is learnt."""

from __future__ import annotations

import pytest
import torch

from mmagent.agent.unmasking import Way, best, closeness, explore, speed_advantages, unmasking_batches
from mmagent.generation.block_decoding import BlockConfig, BlockGenerator
from mmagent.generation.generator import Generator
from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.block_policy import BlockPolicyConfig, BlockPolicyGradient
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from mmagent.packing import Size
from mmagent.trajectories import Completion, Limits, Trajectory
from tests.agent_kit import GEOMETRY, picture, prompt, tiny_model, tiny_vocab

VOCAB = tiny_vocab()


def way(steps: tuple[int, ...], score: float = 1.0, bound: float = -1.0) -> Way:
    ids = tuple(70 + n for n in range(len(steps)))
    return Way(prompt("p"), Completion(ids, (bound,) * len(ids), True, revealed=steps), bound, score)


def test_states_are_as_close_as_their_steps_are_small():
    assert closeness(way((0, 0, 0, 0)).completion, 4) == 1 / 4
    # masks, one said, two said: distances 1, 1, 2
    assert closeness(way((1, 0)).completion, 2) == pytest.approx((1 + 1 + 1 / 2) / 3)
    slow, fast = (closeness(way(steps).completion, 4) for steps in ((3, 1, 0, 2), (0, 1, 0, 1)))
    assert slow > fast > 1 / 4
    both = closeness(way((0, 0, 0, 0, 1, 0)).completion, 4)
    assert both == pytest.approx((1 / 4 + (1 + 1 + 1 / 2) / 3) / 2)


def test_the_likeliest_of_the_right_ones_are_kept():
    group = [way((0,), 1.0, -3.0), way((0,), 0.0, -0.1), way((0,), 1.0, -1.0), way((0,), 0.5, -2.0)]
    assert [w.bound for w in best([group], 2)] == [-1.0, -2.0]
    assert [w.bound for w in best([group], 2, least=0.5)] == [-1.0, -3.0]
    assert [w.bound for w in best([group, []], 1, least=-1)] == [-0.1]


def test_speed_is_worth_something_to_right_answers_alone():
    right_fast, right_slow, wrong_fast = way((0, 0)), way((0, 1)), way((0, 0), score=0.0)
    told = speed_advantages([[right_fast, right_slow, wrong_fast]], 2, 0.5)
    values = [value for _, value in told]
    assert values[0] > values[1] > 0 > values[2]
    assert sum(values) == pytest.approx(0)
    assert speed_advantages([[wrong_fast, way((1, 0), score=0.0)]], 2, 0.5) == []
    assert speed_advantages([[right_fast]], 2, 0.5) == []
    with pytest.raises(ValueError, match="weight of speed"):
        speed_advantages([], 2, 1.0)


def test_own_ways_go_through_both_objectives():
    """Explored with pictures, packed, and learnt: as an order to follow and as steps to reinforce."""
    model = tiny_model()
    generator = BlockGenerator(model, VOCAB, BlockConfig(block=4, order="random"))
    prompts = [prompt("click the red one", (picture(1),)), prompt("words")]

    def judge(asked: Trajectory, completion: Completion) -> float:
        return float(completion.ids[0] % 2)

    groups = explore(generator, prompts, Limits(10, 1.0, stop_ids=VOCAB.stop_ids), 4, judge)
    assert [len(group) for group in groups] == [4, 4]
    assert len({w.completion.ids for w in groups[0]}) > 1
    for group in groups:
        for w in group:
            assert w.bound == pytest.approx(sum(w.completion.logprobs) / len(w.completion.ids))
    ids = NoiseIds.of_vocab(VOCAB, model.config.vocab_size)
    settings = {"image_id": VOCAB.image_id, "merge_size": GEOMETRY.merge_size}
    kept = best(groups, 2, least=-1)
    batches = unmasking_batches(kept, Size(200, 1000), **settings)
    assert sum(len(batch.keys) for batch in batches) == len(kept)
    learner = BlockDiffusion(model, BlockDiffusionConfig(NoiseConfig(4)), ids)
    for batch in batches:
        said = batch.stream.labels != -100
        assert bool((batch.order[said] >= 0).all())
        assert bool((batch.order[~said] == -1).all())
        assert torch.isfinite(learner(batch).sums["mask"])
    told = speed_advantages(groups, 4, 0.5)
    ways, advantages = [w for w, _ in told], [value for _, value in told]
    reinforcer = BlockPolicyGradient(model, BlockPolicyConfig(NoiseConfig(4)), ids)
    for batch in unmasking_batches(ways, Size(200, 1000), **settings, advantages=advantages):
        assert torch.isfinite(reinforcer(batch).sums["policy"])


def test_what_has_no_ways_is_refused():
    with pytest.raises(ValueError, match="no steps were recorded"):
        explore(Generator(tiny_model(), VOCAB), [prompt("words")], Limits(4), 2)
    generator = BlockGenerator(tiny_model(), VOCAB, BlockConfig(block=4))
    with pytest.raises(ValueError, match="0 of each"):
        explore(generator, [prompt("words")], Limits(4), 0)
    with pytest.raises(ValueError, match="exceed"):
        unmasking_batches([way((0,))], Size(1, 1), image_id=VOCAB.image_id, merge_size=2)
    assert unmasking_batches([], Size(9, 9), image_id=VOCAB.image_id, merge_size=2) == []
