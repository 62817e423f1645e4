"""Decides how a run begins: which source a folder is, and the run.toml that explains itself line by line.

The explanations are the help lines of the sections' own `Config` classes, so they cannot drift from the code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

from pipeline import plugins
from pipeline.config import load
from pipeline.errors import ConfigError, RefusedError, UserError
from pipeline.sections import Corpus, Resources, Run, SlurmSettings, TopLevel
from pipeline.sources import _common, _tars
from pipeline.storage import tables
from pipeline.storage.plan import freeze
from pipeline.validation import describe_type

WIDTH = 110
LEVELS, NUM_FOLDERS, NUM_NAMES = 5, 3, 2000  # that a guess looks at: folders in each other, in each, names in each


def create_run(folder: Path, sections: Mapping[str, Mapping[str, Any]]) -> tuple[Run, int]:
    """Writes `<folder>/run.toml` and freezes the plan; returns the run and its number of shards.

    Raises:
        RefusedError: there is a run already.
        UserError: the source cannot be read as what it is said to be; then there is nothing of a run either.
    """
    file = folder / "run.toml"
    if file.exists():
        raise RefusedError(f"{file} exists; edit it, or `recap plan --run {folder}` to take in what the corpus grew by")
    if (folder / "plan.parquet").exists():
        raise RefusedError(f"{folder / 'plan.parquet'} belongs to another run; choose another folder or remove it")
    source = Path(sections["source"].get("path", "/nowhere"))
    if source.is_dir() and folder.absolute().is_relative_to(source.absolute()):
        raise RefusedError(f"{folder} lies in the corpus, {source}: the run's own files would be taken for images")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with tables.atomic(file) as out:
        out.write(render_manifest(sections).encode())
    try:
        run = load(folder.absolute())
        return run, extend_plan(run)[1]
    except BaseException as error:  # a Ctrl-C too; raised again
        file.unlink()  # a run that cannot be planned is none: the next `init` starts anew
        for place in made:
            with suppress(OSError):  # somebody else has put something there
                place.rmdir()
        if isinstance(error, UserError):  # of a run.toml that nobody will find
            raise UserError(str(error).removeprefix(f"{file.absolute()}: ")) from error
        raise


def extend_plan(run: Run) -> tuple[int, int]:
    """Freezes the plan, or extends it; returns how many shards there were, and are.

    Raises:
        UserError: the source cannot be read, or there is nothing in it.
    """
    path = run.folder / "plan.parquet"
    try:
        pieces = run.source.module.pieces(run.source.config)
        before, after = freeze(path, pieces, shard_size=run.corpus.shard_size, place=run.source.place)
    except ConfigError as error:  # it names its field
        raise UserError(f"{run.file}: {error}") from error
    except ValueError as error:
        raise UserError(f"{run.file}: source: {error}") from error
    if after == 0:
        path.unlink()
        raise UserError(f"{run.file}: source: there are no images in it")
    return before, after


def guess_source(source: str) -> dict[str, Any]:
    """The `[source]` of what a person points at: a folder, tars, Parquet, a URL, `hf:NAME`, `scenes`.

    Raises:
        UserError: a path that does not exist.
    """
    if source == "scenes":
        return {"kind": "scenes"}
    if source.startswith("hf:"):
        return {"kind": "hf", "path": source[3:]}
    path = Path(source).expanduser()
    if "://" not in source and not any(c in source for c in "*?{") and not path.exists():
        raise UserError(f"--source {source}: there is no such file or folder (hf:NAME is a Hugging Face dataset)")
    place = source if "://" in source else str(path.absolute())
    return {"kind": _kind(path, source), "path": place}


def describe_ignored_files(source: Mapping[str, Any]) -> str:
    """What looks like images too, and is not of the kind that the corpus has; "" where nothing does."""
    path, kind = Path(source.get("path", "")), source["kind"]
    if kind not in ("folder", "webdataset", "img2dataset", "parquet") or not path.is_dir():
        return ""
    tars, tables, images = _sorted_out(_some(path))
    what, names = "image files", images
    if kind == "folder":
        what, names = "tars and tables", [*tars, *tables]
    elif kind == "parquet" and tars:
        what, names = "tars and image files", [*tars, *images]
    if not names:
        return ""
    few = ", ".join(names[:3]) + (", ..." if names[3:] else "")
    return f'{what} in {path} are left out ({few}): kind = "{kind}" reads none'


def _kind(path: Path, source: str) -> str:
    """By what lies in the folder itself; where that has no tars and at most an index, by what lies below too."""
    if not path.is_dir():
        return "parquet" if source.endswith(".parquet") else "webdataset"
    names = list(_some(path, levels=1))
    tars, tables, images = _sorted_out(names)
    if not tars and len(tables) < 2:
        names = list(_some(path))
        tars, tables, images = _sorted_out(names)
    if len(tars) + len(tables) < max(1, len(images)):
        return "folder"
    if not tars:
        return "parquet"
    return "img2dataset" if any(name.endswith("_stats.json") for name in names) else "webdataset"


def _sorted_out(names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Of names of files: tars, tables of images, and images."""
    names = list(names)
    tables = [n for n in names if n.endswith((".parquet", ".pq")) and n.rpartition("/")[2] != "metadata.parquet"]
    return [n for n in names if n.endswith(_tars.ENDINGS)], tables, [n for n in names if _common.is_image(n)]


def _some(folder: Path, *, below: str = "", levels: int = LEVELS) -> Iterator[str]:
    """Names of files in a folder and in the first few below it, however many there are; the hidden are left out."""
    with os.scandir(folder / below) as entries:
        some = sorted((e for e in islice(entries, NUM_NAMES) if e.name[0] != "."), key=lambda entry: entry.name)
    folders = [entry.name for entry in some if entry.is_dir(follow_symlinks=False)]
    yield from (below + entry.name for entry in some if entry.is_file())
    if levels > 1:
        for name in folders[:NUM_FOLDERS]:
            with suppress(PermissionError):  # a lost+found, which no source reads either
                yield from _some(folder, below=f"{below}{name}/", levels=levels - 1)


def render_manifest(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A run.toml with these values, all other keys of each section as comments with their defaults."""
    return "\n".join([*_head(), *(line for name, values in sections.items() for line in _section(name, values)), ""])


def _head() -> Iterator[str]:
    yield "# A run of recap. `recap run all` makes all of it; a line with # in front of a key shows its default."
    yield "# Changing a key that decides rows makes the tables below it stale; time-outs, URLs and windows decide none."
    yield ""
    yield from _keys(TopLevel, {})


def _section(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"[{name}]"
    about = list(_classes(name, values))
    if "kind" in values:
        yield f"kind = {format_toml(values['kind'])}"
    known = {field.name for cls in about for field in dataclasses.fields(cls)}
    assert known >= set(values) - {"kind"}, f"{name}: {set(values) - known}"
    for cls in about:
        yield from _keys(cls, values)


def _keys(cls: Any, values: Mapping[str, Any]) -> Iterator[str]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in values or field.metadata.get("shown", True):
            yield from _key(field, hints[field.name], values)


def _key(field: Any, hint: Any, values: Mapping[str, Any]) -> Iterator[str]:
    yield from textwrap.wrap(
        f"{field.metadata.get('help', '')} ({describe_type(hint)})", WIDTH, initial_indent="# ", subsequent_indent="# "
    )
    if field.name in values:
        yield f"{field.name} = {format_toml(values[field.name])}"
        return
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    yield f"# {field.name} =" + ("" if default is MISSING or default is None else f" {format_toml(default)}")


def _classes(name: str, values: Mapping[str, Any]) -> Iterable[type]:
    """The dataclasses that a section's keys come from."""
    top = name.split(".")[0]
    if top == "slurm":
        yield from (SlurmSettings, Resources)
        return
    packages = {"source": "pipeline.sources", "engines": "pipeline.engines", "score": "stages.scorers"}
    if top != "engines" and top != "source":
        yield plugins.load("stages", top).Config
    if top in packages:
        yield plugins.load(packages[top], values["kind"]).Config
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
        inner = ", ".join(f"{_toml_key(key)} = {format_toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_toml(one) for one in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def default_sections(source: Mapping[str, Any], *, engine: str, model: str | None) -> dict[str, dict[str, Any]]:
    """The sections of a first run: dense captions, checked as text and judged with the image."""
    asked = {"kind": engine, **({"model": model} if model else {})}
    if engine == "openai":
        asked["base_url"] = "endpoint"
    return {
        "source": dict(source),
        "engines.captioner": asked,
        "caption.dense": {"recipe": "dense", "engine": "captioner"},
        "score.form": {"kind": "text"},
        "score.judge": {"kind": "judge", "engine": "captioner", "rubric": "dense"},
        "filter": {"rules": {"well_formed": "form > 0.9", "faithful": "judge >= 0.6"}, "choose": "judge DESC"},
        "export": {},
        "slurm": {},
    }
