"""The promises of the architecture: imports point down, stages do not know each other, importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pipeline import plugins

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("pipeline", "stages", "manifests")
    for file in sorted((ROOT / package).rglob("*.py"))
}
# What each layer may never import, by prefix: data flows one way.
FORBIDDEN = {
    "pipeline": ("stages",),
    "pipeline.sources": (
        "pipeline.execution.runner",
        "pipeline.execution.states",
        "pipeline.execution.passes",
        "pipeline.cli",
        "pipeline.engines",
    ),
    "pipeline.engines": (
        "pipeline.execution.runner",
        "pipeline.execution.states",
        "pipeline.execution.passes",
        "pipeline.cli",
        "pipeline.sources",
    ),
    "stages": (
        "pipeline.execution.runner",
        "pipeline.execution.states",
        "pipeline.cli",
        "pipeline.sources",
        "pipeline.engines",
    ),
}
SCENES = (
    "stages.scenes.claims",
    "stages.scenes.teachers",
    "stages.scenes.region_head",
)  # the scenes world's own tools know its source


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports when it is imported or run, TYPE_CHECKING aside."""
    found: set[str] = set()
    for node in ast.walk(_without_type_checking(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name in MODULES}


def _without_type_checking(tree: ast.Module) -> ast.Module:
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return tree


@pytest.mark.parametrize("module", MODULES)
def test_a_layer_never_imports_what_is_above_it(module: str) -> None:
    for layer, forbidden in FORBIDDEN.items():
        if (module == layer or module.startswith(layer + ".")) and module not in SCENES:
            above = {name for name in imports(MODULES[module]) if name.startswith(forbidden)}
            assert not above, f"{module} imports {above}"


def test_what_rewards_does_not_know_the_simulated_teachers() -> None:
    rewards = [
        name
        for name in MODULES
        if name.startswith(("stages.rubric_writers", "stages.scorers", "stages.scenes.claim_checks"))
    ]
    assert not [name for name in rewards if "stages.scenes.teachers" in imports(MODULES[name])]


def test_no_imports_go_in_circles() -> None:
    packages = {"pipeline", "stages", "manifests", "pipeline.sources", "pipeline.engines", "stages.scorers"}
    TopologicalSorter({name: imports(file) - packages - {name} for name, file in MODULES.items()}).prepare()


def test_stages_do_not_import_each_other() -> None:
    stages = {
        f"stages.{name}" for name in plugins.available("stages") if hasattr(plugins.load("stages", name), "passes")
    }
    for stage in stages:
        assert not imports(MODULES[stage]) & (stages - {stage})


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, pipeline.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "duckdb", "pyarrow", "numpy", "PIL", "tqdm"} & set(loaded)


@pytest.mark.slow
def test_importing_any_module_prints_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code, *MODULES],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
