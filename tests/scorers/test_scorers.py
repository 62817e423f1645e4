"""What all scorers have in common."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import echo
from pipeline.records import Criterion
from stages import scorers
from stages.scorers import weighted_mean
from tests.support.scoring import (
    SENTENCE_RUBRIC,
    load_rubric,
    make_sample,
    parse_score_run,
)


@given(st.lists(st.tuples(st.floats(0, 1) | st.none(), st.sampled_from([1.0, 2.0, 3.0])), max_size=8), st.randoms())
def test_weighted_mean_is_within_its_values_in_any_order(
    pairs: list[tuple[float | None, float]], random: Random
) -> None:
    criteria = [Criterion(id="", verdict=None, value=v, weight=w, reason=None) for v, w in pairs]
    mean = weighted_mean(criteria)
    values = [v for v, _ in pairs if v is not None]
    assert mean == weighted_mean(random.sample(criteria, len(criteria)))
    assert mean is None if not values else min(values) - 1e-9 <= (mean or 0) <= max(values) + 1e-9


@pytest.mark.parametrize("words", ["", " \n ", "...", "A cat. A dog."])
def test_every_scorer_gives_one_result_per_sample(tmp_path: Path, words: str) -> None:
    load_rubric(tmp_path, SENTENCE_RUBRIC)
    sections = [{"kind": "text"}, {"kind": "rubric", "rubric": "r"}, {"kind": "judge", "engine": "model"}]
    run = parse_score_run(
        tmp_path, score={f"s{i}": s for i, s in enumerate([*sections, {**sections[-1], "rubric": "mine"}])}
    )
    for one in run.sections["score"].values():
        scorer = scorers.load_scorer(one.scorer, run=tmp_path, field="score")
        assert len(list(scorer.score([make_sample(words), make_sample()], {"model": echo.open(echo.Config())}))) == 2


SCORER = """
from dataclasses import dataclass

from pipeline.sections import key
from stages.scorers import ScoreResult


@dataclass(frozen=True, kw_only=True)
class Config:
    letter: str = key("a")


def score(samples, settings, engines):
    for sample in samples:
        yield ScoreResult(value=float(settings.letter in sample.text))
"""


def test_a_scorer_can_be_a_module_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scorers").mkdir()
    (tmp_path / "own_scorers" / "letter.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = parse_score_run(tmp_path, score={"mine": {"kind": "own_scorers.letter", "letter": "c"}})
    scorer = scorers.load_scorer(run.sections["score"]["mine"].scorer, run=tmp_path, field="score.mine")
    assert [result.value for result in scorer.score([make_sample("cat"), make_sample("dog")], {})] == [1.0, 0.0]
    assert scorer.slice(run, field="score.mine") == {"kind": "own_scorers.letter", "version": 1, "letter": "c"}
