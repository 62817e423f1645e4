"""The promises of the architecture: every import points down, stages do not know each other, importing does nothing.

An import counts wherever it is written: at the top of a module, in a function, under TYPE_CHECKING, or as a literal
`plugins.load("package", "name")`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (  # from the ground up: a module imports its own room and those above it in this list, never one below it
    "pipeline.errors",
    "pipeline.machine",
    "pipeline.records",
    "pipeline.sections",
    "pipeline.plugins",
    "pipeline.validation",
    "pipeline.config",
    "pipeline.progress",
    "pipeline.storage",
    "pipeline.decoding",
    "pipeline.engines",
    "pipeline.sources",
    "pipeline.execution",
    "pipeline.report",
    "pipeline.slurm",
    "pipeline.commands",
    "pipeline.cli",
    "pipeline.__main__",
    "manifests",
    "stages.text",
    "stages.flags",
    "stages.recipes",
    "stages.rubrics",
    "stages.scenes",
    "stages.scorers",
    "stages.rubric_writers",
    "stages.sql",
    "stages.exporters",
    "stages.training",
    "stages.audit",
    "stages",  # the stages themselves
)
HIDDEN_FROM_STAGES = ("pipeline.sources", "pipeline.report", "pipeline.slurm", "pipeline.commands", "pipeline.cli")
SCENES_WORLD = "stages.scenes"  # its tools know its own source
MAX_FLOORS = 9
MAX_ROOMS = 20  # in one directory

Sources = Mapping[str, str]  # module -> source text


@cache
def sources() -> Sources:
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file.read_text()
        for package in ("pipeline", "stages", "manifests")
        for file in sorted((ROOT / package).rglob("*.py"))
    }


def import_graph(texts: Sources) -> dict[str, set[str]]:
    graph = {}
    for module, text in texts.items():
        targets = {name if name in texts else package for name, package in list_imports(text)}
        graph[module] = (targets & texts.keys()) - {module}
    return graph


@cache
def list_imports(text: str) -> list[tuple[str, str]]:
    """(what is imported, the module to which it belongs unless it is a module itself)."""
    return list(find_imports(ast.parse(text)))


def find_imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("load", "import_module"):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            arguments = [arg.value for arg in values if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if arguments and len(arguments) == len(values):
                name = arguments[-1] if "." in arguments[-1] else ".".join(arguments)
                yield name, name


def room_of(module: str) -> str:
    assert any(f"{module}.".startswith(f"{room}.") for room in ROOMS), f"{module} is in no room of ROOMS"
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def upward_imports(texts: Sources) -> list[str]:
    rank = {room: number for number, room in enumerate(ROOMS)}
    return [
        f"{module} imports {target}"
        for module, targets in import_graph(texts).items()
        for target in sorted(targets)
        if rank[room_of(target)] > rank[room_of(module)]
        or (
            module.startswith("stages")
            and target.startswith(HIDDEN_FROM_STAGES)
            and not (module.startswith(SCENES_WORLD) and target.startswith("pipeline.sources"))
        )
    ]


def circle(texts: Sources) -> list[str]:
    """The modules of one import circle; empty when there is none."""
    try:
        TopologicalSorter(import_graph(texts)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def stages_that_import_stages(texts: Sources) -> list[str]:
    stages = {m for m in texts if m.count(".") == 1 and m.startswith("stages.") and "def passes(" in texts[m]}
    graph = import_graph(texts)
    return [f"{stage} imports {other}" for stage in sorted(stages) for other in sorted(graph[stage] & stages)]


def floors(texts: Sources) -> dict[str, int]:
    """The longest chain of imports from each room down, itself included; a room is a file or directory of a package."""
    rooms: dict[str, set[str]] = {}
    for module, targets in import_graph(texts).items():
        room = directory_entry(module)
        rooms.setdefault(room, set()).update({directory_entry(target) for target in targets} - {room})
    height: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        height[room] = 1 + max((height[target] for target in rooms[room]), default=0)
    return height


def directory_entry(module: str) -> str:
    """`pipeline.slurm` for `pipeline.slurm.script`; the stages are one room, above what they share."""
    package, _, rest = module.partition(".")
    return package if package == "stages" else f"{package}.{rest.partition('.')[0]}"


@pytest.mark.slow
def test_every_import_points_down() -> None:
    assert upward_imports(sources()) == []


@pytest.mark.slow
def test_no_imports_go_in_circles() -> None:
    assert circle(sources()) == []


def test_stages_do_not_import_each_other() -> None:
    assert stages_that_import_stages(sources()) == []


def test_the_tree_is_flat_and_its_directories_are_small() -> None:
    height = floors(sources())
    tallest = max(height, key=height.__getitem__)
    assert height[tallest] <= MAX_FLOORS, f"{tallest} is on floor {height[tallest]}"
    for package in ("pipeline", "stages"):
        entries = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()]
        assert len([path for path in entries if path.name not in ("__init__.py", "__pycache__")]) <= MAX_ROOMS


@pytest.mark.parametrize(
    ("module", "line", "check"),
    [
        ("pipeline.storage.tables", "from pipeline.execution import runner", upward_imports),
        ("pipeline.config", "def f():\n    from stages import caption", upward_imports),
        ("pipeline.cli", 'plugins.load("stages", "train")', upward_imports),
        ("pipeline.cli", 'plugins.load(package="stages", name="train")', upward_imports),
        ("pipeline.cli", 'from pipeline import plugins as p\np.load("stages", "train")', upward_imports),
        ("pipeline.cli", 'importlib.import_module("stages.train")', upward_imports),
        ("stages.filter", "from pipeline.cli import app", upward_imports),
        ("pipeline.errors", "if TYPE_CHECKING:\n    from pipeline import plugins", circle),
        ("pipeline.sections", 'plugins.load("pipeline", "config")', circle),
        ("stages.filter", "from stages.caption import passes", stages_that_import_stages),
    ],
)
def test_a_planted_violation_is_noticed(module: str, line: str, check: object) -> None:
    assert callable(check)
    found = check({**sources(), module: f"{sources()[module]}\n{line}\n"})
    assert any(module in violation for violation in found)


def test_what_rewards_does_not_know_the_simulated_teachers() -> None:
    rewards = ("stages.rubric_writers", "stages.scorers", "stages.scenes.claim_checks")
    graph = import_graph(sources())
    assert not [m for m in graph if m.startswith(rewards) and "stages.scenes.teachers" in graph[m]]


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, pipeline.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "duckdb", "pyarrow", "numpy", "PIL", "tqdm", "pydantic"} & set(loaded)


@pytest.mark.slow
def test_importing_any_module_prints_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code, *sources()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
