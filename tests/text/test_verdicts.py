"""Probabilities of verdicts from tokens of many cuts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import TokenChoice
from stages.text.verdicts import read_probabilities


def choose(written: str, chances: dict[str, float]) -> TokenChoice:
    return TokenChoice(text=written, logprobs={text: math.log(p) for text, p in chances.items()})


def certain(*texts: str) -> list[TokenChoice]:
    return [choose(text, {text: 1.0}) for text in texts]


def test_the_token_of_a_verdict_has_the_probabilities() -> None:
    tokens = [*certain('{"', "reason", '":', ' "A', " cat", '.",', ' "', "verdict", '":', ' "')]
    tokens += [choose("yes", {"yes": 0.6, "no": 0.2, "maybe": 0.2}), *certain('"}')]
    (found,) = read_probabilities(tokens, [["no", "yes"]])
    assert found == pytest.approx({"no": 0.25, "yes": 0.75})


@pytest.mark.parametrize("written", ["yes", "no"])
def test_a_token_may_hold_quotes_and_parts_of_verdicts(written: str) -> None:
    ends = {"yes": choose('es"}', {'es"}': 0.5, "es": 0.5}), "no": choose('o"}', {'o"}': 1.0})}
    first = choose(f' "{written[0]}', {' "y': 0.7, ' "n': 0.3})
    tokens = [*certain('{"verdict":'), first, ends[written]]
    (found,) = read_probabilities(tokens, [["no", "yes"]])
    assert found == pytest.approx({"no": 0.3, "yes": 0.7})


def test_verdicts_with_a_common_beginning_are_told_apart_later() -> None:
    names = ["mostly wrong", "mostly right", "none"]
    tokens = [
        *certain('{"verdict": "'),
        choose("mostly", {"mostly": 0.8, "none": 0.2}),
        choose(" right", {" right": 0.25, " wrong": 0.75}),
        *certain('"}'),
    ]
    (found,) = read_probabilities(tokens, [names])
    assert found == pytest.approx({"mostly wrong": 0.6, "mostly right": 0.2, "none": 0.2})


def test_a_verdict_that_begins_another_is_decided_by_the_quote_after_it() -> None:
    tokens = [*certain('{"verdict": "'), *certain("right"), choose('"}', {'"}': 0.9, " away": 0.1})]
    (found,) = read_probabilities(tokens, [["right", "right away"]])
    assert found == pytest.approx({"right": 0.9, "right away": 0.1})


def test_the_last_verdicts_count_and_those_quoted_in_reasons_do_not() -> None:
    thought = '<think>{"verdict": "no"}</think>'
    reason = json.dumps('it says {"verdict": "no"}')
    body = f'{thought}{{"a": {{"reason": {reason}, "verdict": "yes"}}, "b": {{"reason": "", "verdict": "no"}}}}'
    found = list(read_probabilities(certain(*body), [["no", "yes"], ["no", "yes"]]))
    assert found == [{"no": 0.0, "yes": 1.0}, {"no": 1.0, "yes": 0.0}]


@pytest.mark.parametrize("before", ["", '<think>it says "no": "no" or {"verdict": "no"}</think>'])
def test_a_bare_verdict_is_the_last_string(before: str) -> None:
    tokens = [*certain(*before, '"'), choose("yes", {"yes": 0.6, "no": 0.2, "maybe": 0.2}), *certain('"', "")]
    (found,) = read_probabilities(tokens, [["no", "yes"]], is_bare=True)
    assert found == pytest.approx({"no": 0.25, "yes": 0.75})
    (quoted,) = read_probabilities(certain(*json.dumps('it is "so"')), [['it is "so"', "not"]], is_bare=True)
    assert quoted == {'it is "so"': 1.0, "not": 0.0}


def test_what_is_not_found_is_none() -> None:
    assert list(read_probabilities(certain("yes"), [["no", "yes"]])) == [None]
    assert list(read_probabilities((), [["no", "yes"]])) == [None]
    odd = [*certain('{"verdict": "'), choose("yes", {"perhaps": 1.0}), *certain('"}')]
    assert list(read_probabilities(odd, [["no", "yes"]])) == [None]


@given(st.data(), st.lists(st.text("abc é", min_size=1).filter(str.strip), min_size=2, max_size=4))
def test_any_cut_of_a_certain_answer_finds_its_verdict(data: st.DataObject, names: Sequence[str]) -> None:
    squeezed = {"".join(name.split()): name for name in names}
    names = list(squeezed.values())
    written = data.draw(st.sampled_from(names))
    body = json.dumps({"reason": 'a "verdict": "', "verdict": written}, ensure_ascii=False)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1))))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    (found,) = read_probabilities(certain(*pieces), [names])
    assert found == {name: float(name == written) for name in names}
