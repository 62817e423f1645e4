"""The text scorer: which captions fail which check."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.sections import stamped
from stages import scorers
from stages.scorers import ScoreResult, text
from tests.support.scoring import (
    make_sample,
)


def check_text(words: str, **settings: Any) -> ScoreResult:
    alt_text = settings.pop("alt_text", None)
    plugin = config.Plugin(kind="text", module=text, config=text.Config(**settings))
    (result,) = scorers.load_scorer(plugin, run=None, field="score.text").score(
        [make_sample(words, alt_text=alt_text)], {}
    )
    return result


def find_failures(words: str, **settings: Any) -> set[str]:
    return {c.id for c in check_text(words, **settings).criteria if c.verdict == "no"}


GOOD_CAPTION = "A grey cat with green eyes sits on a red mat in front of a door, looking up at the camera."


@pytest.mark.parametrize(
    ("words", "settings", "names"),
    [
        (GOOD_CAPTION, {}, set()),
        ("A cat.", {}, {"words"}),
        (GOOD_CAPTION, {"max_words": 10}, {"words"}),
        (GOOD_CAPTION[:-1] + " and", {}, {"ending"}),
        (GOOD_CAPTION[:-1] + ' beside a sign that reads "STOP."', {}, set()),
        ("一只灰色的猫坐在红色的垫子上。", {"min_words": 1}, set()),
        (GOOD_CAPTION + " \x00\x01\ufffd\ue000", {}, {"printable", "ending"}),
        (" ".join([GOOD_CAPTION] * 4), {}, {"loop"}),
        (GOOD_CAPTION, {"alt_text": GOOD_CAPTION.upper()}, {"copy"}),
        (GOOD_CAPTION, {"alt_text": "grey cat on a red mat"}, set()),
        ("I'm sorry, but I can't help with describing this image.", {}, {"refusal"}),
        ("The image shows a grey cat on a red mat.", {}, {"meta_commentary"}),
        (f"{GOOD_CAPTION}<|im_end|>", {}, {"special_token", "ending"}),
        ("A small blue square. A red ring on grey. A small  blue square!", {}, set()),
        (
            "A small blue square. A red ring on grey. A small  blue square!",
            {"repeated_sentence": True},
            {"repeated_sentence"},
        ),
        ("A small blue square. A blue square, small. 1. 2. 3. Three numbers.", {"repeated_sentence": True}, set()),
        (f"**Cat**\n\n{GOOD_CAPTION}", {}, {"markdown"}),
    ],
)
def test_failed_checks_have_a_reason(words: str, settings: dict[str, Any], names: set[str]) -> None:
    result = check_text(words, **settings)
    assert find_failures(words, **settings) == names
    assert all(c.reason for c in result.criteria) and (result.value == 1.0) == (not names)


def test_check_weights_can_be_set() -> None:
    whole = check_text("A cat.")
    assert whole.value is not None and 0.8 < whole.value < 1
    assert check_text("A cat.", weights={"words": 0.0}).value == 1.0
    assert check_text("A cat.", weights=dict.fromkeys((c.id for c in whole.criteria), 0.0)).status == "unknown"


def test_scores_without_the_check_of_repeated_sentences_are_as_they_were() -> None:
    twice = "A small blue square. A small blue square."
    assert check_text(twice).value == 1.0 and "repeated_sentence" not in stamped(text.Config())
    assert (check_text(twice, repeated_sentence=True).value or 1.0) < 1.0
    with pytest.raises(ConfigError, match="repeated_sentence"):
        check_text(twice, weights={"repeated_sentence": 1.0})
