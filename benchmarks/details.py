"""What a captioner says wrongly, by number of things in the picture and by kind of claim, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.sources.scenes import draw_scene
from stages.scenes.claims import KINDS
from stages.scenes.measure import Measure, measure_caption

DRAWS = 1000  # of the bootstrap
# Each figure is a ratio of sums over captions: these are the parts of one caption.
FIGURES: Mapping[str, Callable[[Measure], tuple[float, float]]] = {
    "f1": lambda one: (one.total.f1, 1),
    "false claims": lambda one: (one.total.num_false, 1),
    "a thing twice": lambda one: (one.names_twice, 1),
    "a sentence twice": lambda one: (one.repeats_sentence, 1),
    "relations said": lambda one: (one.kinds["relation"].num_stated, one.kinds["relation"].num_facts),
    "said rightly": lambda one: (one.kinds["relation"].num_true, one.kinds["relation"].num_stated),
    "wholly right": lambda one: (one.is_wholly_right, 1),
}
GROUPS = {"all": (1, 6), "1 thing": (1, 1), "2 things": (2, 2), "3 things": (3, 3), "4 to 6 things": (4, 6)}


def print_details(name: str, captions: Sequence[str], *, world: int) -> None:
    """Prints the tables of one captioner's captions of the scenes 0, 1, ... of a world."""
    scenes = [draw_scene(world, index) for index in range(len(captions))]
    measures = [measure_caption(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    print(f"\n{name}, world {world}\n{'':14}{'scenes':>7}" + "".join(f"{figure:>22}" for figure in FIGURES))
    for group, (least, most) in GROUPS.items():
        some = [one for one, scene in zip(measures, scenes, strict=True) if least <= len(scene.things) <= most]
        if some:
            cells = "".join(f"{format_figure(some, parts):>22}" for parts in FIGURES.values())
            print(f"{group:14}{len(some):7}{cells}")
    print(f"{'':14}" + "".join(f"{kind:>12}" for kind in KINDS))
    for label in ("precision", "recall"):
        totals = [sum((one.kinds[kind] for one in measures[1:]), measures[0].kinds[kind]) for kind in KINDS]
        print(f"{label:14}" + "".join(f"{getattr(total, label):12.3f}" for total in totals))


def format_figure(measures: Sequence[Measure], parts: Callable[[Measure], tuple[float, float]]) -> str:
    """A figure with its interval, as in `0.701 (0.688-0.714)`; a dash where nothing can be counted."""
    over, under = np.array([parts(one) for one in measures], float).T
    if not under.sum():
        return "-"
    low, high = bootstrap_ratio(over, under)
    return f"{over.sum() / under.sum():.3f} ({low:.3f}-{high:.3f})"


def bootstrap_ratio(over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    """The bootstrap 95 % interval of a ratio of sums over scenes."""
    drawn = np.random.default_rng(0).integers(len(over), size=(DRAWS, len(over)))
    above, below = over[drawn].sum(1), under[drawn].sum(1)
    low, high = np.quantile(above[below > 0] / below[below > 0], (0.025, 0.975))
    return float(low), float(high)
