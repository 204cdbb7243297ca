"""The schedules of :mod:`tests.fire_kit` for a decoder of blocks, which lets requests in, puts them back and marks what
it knows by rules of its own."""

from __future__ import annotations

import pytest
import torch

from mmagent.generation.block_decoding import BlockConfig, BlockGenerator, BlockScheduler
from mmagent.generation.generator import GeneratorConfig
from mmagent.trajectories import Completion
from mmagent.vocab import Vocab
from tests.fire_kit import Flight, Play, ToyModel, World, blamed, random_schedule


class BlockWorld(World):
    blocks: BlockConfig

    def make(self, model: torch.nn.Module, vocab: Vocab, config: GeneratorConfig) -> BlockGenerator:
        own = vars(self.blocks) | vars(config) | {"record_routing": False}
        return BlockGenerator(model, vocab, BlockConfig(**own))


class BlockPlay(Play):
    def judge(self, flight: Flight, got: Completion) -> None:
        assert len(got.revealed) == len(got.ids), "steps of other tokens"
        if len(got.versions) > 1 and flight.seen is None:
            return  # the block that was open has seen both, and nothing of it was said yet
        super().judge(flight, got)


@pytest.mark.parametrize(
    ("block", "threshold", "revise", "seeds"), [(4, 0.05, 0, range(20)), (3, 0.03, 2, range(40, 52))]
)
def test_every_answer_is_the_undisturbed_one_whatever_happens_around_it(block, threshold, revise, seeds):
    torch.manual_seed(0)
    BlockWorld.blocks = BlockConfig(block=block, threshold=threshold, revise=revise)
    where = BlockWorld(ToyModel())
    play = BlockPlay(where)
    for seed in seeds:
        schedule = random_schedule(seed, len(where.requests))
        with blamed(seed, schedule, BlockPlay(where)):
            play(schedule)
    assert play.completed > 5 * len(seeds)
    met = {name for name, many in play.seen.items() if many >= 5}
    assert {"length", "cancelled", "sick", "retried", "preempted", "cached", "looks"} <= met


def test_an_open_block_that_is_kept_when_one_is_tried_again_shows():
    """Its teeth."""
    through = BlockScheduler._through

    def keep(self, sequence):
        opened = self._opened.get(sequence.ticket)
        through(self, sequence)
        if opened is not None and sequence in self.waiting:
            self._opened[sequence.ticket] = opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockScheduler, "_through", keep)
        with pytest.raises(AssertionError):
            test_every_answer_is_the_undisturbed_one_whatever_happens_around_it(4, 0.05, 0, range(20))
