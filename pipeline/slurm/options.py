"""`[slurm]` of run.toml: keys for all stages, and keys of single stages."""

from __future__ import annotations

import re
from dataclasses import fields

from pipeline.sections import STAGES, Resources, SlurmConfig, SlurmSettings
from pipeline.validation import Section

JOB_KINDS = (*STAGES, "server")  # each may have a table of its own


def read_section(section: Section) -> SlurmConfig:
    """
    Raises:
        ConfigError: a key or a stage is unknown, or a time limit is not longer than the notice.
    """
    section.check_keys([*JOB_KINDS, *(f.name for cls in (SlurmSettings, Resources) for f in fields(cls))])
    settings = section.select_keys(frozenset(f.name for f in fields(SlurmSettings))).parse(SlurmSettings)
    common = section.select_keys(frozenset(f.name for f in fields(Resources)))
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
    """A time limit as Slurm writes it; None when it is none.

    >>> seconds("90"), seconds("04:00:00"), seconds("1-12")
    (5400, 14400, 129600)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        return None
    days, a, b, c = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    return a * 60 + b
