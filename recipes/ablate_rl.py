"""Does one RL run over many categories help each of them, and does it harm fewer than fine-tuning on the same items?

    python -m recipes.quickstart
    python -m recipes.ablate_rl --quickstart runs/quickstart --output runs/ablation-rl --seeds 3 --parts joint

Parts, each of several seeds, all from the quickstart's fine-tuned agent:

- ``joint``: an agent that has seen right answers of all categories of `recipes.ablate_rl_tasks` (``base``), then
  reinforced on all of them together, or fine-tuned on right answers to the same stream of items, at the same rate;
- ``narrow``: from ``base``, reinforced on one category alone, with as many prompts, or fine-tuned on it alone;
- ``experts``: one round of expert iteration: the agents of ``narrow`` play, what is right is kept, and ``base`` is
  fine-tuned on both categories' kept answers;
- ``visual``: screenshots to HTML by RVPO against the visual score itself;
- ``miniwob``: pages of MiniWoB++, before and after.

Kill it at any moment; the same command goes on. A part leaves ``PART.json``, ``PART.md``, ``PART.svg``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mmagent.interop.agent_folder import load_agent
from recipes.ablate_rl_report import write
from recipes.ablate_rl_tasks import IN_PAGES, JOINT, MINIWOB, NARROW, SIZES, VISUAL, Size
from recipes.ablation_command import parser
from recipes.lineage import Stage
from recipes.plan_command import run_or_exit
from recipes.quickstart_plan import file

PARTS = ("joint", "narrow", "experts", "visual", "miniwob")
RATE = ("optim.lr=6e-4", "optim.weight_decay=0", "phases.0.freeze=[encoder,mtp]")
"""Of fine-tuning that is compared with RL: the same weights at the same rate."""


@dataclass(frozen=True)
class Plan:
    """Stages under ``root`` that begin with the agent folder ``agent``; every method is one of them."""

    root: Path
    agent: Path
    size: Size
    processes: int

    def traces(self, name: str, tasks: tuple[str, ...], *told: str, mix: str = "") -> Stage:
        folder = self.root / "traces" / (mix or name) / name  # fine-tuning reads all sources of its mix, and no other
        arguments = ("recipes.task_traces", f"folder={folder}", _listed(tasks), "pages=4", *told)
        return Stage(f"traces-{name}", "right answers", arguments, folder, file("traces.json"), 60, 0)

    def sft(self, name: str, init: Path, mix: str, steps: int, seed: int, *told: str) -> Stage:
        output = self.root / name
        arguments = ("recipes.sft", *self.size.sft, f"init={init}", f"data.folder={self.root / 'traces' / mix}")
        arguments += (f"phases.0.steps={steps}", f"seed={seed}", f"data.seed={seed}", f"output={output}", *told)
        return Stage(name, "fine-tune on right answers", arguments, output, _agent, 4 * steps, self.processes)

    def rl(self, name: str, init: Path, tasks: tuple[str, ...], seed: int, *told: str) -> Stage:
        output, size = self.root / name, self.size
        arguments = ("recipes.rl", *size.rl, f"collector.prompts={size.prompts}", f"init={init}", _listed(tasks))
        arguments += (f"seed={seed}", f"output={output}", f"steps={size.steps}", *told)
        return Stage(name, "reinforce", arguments, output, _agent, 10 * size.steps, self.processes)

    def judge(self, who: str, tasks: tuple[str, ...], *told: str, init: Path | None = None) -> Stage:
        output = self.root / "judged" / who
        whom = f"init={init or self.root / who / 'agent'}"
        arguments = ("recipes.judge_tasks", whom, _listed(tasks), f"output={output}", *self.size.judged, *told)
        return Stage(f"judge-{who}", "on held-out items", arguments, output, file("scores.json"), 40, 0)


def plan(part: str, p: Plan, seeds: int) -> list[Stage]:
    """All that a part needs; what another part did already is not done again."""
    base, joint, each = p.root / "base" / "agent", tuple(JOINT.values()), p.size.items
    stages = []
    if part in ("joint", "narrow", "experts"):
        stages.append(p.traces("base", (*joint, *IN_PAGES.values()), f"per_task={each}", "seed=1000"))
        stages.append(p.sft("base", p.agent, "base", p.size.base, 0))
        stages.append(p.judge("base", joint))
    for seed in range(seeds):
        if part == "joint":
            stages.append(p.traces(f"all-{seed}", joint, f"per_task={-(-p.size.asked // len(joint))}", f"seed={seed}"))
            stages.append(p.rl(f"joint-rl-{seed}", base, joint, seed))
            stages.append(p.sft(f"joint-sft-{seed}", base, f"all-{seed}", p.size.fitted, seed, *RATE))
            stages += [p.judge(f"joint-{how}-{seed}", joint) for how in ("rl", "sft")]
        for category in NARROW if part in ("narrow", "experts") else ():
            one, name = (JOINT[category],), f"{category}-{seed}"
            stages.append(p.rl(f"only-rl-{name}", base, one, seed))
            if part == "narrow":
                stages.append(p.traces(name, one, f"per_task={p.size.asked}", f"seed={seed}"))
                stages.append(p.sft(f"only-sft-{name}", base, name, p.size.fitted, seed, *RATE))
                stages += [p.judge(f"only-{how}-{name}", joint) for how in ("rl", "sft")]
            else:
                stages += _own_answers(p, category, one, seed)
        if part == "experts":
            stages.append(p.sft(f"experts-{seed}", base, f"own-{seed}", p.size.fitted, seed, *RATE))
            stages.append(p.judge(f"experts-{seed}", joint))
        if part == "visual":
            for arm, told in VISUAL.arms.items():
                stages.append(p.rl(f"visual-{arm}-{seed}", p.agent, VISUAL.tasks, seed, *VISUAL.told, *told))
                stages.append(p.judge(f"visual-{arm}-{seed}", VISUAL.tasks, *VISUAL.judged))
        if part == "miniwob":
            stages += [p.rl(f"miniwob-{seed}", p.agent, MINIWOB, seed), p.judge(f"miniwob-{seed}", MINIWOB)]
    if part in ("visual", "miniwob"):
        tasks, told = (VISUAL.tasks, VISUAL.judged) if part == "visual" else (MINIWOB, ())
        stages.append(p.judge(f"{part}-before", tasks, *told, init=p.agent))
    return list({stage.name: stage for stage in stages}.values())


def _own_answers(p: Plan, category: str, one: tuple[str, ...], seed: int) -> list[Stage]:
    """An expert plays what it has not been trained on, and its right answers are kept."""
    expert, name = p.root / f"only-rl-{category}-{seed}" / "agent", f"own-{category}-{seed}"
    rollouts, other = p.root / f"play-{name}" / "recorded", seed + 500
    told = ("train=false", f"collector.record={rollouts}", f"steps={max(p.size.steps // 3, 1)}")
    how = (f"rollouts={rollouts}", "answers=own", f"agent={expert}", f"seed={other}", "each=2")
    return [p.rl(f"play-{name}", expert, one, other, *told), p.traces(name, one, *how, mix=f"own-{seed}")]


def _listed(tasks: tuple[str, ...]) -> str:
    return f"tasks=[{','.join(tasks)}]"


def _agent(folder: Path) -> None:
    load_agent(folder / "agent")


def main() -> int:
    """Returns the exit status. ``--steps``, of RL; fine-tuning's go with them; 0: as many as the size says."""
    command = parser("recipes.ablate_rl", __doc__, "runs/ablation-rl", seeds=3, steps=0)
    command.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    command.add_argument("--size", choices=tuple(SIZES), default="laptop", help="debug runs everything, learns nothing")
    args = command.parse_args()
    if args.seeds < 2:
        command.error("--seeds must be at least 2, for an interval")
    p = Plan(args.output, args.quickstart / "sft" / "agent", SIZES[args.size].of(args.steps), args.processes)
    for part in args.parts:
        stages = plan(part, p, args.seeds)
        if args.plan:
            print("\n".join(" ".join(["python", *stage.command()[1:]]) for stage in stages))
            continue
        if not p.agent.is_dir():
            command.error(f"{p.agent} missing: run `python -m recipes.quickstart` first, or name its --quickstart")
        run_or_exit(stages, args.output / part)
        print(write(part, args.output, args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
