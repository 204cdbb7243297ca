"""Probe encoders beside an untrained one: semantics from whole images, texture and place from single patches.

    python -m recipes.probe_encoders both=runs/distill/encoder aligned=runs/align/encoder output=runs/probes

Prints a table and leaves ``output/probes.json``: for every name the mean of the semantic probes, of the dense ones,
and of both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from evals.probes import ProbeReport, probe_scores, probe_sets
from mmagent.interop.encoder_folder import load_encoder
from mmagent.models.cogvit import CogViT
from mmagent.train.launch import launch
from mmagent.train.step import begun


def main() -> None:
    """Read ``name=folder`` pairs, probe each, write the scores."""
    parser = argparse.ArgumentParser(
        "python -m recipes.probe_encoders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "encoders", nargs="+", metavar="NAME=FOLDER", help="encoder folders; output=FOLDER for the scores"
    )
    parser.add_argument("--images", type=int, default=600, help="training images a probe (default: %(default)s)")
    args = parser.parse_args()
    if wrong := [pair for pair in args.encoders if "=" not in pair]:
        parser.error(f"{wrong[0]!r} is not of the form NAME=FOLDER")
    folders = dict(pair.split("=", 1) for pair in args.encoders)
    output = Path(folders.pop("output", "runs/probes"))
    if not folders:
        parser.error("give at least one encoder folder")
    sets = probe_sets(args.images, max(args.images * 2 // 3, 1))
    loaded = {name: load_encoder(folder) for name, folder in folders.items()}
    begun.set()
    scores: dict[str, dict[str, float]] = {}
    for name, (encoder, geometry, _) in loaded.items():
        if "untrained" not in scores:
            torch.manual_seed(0)
            untrained = probe_scores(CogViT(encoder.config).eval(), geometry, sets)
            scores["untrained"] = _means(ProbeReport(untrained, untrained))
        scores[name] = _means(ProbeReport(probe_scores(encoder, geometry, sets), untrained))
    output.mkdir(parents=True, exist_ok=True)
    (output / "probes.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{'encoder':<16}{'semantic':>10}{'dense':>10}{'mean':>10}")
    for name, row in scores.items():
        print(f"{name:<16}" + "".join(f"{value:>10.3f}" for value in row.values()))


def _means(report: ProbeReport) -> dict[str, float]:
    return {"semantic": report.mean("semantic"), "dense": report.mean("dense"), "mean": report.overall()}


if __name__ == "__main__":
    launch(main)
