"""Plugins and TOML files by name: the folder is the registry, the file name is the name.

A name with a dot is a module of the user.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType

from pipeline.errors import UnknownNameError
from pipeline.sections import STAGES

MOVED = {"stages.teachers": "stages.scenes.teachers"}  # names that existing run.toml files use
SHIPPED_IN = {"flags": "text/flags", "writers": "rubric_writers"}  # folder of a run -> folder of stages/


def list_names(package: str) -> list[str]:
    """The names of a package's plugins: its modules, none of them imported."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.name[0] != "_")


def load(package: str, name: str) -> ModuleType:
    """The module `name` of `package`, or the user's module when the name has a dot.

    Raises:
        UnknownNameError: no such module exists; the message lists those that do.
    """
    if "." in name:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UnknownNameError(f"{name!r} is not the name of a module; write it as in `import my_project.module`")
        name = MOVED.get(name, name)
        return _import_plugin(name, f"no module {name!r} can be imported (is its folder on PYTHONPATH?)")
    if name not in list_names(package):
        raise UnknownNameError(explain_unknown(name, list_names(package)))
    return _import_plugin(f"{package}.{name}", f"{package}.{name} no longer exists")


def find_toml(name: str, *, folder: str, run: Path | None) -> Traversable:
    """`<run>/<folder>/NAME.toml`, else the file of that name that ships in stages/.

    Raises:
        UnknownNameError: neither exists; the message lists the names that do.
    """
    shipped = resources.files("stages") / SHIPPED_IN.get(folder, folder)
    places: list[Traversable] = [shipped] if run is None else [run / folder, shipped]
    for place in places:
        if (file := place / f"{name}.toml").is_file():
            return file
    names = {
        f.name.removesuffix(".toml") for p in places if p.is_dir() for f in p.iterdir() if f.name.endswith(".toml")
    }
    raise UnknownNameError(explain_unknown(name, sorted(names)))


def explain_unknown(name: str, choices: list[str]) -> str:
    """The message for a name that is none of the choices."""
    close = get_close_matches(name, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name!r} is none of {', '.join(choices) or '(there are none)'}{hint}"


def _import_plugin(module: str, otherwise: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise  # the plugin exists; a module that it imports does not
        raise UnknownNameError(otherwise) from error


def list_stages(sections: Iterable[str]) -> list[str]:
    """The stages that ship, in their usual order, then the user's own that have a section.

    Imports no other module of stages/, to keep `recap status` quick.
    """
    modules = list_names("stages")
    others = [name for name in sections if name in modules and name not in STAGES]
    own = [name for name in others if hasattr(load("stages", name), "passes")]
    return [name for name in STAGES if name in modules] + own
