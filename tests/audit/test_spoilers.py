"""Spoiled copies of captions: each differs in the way of its kind, and nothing is changed that may stay true."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.sentences import split_sentences
from stages.audit.spoilers import KINDS, SpoiledText, spoil_text
from stages.audit.words import load_words

CAPTION = (
    "A red car and a blue bicycle stand in front of a white house. Two dogs sleep on the left. "
    'There is no cat. A sign reads "Fresh Bread".'
)
OTHER = "An old man plays the piano. Snow lies on the roof."


def spoil(text: str, *, seed: str = "0", other: str | None = OTHER) -> Mapping[str, SpoiledText]:
    return {copy.kind: copy for copy in spoil_text(text, seed=seed, other=other)}


def list_texts(kind: str, text: str, *, other: str | None = OTHER) -> set[str]:
    """All copies of a kind over 60 seeds."""
    copies = (spoil(text, seed=str(seed), other=other).get(kind) for seed in range(60))
    return {copy.text for copy in copies if copy}


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


@given(st.lists(st.sampled_from(sorted({*CAPTION.split(), "İnside", "ſix", "left", "right", '"', "\n"})), max_size=30))
@settings(deadline=None)
def test_any_order_of_words_can_be_spoiled(words: list[str]) -> None:
    assert all(copy.text and copy.change for copy in spoil_text(" ".join(words), seed="s", other=CAPTION))


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("attribute", "A red ball lies on a green table.", "A green ball lies on a red table."),
        ("attribute", "An orange cat sits by a blue chair.", "A blue cat sits by an orange chair."),
        (
            "attribute",
            "A red ball and a green box. The red ball shines.",
            "A green ball and a red box. The green ball shines.",
        ),
        ("side", "A lamp is to the left of a bed.", "A lamp is to the right of a bed."),
        ("side", "A boy stands behind a tree.", "A boy stands in front of a tree."),
        ("side", "A bed on the left, a lamp on the right.", "A bed on the right, a lamp on the left."),
        ("side", "It runs from the upper left to a door.", "It runs from the upper right to a door."),
        ("side", "The right-hand window is open.", "The left-hand window is open."),
        ("side", "Outside the door lies a mat.", "Inside the door lies a mat."),
        ("dropped", "It rains. It rains.", "It rains."),
        ("dropped", "A dog runs. It barks.", "A dog runs."),
        ("other_caption", "A dog.", OTHER),
    ],
)
def test_a_kind_changes_what_it_names(kind: str, before: str, after: str) -> None:
    assert after in list_texts(kind, before)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("colour", "It is a black and white photograph."),
        ("colour", "An orange on a plate."),
        ("colour", "Oranges, an orange and a lemon."),
        ("colour", "There is no red car."),
        ("colour", "It's perhaps a red car."),
        ("colour", "It isn’t a red car."),
        ("colour", 'The sign says "red car".'),
        ("colour", "A red-haired woman walks."),
        ("colour", "Members of the Red Cross, in the White House with a glass of red wine."),
        ("colour", "The deep red of its seeds."),
        ("number", "One of the boats is old."),
        ("number", "The photograph was taken in 1987 at 3:45."),
        ("number", "A two-story building."),
        ("number", "At least two boats, about five nets and two or more men."),
        ("number", "Two dogs lie there, one black and one white."),
        ("number", "Two dogs. Both are black."),
        ("number", "Four brushes: three thin ones and a broad one."),
        ("number", "It is ten past nine, and the pit is 5 m deep."),
        ("number", "The numerals 7, 8 and 9 are red."),
        ("number", "1. A dog. 2. A cat."),
        ("object", "There isn't a dog."),
        ("object", "A bus stop, a fire truck, a house wall and a birthday cake."),
        ("object", "A dog runs; the terrier is wet."),
        ("object", "A bed of gravel by a stream."),
        ("object", "Ten sheep graze."),
        ("side", "She left the room in the right mood."),
        ("side", "It would be the right title."),
        ("side", "Trees stand on the left and on the right."),
        ("side", "There is nothing on the left."),
        ("side", "The path runs to the left and then bends right."),
        ("side", "A lit lamp, seen from behind; the others are far behind."),
        ("side", "It is 2,000 m above sea level."),
        ("quote", "It reads nothing."),
        ("quote", '"Who is there?" the boy seems to ask.'),
        ("quote", 'It looks like the letter "M".'),
        ("dropped", "A single sentence."),
        ("dropped", "Things:\n- a dog.\n- a cat."),
        ("attribute", "A red car stands beside a red house."),
        ("attribute", "A red and white flag hangs there."),
        ("attribute", "A red ball lies on an orange table."),
        ("invented", "A cat and nothing else."),
        ("invented", "Things:\n- a cat\n- a dog"),
        ("repeated", "A caption without an end"),
    ],
)
def test_what_may_stay_true_or_read_wrong_is_left_alone(kind: str, text: str) -> None:
    assert not list_texts(kind, text, other=None)


@pytest.mark.parametrize(
    "other",
    [
        "It stands there. They sing a song. Behind it, trumpets shine. Both wear long dresses.",
        "There are no trumpets. Perhaps trumpets and violins can be heard.",
        "The background is blurred. Black-and-white photograph. A dark picture, sharp in the middle.",
        "A woman plays the trumpet (Prof. I. Novak plays the violin",
        "The sky is blue, and the dog is asleep.",
    ],
)
def test_sentences_that_need_others_or_may_be_true_are_not_inserted(other: str) -> None:
    text = "A dog sleeps under a blue sky. Leaves cover the ground."
    assert not any(list_texts(f"foreign_{place}", text, other=other) for place in ("first", "middle", "last"))


def test_no_sentence_comes_between_one_and_what_refers_to_it() -> None:
    assert not list_texts("foreign_middle", "A dog runs. Its tail is long.")
    assert list_texts("foreign_middle", "A dog runs. The sea is calm.")


def test_articles_fit_the_new_word() -> None:
    assert {"It is an orange apple.", "It is a purple apple."} <= list_texts("colour", "It is a green apple.")
    assert "She eats a banana." in list_texts("object", "She eats an apple.")
    assert "An elephant runs." in list_texts("object", "A dog runs.")


def test_shades_fit_the_new_colour() -> None:
    texts = list_texts("colour", "A pale blue wall.")
    assert "A pale yellow wall." in texts and not texts & {"A pale white wall.", "A pale brown wall."}


def test_similar_colours_are_not_exchanged() -> None:
    assert not {"A brown cup.", "An orange cup.", "A pink cup."} & list_texts("colour", "A red cup.")


def test_a_thing_changes_wherever_it_is_named() -> None:
    texts = list_texts("object", "Two dogs run. The dog in front barks, and the dogs are wet.")
    assert texts and not any("dog" in text for text in texts)
    assert all(text.count(text.split()[1]) >= 2 for text in texts)
    assert list_texts("colour", "A red hat. The red hat is new.") >= {"A blue hat. The blue hat is new."}


def test_quotes_become_whole_texts_written_alike() -> None:
    texts = list_texts("quote", 'Signs read "DO NOT FEED THE DUCKS" there.')
    assert 'Signs read "WET PAINT" there.' in texts
    assert 'A sign says "Wet paint."' in list_texts("quote", 'A sign says "Mind your head."')
    assert "The word “Hotel” is written there." in list_texts("quote", "The word “Sale” is written there.")


def test_names_of_common_clothes_are_never_chosen() -> None:
    assert not any("shirt" in text for text in list_texts("object", "A man in a hat."))


def test_sentences_are_added_repeated_and_dropped_whole() -> None:
    own, foreign = split_sentences(CAPTION), split_sentences(OTHER)
    copies = {kind: split_sentences(copy.text) for kind, copy in spoil(CAPTION).items()}
    assert copies["foreign_first"][0] in foreign and copies["foreign_first"][1:] == own
    assert copies["foreign_last"][-1] in foreign and copies["foreign_last"][:-1] == own
    assert copies["foreign_middle"][0] == own[0] and set(copies["foreign_middle"][1:-1]) & set(foreign)
    assert len(copies["repeated"]) == len(own) + 1 and set(copies["repeated"]) == set(own)
    assert len(copies["dropped"]) == len(own) - 1 and set(copies["dropped"]) < set(own)
    assert copies["invented"][:-1] == own


def test_line_breaks_stay() -> None:
    text = "A dog runs.\n\nThe sea is calm. Gulls circle."
    copies = spoil(text)
    assert all("\n\n" in copies[kind].text for kind in ("repeated", "foreign_first", "foreign_last", "invented"))


def test_words_of_a_list_are_different_and_of_one_number() -> None:
    words = load_words()
    assert all(word not in others and others for word, others in words.objects.items())
    assert all(axis.opposites[after] == before for axis in words.axes for before, after in axis.opposites.items())
    assert all(colour not in far and set(far) <= words.colours.keys() for colour, far in words.colours.items())
    assert {"sheep", "knives", "dogs"} <= set(words.plurals.values())
    assert words.also_called.keys() <= words.objects.keys()
