"""Fixtures of the scorer and rubric tests: a scripted engine, table rows, samples and rubrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from pipeline import config
from pipeline.engines import Reply, Request, finish_attempt
from pipeline.execution.passes import Pass
from pipeline.records import Caption, Image, RubricCriterion, make_key
from pipeline.sources.scenes import draw_scene
from pipeline.storage import tables
from stages import rubric, rubrics
from stages.rubric_writers import Evidence, claims, count_majority
from stages.rubrics import Rubric
from stages.scenes.teachers import TEACHERS, caption_scene
from stages.scorers import Sample, ScoreResult
from stages.scorers import rubric as scorer

PROVENANCE = tables.Provenance(stage="", name="", version=1, slice={}, inputs={})
SENTENCE_RUBRIC = """
prompt = '''
Is this true of the picture?
{sentence}'''
unit = "sentence"
unsure = ""
min_decided = 0.5
with_image = true

[sampling]
ladder = [0.5, 0.8]

[[criteria]]
id = "true"
question = "Is it true?"
"""


class ScriptedEngine:
    """An engine whose replies are computed from the request and the attempt by a function."""

    model, revision = "scripted", "1"

    def __init__(self, answer: Any) -> None:
        self.answer, self.requests = answer, list[Request]()

    def generate(self, requests: Any) -> Iterator[Reply]:
        for request in requests:
            self.requests.append(request)
            final, attempt = False, 0
            while not final:
                attempt += 1
                outcome = self.answer(request, attempt)
                reply = outcome if isinstance(outcome, Reply) else Reply(text=outcome, finish_reason="stop")
                reply, final = finish_attempt(request, reply, attempt)
            yield reply

    def waiting(self) -> float | None:
        return None

    def close(self) -> None:
        pass


def make_sample(words: str = "A cat sits on a mat.", **changes: Any) -> Sample:
    plain = Sample(key="k", candidate=0, text=words, data=lambda: b"image", seed=7)
    return replace(plain, **changes)


def load_rubric(folder: Path, toml: str) -> Rubric:
    (folder / "rubrics").mkdir(exist_ok=True)
    (folder / "rubrics" / "mine.toml").write_text(toml)
    return rubrics.load("mine", run=folder)


def caption_row(index: int, candidate: int, status: Any) -> Caption:
    return Caption(
        key=make_key(0, index),
        name="dense",
        candidate=candidate,
        text=f"A cat number {index} sits on mat {candidate}.",
        fields=None,
        status=status,
        error=None if status == "ok" else "why",
        flags=(),
        finish_reason="stop",
        attempt=1,
        seed=0,
        num_prompt_tokens=1,
        num_output_tokens=1,
        model="m",
        revision="",
        prompt_hash="0" * 16,
        sampling="{}",
        engine="model",
    )


def image_row(index: int, status: Any) -> Image:
    return Image(
        key=make_key(0, index),
        shard=0,
        index=index,
        status=status,
        error=None,
        source="test",
        source_key=f"test/{index}",
        file="shards/00000.tar",
        offset=0,
        num_bytes=8,
        format="jpeg",
        width=8,
        height=8,
        orientation=1,
        num_frames=1,
        sha256=hashlib.sha256(b"12345678").hexdigest(),
        alt_text=f"cat {index}",
        metadata="{}",
    )


def parse_score_run(folder: Path, **sections: Any) -> config.Run:
    values = {
        "source": {"kind": "scenes"},
        "engines": {"model": {"kind": "echo"}},
        "caption": {"dense": {"engine": "model"}, "short": {"engine": "model", "recipe": "short"}},
    }
    return config.parse(values | sections, file=folder / "run.toml")


scenes = st.builds(draw_scene, st.integers(0, 3), st.integers(0, 10_000))


def make_evidence(teachers: Sequence[str], *student: str, num_agree: int | None = None) -> Evidence:
    num_agree = count_majority(len(teachers)) if num_agree is None else num_agree
    return Evidence(key="k", teachers=tuple(teachers), student=student, num_agree=num_agree, data=lambda: b"")


def write_criteria(teachers: Sequence[str], *student: str, num_agree: int | None = None) -> tuple[RubricCriterion, ...]:
    (outcome,) = claims.write([make_evidence(teachers, *student, num_agree=num_agree)])
    return outcome.criteria


def score_text(text: str, criteria: Sequence[RubricCriterion] | None) -> ScoreResult:
    sample = Sample(
        key="k", candidate=0, text=text, data=lambda: b"", rubric_criteria=None if criteria is None else tuple(criteria)
    )
    (result,) = scorer.score([sample], scorer.Settings(rubric="r"), {})
    return result


def compute_reward(text: str, criteria: Sequence[RubricCriterion]) -> float:
    value = score_text(text, criteria).value
    assert value is not None
    return value


@st.composite
def rubric_cases(draw: st.DrawFn) -> tuple[list[str], list[str], tuple[RubricCriterion, ...]]:
    """Captions of teachers, captions of a student, and the criteria that follow from them."""
    scene, seed = draw(scenes), draw(st.integers(0, 100))
    teachers = [
        caption_scene(name, scene, seed) for name in draw(st.permutations(list(TEACHERS)))[: draw(st.integers(1, 5))]
    ]
    student = [caption_scene("hasty", scene, seed + 1 + i) for i in range(draw(st.integers(1, 4)))]
    return teachers, student, write_criteria(teachers, *student)


def parse_rubric_run(folder: Path, **section: Any) -> config.Run:
    values = {
        "source": {"kind": "scenes"},
        "engines": {"model": {"kind": "echo"}},
        "caption": {name: {"engine": "model"} for name in ("a", "b", "c", "student")},
        "rubric": {"mine": {"teachers": ["a", "b", "c"], "student": "student", **section}},
    }
    return config.parse(values, file=folder / "run.toml")


def list_rubric_passes(folder: Path, **section: Any) -> list[Pass]:
    return list(rubric.passes(parse_rubric_run(folder, **section)))


CHANGED = "equal captions give other results: raise VERSION, so that earlier tables are stale, and update the digest"


def compute_digest(rows: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(rows, default=asdict).encode()).hexdigest()[:16]


CAPTIONS = (  # of three teachers and a student, per picture; together they use every rule
    (
        "A small red ring. Two objects. The red ring is left of the blue star. A blue star. The background is grey.",
        "A large red ring. Two objects. The blue star is left of the green cross. A blue star. A green cross.",
        "A small red ring. Three objects. The red ring is left of the blue star. The background is pink.",
        "A purple heart. A small red ring. Four objects. The red ring is above the purple heart",
    ),
    (
        "A red ring. The red ring is above the blue star. A blue star. Two stars. The background is teal.",
        "A red ring. The blue star is above the red ring. A striped blue star. One star. The background is teal.",
        "A red ring. The red ring is above the blue star. A dotted blue star. Two objects. A fine picture.",
        "A striped blue star. A striped blue star! The red ring is touching the blue star and is large",
    ),
    (
        "A red ring. A blue star. The red ring is inside the blue star.",
        "A red ring. A blue star. The red ring is touching the blue star.",
        "A red ring. A blue star. The red ring is inside the blue star.",
        "A red ring. A blue star. The blue star is inside the red ring.",
    ),
)
