"""Trains the arms of RubiCap's comparison in miniature and prints how each stands to the truth. The last line is JSON.

From one supervised student: trained on for as many samples as RL draws (on its own teacher, on all teachers, on their
consensus), by GRPO with one overall mark of a judge, and by GRPO with rubrics. Each arm has several training seeds; one
that is already recorded is not trained again, so the table can be made over days. The mark is the share of a caption's
sentences that the judge believes; as it asks a model it has a quarter of the samples. No arm looks at the truth of a
scene (the student's vision tower has learnt from labelled scenes); the held-out world is seen by no training.

    python -m benchmarks.miniature FOLDER --student MODEL [--judge MODEL] [--seeds 3] [--arms NAME ...] [--shared]

FOLDER is made a run of manifests/scenes-grpo with further caption passes, and keeps the trained models. With --shared
most of the committee has one blind spot, which its consensus has too: what rubrics do then is shown, not hidden.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.held_out import JUDGE, Line, alt_text, captions, line, rounded, show, shown
from benchmarks.teachers import committee
from pipeline import config, starter
from pipeline.passes import select
from pipeline.run import Engines, Runner
from stages import scorers, train
from stages.scorers import Sample, rubric
from stages.teachers import TEACHERS, caption
from stages.training.settings import Config
from stages.writers import Evidence, claims, majority

RESULTS = Path(__file__).parent / "results" / "miniature.jsonl"
TABLES = ("plan.parquet", "shards", "image", "caption", "rubric")
SFT_BATCH = 32
MORE = """
[engines.consensus]
kind = "stages.teachers"
teacher = "consensus"

[engines.judge]
kind = "transformers"
model = "{judge}"
batch_size = 64

[score.mark]
kind = "judge"
engine = "judge"
rubric = "scenes"
captions = ["student"]
"""
TAUGHT = """
[caption.more-{name}]
recipe = "scenes"
engine = "{name}"
num_candidates = {num}
temperature = 1.0
"""


def supervised(base: Config, *taught: str) -> Config:
    """Word by word from these passes, for as many samples as the answers that GRPO draws."""
    return replace(
        base,
        method="sft",
        rewards={},
        captions=taught,
        batch_size=SFT_BATCH,
        steps=base.steps * base.batch_size // SFT_BATCH,
        learning_rate=3e-4,
        muon=Config.muon,
        compile=True,
        eval_images=256,
        eval_steps=1000,
        save_steps=500,
    )


def arms(base: Config) -> Mapping[str, Config]:
    every = tuple(f"more-{name}" for name in TEACHERS)
    return {
        "rubrics": base,
        "own teacher": supervised(base, "more-hasty"),
        "all teachers": supervised(base, *every),
        "on consensus": supervised(base, "more-consensus"),
        "one mark": replace(base, rewards={"mark": 1.0}, batch_size=base.batch_size // 4),
    }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training, measured."""

    arm: str
    shared: bool  # the committee has a common blind spot
    seed: int
    made_from: str  # digest of the student, the run and the settings
    num_scenes: int  # that it was measured on
    samples: int  # drawn in training
    minutes: float  # of the last attempt, where it was killed
    figures: Line
    rubric: float  # the mean rubric score of its captions


def begin(folder: Path, *, student: Path, judge: str, shared: bool) -> config.Run:
    """The run that all arms learn from, its tables made."""
    text = manifest().replace("../scenes-captioner-sft/model", str(student.absolute()))
    text += MORE.format(judge=Path(judge).absolute())
    text += "".join(TAUGHT.format(name=name, num=8 if name == "hasty" else 4) for name in [*TEACHERS, "consensus"])
    if shared:
        text = text.replace('kind = "stages.teachers"', 'kind = "stages.teachers"\nshared = true')
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.toml"
    if not file.exists():
        file.write_text(text)
    if file.read_text() != text:
        raise SystemExit(f"{file} is another comparison's: name a new folder")
    run = config.load(folder)
    starter.plan(run)
    runner = Runner(run=run)
    for stage in ("ingest", "caption", "rubric"):
        assert runner.execute(select(runner.passes, stage)).exit_code == 0, f"{stage} failed"
    return run


def digest(student: Path, settings: Config, *, shared: bool) -> str:
    """Of all that decides an arm but its seed, wherever its models and its run lie."""
    weights = hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()
    words = [tomllib.loads(manifest()), MORE, TAUGHT, shared]
    parts = [weights, words, {**config.stamped(settings), "model": "", "seed": 0}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def manifest() -> str:
    return (resources.files("manifests") / "scenes-grpo" / "run.toml").read_text()


def trained(run: config.Run, settings: Config, *, name: str) -> Path:
    """The model of an arm: trained in a folder of its own that shares the run's tables."""
    folder = run.folder / "arms" / name
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if not (folder / table).exists():
            (folder / table).symlink_to(run.folder / table)
    if not (folder / "model" / "README.md").exists():
        engines = Engines(run.engines)
        try:
            train.train(replace(run, folder=folder, sections={**run.sections, "train": {"": settings}}), engines)
        finally:
            engines.close_all_but(())
    return folder / "model"


@dataclass(frozen=True, kw_only=True)
class Rubrics:
    """Rubrics of the held-out scenes, written against the supervised student."""

    asked: Sequence[Any]

    @classmethod
    def of(cls, student: Sequence[str], *, shared: bool) -> Rubrics:
        evidence = [
            Evidence(
                key=str(index),
                teachers=tuple(caption(name, scene, 0, shared=shared) for name in TEACHERS),
                student=(text,),
                num_agree=majority(len(TEACHERS)),
                data=bytes,
            )
            for index, (scene, text) in enumerate(zip(shown(len(student)), student, strict=True))
        ]
        return cls(asked=[written.criteria for written in claims.write(evidence)])

    def score(self, said: Sequence[str]) -> float:
        samples = (
            Sample(key=str(index), candidate=0, text=text, data=bytes, asked=asked)
            for index, (text, asked) in enumerate(zip(said, self.asked, strict=True))
        )
        plugin = config.Plugin(kind="rubric", module=rubric, config=rubric.Config(rubric="held-out"))
        marks = scorers.load(plugin, run=None, field="benchmark").score(samples, {})
        return mean(mark.value for mark in marks if mark.value is not None)


def recorded() -> Iterator[Outcome]:
    if RESULTS.exists():
        for text in RESULTS.read_text().splitlines():
            values = json.loads(text)
            figures = Line(**{field.name: values.pop(field.name) for field in fields(Line)})
            yield Outcome(figures=figures, **values)


def record(outcome: Outcome) -> None:
    about = {name: value for name, value in vars(outcome).items() if name != "figures"}
    with RESULTS.open("a") as file:
        file.write(json.dumps({**about, **rounded(outcome.figures)}) + "\n")


def measured(model: str, num_scenes: int, rubrics: Rubrics) -> tuple[Line, float]:
    said = captions(model, num_scenes)
    return line(said), round(rubrics.score(said), 4)


def table(num_scenes: int, student: Sequence[str], rubrics: Rubrics, *, shared: bool) -> None:
    lines = committee(num_scenes, shared=shared)
    lines["alt text"] = line([alt_text(index) for index in range(num_scenes)])
    lines["supervised student"] = line(student)
    show(lines)
    print(f"rubric score of the supervised student: {rubrics.score(student):.3f}\n")
    names = [field.name for field in fields(Line)]
    print(f"{'arm':16}{'seeds':>6}{'samples':>9}" + "".join(f"{name:>18}" for name in names) + f"{'rubric':>16}")
    found = [outcome for outcome in recorded() if (outcome.shared, outcome.num_scenes) == (shared, num_scenes)]
    for arm in dict.fromkeys(outcome.arm for outcome in found):
        seeds = [outcome for outcome in found if outcome.arm == arm]
        shown_figures = [[getattr(outcome.figures, name) for outcome in seeds] for name in names]
        shown_figures.append([outcome.rubric for outcome in seeds])
        told = "".join(f"{mean(values):>10.3f} ± {spread(values):.3f}" for values in shown_figures)
        print(f"{arm:16}{len(seeds):6}{seeds[0].samples:9}{told}")
    best = [outcome.figures.f1 for outcome in found if outcome.arm == "rubrics"]
    if best:
        before, goal = lines["supervised student"].f1, lines["consensus"].f1
        print(f"GRPO with rubrics closes {(mean(best) - before) / (goal - before):.0%} of the gap to the consensus")
    print(json.dumps({name: rounded(one) for name, one in lines.items()}))


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--student", type=Path, required=True, help="the supervised model that every arm begins from")
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--arms", nargs="*", help="only these; by default all. None trained: only the table")
    parser.add_argument("--shared", action="store_true", help="most of the committee has one blind spot")
    args = parser.parse_args()
    run = begin(args.folder, student=args.student, judge=args.judge, shared=args.shared)
    student = captions(str(args.student), args.scenes)
    rubrics = Rubrics.of(student, shared=args.shared)
    base: Config = run.sections["train"][""]
    done = {(outcome.made_from, outcome.seed, outcome.num_scenes) for outcome in recorded()}
    for seed in range(args.seeds):
        for arm, settings in arms(base).items():
            made_from = digest(args.student, settings, shared=args.shared)
            if (made_from, seed, args.scenes) in done or (args.arms is not None and arm not in args.arms):
                continue
            start = time.monotonic()
            model = trained(run, replace(settings, seed=seed), name=f"{arm.replace(' ', '-')}-{seed}")
            minutes = round((time.monotonic() - start) / 60, 1)
            figures, score = measured(str(model), args.scenes, rubrics)
            samples = settings.steps * settings.batch_size
            about = Outcome(
                arm=arm,
                shared=args.shared,
                seed=seed,
                made_from=made_from,
                num_scenes=args.scenes,
                samples=samples,
                minutes=minutes,
                figures=figures,
                rubric=score,
            )
            record(about)
    table(args.scenes, student, rubrics, shared=args.shared)


if __name__ == "__main__":
    main()
