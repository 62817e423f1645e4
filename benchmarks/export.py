"""Measures each export form against `cp` of the same image files, in turns, on the same disk.

    python -m benchmarks.export [--images 2000] [--turns 3] [--forms webdataset parquet ...]

The images are noise, about 0.4 MB each; captions come from the engine `echo`. Both sides end with the data on the disk:
recap syncs each file, `cp` is followed by `sync -f`. Prints MB of images per second of each side and the ratio, medians
over the turns; forms without images have no ratio but their seconds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import config, plugins
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner

SIDE = 512  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=plugins.list_names("stages.exporters"))
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        photos, run = Path(folder) / "photos", Path(folder) / "run"
        megabytes = write_noise(photos, args.images) / 1e6
        make(prepare(run, photos, args.forms[0]), "all")
        seconds: dict[str, list[tuple[float, float]]] = {form: [] for form in args.forms}
        for turn in range(-1, args.turns):  # the first imports libraries
            for form in args.forms:
                pair = measure_form(run, form, photos, Path(folder) / "copy")
                if turn >= 0:
                    seconds[form].append(pair)
    rates = dict(report_rates(seconds, megabytes))
    print(json.dumps({"benchmark": "export", "images": args.images, "megabytes": megabytes, "forms": rates}))


def write_noise(folder: Path, num_images: int) -> int:
    """Writes JPEG files of noise; returns their bytes."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random, num_bytes = np.random.default_rng(0), 0
    for number in range(num_images):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "JPEG", quality=95)
        num_bytes += (folder / f"{number:06d}.jpg").write_bytes(file.getvalue())
    return num_bytes


def prepare(run: Path, photos: Path, form: str) -> Path:
    """Writes run.toml for one form; the plan too if there is none."""
    sections: dict[str, dict[str, Any]] = {
        "source": {"kind": "folder", "path": str(photos), "shard_size": 500},
        "engines.captioner": {"kind": "echo"},
        "caption.dense": {"recipe": "dense", "engine": "captioner"},
        "filter": {"rules": {}},
        "export": {"formats": [form]},
    }
    if not run.exists():
        init.create_run(run, sections)
    (run / "run.toml").write_text(init.render_manifest(sections))
    return run


def make(run: Path, stage: str) -> None:
    state = RunState(config.load(run), stale="redo")
    assert Runner(state).execute(select_passes(state.passes, stage)).exit_code == 0


def measure_form(run: Path, form: str, photos: Path, copy: Path) -> tuple[float, float]:
    """Wall seconds of an export in one form, and of `cp`."""
    shutil.rmtree(run / "export", ignore_errors=True)
    prepare(run, photos, form)
    exported = measure_seconds(lambda: make(run, "export"))
    shutil.rmtree(copy, ignore_errors=True)
    copied = measure_seconds(
        lambda: subprocess.run(["sh", "-c", f"cp -r '{photos}' '{copy}' && sync -f '{copy}'"], check=True)
    )
    return exported, copied


def measure_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report_rates(
    seconds: dict[str, list[tuple[float, float]]], megabytes: float
) -> Iterable[tuple[str, dict[str, float]]]:
    """Prints a line for each form; yields form -> figures."""
    for form, pairs in seconds.items():
        exported, ratio = median(one for one, _ in pairs), median(other / one for one, other in pairs)
        figures = {"seconds": round(exported, 3)}
        line = f"{form:12} {exported:7.2f} s"
        if getattr(plugins.load("stages.exporters", form), "NEEDS_IMAGES", True):
            figures["ratio"] = round(ratio, 3)
            line += f" {megabytes / exported:8.0f} MB/s, {ratio:.2f} of cp"
        print(line)
        yield form, figures


if __name__ == "__main__":
    main()
