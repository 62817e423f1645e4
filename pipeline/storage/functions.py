"""SQL functions for the sentences of a caption, beside DuckDB's own.

`sentences(text)` lists them. `refused(text, criteria)` lists those that a judge of sentences refuses, each as
{sentence, reason}, and `without_refused(text, criteria)` is the text without them. `criteria` is the column
SCORE_criteria; a sentence is refused where a criterion's value is less than 0.5, or than `below := 0.7`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.storage.sentences import split_sentences

if TYPE_CHECKING:
    import duckdb

NAMES = frozenset({"sentences", "refused", "without_refused"})
NUMBER = r"nullif(regexp_extract(one.id, '/(\d+)$', 1), '')::BIGINT"  # of the sentence, from 1
REFUSED = f"[one FOR one IN criteria IF one.value < below AND {NUMBER} <= len(sentences(text))]"
MACROS = f"""
    CREATE MACRO refused(text, criteria, below := 0.5) AS
        [struct_pack(sentence := sentences(text)[{NUMBER}], reason := one.reason) FOR one IN {REFUSED}];
    CREATE MACRO without_refused(text, criteria, below := 0.5) AS
        coalesce(drop_sentences(text, [{NUMBER} FOR one IN {REFUSED}]), text);"""


def define_functions(duck: duckdb.DuckDBPyConnection) -> None:
    """Defines them on a connection; the first in a process takes a tenth of a second."""
    duck.execute("SELECT 1").fetchall()  # none can be defined beside a result that was not fetched to its end
    duck.create_function("sentences", split_sentences, ["VARCHAR"], "VARCHAR[]")
    duck.create_function("drop_sentences", drop_sentences, ["VARCHAR", "BIGINT[]"], "VARCHAR")
    duck.execute(MACROS)


def drop_sentences(text: str, numbers: Sequence[int]) -> str:
    """A text without some of its sentences, counted from 1; the white space between the others stays.

    >>> drop_sentences("A cat. A dog.\\nA cow. A hen.", [2, 3])
    'A cat.\\nA hen.'
    """
    kept, gap, end = "", "", 0
    for number, sentence in enumerate(split_sentences(text), start=1):
        start = text.index(sentence, end)
        gap = max(gap, text[end:start], key=lambda one: (one.count("\n"), len(one)))  # between paragraphs a break stays
        end = start + len(sentence)
        if number not in numbers:
            kept, gap = f"{kept}{gap if kept else ''}{sentence}", ""
    return kept
