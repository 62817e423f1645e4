"""The promises of the architecture: every import points down, stages do not know each other, importing does nothing.

An import counts wherever it is written: at the top of a module, in a function, under TYPE_CHECKING, or as a constant
`plugins.load("package", "name")` or `import_module("package.name")`. Other ways to import are refused.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
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
    "pipeline.audits",
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
    "stages.recipes",
    "stages.rubrics",
    "stages.scenes",
    "stages.scorers",
    "stages.finders",
    "stages.rubric_writers",
    "stages.audit",
    "stages.exporters",
    "stages.training",
    "stages",  # the stages themselves
)
HIDDEN_FROM_STAGES = ("pipeline.sources", "pipeline.report", "pipeline.slurm", "pipeline.commands", "pipeline.cli")
SCENES_WORLD = "stages.scenes"  # its tools know its own source
MAX_FLOORS = 9
MAX_ROOMS = 20  # files and directories of pipeline/ or of stages/
MAX_FILES = 20  # Python files of any directory below them
LOADERS = ("load", "import_module")
PLUGIN_LOADERS = ("plugins.load", "importlib.import_module", "import_module")
PACKAGES = ("pipeline", "stages")
HIDDEN_LOADERS = ("__import__", "resolve_name", "spec_from_file_location")

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
        graph[module] = {target for target in targets if target in texts or is_unshipped(target)} - {module}
    return graph


def is_unshipped(module: str) -> bool:
    return module.partition(".")[0] in ("tests", "benchmarks")


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
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in LOADERS:
            name = find_loaded(node)
            yield name, name


def find_loaded(call: ast.Call) -> str:
    """The module that `load(package, name)` or `import_module(name, package)` loads; "" if only a run decides."""
    values = {keyword.arg: fold_text(keyword.value) for keyword in call.keywords}
    order = ("package", "name") if ast.unparse(call.func).endswith("load") else ("name", "package")
    values |= zip(order, map(fold_text, call.args), strict=False)
    name, package = values.get("name"), values.get("package", "")
    if not name or package is None:
        return ""
    if name.startswith("."):
        return f"{package}{name}"
    return name if "." in name or not package else f"{package}.{name}"


def fold_text(node: ast.expr) -> str | None:
    """A string that is constant, in one piece or several; None: a run decides it."""
    if isinstance(node, ast.JoinedStr):
        parts = [fold_text(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values]
    elif isinstance(node, ast.BinOp):
        parts = [fold_text(node.left), fold_text(node.right)]
    else:
        parts = [node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None]
    return None if None in parts else "".join(filter(None, parts))


def hidden_imports(texts: Sources) -> list[str]:
    """Imports that `find_imports` cannot follow: relative ones, whole packages, functions that import out of sight, and
    loaders under other names."""
    found = []
    for module, text in texts.items():
        tree = ast.parse(text)
        called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{module} imports relatively")
            elif isinstance(node, ast.Import) and any(alias.name in PACKAGES for alias in node.names):
                found.append(f"{module} imports a whole package")
            aliases = node.names if isinstance(node, ast.ImportFrom) else []
            renamed = [alias.name for alias in aliases if alias.name in LOADERS and alias.asname]
            used = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            is_passed_on = used in PLUGIN_LOADERS and node not in called
            if renamed or is_passed_on or used.rpartition(".")[2] in HIDDEN_LOADERS:
                found.append(f"{module} uses {renamed or used}")
    return found


def room_of(module: str) -> str:
    assert any(f"{module}.".startswith(f"{room}.") for room in ROOMS), f"{module} is in no room of ROOMS"
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def upward_imports(texts: Sources) -> list[str]:
    rank = {room: number for number, room in enumerate(ROOMS)}
    return [
        f"{module} imports {target}"
        for module, targets in import_graph(texts).items()
        for target in sorted(targets)
        if is_unshipped(target)
        or rank[room_of(target)] > rank[room_of(module)]
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
    """Also through other modules that stand beside the stages, such as `stages/__init__.py`."""
    stages = {m for m in texts if m.count(".") == 1 and room_of(m) == "stages"}
    graph = import_graph(texts)
    found = []
    for stage in sorted(stages):
        reached, ahead = {stage}, [stage]
        while ahead:
            nearer = {module for module in graph[ahead.pop()] if room_of(module) == "stages"} - reached
            reached |= nearer
            ahead += nearer
        found += [f"{stage} imports {other}" for other in sorted(reached & stages - {stage})]
    return found


def floors(texts: Sources, package: str = "pipeline") -> dict[str, int]:
    """The longest chain of imports from each room of a package down, itself included.

    A room is a file or directory of `package`, or another package as a whole.
    """
    rooms: dict[str, set[str]] = {}
    for module, targets in import_graph(texts).items():
        room = directory_entry(module, package)
        rooms.setdefault(room, set()).update({directory_entry(target, package) for target in targets} - {room})
    height: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        height[room] = 1 + max((height[target] for target in rooms[room]), default=0)
    return height


def directory_entry(module: str, package: str) -> str:
    """`pipeline.slurm` for `pipeline.slurm.script` in pipeline; the stages themselves are one room, in any package."""
    root, _, rest = module.partition(".")
    if root != package:
        return root
    return room_of(module) if package == "stages" else f"{root}.{rest.partition('.')[0]}"


@pytest.mark.slow
def test_every_import_points_down() -> None:
    assert upward_imports(sources()) == []


@pytest.mark.slow
def test_no_imports_go_in_circles() -> None:
    assert circle(sources()) == []


def test_stages_do_not_import_each_other() -> None:
    assert stages_that_import_stages(sources()) == []


def test_the_tree_is_flat_and_its_directories_are_small() -> None:
    for package in ("pipeline", "stages"):
        height = floors(sources(), package)
        tallest = max(height, key=height.__getitem__)
        assert height[tallest] <= MAX_FLOORS, f"{tallest} is on floor {height[tallest]}"
        entries = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()]
        rooms = [path.name for path in entries if path.name not in ("__init__.py", "__pycache__")]
        assert len(rooms) <= MAX_ROOMS, f"{package}/ has {len(rooms)} rooms: {sorted(rooms)}"
    files = Counter(module.rpartition(".")[0] for module in sources())
    assert max(files.values()) <= MAX_FILES, files.most_common(1)


def test_nothing_is_imported_out_of_sight() -> None:
    assert hidden_imports(sources()) == []


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
        ("pipeline.cli", 'plugins.load(name="train", package="stages")', upward_imports),
        ("pipeline.cli", 'plugins.load("stages", f"{\'tr\'}ain")', upward_imports),
        ("pipeline.cli", 'importlib.import_module("stages" + ".train")', upward_imports),
        ("pipeline.cli", 'importlib.import_module(".train", "stages")', upward_imports),
        ("pipeline.errors", "from tests.support import runs", upward_imports),
        ("stages.text", "from benchmarks.held_out import JUDGE", upward_imports),
        ("pipeline.cli", '__import__("stages.train")', hidden_imports),
        ("pipeline.cli", 'import pkgutil\npkgutil.resolve_name("stages.train")', hidden_imports),
        ("pipeline.cli", "from importlib import import_module as fetch", hidden_imports),
        ("pipeline.storage.tables", "from ..execution import runner", hidden_imports),
        ("pipeline.storage.words", "if TYPE_CHECKING:\n    from .tables import TableFooter", hidden_imports),
        ("stages.filter", "import stages\nstages.caption.passes", hidden_imports),
        ("pipeline.storage.words", "fetch = plugins.load\nfetch('stages', 'train')", hidden_imports),
        ("pipeline.storage.words", "partial(plugins.load, 'stages')('train')", hidden_imports),
        ("stages.filter", "from stages.caption import passes", stages_that_import_stages),
    ],
)
def test_a_planted_violation_is_noticed(module: str, line: str, check: object) -> None:
    assert callable(check)
    found = check({**sources(), module: f"{sources()[module]}\n{line}\n"})
    assert any(module in violation for violation in found)


def test_a_stage_that_imports_another_through_a_third_is_noticed() -> None:
    helper = {"stages.helper": "from stages.caption import passes"}
    user = {"stages.filter": f"{sources()['stages.filter']}\nfrom stages.helper import passes as captions\n"}
    assert "stages.filter imports stages.caption" in stages_that_import_stages({**sources(), **helper, **user})
    through = {"stages": f"{sources()['stages']}\nfrom stages.caption import passes\n"}
    user = {"stages.filter": f"{sources()['stages.filter']}\nfrom stages import passes as captions\n"}
    assert "stages.filter imports stages.caption" in stages_that_import_stages({**sources(), **through, **user})


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
