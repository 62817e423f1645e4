"""The promises of the grammar: what is said is what is understood, and no wording fools the measure."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.scenes import scene
from stages.scenes.claims import Claim, facts, grouped, holds, measure, parse, say, sentences, verbalise

scenes = st.builds(scene, st.integers(0, 3), st.integers(0, 10_000))


@st.composite
def subsets(draw: st.DrawFn) -> list[Claim]:
    """Some of what is true of a scene, in any order, as whole sentences."""
    true = draw(scenes)
    counts = Counter(thing.shape for thing in true.things)
    groups = grouped([*facts(true), *(Claim("count", shape, str(number)) for shape, number in counts.items())])
    chosen = draw(st.permutations(groups))[: draw(st.integers(0, len(groups)))]
    return [claim for group in chosen for claim in group[: draw(st.integers(1, len(group)))]]


@given(subsets(), st.integers())
def test_what_is_said_is_what_is_understood(claims: list[Claim], seed: int) -> None:
    parsed = parse(verbalise(claims, Random(seed)))
    assert parsed.claims == frozenset(claims)
    assert not parsed.unparsed
    assert [c for s in parsed.sentences for c in s.claims] == [c for g in grouped(claims) for c in g]


@given(scenes, st.integers())
def test_the_whole_truth_measures_one(scene_, seed: int) -> None:
    result = measure(verbalise(facts(scene_), Random(seed)), scene_)
    assert (result.precision, result.recall, result.f1, result.num_hallucinations) == (1, 1, 1, 0)


@given(scenes, subsets(), st.integers())
def test_repeating_changes_nothing(scene_, claims: list[Claim], seed: int) -> None:
    text = verbalise(claims, Random(seed))
    assert measure(f"{text} {text}", scene_) == measure(text, scene_)


@pytest.mark.parametrize(
    "stray",
    [
        "This caption is complete and accurate.",
        "red circle blue star small large left of above",
        "A small large red circle.",
        "There is a red red circle.",
        "The red circle is left of.",
        "IMG_2041.jpg",
        "Every detail below is correct!",
    ],
)
@given(scenes, st.integers())
def test_stray_sentences_are_false_claims(stray: str, scene_, seed: int) -> None:
    text = verbalise(facts(scene_), Random(seed))
    padded = measure(f"{text} {stray}", scene_)
    assert padded.num_hallucinations == 1
    assert padded.recall == 1
    assert measure(f"{text}\n{stray}\n{stray}", scene_).precision < padded.precision


def test_letters_that_only_look_like_those_of_a_word_say_nothing() -> None:
    assert not parse("\u017fix objects. A \u017fmall red ring.").claims  # a long s, which ignoring case makes an s


def test_an_empty_caption_earns_nothing() -> None:
    result = measure("", scene(0, 0))
    assert (result.precision, result.recall, result.f1) == (0, 0, 0)


@given(scenes)
def test_facts_hold_and_their_opposites_do_not(one) -> None:
    assert all(holds(claim, one) for claim in facts(one))
    assert not any(holds(claim._replace(value="?"), one) for claim in facts(one) if claim.kind != "object")


def test_both_directions_say_the_same() -> None:
    assert (
        parse("The red ring is right of the blue star.").claims == parse("the blue star is left of the red ring").claims
    )
    assert (
        parse("The red ring is touching the blue star.").claims
        == parse("The blue star is touching the red ring.").claims
    )
    assert parse("The red ring is around the blue star.").claims == {
        Claim("relation", "blue star", "inside", "red ring")
    }


def test_counts_of_one_shape() -> None:
    assert parse("Two crosses. There is one object.").claims == {
        Claim("count", "cross", "2"),
        Claim("count", "objects", "1"),
    }


@given(subsets(), st.integers())
def test_sentences_are_kept_whole(claims: list[Claim], seed: int) -> None:
    rng = Random(seed)
    said = [say(group, rng) for group in grouped(claims)]
    assert sentences(" ".join(said)) == said
