"""Compares the simulated teachers and their consensus with the truth. The last line is JSON.

python -m benchmarks.teachers [NUM_SCENES]
"""

from __future__ import annotations

import json
import sys

from benchmarks.held_out import (
    ONE_TO_ONE,
    SEED,
    CaptionQuality,
    list_scenes,
    measure_captions,
    print_table,
    round_figures,
)
from stages.scenes.teachers import TEACHERS, caption_scene, merge_captions


def measure_teachers(
    num_scenes: int, *, shared: bool = False, measure: str = ONE_TO_ONE, world: int = SEED
) -> dict[str, CaptionQuality]:
    scenes = list_scenes(num_scenes, world=world)
    captions = {name: [caption_scene(name, scene, 0, shared=shared) for scene in scenes] for name in TEACHERS}
    captions["consensus"] = [merge_captions(group) for group in zip(*captions.values(), strict=True)]
    return {name: measure_captions(some, measure, world=world) for name, some in captions.items()}


def main() -> None:
    figures = measure_teachers(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print_table(figures)
    print(json.dumps({name: round_figures(quality) for name, quality in figures.items()}))


if __name__ == "__main__":
    main()
