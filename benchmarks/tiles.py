"""Measures what tiles bring: things that a captioner names only when it is shown a part of the picture, and how many of
them are there.

Each scene of a held-out world goes through one chain, which is a program because TOML does not know when two sentences
are about one thing: the captioner describes the picture and 2 x 2 tiles of it; sentences about things that the whole
picture's caption does not name are added without a size, which a tile cannot show; the judge that ships then decides
each of them with the whole picture in view, and each sentence of the whole picture's caption that is not about one
thing. What it is not sure of is left out, and so is a count of fewer things than are named. Printed are the share of
things named and the precision of the whole picture's caption, of all that was added, and of what the judge kept, by
one-to-one matching, with the differences from the whole picture's caption and their bootstrap 95 % intervals over
scenes. No stage reads the truth of a scene; only the figures do. The last line is JSON.

    python -m benchmarks.tiles FOLDER [--scenes 300] [--world 91001]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.held_out import bootstrap_interval
from benchmarks.worlds import TEST
from pipeline import config
from pipeline.commands import init
from pipeline.engines import Sampling
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.records import ChainedCaption, Image
from pipeline.sources.scenes import Scene, find_scene
from pipeline.storage import tables
from stages import rubrics
from stages.recipes import list_tiles
from stages.scenes.claims import is_exceeded, parse_caption
from stages.scenes.measure import Tally, measure_caption
from stages.text.answers import AnswerFormat
from stages.text.chains import Question, Questions, Subject

ENGINES = ("judge",)
VERSION = 1
LEAST_ADDED, LEAST_OTHER = 0.85, 0.5  # probability of "yes"; chosen on the first 150 scenes of worlds.CHOICE
PROMPT = "Describe the picture."
TILE = (Sampling(max_tokens=96), Sampling(temperature=0.5, max_tokens=96), Sampling(temperature=1.0, max_tokens=192))
SIZES = ("small ", "large ")
RECIPE = """program = "benchmarks.tiles"

[sampling]
temperature = 0.0
max_tokens = 192
ladder = [0.5, 0.8, 1.0]
"""
VARIANTS = ("whole", "merged blindly", "verified")


def ask(_: Subject) -> Questions:
    """The chain of one picture."""
    whole = yield Question(step="whole", prompt=PROMPT)
    tiles = yield [
        Question(step="tiles", prompt=PROMPT, item=tile.text, show="crop", box=tile.box, ladder=TILE)
        for tile in list_tiles(2, 2)
    ]
    things, others = divide_sentences(whole.text)
    checked = [*others, *find_added(whole.text, [tile.text for tile in tiles])]
    verdicts = yield [ask_judge(sentence) for sentence in checked]
    least = [*[LEAST_OTHER] * len(others), *[LEAST_ADDED] * (len(checked) - len(others))]
    kept = [
        sentence
        for sentence, verdict, bound in zip(checked, verdicts, least, strict=True)
        if verdict.probabilities and verdict.probabilities["yes"] >= bound
    ]
    return " ".join(drop_low_counts([*things, *kept]))


def divide_sentences(text: str) -> tuple[list[str], list[str]]:
    """The sentences about one thing each, and the others."""
    things, others = list[str](), list[str]()
    for sentence in parse_caption(text).sentences:
        is_thing = bool(sentence.claims) and sentence.claims[0].kind == "object"
        (things if is_thing else others).append(sentence.text)
    return things, others


def drop_low_counts(sentences: Sequence[str]) -> list[str]:
    """The sentences without counts of fewer things than the others name."""
    parsed = [parse_caption(sentence).sentences[0].claims for sentence in sentences]
    named = [claims for claims in parsed if claims and claims[0].kind == "object"]
    return [
        sentence
        for sentence, claims in zip(sentences, parsed, strict=True)
        if not (claims and claims[0].kind == "count" and is_exceeded(claims[0], named))
    ]


def find_added(whole: str, tiles: Sequence[str]) -> list[str]:
    """The sentences about things that the whole picture's caption does not name, one for each, without sizes."""
    named = {claim.about for claim in parse_caption(whole).claims if claim.kind == "object"}
    added = []
    for sentence in (one for tile in tiles for one in parse_caption(tile).sentences):
        if sentence.claims and sentence.claims[0].kind == "object" and sentence.claims[0].about not in named:
            named.add(sentence.claims[0].about)
            added.append(sentence.text.replace(SIZES[0], "").replace(SIZES[1], ""))
    return added


@cache
def load_rubric() -> rubrics.Rubric:
    return rubrics.load("scenes", run=None)


def ask_judge(sentence: str) -> Question:
    """The question that the judge was trained with."""
    rubric = load_rubric()
    return Question(
        step="checked",
        prompt=rubric.build_prompt(caption=sentence, sentence=sentence, alt_text=None),
        item=sentence,
        engine="judge",
        verdicts=("no", "yes"),
        answer_format=AnswerFormat(schema=rubric.schema, to_prose=lambda value: str(value["verdict"])),
        ladder=rubric.spec.sampling.rungs,
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One caption against the truth."""

    total: Tally
    num_named: int  # things of the picture whose name the caption has
    num_things: int


def measure_text(text: str, scene: Scene) -> Result:
    named = {claim.about for claim in parse_caption(text).claims if claim.kind == "object"}
    num_named = sum(thing.name in named for thing in scene.things)
    return Result(total=measure_caption(text, scene).total, num_named=num_named, num_things=len(scene.things))


def rebuild_texts(row: ChainedCaption) -> tuple[str, str, str]:
    """The caption of each variant, from the steps of a chain."""
    (whole,) = (step.text for step in row.steps if step.name == "whole")
    added = find_added(whole, [step.text for step in row.steps if step.name == "tiles"])
    return whole, " ".join([whole, *added]), row.text


def make_run(folder: Path, *, num_scenes: int, world: int) -> config.Run:
    if not folder.exists():
        model = {"kind": "transformers", "dtype": "float32"}
        parts: dict[str, dict[str, Any]] = {
            "source": {
                "kind": "scenes",
                "num_images": num_scenes,
                "seed": world,
                "broken_share": 0.0,
                "duplicate_share": 0.0,
            },
            "engines.captioner": {**model, "model": "scenes-captioner", "batch_size": 32},
            "engines.judge": {**model, "model": "scenes-judge", "batch_size": 32},
            "caption.tiles": {"recipe": "tiles", "engine": "captioner"},
        }
        (folder / "recipes").mkdir(parents=True)
        (folder / "recipes" / "tiles.toml").write_text(RECIPE)
        init.create_run(folder, parts)
    run = config.load(folder)
    for stage in ("ingest", "caption"):
        state = RunState(run)
        assert Runner(state).execute(select_passes(state.passes, stage)).exit_code == 0, f"{stage} failed"
    return run


def read_results(run: config.Run) -> list[tuple[Result, ...]]:
    """The results of the variants, for each scene whose chain is ok."""
    results = []
    for path in sorted((run.folder / "caption" / "tiles").glob("*.parquet")):
        images = {image.key: image for image in tables.read_rows(run.folder / "image" / path.name, Image)}
        rows = list(tables.read_rows(path, ChainedCaption))
        print(f"{path.stem}: {sum(row.status == 'ok' for row in rows)} of {len(rows)} chains are ok")
        for row in (row for row in rows if row.status == "ok"):
            scene = find_scene(images[row.key].source_key)
            results.append(tuple(measure_text(text, scene) for text in rebuild_texts(row)))
    return results


def summarise(results: Sequence[Result]) -> dict[str, float]:
    return {
        "named": sum(one.num_named for one in results) / sum(one.num_things for one in results),
        "precision": sum(one.total.num_true for one in results) / sum(one.total.num_stated for one in results),
        "f1": sum((one.total for one in results), Tally()).f1,
    }


def measure_change(results: Sequence[tuple[Result, ...]], variant: int, figure: str) -> tuple[float, float, float]:
    """The difference of a variant from the whole picture's caption, with its interval over scenes."""

    def change(drawn: Sequence[int]) -> float:
        after, before = (summarise([results[i][n] for i in drawn])[figure] for n in (variant, 0))
        return after - before

    return change(range(len(results))), *bootstrap_interval(change, len(results), draws=400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run; what is there already is not made again")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--world", type=int, default=TEST[0])
    args = parser.parse_args()
    run = make_run(args.folder, num_scenes=args.scenes, world=args.world)
    results = read_results(run)
    figures = {}
    for number, variant in enumerate(VARIANTS):
        figures[variant] = summarise([result[number] for result in results])
        print(f"{variant:16}" + "".join(f"  {name} {value:.3f}" for name, value in figures[variant].items()))
        for name in figures[variant] if number else ():
            change, low, high = measure_change(results, number, name)
            print(f"{'':16}  {name} {change:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    print(json.dumps({"benchmark": "tiles", "world": args.world, "scenes": len(results), "figures": figures}))


if __name__ == "__main__":
    main()
