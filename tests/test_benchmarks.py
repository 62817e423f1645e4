"""The arms of benchmarks/miniature are valid, recorded ones are not trained again, the adversary finds nothing, and
what other benchmarks compare is comparable."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import adversary, coverage, details, downstream, in_place, judge, miniature, mixed, reader, verdicts
from benchmarks.held_out import list_scenes
from benchmarks.worlds import CHOICE
from pipeline import config
from pipeline.engines import Reply, Request, echo
from stages.audit.drawing import DrawnCaption, DrawnScore
from stages.scenes import teachers
from stages.scenes.claims import list_facts, write_caption
from stages.scenes.measure import measure_caption
from stages.training.settings import TrainConfig
from tests.support.runs import ROOT

RECORDED_STUDENT = "e156c636bec0"  # the student before the one that ships


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, TrainConfig | None]:
    shutil.copy(ROOT / "manifests" / "scenes-grpo" / "run.toml", tmp_path / "run.toml")
    return dict(miniature.make_arms(config.load(tmp_path).sections["train"][""]))


def test_every_arm_learns_from_the_same_number_of_samples(arms: dict[str, TrainConfig | None]) -> None:
    num_samples = {arm: miniature.count_samples(one) for arm, one in arms.items() if one is not None}
    assert num_samples.pop("one mark") * 4 == num_samples["rubrics"]
    assert set(num_samples.values()) == {51200}


def test_recorded_arms_have_the_digest_of_the_present_ones(arms: dict[str, TrainConfig | None]) -> None:
    student, judge = RECORDED_STUDENT, miniature.digest_weights(Path(miniature.JUDGE))
    cases = [("rubrics", False), ("rubrics", True), ("own teacher", False)]
    digests = {miniature.digest_arm(student, judge, arms[arm], shared=shared) for arm, shared in cases}
    recorded = {outcome.made_from for outcome in miniature.read_outcomes()}
    assert digests <= recorded


def test_the_student_that_ships_is_the_one_whose_arms_are_recorded(tmp_path: Path) -> None:
    manifest = "scenes-grpo-statements"
    shutil.copy(ROOT / "manifests" / manifest / "run.toml", tmp_path / "run.toml")
    rubrics = miniature.make_arms(config.load(tmp_path).sections["train"][""])["rubrics"]
    student = miniature.digest_weights(miniature.STUDENT)
    digest = miniature.digest_arm(student, "", rubrics, shared=False, manifest=manifest)
    assert digest in {outcome.made_from for outcome in miniature.read_outcomes()}


@pytest.mark.slow
def test_no_caption_is_found_whose_reward_rises_while_it_gets_worse() -> None:
    """The short form of `python -m benchmarks.adversary`."""
    tried, found = adversary.search(list_scenes(12), writer="statements", candidates=540)
    assert set(tried) == set(adversary.CHANGES) and tried.total() > 6000
    assert found and not [one for one in found if one.lost_f1 > adversary.MOST_LOST and not one.is_misled]


def test_the_adversary_finds_how_sets_of_claims_are_gamed() -> None:
    _, found = adversary.search(list_scenes(3), writer="claims", candidates=120)
    assert [one for one in found if one.lost_f1 > adversary.MOST_LOST and not one.is_misled]


def test_details_have_every_scene_once_with_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    captions = [write_caption(list_facts(scene), Random(0)) for scene in list_scenes(60)]
    captions[0] += " " + captions[0].split(". ")[0] + "."
    details.print_details("truth", captions, world=CHOICE)
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header == f"truth, world {CHOICE}"
    counts = [int(row[14:21]) for row in rows[:5]]
    assert counts[0] == 60 == sum(counts[1:])
    assert "0.017 (0.000-0.050)" in rows[0] and "1.000 (1.000-1.000)" in rows[0]
    assert rows[-1].split() == ["recall", *["1.000"] * 6]
    low, high = details.bootstrap_ratio(np.array([0.0, 1.0] * 200), np.ones(400))
    assert 0.43 < low < 0.47 and 0.53 < high < 0.57


@pytest.fixture
def audited() -> coverage.World:
    """400 captions, of which 300 are kept; those with better scores are right more often."""
    rng = np.random.default_rng(0)
    scores = rng.random(400).tolist()
    captions = [
        DrawnCaption(
            key=f"{place:012d}",
            caption="dense",
            candidate=0,
            text="A red circle. A blue square.",
            reason=None if place < 300 else "judged",
            scores=(DrawnScore(name="judge", value=score, worst=score),),
            size=300 if place < 300 else 100,
        )
        for place, score in enumerate(scores)
    ]
    truth = {caption.key: rng.random() < 0.4 + 0.6 * score for caption, score in zip(captions, scores, strict=True)}
    return coverage.World(kept=captions[:300], refused=captions[300:], truth=truth)


def test_a_simulated_draw_has_all_bands_of_the_score_in_proportion(audited: coverage.World) -> None:
    order = coverage.draw_order(audited.kept, np.random.default_rng(1))
    assert sorted(order) == list(range(300))
    values = np.array([caption.scores[0].value for caption in audited.kept])
    for limit in (0.3, 0.5, 0.8):
        assert (values[order[:100]] < limit).mean() == pytest.approx((values < limit).mean(), abs=0.03)


@pytest.mark.slow
def test_simulated_audits_are_measured_by_the_truth(audited: coverage.World) -> None:
    names: dict[str, Any] = {"name": "kept", "judge_name": "judge", "num_audits": 12}
    right, wrong = (coverage.simulate_intervals(audited, num_labels=100, wrong=share, **names) for share in (0.0, 0.5))
    assert right.coverage >= 0.75 and right.width < right.plain_width
    assert wrong.coverage < 0.5
    sure, doubtful = (
        coverage.simulate_guarantee(audited, num_labels=200, wrong=0.0, target=target, **names)
        for target in (0.6, 0.99)
    )
    assert sure.found > 0.5 and sure.broken <= 0.5 and 0 < sure.kept <= 1
    assert doubtful.found == 0


def test_the_arms_of_the_dual_encoder_draw_pictures_as_they_say() -> None:
    kept, groups = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0], [2, 2, 2, 5, 5, 5]
    weights = downstream.restore_mix(kept, groups)
    assert [weight > 0 for weight in weights] == [one > 0 for one in kept]
    assert sum(weights[:3]) == sum(weights[3:]) == 3.0
    best = downstream.keep_best_of_each([0.9, 0.1, 0.5, 0.2, 0.3, 0.1], groups, share=1 / 3)
    assert best == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_true_descriptions_are_true_and_wrong_ones_the_more_so() -> None:
    scenes = list_scenes(30)
    wrong = [
        sum(measure_caption(downstream.describe_scene(s, rng=Random(1), wrong=dose), s).total.num_false for s in scenes)
        for dose in (0.0, 0.2, 0.6)
    ]
    assert wrong[0] == 0 < wrong[1] < wrong[2]


def test_forms_of_verdicts_take_turns_over_all_captions() -> None:
    captions = [f"A red circle. There are {number} objects." for number in range(2 * verdicts.BLOCK + 1)]
    found = verdicts.judge_in_turns(captions, echo.open(echo.Config()))
    assert found.keys() == verdicts.FORMS.keys()
    for form in found.values():
        assert [len(result.criteria) for result in form.results] == [2] * len(captions)
        assert form.cost.cpu > 0 and form.cost.num_tokens > 0
    reasons = {name: {one.reason is None for r in form.results for one in r.criteria} for name, form in found.items()}
    assert reasons == {"written": {False}, "logprob": {False}, "logprob, no reasons": {True}}


def test_candidates_of_an_image_are_adjacent_and_no_other_turn_has_it() -> None:
    turns = [list(verdicts.draw_candidates(["a", "b", "c"], turn=turn, num=4, edge=64)) for turn in (0, 1)]
    keys = [[sample.key for sample in turn] for turn in turns]
    assert keys[0] == sorted(keys[0]) and len(set(keys[0])) == verdicts.PICTURES == len(keys[0]) / 4
    assert not set(keys[0]) & set(keys[1])
    pictures = [sample.data() for sample in turns[0][:8]]
    assert len(set(pictures[:4])) == 1 and pictures[0] != pictures[4]
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert picture.size == (64, 64)


def test_a_run_over_a_folder_copies_no_image(tmp_path: Path) -> None:
    """The short form of `python -m benchmarks.in_place`."""
    figures = in_place.measure_run(tmp_path, num_bytes=4_000_000)
    assert figures["images"] > 1 and figures["run_bytes"] < 0.1 * figures["corpus_bytes"]


class AnswersAsTheVoices:
    """An engine that answers as the voices do from which a reader learns; they find the scene by the source key."""

    def __init__(self) -> None:
        self._voices = {name: teachers.open(teachers.Config(teacher=name)) for name in VOICES.values()}

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            voice = next(voice for end, voice in VOICES.items() if request.prompt.endswith(end))
            yield from self._voices[voice].generate([replace(request, source_key=f"scenes/{CHOICE}/{request.id}")])

    def close(self) -> None:
        pass


VOICES: dict[str, Any] = {
    "do most of them say?": "merger",
    "in German?": "translator",
    "names that fit.": "realigner",
    "words that were read.": "reader",
}


def test_a_perfect_reader_is_measured_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reader, "open_engine", lambda _: AnswersAsTheVoices())
    monkeypatch.setattr(reader, "find_lines", lambda raw: tuple(filter(None, [json.loads(raw.metadata).get("sign")])))
    monkeypatch.setattr("sys.argv", ["reader", "perfect", "--scenes", "60", "--world", str(CHOICE)])
    reader.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["captions"]["fused"] == figures["captions"]["majority"]
    assert (figures["right names"], figures["wrong names"]) == (1, 0)
    assert (figures["signs with ocr"], figures["signs ocr alone"]) == (1, 1)
    assert (figures["signs without"], figures["signs of none"]) == (0, 0)
    scene = list_scenes(1)[0]
    hedged = [" ".join(f"The {thing.name} is called {name}." for thing in scene.things for name in ("Kalu", "Bado"))]
    (wrong,) = reader.measure_names(hedged, [scene])[1]
    assert sum(wrong) == 2 * len(scene.things)
    assert figures["gain"] > 0.03 and figures["translated"] == 1


class JudgesByTheTruth:
    """The labeller, which finds the scene by the number in a request's id."""

    model, revision = "truth", "1"

    def __init__(self) -> None:
        self._voice = teachers.open(teachers.Config(teacher="labeller", revision=2))

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for request in requests:
            number = int(request.id.partition("/")[0])
            yield from self._voice.generate([replace(request, source_key=f"scenes/{CHOICE}/{number}")])

    def close(self) -> None:
        pass


def test_a_judge_is_measured_on_planted_and_natural_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "open_engine", lambda _: JudgesByTheTruth())
    scenes = list_scenes(60)
    planted = list(judge.draw_statements(scenes))
    again = [(number, write_caption(list_facts(scene), Random(0))) for number, scene in enumerate(scenes)]
    again = [(number, f"{text} {text.split('. ')[0]}. A dog.") for number, text in again]
    for texts, sorts in ((planted, {"object", "relation"}), (again, {judge.AGAIN, judge.STRANGE})):
        outcomes = list(judge.judge_texts(texts, scenes, model="", rubric="scenes_open"))
        groups = judge.group_outcomes(outcomes)
        assert sorts <= groups.keys()
        assert judge.balanced_accuracy(outcomes) == judge.balanced_accuracy(groups["all"]) == 1
        assert judge.share_accepted(outcomes) == 0 and not any(o.sort == judge.STRANGE for o in groups["all"])
        assert all(o.true is None and o.could_not_say for o in outcomes if o.sort == judge.STRANGE)
    gullible = [replace(o, verdict=True) for o in outcomes]
    assert judge.balanced_accuracy(gullible) == 0.5 and judge.share_accepted(gullible) == 1
    directions = judge.group_outcomes(list(judge.judge_texts(planted, scenes, model="", rubric="scenes")))["direction"]
    assert len(directions) > 20 and {o.true for o in directions} == {True, False}


def test_a_mixture_has_the_text_with_the_higher_score_of_each_image() -> None:
    scene = list_scenes(1)[0]
    right = measure_caption(write_caption(list_facts(scene), Random(0)), scene)
    wrong = measure_caption("A dog.", scene)

    def rate(caption: str, score: float | None, *, keep: bool = False) -> mixed.RatedText:
        measure = right if score and score > 0.5 else wrong
        return mixed.RatedText(caption=caption, score=score, keep=keep, measure=measure, num_words=2)

    rated = {
        "a": [rate(mixed.SYNTHETIC, 0.4), rate(mixed.RAW, 0.9, keep=True)],
        "b": [rate(mixed.SYNTHETIC, 1.0, keep=True), rate(mixed.RAW, 0.2)],
        "c": [rate(mixed.SYNTHETIC, 0.3)],
        "d": [rate(mixed.SYNTHETIC, None)],
    }
    chosen = mixed.choose_texts(rated, kept=False)
    assert {key: one.caption for key, one in chosen[mixed.MIXED].items()} == {"a": "raw", "b": "dense", "c": "dense"}
    assert {name: len(texts) for name, texts in chosen.items()} == {"raw": 2, "dense": 4, "mixed by score": 3}
    kept = mixed.choose_texts(rated, kept=True)
    assert {name: list(texts) for name, texts in kept.items()} == {
        "raw": ["a"],
        "dense": ["b"],
        "mixed by score": ["a", "b"],
    }
    figures = mixed.summarise(list(chosen[mixed.MIXED].values()), num_images=4)
    assert figures["images"] == 0.75 and figures["raw"] == pytest.approx(1 / 3)
    assert figures["wholly right"] == figures["recall"] == pytest.approx(2 / 3)
