"""Spoiled copies of captions: each differs in the way of its kind, and nothing is changed that may stay true."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.audit.spoilers import KINDS, SpoiledText, load_words, spoil_text
from stages.text.sentences import split_sentences

CAPTION = (
    "A red car and a blue bicycle stand in front of a white house. Two dogs sit on the left. "
    'There is no cat. A sign reads "Fresh Bread".'
)
OTHER = "An old man plays the piano. Snow lies on the roof."


def spoil(text: str, *, seed: str = "0", other: str | None = OTHER) -> Mapping[str, SpoiledText]:
    return {copy.kind: copy for copy in spoil_text(text, seed=seed, other=other)}


def test_a_rich_caption_is_spoiled_in_every_way() -> None:
    copies = spoil(CAPTION)
    assert set(copies) == set(KINDS)
    assert all(copy.text != CAPTION and copy.change for copy in copies.values())
    assert len({copy.text for copy in copies.values()}) == len(copies)


@given(st.text(max_size=300), st.one_of(st.none(), st.text(max_size=100)))
@settings(deadline=None)
def test_any_text_has_copies_in_order_that_differ(text: str, other: str | None) -> None:
    copies = list(spoil_text(text, seed="s", other=other))
    assert [copy.kind for copy in copies] == sorted({copy.kind for copy in copies})
    assert all(copy.text != text for copy in copies)
    assert copies == list(spoil_text(text, seed="s", other=other))


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("attribute", "A red ball lies on a green table.", "A green ball lies on a red table."),
        ("attribute", "An orange cat sits by a blue chair.", "A blue cat sits by an orange chair."),
        ("number", "Only 2 boats are there.", None),
        ("side", "A lamp is to the left of a bed.", "A lamp is to the right of a bed."),
        ("side", "A boy stands behind a tree.", "A boy stands in front of a tree."),
        ("dropped", "It rains. It rains.", "It rains."),
        ("other_caption", "A dog.", OTHER),
    ],
)
def test_a_kind_changes_what_it_names(kind: str, before: str, after: str | None) -> None:
    copy = spoil(before)[kind]
    assert copy.text == after if after else copy.text != before


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("colour", "It is a black and white photograph."),
        ("colour", "An orange on a plate."),
        ("colour", "There is no red car."),
        ("colour", 'The sign says "red car".'),
        ("colour", "A red-haired woman walks."),
        ("number", "One of the boats is old."),
        ("number", "The photograph was taken in 1987 at 3:45."),
        ("number", "A two-story building."),
        ("object", "There isn't a dog."),
        ("side", "She left the room in the right mood."),
        ("quote", "It reads nothing."),
        ("dropped", "A single sentence."),
        ("attribute", "A red car stands beside a red house."),
    ],
)
def test_what_may_stay_true_is_left_alone(kind: str, text: str) -> None:
    assert all(kind not in spoil(text, seed=str(seed), other=None) for seed in range(20))


def test_articles_fit_the_new_word() -> None:
    texts = {spoil("It is a red apple.", seed=str(seed))["colour"].text for seed in range(60)}
    assert "It is an orange apple." in texts and "It is a blue apple." in texts
    fruit = {spoil("She eats an apple.", seed=str(seed))["object"].text for seed in range(60)}
    assert "She eats a banana." in fruit


def test_sentences_are_added_repeated_and_dropped_whole() -> None:
    own, foreign = split_sentences(CAPTION), split_sentences(OTHER)
    copies = {kind: split_sentences(copy.text) for kind, copy in spoil(CAPTION).items()}
    assert copies["foreign_first"][0] in foreign and copies["foreign_first"][1:] == own
    assert copies["foreign_last"][-1] in foreign and copies["foreign_last"][:-1] == own
    assert copies["foreign_middle"][0] == own[0] and set(copies["foreign_middle"][1:-1]) & set(foreign)
    assert len(copies["repeated"]) == len(own) + 1 and set(copies["repeated"]) == set(own)
    assert len(copies["dropped"]) == len(own) - 1 and set(copies["dropped"]) < set(own)
    assert copies["invented"][:-1] == own


def test_words_of_a_list_are_different_and_written_alike() -> None:
    words = load_words()
    assert all(word not in others and others for word, others in words.objects.items())
    assert all(words.sides[after] == before for before, after in words.sides.items())
    assert {"sheep", "knives", "dogs"} <= words.objects.keys()
