"""What the planner says of long contexts: bytes are those ranks really receive and keep, and seconds make sense."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from mmagent.dist import World, run_ranks
from mmagent.generation import long_context as ours
from mmagent.generation.layer_split import LayerSplit
from mmagent.models import presets
from mmagent.trajectories import Limits, Trajectory
from tests.agent_kit import picture, prompt, tiny_model, tiny_vocab
from tests.traffic_kit import Traffic
from tools import plan as command
from tools.planner.hardware import GPUS
from tools.planner.long_context import Decoding, decoding, kept, linked, prefill_time, received, rows

LENGTHS = (50, 3, 24)
"""Of prompts: chunks of 12 leave rests; the second is as long as there are ranks, or shorter."""


class Stored(LayerSplit):
    """Notes what is kept when all prompts have been computed."""

    stored: int = 0
    buffers: int = 0

    def end(self) -> None:
        Stored.stored, Stored.buffers = self.store.nbytes, self.nbytes - self.store.nbytes
        super().end()


class Counted(NamedTuple):
    """Received by this rank, by operation: in prefill alone, with tokens more of every prompt, and of visual embeddings
    in a prompt with two pictures. Bytes kept, and of buffers."""

    prefill: Counter[str]
    whole: Counter[str]
    visual: int
    stored: int
    buffers: int


def counted(world: World, lengths: Sequence[int], chunk: int, steps: int) -> Counted:
    ours.LayerSplit = Stored
    group = world.mesh({"dp": 1, "cp": world.size}).get_group("cp")
    generator = ours.LayerSplitGenerator(tiny_model(), tiny_vocab(), group, ours.LongContextConfig(chunk))
    found = []
    for more in (0, steps):
        asked = []
        for n, length in enumerate(lengths):
            text = Trajectory(f"{n}", "toy")
            text.extend([tiny_vocab().encode("x")[0]] * length, trainable=False)
            asked.append((text, Limits(1 + more)))
        with Traffic() as traffic:
            generator.generate(asked)
        found.append(traffic.received)
    kept_bytes = Stored.stored, Stored.buffers
    with Traffic() as traffic:
        generator.generate([(prompt("two pictures", (picture(1), picture(2))), Limits(1))])
    return Counted(*found, traffic.received["alltoall_base"], *kept_bytes)


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_bytes_are_those_of_real_ranks(ranks):
    """float32, so 4 bytes a value. A visual embedding travels once at most, to the rank that computes its token."""
    decoder, chunk, steps = tiny_model().config.decoder, 12, 5
    said = received(decoder, LENGTHS, chunk, ranks, 4, split=True)
    keeps = kept(decoder, LENGTHS, chunk, ranks, 4, split=True)
    each = decoding(decoder, 0, ranks, 4, 4)
    found = run_ranks(counted, ranks, LENGTHS, chunk, steps)
    for rank, one in enumerate(found):
        assert one.prefill["allgather_base"] == said[rank].new
        assert one.prefill["broadcast"] == said[rank].history + said[rank].sampled
        assert one.prefill["alltoall_base"] == one.prefill["recv"] == 0
        assert (one.stored, one.buffers) == (keeps[rank].stored, keeps[rank].buffers)
    tokens = steps * len(LENGTHS)
    assert sum(one.whole["recv"] for one in found) == each.handed * tokens
    assert sum(one.whole["broadcast"] - one.prefill["broadcast"] for one in found) == each.told * tokens
    visual = sum(len(picture(n).patches) // 4 for n in (1, 2))
    assert 0 < sum(one.visual for one in found) <= visual * decoder.width * 4


def test_figures_that_the_design_is_argued_with():
    """Docs of ``mmagent.generation.layer_split``: a row of GLM-4.5-Air, and bytes of a token on eight ranks."""
    decoder = presets.glm45_air().decoder
    assert decoding(decoder, 120_000, 8, 2, 2) == Decoding(57_344, 7_913_472, 158_269_440_000, 112)
    ((alone,), split) = (kept(decoder, [120_000], 8192, n, 2, n > 1) for n in (1, 8))
    assert alone.peak == 120_000 * 46 * 4096
    assert max(one.stored for one in split) == 120_000 * 6 * 4096
    assert {one.buffers for one in split} == {2 * 120_000 * 4096}
    # all-gather of what is new against gathering at the owner and broadcasting: (R + 1) / R times the bytes
    new = sum(one.new for one in received(decoder, [8192], 8192, 8, 2, split=False))
    assert new == 7 * 8192 * 46 * 4096
    assert [one.history for one in received(decoder, [8192], 8192, 8, 2, split=True)] == [0] * 8


def test_history_grows_with_the_square_and_falls_with_the_chunk():
    decoder = presets.glm45_air().decoder
    one, twice, finer = (
        received(decoder, [length], chunk, 8, 2, split=True)[0].history
        for length, chunk in ((65536, 8192), (131072, 8192), (65536, 4096))
    )
    assert twice / one == pytest.approx(16 * 15 / (8 * 7))
    assert finer / one == pytest.approx(4096 * 16 * 15 / (8192 * 8 * 7))


def test_what_is_hidden_depends_on_the_link():
    decoder, gpu = presets.glm45_air().decoder, GPUS["h100"]
    fast, slow = (prefill_time(decoder, 122_880, 8192, 8, linked(gpu, link)) for link in (0.0, 10e9))
    assert fast.compute == slow.compute
    assert fast.hidden > slow.hidden
    assert slow.history == pytest.approx(
        45 * fast.history, rel=0.03
    )  # and two microseconds a rank and layer, whatever the link
    assert slow.seconds > 1.2 * fast.seconds
    unsplit = prefill_time(decoder, 122_880, 8192, 8, gpu, split=False)
    assert unsplit.history == unsplit.exposed == 0
    assert unsplit.seconds < fast.seconds
    alone = prefill_time(decoder, 122_880, 8192, 1, gpu)
    assert alone.new == alone.history == 0
    # shares of a chunk fill products less well, and the last rank sees more than the mean
    assert 1 / 8 < fast.compute / alone.compute < 1 / 3


def test_more_ranks_keep_less():
    found = rows(presets.glm45v().decoder, [40_960, 122_880], [1, 2, 4, 8], 8192, GPUS["h200"])
    for length in (40_960, 122_880):
        own = [row for row in found if row.length == length]
        assert [row.split.peak for row in own] == sorted((row.split.peak for row in own), reverse=True)
        assert len({row.unsplit.peak for row in own}) == 1
        assert own[-1].unsplit.peak / own[-1].split.peak > 5


def test_the_command_prints_and_draws(capsys, tmp_path):
    file, picture_file = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ["--preset", "glm45_air", "--long-context", "--lengths", "40960,122880", "--json", str(file)]
    assert command.main([*options, "--ranks", "1,8", "--plot", str(picture_file)]) == 0
    text = capsys.readouterr().out
    for said in ("glm45_air: 46 layers", "122,880", "450 GB/s", "hidden states", "whole copy a rank"):
        assert said in text
    assert len(json.loads(file.read_text())) == 4
    assert picture_file.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--lengths", "0"], ["--ranks", "two"]):
        assert command.main(["--long-context", *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
