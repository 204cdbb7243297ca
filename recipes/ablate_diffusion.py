"""What is discrete diffusion worth on code: against the next token, with edits, with orders of its own, reinforced?

    python -m recipes.ablate_diffusion --output runs/ablation-diffusion --seeds 3 --tokens 1500000

Small pages and functions to write and to edit, with one right answer each (`recipes.diffusion_tasks`). One agent a seed
learns the next token; from it the others go on, each with as many tokens through the decoder, where a noised copy of an
answer is tokens like any: ``next token``, ``masks`` alone, and masks with ``edits`` in the last fifth. From the latter,
a fifth more: ``more of the same``, or the model's own right answers in the ``best orders`` of eight or in ``any
orders``; and ``quickened``, reinforced on policy for right answers in few steps. ``revised`` are the agents of masks
and of edits again, which now look twice at what an open block has said: edits teach that. Kill it at any moment; the
same command goes on. It leaves ``ablation.json``, ``ablation.md``, ``ablation.svg`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from pathlib import Path

from mmagent import dist
from mmagent.agent.unmasking import Way
from mmagent.chat import ChatConfig
from mmagent.files import write_text
from mmagent.generation.block_decoding import BlockConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import load_agent, new_agent, save_agent
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from recipes.diffusion_arms import Bench, denoise, judged, next_token
from recipes.diffusion_report import write
from recipes.diffusion_tasks import questions, vocabulary
from recipes.diffusion_ways import follow, quicken, tried

REVISED = {"masks revised": "masks", "edits revised": "edits"}
ARMS = ("next token", "masks", "edits", *REVISED, "more of the same", "best orders", "any orders", "quickened")
LR, LATER = 4e-3, 5e-4
"""Of the first training and its continuations; of what is learnt from own ways."""
MORE, LOOKS = 0.2, 2
"""Of the tokens, learnt from own ways; looks at a block that is whole."""


class Ablation:
    """One seed; agents lie under ``folder``, so that what was trained is not trained again."""

    def __init__(self, folder: Path, seed: int, tokens: int, rounds: int, questions_asked: int, begin: int = 0):
        self.folder, self.seed, self.tokens, self.rounds = folder, seed, tokens, rounds
        self.begin = begin or tokens
        self.bench = Bench(vocabulary(), seed)
        self.asked = list(islice(questions("test", seed), questions_asked))

    def arm(self, name: str) -> None:
        """Train and judge one, where that has not been done."""
        path = self.folder / f"{name.replace(' ', '-')}-{self.seed}.json"
        if not path.is_file():
            how = BlockConfig(revise=LOOKS) if name in REVISED else None
            found = judged(self.bench, self.agent(REVISED.get(name, name)), self.asked, how)
            if name in FOLLOW:
                found["followed"] = float(len(self.ways))
            write_text(path, json.dumps(found, indent=1) + "\n")
            print(f"seed {self.seed}, {name}: exact {found['exact']:.1%}, {found['nats/token']:.3f} nats/token, "
                  f"{found['tokens/forward']:.2f} tokens/forward", flush=True)  # fmt: skip

    def agent(self, name: str) -> AgentModel:
        """Trained, or as it was left."""
        folder = self.folder / "agents" / f"{name.replace(' ', '-')}-{self.seed}"
        if not folder.is_dir():
            dist.seed_everything(self.seed)
            made = self._new() if name == "base" else self.agent(PARENTS.get(name, "base"))
            TRAINED[name](self, made)
            made.requires_grad_(True)
            save_agent(folder, made, self.bench.vocab, GeometryConfig(), ChatConfig())
        return load_agent(folder).model

    @cached_property
    def ways(self) -> list[list[Way]]:
        """Own right answers, the same for all arms that follow some of them."""
        return tried(self.bench, self.agent("edits"), self.later)

    @property
    def later(self) -> int:
        """Tokens of what is learnt from own ways."""
        return int(MORE * self.tokens)

    def _new(self) -> AgentModel:
        vocab = self.bench.vocab
        config = presets.laptop(vocab_size=vocab.size, image_id=vocab.image_id)
        return new_agent(config, vocab, GeometryConfig(), ChatConfig()).model


TRAINED: dict[str, Callable[[Ablation, AgentModel], object]] = {
    "base": lambda a, model: next_token(a.bench, model, a.begin, LR),
    "next token": lambda a, model: next_token(a.bench, model, a.tokens, LR),
    "masks": lambda a, model: denoise(a.bench, model, a.tokens, LR, edits=0.0),
    "edits": lambda a, model: denoise(a.bench, model, a.tokens, LR),
    "more of the same": lambda a, model: denoise(a.bench, model, a.later, LATER, edits=0.0),
    "best orders": lambda a, model: follow(a.bench, model, a.ways, a.later, LATER, "best"),
    "any orders": lambda a, model: follow(a.bench, model, a.ways, a.later, LATER, "any"),
    "quickened": lambda a, model: quicken(a.bench, model, a.rounds, LATER),
}
FOLLOW = ("best orders", "any orders")
PARENTS = dict.fromkeys(("more of the same", "best orders", "any orders", "quickened"), "edits")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation-diffusion"))
    parser.add_argument("--seeds", type=int, default=3, help="two at least, for intervals (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="of each training (default: %(default)s)")
    parser.add_argument("--begin", type=int, default=0, help="tokens of the agent that all go on from; 0: as many")
    parser.add_argument("--rounds", type=int, default=40, help="of reinforcement (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="held out, for judging (default: %(default)s)")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: an interval needs two at least")
    for seed in range(args.seeds):
        ablation = Ablation(args.output, seed, args.tokens, args.rounds, args.questions, args.begin)
        for name in ARMS:
            ablation.arm(name)
    print(write(args.output, ARMS, args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
