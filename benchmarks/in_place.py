"""The bytes that a folder run writes before its export, as a share of its corpus.

python -m benchmarks.in_place                     # 200 MB of JPEGs the size of photographs
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np

from pipeline import config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of the corpus")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recap-in-place-") as folder:
        print(json.dumps({"benchmark": "in_place", **measure_run(Path(folder), num_bytes=options.megabytes * 10**6)}))


def measure_run(folder: Path, *, num_bytes: int) -> dict[str, float]:
    """Runs all stages but export with the engine `echo`."""
    photos, run = folder / "photos", folder / "run"
    photos.mkdir()
    num_images = write_photographs(photos, num_bytes)
    source = {"kind": "folder", "path": str(photos), "shard_size": 100}
    init.create_run(run, init.default_sections(source, engine="echo", model=None))
    state = RunState(config.load(run))
    passes = [p for p in select_passes(state.passes, "all") if p.stage != "export"]
    outcome = Runner(state).execute(passes)
    assert outcome.exit_code == 0, outcome.failures
    written, corpus = measure_folder(run), measure_folder(photos)
    return {"images": num_images, "corpus_bytes": corpus, "run_bytes": written, "share": round(written / corpus, 5)}


def write_photographs(folder: Path, num_bytes: int) -> int:
    """Writes noisy 1600 x 1200 JPEGs until there are enough bytes; returns their number."""
    from PIL import Image

    noise, written, number = np.random.default_rng(0), 0, 0
    while written < num_bytes:
        pixels = noise.integers(0, 256, (300, 400, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((1600, 1200), Image.Resampling.NEAREST)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=90)
        (folder / f"{number:06d}.jpg").write_bytes(out.getvalue())
        written, number = written + out.tell(), number + 1
    return number


def measure_folder(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
