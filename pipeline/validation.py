"""Tables of TOML files, validated into frozen dataclasses; errors name the file, field, value and what is allowed.

A table's meaning is known by the module whose dataclass it becomes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pipeline import plugins
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.sections import Plugin, ResolvedPath, endpoint_file

T = TypeVar("T")
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


class Section:
    """A table of run.toml with its place, so that what is wrong in it can be named."""

    def __init__(self, values: Mapping[str, Any], *, file: Path, field: str) -> None:
        self.values, self.file, self.field = values, file, field

    def error(self, name: str, message: str) -> ConfigError:
        field = ".".join(part for part in (self.field, name) if part)
        return ConfigError(f"{self.file}: {field}" if field else str(self.file), message)

    def subsection(self, name: str) -> Section:
        values = self.values.get(name, {})
        if not isinstance(values, dict):
            raise self.error(name, f"{values!r} is not a table; write [{name}]")
        return Section(values, file=self.file, field=f"{self.field}.{name}" if self.field else name)

    def select_keys(self, names: frozenset[str]) -> Section:
        """The part of the section that has these keys."""
        return Section({k: v for k, v in self.values.items() if k in names}, file=self.file, field=self.field)

    def subsections(self) -> dict[str, Section]:
        """The tables in this one, by name.

        Raises:
            ConfigError: something in it is no table, or its name could not be a folder's.
        """
        for name in self.values:
            if not NAME.fullmatch(name):
                raise self.error(name, f"a name has letters, digits, _ and - only, not {name!r}")
        return {name: self.subsection(name) for name in self.values}

    def parse(self, cls: type[T], *, ignore: frozenset[str] = frozenset()) -> T:
        """The section as a `cls`. Keys in `ignore` belong to somebody else.

        Raises:
            ConfigError: an unknown key, a missing one, or a value that is not allowed.
        """
        fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
        self.check_keys([*fields, *ignore])
        hints = get_type_hints(cls)
        given = {
            name: self._value(name, self.values[name], hints[name], fields[name].metadata)
            for name in fields
            if name in self.values
        }
        for name, f in fields.items():
            if name not in given and f.default is MISSING and f.default_factory is MISSING:
                raise self.error(name, f"is missing; it is {describe_type(hints[name])}: {f.metadata.get('help', '')}")
        try:
            return cls(**given)
        except ConfigError:
            raise
        except ValueError as error:
            raise self.error("", str(error)) from error

    def check_keys(self, known: list[str]) -> None:
        for name in self.values:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise self.error(name, f"unknown key; {hint}allowed: {', '.join(sorted(known))}")

    def plugin(
        self, package: str, *, common: frozenset[str] = frozenset(), selector: str = "kind", default: str | None = None
    ) -> Plugin:
        """The section as the `Config` of the plugin that it names; keys in `common` are left to the caller.

        Args:
            package: the plugins to choose from.
            selector: the key that names the plugin.
            default: the plugin of a section without that key; None: the key is required.

        Raises:
            ConfigError: the plugin is missing or unknown, or the rest does not fit it.
        """
        name = self.values.get(selector, default)
        if not isinstance(name, str):
            choices = ", ".join(plugins.list_names(package))
            raise self.error(selector, f"is missing; it is one of {choices}, or a module of your own with a dot")
        try:
            module = plugins.load(package, name)
        except UnknownNameError as error:
            raise self.error(selector, str(error)) from error
        if not hasattr(module, "Config"):
            raise self.error(selector, f"{name!r} is a module, but no plugin: it has no Config (see {package})")
        config = self.parse(module.Config, ignore=common | {selector})
        return Plugin(kind=name, module=module, config=config, selector=selector, where=f"{self.file}: {self.field}")

    def _value(self, name: str, value: Any, hint: Any, about: Mapping[str, Any]) -> Any:
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.subsection(name).parse(hint)
        result = _convert(value, hint)
        if result is _WRONG:
            raise self.error(name, f"{value!r} is not {describe_type(hint)}")
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
        if secret := find_secret(value):
            raise self.error(
                name, f"its URL carries a secret ({secret}), which tables and logs would repeat; {KEEP[how]}"
            )
        if how == "endpoint":
            engine = self.field.rpartition(".")[2]
            return ResolvedPath(str(endpoint_file(self.file.parent, engine)) if value == "endpoint" else value, value)
        return ResolvedPath(_locate(value, how, self.file.parent), value)


def find_secret(url: str) -> str:
    """What in a URL opens a door for whoever reads it, without its value; "" when there is nothing.

    >>> secret_in("https://me:sesame@host/a.tar"), secret_in("s3://bucket/a.tar?X-Amz-Signature=1f")
    ('a password', 'X-Amz-Signature')
    """
    if re.search(r"https?://[^/@\s]+@|://[^/@\s]*:[^/@\s]*@", url):
        return "a password"
    return next((name for name in re.findall(r"[?&]([^=&]+)=", url) if SIGNED.fullmatch(name)), "")


def describe_type(hint: Any) -> str:
    """A type in a user's words."""
    if isinstance(hint, type) and get_origin(hint) is None:
        names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a table"}
        return names.get(hint, f"a table with {', '.join(get_type_hints(hint))}")
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"a list, each {describe_type(args[0])}"
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return f"a table, each value {describe_type(args[1])}"
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
