"""Prints how the simulated teachers and their consensus stand to the truth. The last line is JSON.

python -m benchmarks.teachers [NUM_SCENES]
"""

from __future__ import annotations

import json
import sys

from benchmarks.held_out import Line, line, rounded, show, shown
from stages.scenes.teachers import TEACHERS, caption_scene, merge_captions


def committee(num_scenes: int, *, shared: bool = False) -> dict[str, Line]:
    said = {name: [caption_scene(name, scene, 0, shared=shared) for scene in shown(num_scenes)] for name in TEACHERS}
    said["consensus"] = [merge_captions(captions) for captions in zip(*said.values(), strict=True)]
    return {name: line(captions) for name, captions in said.items()}


def main() -> None:
    lines = committee(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    show(lines)
    print(json.dumps({name: rounded(one) for name, one in lines.items()}))


if __name__ == "__main__":
    main()
