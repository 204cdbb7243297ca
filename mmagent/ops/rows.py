"""Row blocks for elementwise work on a CPU.

A chain of elementwise passes over a large tensor moves it through memory once a pass and allocates (and
faults in) every temporary. Done block of rows by block, the temporaries stay in the cache and are reused:
half the time for a SwiGLU. An accelerator gets everything in one block.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK_VALUES = 1 << 18  # values of one temporary: half a megabyte in bf16, one in fp32


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices that cover the first dimension of ``x``."""
    rows = x.shape[0]
    step = max(rows, 1)
    if x.device.type == "cpu" and x.numel():
        step = max(1, BLOCK_VALUES * rows // x.numel())
    for start in range(0, rows, step):
        yield slice(start, start + step)
