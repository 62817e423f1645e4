"""The subset of JSON Schema that structured output uses: parsing, validation, and the check of a schema itself.

A schema with a keyword outside the subset is rejected when it is loaded, so that no requirement goes unchecked.
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
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$schema"})
_KEYWORDS = (
    "type enum const properties required additionalProperties items minItems maxItems minLength maxLength minimum"
    " maximum anyOf"
)
KEYWORDS = frozenset(_KEYWORDS.split())
SIZES = frozenset(word for word in KEYWORDS if word.startswith(("min", "max")))
_FENCE = re.compile(r"```[a-z]*\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)


def parse_json(text: str) -> Any:
    """The value of a JSON text, with or without a code fence or words around its one object.

    Strings may contain raw line breaks and tabs: models write them, and not every grammar forbids it.

    Raises:
        ValueError: the text is not JSON, or an object in it repeats a name; the message says what and where.
    """
    try:
        try:
            value = _DECODER.decode(strip_fence(text))
        except json.JSONDecodeError:
            value = _DECODER.decode(find_json(text))
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it holds half a character, a lone surrogate") from error
    return value


def find_json(text: str) -> str:
    """The JSON in a text: without the code fence around it, or the one object among words; else the whole text."""
    whole = strip_fence(text)
    start, end = whole.find("{"), whole.rfind("}") + 1
    if _is_json(whole) or not 0 <= start < end or set("[]") & {*whole[:start], *whole[end:]}:
        return whole
    return whole[start:end] if _is_json(whole[start:end]) else whole


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def strip_fence(text: str) -> str:
    """The text without the code fence around it, if it has one."""
    fenced = _FENCE.fullmatch(text.strip())
    return fenced[1].strip() if fenced else text.strip()


def find_problem(value: Any, schema: Mapping[str, Any]) -> str:
    """The first violation of the schema; "" when there is none."""
    try:
        return next(_find_problems(value, schema, ""), "")
    except RecursionError:
        return "it is nested too deeply"


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object with exactly these properties, generated in this order."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def check_schema(schema: Any, where: str = "schema") -> None:
    """
    Raises:
        ValueError: the schema has a keyword that is not supported.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{where} is not a table")
    if unknown := set(schema) - KEYWORDS - ANNOTATIONS:
        raise ValueError(f"{where}: {min(unknown)!r} is not supported; allowed: {', '.join(sorted(KEYWORDS))}")
    if "type" in schema and schema["type"] not in TYPES:
        raise ValueError(f"{where}: {schema['type']!r} is not a type; allowed: {', '.join(TYPES)}")
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{where}.properties.{name}")
    for i, part in enumerate(schema.get("anyOf", [])):
        check_schema(part, f"{where}.anyOf[{i}]")
    if "items" in schema:
        check_schema(schema["items"], f"{where}.items")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{repeated!r} occurs twice in one object")
    return value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_build_object, parse_constant=_reject_constant)


def _find_problems(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    place = where or "the answer"
    if "type" in schema and not _is_type(value, schema["type"]):
        yield f"{place} is not of type {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {value!r}, not one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema and value != schema["const"]:
        yield f"{place} is {value!r}, not {schema['const']!r}"
    if "anyOf" in schema and all(find_problem(value, part) for part in schema["anyOf"]):
        yield f"{place} matches no alternative of anyOf"
    yield from _find_size_problems(value, schema, place)
    if isinstance(value, dict):
        yield from _find_object_problems(value, schema, where)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _find_problems(item, schema.get("items", {}), f"{where}[{i}]")


def _is_type(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _find_size_problems(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    if not SIZES & schema.keys():
        return
    size = value if isinstance(value, int | float) else len(value) if isinstance(value, str | list) else None
    if size is None or isinstance(value, bool):
        return
    suffix = "Length" if isinstance(value, str) else "Items" if isinstance(value, list) else "imum"
    if size < schema.get(f"min{suffix}", size):
        yield f"{place} is below its min{suffix} of {schema[f'min{suffix}']}"
    if size > schema.get(f"max{suffix}", size):
        yield f"{place} is above its max{suffix} of {schema[f'max{suffix}']}"


def _find_object_problems(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    parts = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            yield f"{name!r} is missing{f' in {where}' if where else ''}"
    for name, item in value.items():
        if name in parts:
            yield from _find_problems(item, parts[name], f"{where}.{name}" if where else name)
        elif schema.get("additionalProperties") is False:
            yield f"{name!r} is not allowed{f' in {where}' if where else ''}"
