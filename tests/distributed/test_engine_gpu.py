"""One accelerator against the CPU: the same engine, the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.checkpoint import gather_weights
from mmagent.train.loop import fit
from tests.engine_kit import ALONE, toy_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")]


def trained(folder: Path, world: World, parallel: str, *ends: int) -> dict[str, torch.Tensor]:
    for end in ends:  # each as a new process would: built anew, resumed
        toy = toy_run(folder, world, parallel, dropout=0.0)
        fit(toy.run, toy.objective, toy.engine, toy.stream, steps=end)
    return {name: tensor.cpu() for name, tensor in gather_weights(toy.objective).items()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_an_accelerator_follows_the_cpu_and_resumes_bitwise(tmp_path, parallel):
    world = World(0, 1, 0, torch.device("cuda", 0))
    wanted = trained(tmp_path / "cpu", ALONE, "none", 6)
    whole = trained(tmp_path / "gpu", world, parallel, 6)
    for name, tensor in wanted.items():
        # Newton-Schulz in bfloat16 is rounded differently by either device, six times
        torch.testing.assert_close(whole[name], tensor, atol=0.02, rtol=0.05)
    parts = trained(tmp_path / "parts", world, parallel, 3, 6)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    dist.shutdown()
