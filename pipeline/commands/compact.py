"""`recap compact`: compacted copies of all tables of a run, then the answers of the named queries."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from pipeline.commands.answers import store_answers
from pipeline.errors import StoppedError
from pipeline.execution.pass_graph import list_passes
from pipeline.execution.signals import stop_on_signal
from pipeline.progress import format_quantity
from pipeline.sections import Run
from pipeline.storage.compaction import compact_folder


def compact_run(run: Run) -> Iterator[str]:
    """Compacts folder by folder, then answers the queries; yields a line for each with new copies or a new answer.

    Raises:
        BrokenTableError: a table cannot be read.
        StoppedError: a signal came; the copies that are finished stay.
    """
    stop, folders = threading.Event(), [p.folder for p in list_passes(run)]
    with stop_on_signal(stop):
        for folder in [*folders, *(f"stats/{folder}" for folder in folders)]:
            num_copies, num_tables = compact_folder(run.folder, folder)
            if num_copies:
                yield f"{folder}: {format_quantity(num_tables, 'table')} in {format_quantity(num_copies, 'file')}"
            if stop.is_set():
                raise StoppedError
        for name in store_answers(run):
            yield f"query {name}: answered"
            if stop.is_set():
                raise StoppedError
