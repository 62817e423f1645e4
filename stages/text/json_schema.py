"""Decides whether a value follows a JSON schema: the part of JSON Schema that structured output is asked with.

A schema that says more than is checked here is refused when it is read, so that nothing asked goes unchecked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
NOTES = frozenset({"title", "description", "default", "examples", "$schema"})
_CHECKED = (
    "type enum const properties required additionalProperties items minItems maxItems minLength maxLength minimum"
    " maximum anyOf"
)
CHECKED = frozenset(_CHECKED.split())
_FENCED = re.compile(r"```[a-z]*\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)


def parse_json(text: str) -> Any:
    """The value of a JSON text, which may stand in a code fence.

    Its strings may have line breaks and tabs as they are: models write them so, and not every grammar forbids it.

    Raises:
        ValueError: it is none, or an object in it has a name twice; the message says what and where.
    """
    try:
        return json.loads(strip_fence(text), strict=False, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def strip_fence(text: str) -> str:
    """The text without the code fence around it, if it has one."""
    found = _FENCED.fullmatch(text.strip())
    return found[1].strip() if found else text.strip()


def find_problem(value: Any, schema: Mapping[str, Any]) -> str:
    """What is wrong with a value in the schema's eyes; "" when nothing is."""
    return next(_problems(value, schema, ""), "")


def check_schema(schema: Any, where: str = "schema") -> None:
    """
    Raises:
        ValueError: the schema has a word that is not checked here.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{where} is no table")
    if unknown := set(schema) - CHECKED - NOTES:
        raise ValueError(f"{where}: {min(unknown)!r} is not understood; allowed: {', '.join(sorted(CHECKED))}")
    if "type" in schema and schema["type"] not in TYPES:
        raise ValueError(f"{where}: {schema['type']!r} is no type; there are {', '.join(TYPES)}")
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{where}.properties.{name}")
    for i, part in enumerate(schema.get("anyOf", [])):
        check_schema(part, f"{where}.anyOf[{i}]")
    if "items" in schema:
        check_schema(schema["items"], f"{where}.items")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} stands twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _problems(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    place = where or "the answer"
    if "type" in schema and not _is_type(value, schema["type"]):
        yield f"{place} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {value!r}, which is none of {', '.join(map(str, schema['enum']))}"
    if "const" in schema and value != schema["const"]:
        yield f"{place} is {value!r}, not {schema['const']!r}"
    if "anyOf" in schema and all(find_problem(value, part) for part in schema["anyOf"]):
        yield f"{place} is none of the forms allowed"
    yield from _size_problems(value, schema, place)
    if isinstance(value, dict):
        yield from _object_problems(value, schema, where)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _problems(item, schema.get("items", {}), f"{where}[{i}]")


def _is_type(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _size_problems(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    size = value if isinstance(value, int | float) else len(value) if isinstance(value, str | list) else None
    if size is None or isinstance(value, bool):
        return
    what = "Length" if isinstance(value, str) else "Items" if isinstance(value, list) else "imum"
    if size < schema.get(f"min{what}", size):
        yield f"{place} is below its min{what} of {schema[f'min{what}']}"
    if size > schema.get(f"max{what}", size):
        yield f"{place} is above its max{what} of {schema[f'max{what}']}"


def _object_problems(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    parts = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            yield f"{name!r} is missing{f' in {where}' if where else ''}"
    for name, item in value.items():
        if name in parts:
            yield from _problems(item, parts[name], f"{where}.{name}" if where else name)
        elif schema.get("additionalProperties") is False:
            yield f"{name!r} was not asked for{f' in {where}' if where else ''}"
