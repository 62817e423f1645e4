"""JSON parsing and validation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.text import json_schema
from tests.support.texts import ANSWER_SCHEMA


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "cat", "names": ["Tom"], "thing": {"n": 0, "more": 1}, "share": None}, ""),
        ({"kind": "cow"}, "kind is 'cow', not one of cat, dog"),
        ({}, "'kind' is missing"),
        ({"kind": "cat", "size": 1}, "'size' is not allowed"),
        ({"kind": "cat", "names": ["Tom", ""]}, "names[1] is below its minLength of 1"),
        ({"kind": "cat", "names": ["Thomas"]}, "names[0] is above its maxLength of 4"),
        ({"kind": "cat", "names": ["a", "b", "c"]}, "names is above its maxItems of 2"),
        ({"kind": "cat", "names": "Tom"}, "names is not of type array"),
        ({"kind": "cat", "thing": {}}, "'n' is missing in thing"),
        ({"kind": "cat", "thing": {"n": True}}, "thing.n is not of type integer"),
        ({"kind": "cat", "thing": {"n": -1}}, "thing.n is below its minimum of 0"),
        ({"kind": "cat", "share": 2}, "share matches no alternative of anyOf"),
        ([], "the answer is not of type object"),
    ],
)
def test_violations_are_named(value: Any, message: str) -> None:
    assert json_schema.find_problem(value, ANSWER_SCHEMA) == message


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "properties": {"a": {"pattern": "x"}}}, "schema.properties.a: 'pattern' is not supported"),
        ({"type": "text"}, "'text' is not a type"),
        ({"type": "array", "items": {"anyOf": [{"not": {}}]}}, "schema.items.anyOf\\[0\\]: 'not' is not supported"),
        ([], "schema is not a table"),
    ],
)
def test_unsupported_schemas_are_rejected(schema: Any, message: str) -> None:
    json_schema.check_schema(ANSWER_SCHEMA)
    with pytest.raises(ValueError, match=message):
        json_schema.check_schema(schema)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
        max_leaves=10,
    )
)
def test_code_fences_are_removed(value: Any) -> None:
    text = json.dumps(value)
    assert json_schema.parse_json(text) == json_schema.parse_json(f"```json\n{text}\n```\n") == value


def test_strings_may_contain_raw_control_characters() -> None:
    assert json_schema.parse_json('{"reason": "a\tred\nring"}') == {"reason": "a\tred\nring"}


@pytest.mark.parametrize("text", ["", "{", "NaN", "[1,]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_invalid_json_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        json_schema.parse_json(text)


OBJECT = '{"kind": "cat", "names": ["{}"]}'


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        f"```json\n{OBJECT}\n```",
        f"```json\n{OBJECT}```",
        f"```json {OBJECT} ```",
        f"```{OBJECT}```",
        f"Here is the JSON:\n```json\n{OBJECT}\n```",
        f"```json\n{OBJECT}\n```\nLet me know if you need more.",
        f"Here it is: {OBJECT}",
        f"{OBJECT} I hope that it helps.",
    ],
)
def test_the_one_object_of_an_answer_is_found(text: str) -> None:
    assert json_schema.find_json(text) == OBJECT and json_schema.parse_json(text) == json.loads(OBJECT)


@pytest.mark.parametrize(
    "text",
    [f"{OBJECT} {OBJECT}", f"Words {{ and {OBJECT}", f"[{OBJECT}", OBJECT + "}", OBJECT[:-1], "{" * 100_000, "no"],
)
def test_anything_but_one_object_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        json_schema.parse_json(text)


@pytest.mark.parametrize("text", ['{"kind": "\\ud83d"}', '{"\\uDE00": 1}'])
def test_a_text_with_half_a_character_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="half a character"):
        json_schema.parse_json(text)


def test_values_nested_too_deeply_are_a_problem() -> None:
    value: list[Any] = []
    for _ in range(5_000):
        value = [value]
    assert json_schema.find_problem(value, {"type": "array"}) == "it is nested too deeply"
    with pytest.raises(ValueError, match="nested too deeply"):
        json_schema.parse_json("[" * 100_000)
