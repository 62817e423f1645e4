"""Prompt templates and quoted text of unknown origin."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from stages.text.prompts import fence_text, fill_template, sanitise_text, truncate_text


@given(st.text(alphabet="`a \n{}<|", max_size=40))
def test_text_cannot_close_its_fence(text: str) -> None:
    first, *lines, last = fence_text(text).split("\n")
    assert first == last and set(first) == {"`"} and len(first) >= 3
    assert all(first not in line for line in lines)


@given(st.text(max_size=60))
def test_sanitised_text_has_no_control_characters_or_special_tokens(text: str) -> None:
    plain = sanitise_text(text)
    assert all(char == "\n" or unicodedata.category(char) != "Cc" for char in plain)
    assert "<|" not in plain and "</" not in plain and sanitise_text(plain) == plain


def test_long_text_is_cut_between_words() -> None:
    assert (
        truncate_text("a small grey cat", 10) == "a small …"
        and truncate_text("a small grey cat", 16) == "a small grey cat"
    )
    assert truncate_text("x" * 30, 10) == "x" * 10 + " …"
    assert len(fence_text("word " * 5000, limit=1000)) < 1020


def test_values_are_not_filled_again() -> None:
    assert fill_template("{alt_text} {}", {"alt_text": "{alt_text} {x}"}) == "{alt_text} {x} {}"
