"""The demo: every stage on generated images with the built-in models, and a summary.

The module that knows the truth of the images is named by manifests/demo/demo.toml.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Literal

from pipeline import config, plugins
from pipeline.audits import describe_certificate, describe_judges
from pipeline.commands import init
from pipeline.commands.summary import format_yield
from pipeline.errors import RefusedError
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Outcome, Runner
from pipeline.progress import format_duration, format_rate
from pipeline.report import render
from pipeline.sources import scenes
from pipeline.storage import database, tables

EngineKind = Literal["transformers", "vllm"]

MANIFEST = resources.files("manifests") / "demo"


def create_demo(folder: Path, *, num_images: int | None = None, engine: EngineKind | None = None) -> config.Run:
    """Writes the demo's run.toml and plan into `folder`, unless they exist.

    Raises:
        ConfigError: the engine is not installed.
        RefusedError: the existing run has another engine.
    """
    file = folder / "run.toml"
    if engine == "vllm":
        plugins.load("pipeline.engines", engine).require_vllm()
    if not file.exists():
        with tables.open_atomic(file) as out:
            out.write(render_manifest(num_images=num_images, engine=engine).encode())
    run = config.load(folder)
    if engine and engine not in {plugin.kind for plugin in run.engines.values()}:
        raise RefusedError(f"{file} has another engine; use another directory for `recap demo DIR --engine {engine}`")
    init.extend_plan(run)
    return run


def render_manifest(*, num_images: int | None, engine: EngineKind | None) -> str:
    """The demo's run.toml with another number of images, or for another engine."""
    text = (MANIFEST / "run.toml").read_text(encoding="utf-8")
    if num_images is not None:
        text = re.sub(r"num_images = \d+", f"num_images = {num_images}", text)
    if engine == "vllm":
        text = text.replace('kind = "transformers"', 'kind = "vllm"')
        text = re.sub(r"batch_size = \d+", "kv_cache_gib = 1\nenforce_eager = true", text)
    return text


def run_demo(folder: Path, *, num_images: int | None, engine: EngineKind | None) -> tuple[Outcome, Iterator[str]]:
    """Runs every stage; returns the outcome and the lines of the summary."""
    start = time.monotonic()
    state = RunState(create_demo(folder, num_images=num_images, engine=engine))
    outcome = Runner(state).execute(state.passes)
    return outcome, format_summary(folder, None if outcome.skipped else time.monotonic() - start)


def format_summary(folder: Path, seconds: float | None) -> Iterator[str]:
    """
    Args:
        folder: of the run.
        seconds: that all of it took; None where some was made before.
    """
    run = config.load(folder)
    with database.connect(folder) as connection:
        ((num_images,),) = database.query_rows(connection, "SELECT count(*) FROM image")
        captions = list(database.query_rows(connection, CAPTIONS))
    yield from format_yield(run)
    if seconds is not None:
        rate = num_images / max(seconds, 1e-9)
        yield f"  {format_rate(rate)} images/s over all stages, {format_duration(seconds)} in all"
    yield ""
    yield "  accuracy against the known truth of the images, which no stage has seen:"
    yield f"  {'':14}{'precision':>12}{'recall':>12}{'false claims':>16}"
    yield from measure_accuracy(captions)
    yield ""
    render.write_report(run, judges=describe_judges(run), certificate=describe_certificate(run))
    for place, meaning in FILES.items():
        yield f"  {f'{folder}/{place}':28} {meaning}"
    yield ""
    yield "  next:"
    for command, meaning in NEXT:
        yield f"    {command.format(run=folder):58} # {meaning}"


def measure_accuracy(captions: Sequence[tuple[str, str | None, str, bool]]) -> Iterator[str]:
    """A line each for the alt text, for all captions and for the kept ones: means over texts.

    Args:
        captions: (source key, alt text, caption, kept).
    """
    truth = plugins.load("manifests", tomllib.loads((MANIFEST / "demo.toml").read_text(encoding="utf-8"))["truth"])
    groups = {
        "the alt text": [(key, alt or "") for key, alt, _, _ in captions],
        "all captions": [(key, text) for key, _, text, _ in captions],
        "kept captions": [(key, text) for key, _, text, kept in captions if kept],
    }
    for name, group in groups.items():
        counts = [truth.measure_caption(text, scenes.find_scene(key)).total for key, text in group]
        if counts:
            precision, recall = fmean(one.precision for one in counts), fmean(one.recall for one in counts)
            num_false = fmean(one.num_false for one in counts)
            yield f"  {name:14}{precision:>12.1%}{recall:>12.1%}{num_false:>11.2f} each"


FILES = {
    "report.html": "open in a browser: these numbers, and samples with their captions",
    "export/webdataset": "load with webdataset: wds.WebDataset(...)",
    "export/parquet": "load with Hugging Face: load_dataset('parquet', data_files=...)",
}
CAPTIONS = """
SELECT image.source_key, image.alt_text, caption.text, verdict.keep
FROM caption JOIN image USING (key) JOIN verdict ON verdict.key = caption.key AND verdict.caption = caption.name
AND verdict.candidate = caption.candidate WHERE caption.status = 'ok' ORDER BY ALL"""
NEXT = (
    ("recap status --run {run}", "the progress of every pass"),
    ("recap query worst --run {run}", "the captions with the lowest scores"),
    ('recap sql "FROM verdict LIMIT 5" --run {run}', "query the tables"),
    ("recap init runs/mine --source ~/photos", "start with your own images"),
)
