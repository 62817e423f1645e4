"""Held-out images, models and measures by the truth, for the benchmarks of the scenes world."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import mean

from benchmarks.worlds import CHOICE
from pipeline.engines import Engine, Request, transformers
from pipeline.sources import scenes
from pipeline.sources.scenes import Scene, draw_scene
from stages import recipes
from stages.scorers import Sample

SEED = CHOICE
ONE_TO_ONE, AS_SET = "one to one", "set of claims"  # how the claims of a caption are compared with the truth
CORPUS = scenes.Config(num_images=100_000, seed=SEED, broken_share=0.0, duplicate_share=0.0)
JUDGE, CAPTIONER = "stages/scenes/models/scenes-judge", "stages/scenes/models/scenes-captioner"
STUDENT = Path("stages/scenes/models/scenes-student")


@dataclass(frozen=True, kw_only=True)
class CaptionQuality:
    """Means over captions, by their claims compared with the truth."""

    precision: float
    recall: float
    f1: float
    hallucinations: float  # per caption
    words: float


def make_parser(description: str | None, *, num_scenes: int) -> argparse.ArgumentParser:
    """The options of a benchmark of a judge on a captioner's captions of held-out scenes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=num_scenes, help="whose captions the judge sees")
    parser.add_argument("--judge", default=JUDGE)
    parser.add_argument("--captioner", default=CAPTIONER)
    return parser


def list_scenes(num_scenes: int, *, world: int = SEED) -> list[Scene]:
    return [draw_scene(world, index) for index in range(num_scenes)]


def render_image(index: int, *, world: int = SEED) -> bytes:
    data = scenes.draw_sample(index, replace(CORPUS, seed=world)).data
    assert data is not None
    return data


def read_alt_text(index: int, *, world: int = SEED) -> str:
    return scenes.draw_sample(index, replace(CORPUS, seed=world)).alt_text or ""


def open_engine(model: str) -> Engine:
    return transformers.open(transformers.Config(model=model, batch_size=32))


def generate_captions(
    model: str, num_scenes: int, *, world: int = SEED, open_model: Callable[[str], Engine] = open_engine
) -> list[str]:
    """A captioner's captions of the held-out images, prompted by its own recipe."""
    recipe = recipes.load("scenes", run=None)
    rungs = recipe.spec.sampling.rungs[:1]

    def requests() -> Iterator[Request]:
        for index in range(num_scenes):
            yield Request(
                id=str(index),
                prompt=recipe.build_prompt(None).prompt,
                images=(render_image(index, world=world),),
                ladder=rungs,
                seed=index,
            )

    engine = open_model(model)
    try:
        return [reply.text for reply in engine.generate(requests())]
    finally:
        engine.close()


def make_samples(captions: Iterable[str]) -> Iterator[Sample]:
    """Captions of the first held-out scenes, to be scored."""
    for index, text in enumerate(captions):
        yield Sample(key=f"{index:012d}", candidate=0, text=text, data=partial(render_image, index))


def measure_captions(captions: Sequence[str], measure: str = ONE_TO_ONE, *, world: int = SEED) -> CaptionQuality:
    """The quality of one caption for each of the scenes 0, 1, ... of the held-out world.

    Args:
        measure: ONE_TO_ONE, or AS_SET, by which the first outcomes were recorded: it charges nothing for repetition.
        world: its seed.
    """
    from stages.scenes.claims import count_claims
    from stages.scenes.measure import measure_caption

    count = count_claims if measure == AS_SET else lambda text, scene: measure_caption(text, scene).total
    results = [count(text, draw_scene(world, index)) for index, text in enumerate(captions)]
    return CaptionQuality(
        precision=mean(r.precision for r in results),
        recall=mean(r.recall for r in results),
        f1=mean(r.f1 for r in results),
        hallucinations=mean(r.num_false for r in results),
        words=mean(len(text.split()) for text in captions),
    )


def print_table(figures: Mapping[str, CaptionQuality]) -> None:
    names = [field.name for field in fields(CaptionQuality)]
    print(f"{'':28}" + "".join(f"{name:>16}" for name in names))
    for name, quality in figures.items():
        print(f"{name:28}" + "".join(f"{value:16.3f}" for value in asdict(quality).values()))


def round_figures(quality: CaptionQuality) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(quality).items()}


def bootstrap_interval(
    measure: Callable[[Sequence[int]], float], size: int, *, draws: int = 1000
) -> tuple[float, float]:
    """The bootstrap 95 % interval of a figure over `size` items; `measure` is passed the numbers of those drawn."""
    rng = random.Random(0)
    values = sorted(measure(rng.choices(range(size), k=size)) for _ in range(draws))
    return values[int(0.025 * draws)], values[int(0.975 * draws)]
