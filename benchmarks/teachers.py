"""Prints how the simulated teachers and their consensus stand to the truth.

python benchmarks/teachers.py [NUM_SCENES]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from pipeline.sources.scenes import scene
from stages.claims import measure
from stages.teachers import TEACHERS, caption, consensus

SEED = 90_001  # a world that nothing is trained on


@dataclass(frozen=True, kw_only=True)
class Line:
    precision: float
    recall: float
    f1: float
    hallucinations: float  # per caption
    words: float


def line(captions: list[str]) -> Line:
    """Means over scenes 0, 1, ... of the held-out world."""
    results = [measure(text, scene(SEED, index)) for index, text in enumerate(captions)]
    mean = 1 / len(captions)
    return Line(
        precision=mean * sum(r.precision for r in results),
        recall=mean * sum(r.recall for r in results),
        f1=mean * sum(r.f1 for r in results),
        hallucinations=mean * sum(r.num_hallucinations for r in results),
        words=mean * sum(len(text.split()) for text in captions),
    )


def main() -> None:
    num_scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    said = {name: [caption(name, scene(SEED, index), 0) for index in range(num_scenes)] for name in TEACHERS}
    said["consensus"] = [consensus(captions) for captions in zip(*said.values(), strict=True)]
    lines = {name: line(captions) for name, captions in said.items()}
    print(f"{'':12}" + "".join(f"{name:>16}" for name in asdict(lines["consensus"])))
    for name, one in lines.items():
        print(f"{name:12}" + "".join(f"{value:16.3f}" for value in asdict(one).values()))
    print(json.dumps({name: {k: round(v, 4) for k, v in asdict(one).items()} for name, one in lines.items()}))


if __name__ == "__main__":
    main()
