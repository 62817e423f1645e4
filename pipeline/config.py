"""run.toml, read strictly into a `Run`.

The keys of a stage's section are known by its module.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import ConfigError
from pipeline.machine import num_cores
from pipeline.sections import Corpus, Plugin, Run, TopLevel, key, stamped
from pipeline.slurm import options
from pipeline.validation import Section

__all__ = ["Corpus", "Plugin", "Run", "Section", "TopLevel", "key", "load", "parse", "stamped"]


def load(folder: Path) -> Run:
    """Reads `<folder>/run.toml`.

    Raises:
        ConfigError: there is none, it is not TOML, or something in it is wrong.
    """
    file = folder / "run.toml"
    if glob := sorted(set("[*?") & set(str(file.absolute()))):
        raise ConfigError(str(file), f"a folder with {glob[0]} in its name can hold no run: SQL would read others too")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(str(file), "there is no run here; `recap init DIR --source SRC` makes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), f"is not TOML: {error}") from error
    return parse(values, file=file.absolute())


def parse(values: Mapping[str, Any], *, file: Path) -> Run:
    """A run.toml already read; see `load`."""
    top = Section(values, file=file, field="")
    sections = [name for name in plugins.list_stages(values) if hasattr(plugins.load("stages", name), "Config")]
    top.check_keys(["seed", "max_error_share", "source", "engines", "slurm", *sections])
    if "source" not in values:
        raise top.error("source", "is missing; write [source] with a kind and a path")
    source = top.subsection("source")
    common = frozenset(f.name for f in dataclasses.fields(Corpus))
    engines = top.subsection("engines").subsections()
    return Run(
        file=file,
        folder=file.parent,
        num_cores=num_cores(),
        **dataclasses.asdict(top.select_keys(frozenset({"seed", "max_error_share"})).parse(TopLevel)),
        source=source.plugin("pipeline.sources", common=common),
        corpus=source.select_keys(common).parse(Corpus),
        engines={name: engine.plugin("pipeline.engines") for name, engine in engines.items()},
        sections={name: _sections(top, name) for name in sections},
        slurm=options.read_section(top.subsection("slurm")),
    )


def _sections(top: Section, stage: str) -> dict[str, Any]:
    module = plugins.load("stages", stage)
    read = getattr(module, "read_section", lambda section: section.parse(module.Config))
    if getattr(module, "NAMED", False):
        return {name: read(section) for name, section in top.subsection(stage).subsections().items()}
    return {"": read(top.subsection(stage))}
