"""Creation of a run: the kind of its source, a run.toml with comments, and the plan.

The comments are the help texts of the sections' own `Config` classes, so they cannot drift from the code.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import shlex
import shutil
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

from pipeline import plugins
from pipeline.commands import estimate
from pipeline.commands.changes import find_edited
from pipeline.config import load
from pipeline.errors import ConfigError, RefusedError, UserError
from pipeline.execution import sample
from pipeline.progress import format_bytes, format_quantity, say
from pipeline.records import Piece
from pipeline.sections import ENGINES, SOURCES, Corpus, Resources, Run, SlurmSettings, TopLevel
from pipeline.sources import _common, _files, _survey
from pipeline.storage import tables
from pipeline.storage.disk import make_folder
from pipeline.storage.layout import PACKED, table_path
from pipeline.storage.plan import Plan, find_lost_files, format_spec, write_plan
from pipeline.validation import describe_type

WIDTH = 110
NUM_EXAMPLES = 3  # of lost files, in a message
HEADER = (
    "# A run of recap; `recap run all` makes all of it. Commented-out keys show their defaults.",
    "# Changing a key that decides rows makes the tables below it stale; time-outs and URLs decide no rows.",
    "",
)
TABLE_ADVICE = (
    "is a table of texts; write the folder of its images, with the table in it as metadata{0} and the column file_name,"
    " or fetch the images of its URLs with img2dataset first"
)
FOREIGN_FILES = {  # advice on files that no source reads, by extension
    "image": "is one image; write its folder, or several images as a folder",
    ".zip": "is a ZIP archive, which no source reads; unpack it and write the folder",
    ".rar": "is a RAR archive, which no source reads; unpack it and write the folder",
    ".7z": "is a 7z archive, which no source reads; unpack it and write the folder",
    **{ending: TABLE_ADVICE.format(ending) for ending in (".csv", ".jsonl")},
    **{ending: TABLE_ADVICE.format(".csv") for ending in (".tsv", ".json")},
}
LEAST_SPECIFIC = ("parquet", "webdataset", "folder")  # sources whose `claims` is called last, in this order


def create_run(folder: Path, sections: Mapping[str, Mapping[str, Any]]) -> tuple[Run, int]:
    """Writes `<folder>/run.toml` and freezes the plan; returns the run and its number of shards.

    Raises:
        RefusedError: the directory holds a run already, or is part of the corpus.
        UserError: the source is empty or cannot be read as its kind; everything that was created is removed.
    """
    file = folder / "run.toml"
    if file.exists():
        raise RefusedError(f"{file} exists; edit it, or add new images of the corpus with `recap plan --run {folder}`")
    if (folder / "plan.parquet").exists():
        raise RefusedError(f"{folder / 'plan.parquet'} belongs to another run; choose another folder or remove it")
    source = Path(sections["source"].get("path", "/nowhere"))
    if source.is_dir() and folder.absolute().is_relative_to(source.absolute()):
        raise RefusedError(f"{folder} is inside the corpus {source}: the run's own files would be read as images")
    created = [directory for directory in (folder, *folder.parents) if not directory.exists()]
    make_folder(folder)
    with tables.open_atomic(file) as out:
        out.write(render_manifest(sections).encode())
    try:
        run = load(folder.absolute())
        return run, extend_plan(run)[1]
    except BaseException as error:  # including Ctrl-C; raised again
        file.unlink()
        for directory in created:
            with suppress(OSError):  # another process has written into it
                directory.rmdir()
        if isinstance(error, UserError):  # without the name of the run.toml just removed
            raise UserError(str(error).removeprefix(f"{file.absolute()}: ")) from error
        raise


def extend_plan(run: Run) -> tuple[int, int]:
    """Creates or extends the plan; returns its number of shards before and after.

    Raises:
        UserError: the source cannot be read or is empty.
    """
    path = run.folder / "plan.parquet"
    try:
        pieces = list(run.source.module.pieces(run.source.config))
        if not path.exists() and not any(piece.num_samples is None or piece.num_samples > 0 for piece in pieces):
            where = getattr(run.source.config, "path", run.source.kind)
            raise UserError(f"{run.file}: source: there are no images in {where}")
        before, after = write_plan(path, pieces, shard_size=run.corpus.shard_size, place=run.source.place)
        lost = find_lost_files(path, pieces, place=run.source.place) if before else {}
        if lost:
            _report_lost(run, lost)
        blocked = set(lost.values()) if not hasattr(run.source.module, "read_texts") else set()
        if before:
            _report_edited(run, without=blocked)
    except ConfigError as error:  # its message names the field
        raise UserError(f"{run.file}: {error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{run.file}: source: {error}") from error
    return before, after


def _report_lost(run: Run, lost: Mapping[str, int]) -> None:
    """Names planned files that are gone, and what can be done."""
    names, shards = list(lost), sorted(set(lost.values()))
    few = ", ".join(map(repr, names[:NUM_EXAMPLES])) + (", ..." if names[NUM_EXAMPLES:] else "")
    start = f"recap: {format_quantity(len(lost), 'planned file')} missing from the corpus: {few}; put them back"
    if hasattr(run.source.module, "read_texts"):  # files of one image: their rows say that they are missing
        say(f"{start}, or, to go on without them, {_advise_ingest(run, shards)}")
    else:
        say(f"{start}: until then, shards {format_spec(shards)} cannot be ingested")


def _advise_ingest(run: Run, shards: Sequence[int]) -> str:
    """The commands that ingest shards again."""
    paths = [shlex.quote(str(table_path(run.folder, "image", shard))) for shard in shards[:NUM_EXAMPLES]]
    more = f" (and of {format_quantity(len(shards) - NUM_EXAMPLES, 'more shard')})" if shards[NUM_EXAMPLES:] else ""
    return (
        f"ingest shards {format_spec(shards)} again: rm {' '.join(paths)}{more}, then"
        f" `recap run all --stale redo --run {shlex.quote(str(run.folder))}`"
    )


def _report_edited(run: Run, *, without: Collection[int]) -> None:
    """Names the planned files that were edited after they were ingested, and how to ingest them again.

    Args:
        run: whose corpus is compared.
        without: shards that cannot be ingested now.
    """
    edited = [(shard, file) for shard, file in find_edited(run) if shard not in without]
    if not edited:
        return
    few = ", ".join(repr(file) for _, file in edited[:NUM_EXAMPLES]) + (", ..." if edited[NUM_EXAMPLES:] else "")
    say(
        f"recap: {format_quantity(len(edited), 'image')} changed, or what describes them, after they were ingested:"
        f" {few}; {_advise_ingest(run, sorted({shard for shard, _ in edited}))}"
    )


def describe_disk_use(run: Run, *, first: int = 0) -> str:
    """The bytes that the images of the plan's shards, from number `first`, take on the run's disk."""
    plan, shards = Plan.load(run.folder / "plan.parquet")
    sizes, unknown = Counter[bool](), set[bool]()  # by whether the images are copied
    for piece in (piece for shard in shards[first:] for piece in plan.pieces(shard) if piece.start == 0):
        is_copied = run.corpus.pack or not run.source.is_in_place(piece)
        sizes[is_copied] += piece.num_bytes or 0
        if piece.num_bytes is None:
            unknown.add(is_copied)
    size = ("at least " if True in unknown else "") + format_bytes(sizes[True])
    if not sizes[True] and True not in unknown:
        return f"{format_bytes(sizes[False])} of images are read where they are; none is copied"
    free = format_bytes(shutil.disk_usage(run.folder).free)
    return f"ingest copies {size} of images into {run.folder / PACKED}; {free} are free there"


def guess_source(source: str, *, kind: str | None = None) -> dict[str, Any]:
    """The `[source]` section for a path, a URL, `hf:NAME` or `scenes`, of the first kind that claims it.

    Raises:
        UserError: the path does not exist, or no kind claims it and none is given.
    """
    path = Path(source).expanduser()
    is_url = "://" in source
    kinds = plugins.list_names("pipeline.sources")
    for name in [] if kind else [*(name for name in kinds if name not in LEAST_SPECIFIC), *LEAST_SPECIFIC]:
        if plugins.load("pipeline.sources", name).claims(source if is_url else str(path)):
            kind = name
            break
    if kind and not any(f.name == "path" for f in dataclasses.fields(plugins.load("pipeline.sources", kind).Config)):
        return {"kind": kind}
    if kind == "hf" and not path.exists():
        return {"kind": kind, "path": source.removeprefix("hf:")}
    if not (is_url or any(c in source for c in "*?{") or path.exists()):
        raise UserError(f"--source {source}: there is no such file or directory{_suggest_pattern(path)}")
    if kind is None and _common.is_image(path.name) and _files.is_pattern(source):
        problem = "matches images one by one, which no source reads"
        raise UserError(f"--source {source}: {problem}; write their folder, and leave others out with source.exclude")
    if kind is None:
        if advice := FOREIGN_FILES.get("image" if _common.is_image(path.name) else path.suffix.lower()):
            raise UserError(f"--source {source}: {advice}")
        raise UserError(
            f"--source {source}: is not recognised as any source; choose one with --kind: {', '.join(kinds)}"
        )
    return {"kind": kind, "path": source if is_url else str(path.absolute())}


def _suggest_pattern(path: Path) -> str:
    """The pattern of the files whose names begin like a path that does not exist."""
    begun = sorted(path.parent.glob(f"{glob.escape(path.name)}*")) if path.parent.is_dir() and path.name else []
    if not begun:
        return " (hf:NAME is a Hugging Face dataset)"
    return f"; {format_quantity(len(begun), 'file')} there begin so: write {str(path) + '*' + begun[0].suffix!r}"


def describe_size(run: Run) -> str:
    """The number of samples that the plan has, estimated from a few files where not all of them can be counted."""
    pieces, counter = sample.read_pieces(run), sample.SampleCounter(run.source)
    sample.draw_pieces(pieces, sample.NUM_RANGES, random=Random(run.seed), counter=counter)
    found = estimate.count_images(pieces, [], counter.counts) if _is_counted(pieces, counter) else None
    if found is None:
        return f"{format_quantity(len(pieces), 'file')} of unknown length"
    exactly = "" if found.low == found.high else "about "
    return f"{exactly}{format_quantity(round(found.value), 'sample')}"


def _is_counted(pieces: Sequence[Piece], counter: sample.SampleCounter) -> bool:
    return bool(counter.counts) or all(piece.num_samples is not None for piece in pieces)


def describe_ignored_files(source: Mapping[str, Any]) -> str:
    """A warning about files that may hold images but that this kind of source does not read; "" if there are none."""
    path, kind = Path(source.get("path", "")), source["kind"]
    if kind not in ("folder", "webdataset", "img2dataset", "parquet") or not path.is_dir():
        return ""
    survey = _survey.sample_tree(str(path))
    ignored, names = "image files", survey.images
    if kind == "folder":
        ignored, names = "tars and tables", (*survey.tars, *survey.tables)
    elif kind == "parquet" and survey.tars:
        ignored, names = "tars and image files", (*survey.tars, *survey.images)
    if not names:
        return ""
    few = ", ".join(names[:3]) + (", ..." if names[3:] else "")
    return f'{ignored} in {path} are ignored ({few}): kind = "{kind}" does not read them'


def render_manifest(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A run.toml with these values; all other keys of each section are comments with their defaults."""
    lines = [*HEADER, *_render_keys(TopLevel, {})]
    lines += [line for name, values in sections.items() for line in _render_section(name, values)]
    return "\n".join([*lines, ""])


def _render_section(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"[{name}]"
    classes = list(_find_classes(name, values))
    if "kind" in values:
        yield f"kind = {format_toml(values['kind'])}"
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert known >= set(values) - {"kind"}, f"{name}: {set(values) - known}"
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping) and value}
    own = {name: value for name, value in values.items() if name not in tables}
    for cls in classes:
        yield from _render_keys(cls, own, without=tables)
    for cls in classes:
        hints = get_type_hints(cls)
        for field in (field for field in dataclasses.fields(cls) if field.name in tables):
            yield from ("", *_describe_key(field, hints[field.name]), f"[{name}.{field.name}]")
            yield from (f"{_format_key(one)} = {format_toml(value)}" for one, value in tables[field.name].items())


def _render_keys(cls: Any, values: Mapping[str, Any], *, without: Collection[str] = ()) -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in without):
        if field.name in values or (field.metadata.get("shown", True) and field.metadata.get("in_init", True)):
            yield from _render_key(field, hints[field.name], values)


def _render_key(field: Any, hint: Any, values: Mapping[str, Any]) -> Iterator[str]:
    yield from _describe_key(field, hint)
    if field.name in values:
        yield f"{field.name} = {format_toml(values[field.name])}"
        return
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    yield f"# {field.name} =" + ("" if default is MISSING or default is None else f" {format_toml(default)}")


def _describe_key(field: Any, hint: Any) -> list[str]:
    about = f"{field.metadata.get('help', '')} ({describe_type(hint)})"
    return textwrap.wrap(about, WIDTH, initial_indent="# ", subsequent_indent="# ")


def _find_classes(name: str, values: Mapping[str, Any]) -> Iterable[type]:
    """The dataclasses with a section's keys."""
    top = name.split(".")[0]
    if top == "slurm":
        yield from (SlurmSettings, Resources)
        return
    stage = None if top in ("source", "engines") else plugins.load("stages", top)
    if stage is not None:
        yield stage.Config
    choice = {"source": SOURCES, "engines": ENGINES}.get(top) or getattr(stage, "PLUGINS", None)
    if choice is not None:
        yield plugins.load(choice.package, values.get(choice.selector, choice.default)).Config
    if top == "source":
        yield Corpus


def format_toml(value: Any) -> str:
    """A value as TOML, on one line.

    >>> format_toml({"a": [1, "b"]})
    '{ a = [1, "b"] }'
    """
    if dataclasses.is_dataclass(value):
        value = {
            f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) is not None
        }
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_format_key(key)} = {format_toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_toml(one) for one in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _format_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def default_sections(source: Mapping[str, Any], *, engine: str, model: str | None) -> dict[str, dict[str, Any]]:
    """The sections of a first run: dense captions, checked as text and judged with the image."""
    captioner = {"kind": engine, **({"model": model} if model else {})}
    if engine == "openai":
        captioner["base_url"] = "endpoint"
    return {
        "source": dict(source),
        "curate": {},
        "engines.captioner": captioner,
        "caption.dense": {"recipe": "dense", "engine": "captioner"},
        "score.form": {"kind": "text"},
        "score.judge": {"kind": "judge", "engine": "captioner", "rubric": "dense"},
        "filter": {"rules": {"well_formed": "form > 0.9", "faithful": "judge >= 0.6"}, "choose": "judge DESC"},
        "export": {"formats": ["webdataset"]},
        "slurm": {},
    }
