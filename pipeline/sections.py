"""The sections of run.toml as frozen dataclasses, and `key`, which declares their fields.

How a file becomes them is known by pipeline/validation.py and pipeline/config.py; what a stage's or a plugin's section
holds, by the `Config` of its module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

STAGES = ("ingest", "caption", "rubric", "score", "filter", "export", "train")
MAX_TASKS = 1000  # of a Slurm array, unless num_tasks says otherwise


class ResolvedPath(str):
    """A path or URL, found beside run.toml or among what ships; `given` is what the user wrote."""

    given: str

    def __new__(cls, value: str, given: str) -> ResolvedPath:
        self = super().__new__(cls, value)
        self.given = given
        return self

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.given  # libraries copy the names that they are given


def key(
    default: Any = MISSING,
    help: str = "",
    *,
    stamp: bool | str = True,
    shown: bool = True,
    least: float | None = None,
    most: float | None = None,
    locate: str | None = None,
    factory: Any = MISSING,
) -> Any:
    """A field of a section.

    Args:
        default: its value when the section does not have it; without one it is required.
        help: one line that `recap init` writes above it.
        stamp: whether it decides rows. URLs, windows and time-outs do not.
        shown: whether `recap init` writes it; what only tests set it does not.
        least, most: bounds of a number, inclusive.
        locate: "path": relative to run.toml's folder; "model": also one of `<run>/models` or of stages/models;
            "endpoint": a URL, or the word for the file that `recap serve` writes.
    """
    about = {"help": help, "stamp": stamp, "shown": shown, "least": least, "most": most, "locate": locate}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def stamped(config: Any) -> dict[str, Any]:
    """The fields of a config that decide rows, as JSON values: its slice of the fingerprint."""
    names = {f.name: f.metadata.get("stamp", True) for f in dataclasses.fields(config)}
    return {
        field if name is True else name: plain_value(getattr(config, field)) for field, name in names.items() if name
    }


def plain_value(value: Any) -> Any:
    if isinstance(value, Plugin):
        return value.stamp
    if isinstance(value, ResolvedPath):
        return value.given
    if dataclasses.is_dataclass(value):
        return stamped(value)
    if isinstance(value, Mapping):
        return {k: plain_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(v) for v in value]
    return value


@dataclass(frozen=True, kw_only=True)
class PluginChoice:
    """The plugins that a section chooses from, and the key that names one."""

    package: str
    selector: str = "kind"
    default: str | None = None  # the plugin of a section without that key; None: the key is required


SOURCES = PluginChoice(package="pipeline.sources")
ENGINES = PluginChoice(package="pipeline.engines")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A section that names a plugin: the plugin's module, and its own part of the section."""

    kind: str
    module: ModuleType
    config: Any
    selector: str = "kind"  # the key that names the plugin
    where: str = ""  # its file and field, for errors that appear only when it is opened

    @property
    def stamp(self) -> dict[str, Any]:
        return {self.selector: self.kind, **stamped(self.config)}

    def place(self, file: str) -> str:
        """The present path of a planned file, where the plugin is a source."""
        place = getattr(self.module, "place", None)
        return place(file, self.config) if place else file


@dataclass(frozen=True, kw_only=True)
class TopLevel:
    seed: int = key(0, "from which every sample's own seed is drawn", least=0)
    max_error_share: float = key(
        0.2, "a shard fails when more of its rows than this have failed, after the first 200", least=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What `[source]` has, whatever its kind."""

    shard_size: int = key(
        1000,
        "images in a shard, the unit of work; a tar is always a shard of its own",
        stamp=False,
        least=1,
        most=10**6,
    )
    min_side: int = key(16, "pixels; smaller images get the status too_small", least=1)
    max_pixels: int = key(2**28, "width times height; larger images are refused undecoded, as too_large", least=1)
    max_error_share: float | None = key(None, "of images that cannot be read, in a shard", stamp=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for; `[slurm]` for all, `[slurm.STAGE]` for one stage's."""

    partition: str = key("", "empty: the cluster's default")
    account: str = key("", "who pays")
    qos: str = key("", "the quality of service")
    constraint: str = key("", "features that a node must have, e.g. a100")
    gpus: int = key(1, "GPUs of a task that runs a model; tasks that run none get none", least=0)
    workers: int = key(1, "processes of a task, each with a shard, an engine and GPUs of its own", least=1)
    cpus: int = key(4, "CPU cores of a task", least=1)
    memory: str = key("", "of a task, e.g. 64G; empty: the partition's default")
    time: str = key("", "the time limit, as Slurm writes it: 04:00:00, 1-12:00:00; empty: the partition's own")
    max_running: int = key(0, "tasks of an array that run at once; 0: as many as there is room for", least=0)
    directives: tuple[str, ...] = key((), "more options of sbatch, e.g. --exclusive or --mail-type=FAIL")
    setup: tuple[str, ...] = key((), "lines of shell before the command: module load, source, export")
    command: str = key("", "how recap is called there, e.g. apptainer exec --nv recap.sif recap; empty: this Python")


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The rest of `[slurm]`, which is the same for all stages."""

    num_tasks: int = key(0, f"tasks of an array; 0: one for each shard, but at most {MAX_TASKS}", least=0, most=10**6)
    notice: int = key(300, "seconds before the time limit at which a task is told to stop", least=10)
    max_requeues: int = key(50, "how often a task that was stopped goes back into the queue", least=0)
    serve: tuple[str, ...] = key((), "engines that a job of their own serves (`recap serve`) while arrays ask them")
    serve_host: str = key(
        "0.0.0.0", "the address that a served engine listens on; all but 127.0.0.1 demand a key (api_key_env)"
    )
    serve_wait: int = key(3600, "seconds that a task waits for a served engine to be ready", least=1)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """`[slurm]`, understood."""

    settings: SlurmSettings
    resources: Mapping[str, Resources]  # stage -> what its jobs ask for


@dataclass(frozen=True, kw_only=True)
class Run:
    """run.toml, understood. Relative names in it are looked up beside it; the tables may lie elsewhere."""

    file: Path
    folder: Path  # of the tables
    num_cores: int  # that this process may use
    seed: int
    max_error_share: float  # [0, 1]
    source: Plugin
    corpus: Corpus
    engines: Mapping[str, Plugin]
    sections: Mapping[str, Mapping[str, Any]]  # stage -> NAME -> that stage's config; NAME is "" where it has none
    slurm: SlurmConfig

    def resolve_error_share(self, override: float | None) -> float:
        """The `max_error_share` of a section, or else the run's."""
        return self.max_error_share if override is None else override


def endpoint_file(run: Path, engine: str) -> Path:
    """The file in which `recap serve` notes the server of an engine, while it runs: {"base_url": ...}."""
    return run / "endpoints" / f"{engine}.json"
