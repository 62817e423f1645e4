"""Compares the forms of a judge's verdicts on captions of held-out scenes: as written, and by probability.

For each form: how well the score ranks wholly right captions before the others (area under the ROC curve), how many of
the best half are wholly right, the balanced accuracy on the captions' sentences, and output tokens and seconds beside
those of the written form. The score is the product over sentences; "nothing twice" ranks captions that repeat a
sentence last. The last line is JSON.

    python -m benchmarks.verdicts [--scenes 1000] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks.held_out import CAPTIONER, JUDGE, generate_captions, list_scenes, make_samples, open_engine
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import answer_statement
from stages.scorers import ScoreResult, judge
from stages.text.sentences import split_sentences

FORMS: Mapping[str, Mapping[str, Any]] = {
    "written": {},
    "logprob": {"verdict": "logprob"},
    "logprob, no reasons": {"verdict": "logprob", "reasons": False},
}


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """The results of one form, by caption."""

    results: Sequence[ScoreResult]
    seconds: float


def judge_captions(captions: Sequence[str], model: str, form: Mapping[str, Any]) -> FormResult:
    settings = judge.prepare(judge.Config(engine="judge", rubric="scenes", **form), run=None, field="benchmark")
    spec = replace(settings.rubric.spec, aggregate="product")
    settings = replace(settings, rubric=replace(settings.rubric, spec=spec))
    engine = open_engine(model)
    try:
        start = time.perf_counter()
        results = list(judge.score(make_samples(captions), settings, {"judge": engine}))
        return FormResult(results=results, seconds=time.perf_counter() - start)
    finally:
        engine.close()


def rank_captions(captions: Sequence[str], form: FormResult, *, repeats_last: bool) -> list[float]:
    """The score of each caption, 0 where there is none; with `repeats_last`, repeated sentences come below all."""
    scores = [result.value or 0.0 for result in form.results]
    if not repeats_last:
        return scores
    sentences = [[sentence.casefold() for sentence in split_sentences(text)] for text in captions]
    return [score - (len(set(parts)) < len(parts)) for score, parts in zip(scores, sentences, strict=True)]


def share_right(scores: Sequence[float], is_right: Sequence[bool]) -> float:
    """The share of wholly right captions among the half with the best scores."""
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: len(scores) // 2]
    return sum(is_right[i] for i in best) / len(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--captioner", default=CAPTIONER)
    args = parser.parse_args()
    captions = [text or "(nothing)" for text in generate_captions(args.captioner, args.scenes)]
    scenes = list_scenes(args.scenes)
    is_right = [measure_caption(text, scene).is_wholly_right for text, scene in zip(captions, scenes, strict=True)]
    truths = [
        answer_statement(sentence, scene)[1]
        for text, scene in zip(captions, scenes, strict=True)
        for sentence in split_sentences(text) or [text]
    ]
    print(f"{args.scenes} captions, {sum(is_right) / len(is_right):.3f} wholly right; {len(truths)} sentences")
    print(f"{'':21}{'ROC area':>10}{'nothing twice':>15}{'best half':>11}{'balanced':>10}{'tokens':>8}{'time':>7}")
    figures: dict[str, dict[str, float]] = {}
    base: FormResult | None = None
    for name, form in FORMS.items():
        result = judge_captions(captions, args.judge, form)
        base = base or result
        plain, ranked = (rank_captions(captions, result, repeats_last=last) for last in (False, True))
        believed = [(criterion.value or 0.0) > 0.5 for one in result.results for criterion in one.criteria]
        figures[name] = {
            "roc_area": roc_auc_score(is_right, plain),
            "roc_area_nothing_twice": roc_auc_score(is_right, ranked),
            "best_half_right": share_right(ranked, is_right),
            "balanced_accuracy": balanced_accuracy_score(truths, believed),
            "token_ratio": _count_tokens(result) / _count_tokens(base),
            "time_ratio": result.seconds / base.seconds,
        }
        area, nothing_twice, half, balanced, tokens, seconds = figures[name].values()
        print(f"{name:21}{area:10.3f}{nothing_twice:15.3f}{half:11.3f}{balanced:10.3f}{tokens:8.2f}{seconds:7.2f}")
    print(json.dumps({name: {key: round(value, 4) for key, value in row.items()} for name, row in figures.items()}))


def _count_tokens(form: FormResult) -> int:
    return sum(result.num_output_tokens or 0 for result in form.results)


if __name__ == "__main__":
    main()
