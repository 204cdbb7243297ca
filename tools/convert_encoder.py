"""Encoders in and out of transformers: the vision towers of the GLM-V family.

    python tools/convert_encoder.py import zai-org/GLM-OCR runs/glm_ocr_encoder
    python tools/convert_encoder.py export runs/quickstart/rl/agent runs/tower
    python tools/convert_encoder.py export runs/distill/encoder runs/tower --merger-width 1536

`import` takes the tower out of a released model (a folder or hub id; only its tensors are read) and leaves an encoder
folder, for `recipes.distill_encoder encoder=`, `recipes.align_encoder init=` or `recipes.pretrain encoder=`. `export`
leaves a folder that the stock class loads with `from_pretrained`. Weights pass through bit for bit. An agent brings its
merger; an encoder has none, so one that has learnt nothing is put behind it, of the width that you name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from mmagent.config import load_yaml  # noqa: E402
from mmagent.interop.agent_folder import CONFIG, TOKENIZER, load_agent, read_agent_config  # noqa: E402
from mmagent.interop.encoder_folder import EncoderConfig, load_encoder, require_trust, save_encoder  # noqa: E402
from mmagent.interop.glm_tower import Tower, load_tower, new_merger, save_tower  # noqa: E402
from mmagent.models.cogvit import CogViT  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("source", help="import: folder or hub id of theirs; export: agent or encoder folder of ours")
    parser.add_argument("folder", type=Path, help="where the result goes; an older folder of the same kind is replaced")
    parser.add_argument("--merger-width", type=int, metavar="D", help="export of an encoder: what its new merger gives")
    parser.add_argument(
        "--trust-code", action="store_true", help="import and call the encoder of its own that SOURCE names"
    )
    args = parser.parse_args(argv)
    try:
        said = take_in(args.source, args.folder) if args.direction == "import" else give_out(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(said)
    return 0


def take_in(source: str, folder: Path) -> str:
    """Their tower to an encoder folder; returns a line for people."""
    tower = load_tower(source)
    save_encoder(folder, tower.encoder, tower.geometry)
    count = sum(p.numel() for p in tower.encoder.parameters())
    return f"{folder}: CogViT of {count:,} parameters, {len(tower.encoder.blocks)} blocks; the merger is left behind"


def give_out(args: argparse.Namespace) -> str:
    """Our encoder to a folder of theirs; returns a line for people."""
    if (Path(args.source) / TOKENIZER).is_file():
        if not args.trust_code:
            require_trust(read_agent_config(Path(args.source))[0].encoder, args.source)
        agent = load_agent(args.source)
        encoder, geometry, merger = agent.model.encoder, agent.geometry, agent.model.projector
    else:
        if not args.trust_code and (Path(args.source) / CONFIG).is_file():
            require_trust(load_yaml(EncoderConfig(), Path(args.source) / CONFIG).custom, args.source)
        encoder, geometry, _ = load_encoder(args.source)
        if not args.merger_width:
            raise ValueError(
                f"{args.source} is an encoder without a merger: name the width of a new one, --merger-width"
            )
        merger = new_merger(encoder, args.merger_width)
    if not isinstance(encoder, CogViT):
        raise ValueError(f"{args.source} holds a {type(encoder).__name__}, no CogViT")
    name = save_tower(args.folder, Tower(encoder, merger, geometry))
    parts = {"pooling head": encoder.pool, "mask token": encoder.mask_token}
    left = [what for what, part in parts.items() if part is not None]
    return f"{args.folder}: {name}" + (f"; left behind: {', '.join(left)}, which it does not have" if left else "")


if __name__ == "__main__":
    sys.exit(main())
