"""How often the intervals and guarantees of `recap audit` hold, over simulated audits of captions of held-out scenes.

Four populations: what the demo's rule keeps, what a stricter rule keeps (no sentence twice, and a judge that is sure of
each), all captions, and what the demo's rule keeps of another captioner's. The audit knows the judge's scores as the
demo has them, or by probability (`soft`). A label is the truth of the scene (stages/scenes/measure.py), which nothing
else here reads; with wrong labels, a share of them is turned round. Each audit draws captions as the command does, and
estimates with its functions. Printed are, for each population and number of labels, the share of audits whose 95 %
interval covers the true precision and its median width, and both by labels alone; then, for each target of a guarantee,
how often a threshold is found, how often the captions above it are acceptable less often than promised, and what it
keeps. The last line is JSON.

Captions and scores are made once and kept in FOLDER.

    python -m benchmarks.coverage FOLDER [--scenes 2000] [--audits 1000]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.held_out import CAPTIONER, JUDGE, STUDENT, generate_captions, list_scenes, make_samples, open_engine
from pipeline.progress import say
from pipeline.storage.sentences import split_sentences
from stages.audit import PopulationAudit, build_features, collect_scores, drawing
from stages.audit.drawing import NUM_BANDS, DrawnCaption, DrawnScore
from stages.audit.intervals import Share, estimate_from_labels, estimate_share
from stages.audit.thresholds import find_threshold
from stages.scenes.measure import measure_caption
from stages.scorers import judge, text

NUM_LABELS = (100, 200, 300)
WRONG = (0.0, 0.05)  # shares of labels
TARGETS = (0.85, 0.9, 0.95)
CONFIDENCE = 0.9
CAPTIONERS = {"captioner": CAPTIONER, "student": str(STUDENT)}
JUDGES = ("judge", "soft")  # verdicts as written, as in the demo; by probability
STRICT = 0.95  # probability that the least certain sentence holds, by the soft judge


@dataclass(frozen=True, kw_only=True)
class JudgedCaption:
    """A caption of a held-out scene with its scores."""

    text: str
    scores: tuple[DrawnScore, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """A population with its truth."""

    kept: Sequence[DrawnCaption]
    refused: Sequence[DrawnCaption]
    truth: Mapping[str, bool]  # key -> wholly right

    @property
    def precision(self) -> float:
        return fmean(self.truth[caption.key] for caption in self.kept)


def _find_score(scores: Sequence[DrawnScore], name: str) -> DrawnScore:
    return next(score for score in scores if score.name == name)


def passes_demo_rule(caption: JudgedCaption) -> bool:
    """True if the demo's run.toml keeps a caption."""
    form, judged = (_find_score(caption.scores, name).value or 0.0 for name in ("form", "judge"))
    return form > 0.8 and judged >= 0.99


def passes_strict_rule(caption: JudgedCaption) -> bool:
    """True if, besides, no sentence occurs twice and the judge is sure of each."""
    sentences = [sentence.casefold() for sentence in split_sentences(caption.text)]
    is_sure = (_find_score(caption.scores, "soft").worst or 0.0) > STRICT
    return passes_demo_rule(caption) and is_sure and len(set(sentences)) == len(sentences)


POPULATIONS: Mapping[str, tuple[str, Callable[[JudgedCaption], bool]]] = {  # name -> captioner, rule
    "demo rule": ("captioner", passes_demo_rule),
    "strict rule": ("captioner", passes_strict_rule),
    "all captions": ("captioner", lambda _: True),
    "another captioner": ("student", passes_demo_rule),
}


def read_captions(folder: Path, name: str, *, num_scenes: int) -> list[JudgedCaption]:
    """The captions of a captioner, from `<folder>/NAME.jsonl`, which is extended if it has fewer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if len(lines) < num_scenes:
        say(f"{name}: captions and scores of {num_scenes - len(lines)} scenes")
        with path.open("a") as file:
            for caption in score_captions(folder, name, first=len(lines), num_scenes=num_scenes):
                file.write(json.dumps(asdict(caption)) + "\n")
                file.flush()
        lines = path.read_text().splitlines()
    rows = map(json.loads, lines[:num_scenes])
    return [JudgedCaption(text=row["text"], scores=tuple(DrawnScore(**one) for one in row["scores"])) for row in rows]


def score_captions(folder: Path, name: str, *, first: int, num_scenes: int) -> Iterator[JudgedCaption]:
    """Captions of the scenes from `first` on, with the scores of the demo and, as `soft`, those by probability."""
    path = folder / f"{name}.json"
    captions = json.loads(path.read_text()) if path.exists() else []
    if len(captions) < num_scenes:
        captions = [caption or "(nothing)" for caption in generate_captions(CAPTIONERS[name], num_scenes)]
        path.write_text(json.dumps(captions))
    form = text.prepare(text.Config(), run=None, field="benchmark")
    config = judge.Config(engine="judge", rubric="scenes", verdict="logprob")
    settings = judge.prepare(config, run=None, field="benchmark")
    engine = open_engine(JUDGE)
    try:
        judged = judge.score(islice(make_samples(captions), first, num_scenes), settings, {"judge": engine})
        formed = text.score(islice(make_samples(captions), first, num_scenes), form, {})
        for caption, on_form, soft in zip(captions[first:], formed, judged, strict=False):
            written = [float(one.verdict == "yes") for one in soft.criteria if one.verdict]
            values = {
                "form": (on_form.value, [one.value for one in on_form.criteria if one.value is not None]),
                "judge": (fmean(written) if written else None, written),
                "soft": (soft.value, [one.value for one in soft.criteria if one.value is not None]),
            }
            yield JudgedCaption(
                text=caption,
                scores=tuple(
                    DrawnScore(name=score, value=value, worst=min(parts, default=None))
                    for score, (value, parts) in values.items()
                ),
            )
    finally:
        engine.close()


def make_world(folder: Path, name: str, judge_name: str, *, num_scenes: int) -> World:
    """A population; of the judge's scores, only those of this name are known to the audit."""
    captioner, rule = POPULATIONS[name]
    captions = read_captions(folder, captioner, num_scenes=num_scenes)
    truth = {
        f"{index:012d}": measure_caption(caption.text, scene).is_wholly_right
        for index, (caption, scene) in enumerate(zip(captions, list_scenes(num_scenes), strict=True))
    }
    kept = [rule(caption) for caption in captions]
    drawn = [
        DrawnCaption(
            key=key,
            caption=captioner,
            candidate=0,
            text=caption.text,
            reason=None if is_kept else "rule",
            scores=tuple(score for score in caption.scores if score.name in ("form", judge_name)),
            size=kept.count(is_kept),
        )
        for key, caption, is_kept in zip(truth, captions, kept, strict=True)
    ]
    parts = [[caption for caption in drawn if (caption.reason is None) == part] for part in (True, False)]
    return World(kept=parts[0], refused=parts[1], truth=truth)


def draw_order(captions: Sequence[DrawnCaption], rng: np.random.Generator) -> np.ndarray:
    """The places of captions in the order of a draw: in proportion over bands of the score, as stages/audit/drawing.py
    has it, by random numbers instead of digests."""
    values = [fmean(score.value or 0.0 for score in caption.scores) for caption in captions]
    bands = np.minimum(NUM_BANDS - 1, np.floor(NUM_BANDS * np.array(values)))
    chance = rng.random(len(bands))
    order = np.lexsort((chance, bands))
    _, first, sizes = np.unique(bands[order], return_index=True, return_counts=True)
    which = np.repeat(np.arange(len(sizes)), sizes)
    ranks = (np.arange(len(bands)) - first[which] + 0.5) / sizes[which]
    return np.asarray(order[np.lexsort((chance[order], ranks))])


@dataclass(frozen=True, kw_only=True)
class IntervalFigures:
    """The intervals of simulated audits."""

    population: str
    judge: str
    num_labels: int
    wrong: float  # share of labels
    coverage: float  # share of audits
    width: float  # median
    plain_coverage: float  # of the intervals by labels alone
    plain_width: float


def simulate_intervals(
    world: World, *, name: str, judge_name: str, num_labels: int, wrong: float, num_audits: int
) -> IntervalFigures:
    features, rng = build_features(world.kept), np.random.default_rng(num_labels)
    truth, precision = np.array([world.truth[caption.key] for caption in world.kept]), world.precision
    pairs: list[tuple[Share, Share]] = []
    for _ in range(num_audits):
        drawn = draw_order(world.kept, rng)[:num_labels]
        labels = (truth[drawn] != (rng.random(len(drawn)) < wrong)).tolist()
        share = estimate_share(labels, features[drawn], features)
        pairs.append((share, estimate_from_labels(labels, len(world.kept))))
    coverage, plain_coverage = (
        fmean(one.low <= precision <= one.high for one in some) for some in zip(*pairs, strict=True)
    )
    width, plain_width = (median(one.width for one in some) for some in zip(*pairs, strict=True))
    return IntervalFigures(
        population=name,
        judge=judge_name,
        num_labels=num_labels,
        wrong=wrong,
        coverage=coverage,
        width=width,
        plain_coverage=plain_coverage,
        plain_width=plain_width,
    )


@dataclass(frozen=True, kw_only=True)
class GuaranteeFigures:
    """The thresholds that simulated audits of a target find."""

    population: str
    judge: str
    target: float
    num_labels: int  # drawn, half of them kept captions
    wrong: float  # share of labels
    found: float  # share of audits
    broken: float  # share of all audits
    kept: float  # mean share of captions, where one is found


def simulate_guarantee(
    world: World, *, name: str, judge_name: str, target: float, num_labels: int, wrong: float, num_audits: int
) -> GuaranteeFigures:
    rng = np.random.default_rng(num_labels)
    pool = [*world.kept, *world.refused]
    scores = np.array([_find_score(caption.scores, judge_name).value or 0.0 for caption in pool])
    truth = np.array([world.truth[caption.key] for caption in pool])
    found: list[float] = []  # shares kept
    num_broken = 0
    for _ in range(num_audits):
        audits = []
        for population, captions in zip(drawing.POPULATIONS, (world.kept, world.refused), strict=True):
            drawn = [captions[place] for place in draw_order(captions, rng)] if captions else []
            num = num_labels // 2 if world.refused else num_labels
            turned = rng.random(num) < wrong
            verdicts = {i: world.truth[caption.key] != turned[i] for i, caption in enumerate(drawn[:num])}
            audits.append(PopulationAudit(population=population, size=len(drawn), captions=drawn, verdicts=verdicts))
        guarantee = find_threshold(*collect_scores(audits, judge_name), precision=target, confidence=CONFIDENCE)
        if guarantee.threshold is not None:
            found.append(guarantee.kept)
            num_broken += truth[scores >= guarantee.threshold].mean() < target
    return GuaranteeFigures(
        population=name,
        judge=judge_name,
        target=target,
        num_labels=num_labels,
        wrong=wrong,
        found=len(found) / num_audits,
        broken=num_broken / num_audits,
        kept=fmean(found) if found else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--audits", type=int, default=1000)
    args = parser.parse_args()
    figures: list[IntervalFigures | GuaranteeFigures] = []
    print(f"{'population':20}{'judge':>7}{'captions':>10}{'right':>7}{'labels':>8}{'wrong':>7}"
          f"{'coverage':>10}{'width':>8}{'alone':>8}{'coverage':>10}")  # fmt: skip
    for name in POPULATIONS:
        for judge_name in JUDGES:
            world = make_world(args.folder, name, judge_name, num_scenes=args.scenes)
            for num_labels, wrong in product(NUM_LABELS, WRONG):
                one = simulate_intervals(
                    world, name=name, judge_name=judge_name, num_labels=num_labels, wrong=wrong, num_audits=args.audits
                )
                figures.append(one)
                print(f"{name:20}{judge_name:>7}{len(world.kept):10}{world.precision:7.3f}{num_labels:8}{wrong:7.2f}"
                      f"{one.coverage:10.3f}{one.width:8.3f}{one.plain_width:8.3f}"
                      f"{one.plain_coverage:10.3f}", flush=True)  # fmt: skip
    print(f"{'population':20}{'judge':>7}{'target':>8}{'labels':>8}{'wrong':>7}{'found':>8}{'broken':>8}{'keeps':>7}")
    for name, judge_name in product(POPULATIONS, JUDGES):
        world = make_world(args.folder, name, judge_name, num_scenes=args.scenes)
        for target, wrong in product(TARGETS, WRONG):
            two = simulate_guarantee(
                world, name=name, judge_name=judge_name, target=target, num_labels=NUM_LABELS[-1], wrong=wrong,
                num_audits=args.audits,
            )  # fmt: skip
            figures.append(two)
            print(f"{name:20}{judge_name:>7}{target:8.2f}{two.num_labels:8}{wrong:7.2f}"
                  f"{two.found:8.3f}{two.broken:8.3f}{two.kept:7.2f}", flush=True)  # fmt: skip
    print(json.dumps([{key: _round(value) for key, value in asdict(one).items()} for one in figures]))


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
