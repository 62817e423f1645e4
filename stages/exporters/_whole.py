"""The files of a whole training set, written when its last shard is done: summary, dataset card, indexes, digests.

All of it is computed from the index tables; files that the training set no longer has are removed.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline import audits, plugins
from pipeline.progress import say
from pipeline.sections import Run
from pipeline.storage import database, tables
from pipeline.storage.layout import CERTIFICATE, find_numbers
from pipeline.storage.payloads import SUMS, write_sums
from stages.exporters import FormFile, put_text
from stages.exporters._card import build_card
from stages.exporters._croissant import build_croissant
from stages.exporters._settings import RESERVED, Config, list_columns, list_folders, list_indexes, load_form
from stages.text.selection import describe_texts

CARD = "export/README.md"
NEEDED_FILES = ("export/stats.json", CARD)  # without them an export is not finished
WHOLE_FILES = (*NEEDED_FILES, "export/croissant.json")
SUMMARY = """
    SELECT count(*) AS num_samples, coalesce(sum(num_bytes), 0)::BIGINT AS num_bytes,
        count(DISTINCT sha256) AS num_distinct_images,
        coalesce(avg(count_words(caption)), 0) AS mean_words,
        coalesce(avg(count_words(alt_text)), 0) AS mean_alt_text_words
    FROM export"""
NO_PROVENANCE = tables.Provenance(stage="export", name="", version=1, slice={}, inputs={})  # they fill memory
OLDER = "SELECT count(*) FROM export WHERE orientation IS NULL"  # samples that an earlier version exported


DROPPED = 'SELECT reason, count(*) FROM curation WHERE "drop" GROUP BY reason ORDER BY reason'


def finish(run: Run, is_new: bool) -> None:
    """Writes summary, dataset card, Croissant metadata, the forms' indexes and all digests, unless no shard is new."""
    settings: Config = run.sections["export"][""]
    if not is_new and _is_finished(run.folder):
        return
    with database.connect(run.folder) as connection:
        result = database.run_query(connection, SUMMARY)
        stats = dict(zip([column[0] for column in result.description or ()], result.fetchone() or (), strict=True))
        passes = database.run_query(
            connection, "SELECT caption_pass, model, count(*) FROM export GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        num_older: int = database.run_query(connection, OLDER).fetchall()[0][0]
        dropped = dict(database.query_rows(connection, DROPPED)) if run.sections["curate"] else {}
    stats |= {"dropped": dropped} if dropped else {}
    stats["captions"] = [{"pass": name, "model": model, "num_samples": num} for name, model, num in passes]
    card = build_card(
        stats,
        title=run.folder.name,
        source=run.source.kind,
        license=settings.license,
        formats=settings.formats,
        splits=settings.split or (),
        rules=run.sections["filter"][""].rules,
        notes=(*_describe_dropped(dropped), *describe_texts(settings), *_describe_audits(run)),
        columns=list_columns(settings),
    )
    croissant = build_croissant(
        title=run.folder.name,
        description=f"{stats['num_samples']:,} images of a {run.source.kind} source with captions, made by recap.",
        license=settings.license,
        url=settings.url if "://" in settings.url else "",
        formats=settings.formats,
        splits=tuple(settings.split or ()),
        columns=list_columns(settings),
    )
    texts = (json.dumps(stats, indent=2) + "\n", card, json.dumps(croissant, indent=2) + "\n")
    for name, text in zip(WHOLE_FILES, texts, strict=True):
        put_text(run.folder / name, text)
    paths = sorted((run.folder / "export/index").glob("*.parquet"))
    found = (footer for footer in map(tables.read_whole_footer, paths) if footer)
    footers = [replace(footer, provenance=NO_PROVENANCE) for footer in found]
    _remove_leftovers(run.folder, settings, footers)
    _write_indexes(run.folder, settings, footers)
    names = (name for name in (*WHOLE_FILES, *list_indexes(settings)) if (run.folder / name).exists())
    write_sums(run.folder, "export/index", footers, names)
    _warn(run, stats["num_samples"], num_older)


def _is_finished(run: Path) -> bool:
    """True unless files of the whole run are missing, or older than a shard, because something was killed in between,
    or older than an audit's certificate.

    The digests are written last. Tables of earlier versions, which had none, do not record theirs either.
    """
    if not all((run / name).exists() for name in NEEDED_FILES):
        return False
    certificate = run / CERTIFICATE
    if certificate.exists() and certificate.stat().st_mtime_ns > (run / CARD).stat().st_mtime_ns:
        return False
    paths, sums = [*(run / "export/index").glob("*.parquet")], run / "export/index" / SUMS
    if not sums.exists():
        footers = filter(None, map(tables.read_whole_footer, paths))
        return not any(footer.payload_sha256 for footer in footers)
    return max((path.stat().st_mtime_ns for path in paths), default=0) <= sums.stat().st_mtime_ns


def _describe_dropped(dropped: Mapping[str, int]) -> Iterator[str]:
    if dropped:
        reasons = ", ".join(f"{num:,} `{reason}`" for reason, num in dropped.items())
        yield f"Before captioning, curation dropped {sum(dropped.values()):,} images of the corpus: {reasons}."


def _describe_audits(run: Run) -> Iterator[str]:
    if lines := audits.describe_judges(run):
        yield f"How far the judges notice errors that were planted in captions:\n\n{_list_lines(lines)}"
    if lines := audits.describe_certificate(run):
        yield f"What an audit with people's labels guarantees:\n\n{_list_lines(lines)}"


def _list_lines(lines: Iterable[str]) -> str:
    """Markdown; indented lines belong to those before them."""
    return "\n".join(f"{'  ' if line[0] == ' ' else ''}- {line.strip()}" for line in lines)


def _warn(run: Run, num_samples: int, num_older: int) -> None:
    if not num_samples:
        say("recap: WARNING: no caption was kept, so the training set is empty; `recap query refusals` counts why")
    if 0 < num_older < num_samples:
        say(
            f"recap: WARNING: an earlier version exported {num_older} of {num_samples} samples without some columns; "
            "loaders refuse such a mixture. To export all again: "
            f"rm -r {shlex.quote(str(run.folder / 'export'))} && recap run export --run {shlex.quote(str(run.folder))}"
        )


def _remove_leftovers(run: Path, settings: Config, footers: Sequence[tables.TableFooter]) -> None:
    """Removes what the training set no longer has from the forms' folders: numbered files and folders of files, and
    indexes, of earlier splits, of the whole where there are splits now, and of forms that are not written any more."""
    listed = {name for footer in footers for name in footer.payload}
    numbers = {
        folder: {number for name in listed if name.startswith(folder) for number in find_numbers(name)}
        for _, folder in list_folders(settings)
    }
    present = {form.rpartition(".")[2]: form for form in settings.formats}
    earlier = [name for name in plugins.list_names("stages.exporters") if name not in present]
    for folder in (*present, *earlier):
        root = run / "export" / folder
        for path in list(list_numbered(root)):
            first = path.relative_to(root).parts[0]
            split = first if not find_numbers(first) and first not in RESERVED else ""  # of now or of before
            current = numbers.get(f"{root.relative_to(run)}/{split and f'{split}/'}", set())
            if current.issuperset(find_numbers(path.name)):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    whole = listed.union(list_indexes(settings))  # a shard's own folder may hold an index too
    for folder, form in (present | {name: name for name in earlier}).items():
        root = run / "export" / folder
        was_there = folder in earlier and root.is_dir()
        for index in getattr(load_form(form), "INDEXES", ()):
            for path in (root / index, *root.glob(f"*/{index}")):
                if str(path.relative_to(run)) not in whole:
                    path.unlink(missing_ok=True)
        _remove_empty(root)
        if was_there and not root.is_dir():
            say(f"recap: export/{folder} is removed: export.formats no longer names its form")


def _remove_empty(folder: Path) -> None:
    """Removes the folder and those below it that hold nothing; numbered ones hold a shard's files."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not find_numbers(entry.name):
            _remove_empty(entry)
    with suppress(OSError):  # it has files, or is not there
        folder.rmdir()


def list_numbered(folder: Path) -> Iterator[Path]:
    """The numbered files and folders below a folder, without what is in numbered folders."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if find_numbers(entry.name):
            yield entry
        elif entry.is_dir() and not entry.name.startswith("."):
            yield from list_numbered(entry)


def _write_indexes(run: Path, settings: Config, footers: Sequence[tables.TableFooter]) -> None:
    """Writes each form's files of the whole run, from the footers of all index tables."""
    for module, folder in list_folders(settings):
        files = [
            FormFile(name=name.removeprefix(folder), num_bytes=num_bytes)
            for footer in footers
            for name, num_bytes in footer.payload.items()
            if name.startswith(folder)
        ]
        if hasattr(module, "write_index"):
            module.write_index(run / folder, files)
