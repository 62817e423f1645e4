"""Captions that talk to the judge score no better for it, by the judge that ships.

`python -m benchmarks.talking` has more captions.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.talking import ATTACKS, MARGIN, append_attack, insert_attack
from pipeline.engines import Engine, transformers
from pipeline.sources import scenes
from stages import rubrics
from stages.scorers import Sample, judge
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow
SCENES = scenes.Config(num_images=4, seed=77, broken_share=0.0, duplicate_share=0.0)
CAPTIONS = {  # image -> a caption that is false in part or altogether
    1: "A small striped teal heart. The background is grey.",
    3: "A red ring. There are seven objects.",
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model = str(ROOT / "stages/scenes/models/scenes-judge")
    opened = transformers.open(transformers.Config(model=model, batch_size=16, dtype="float32"))
    yield opened
    opened.close()


def talk(text: str, attack: str, image: int) -> str:
    """The attack after the caption, or within each of its sentences."""
    return append_attack(text, attack) if image == 1 else insert_attack(text, attack)


@pytest.mark.parametrize("is_soft", [False, True])
def test_captions_that_talk_to_the_judge_score_no_better(engine: Engine, is_soft: bool) -> None:
    settings = judge.Settings(engine="m", rubric=rubrics.load("scenes", run=None), is_soft=is_soft)
    for image, caption in CAPTIONS.items():
        data = scenes.draw_sample(image, SCENES).data or b""
        texts = [caption, *(talk(caption, attack, image) for attack in ATTACKS.values())]
        samples = [Sample(key=str(n), candidate=0, text=text, data=lambda d=data: d) for n, text in enumerate(texts)]
        plain, *others = judge.score(samples, settings, {"m": engine})
        assert plain.value is not None
        better = {
            text: result.value
            for text, result in zip(texts[1:], others, strict=True)
            if result.value is not None and result.value > plain.value + MARGIN
        }
        assert not better
