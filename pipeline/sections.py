"""The sections of run.toml as frozen dataclasses, and `key`, which declares their fields.

Sections of stages and plugins are declared by the `Config` of their modules. pipeline/config.py reads the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

STAGES = ("ingest", "curate", "find", "caption", "rubric", "score", "canary", "filter", "export", "train")
OPTIONAL_STAGES = ("curate", "find", "canary")  # have no passes, and are not imported, without a section in run.toml
MAX_TASKS = 1000  # of a Slurm array, unless num_tasks says otherwise


class ResolvedPath(str):
    """A path or URL, resolved against run.toml or the files that ship; `given` is as the user wrote it."""

    given: str

    def __new__(cls, value: str, given: str) -> ResolvedPath:
        self = super().__new__(cls, value)
        self.given = given
        return self

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.given  # for libraries that copy their arguments


def key(
    default: Any = MISSING,
    help: str = "",
    *,
    stamp: bool | str = True,
    stamp_default: bool = True,
    shown: bool = True,
    in_init: bool = True,
    least: float | None = None,
    most: float | None = None,
    locate: str | None = None,
    factory: Any = MISSING,
) -> Any:
    """Declares a field of a section.

    Args:
        default: the value of a section without this key; a key without a default is required.
        help: one line that `recap init` and editors show.
        stamp: whether the value decides rows, and so belongs to the fingerprint; a string is its name there.
        stamp_default: whether the fingerprint has the default too; False for a key that was added after runs were made.
        shown: whether users see it; False for keys that only tests set.
        in_init: whether `recap init` writes it; False for keys that a first run does not need.
        least, most: bounds of a number, inclusive.
        locate: "path": relative to the directory of run.toml; "model": also in `<run>/models` or stages/scenes/models;
            "endpoint": a URL, or the word `endpoint` for the server that `recap serve` starts.
    """
    about: dict[str, Any] = {"help": help, "stamp": stamp, "stamp_default": stamp_default, "shown": shown}
    about["in_init"] = in_init
    about |= {"least": least, "most": most, "locate": locate}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def stamped(config: Any) -> dict[str, Any]:
    """The fields of a config that decide rows, as JSON values: its part of the fingerprint."""
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        name, value = f.metadata.get("stamp", True), getattr(config, f.name)
        if name and (f.metadata.get("stamp_default", True) or value != f.default):
            fields[f.name if name is True else name] = plain_value(value)
    return fields


def plain_value(value: Any) -> Any:
    """A value of a config as a JSON value, as in `stamped`."""
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
        """The present path of a planned file; for sources."""
        place = getattr(self.module, "place", None)
        return place(file, self.config) if place else file

    def is_in_place(self, piece: Any) -> bool:
        """True if the images of a piece stay where they are; for sources."""
        is_in_place = getattr(self.module, "is_in_place", None)
        return is_in_place(piece, self.config) if is_in_place else False


@dataclass(frozen=True, kw_only=True)
class TopLevel:
    seed: int = key(0, "the run's seed; every sample's seed is derived from it", least=0)
    max_error_share: float = key(
        0.2, "a shard fails when more than this share of its rows have failed, after the first 200", least=0, most=1
    )
    max_hours: float | None = key(
        None, "hours that all processes together may work; then the run stops with exit code 3", stamp=False, least=0
    )
    max_tokens: int | None = key(
        None, "tokens of prompts and answers together; then the run stops with exit code 3", stamp=False, least=0
    )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The keys of `[source]` that every kind has."""

    shard_size: int = key(
        1000,
        "images per shard, the unit of work; a tar is always one shard",
        stamp=False,
        least=1,
        most=10**6,
    )
    pack: bool = key(
        False,
        "copy all images into shards/; otherwise only those that cannot be read where they are: remote ones, and those"
        " in compressed tars and tables",
        stamp_default=False,
    )
    min_side: int = key(16, "pixels; smaller images get the status too_small", least=1)
    max_pixels: int = key(2**28, "width times height; larger images get too_large, undecoded", least=1)
    max_error_share: float | None = key(
        None, "a shard fails when more than this share of its images are unreadable", stamp=False, least=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources that a job requests: `[slurm]` for all stages, `[slurm.STAGE]` for one."""

    partition: str = key("", "empty: the cluster's default")
    account: str = key("", "the account to charge")
    qos: str = key("", "the quality of service")
    constraint: str = key("", "node features to require, e.g. a100")
    gpus: int = key(1, "GPUs per task that runs a model; other tasks get none", least=0)
    workers: int = key(1, "processes per task; each has its own shard, engine and GPUs", least=1)
    cpus: int = key(4, "CPU cores per task", least=1)
    memory: str = key("", "memory per task, e.g. 64G; empty: the partition's default")
    time: str = key("", "time limit in Slurm's notation: 04:00:00, 1-12:00:00; empty: the partition's default")
    max_running: int = key(0, "tasks of an array that may run at once; 0: no limit", least=0)
    directives: tuple[str, ...] = key((), "further sbatch options, e.g. --exclusive or --mail-type=FAIL")
    setup: tuple[str, ...] = key((), "shell lines to run before the command: module load, source, export")
    command: str = key("", "how to call recap on a node, e.g. apptainer exec --nv recap.sif recap; empty: this Python")


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The keys of `[slurm]` that hold for all stages."""

    num_tasks: int = key(0, f"tasks per array; 0: one per shard, at most {MAX_TASKS}", least=0, most=10**6)
    notice: int = key(300, "seconds before the time limit at which a task is signalled to stop", least=10)
    max_requeues: int = key(50, "how often a stopped task is requeued", least=0)
    serve: tuple[str, ...] = key((), "engines to serve in their own jobs (`recap serve`) while arrays use them")
    serve_host: str = key(
        "0.0.0.0", "the address that a served engine listens on; all but 127.0.0.1 require a key (api_key_env)"
    )
    serve_wait: int = key(3600, "seconds to wait for a served engine to be ready", least=1)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """`[slurm]`, validated."""

    settings: SlurmSettings
    resources: Mapping[str, Resources]  # by stage


@dataclass(frozen=True, kw_only=True)
class Run:
    """run.toml, validated. Relative paths are resolved against its directory; the tables may be in another one."""

    file: Path
    folder: Path  # of the tables
    num_cores: int  # that this process may use
    seed: int
    max_error_share: float  # [0, 1]
    max_hours: float | None = None
    max_tokens: int | None = None
    source: Plugin
    corpus: Corpus
    engines: Mapping[str, Plugin]
    sections: Mapping[str, Mapping[str, Any]]  # stage -> NAME -> its config; NAME is "" for stages without names
    slurm: SlurmConfig

    def resolve_error_share(self, override: float | None) -> float:
        """The `max_error_share` of a section, or else the run's."""
        return self.max_error_share if override is None else override


def endpoint_file(run: Path, engine: str) -> Path:
    """The file in which `recap serve` publishes an engine's URL while the server runs: {"base_url": ...}."""
    return run / "endpoints" / f"{engine}.json"
