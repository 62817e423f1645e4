"""Work that all shards of a pass share: done once for the whole run, and reused by every shard and process.

It is kept in a folder of .work/ whose name has the fingerprint of what it was made from. A folder in place is complete.
Only the pass knows what it contains.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pipeline.errors import RefusedError, StoppedError
from pipeline.execution.passes import AllShards, Pass, whole_input
from pipeline.progress import say
from pipeline.storage import tables
from pipeline.storage.disk import sync_path
from pipeline.storage.layout import is_old, sweep_unfinished, unfinished_path
from pipeline.storage.lock import hold_lock, keep_fresh

POLL = 1.0  # seconds between checks whether another process has finished


def ensure_shared(p: Pass, shards: AllShards, provenance: tables.Provenance) -> Path:
    """Returns the folder that `p.prepare` fills from the tables of all shards, filling it if there is none.

    Of several processes one fills it, and the others wait.

    Args:
        provenance: of any of the pass's tables.

    Raises:
        StoppedError: a signal came.
        BrokenTableError, OSError: a table cannot be read.
    """
    inputs = {whole_input(folder): provenance.inputs[whole_input(folder)] for folder in p.reads_all}
    name = f"shared-{replace(provenance, inputs=inputs).fingerprint[:16]}"
    work = shards.run.folder / ".work" / p.folder
    folder, lock = work / name, work / f"{name}.lock"
    waits = False
    work.mkdir(parents=True, exist_ok=True)
    while not folder.is_dir():
        with ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(lock, max_wait=0))
            except RefusedError:
                if not waits:
                    say(f"recap: {p.title}: waits for another process that reads all shards")
                waits = True
                if shards.stop.wait(POLL):
                    raise StoppedError from None
                continue
            stack.enter_context(keep_fresh(lock))
            if not folder.is_dir():
                _fill(p, shards, folder)
    return folder


def _fill(p: Pass, shards: AllShards, folder: Path) -> None:
    assert p.prepare is not None, f"{p.title} has nothing that its shards share"
    sweep_unfinished(folder.parent)
    say(f"recap: {p.title}: reading {' and '.join(p.reads_all)} of all shards, once for the whole run")
    unfinished = unfinished_path(folder, work=folder.parent)
    unfinished.mkdir()
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, unfinished, ignore_errors=True)
        p.prepare(shards, unfinished)
        for file in unfinished.iterdir():
            sync_path(file)
        try:
            unfinished.rename(folder)
            undo.pop_all()
        except OSError:
            if not folder.is_dir():  # otherwise another process, to which this one seemed gone, was faster
                raise
        sync_path(folder.parent)
    for other in folder.parent.glob("shared-*"):  # of earlier configurations or corpora
        if other != folder and other.is_dir() and is_old(other):
            shutil.rmtree(other, ignore_errors=True)
