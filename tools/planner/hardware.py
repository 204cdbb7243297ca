"""What accelerators can do, and what connects them: data-sheet numbers, each with its source."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mmagent.models.peaks import PEAKS

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator in a usual host.

    ``peak``: dense 16-bit operations a second. ``memory``: bytes that a process can use at most, ``bandwidth`` bytes a
    second to it. ``link`` and ``network``: bytes a second and direction that one of them sends to others in its host,
    and through its host's network cards; ``host`` of them share a host. ``family`` picks the share of the peak that
    large matrix products reach, for that is a matter of clocks under power limits.
    """

    name: str
    family: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    host: int
    source: str


_NVIDIA = "NVIDIA data sheets"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "ampere", PEAKS["A100"], 79.2 * GIB, 2.04e12, 300e9, 25e9, 8, f"{_NVIDIA}: A100 SXM 80GB, HDR"),
        Gpu("a100-40gb", "ampere", PEAKS["A100"], 39.4 * GIB, 1.56e12, 300e9, 25e9, 8, f"{_NVIDIA}: A100 SXM 40GB"),
        Gpu("h100", "hopper", PEAKS["H100"], 79.1 * GIB, 3.35e12, 450e9, 50e9, 8, f"{_NVIDIA}: H100 SXM, NDR NICs"),
        Gpu("h100-pcie", "hopper", PEAKS["H100 PCIe"], 79.1 * GIB, 2.0e12, 64e9, 25e9, 8, f"{_NVIDIA}: H100 PCIe"),
        Gpu("h100-96gb", "hopper", PEAKS["H100"], 94.5 * GIB, 2.4e12, 450e9, 50e9, 8,
            "torchtitan benchmarks/llama3_h100_202412_torchtitan.md: HBM2e, 500 W; peak of the 700 W part"),
        Gpu("h200", "hopper", PEAKS["H200"], 139.7 * GIB, 4.8e12, 450e9, 50e9, 8, f"{_NVIDIA}: H200 SXM"),
        Gpu("h800", "hopper", PEAKS["H800"], 79.1 * GIB, 3.35e12, 200e9, 50e9, 8, "arXiv 2505.09343, section 4.1"),
        Gpu("h20", "hopper", PEAKS["H20"], 95.0 * GIB, 4.0e12, 450e9, 50e9, 8, f"{_NVIDIA}: HGX H20"),
        Gpu("b200", "blackwell", PEAKS["B200"], 178.0 * GIB, 7.7e12, 900e9, 50e9, 8, f"{_NVIDIA}: HGX B200, dense"),
        Gpu("mi300x", "cdna3", PEAKS["MI300X"], 191.0 * GIB, 5.3e12, 448e9, 50e9, 8, "AMD Instinct MI300X data sheet"),
        Gpu("l40s", "ada", PEAKS["L40S"], 44.5 * GIB, 0.864e12, 32e9, 12.5e9, 8, f"{_NVIDIA}: L40S, PCIe gen 4"),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Raises ``ValueError`` with the nearest name for one that is not in the table."""
    key = name.lower().replace("_", "-")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(GPUS)}"
        raise ValueError(f"gpu {name!r} is not in the table; {hint}")
    return GPUS[key]
