"""The quickstart's stages: what each is told, what it leaves, and how the next one opens that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from evals.store import read_run
from mmagent.interop.agent_folder import load_agent
from mmagent.interop.encoder_folder import load_encoder
from mmagent.vocab import Vocab
from mmagent.worlds.questions import WEIGHTS
from recipes import quickstart_mix as mix
from recipes.lineage import Stage

SIZES = ("laptop", "debug")


def plan(root: Path, size: str, processes: int, browser: bool) -> list[Stage]:
    """All stages in order; without a ``browser`` those that look at pages are left out."""
    stages = [_data(root, size, browser)]
    stages += [_teacher(root, kind, size, processes) for kind in ("siglip2", "dinov3")]
    stages += [_distil(root, size, processes, only) for only in ("", "siglip2", "dinov3")]
    vocabulary = f"tokenizer={root}/data/tokenizer.json"
    preset = ("--preset", size)
    align = ("recipes.align_encoder", *preset, f"init={root}/distill/encoder", vocabulary, f"output={root}/align")
    if browser:
        align += tuple(f"sources.{name}={root}/data/pretrain/{name}" for name in ("tiles", "screens"))
        align += tuple(f"mix.{name}={weight}" for name, weight in mix.SHOWN.items())
    about = "contrast images with captions at native resolution, packed; learn what stands where"
    stages.append(Stage("align", about, align, root / "align", encoder, 55, processes))
    stages.append(_probes(root, size))
    pretrain = ("recipes.pretrain", *preset, vocabulary, f"encoder={root}/align/encoder")
    pretrain += (*_shards(root, "pretrain", browser), f"validation.folder={root}/data/validation", "validation.steps=3")
    pretrain += (f"validate_every={mix.VALIDATE[size]}", f"output={root}/pretrain")
    untrained = ("recipes.pretrain", *preset, vocabulary, *_shards(root, "pretrain", browser), "phases=[]")
    about = "a new model, to compare with"
    stages.append(Stage("untrained", about, (*untrained, f"output={root}/untrained"), root / "untrained", _agent, 6))
    about = "CogViT + merger + MoE decoder + MTP learn to read screens"
    stages.append(Stage("pretrain", about, pretrain, root / "pretrain", _agent, 245, processes))
    if not browser:
        return stages
    sft = ("recipes.sft", *preset, f"init={root}/pretrain/agent", *_shards(root, "sft", browser), f"output={root}/sft")
    stages.append(Stage("sft", "imitate experts at their clicks", sft, root / "sft", _agent, 80, processes))
    tasks = "tasks=[" + ",".join(f"miniwob/{task}" for task in mix.TASKS) + "]"
    rl = ("recipes.rl", *preset, f"init={root}/sft/agent", tasks, f"output={root}/rl")
    stages.append(Stage("rl", "try, be rewarded by the page, improve (GRPO)", rl, root / "rl", _agent, 125, processes))
    stages += [_judge(root, who, who, ("miniwob",), size) for who in ("untrained", "sft", "rl")]
    stages.append(_judge(root, "blind", "rl", ("miniwob",), size, "--blind"))
    return [
        *stages,
        _judge(root, "pages", "rl", ("page_grounding", "screenshot_to_html"), size, "--max-tokens", str(mix.ANSWER)),
    ]


def _data(root: Path, size: str, browser: bool) -> Stage:
    """Whether there is a browser is part of the command: with one, the data of a call without is made afresh."""
    samples = [f"{stage}.{n}={count}" for stage, kinds in mix.SAMPLES[size].items() for n, count in kinds.items()]
    tasks = "tasks=[" + ",".join(mix.TASKS) + "]"
    asked = ("questions=3", *(f"ask.{kind}={mix.ASK.get(kind, 0)}" for kind in WEIGHTS))
    seen = f"browser={'required' if browser else 'none'}"
    arguments = ("data_pipelines.build", "--preset", size, f"folder={root}/data", seen, tasks, *samples, *asked)
    about = "draw scenes, render pages, play experts; write shards"
    made = [(stage, n) for stage, kinds in mix.SAMPLES[size].items() for n, count in kinds.items() if count]
    sources = [f"{stage}/{n}" for stage, n in made if browser or n in mix.BLIND]
    return Stage("data", about, arguments, root / "data", built(sources), 90, 0)


def _teacher(root: Path, kind: str, size: str, processes: int) -> Stage:
    output = root / "teachers" / kind
    arguments = ("recipes.teachers", "--preset", kind, f"tokenizer={root}/data/tokenizer.json", f"output={output}")
    arguments += ("steps=2", "data.images_per_step=8") if size == "debug" else ()
    about = f"train a small {kind} teacher, as none can be downloaded here"
    return Stage(f"teacher-{kind}", about, arguments, output, file("teacher/model.safetensors"), 35, processes)


def _distil(root: Path, size: str, processes: int, only: str = "") -> Stage:
    """From both teachers, or from ``only`` one of them, to compare with."""
    name = f"distill-{only}" if only else "distill"
    kinds = (only,) if only else ("siglip2", "dinov3")
    sources = tuple(f"teachers.{kind}.source={root}/teachers/{kind}/teacher" for kind in kinds)
    arguments = ("recipes.distill_encoder", "--preset", size, *sources, f"output={root}/{name}")
    about = f"the same from {only} alone, to compare with" if only else "CogViT learns from both teachers"
    return Stage(name, about, arguments, root / name, encoder, 26, processes)


def _probes(root: Path, size: str) -> Stage:
    names = {"siglip2": "distill-siglip2", "dinov3": "distill-dinov3", "both": "distill", "aligned": "align"}
    pairs = tuple(f"{name}={root}/{folder}/encoder" for name, folder in names.items())
    images = ("--images", "60" if size == "debug" else "300")
    arguments = ("recipes.probe_encoders", *pairs, f"output={root}/probes", *images)
    return Stage("probes", "what each encoder knows", arguments, root / "probes", file("probes.json"), 25, 0)


def _shards(root: Path, stage: str, browser: bool) -> tuple[str, ...]:
    names = [name for name in mix.SHARES[stage] if browser or name in mix.BLIND]
    weights = tuple(f"data.sources.{name}.weight={mix.SHARES[stage][name]}" for name in names)
    return (f"data.folder={root}/data/{stage}", *weights)


def _judge(root: Path, name: str, who: str, suites: tuple[str, ...], size: str, *how: str) -> Stage:
    output = root / "evals" / name
    tasks = ("--tasks", *(f"miniwob/{task}" for task in mix.TASKS)) if suites == ("miniwob",) else ()
    each = mix.BLINDED if "--blind" in how else mix.JUDGED
    limit = ("--limit", str(each[size] * len(mix.TASKS) if tasks else mix.PAGES[size]))
    judged = ("evals", *suites, "--checkpoint", str(root / who / "agent"), *tasks, *limit)
    arguments = (*judged, "--out", str(output), *how)
    about = f"{who} on held-out seeds in a real browser" + (", shown blank screens" if "--blind" in how else "")
    return Stage(f"judge-{name}", about, arguments, output, _judged(suites), 20, 0)


def built(sources: Sequence[str]) -> Callable[[Path], None]:
    """A check that a folder has a vocabulary and shards of all ``sources``."""

    def check(folder: Path) -> None:
        Vocab.load(folder / "tokenizer.json")
        if missing := [name for name in sources if not any((folder / name).glob("*.tar"))]:
            raise ValueError(f"{folder} has no shards of {', '.join(missing)}")

    return check


def encoder(folder: Path) -> None:
    """Check that a stage left an encoder."""
    load_encoder(folder / "encoder")


def _agent(folder: Path) -> None:
    load_agent(folder / "agent")


def _judged(suites: tuple[str, ...]) -> Callable[[Path], None]:
    return lambda folder: [read_run(folder / suite) for suite in suites] and None


def file(name: str) -> Callable[[Path], None]:
    """A check that a folder has the file ``name``."""

    def check(folder: Path) -> None:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")

    return check
