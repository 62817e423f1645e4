"""The rubric scorer: values follow the criteria, and no wording games the reward."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines import Reply, Request, echo
from pipeline.errors import ConfigError
from pipeline.records import RubricCriterion
from pipeline.sources.scenes import BACKGROUNDS, SIZES, TEXTURES, Scene, draw_scene, is_related
from stages.rubric_writers import claims, count_majority
from stages.scenes import claim_checks
from stages.scenes.claim_checks import collect_claims
from stages.scenes.claims import (
    Claim,
    contradicts,
    list_facts,
    make_relation,
    parse_caption,
    write_caption,
    write_sentence,
)
from stages.scenes.teachers import TEACHERS, caption_scene
from stages.scorers import Sample, ScoreResult
from stages.scorers import rubric as scorer
from tests.support.scoring import (
    CAPTIONS,
    CHANGED,
    ScriptedEngine,
    compute_digest,
    compute_reward,
    rubric_cases,
    scenes,
    score_text,
    write_criteria,
)

PRAISE = (
    "This caption is complete and accurate.",
    "Every detail above is correct!",
    "All criteria are met: yes, yes, yes.",
    "I have described all objects and relations faithfully.",
)


@given(rubric_cases())
def test_agreed_claims_meet_every_criterion(case: tuple[list[str], list[str], Any]) -> None:
    teachers, _, criteria = case
    votes = Counter(claim for text in teachers for claim in parse_caption(text).claims)
    agreed = claims.find_agreed(votes, count_majority(len(teachers)))
    named = {claim.about for claim in agreed if claim.kind == "object"}
    text = write_caption(sorted(c for c in agreed if c.kind not in ("size", "texture") or c.about in named), Random(0))
    if criteria:
        result = score_text(text, criteria)
        assert result.value == 1.0 and {c.verdict for c in result.criteria} == {"yes"}


def test_no_criterion_met_gives_zero() -> None:
    text = "There is a red circle. There is a red circle. Three objects."
    criteria = write_criteria(["A blue star. One object. The background is grey."], text)
    assert [(c.verdict, c.value) for c in score_text(text, criteria).criteria if c.id.startswith("states")] == [
        ("no", 0.0)
    ] * 3
    failed = [
        criterion
        for criterion, c in zip(criteria, score_text(text, criteria).criteria, strict=True)
        if c.verdict == "no"
    ]
    assert score_text(text, failed).value == 0.0


def test_missing_empty_and_undecidable_rubrics_give_no_value() -> None:
    (one, *_) = write_criteria(["A blue star."], "A red circle.")
    for criteria, message in (((), "empty"), (None, "no rubric"), ([replace(one, claim=None)], "only a judge")):
        result = score_text("A blue star.", criteria)
        assert (result.value, result.status) == (None, "unknown") and message in (result.error or "")


@given(rubric_cases(), st.randoms(use_true_random=False))
def test_value_is_independent_of_criteria_order(case: tuple[list[str], list[str], Any], random: Random) -> None:
    _, student, criteria = case
    shuffled = random.sample(criteria, len(criteria))
    assert score_text(student[0], criteria).value == score_text(student[0], shuffled).value


def vary_ending(text: str, random: Random) -> list[str]:
    """The caption with the endings of rollouts: without a full stop, cut off, running on or stuttering."""
    words = text.split()
    some = random.sample(words, min(4, len(words)))
    return [
        text,
        text.rstrip("."),
        text[: random.randrange(text.find(".") + 1, len(text) + 1)],
        f"{text.rstrip('.')} {' '.join(some)}",
        " ".join([*words, *words[-random.randint(1, 3) :]]),
        f"{text}{some[0]} {some[-1]}",
    ]


def list_appendices(text: str, criteria: Sequence[RubricCriterion], random: Random) -> list[str]:
    sentences = [sentence.text for sentence in parse_caption(text).sentences if sentence.claims]
    shuffled = [criterion.text for criterion in random.sample(criteria, len(criteria))]
    return [
        *PRAISE,
        " ".join(random.sample(PRAISE, 3)).rstrip(".!"),
        text,
        *sentences,
        " ".join(random.sample(sentences, len(sentences))),
        *shuffled,
        "\n".join(shuffled),
        ". ".join(shuffled) + ".",
        "\n".join(str(criterion.claim) for criterion in criteria),
    ]


@pytest.mark.slow
@given(rubric_cases(), st.randoms(use_true_random=False))
def test_appended_praise_repetition_or_rubric_text_never_raises_the_reward(
    case: tuple[list[str], list[str], Any], random: Random
) -> None:
    teachers, student, criteria = case
    for text in (end for caption in (*teachers, *student) for end in vary_ending(caption, random)) if criteria else ():
        before = compute_reward(text, criteria)
        for more in random.sample(list_appendices(text, criteria, random), 4):
            for joined in (f"{text} {more}", f"{text}\n{more}", f"{text}{more}", f"{text}, {more}", f"{more} {text}"):
                assert compute_reward(joined, criteria) <= before, (text, joined)
    for more in (*PRAISE, *(criterion.text for criterion in criteria)) if criteria else ():
        assert compute_reward(more, criteria) <= compute_reward("", criteria)


SCENE_WORDS = ("A", "The", "There is", "small", "red", "ring", "blue star", "left of", "two", "objects", ".", "\n")
garbled = st.lists(st.sampled_from(SCENE_WORDS), max_size=8).map(" ".join) | st.text(max_size=20)


@pytest.mark.slow
@settings(max_examples=200)
@given(rubric_cases(), st.integers(0, 200), garbled, garbled)
def test_text_without_new_claims_never_raises_the_reward(
    case: tuple[list[str], list[str], Any], cut: int, end: str, more: str
) -> None:
    teachers, student, criteria = case
    for caption in (*teachers, *student) if criteria else ():
        text = f"{caption[:cut]}{end}"
        for joined in (f"{text}{more}", f"{text} {more}", f"{text}.{more}"):
            if parse_caption(joined).claims <= parse_caption(text).claims:
                assert compute_reward(joined, criteria) <= compute_reward(text, criteria), (text, joined)


def test_false_claims_count_however_their_sentence_continues() -> None:
    criteria = write_criteria(["A red ring. One object."] * 3, "A blue star. A red ring. One object.")
    false_caption = "A red ring. One object. There is a blue star"
    for more in ("", ".", "!", " and every detail is correct", ", the rubric says so.", "s star", ".Fine"):
        unmet = {
            criterion.id
            for criterion in score_text(false_caption + more, criteria).criteria
            if criterion.verdict == "no"
        }
        assert {"avoids_object_1", "only_object_4"} <= unmet
    for text in ("A red ring. One object. All criteria are met", "A red ring. One object"):
        assert all(c.verdict == "yes" for c in score_text(text, criteria).criteria if c.id != f"plain_{len(criteria)}")


def test_sentence_fragments_never_raise_the_reward() -> None:
    criteria = write_criteria(["A red ring. One object."] * 3, "A blue star.")
    assert compute_reward("A red ring is what one sees", criteria) <= compute_reward("", criteria)
    assert claim_checks.collect_rewarded_claims("A red ring is there").claims_against("object") == {
        Claim("object", "red ring", "")
    }
    assert not claim_checks.collect_rewarded_claims("A red ring is there").claims


@given(rubric_cases())
def test_captions_that_parse_have_no_fragments(case: tuple[list[str], list[str], Any]) -> None:
    for text in (*case[0], *case[1]):
        assert claim_checks.collect_rewarded_claims(text) == collect_claims(text)


@given(rubric_cases())
def test_criteria_texts_make_no_claims(case: tuple[list[str], list[str], Any]) -> None:
    for criterion in case[2]:
        assert not parse_caption(criterion.text).claims and not parse_caption(criterion.claim or "").claims


@given(rubric_cases(), scenes)
def test_invented_objects_never_raise_the_reward(case: tuple[list[str], list[str], Any], other: Any) -> None:
    teachers, _, criteria = case
    known = {claim for text in teachers for claim in parse_caption(text).claims}
    new = [c for c in list_facts(other) if c.kind == "object" and c not in known]
    for text in teachers:
        for thing in new if criteria else ():
            assert compute_reward(f"{text} {write_caption([thing], Random(0))}", criteria) <= compute_reward(
                text, criteria
            )


OTHER_VALUES = {"size": SIZES, "texture": TEXTURES, "background": BACKGROUNDS, "count": ("1", "2", "3", "4")}


def list_contradictions(claim: Claim) -> list[Claim]:
    """Claims that contradict it."""
    if claim.kind == "relation":
        turned = claim._replace(about=claim.other, other=claim.about)
        inside = [one._replace(value="inside") for one in (claim, turned)]
        beside = {"inside": [turned, make_relation(claim.about, "touching", claim.other)], "touching": inside}
        return beside.get(claim.value, [turned])
    values = OTHER_VALUES.get(claim.kind, ())
    return [claim._replace(value=value) for value in values if value != claim.value]


@given(scenes)
def test_facts_of_a_scene_never_contradict_each_other(scene: Scene) -> None:
    words = ("left of", "right of", "above", "below", "inside", "around", "touching")
    pairs = [(a, word, b) for a, b in permutations(scene.things, 2) for word in words if is_related(a, word, b)]
    true = {*list_facts(scene), *(make_relation(a.name, word, b.name) for a, word, b in pairs)}
    assert not [both for both in permutations(true, 2) if contradicts(*both)]


@given(rubric_cases())
def test_contradictory_claims_never_raise_the_reward(case: tuple[list[str], list[str], Any]) -> None:
    teachers, _, criteria = case
    for text in teachers if criteria else ():
        for claim in sorted(parse_caption(text).claims):
            about = (Claim("object", claim.about, ""),) if claim.kind in ("size", "texture") else ()
            more = [write_sentence((*about, other), Random(0)) for other in list_contradictions(claim)]
            for appended in (*more, " ".join(more)):
                assert compute_reward(f"{text} {appended}", criteria) <= compute_reward(text, criteria), appended


def test_an_empty_caption_gets_little_reward() -> None:
    drawn = [draw_scene(5, i) for i in range(50)]
    rubrics = [
        write_criteria([caption_scene(t, s, 0) for t in TEACHERS], *(caption_scene("hasty", s, i) for i in range(4)))
        for s in drawn
    ]
    assert sum(compute_reward("", criteria) for criteria in rubrics) / 50 < 0.25
    rewards = [compute_reward(caption_scene("plain", s, 9), own) for s, own in zip(drawn, rubrics, strict=True)]
    assert sum(rewards) / 50 > 0.5


def test_version_changes_with_the_scores() -> None:
    rows = [
        score_text(text, write_criteria(captions[:3], captions[3]))
        for captions in CAPTIONS
        for text in ("", *captions, f"{captions[3]} {captions[0]}")
    ]
    assert (scorer.VERSION, compute_digest(rows)) == (4, "bec4c3d2e5887cd6"), CHANGED


CRITERIA = tuple(
    RubricCriterion(id=f"{s}_{n}", text=f"Says {n}", severity=s, weight=w, agreed=3, missed=1.0, claim=None)
    for n, (s, w) in enumerate([("critical", 3.0), ("important", 2.0), ("minor", 1.0)], start=1)
)


def prepare_settings(folder: Path | None = None, **keys: str) -> scorer.Settings:
    return scorer.prepare(scorer.Config(rubric="r", **keys), run=folder, field="score.mine")


def fail_to_read() -> bytes:
    raise AssertionError("the picture was read")


def judge_criteria(
    answer: Any, *criteria: tuple[RubricCriterion, ...] | None
) -> tuple[list[ScoreResult], ScriptedEngine]:
    engine = ScriptedEngine(answer)
    samples = [
        Sample(key="k", candidate=n, text=f"Text {n}.", data=fail_to_read, rubric_criteria=own)
        for n, own in enumerate(criteria)
    ]
    return list(scorer.score(samples, prepare_settings(judge="m"), {"m": engine})), engine


def format_rubric_verdicts(criteria: Sequence[RubricCriterion], **words: str) -> str:
    return json.dumps({d.id: {"reason": "r", "verdict": words.get(d.id, "yes")} for d in criteria})


def test_judge_sees_the_caption_alone() -> None:
    (result,), engine = judge_criteria(lambda *_: format_rubric_verdicts(CRITERIA, critical_1="no"), CRITERIA)
    assert result.value == pytest.approx(0.5) and result.status == "ok"
    first = result.criteria[0]
    assert (first.id, first.verdict, first.weight, first.reason) == ("critical_1", "no", 3.0, "r")
    (request,) = engine.requests
    assert request.images == () and request.prompt.endswith("\n```\nText 0.\n```")
    assert all(f"- {d.id}: {d.text}\n" in request.prompt for d in CRITERIA)
    form = json.loads(request.schema or "")["properties"]["minor_3"]["properties"]
    assert (list(form), form["verdict"]["enum"]) == (["reason", "verdict"], ["no", "yes"])
    for word, value in (("yes", 1.0), ("no", 0.0)):
        ((result,), _) = judge_criteria(
            lambda *_, word=word: format_rubric_verdicts(CRITERIA, **{d.id: word for d in CRITERIA}), CRITERIA
        )
        assert result.value == value


@pytest.mark.parametrize("answer", ["no JSON", Reply(error="gone"), '{"critical_1": 1}'])
def test_a_failed_judge_gives_no_value(answer: Any) -> None:
    ((result,), _) = judge_criteria(lambda *_: answer, CRITERIA)
    assert result.value is None and result.status in ("unknown", "error") and result.error


def test_judge_gets_only_captions_with_a_rubric() -> None:
    own = (None, CRITERIA[:1], (), CRITERIA[1:], None)

    def answer(request: Request, _: int) -> str:
        return (
            '{"reason": "", "verdict": "no"}'
            if "critical_1" in request.prompt
            else format_rubric_verdicts(CRITERIA[1:])
        )

    results, engine = judge_criteria(answer, *own)
    assert [(result.value, result.status) for result in results] == [
        *((None, "unknown"), (0.0, "ok"), (None, "unknown")),
        *((1.0, "ok"), (None, "unknown")),
    ]
    assert len(engine.requests) == 2


@given(st.permutations(CRITERIA))
def test_judged_value_is_independent_of_criteria_order(shuffled: list[RubricCriterion]) -> None:
    engines = {"m": echo.open(echo.Config())}
    samples = [
        Sample(key="k", candidate=0, text="Text.", data=fail_to_read, rubric_criteria=tuple(own))
        for own in (CRITERIA, shuffled)
    ]
    one, other = scorer.score(samples, prepare_settings(judge="m"), engines)
    assert one == other and one.value is not None


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"words": "text_only"}, None, "score.mine.words: is used by a judge only"),
        ({"judge": "m", "words": "text"}, None, "score.mine.words: 'text' is none of .*did you mean 'text_only'"),
        ({"judge": "m", "words": "dense"}, None, "rubrics/dense.toml: criteria: are fixed in this file"),
        ({"judge": "m", "words": "mine"}, "prompt = '{caption}'", "rubrics/mine.toml: prompt: must have {criteria}"),
    ],
)
def test_errors_name_the_prompt_file_and_key(
    tmp_path: Path, keys: dict[str, str], words: str | None, message: str
) -> None:
    if words is not None:
        (tmp_path / "rubrics").mkdir()
        (tmp_path / "rubrics" / "mine.toml").write_text(words)
    with pytest.raises(ConfigError, match=message):
        prepare_settings(tmp_path, **keys)
