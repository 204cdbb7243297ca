"""Pack what pruning has left of an agent or an encoder, for inference; and back.

    python tools/pack.py runs/sparse/agent --into runs/packed              # by the masks beside it
    python tools/pack.py runs/sparse/agent --into runs/packed --masks runs/sparse/sparsity.safetensors
    python tools/pack.py runs/packed --into runs/dense --dense

A packed folder is read like any other (evaluation, serving, generation); it does not train, and nothing else loads it.
A dense one has zeros where weights were dropped, and is what training, tools/convert.py and stock classes read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from torch import nn  # noqa: E402

from mmagent.config import load_yaml  # noqa: E402
from mmagent.interop.agent_folder import (  # noqa: E402
    TOKENIZER,
    Agent,
    build_agent,
    load_agent,
    read_agent_config,
    save_agent,
)
from mmagent.interop.encoder_folder import (  # noqa: E402
    CONFIG,
    Encoder,
    EncoderConfig,
    build_encoder,
    load_encoder,
    save_encoder,
)
from mmagent.interop.packed_folder import MASKS, load_masks  # noqa: E402
from mmagent.models.packed import dense_state, layout_of, pack_model  # noqa: E402
from mmagent.ops.tile_packed import STEP  # noqa: E402
from mmagent.sparsity.patterns import density  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an agent's or an encoder's folder")
    parser.add_argument("--into", type=Path, required=True, help="the folder to write; must be new")
    parser.add_argument("--masks", type=Path, help=f"default: {MASKS} in the folder that SOURCE lies in")
    parser.add_argument("--step", type=int, default=STEP, help="inputs of a tile are filled up to a multiple of it")
    parser.add_argument("--dense", action="store_true", help="the way back: SOURCE is packed")
    args = parser.parse_args(argv)
    try:
        if args.into.exists() and (not args.into.is_dir() or any(args.into.iterdir())):
            raise ValueError(f"{args.into} is there already: name a new folder")
        told = unpack(args.source, args.into) if args.dense else pack(args.source, args.into, args.masks, args.step)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{args.into}: {told}")
    return 0


def pack(source: Path, into: Path, masks_at: Path | None, step: int) -> str:
    loaded = _load(source)
    if layout_of(loaded.model):
        raise ValueError(f"{source} is packed already")
    masks, pattern = load_masks(masks_at or source.resolve().parent / MASKS)
    pack_model(loaded.model, masks, pattern.granularity, step)
    if (source / TOKENIZER).is_file():
        save_agent(into, *loaded[:4], encoder=loaded.encoder)
    else:
        save_encoder(into, loaded.model, loaded.geometry, custom=loaded.custom)
    total = sum(mask.numel() for mask in masks.values())
    multiplied = 100 * _multiplied(loaded.model) / total
    return f"{100 * density(masks):.2f} % of {total:,} weights are left, {multiplied:.2f} % are multiplied"


def _load(source: Path) -> Agent | Encoder:
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    return load_agent(source) if (source / TOKENIZER).is_file() else load_encoder(source)


def _multiplied(model: nn.Module) -> int:
    """Weights that products read, those that fill up tiles included."""
    sheets = [sheet for own in layout_of(model).values() for held in own.values() for sheet in held]
    return sum(sheet.singles + sum(b * o * k for b, o, k in sheet.batches) for sheet in sheets)


def unpack(source: Path, into: Path) -> str:
    agent, loaded = (source / TOKENIZER).is_file(), _load(source)
    if not layout_of(loaded.model):
        raise ValueError(f"{source} is not packed")
    weights = dense_state(loaded.model)
    if agent:
        fresh = build_agent(read_agent_config(source)[0])
        save_agent(into, fresh, *loaded[1:4], encoder=loaded.encoder, weights=weights)
    else:
        save_encoder(into, _plain(source), loaded.geometry, custom=loaded.custom, weights=weights)
    return f"dense again, {len(layout_of(loaded.model))} layers with zeros"


def _plain(source: Path) -> nn.Module:
    return build_encoder(load_yaml(EncoderConfig(), source / CONFIG))


if __name__ == "__main__":
    sys.exit(main())
