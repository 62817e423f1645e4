"""The measure of captions by the truth: it cannot be raised by repeating, and a caption of the truth is perfect."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, draw_scene
from stages.scenes.claims import list_facts, write_caption
from stages.scenes.measure import measure_caption

NAMES = st.builds(
    lambda colour, shape: f"{colour} {shape}", st.sampled_from(list(COLOURS)), st.sampled_from(list(SHAPES))
)
DETAILS = st.tuples(st.sampled_from(["", *SIZES]), st.sampled_from(["", *TEXTURES]))
RELATIONS = st.sampled_from(["left of", "right of", "above", "below", "inside", "around", "touching"])
SENTENCES = st.one_of(
    st.builds(lambda details, name: " ".join(["A", *filter(None, details), name]) + ".", DETAILS, NAMES),
    st.builds(lambda a, word, b: f"The {a} is {word} the {b}.", NAMES, RELATIONS, NAMES),
    st.sampled_from(["Two objects.", "There are three objects.", "One circle.", "Two stars.", "A grey background."]),
    st.sampled_from(
        ["The background is pink.", "It is a lovely picture.", "There might be a red circle or a blue star."]
    ),
)
SCENES = st.integers(0, 400).map(lambda index: draw_scene(11, index))


@st.composite
def captions(draw: st.DrawFn) -> tuple[Scene, list[str]]:
    """A scene with sentences that are true of it, or not, in any order and number."""
    picture = draw(SCENES)
    true = write_caption(list_facts(picture), Random(draw(st.integers(0, 99)))).removesuffix(".").split(". ")
    some = draw(st.lists(st.one_of(st.sampled_from([f"{text}." for text in true]), SENTENCES), max_size=12))
    return picture, some


@given(captions(), SENTENCES, st.integers(0, 12))
def test_adding_a_sentence_never_lowers_the_number_of_false_claims(
    caption: tuple[Scene, list[str]], added: str, place: int
) -> None:
    picture, texts = caption
    before = measure_caption(" ".join(texts), picture).total.num_false
    longer = [*texts[:place], added, *texts[place:]]
    assert measure_caption(" ".join(longer), picture).total.num_false >= before


@given(captions(), st.integers(0, 11), st.integers(0, 12))
def test_repeating_a_sentence_never_raises_f1(caption: tuple[Scene, list[str]], which: int, place: int) -> None:
    picture, texts = caption
    if not texts:
        return
    repeated = [*texts[:place], texts[which % len(texts)], *texts[place:]]
    before, after = (measure_caption(" ".join(some), picture) for some in (texts, repeated))
    assert after.total.f1 <= before.total.f1
    assert after.repeats_sentence


@given(SCENES, st.integers(0, 99))
def test_a_caption_by_the_grammar_of_the_truth_is_perfect(picture: Scene, seed: int) -> None:
    result = measure_caption(write_caption(list_facts(picture), Random(seed)), picture)
    assert (result.total.precision, result.total.recall, result.total.f1) == (1.0, 1.0, 1.0)
    assert result.is_wholly_right
    assert not result.names_twice
    assert not result.repeats_sentence


def test_a_thing_named_twice_is_false_in_all_parts_of_the_worse_mention() -> None:
    picture = draw_scene(11, 0)
    thing = picture.things[0]
    once = measure_caption(f"A {thing.size} {thing.texture} {thing.name}.", picture)
    other = "large" if thing.size == "small" else "small"
    twice = measure_caption(f"A {other} {thing.name}. A {thing.size} {thing.texture} {thing.name}.", picture)
    assert once.total.num_false == 0
    assert (twice.total.num_false, twice.total.num_true, twice.names_twice) == (2, 3, True)


def test_a_count_below_the_number_of_listed_things_is_false_even_when_it_is_right() -> None:
    picture = next(one for index in range(99) if len((one := draw_scene(11, index)).things) == 2)
    listed = " ".join(f"A {thing.name}." for thing in picture.things)
    assert measure_caption(f"Two objects. {listed}", picture).kinds["count"].num_false == 0
    assert measure_caption(f"Two objects. {listed} A {picture.things[0].name}.", picture).kinds["count"].num_false == 1
    assert measure_caption(f"Two objects. A {picture.things[0].name}.", picture).kinds["count"].num_false == 0
