"""The end of a whole run: its yield, where the training set is, and what to look at next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from pipeline.commands.sql import read_query
from pipeline.progress import format_count
from pipeline.sections import Run
from pipeline.storage import database

STEPS = {
    "images": "in the corpus",
    "usable": "decoded; the others are broken, empty or not images",
    "selected": "chosen by [curate]; `recap query curation` counts the others by reason",
    "captioned": "have a complete caption without repetition",
    "kept": "passed every rule of the filter",
    "exported": "samples in the training set",
}
REFUSALS = "SELECT reason, count(*) AS num FROM verdict WHERE NOT keep GROUP BY reason ORDER BY num DESC, reason"
PLAN = ("recap plan --run {run}", "look for images that came, changed or went since")
COUNT = ("recap query yield --run {run}", "the images that reached each step")
NEXT = (
    ("recap report --run {run}", "the numbers and samples in one HTML file"),
    ("recap query worst --run {run}", "the captions with the lowest scores"),
    ('recap sql "FROM verdict LIMIT 5" --run {run}', "query the tables"),
)


def format_yield(run: Run) -> Iterator[str]:
    """Counts the images that reached each step and the reasons of refusals; warns when no caption is kept."""
    with database.connect_run(run) as connection:
        steps = dict(database.query_rows(connection, f"SELECT step, images FROM ({read_query('yield')})"))
        reasons = list(database.query_rows(connection, REFUSALS))
    yield ""
    for step, meaning in ((step, meaning) for step, meaning in STEPS.items() if step in steps):
        yield f"  {step:10}{format_count(steps[step]):>7}   {meaning}"
    yield ""
    if reasons:
        yield "  refused:   " + ", ".join(f"{reason} ({format_count(num)})" for reason, num in reasons)
    if reasons and not steps["kept"]:
        yield "  NO CAPTION WAS KEPT, and the training set is empty: is the first reason above the rule that you meant?"


def format_end(run: Run, *, is_new: bool) -> Iterator[str]:
    """The yield, unless nothing was made, the directories of the export, and commands to go on with.

    Counting takes much longer than finding that everything is done.
    """
    if is_new:
        yield from format_yield(run)
    yield ""
    forms = sorted(path for path in (run.folder / "export").glob("*") if path.is_dir() and path.name != "index")
    settings = run.sections["export"][""]
    current = {name.rpartition(".")[2] for name in settings.formats}
    for form in forms:
        if form.name in current:
            yield from (f"  {form / split}" for split in settings.split or ("",))
        else:
            yield f"  {form}, of an earlier run.toml: its form is not in export.formats"
    yield ""
    yield "  next:"
    for command, meaning in NEXT if is_new else (PLAN, COUNT, *NEXT):
        yield f"    {command.format(run=shlex.quote(str(run.folder))):58} # {meaning}"
