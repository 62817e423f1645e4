"""SQL views over the tables of the passes that run.toml defines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.sections import Run
from pipeline.storage import database


def connect(run: Run, *, files: str = "*.parquet") -> database.Connection:
    """The views of a run without what is left of passes that run.toml no longer has.

    Args:
        files: which table files they see; one shard's when it is `00007.parquet`.
    """
    known = f"IN ({', '.join(map(database.quote_literal, _named_folders(run))) or 'NULL'})"
    where = {name: f"'{name}/' || name {known}" for name in ("caption", "rubric")}
    where["score"] = f"'score/' || name || '/' || caption {known}"
    where["stats"] = f"name = '' OR concat_ws('/', stage, name, nullif(caption, '')) {known}"
    return database.connect(run.folder, files=files, where=where)


def find_leftovers(run: Run) -> list[str]:
    """The folders of tables that no pass of run.toml makes: it was removed or renamed."""
    found = {path for pattern in ("caption/*", "rubric/*", "score/*/*") for path in run.folder.glob(pattern)}
    return sorted({str(path.relative_to(run.folder)) for path in found if path.is_dir()} - {*_named_folders(run)})


def _named_folders(run: Run) -> Iterator[str]:
    """Where the tables of the passes lie that have names."""
    yield from (f"{stage}/{name}" for stage in ("caption", "rubric") for name in run.sections[stage])
    yield from list_score_folders(run, run.sections["score"])


def list_score_folders(run: Run, scores: Iterable[str]) -> Iterator[str]:
    """Where the tables of these score passes lie: one folder for each caption pass that is scored."""
    for score in sorted(scores):
        for caption in run.sections["score"][score].captions or run.sections["caption"]:
            yield f"score/{score}/{caption}"
