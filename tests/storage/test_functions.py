"""SQL functions for the sentences of a caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import database
from pipeline.storage.functions import drop_sentences
from pipeline.storage.sentences import split_sentences

TEXT = 'A cat.  It reads "Stop. Go."\n\nA dog on p. 4.\nA cow.'
CRITERIA = """[
    {id: 'holds/2', value: 0.2, reason: 'no sign'}, {id: 'holds/3', value: NULL, reason: NULL},
    {id: 'holds/1', value: 0.6, reason: NULL}, {id: 'whole', value: 0.0, reason: 'not of a sentence'}]"""
texts = st.lists(st.sampled_from(["A cat.", "St. Mary!", "3.5 m", " ", "\n", "“Stop. Go.” ", "e.g. x?"])).map(" ".join)


def query(folder: Path, sql: str) -> Any:
    with database.connect(folder) as connection:
        ((value,),) = database.query_rows(connection, f"SELECT {sql}")
        return value


def test_sentences_are_those_that_a_judge_is_asked_about(tmp_path: Path) -> None:
    sql = database.quote_literal(TEXT)
    assert query(tmp_path, f"sentences({sql})") == split_sentences(TEXT)
    assert query(tmp_path, "sentences(NULL)") is None


def test_refused_sentences_come_with_reasons(tmp_path: Path) -> None:
    arguments = f"{database.quote_literal(TEXT)}, {CRITERIA}"
    sign = {"sentence": split_sentences(TEXT)[1], "reason": "no sign"}
    assert query(tmp_path, f"refused({arguments})") == [sign]
    assert query(tmp_path, f"refused({arguments}, below := 0.7)") == [sign, {"sentence": "A cat.", "reason": None}]
    assert query(tmp_path, f"refused({arguments}, below := 0.1)") == []


def test_a_text_loses_what_is_refused_and_keeps_its_paragraphs(tmp_path: Path) -> None:
    text = database.quote_literal(TEXT)
    assert query(tmp_path, f"without_refused({text}, {CRITERIA})") == "A cat.\n\nA dog on p. 4.\nA cow."
    assert query(tmp_path, f"without_refused({text}, {CRITERIA}, below := 0.7)") == "A dog on p. 4.\nA cow."
    assert query(tmp_path, f"without_refused({text}, NULL)") == TEXT  # not judged
    assert query(tmp_path, f"without_refused({text}, [{{id: 'holds/9', value: 0.0, reason: ''}}])") == TEXT


@given(texts, st.sets(st.integers(1, 8)))
def test_what_is_not_dropped_stays_in_order(text: str, numbers: set[int]) -> None:
    kept = [one for number, one in enumerate(split_sentences(text), start=1) if number not in numbers]
    rest = drop_sentences(text, [*numbers])
    assert "".join(rest.split()) == "".join("".join(kept).split())
    for sentence in kept:
        start = rest.index(sentence)
        rest = rest[start + len(sentence) :]


@given(texts)
def test_dropping_nothing_changes_nothing_but_the_ends(text: str) -> None:
    assert drop_sentences(text, []) == text.strip()
