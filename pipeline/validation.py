"""Tables of TOML files, validated into frozen dataclasses; errors name the file, field, value and what is allowed.

A table's meaning belongs to the module that declares the dataclass.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from difflib import get_close_matches
from functools import cache, reduce
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pipeline import plugins
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.sections import Plugin, PluginChoice, ResolvedPath, endpoint_file, plain_value

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SECRET = re.compile(r"api_?key|(access|auth|hf)_?token|authorization|bearer|credential|passw|secret", re.IGNORECASE)
SIGNATURE = re.compile(  # names of URL parameters that grant access
    r".*(signature|token|authorization|credential|password|secret|key|keyid|key-pair-id)|sig|auth", re.IGNORECASE
)
SECRET_ADVICE = {  # where a secret belongs, by `locate` of the field
    "endpoint": "api_key_env names the environment variable that holds a key",
    "path": "fsspec takes it from the environment: AWS_ACCESS_KEY_ID and its like, FSSPEC_HTTPS, ~/.config/fsspec",
    "model": "HF_TOKEN in the environment opens models and data sets",
}


class Section:
    """A table of a TOML file; it knows its file and field, so that errors can name them."""

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
        """The section without all other keys."""
        return Section({k: v for k, v in self.values.items() if k in names}, file=self.file, field=self.field)

    def subsections(self) -> dict[str, Section]:
        """The tables in this one, by name.

        Raises:
            ConfigError: a value is not a table, or its name is not fit for a directory.
        """
        for name in self.values:
            if not NAME.fullmatch(name):
                raise self.error(name, f"a name has only letters, digits, _ and -, not {name!r}")
        return {name: self.subsection(name) for name in self.values}

    def parse(self, cls: type[T], *, ignore: frozenset[str] = frozenset()) -> T:
        """The section as a `cls`; keys in `ignore` are left to the caller.

        Raises:
            ConfigError: an unknown key, a missing one, or a value that is not allowed.
        """
        fields = dataclasses.fields(cast(Any, cls))
        self.check_keys([*(f.name for f in fields), *ignore])
        given = {f.name: self.values[f.name] for f in fields if f.name in self.values}
        if not given and not any(f.default is f.default_factory is MISSING for f in fields):
            return cast(T, self._build_dataclass(cls, {}))  # most sections are empty; a validator takes time to build
        from pydantic import ValidationError

        try:
            values = adapter_of(cast(Any, cls)).validate_python(given)
        except ValidationError as error:
            problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
            raise self._explain_problem(cls, problems[0]["type"], problems[0]["loc"]) from None
        return cast(T, self._build_dataclass(cls, values))

    def check_keys(self, known: list[str]) -> None:
        for name in self.values:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise self.error(name, f"unknown key; {hint}allowed: {', '.join(sorted(known))}")

    def plugin(self, choice: PluginChoice, *, common: frozenset[str] = frozenset()) -> Plugin:
        """The section as the `Config` of the plugin that it names; keys in `common` are left to the caller.

        Raises:
            ConfigError: the plugin is missing or unknown, or the rest does not fit it.
        """
        selector, package = choice.selector, choice.package
        name = self.values.get(selector, choice.default)
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

    def parse_with_plugin(self, cls: type[T], choice: PluginChoice) -> tuple[T, Plugin]:
        """The keys of `cls` as a `cls`, and all others as the `Config` of the plugin that one of them names.

        Raises:
            ConfigError: as `plugin` and `parse`.
        """
        common = frozenset(f.name for f in dataclasses.fields(cast(Any, cls)))
        plugin = self.plugin(choice, common=common)
        return self.select_keys(common).parse(cls), plugin

    def _explain_problem(self, cls: Any, problem: str, path: Sequence[int | str]) -> ConfigError:
        """The error for pydantic's `problem` with the value at `path`."""
        name = str(path[0])
        field, hint = next(f for f in dataclasses.fields(cls) if f.name == name), get_type_hints(cls)[name]
        if dataclasses.is_dataclass(hint) and path[1:]:
            inner = self.subsection(name)
            inner.check_keys([f.name for f in dataclasses.fields(hint)])
            return inner._explain_problem(hint, problem, path[1:])
        if problem == "missing":
            return self.error(name, f"is missing; it is {describe_type(hint)}: {field.metadata.get('help', '')}")
        reasons = {
            "greater_than_equal": f"is too small; the minimum is {field.metadata.get('least')}",
            "less_than_equal": f"is too large; the maximum is {field.metadata.get('most')}",
            "finite_number": "is not a finite number",
        }
        items = [one for one in get_args(hint) if one is not Ellipsis] if get_origin(hint) in (tuple, Mapping) else []
        if problem not in reasons and items and isinstance(self.values[name], list | dict) and path[1:]:
            return self.error(f"{name}.{path[1]}", f"{self.values[name][path[1]]!r} is not {describe_type(items[-1])}")
        value = self.values[name]
        listed = f'; write ["{value}"]' if isinstance(value, str) and get_origin(hint) is tuple else ""
        return self.error(name, f"{value!r} {reasons.get(problem, f'is not {describe_type(hint)}{listed}')}")

    def _build_dataclass(self, cls: Any, values: Mapping[str, Any]) -> Any:
        fields, hints = {f.name: f for f in dataclasses.fields(cls)}, get_type_hints(cls)
        given = {}
        for name, value in values.items():
            if dataclasses.is_dataclass(hints[name]):
                given[name] = self.subsection(name)._build_dataclass(hints[name], value)
                continue
            if hints[name] == dict[str, Any] and (secret := next(filter(SECRET.search, _list_keys(value)), "")):
                raise self.error(
                    f"{name}.{secret}", f"looks like a secret, and this table is recorded; {SECRET_ADVICE['endpoint']}"
                )
            given[name] = self._resolve_value(name, value, fields[name].metadata.get("locate"))
        try:
            return cls(**given)
        except ConfigError:
            raise
        except ValueError as error:
            raise self.error("", str(error)) from error

    def _resolve_value(self, name: str, value: Any, how: str | None) -> Any:
        if how is None or not value:  # an empty string means no path
            return value
        if isinstance(value, tuple):
            return tuple(self._resolve_value(name, one, how) for one in value)
        if secret := find_secret(value):
            raise self.error(
                name, f"its URL carries a secret ({secret}), which tables and logs would repeat; {SECRET_ADVICE[how]}"
            )
        if how == "endpoint":
            engine = self.field.rpartition(".")[2]
            return ResolvedPath(str(endpoint_file(self.file.parent, engine)) if value == "endpoint" else value, value)
        return ResolvedPath(_resolve_path(value, how, self.file.parent), value)


def find_secret(url: str) -> str:
    """The part of a URL that grants access to its reader, without the value; "" when there is none.

    >>> find_secret("https://me:sesame@host/a.tar"), find_secret("s3://bucket/a.tar?X-Amz-Signature=1f")
    ('a password', 'X-Amz-Signature')
    """
    if re.search(r"https?://[^/@\s]+@|://[^/@\s]*:[^/@\s]*@", url):
        return "a password"
    return next((name for name in re.findall(r"[?&]([^=&]+)=", url) if SIGNATURE.fullmatch(name)), "")


def read_toml(name: str, *, folder: str, run: Path | None) -> Section:
    """`<run>/<folder>/NAME.toml`, else the file of that name that ships in stages/.

    Raises:
        UnknownNameError: neither exists; the message lists the names that do.
        ConfigError: the file is not TOML.
    """
    file, found = Path(folder, f"{name}.toml"), plugins.find_toml(name, folder=folder, run=run)
    try:
        return Section(tomllib.loads(found.read_text(encoding="utf-8")), file=file, field="")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(file), f"is not TOML: {error}") from error


@cache
def adapter_of(cls: Any) -> TypeAdapter[dict[str, Any]]:
    """pydantic's validator of tables for a dataclass declared with `key`; it returns keyword arguments.

    It is strict, except that lists become tuples. Its `json_schema()` has the fields' help, bounds and defaults.
    """
    from pydantic import TypeAdapter

    return TypeAdapter(_typed_dict(cls))


def _typed_dict(cls: Any) -> Any:
    from typing import NotRequired

    from pydantic import ConfigDict, Field, with_config
    from typing_extensions import TypedDict

    hints, keys = get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        field = Field(
            description=f.metadata.get("help"),
            ge=f.metadata.get("least"),
            le=f.metadata.get("most"),
            json_schema_extra=None if default is MISSING or default is None else {"default": plain_value(default)},
        )
        hint: Any = Annotated[_adapt_type(hints[f.name]), field]
        keys[f.name] = hint if default is MISSING else NotRequired[hint]
    table: Any = TypedDict(cls.__name__, keys)  # type: ignore[misc]
    return with_config(ConfigDict(extra="forbid", strict=True))(table)


def _adapt_type(hint: Any) -> Any:
    """A type of a field as TOML has it: a dataclass is a table, a tuple is a list, a float is finite."""
    from pydantic import AllowInfNan, Strict

    if hint is float:
        return Annotated[float, AllowInfNan(False)]
    if dataclasses.is_dataclass(hint):
        return _typed_dict(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return reduce(operator.or_, map(_adapt_type, get_args(hint)))
    return Annotated[hint, Strict(False)] if get_origin(hint) is tuple else hint


def describe_type(hint: Any) -> str:
    """A type in plain words."""
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


def _list_keys(value: Any) -> Iterator[str]:
    """All keys in a value, at any depth."""
    for one in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from _list_keys(one)
    if isinstance(value, dict):
        yield from value


def _resolve_path(value: str, how: str, run: Path) -> str:
    if "://" in value or Path(value).is_absolute():
        return value
    if value.startswith("~"):
        return str(Path(value).expanduser())
    if how == "path":
        return str(run / value)
    shipped = Path(str(resources.files("stages"))) / "scenes" / "models"
    found = (place for place in (run / "models" / value, run / value, shipped / value) if place.is_dir())
    return str(next(found, value))
