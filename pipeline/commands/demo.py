"""Decides what a newcomer sees first: the whole pipeline on the embedded default, and a summary in plain words."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Literal

from pipeline import config, plugins
from pipeline.commands import init
from pipeline.errors import RefusedError
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Outcome, Runner
from pipeline.progress import format_count, format_duration
from pipeline.report import render
from pipeline.sources import scenes
from pipeline.storage import database, tables

EngineKind = Literal["transformers", "vllm"]

STEPS = {
    "images": "in the corpus",
    "usable": "decoded; the others are broken, empty or no images",
    "captioned": "have a caption that finished and does not loop",
    "kept": "passed every rule of the filter",
    "exported": "samples of the training set",
}


def create_demo(folder: Path, *, num_images: int | None = None, engine: EngineKind | None = None) -> config.Run:
    """Writes the demo's run.toml and plan into `folder`, unless they are there.

    Raises:
        ConfigError: the engine is not installed; the message says what to type.
        RefusedError: the run that is there has another engine.
    """
    file = folder / "run.toml"
    if engine == "vllm":
        plugins.load("pipeline.engines", engine).require_vllm()
    if not file.exists():
        with tables.open_atomic(file) as out:
            out.write(render_manifest(num_images=num_images, engine=engine).encode())
    run = config.load(folder)
    if engine and engine not in {plugin.kind for plugin in run.engines.values()}:
        raise RefusedError(f"{file} has another engine; `recap demo DIR --engine {engine}` wants a folder of its own")
    init.extend_plan(run)
    return run


def render_manifest(*, num_images: int | None, engine: EngineKind | None) -> str:
    """The demo's run.toml, as it ships or changed so."""
    text = (resources.files("manifests") / "demo" / "run.toml").read_text(encoding="utf-8")
    if num_images is not None:
        text = re.sub(r"num_images = \d+", f"num_images = {num_images}", text)
    if engine == "vllm":
        text = text.replace('kind = "transformers"', 'kind = "vllm"')
        text = re.sub(r"batch_size = \d+", "kv_cache_gib = 1\nenforce_eager = true", text)
    return text


def run_demo(folder: Path, *, num_images: int | None, engine: EngineKind | None) -> tuple[Outcome, Iterator[str]]:
    """Runs every stage; returns what it did, and the summary line by line."""
    start = time.monotonic()
    state = RunState(create_demo(folder, num_images=num_images, engine=engine))
    outcome = Runner(state).execute(state.passes)
    return outcome, format_summary(folder, time.monotonic() - start)


def format_summary(folder: Path, seconds: float) -> Iterator[str]:
    with database.connect(folder) as connection:
        steps = dict(database.query_rows(connection, f"SELECT step, images FROM ({database.read_query('yield')})"))
        reasons = list(database.query_rows(connection, REFUSALS))
        said = list(database.query_rows(connection, SAID))
    yield ""
    for step, meaning in STEPS.items():
        yield f"  {step:10}{format_count(steps[step]):>7}   {meaning}"
    yield ""
    if reasons:
        yield "  refused:   " + ", ".join(f"{reason} ({format_count(num)})" for reason, num in reasons)
    rate = steps["images"] / max(seconds, 1e-9)
    yield f"  {format_count(rate)} images/s over all stages, {format_duration(seconds)} in all"
    yield ""
    yield "  how right it is, by the known truth of the scenes, which nothing above has looked at:"
    yield f"  {'':14}{'claims that are true':>22}{'of what could be said':>24}{'claims that are false':>24}"
    yield from _rightness(said)
    yield ""
    render.write_report(config.load(folder))
    for place, meaning in FILES.items():
        yield f"  {f'{folder}/{place}':28} {meaning}"
    yield ""
    yield "  next:"
    for command, meaning in NEXT:
        yield f"    {command.format(run=folder):58} # {meaning}"


def _rightness(said: Sequence[tuple[str, str | None, str, bool]]) -> Iterator[str]:
    """Of the alt text, of all captions and of those that were kept: precision, recall and hallucinations a caption."""
    measure = plugins.load("stages.scenes", "claims").count_claims
    groups = {
        "the alt text": [(key, alt or "") for key, alt, _, _ in said],
        "all captions": [(key, text) for key, _, text, _ in said],
        "kept captions": [(key, text) for key, _, text, keep in said if keep],
    }
    for name, group in groups.items():
        found = [measure(text, scenes.find_scene(key)) for key, text in group]
        if found:
            true, told = fmean(one.precision for one in found), fmean(one.recall for one in found)
            false = fmean(one.num_hallucinations for one in found)
            yield f"  {name:14}{true:>22.1%}{told:>24.1%}{false:>16.2f} each"


FILES = {
    "report.html": "open it in a browser: all of this, and samples with their captions",
    "export/webdataset": "for webdataset: wds.WebDataset(...)",
    "export/parquet": "for Hugging Face: load_dataset('parquet', data_files=...)",
}
REFUSALS = "SELECT reason, count(*) AS num FROM verdict WHERE NOT keep GROUP BY reason ORDER BY num DESC, reason"
SAID = """
SELECT image.source_key, image.alt_text, caption.text, verdict.keep
FROM caption JOIN image USING (key) JOIN verdict ON verdict.key = caption.key AND verdict.caption = caption.name
AND verdict.candidate = caption.candidate WHERE caption.status = 'ok' ORDER BY ALL"""
NEXT = (
    ("recap status --run {run}", "where every pass stands"),
    ("recap query worst --run {run}", "the captions with the lowest scores"),
    ('recap sql "FROM verdict LIMIT 5" --run {run}', "ask anything"),
    ("recap init runs/mine --source ~/photos", "begin with your own images"),
)
