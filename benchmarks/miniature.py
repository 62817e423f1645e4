"""Trains the arms of RubiCap's comparison in miniature and prints how each stands to the truth. The last line is JSON.

From one supervised student: trained on for as many samples as RL draws (on its own teacher, on all teachers, on their
consensus), by GRPO with one overall mark of a judge, and by GRPO with rubrics. Each arm has several training seeds; one
that is already recorded is not trained again, so the table can be made over days. The mark is the share of a caption's
sentences that the judge believes; as it asks a model it has a quarter of the samples. No arm looks at the truth of a
scene (the student's vision tower has learnt from labelled scenes); the held-out world is seen by no training.

    python -m benchmarks.miniature                       # the tables of what is recorded
    python -m benchmarks.miniature FOLDER [--student MODEL] [--judge MODEL] [--seeds 3] [--arms NAME ...] [--shared]

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

import stages.rubric
from benchmarks.held_out import JUDGE, STUDENT, Line, alt_text, captions, line, rounded, show, shown
from benchmarks.teachers import committee
from pipeline import config
from pipeline.commands import init
from pipeline.execution.engine_pool import EnginePool
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.validation import Section
from stages import scorers, train
from stages.rubric_writers import Evidence, claims, count_majority
from stages.scenes.teachers import TEACHERS, caption_scene
from stages.scorers import Sample, rubric
from stages.training import provenance
from stages.training.methods import grpo, sft
from stages.training.settings import TrainConfig, read_section, stamp_config

RESULTS = Path(__file__).parent / "results" / "miniature.jsonl"
TABLES = ("plan.parquet", "shards", "image", "caption", "rubric")
SFT_BATCH = 32
BEFORE = "student"  # the arm that is not trained on
MORE = """
[engines.consensus]
kind = "stages.scenes.teachers"
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


def make_sft_config(base: TrainConfig, *captions: str) -> TrainConfig:
    """Supervised training on these passes, with as many examples as the answers that GRPO generates."""
    keys = {
        "method": "sft",
        "model": str(base.model),
        "captions": list(captions),
        "batch_size": SFT_BATCH,
        "steps": base.steps * base.batch_size // SFT_BATCH,
        "learning_rate": 3e-4,
        "warmup_steps": base.warmup_steps,
        "decay": base.decay,
        "optimizer": base.optimizer,
        "freeze_vision": base.freeze_vision,
        "compile": True,
        "eval_images": 256,
        "eval_steps": 1000,
        "log_steps": base.log_steps,
        "save_steps": 500,
    }
    return read_section(Section(keys, file=Path("miniature"), field="train"))


def make_arms(base: TrainConfig) -> Mapping[str, TrainConfig | None]:
    """The training of each arm; None for the student, which is not trained on."""
    every = tuple(f"more-{name}" for name in TEACHERS)
    one_mark = replace(base.options, config=replace(base.options.config, rewards={"mark": 1.0}))
    return {
        BEFORE: None,
        "rubrics": base,
        "own teacher": make_sft_config(base, "more-hasty"),
        "all teachers": make_sft_config(base, *every),
        "on consensus": make_sft_config(base, "more-consensus"),
        "one mark": replace(base, options=one_mark, batch_size=base.batch_size // 4),
    }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training, measured; or the student that it began from."""

    arm: str
    student: str  # digest of its weights
    shared: bool  # the committee has a common blind spot
    seed: int
    made_from: str  # digest of the student, the run and the settings
    num_scenes: int  # that it was measured on
    samples: int  # drawn in training
    minutes: float  # of the last attempt where it was killed, measuring included
    figures: Line
    rubric: float  # the mean rubric score of its captions


def begin(folder: Path, *, student: Path, judge: str, shared: bool) -> config.Run:
    """The run that all arms learn from, its tables made."""
    text = of_student(student)
    text += MORE.format(judge=Path(judge).absolute())
    text += "".join(TAUGHT.format(name=name, num=8 if name == "hasty" else 4) for name in [*TEACHERS, "consensus"])
    if shared:
        text = text.replace('kind = "stages.scenes.teachers"', 'kind = "stages.scenes.teachers"\nshared = true')
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.toml"
    if not file.exists():
        file.write_text(text)
    if file.read_text() != text:
        raise SystemExit(f"{file} is another comparison's: name a new folder")
    run = config.load(folder)
    init.extend_plan(run)
    state = RunState(run)
    for stage in ("ingest", "caption", "rubric"):
        assert Runner(state).execute(select_passes(state.passes, stage)).exit_code == 0, f"{stage} failed"
    return run


def digest_arm(student: str, judge: str, settings: TrainConfig | None, *, shared: bool) -> str:
    """The digest of all that decides an arm and its figures except its seed and the place of its files."""
    versions = [module.VERSION for module in (claims, rubric, stages.rubric, provenance)]
    texts = [tomllib.loads(read_manifest()), MORE, TAUGHT, shared, versions]
    uses_judge = settings is not None and "mark" in getattr(settings.options.config, "rewards", ())
    parts = [student, judge if uses_judge else "", texts, settings and _stamp_arm(settings)]
    # Recorded outcomes name the module of the teachers as it was called when they were made.
    text = json.dumps(parts).replace("stages.scenes.teachers", "stages.teachers")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stamp_arm(settings: TrainConfig) -> dict[str, Any]:
    """The settings in the order of keys that recorded outcomes were digested in."""
    stamp = {**stamp_config(settings), "model": "", "seed": 0}
    common = list(config.stamped(settings))
    place = common.index("recipe") + 1
    order = [*common[:place], *config.stamped(sft.Config()), *common[place:], *config.stamped(grpo.Config())]
    return {name: stamp[name] for name in order}


def weights(model: Path) -> str:
    """The digest that a model is known by."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:12]


def of_student(student: Path) -> str:
    """The run.toml that begins from this model."""
    return read_manifest().replace('"scenes-student"', f'"{student.absolute()}"')


def read_manifest() -> str:
    return (resources.files("manifests") / "scenes-grpo" / "run.toml").read_text()


def trained(run: config.Run, arm: str, settings: TrainConfig, seed: int) -> Path:
    """The model of an arm: trained, unless it is done, in a folder of its own that shares the run's tables."""
    folder = run.folder / "arms" / f"{arm.replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if not (folder / table).exists():
            (folder / table).symlink_to((run.folder / table).absolute())
    engines, sections = EnginePool(run.engines), {**run.sections, "train": {"": replace(settings, seed=seed)}}
    try:
        return train.make(replace(run, folder=folder, sections=sections), engines)
    finally:
        engines.close_all_but(())


@dataclass(frozen=True, kw_only=True)
class Rubrics:
    """Rubrics of the held-out scenes, written against the supervised student."""

    asked: Sequence[Any]

    @classmethod
    def of(cls, student: Sequence[str], *, shared: bool) -> Rubrics:
        evidence = [
            Evidence(
                key=str(index),
                teachers=tuple(caption_scene(name, scene, 0, shared=shared) for name in TEACHERS),
                student=(text,),
                num_agree=count_majority(len(TEACHERS)),
                data=bytes,
            )
            for index, (scene, text) in enumerate(zip(shown(len(student)), student, strict=True))
        ]
        return cls(asked=[written.criteria for written in claims.write(evidence)])

    def score(self, said: Sequence[str]) -> float:
        samples = (
            Sample(key=str(index), candidate=0, text=text, data=bytes, rubric_criteria=asked)
            for index, (text, asked) in enumerate(zip(said, self.asked, strict=True))
        )
        plugin = config.Plugin(kind="rubric", module=rubric, config=rubric.Config(rubric="held-out"))
        marks = scorers.load_scorer(plugin, run=None, field="benchmark").score(samples, {})
        return mean(mark.value for mark in marks if mark.value is not None)


def recorded() -> Iterator[Outcome]:
    if RESULTS.exists():
        for text in RESULTS.read_text().splitlines():
            values = json.loads(text)
            figures = Line(**{field.name: values.pop(field.name) for field in fields(Line)})
            yield Outcome(figures=figures, **values)


def record(outcome: Outcome) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps({**_about(outcome), **rounded(outcome.figures)}) + "\n")


def _about(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in vars(outcome).items() if name != "figures"}


def tables(outcomes: Sequence[Outcome]) -> None:
    """A table for each comparison: one student, one world."""
    for key in dict.fromkeys((one.student, one.shared, one.num_scenes) for one in outcomes):
        table([one for one in outcomes if (one.student, one.shared, one.num_scenes) == key])


def table(outcomes: Sequence[Outcome]) -> None:
    about = outcomes[0]
    world = "most of the committee share a blind spot" if about.shared else "blind spots of the committee differ"
    print(f"\nstudent {about.student}, {about.num_scenes} held-out scenes; {world}")
    lines = committee(about.num_scenes, shared=about.shared)
    lines["alt text"] = line([alt_text(index) for index in range(about.num_scenes)])
    show(lines)
    names = [field.name for field in fields(Line)]
    print(f"\n{'arm':16}{'seeds':>6}{'samples':>9}" + "".join(f"{name:>18}" for name in names) + f"{'rubric':>16}")
    made_from = {one.arm: one.made_from for one in outcomes}  # the last one's: what was made otherwise is no more shown
    by_arm = {
        arm: [one for one in outcomes if (one.arm, one.made_from) == (arm, now)] for arm, now in made_from.items()
    }
    for arm, seeds in by_arm.items():
        columns = [[getattr(one.figures, name) for one in seeds] for name in names]
        columns.append([one.rubric for one in seeds])
        told = "".join(f"{mean(values):>10.3f} ± {spread(values):.3f}" for values in columns)
        print(f"{arm:16}{len(seeds):6}{seeds[0].samples:9}{told}")
    if by_arm.keys() >= {BEFORE, "rubrics"}:
        before, best = (mean(one.figures.f1 for one in by_arm[arm]) for arm in (BEFORE, "rubrics"))
        share = (best - before) / (lines["consensus"].f1 - before)
        print(f"GRPO with rubrics closes {share:.0%} of the gap to the consensus")


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where arms are trained; without it only tables are printed"
    )
    parser.add_argument("--student", type=Path, default=STUDENT, help="the supervised model that every arm begins from")
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--arms", nargs="*", help="only these; by default all")
    parser.add_argument("--shared", action="store_true", help="most of the committee has one blind spot")
    args = parser.parse_args()
    if args.folder is not None:
        compare(args)
    tables(list(recorded()))
    print(json.dumps([{**_about(one), **rounded(one.figures)} for one in recorded()]))


def compare(args: argparse.Namespace) -> None:
    """Trains and records the arms that are not recorded yet."""
    run = begin(args.folder, student=args.student, judge=args.judge, shared=args.shared)
    student, judge = weights(args.student), weights(Path(args.judge))
    before = captions(str(args.student), args.scenes)
    rubrics = Rubrics.of(before, shared=args.shared)
    done = {(one.made_from, one.seed, one.num_scenes) for one in recorded()}
    for seed in range(args.seeds):
        for arm, settings in make_arms(run.sections["train"][""]).items():
            made_from = digest_arm(student, judge, settings, shared=args.shared)
            asked = arm == BEFORE or args.arms is None or arm in args.arms
            if (made_from, seed, args.scenes) in done or not asked or (settings is None and seed > 0):
                continue
            start = time.monotonic()
            said = before if settings is None else captions(str(trained(run, arm, settings, seed)), args.scenes)
            outcome = Outcome(
                arm=arm,
                student=student,
                shared=args.shared,
                seed=seed,
                made_from=made_from,
                num_scenes=args.scenes,
                samples=settings.steps * settings.batch_size if settings else 0,
                minutes=round((time.monotonic() - start) / 60, 1),
                figures=line(said),
                rubric=round(rubrics.score(said), 4),
            )
            record(outcome)


if __name__ == "__main__":
    main()
