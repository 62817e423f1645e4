"""Examples for a judge in training: the questions of the score pass, with the verdicts that it gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config
from tests.support.runs import begin, corpus, make, sections

RUBRIC = """
unit = "sentence"
unsure = ""
prompt = \'\'\'
Before: {before}
Does the sentence hold?
{sentence}\'\'\'

[[criteria]]
id = "holds"
question = "Does the sentence hold?"
"""


@pytest.mark.slow
def test_sentences_that_were_not_judged_are_not_learnt(tmp_path: Path) -> None:
    """A sentence that only echoes the rubric is not judged, and counts when the others are numbered."""
    folder = tmp_path / "run"
    (folder / "rubrics").mkdir(parents=True)
    (folder / "rubrics" / "held.toml").write_text(RUBRIC)
    parts = {
        **sections(corpus(tmp_path / "photos", ["jpg"])),
        "caption.dense": {"words": "'A cat. Yes. A dog.'"},
        "score.judge": {"kind": "judge", "engine": "judge", "rubric": "held"},
        "train": {"captions": ["dense"], "scores": "judge", "model": "m", "output": "x"},
    }
    run = begin(folder, parts)
    for stage in ("ingest", "caption", "score:judge"):
        assert make(run, stage).exit_code == 0
    loaded = config.load(run)
    settings = loaded.sections["train"][""]
    examples = settings.options.module.open(loaded, settings).read_examples()
    asked = [question for example in examples for question in example.questions]
    fenced = ("```\n\n```", "```\nA cat. Yes.\n```")
    assert asked == [
        f"Before: {before}\nDoes the sentence hold?\n{sentence}"
        for before, sentence in zip(fenced, ("A cat.", "A dog."), strict=True)
    ]
