"""Decides what a newcomer sees first: the whole pipeline on the embedded default, and a summary in plain words."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from pipeline import config, database, starter, tables
from pipeline.report import page
from pipeline.run import Outcome, Runner
from pipeline.terminal import duration, short

STEPS = {
    "images": "in the corpus",
    "usable": "decoded; the others are broken, empty or no images",
    "captioned": "have a caption that finished and does not loop",
    "kept": "passed every rule of the filter",
    "exported": "samples of the training set",
}


def begin(folder: Path, *, num_images: int | None) -> config.Run:
    """Writes the demo's run.toml and plan into `folder`, unless they are there."""
    file = folder / "run.toml"
    if not file.exists():
        text = (resources.files("manifests") / "demo" / "run.toml").read_text(encoding="utf-8")
        if num_images is not None:
            text = re.sub(r"num_images = \d+", f"num_images = {num_images}", text)
        with tables.atomic(file) as out:
            out.write(text.encode())
    run = config.load(folder)
    starter.plan(run)
    return run


def show(folder: Path, *, num_images: int | None) -> tuple[Outcome, Iterator[str]]:
    """Runs every stage; returns what it did, and the summary line by line."""
    start = time.monotonic()
    runner = Runner(run=begin(folder, num_images=num_images))
    outcome = runner.execute(runner.passes)
    return outcome, summary(folder, time.monotonic() - start)


def summary(folder: Path, seconds: float) -> Iterator[str]:
    with database.connect(folder) as connection:
        steps = dict(database.rows(connection, f"SELECT step, images FROM ({database.named_query('yield')})"))
        reasons = list(database.rows(connection, REFUSALS))
    yield ""
    for step, meaning in STEPS.items():
        yield f"  {step:10}{short(steps[step]):>7}   {meaning}"
    yield ""
    if reasons:
        yield "  refused:   " + ", ".join(f"{reason} ({short(num)})" for reason, num in reasons)
    yield f"  {short(steps['images'] / max(seconds, 1e-9))} images/s over all stages, {duration(seconds)} in all"
    yield ""
    page.write(config.load(folder))
    for place, meaning in FILES.items():
        yield f"  {f'{folder}/{place}':28} {meaning}"
    yield ""
    yield "  next:"
    for command, meaning in NEXT:
        yield f"    {command.format(run=folder):58} # {meaning}"


FILES = {
    "report.html": "open it in a browser: all of this, and samples with their captions",
    "export/webdataset": "for webdataset: wds.WebDataset(...)",
    "export/parquet": "for Hugging Face: load_dataset('parquet', data_files=...)",
}
REFUSALS = "SELECT reason, count(*) AS num FROM verdict WHERE NOT keep GROUP BY reason ORDER BY num DESC, reason"
NEXT = (
    ("recap status --run {run}", "where every pass stands"),
    ("recap query worst --run {run}", "the captions with the lowest scores"),
    ('recap sql "FROM verdict LIMIT 5" --run {run}', "ask anything"),
    ("recap init runs/mine --source ~/photos", "begin with your own images"),
)
