"""What accelerators can do at most: the denominator of a share of the peak."""

from __future__ import annotations

PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
    "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12,
    "A10": 125e12, "RTX 4090": 165e12, "V100": 125e12, "MI300X": 1307e12,
}  # fmt: skip
"""Dense operations a second in 16 bits, from the vendors' data sheets; the longest name found in the device's holds."""


def peak_of(device: str) -> float | None:
    """By its full name, as its driver gives it; None for one that is not in the list."""
    known = [part for part in PEAKS if part in device]
    return PEAKS[max(known, key=len)] if known else None
