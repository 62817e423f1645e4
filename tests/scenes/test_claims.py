"""Scene captions parse back to the claims that they were written from, and no wording fools the counts."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.scenes import draw_scene
from stages.scenes.claims import (
    Claim,
    count_claims,
    group_claims,
    is_true,
    list_facts,
    parse_caption,
    split_sentences,
    write_caption,
    write_sentence,
)

scenes = st.builds(draw_scene, st.integers(0, 3), st.integers(0, 10_000))


@st.composite
def subsets(draw: st.DrawFn) -> list[Claim]:
    """Some true claims of a scene, in any order, grouped by sentence."""
    true = draw(scenes)
    counts = Counter(thing.shape for thing in true.things)
    groups = group_claims(
        [*list_facts(true), *(Claim("count", shape, str(number)) for shape, number in counts.items())]
    )
    chosen = draw(st.permutations(groups))[: draw(st.integers(0, len(groups)))]
    return [claim for group in chosen for claim in group[: draw(st.integers(1, len(group)))]]


@given(subsets(), st.integers())
def test_written_claims_parse_back(claims: list[Claim], seed: int) -> None:
    parsed = parse_caption(write_caption(claims, Random(seed)))
    assert parsed.claims == frozenset(claims)
    assert not parsed.unparsed
    assert [c for s in parsed.sentences for c in s.claims] == [c for g in group_claims(claims) for c in g]


@given(scenes, st.integers())
def test_a_complete_caption_has_full_precision_and_recall(scene_, seed: int) -> None:
    result = count_claims(write_caption(list_facts(scene_), Random(seed)), scene_)
    assert (result.precision, result.recall, result.f1, result.num_false) == (1, 1, 1, 0)


@given(scenes, subsets(), st.integers())
def test_repetition_changes_no_count(scene_, claims: list[Claim], seed: int) -> None:
    text = write_caption(claims, Random(seed))
    assert count_claims(f"{text} {text}", scene_) == count_claims(text, scene_)


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
    text = write_caption(list_facts(scene_), Random(seed))
    padded = count_claims(f"{text} {stray}", scene_)
    assert padded.num_false == 1
    assert padded.recall == 1
    assert count_claims(f"{text}\n{stray}\n{stray}", scene_).precision < padded.precision


def test_lookalike_letters_make_no_claim() -> None:
    """A long s is an s when case is ignored."""
    assert not parse_caption("\u017fix objects. A \u017fmall red ring.").claims


def test_an_empty_caption_scores_zero() -> None:
    result = count_claims("", draw_scene(0, 0))
    assert (result.precision, result.recall, result.f1) == (0, 0, 0)


@given(scenes)
def test_facts_are_true_and_altered_facts_are_not(one) -> None:
    assert all(is_true(claim, one) for claim in list_facts(one))
    assert not any(is_true(claim._replace(value="?"), one) for claim in list_facts(one) if claim.kind != "object")


def test_opposite_relations_make_the_same_claim() -> None:
    assert (
        parse_caption("The red ring is right of the blue star.").claims
        == parse_caption("the blue star is left of the red ring").claims
    )
    assert (
        parse_caption("The red ring is touching the blue star.").claims
        == parse_caption("The blue star is touching the red ring.").claims
    )
    assert parse_caption("The red ring is around the blue star.").claims == {
        Claim("relation", "blue star", "inside", "red ring")
    }


def test_counts_may_be_of_one_shape() -> None:
    assert parse_caption("Two crosses. There is one object.").claims == {
        Claim("count", "cross", "2"),
        Claim("count", "objects", "1"),
    }


@given(subsets(), st.integers())
def test_captions_split_into_the_sentences_written(claims: list[Claim], seed: int) -> None:
    rng = Random(seed)
    written = [write_sentence(group, rng) for group in group_claims(claims)]
    assert split_sentences(" ".join(written)) == written
