"""German captions: every sentence of the grammar has one, it has the same claims, and nothing else is taken for one."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.scenes import draw_scene
from stages.scenes.claims import list_facts, parse_caption, write_caption
from stages.scenes.german import translate, translate_back
from stages.scenes.teachers import TEACHERS, caption_scene

scenes = st.builds(draw_scene, st.integers(0, 3), st.integers(0, 10_000))


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("There is a small red circle.", "Es gibt einen kleinen roten Kreis."),
        ("A striped orange heart.", "Ein gestreiftes orangefarbenes Herz."),
        ("The picture shows a large dotted white diamond.", "Das Bild zeigt eine große gepunktete weiße Raute."),
        ("An orange ring.", "Ein orangefarbener Ring."),
        ("There is one object.", "Es gibt ein Objekt."),
        ("One star.", "Ein Stern."),
        ("The picture has one star.", "Das Bild hat einen Stern."),
        ("There are three diamonds.", "Es gibt drei Rauten."),
        ("Two objects.", "Zwei Objekte."),
        ("All is on a pink background.", "Alles ist auf einem rosafarbenen Hintergrund."),
        ("A grey background.", "Ein grauer Hintergrund."),
        ("The background is teal.", "Der Hintergrund ist türkisfarben."),
        ("The red star is right of the blue diamond.", "Der rote Stern ist rechts von der blauen Raute."),
        ("The red diamond is around the blue star.", "Die rote Raute ist um den blauen Stern herum."),
        ("The green heart is touching the black ring.", "Das grüne Herz berührt den schwarzen Ring."),
        ("The red star is inside the white square.", "Der rote Stern ist in dem weißen Quadrat."),
    ],
)
def test_sentences_have_gender_case_and_endings(english: str, german: str) -> None:
    assert translate(english) == german
    assert translate_back(german) == english


@given(scene=scenes, seed=st.integers(0, 100))
def test_a_caption_comes_back_word_for_word(scene: object, seed: int) -> None:
    text = write_caption(list_facts(scene), Random(seed))  # type: ignore[arg-type]
    assert translate_back(translate(text)) == text


@given(index=st.integers(0, 10_000), name=st.sampled_from(list(TEACHERS)))
def test_every_sentence_of_a_teacher_can_be_said(index: int, name: str) -> None:
    text = caption_scene(name, draw_scene(2, index), 0)
    german = translate(text)
    assert not any(parse_caption(german).claims)
    assert parse_caption(translate_back(german)).claims == parse_caption(text).claims


@pytest.mark.parametrize(
    "wrong",
    [
        "Es gibt ein kleinen roten Kreis.",  # gender
        "Es gibt kleiner roter Kreis.",  # no article
        "Der rote Kreis ist links von die blaue Raute.",  # case
        "Es gibt einen roten kleinen Kreis.",  # order
        "Es gibt einen roten Hund.",
        "Es gibt einen roten Kreis und einen Stern.",
        "",
    ],
)
def test_what_is_no_german_of_this_world_stays(wrong: str) -> None:
    assert translate_back(wrong) == wrong
    assert not parse_caption(translate_back(wrong)).claims


def test_a_sentence_outside_the_grammar_is_named() -> None:
    with pytest.raises(ValueError, match=r"'There is a dog\.' is outside the grammar"):
        translate("A red circle. There is a dog.")
