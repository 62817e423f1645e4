"""What the benchmarks of the scenes world share: held-out pictures, who is asked, and figures by the truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from pipeline.engines import Engine, Request, transformers
from pipeline.sources import scenes
from pipeline.sources.scenes import Scene, draw_scene
from stages import recipes

SEED = 90_001  # a world that nothing is trained on
CORPUS = scenes.Config(num_images=100_000, seed=SEED, broken_share=0.0, duplicate_share=0.0)
JUDGE, CAPTIONER = "stages/models/scenes-judge", "stages/models/scenes-captioner"
STUDENT = Path("stages/models/scenes-student")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Means over captions."""

    precision: float
    recall: float
    f1: float
    hallucinations: float  # per caption
    words: float


def shown(num_scenes: int) -> list[Scene]:
    return [draw_scene(SEED, index) for index in range(num_scenes)]


def picture(index: int) -> bytes:
    data = scenes.draw_sample(index, CORPUS).data
    assert data is not None
    return data


def alt_text(index: int) -> str:
    return scenes.draw_sample(index, CORPUS).alt_text or ""


def engine(model: str) -> Engine:
    return transformers.open(transformers.Config(model=model, batch_size=32))


def captions(model: str, num_scenes: int) -> list[str]:
    """What a captioner says of the held-out pictures, asked by its own recipe."""
    recipe = recipes.load("scenes", run=None)
    rungs = recipe.spec.sampling.rungs[:1]

    def requests() -> Iterator[Request]:
        for index in range(num_scenes):
            yield Request(
                id=str(index),
                prompt=recipe.build_prompt(None).prompt,
                images=(picture(index),),
                ladder=rungs,
                seed=index,
            )

    asked = engine(model)
    try:
        return [reply.text for reply in asked.generate(requests())]
    finally:
        asked.close()


def line(said: Sequence[str]) -> Line:
    """Figures of one caption for each of the scenes 0, 1, ... of the held-out world."""
    from stages.scenes.claims import count_claims

    results = [count_claims(text, draw_scene(SEED, index)) for index, text in enumerate(said)]
    return Line(
        precision=mean(r.precision for r in results),
        recall=mean(r.recall for r in results),
        f1=mean(r.f1 for r in results),
        hallucinations=mean(r.num_hallucinations for r in results),
        words=mean(len(text.split()) for text in said),
    )


def show(lines: dict[str, Line]) -> None:
    names = list(asdict(next(iter(lines.values()))))
    print(f"{'':28}" + "".join(f"{name:>16}" for name in names))
    for name, one in lines.items():
        print(f"{name:28}" + "".join(f"{value:16.3f}" for value in asdict(one).values()))


def rounded(one: Line) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(one).items()}


def interval(measured: Callable[[Sequence[int]], float], size: int, *, draws: int = 1000) -> tuple[float, float]:
    """The bootstrap 95 % interval of a figure over `size` items: `measured` gets the items drawn."""
    rng = random.Random(0)
    values = sorted(measured(rng.choices(range(size), k=size)) for _ in range(draws))
    return values[int(0.025 * draws)], values[int(0.975 * draws)]
