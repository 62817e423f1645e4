"""Decides how run.toml is read: strictly, into frozen dataclasses, with errors naming file, field, value, choices.

It knows sections and types; what a section means is known by the module whose `Config` it is. A field is declared
with `key`, which also says what `recap init` writes beside it and whether it decides rows (`stamp`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pipeline import plugins
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.machine import num_cores

if TYPE_CHECKING:
    from pipeline.slurm import script

T = TypeVar("T")
STAGES = ("ingest", "caption", "rubric", "score", "filter", "export", "train")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SECRET = re.compile(r"api_?key|(access|auth|hf)_?token|authorization|bearer|credential|passw|secret", re.IGNORECASE)
SIGNED = re.compile(  # how the parameters of a URL are called that sign it
    r".*(signature|token|authorization|credential|password|secret|key|keyid|key-pair-id)|sig|auth", re.IGNORECASE
)
KEEP = {  # where a secret belongs, by what it opens
    "endpoint": "api_key_env names the environment variable that holds a key",
    "path": "fsspec takes it from the environment: AWS_ACCESS_KEY_ID and its like, FSSPEC_HTTPS, ~/.config/fsspec",
    "model": "HF_TOKEN in the environment opens models and data sets",
}


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
    stamp: bool = True,
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


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A section with a `kind`: the module that the kind names, and its part of the section."""

    kind: str
    module: ModuleType
    config: Any
    where: str = ""  # its file and field, for what only opening it finds wrong

    @property
    def stamp(self) -> dict[str, Any]:
        return {"kind": self.kind, **stamped(self.config)}

    def place(self, file: str) -> str:
        """Of a source: where a file of the plan lies now."""
        place = getattr(self.module, "place", None)
        return place(file, self.config) if place else file


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
    slurm: script.Config


class Section:
    """A table of run.toml with its place, so that what is wrong in it can be named."""

    def __init__(self, values: Mapping[str, Any], *, file: Path, field: str) -> None:
        self.values, self.file, self.field = values, file, field

    def error(self, name: str, message: str) -> ConfigError:
        field = ".".join(part for part in (self.field, name) if part)
        return ConfigError(f"{self.file}: {field}" if field else str(self.file), message)

    def sub(self, name: str) -> Section:
        values = self.values.get(name, {})
        if not isinstance(values, dict):
            raise self.error(name, f"{values!r} is not a table; write [{name}]")
        return Section(values, file=self.file, field=f"{self.field}.{name}" if self.field else name)

    def only(self, names: frozenset[str]) -> Section:
        """The part of the section that has these keys."""
        return Section({k: v for k, v in self.values.items() if k in names}, file=self.file, field=self.field)

    def named(self) -> dict[str, Section]:
        """The tables in this one, by name.

        Raises:
            ConfigError: something in it is no table, or its name could not be a folder's.
        """
        for name in self.values:
            if not NAME.fullmatch(name):
                raise self.error(name, f"a name has letters, digits, _ and - only, not {name!r}")
        return {name: self.sub(name) for name in self.values}

    def parse(self, cls: type[T], *, ignore: frozenset[str] = frozenset()) -> T:
        """The section as a `cls`. Keys in `ignore` belong to somebody else.

        Raises:
            ConfigError: an unknown key, a missing one, or a value that is not allowed.
        """
        fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
        self.refuse_unknown([*fields, *ignore])
        hints = get_type_hints(cls)
        given = {
            name: self._value(name, self.values[name], hints[name], fields[name].metadata)
            for name in fields
            if name in self.values
        }
        for name, f in fields.items():
            if name not in given and f.default is MISSING and f.default_factory is MISSING:
                raise self.error(name, f"is missing; it is {describe(hints[name])}: {f.metadata.get('help', '')}")
        try:
            return cls(**given)
        except ConfigError:
            raise
        except ValueError as error:
            raise self.error("", str(error)) from error

    def refuse_unknown(self, known: list[str]) -> None:
        for name in self.values:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise self.error(name, f"unknown key; {hint}allowed: {', '.join(sorted(known))}")

    def plugin(self, package: str, *, common: frozenset[str] = frozenset()) -> Plugin:
        """The section as its kind's `Config`; keys in `common` are left to the caller.

        Raises:
            ConfigError: the kind is missing or unknown, or the rest does not fit it.
        """
        kind = self.values.get("kind")
        choices = ", ".join(plugins.available(package))
        if not isinstance(kind, str):
            raise self.error("kind", f"is missing; it is one of {choices}, or a module of your own with a dot")
        try:
            module = plugins.load(package, kind)
        except UnknownNameError as error:
            raise self.error("kind", str(error)) from error
        if not hasattr(module, "Config"):
            raise self.error("kind", f"{kind!r} is a module, but no plugin: it has no Config (see {package})")
        found = self.parse(module.Config, ignore=common | {"kind"})
        return Plugin(kind=kind, module=module, config=found, where=f"{self.file}: {self.field}")

    def _value(self, name: str, value: Any, hint: Any, about: Mapping[str, Any]) -> Any:
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.sub(name).parse(hint)
        result = _convert(value, hint)
        if result is _WRONG:
            raise self.error(name, f"{value!r} is not {describe(hint)}")
        if hint == dict[str, Any] and (secret := next(filter(SECRET.search, _names(result)), "")):
            raise self.error(
                f"{name}.{secret}", f"looks like a secret, and all of this is recorded; {KEEP['endpoint']}"
            )
        if isinstance(result, float) and not math.isfinite(result):
            raise self.error(name, f"{value!r} is no finite number")
        least, most = about.get("least"), about.get("most")
        if least is not None and result is not None and result < least:
            raise self.error(name, f"{value!r} is too small; the least is {least}")
        if most is not None and result is not None and result > most:
            raise self.error(name, f"{value!r} is too large; the most is {most}")
        return self._located(name, result, about.get("locate"))

    def _located(self, name: str, value: Any, how: str | None) -> Any:
        if how is None or not value:  # nothing, or the empty string, means no place
            return value
        if isinstance(value, tuple):
            return tuple(self._located(name, one, how) for one in value)
        if secret := secret_in(value):
            raise self.error(
                name, f"its URL carries a secret ({secret}), which tables and logs would repeat; {KEEP[how]}"
            )
        if how == "endpoint":
            return ResolvedPath(self._endpoint(value), value)
        return ResolvedPath(_locate(value, how, self.file.parent), value)

    def _endpoint(self, value: str) -> str:
        """Of "endpoint", the file in which `recap serve` notes the URL of this section's server."""
        name = self.field.rpartition(".")[2]
        return str(endpoint(self.file.parent, name)) if value == "endpoint" else value


def secret_in(url: str) -> str:
    """What in a URL opens a door for whoever reads it, without its value; "" when there is nothing.

    >>> secret_in("https://me:sesame@host/a.tar"), secret_in("s3://bucket/a.tar?X-Amz-Signature=1f")
    ('a password', 'X-Amz-Signature')
    """
    if re.search(r"https?://[^/@\s]+@|://[^/@\s]*:[^/@\s]*@", url):
        return "a password"
    return next((name for name in re.findall(r"[?&]([^=&]+)=", url) if SIGNED.fullmatch(name)), "")


def endpoint(run: Path, engine: str) -> Path:
    """Where the server of an engine is to be found: {"base_url": ...}, while it runs."""
    return run / "endpoints" / f"{engine}.json"


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
    sections = [name for name in stages_of(values) if hasattr(plugins.load("stages", name), "Config")]
    top.refuse_unknown(["seed", "max_error_share", "source", "engines", "slurm", *sections])
    if "source" not in values:
        raise top.error("source", "is missing; write [source] with a kind and a path")
    source = top.sub("source")
    common = frozenset(f.name for f in dataclasses.fields(Corpus))
    return Run(
        file=file,
        folder=file.parent,
        num_cores=num_cores(),
        **dataclasses.asdict(top.only(frozenset({"seed", "max_error_share"})).parse(TopLevel)),
        source=source.plugin("pipeline.sources", common=common),
        corpus=source.only(common).parse(Corpus),
        engines={name: section.plugin("pipeline.engines") for name, section in top.sub("engines").named().items()},
        sections={name: _sections(top, name) for name in sections},
        slurm=plugins.load("pipeline.slurm", "script").read_section(top.sub("slurm")),
    )


@dataclass(frozen=True, kw_only=True)
class TopLevel:
    seed: int = key(0, "from which every sample's own seed is drawn", least=0)
    max_error_share: float = key(
        0.2, "a shard fails when more of its rows than this have failed, after the first 200", least=0, most=1
    )


def stages_of(sections: Iterable[str]) -> list[str]:
    """The stages that ship, in their usual order, and those of the user's own that have a section.

    No other module of stages/ is imported: `recap status` ought to be quick.
    """
    there = plugins.available("stages")
    own = [name for name in sections if name in there and name not in STAGES and _is_stage(name)]
    return [name for name in STAGES if name in there] + own


def _is_stage(name: str) -> bool:
    return hasattr(plugins.load("stages", name), "passes")


def _sections(top: Section, stage: str) -> dict[str, Any]:
    module = plugins.load("stages", stage)
    read = getattr(module, "read_section", lambda section: section.parse(module.Config))
    if getattr(module, "NAMED", False):
        return {name: read(section) for name, section in top.sub(stage).named().items()}
    return {"": read(top.sub(stage))}


def stamped(config: Any) -> dict[str, Any]:
    """The fields of a config that decide rows, as JSON values: its slice of the fingerprint."""
    return {
        f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.metadata.get("stamp", True)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Plugin):
        return value.stamp
    if isinstance(value, ResolvedPath):
        return value.given
    if dataclasses.is_dataclass(value):
        return stamped(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def describe(hint: Any) -> str:
    """A type in a user's words."""
    if isinstance(hint, type) and get_origin(hint) is None:
        names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a table"}
        return names.get(hint, f"a table with {', '.join(get_type_hints(hint))}")
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"a list, each {describe(args[0])}"
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return f"a table, each value {describe(args[1])}"
    return str(hint)


_WRONG = object()


def _names(value: Any) -> Iterator[str]:
    """Of all keys in a free table, however deep."""
    for one in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from _names(one)
    if isinstance(value, dict):
        yield from value


def _convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`, or `_WRONG`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return value if value in args and type(value) in {type(arg) for arg in args} else _WRONG
    if origin in (Union, types.UnionType):
        return next((r for arg in args if (r := _convert(value, arg)) is not _WRONG), _WRONG)
    if origin is tuple:
        items = [_convert(v, args[0]) for v in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if _WRONG in items else tuple(items)
    if origin is not None and isinstance(value, dict):
        entries = {k: _convert(v, args[1]) for k, v in value.items()}
        return _WRONG if _WRONG in entries.values() else entries
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else _WRONG


def _locate(value: str, how: str, run: Path) -> str:
    if "://" in value or Path(value).is_absolute():
        return value
    if value.startswith("~"):
        return str(Path(value).expanduser())
    if how == "path":
        return str(run / value)
    shipped = Path(str(resources.files("stages"))) / "models"
    found = (place for place in (run / "models" / value, run / value, shipped / value) if place.is_dir())
    return str(next(found, value))
