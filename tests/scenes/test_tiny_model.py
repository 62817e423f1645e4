"""The small model's tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.scenes import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_model.create_processor().tokenizer


@given(st.text(max_size=60))
def test_the_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_the_scenes_world_are_single_tokens(tokenizer: Any) -> None:
    text = '{"reason": "no small dotted purple triangle", "verdict": "yes"}'
    assert len(tokenizer(text).input_ids) <= 9
