"""The demo's run on scenes of a held-out world, with more sections, for the benchmarks of what it keeps."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner

FAITHFUL = 0.99  # of the judge's score: the demo's rule


def make_demo_run(
    folder: Path, *, num_scenes: int, world: int, sections: Mapping[str, Mapping[str, Any]]
) -> config.Run:
    """The run with all of its stages done; what the folder already has is not made again.

    Args:
        folder: of the run.
        num_scenes: without copies and without files that cannot be read.
        world: its seed.
        sections: keys by section, as in {"caption.raw": {"words": "alt_text"}}; they change or add to the demo's.
    """
    demo: dict[str, Any] = tomllib.loads((resources.files("manifests") / "demo" / "run.toml").read_text())
    assert demo["filter"]["rules"]["faithful"] == f"judge >= {FAITHFUL}"
    demo["source"] |= {"num_images": num_scenes, "seed": world, "broken_share": 0.0, "duplicate_share": 0.0}
    values = dict(_flatten_sections(demo))
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys
    if not folder.exists():
        init.create_run(folder, values)
    _check_folder(folder, values)
    run = config.load(folder)
    state = RunState(run)
    assert Runner(state).execute(select_passes(state.passes, "all")).exit_code == 0
    return run


def _flatten_sections(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """[("caption.dense", {...}), ...]"""
    for name, part in values.items():
        if name in ("engines", "caption", "score"):
            yield from ((f"{name}.{one}", keys) for one, keys in part.items())
        else:
            yield name, part


def _check_folder(folder: Path, values: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        SystemExit: the folder's run is another one.
    """
    file = folder / "run.toml"
    found = dict(_flatten_sections(tomllib.loads(file.read_text())))
    for name, keys in values.items():
        for key, value in keys.items():
            if (other := found.get(name, {}).get(key)) != value:
                raise SystemExit(f"{file}: {name}.{key} is {other!r}, not {value!r}; choose a new folder")
