"""Splitting of texts into sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.sentences import split_sentences

SPLIT_TEXTS = [
    "A cat sleeps.|A dog barks!|Is it raining?|Perhaps…",
    "The tower is 3.5 m high and 1.2 m wide.|Its top is red.",
    "Dr. Brown and Mr. Smith stand by St. Mary's Church.|They wave.",
    "Fruit, e.g. Apples and pears, lies on the table.|It costs approx. 5 euros.",
    "J. R. R. Tolkien is written on the cover.|The book is old.",
    "Fig. 3 shows a map of the U.S. 101 road.|No. 7 is circled.",
    'The sign reads "Stop. Go back." in red.|A car waits.',
    'The sign reads "STOP."|A car waits.',
    "The sign reads “Danger! Keep out.” and hangs low.|It is rusty.",
    'A 12" ruler lies on the desk.|A pen lies beside it.',
    'A label says "SALE.|50 % off on Mondays.',  # a quotation that is never closed protects nothing
    "The clock shows 10:30 a.m. and the shop is open.|Nobody is there.",
    "The street is crowded at 5 p.m.|People carry umbrellas, bags, etc.|One wears a hat.",
    "1. A red car is parked.\n2. A blue car drives by.".replace("\n", "|"),
    "- A red car\n- A blue car".replace("\n", "|"),
    "Wait... what is this?|It is a cat.",
    "He has vitamin C.|It is orange.".replace("|", " "),  # an initial as like as not
    "It was I.|Nobody else came.",
    "猫が眠る。|犬が吠える！|雨ですか？",
    "एक बिल्ली सो रही है।|क्या बारिश हो रही है?|हाँ।",
    "هل تمطر؟|تنام القطة.|نعم.",
    "بلی سو رہی ہے۔|کتا بھونکتا ہے۔",
    "The URL example.com/a.b is printed below.|It is small.",
    "Three (3) boats float.|(One is red.)|The sky is grey.",
    "One sentence without an end",
]


@pytest.mark.parametrize("text", SPLIT_TEXTS)
def test_texts_are_split_at_sentence_ends(text: str) -> None:
    parts = text.split("|")
    joint = "" if "猫" in text else "\n" if text[:2] in ("1.", "- ") else " "
    assert split_sentences(joint.join(parts)) == parts


@given(st.text(alphabet="ab A1.!?\"“”'()\n。 e.g.", max_size=60))
def test_splitting_drops_only_white_space(text: str) -> None:
    parts = split_sentences(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() and "\n" not in sentence for sentence in parts)
    assert len(parts) > 0 or not text.strip()
