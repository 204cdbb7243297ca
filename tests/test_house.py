"""The house rules, read off the source: floors and rooms, cycles, budgets, and what must not appear anywhere.

``CONTRIBUTING.md`` explains them. Where a rule turns out wrong, change it here in the commit that needs the change.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmagent", "data_pipelines", "evals", "recipes")

FLOORS = (
    ("types", "trajectories", "protocols", "config", "geometry", "vocab", "chat", "messages", "replies", "records",
     "packing", "packing_check", "balance", "actions", "prompts", "files", "retries", "signatures", "contamination",
     "html", "leaving", "videos"),
    ("dist", "ops", "browser", "sandbox", "sparsity"),
    ("models", "losses", "worlds", "dealing"),
    ("interop", "objectives", "generation", "tasks"),
    ("agent", "engine"),
    ("train", "serve", "testing"),
)  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

SEES = {  # beyond the library, which everyone but data_pipelines sees whole
    "mmagent": set(),
    "data_pipelines": {"mmagent"},
    "evals": {"mmagent"},
    "recipes": {"mmagent", "data_pipelines", "evals"},
}
DATA_ROOMS = {*FLOORS[0], "dist", "browser", "worlds"}
"""All of the library that data_pipelines may know: it must start in a second, on machines without the model code."""

CYCLES = {
    # types.py names ImageView in a field; patchify, inside geometry, returns a PatchedImage
    ("mmagent.geometry", "mmagent.types"),
}

RECIPE, STEP_AND_LOOP, FILE, FUNCTION = 150, 150, 600, 80
PICKLE = {"mmagent/dist.py"}  # run_ranks receives from its own children what they computed


@dataclass(frozen=True)
class Import:
    """``importer`` imports ``target`` (modules) at ``line``; ``typing``: under ``if TYPE_CHECKING``."""

    importer: str
    target: str
    line: int
    typing: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def sources(*folders: str) -> dict[str, Path]:
    """Module names to files, of the packages or of other folders."""
    found = {}
    for folder in folders or PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of a module of ours, wherever it stands in the file."""
    typing_lines = {
        line
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for line in range(child.lineno, (child.end_lineno or child.lineno) + 1)
    }
    for node in ast.walk(tree(path)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            base = node.module or ""
            # ``from package import module`` reaches the module; ``from package import name`` the package itself
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        for target in dict.fromkeys(targets):
            if target.split(".")[0] in (*PACKAGES, "tests", "tools"):
                yield Import(module, target, node.lineno, node.lineno in typing_lines)


@cache
def all_imports() -> tuple[Import, ...]:
    known = sources()
    return tuple(found for module, path in known.items() for found in imports_of(module, path, known))


def room(module: str) -> str:
    """``mmagent.models.moe`` -> ``models``; the package itself has none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_room_stands_on_a_floor():
    rooms = {room(module) for module in sources() if module.startswith("mmagent.")}
    assert not rooms - set(FLOOR), "name the floor of these rooms in FLOORS"


def test_imports_go_down_and_never_between_rooms_of_one_floor():
    """Floor 0 is one room of modules that may import each other, without cycles."""
    wrong = []
    for found in all_imports():
        importer, target = room(found.importer), room(found.target)
        if not (found.importer.startswith("mmagent.") and found.target.startswith("mmagent.")) or importer == target:
            continue
        below = FLOOR[target] < FLOOR[importer] or FLOOR[target] == FLOOR[importer] == 0
        if not below:
            wrong.append(f"{found} (floor {FLOOR[importer]} from floor {FLOOR[target]})")
    assert not wrong, "\n".join(wrong)


def test_packages_know_only_what_they_should():
    wrong = []
    for found in all_imports():
        importer, target = found.importer.split(".")[0], found.target.split(".")[0]
        if importer != target and target not in SEES[importer]:
            wrong.append(str(found))
        elif importer == "data_pipelines" and target == "mmagent" and room(found.target) not in DATA_ROOMS:
            wrong.append(f"{found}: data_pipelines knows floor 0, dist, browser and worlds only")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_in_a_circle():
    graph: dict[str, set[str]] = {module: set() for module in sources()}
    for found in all_imports():
        edge = (found.importer, found.target)
        if not found.typing and edge not in CYCLES and found.target in graph and found.importer != found.target:
            graph[found.importer].add(found.target)
    circles = [" -> ".join(circle) for circle in _circles(graph)]
    assert not circles, "\n".join(circles)
    used = {(found.importer, found.target) for found in all_imports()}
    assert used >= CYCLES, "an exception in CYCLES is not needed any more: remove it"


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each back edge of a depth-first walk."""
    done: set[str] = set()
    circles: list[list[str]] = []

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            circles.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                walk(target, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return circles


def test_the_walker_sees_circles_and_hidden_imports(tmp_path):
    """The guard itself: imports inside functions count, those for type checkers are marked."""
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert _circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    file = tmp_path / "m.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from mmagent.types import Segments\n"
        "def f():\n    from mmagent import dist\n    import mmagent.train.loop\n"
    )
    found = list(imports_of("mmagent.m", file, sources()))
    assert {(i.target, i.typing) for i in found} == {
        ("mmagent.types", True),
        ("mmagent.dist", False),
        ("mmagent.train.loop", False),
    }


# ---------------------------------------------------------------------------------------------- budgets


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_recipes_are_short():
    long = [f"{path.name}: {lines(path)}" for path in (ROOT / "recipes").glob("*.py") if lines(path) > RECIPE]
    assert not long, f"a recipe has at most {RECIPE} lines; a room is missing: {long}"


def test_step_and_loop_are_short():
    together = sum(lines(ROOT / "mmagent" / "train" / name) for name in ("step.py", "loop.py"))
    assert together <= STEP_AND_LOOP


def test_files_and_functions_are_short():
    long = []
    for path in sources(*PACKAGES, "tools").values():
        name = path.relative_to(ROOT)
        if lines(path) > FILE:
            long.append(f"{name}: {lines(path)} lines, at most {FILE}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION:
                    long.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {FUNCTION}")
    assert not long, "\n".join(long)


# ---------------------------------------------------------------------------------------------- configs and names


@dataclass(frozen=True)
class ConfigField:
    """``owner.name``, declared in ``path``; ``span`` are the lines of what declares it."""

    owner: str
    name: str
    path: Path
    span: range


def config_fields() -> Iterator[ConfigField]:
    for path in sources().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and _is_dataclass(node):
                declarations = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                checks = [i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__post_init__"]
                for item in declarations:
                    assert isinstance(item.target, ast.Name)
                    spans = [range(i.lineno, (i.end_lineno or i.lineno) + 1) for i in (*declarations, *checks)]
                    span = range(min(s.start for s in spans), max(s.stop for s in spans))
                    yield ConfigField(node.name, item.target.id, path, span)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_every_config_field_has_a_reader():
    """Somebody must read ``something.field``; a check in ``__post_init__`` is no reader."""
    reads: dict[str, list[tuple[Path, int]]] = {}
    for path in sources(*PACKAGES, "tools").values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.setdefault(node.attr, []).append((path, node.lineno))
    idle = [
        f"{field.path.relative_to(ROOT)}: {field.owner}.{field.name}"
        for field in config_fields()
        if not any(path != field.path or line not in field.span for path, line in reads.get(field.name, []))
    ]
    assert not idle, "no field without a reader:\n" + "\n".join(idle)


def test_configs_are_found():
    names = {field.owner for field in config_fields()}
    assert {"GeometryConfig", "OptimConfig", "EngineConfig", "CogViTConfig"} <= names


def test_public_names_have_docstrings():
    """Modules, and the classes and functions of more than four lines that other modules may use."""
    silent = []
    for module, path in sources().items():
        if ast.get_docstring(tree(path)) is None and path.read_text().strip():
            silent.append(module)
        for node in tree(path).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            public = not node.name.startswith("_") and node.name != "main"  # what main does, its module says
            if public and length > 4 and ast.get_docstring(node) is None:
                silent.append(f"{module}.{node.name}")
    assert not silent, f"{len(silent)} public names without a docstring:\n" + "\n".join(silent)


# ---------------------------------------------------------------------------------------------- what must not appear


def test_no_exception_is_swallowed():
    swallowed = []
    for path in sources(*PACKAGES, "tools").values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and _catches_all(node.type) and _does_nothing(node.body):
                swallowed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                swallowed += [f"{path.relative_to(ROOT)}:{node.lineno}" for a in node.args if _catches_all(a)]
    assert not swallowed, f"say what went wrong, or catch what you mean: {swallowed}"


def _catches_all(node: ast.expr | None) -> bool:
    return node is None or any(name in ("Exception", "BaseException") for name in re.findall(r"\w+", ast.unparse(node)))


def _does_nothing(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(item, ast.Pass | ast.Continue)
        or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
        for item in body
    )


def test_nothing_foreign_is_unpickled():
    found = []
    for path in sources(*PACKAGES, "tools").values():
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {n.split(".")[0] for n in names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}:
                found += [f"{name}:{node.lineno} imports {names}"] if name not in PICKLE else []
            if isinstance(node, ast.Call):
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if ast.unparse(node.func) == "torch.load" and options.get("weights_only") != "True":
                    found.append(f"{name}:{node.lineno} torch.load without weights_only=True")
                if options.get("allow_pickle") == "True":
                    found.append(f"{name}:{node.lineno} allow_pickle")
    assert not found, "\n".join(found)


def tracked(*suffixes: str) -> list[Path]:
    """Files that git knows; all files of the tree where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        paths = [path for path in ROOT.rglob("*") if path.is_file()]
    else:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.suffix in suffixes and path.exists()]


def test_no_two_test_files_share_a_name():
    """pytest imports them by their base names, and stops at the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_no_merge_is_left_half_done():
    """git lets a conflict be committed with its marks, which no linter sees in a text."""
    marks = re.compile(r"^(<{7}|>{7}|\|{7}) |^={7}$", re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, mark.start()) + 1}"
        for path in tracked(".py", ".md", ".sh", ".toml", ".txt", ".yaml", ".yml", ".json")
        for text in [path.read_text(encoding="utf-8")]
        for mark in marks.finditer(text)
    ]
    assert not found, found


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.$}/-])/(?:root|home|Users|work)/\w+")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked(".py", ".sh", ".md", ".yaml", ".toml", ".html", ".js")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_parameter_is_recognised_by_its_name():
    """``"visual" in name`` breaks with the next encoder; models say what their parameters are (``roles()``)."""
    found = []
    for path in [p for m, p in sources().items() if room(m) in ("engine", "train", "objectives", "losses", "agent")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
                text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
                over = ast.unparse(node.comparators[0])
                if text and over in ("name", "n", "key", "param_name", "parameter_name"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", ["mmagent", "mmagent.config", "mmagent.records"])
def test_importing_the_library_is_light(module):
    """Model libraries cost ten seconds: they are imported by the rooms that use them, when they do."""
    script = (
        f"import sys, {module}; "
        "heavy = [m for m in ('transformers', 'timm', 'torchvision', 'deepspeed', 'matplotlib') if m in sys.modules]; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("mmagent", {"torch", "numpy", "omegaconf"}),
        (
            "mmagent.train.hooks",
            {"transformers", "timm", "torchvision", "tensorboard", "wandb", "scipy", "torch._dynamo"},
        ),
        (
            "recipes.pretrain",
            {"transformers", "timm", "torchvision", "deepspeed", "matplotlib", "wandb", "scipy", "sklearn"},
        ),
    ],
)
def test_a_run_starts_without_what_it_may_never_need(module, without):
    """What is loaded and not how long it takes, which a busy machine blurs: a package as a whole costs 15 ms, mostly
    Python's; torch comes with the rooms that compute, everything else when it is called."""
    script = f"import sys, {module}; print(sorted(set({sorted(without)}) & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"
