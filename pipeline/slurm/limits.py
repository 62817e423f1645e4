"""Limits of Slurm's partitions, compared with what a run's jobs request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from pipeline.config import parse_time_limit
from pipeline.sections import Resources, SlurmConfig, SlurmSettings
from pipeline.slurm.scheduler import run_command

FIELD = re.compile(r"(\w+)=(\S*)")


def is_configured(slurm: SlurmConfig) -> bool:
    """Tests whether run.toml sets any key of `[slurm]`."""
    return slurm.settings != SlurmSettings() or any(one != Resources() for one in slurm.resources.values())


def read_partitions() -> dict[str, Mapping[str, str]]:
    """Partition -> its fields, as `scontrol show partition` prints them.

    Raises:
        UserError, SlurmError: Slurm is not installed, or does not answer.
    """
    lines = run_command(["scontrol", "--oneliner", "show", "partition"]).splitlines()
    partitions = [dict(FIELD.findall(line)) for line in lines]
    return {fields["PartitionName"]: fields for fields in partitions if "PartitionName" in fields}


def find_excesses(slurm: SlurmConfig, stages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(key, message) for each request of these stages that their partition does not grant.

    Raises:
        UserError, SlurmError: Slurm is not installed, or does not answer.
    """
    partitions = read_partitions()
    found = (one for stage in stages for one in _compare(slurm.resources[stage], partitions))
    yield from dict.fromkeys(found)


def _compare(resources: Resources, partitions: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    name = resources.partition or next((n for n, one in partitions.items() if one.get("Default") == "YES"), "")
    if name not in partitions:
        known = ", ".join(sorted(partitions)) or "none"
        yield "partition", f"{name!r} does not exist; the cluster has {known}" if name else f"name one of {known}"
        return
    limits = partitions[name]
    if limits.get("State", "UP") != "UP":
        yield "partition", f"{name} is {limits['State']}; wait, or use another"
    longest, wanted = parse_time_limit(limits.get("MaxTime", "")), parse_time_limit(resources.time)
    if longest is not None and wanted is not None and wanted > longest:
        yield "time", f"{resources.time} is longer than {name} allows, MaxTime={limits['MaxTime']}"
    for field in ("MaxCPUsPerNode", "TotalCPUs"):
        if limits.get(field, "").isdigit() and resources.cpus > int(limits[field]):
            yield "cpus", f"{resources.cpus} are more than {name} has, {field}={limits[field]}"
            return
