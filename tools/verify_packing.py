"""Check on your own model and data that packed documents give what they give alone.

    python tools/verify_packing.py AGENT_FOLDER SHARDS [--documents 8] [--tolerance 1e-3] [--device cpu]

AGENT_FOLDER is what a stage leaves behind, SHARDS a folder of webdataset shards. Prints the largest difference of
hidden states, MTP hidden states, router counts and gradients, with the document it was found in, and exits with 1
if any exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from data_pipelines.documents import DocumentBuilder  # noqa: E402
from data_pipelines.mixture import permute  # noqa: E402
from data_pipelines.shards import ShardSet  # noqa: E402
from mmagent.interop.agent_folder import load_agent  # noqa: E402
from mmagent.packing_check import check_packing  # noqa: E402
from mmagent.records import RecordError, from_sample  # noqa: E402
from mmagent.train.launch import launch  # noqa: E402
from mmagent.train.step import begun  # noqa: E402
from mmagent.types import Document  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agent", help="folder of a trained agent")
    parser.add_argument("shards", help="folder, glob or file of webdataset shards")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    agent = load_agent(args.agent)
    builder = DocumentBuilder(agent.vocab, agent.geometry, agent.chat)
    documents = sample_documents(ShardSet(args.shards), builder, args.documents)
    begun.set()
    report = check_packing(
        agent.model.float().to(args.device),
        documents,
        image_id=agent.vocab.image_id,
        merge_size=agent.geometry.merge_size,
        tolerance=args.tolerance,
        device=args.device,
    )
    print(f"{len(documents)} documents of {args.shards}, {sum(map(len, documents))} tokens, tolerance {args.tolerance}")
    print(report)
    return 0 if report.ok else 1


def sample_documents(shards: ShardSet, builder: DocumentBuilder, count: int) -> list[Document]:
    """``count`` documents from all over the shards; those that cannot be used are passed over aloud."""
    documents: list[Document] = []
    for n in range(len(shards)):
        if len(documents) == count:
            break
        try:
            documents.append(builder.document(from_sample(shards.read(permute(n, len(shards), 0)))))
        except RecordError as error:
            print(f"passed over {error}", file=sys.stderr)
    return documents


if __name__ == "__main__":
    sys.exit(launch(main))
