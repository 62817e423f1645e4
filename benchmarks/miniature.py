"""Trains the arms of RubiCap's comparison in miniature and measures each by the truth. The last line is JSON.

All arms begin with one supervised student. Three continue supervised, with as many samples as GRPO generates: on its
own teacher, on all teachers, on their consensus. Four use GRPO: with a single score by a judge, with rubrics, with
both, and with rubrics in two rounds of half the steps. The single score is the share of a caption's sentences that the
judge confirms; because it calls a model, that arm has a quarter of the samples. Each arm has several training seeds;
recorded ones are skipped, so that the table can grow over days. No arm uses the truth of a scene (the student's vision
tower has learnt from labelled scenes), and no training uses the held-out world.

    python -m benchmarks.miniature                       # prints the recorded outcomes
    python -m benchmarks.miniature FOLDER [--student MODEL] [--judge MODEL] [--seeds 3] [--arms NAME ...] [--shared]
        [--manifest scenes-grpo-statements]

FOLDER becomes a run of the manifest, scenes-grpo unless another is named, with more caption passes, and keeps the
trained models. With --shared, most of the committee has the same blind spot, and so has its consensus.
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
from benchmarks.held_out import (
    AS_SET,
    JUDGE,
    ONE_TO_ONE,
    STUDENT,
    CaptionQuality,
    generate_captions,
    list_scenes,
    measure_captions,
    print_table,
    read_alt_text,
    round_figures,
)
from benchmarks.teachers import measure_teachers
from pipeline import config, plugins
from pipeline.commands import init
from pipeline.execution import whole_run
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.validation import Section
from stages import scorers, train
from stages.rubric_writers import Evidence, count_majority
from stages.rubric_writers.statements import PLACES
from stages.scenes.teachers import TEACHERS, answer_places, caption_scene
from stages.scorers import Sample, rubric
from stages.training import provenance
from stages.training.methods import grpo, sft
from stages.training.rounds import share_tables
from stages.training.settings import TrainConfig, read_section, stamp_config

RESULTS = Path(__file__).parent / "results" / "miniature.jsonl"
TABLES = ("plan.parquet", "image", "caption", "rubric")
MANIFEST = "scenes-grpo"
SFT_BATCH = 32
BEFORE = "student"  # the arm that is not trained on
MORE_SECTIONS = """
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
TEACHER_SECTION = """
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
    one_mark, both = (
        replace(base.options, config=replace(base.options.config, rewards=rewards))
        for rewards in ({"mark": 1.0}, {**base.options.config.rewards, "mark": 1.0})
    )
    return {
        BEFORE: None,
        "rubrics": base,
        "own teacher": make_sft_config(base, "more-hasty"),
        "all teachers": make_sft_config(base, *every),
        "on consensus": make_sft_config(base, "more-consensus"),
        "one mark": replace(base, options=one_mark, batch_size=base.batch_size // 4),
        "rubrics, mark": replace(base, options=both),
        "two rounds": replace(base, steps=base.steps // 2, rounds=2),
    }


def count_samples(settings: TrainConfig) -> int:
    return settings.rounds * settings.steps * settings.batch_size


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The measures of one training, or of the student that it began with."""

    arm: str
    student: str  # digest of its weights
    shared: bool  # the committee has a common blind spot
    seed: int
    made_from: str  # digest of the student, the run and the settings
    num_scenes: int  # held out, for the measures
    samples: int  # in training
    minutes: float  # of the last attempt, measuring included
    figures: CaptionQuality
    rubric: float  # the mean rubric score of its captions
    measure: str = AS_SET  # the first outcomes do not name it
    manifest: str = MANIFEST  # nor this


def create_run(folder: Path, *, student: Path, judge: str, shared: bool, manifest: str) -> config.Run:
    """The run whose tables all arms learn from."""
    text = render_manifest(student, manifest)
    text += MORE_SECTIONS.format(judge=Path(judge).absolute())
    text += "".join(
        TEACHER_SECTION.format(name=name, num=8 if name == "hasty" else 4) for name in [*TEACHERS, "consensus"]
    )
    if shared:
        text = text.replace('kind = "stages.scenes.teachers"', 'kind = "stages.scenes.teachers"\nshared = true')
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.toml"
    if not file.exists():
        file.write_text(text)
    if file.read_text() != text:
        raise SystemExit(f"{file} belongs to another comparison; choose a new folder")
    write_recipes(folder, manifest)
    run = config.load(folder)
    init.extend_plan(run)
    state = RunState(run)
    for stage in ("ingest", "caption", "rubric"):
        assert Runner(state).execute(select_passes(state.passes, stage)).exit_code == 0, f"{stage} failed"
    return run


def digest_arm(
    student: str, judge: str, settings: TrainConfig | None, *, shared: bool, manifest: str = MANIFEST
) -> str:
    """The digest of all that decides an arm and its figures except its seed and the place of its files."""
    versions = [module.VERSION for module in (load_writer(manifest), rubric, stages.rubric, provenance)]
    texts = [tomllib.loads(read_manifest(manifest)), MORE_SECTIONS, TEACHER_SECTION, shared, versions]
    uses_judge = settings is not None and "mark" in getattr(settings.options.config, "rewards", ())
    parts: list[Any] = [student, judge if uses_judge else "", texts, settings and _stamp_arm(settings)]
    if settings is not None and settings.rounds > 1:
        parts.append(settings.rounds)
    if recipes := read_recipes(manifest):
        parts.append(recipes)
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


def digest_weights(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:12]


def render_manifest(student: Path, manifest: str = MANIFEST) -> str:
    """The run.toml that begins with this model."""
    text = read_manifest(manifest)
    return text.replace(f'"{tomllib.loads(text)["train"]["model"]}"', f'"{student.absolute()}"')


def read_recipes(manifest: str) -> dict[str, str]:
    """The manifest's own recipes, by file name."""
    folder = resources.files("manifests") / manifest / "recipes"
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    return {file.name: file.read_text() for file in files}


def write_recipes(folder: Path, manifest: str) -> None:
    for name, text in read_recipes(manifest).items():
        (folder / "recipes").mkdir(exist_ok=True)
        (folder / "recipes" / name).write_text(text)


def load_writer(manifest: str) -> Any:
    """The writer of the manifest's rubrics."""
    name = tomllib.loads(read_manifest(manifest))["rubric"]["committee"]["writer"]
    return plugins.load("stages.rubric_writers", name)


def read_manifest(name: str) -> str:
    return (resources.files("manifests") / name / "run.toml").read_text()


def train_arm(run: config.Run, arm: str, settings: TrainConfig, seed: int) -> Path:
    """Trains the model of an arm, in a folder of its own that shares the run's tables; returns the model's folder."""
    folder = run.folder / "arms" / f"{arm.replace(' ', '-')}-{seed}"
    share_tables(folder, run.folder, TABLES)
    sections = {**run.sections, "train": {"": replace(settings, seed=seed)}}
    return whole_run.make_product(train, RunState(replace(run, folder=folder, sections=sections)))


@dataclass(frozen=True, kw_only=True)
class HeldOutRubrics:
    """Rubrics of the held-out scenes, written against the supervised student."""

    criteria: Sequence[Any]  # by scene

    @classmethod
    def write(cls, student: Sequence[str], *, shared: bool, manifest: str) -> HeldOutRubrics:
        places = tomllib.loads(read_manifest(manifest))["rubric"]["committee"].get("given", {}).keys() & {PLACES}
        evidence = [
            Evidence(
                key=str(index),
                teachers=tuple(caption_scene(name, scene, 0, shared=shared) for name in TEACHERS),
                student=(text,),
                num_agree=count_majority(len(TEACHERS)),
                texts={
                    field: tuple(answer_places(name, scene, 0, shared=shared) for name in TEACHERS) for field in places
                },
                data=bytes,
            )
            for index, (scene, text) in enumerate(zip(list_scenes(len(student)), student, strict=True))
        ]
        return cls(criteria=[written.criteria for written in load_writer(manifest).write(evidence)])

    def score(self, captions: Sequence[str]) -> float:
        samples = (
            Sample(key=str(index), candidate=0, text=text, data=bytes, rubric_criteria=criteria)
            for index, (text, criteria) in enumerate(zip(captions, self.criteria, strict=True))
        )
        plugin = config.Plugin(kind="rubric", module=rubric, config=rubric.Config(rubric="held-out"))
        results = scorers.load_scorer(plugin, run=None, field="benchmark").score(samples, {})
        return mean(result.value for result in results if result.value is not None)


def read_outcomes() -> Iterator[Outcome]:
    if RESULTS.exists():
        for text in RESULTS.read_text().splitlines():
            values = json.loads(text)
            figures = CaptionQuality(**{field.name: values.pop(field.name) for field in fields(CaptionQuality)})
            yield Outcome(figures=figures, **values)


def write_outcome(outcome: Outcome) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps({**_describe(outcome), **round_figures(outcome.figures)}) + "\n")


def _describe(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in vars(outcome).items() if name != "figures"}


def print_comparisons(outcomes: Sequence[Outcome]) -> None:
    """A table for each comparison: one student, one world."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for one in outcomes:
        key = (one.student, one.shared, one.num_scenes, one.measure, one.manifest)
        groups.setdefault(key, []).append(one)
    for group in groups.values():
        print_comparison(group)


def print_comparison(outcomes: Sequence[Outcome]) -> None:
    first = outcomes[0]
    world = "most of the committee share a blind spot" if first.shared else "blind spots of the committee differ"
    print(f"\nstudent {first.student}, {first.num_scenes} held-out scenes; {world}; measured by {first.measure}")
    qualities = measure_teachers(first.num_scenes, shared=first.shared, measure=first.measure)
    alt_texts = [read_alt_text(index) for index in range(first.num_scenes)]
    qualities["alt text"] = measure_captions(alt_texts, first.measure)
    print_table(qualities)
    names = [field.name for field in fields(CaptionQuality)]
    print(f"\n{'arm':16}{'seeds':>6}{'samples':>9}" + "".join(f"{name:>18}" for name in names) + f"{'rubric':>16}")
    made_from = {
        one.arm: one.made_from for one in outcomes
    }  # of the last one; outcomes of earlier settings are not shown
    by_arm = {
        arm: [one for one in outcomes if (one.arm, one.made_from) == (arm, now)] for arm, now in made_from.items()
    }
    for arm, seeds in by_arm.items():
        columns = [[getattr(one.figures, name) for one in seeds] for name in names]
        columns.append([one.rubric for one in seeds])
        figures = "".join(f"{mean(values):>10.3f} ± {measure_spread(values):.3f}" for values in columns)
        print(f"{arm:16}{len(seeds):6}{seeds[0].samples:9}{figures}")
    if by_arm.keys() >= {BEFORE, "rubrics"}:
        before, best = (mean(one.figures.f1 for one in by_arm[arm]) for arm in (BEFORE, "rubrics"))
        share = (best - before) / (qualities["consensus"].f1 - before)
        print(f"GRPO with rubrics closes {share:.0%} of the gap to the consensus")


def measure_spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where to train arms; without it, only print tables")
    parser.add_argument("--student", type=Path, default=STUDENT, help="the supervised model that every arm begins with")
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--arms", nargs="*", help="by default all")
    parser.add_argument("--manifest", default=MANIFEST, help="of the arms with rubrics")
    parser.add_argument("--shared", action="store_true", help="most of the committee has the same blind spot")
    args = parser.parse_args()
    if args.folder is not None:
        train_missing_arms(args)
    print_comparisons(list(read_outcomes()))
    print(json.dumps([{**_describe(one), **round_figures(one.figures)} for one in read_outcomes()]))


def train_missing_arms(args: argparse.Namespace) -> None:
    """Trains, measures and records the arms that are not recorded yet."""
    manifest: str = args.manifest
    run = create_run(args.folder, student=args.student, judge=args.judge, shared=args.shared, manifest=manifest)
    student, judge = digest_weights(args.student), digest_weights(Path(args.judge))
    before = generate_captions(str(args.student), args.scenes)
    rubrics = HeldOutRubrics.write(before, shared=args.shared, manifest=manifest)
    done = {(one.made_from, one.seed, one.num_scenes) for one in read_outcomes() if one.measure == ONE_TO_ONE}
    for seed in range(args.seeds):
        for arm, settings in make_arms(run.sections["train"][""]).items():
            made_from = digest_arm(student, judge, settings, shared=args.shared, manifest=manifest)
            chosen = arm == BEFORE or args.arms is None or arm in args.arms
            if (made_from, seed, args.scenes) in done or not chosen or (settings is None and seed > 0):
                continue
            start = time.monotonic()
            texts = before
            if settings is not None:
                texts = generate_captions(str(train_arm(run, arm, settings, seed)), args.scenes)
            outcome = Outcome(
                arm=arm,
                student=student,
                shared=args.shared,
                seed=seed,
                made_from=made_from,
                num_scenes=args.scenes,
                samples=count_samples(settings) if settings else 0,
                minutes=round((time.monotonic() - start) / 60, 1),
                figures=measure_captions(texts),
                rubric=round(rubrics.score(texts), 4),
                measure=ONE_TO_ONE,
                manifest=manifest,
            )
            write_outcome(outcome)


if __name__ == "__main__":
    main()
