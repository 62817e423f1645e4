"""Compares the forms of a judge's verdicts on captions of held-out scenes: as written, and by probability.

For each form: how well the score ranks wholly right captions before the others (area under the ROC curve), how many of
the best half are wholly right, the balanced accuracy on the captions' sentences, and output tokens and seconds beside
those of the written form. The score is the product over sentences; "nothing twice" ranks captions that repeat a
sentence last. Then, for the best half of all and the best half of the captions with as many sentences, as `[filter]
balance` keeps: how many are wholly right, and how much of the corpus's share of crowded pictures is left. The last line
is JSON.

    python -m benchmarks.verdicts [--scenes 1000] [--judge MODEL] [--captioner MODEL]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks.held_out import CAPTIONER, JUDGE, generate_captions, list_scenes, make_samples, open_engine
from pipeline.sources import scenes as scenes_source
from pipeline.storage.sentences import split_sentences
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import answer_statement
from stages.scorers import ScoreResult, judge

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


def find_best_half(scores: Sequence[float], groups: Sequence[int] | None = None) -> list[int]:
    """The captions with the best scores, as many from each group as it has below its median."""
    members = defaultdict[int, list[int]](list)
    for i in range(len(scores)):
        members[groups[i] if groups else 0].append(i)
    ranked = (sorted(group, key=lambda i: -scores[i]) for group in members.values())
    return [i for group in ranked for i in group[: len(group) // 2]]


def measure_share(flags: Sequence[bool], chosen: Sequence[int]) -> float:
    return sum(flags[i] for i in chosen) / len(chosen)


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
    rankings: dict[str, list[float]] = {}
    num_sentences = [len(split_sentences(text)) for text in captions]
    for name, form in FORMS.items():
        result = judge_captions(captions, args.judge, form)
        base = base or result
        plain, ranked = (rank_captions(captions, result, repeats_last=last) for last in (False, True))
        rankings[name] = ranked
        believed = [(criterion.value or 0.0) > 0.5 for one in result.results for criterion in one.criteria]
        figures[name] = {
            "roc_area": roc_auc_score(is_right, plain),
            "roc_area_nothing_twice": roc_auc_score(is_right, ranked),
            "best_half_right": measure_share(is_right, find_best_half(ranked)),
            "balanced_accuracy": balanced_accuracy_score(truths, believed),
            "token_ratio": _count_tokens(result) / _count_tokens(base),
            "time_ratio": result.seconds / base.seconds,
        }
        area, nothing_twice, half, balanced, tokens, seconds = figures[name].values()
        print(f"{name:21}{area:10.3f}{nothing_twice:15.3f}{half:11.3f}{balanced:10.3f}{tokens:8.2f}{seconds:7.2f}")
    is_crowded = [len(scene.things) >= scenes_source.CROWD for scene in scenes]
    corpus = sum(is_crowded) / len(is_crowded)
    print(f"{scenes_source.CROWD} things or more: {corpus:.3f} of the pictures; of their share, left in the best half:")
    for name, ranked in rankings.items():
        for label, groups in (("of all", None), ("of as many sentences", num_sentences)):
            best = find_best_half(ranked, groups)
            right, left = measure_share(is_right, best), measure_share(is_crowded, best) / corpus
            key = label.replace(" ", "_")
            figures[name] |= {f"right_{key}": right, f"crowded_left_{key}": left}
            print(f"{name:21}{label:22} {len(best)} captions, {right:.3f} wholly right, {left:.2f} of the share")
    print(json.dumps({name: {key: round(value, 4) for key, value in row.items()} for name, row in figures.items()}))


def _count_tokens(form: FormResult) -> int:
    return sum(result.num_output_tokens or 0 for result in form.results)


if __name__ == "__main__":
    main()
