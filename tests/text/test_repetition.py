"""Detection of loops: in degenerate output, and not in human text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines._options import LOOP_DETECTION
from stages.text.repetition import find_lasting_loop, find_loop
from tests.support.texts import HEALTHY, LOOPS, MARKET_CAPTION


@pytest.mark.parametrize("name", HEALTHY)
def test_human_text_does_not_loop(name: str) -> None:
    assert find_loop(HEALTHY[name]) == ""


@pytest.mark.parametrize("name", LOOPS)
def test_degenerate_output_loops(name: str) -> None:
    assert find_loop(LOOPS[name]) != ""


phrases = st.lists(st.sampled_from([f"word{chr(97 + i)}" for i in range(26)]), min_size=1, max_size=12, unique=True)


@given(phrases, st.integers(0, 30))
def test_repeated_phrases_loop(phrase: list[str], before: int) -> None:
    repeated = " ".join(phrase * (40 // len(phrase) + 3))
    assert find_loop(f"{' '.join(MARKET_CAPTION.split()[:before])} {repeated}") != ""


@given(st.sampled_from(sorted({**LOOPS, **HEALTHY})), st.integers(0, 600), st.text())
def test_what_loops_before_its_end_loops_whatever_follows(name: str, length: int, rest: str) -> None:
    begun = {**LOOPS, **HEALTHY}[name][:length]
    assert not find_lasting_loop(begun) or find_loop(begun + rest)


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=5, max_size=31), st.integers(0, 3))
def test_an_answer_that_vllm_stops_loops_if_the_copied_tokens_have_five_words(words: list[str], cut: int) -> None:
    copies = f"{MARKET_CAPTION} {' '.join(words * LOOP_DETECTION['min_count'])}"
    assert find_lasting_loop(copies[: len(copies) - cut]) != ""


@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=300, unique=True))
def test_distinct_words_do_not_loop(letters: list[str]) -> None:
    assert find_loop(" ".join(letters)) == ""
