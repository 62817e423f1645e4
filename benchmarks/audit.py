"""Writes labels of a run over the scenes world, made from the truth; no command of recap reads it.

They take the role of a person's labels, so that an audit can be tried: a caption is acceptable when all that it says is
true and no thing is named twice (stages/scenes/measure.py).

    python -m benchmarks.audit RUN LABELS.jsonl [--num 200] [--wrong 0.05] [--seed 0]
    recap audit --run RUN --labels LABELS.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from pipeline import config
from pipeline.sources.scenes import find_scene
from pipeline.storage import database
from stages.audit.drawing import POPULATIONS, draw_captions
from stages.scenes.measure import measure_caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--num", type=int, default=200, help="captions, half of them kept")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of labels that are turned round")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, as for `recap audit`")
    args = parser.parse_args()
    rng = Random(args.seed)
    with database.connect_run(config.load(args.run)) as connection, args.labels.open("w") as file:
        keys = dict(database.query_rows(connection, "SELECT key, source_key FROM image"))
        for population in POPULATIONS:
            num_true, num = 0, 0
            for caption in draw_captions(connection, population, seed=args.seed, limit=args.num // 2):
                is_true = measure_caption(caption.text, find_scene(keys[caption.key])).is_wholly_right
                verdict = "acceptable" if is_true != (rng.random() < args.wrong) else "unacceptable"
                label = {"key": caption.key, "caption": caption.caption, "candidate": caption.candidate}
                label |= {"verdict": verdict, "labeller": "truth of the scenes", "text": caption.text}
                file.write(json.dumps(label) + "\n")
                num_true, num = num_true + is_true, num + 1
            print(f"{population}: {num} captions labelled from the truth, {num_true} of them wholly right")


if __name__ == "__main__":
    main()
