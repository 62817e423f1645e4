"""The choice and shortening of texts: proportions, seeds, and cuts at the ends of sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.sentences import split_sentences
from stages.text.selection import (
    RAW,
    ExportText,
    TextConfig,
    choose_text,
    cut_text,
    draw,
    excerpt_text,
    sample_sentences,
)

KEYS = [f"{i:012d}" for i in range(10_000)]
WORDS = st.lists(st.sampled_from(["A red cat.", "It sits!", "Mr. B sees 3.5 m", "Is it?", "猫。", "\n"]), max_size=8)


def text(name: str, **changes: Any) -> ExportText:
    values: dict[str, Any] = {"text": f"{name}.", "caption_pass": name, "is_kept": name != RAW, "is_chosen": False}
    return ExportText(**{**values, "is_best": True, "is_top": False, **changes})


def count(text: str) -> int:
    """Tokens as CLIP counts them: two special ones around the words."""
    return len(text.split()) + 2


def shares(texts: list[ExportText], config: TextConfig, seed: int = 0) -> dict[str, float]:
    chosen = (choose_text(texts, config, seed=seed, key=key) for key in KEYS)
    return {name: num / len(KEYS) for name, num in Counter(one.caption_pass for one in chosen if one).items()}


def test_proportions_are_met_and_depend_on_the_seed_alone() -> None:
    config = TextConfig(texts={"dense": 0.6, "short": 0.2, RAW: 0.2})
    texts = [text("dense", is_chosen=True), text("short"), text(RAW), text("dense", is_best=False)]
    assert shares(texts, config) == pytest.approx({"dense": 0.6, "short": 0.2, RAW: 0.2}, abs=0.015)
    assert shares(texts, config) == shares(texts, config) != shares(texts, config, seed=1)


def test_weights_of_missing_texts_are_shared_among_the_others() -> None:
    config = TextConfig(texts={"dense": 6, "short": 2, RAW: 2})
    assert shares([text("dense"), text(RAW)], config) == pytest.approx({"dense": 0.75, RAW: 0.25}, abs=0.015)
    assert shares([text("other"), text(RAW)], config) == {RAW: 1}  # one of its captions was kept
    assert shares([text(RAW)], config) == shares([text("other")], config) == {}


def test_without_weights_the_filter_chooses() -> None:
    texts = [text("dense"), text("short", is_chosen=True)]
    assert shares(texts, TextConfig()) == shares(texts, TextConfig(texts="all")) == {"short": 1}


def test_alt_texts_of_the_top_share_come_first_and_need_no_caption() -> None:
    config = TextConfig(raw_top=0.3, raw_score="1")
    assert shares([text("dense", is_chosen=True), text(RAW, is_top=True)], config) == {RAW: 1}
    assert shares([text("dense", is_chosen=True), text(RAW)], config) == {"dense": 1}
    assert shares([text(RAW, is_top=True)], config) == {RAW: 1}


def test_captions_are_dropped_for_the_share_asked_for() -> None:
    config = TextConfig(drop=0.1, prefix={"dense": "A photo: "})
    texts = [excerpt_text(text("dense"), config, None, seed=3, key=key).text for key in KEYS]
    assert set(texts) == {"", "A photo: dense."}
    assert texts.count("") / len(KEYS) == pytest.approx(0.1, abs=0.01)


@pytest.mark.slow
def test_lengths_and_sentences_are_sampled_evenly() -> None:
    long = "One. Two. Three. Four."
    lengths, pairs = Counter[str](), Counter[str]()
    for key in KEYS:
        part = excerpt_text(text("a", text=long), TextConfig(random_length=True), None, seed=0, key=key).text
        assert long.startswith(part)
        lengths[part] += 1
        pairs[sample_sentences(long, 2, seed=0, key=key)] += 1
    assert len(lengths) == 4 and min(lengths.values()) > 0.23 * len(KEYS)
    assert len(pairs) == 6 and min(pairs.values()) > 0.15 * len(KEYS)
    assert all(pair.split() == [s for s in split_sentences(long) if s in pair.split()] for pair in pairs)


@given(WORDS, st.integers(3, 12), st.sampled_from(["", "An image of "]))
def test_cut_texts_fit_and_are_the_beginning_of_the_text(parts: list[str], most: int, prefix: str) -> None:
    long = " ".join(parts).strip()
    excerpt = cut_text(long, most, count, prefix=prefix)
    whole = count(prefix + long)
    assert excerpt.num_tokens == count(excerpt.text) <= max(most, 2)
    assert excerpt.cut == whole - excerpt.num_tokens
    assert (prefix + long).startswith(excerpt.text)
    assert (excerpt.cut == 0) == (whole <= most)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (9, "A cat. It sits on a mat."),
        (8, "A cat."),
        (4, "A cat."),
        (3, "A"),
    ],
)
def test_texts_are_cut_after_a_sentence_or_else_after_a_word(most: int, expected: str) -> None:
    assert cut_text("A cat. It sits on a mat.", most, count).text == expected


def test_a_text_without_blanks_is_cut_within_its_only_word() -> None:
    excerpt = cut_text("x" * 30, 12, lambda text: len(text) + 2)
    assert (excerpt.text, excerpt.num_tokens, excerpt.cut) == ("x" * 10, 12, 20)


def test_draws_are_even_and_depend_on_every_part() -> None:
    draws = [draw(0, key, "a") for key in KEYS]
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.01)
    assert draw(0, "1", "a") == draw(0, "1", "a")
    assert len({draw(0, "1", "a"), draw(1, "1", "a"), draw(0, "2", "a"), draw(0, "1", "b")}) == 4


@pytest.mark.parametrize(
    "changes",
    [{"texts": {"dense": 0.0}}, {"texts": {}}, {"texts": {"a": 2.0, "b": -1.0}}, {"raw_top": 0.3}, {"max_tokens": 77}],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}.*"):
        TextConfig(**changes)
