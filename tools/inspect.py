"""Look at a shard set: a page to browse, with boxes drawn, tokens coloured by whether they are trained on, and packs.

    python tools/inspect.py SHARDS [--to FOLDER] [--tokenizer T] [--packs N] [--samples N]

SHARDS is a folder of shards, a glob or tar, or a folder of such folders, each of which gets pages of its own by its
name. FOLDER/index.html (default: inspection) opens in any browser, from disk: fifty samples
at a time, chosen by source, task and key. With a tokenizer (a tokenizer.json, or the folder that holds one) every
sample shows its tokens: trained or not, control tokens, pictures folded. ``--packs`` packs as training does, and shows
where documents end, their positions, and how full the packs are. All samples are shown, or ``--samples`` drawn evenly.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "inspect":
    # Another script of this folder runs: its own folder comes first in Python's path, and it wants the library's
    # module of this name. That one takes this one's place, and nobody notices.
    import importlib.util

    spec = importlib.util.spec_from_file_location("inspect", os.path.join(os.path.dirname(os.__file__), "inspect.py"))
    sys.modules["inspect"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    # And so that this script itself finds the library's: the repository takes the place of the folder.
    sys.path[:] = [os.path.dirname(HERE), *(entry for entry in sys.path if os.path.abspath(entry or ".") != HERE)]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder, glob or file of webdataset shards")
    parser.add_argument("--to", type=Path, default=Path("inspection"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--tokenizer", default="", metavar="T", help="a tokenizer.json, or the folder that holds one")
    parser.add_argument("--packs", type=int, default=0, metavar="N", help="packs to show (needs a tokenizer)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="at most N, drawn evenly (default: all)")
    parser.add_argument("--tokens-per-pack", type=int, default=4096, help="budget of a pack (default: %(default)s)")
    parser.add_argument("--patches-per-pack", type=int, default=16384, help="the same in patches")
    args = parser.parse_args(argv)
    print(f"reading {args.shards}", file=sys.stderr, flush=True)
    from tools.inspector.site import InspectConfig, inspect  # many seconds, which --help need not take

    config = InspectConfig(
        args.shards, args.to, args.tokenizer, args.packs, args.samples, args.tokens_per_pack, args.patches_per_pack
    )
    try:
        print(f"open {inspect(config)}")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
