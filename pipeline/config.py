"""run.toml, read strictly into a `Run`.

The module of a stage knows the keys of its section.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.errors import ConfigError
from pipeline.machine import num_cores
from pipeline.sections import (
    ENGINES,
    OPTIONAL_STAGES,
    SOURCES,
    STAGES,
    Corpus,
    Plugin,
    Resources,
    Run,
    SlurmConfig,
    SlurmSettings,
    TopLevel,
    key,
    stamped,
)
from pipeline.validation import Section

__all__ = ["Corpus", "Plugin", "Run", "Section", "TopLevel", "key", "load", "parse", "stamped"]

JOB_KINDS = (*STAGES, "server")  # each may have a table of its own


def load(folder: Path) -> Run:
    """Reads `<folder>/run.toml`.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a key or value that is not allowed.
    """
    file = folder / "run.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            str(file), "there is no run here; name its folder with --run, or make one: `recap init DIR --source SRC`"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), f"is not TOML: {error}; texts, SQL among them, need quotes") from error
    except RecursionError as error:
        raise ConfigError(str(file), "is not TOML that can be read: its values are nested too deeply") from error
    return parse(values, file=file.absolute())


def parse(values: Mapping[str, Any], *, file: Path) -> Run:
    """The run of a run.toml whose TOML is parsed already; see `load`."""
    top = Section(values, file=file, field="")
    stages = [name for name in plugins.list_stages(values) if name in values or name not in OPTIONAL_STAGES]
    sections = [name for name in stages if hasattr(plugins.load("stages", name), "Config")]
    limits = frozenset(f.name for f in dataclasses.fields(TopLevel))
    top.check_keys([*sorted(limits), "source", "engines", "slurm", *{*sections, *OPTIONAL_STAGES}])
    if "source" not in values:
        raise top.error("source", "is missing; write [source] with a kind and a path")
    source = top.subsection("source")
    common = frozenset(f.name for f in dataclasses.fields(Corpus))
    engines = top.subsection("engines").subsections()
    return Run(
        file=file,
        folder=file.parent,
        num_cores=num_cores(),
        **dataclasses.asdict(top.select_keys(limits).parse(TopLevel)),
        source=source.plugin(SOURCES, common=common),
        corpus=source.select_keys(common).parse(Corpus),
        engines={name: engine.plugin(ENGINES) for name, engine in engines.items()},
        sections={name: {} for name in OPTIONAL_STAGES} | {name: _parse_stage(top, name) for name in sections},
        slurm=read_slurm(top.subsection("slurm")),
    )


def _parse_stage(top: Section, stage: str) -> dict[str, Any]:
    module = plugins.load("stages", stage)
    read = getattr(module, "read_section", lambda section: section.parse(module.Config))
    if getattr(module, "NAMED", False):
        return {name: read(section) for name, section in top.subsection(stage).subsections().items()}
    return {"": read(top.subsection(stage))}


def read_slurm(section: Section) -> SlurmConfig:
    """
    Raises:
        ConfigError: a key or a stage is unknown, or a time limit is not longer than the notice.
    """
    section.check_keys([*JOB_KINDS, *(f.name for cls in (SlurmSettings, Resources) for f in dataclasses.fields(cls))])
    settings = section.select_keys(frozenset(f.name for f in dataclasses.fields(SlurmSettings))).parse(SlurmSettings)
    common = section.select_keys(frozenset(f.name for f in dataclasses.fields(Resources)))
    resources = {}
    for stage in JOB_KINDS:
        own = section.subsection(stage)
        if stage == "server" and "workers" in own.values:
            raise own.error("workers", "a server has none; set replicas in [engines.NAME.serve]")
        merged = Section({**common.values, **own.values}, file=own.file, field=own.field)
        resources[stage] = merged.parse(Resources)
        limit = parse_time_limit(resources[stage].time)
        if resources[stage].time and limit is None:
            raise merged.error(
                "time", f"{resources[stage].time!r} is not a time limit; write 90, 04:00:00 or 1-12:00:00"
            )
        if limit is not None and limit <= settings.notice:
            raise merged.error("time", f"{resources[stage].time!r} must be longer than notice = {settings.notice} s")
    return SlurmConfig(settings=settings, resources=resources)


def parse_time_limit(limit: str) -> int | None:
    """Seconds of a time limit in Slurm's notation; None when it is not one.

    >>> parse_time_limit("90"), parse_time_limit("04:00:00"), parse_time_limit("1-12")
    (5400, 14400, 129600)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        return None
    days, a, b, c = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    return a * 60 + b
