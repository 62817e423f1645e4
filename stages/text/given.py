"""`given` and `words` of run.toml: SQL for texts about an image, from its own row, finders and earlier passes.

Decides what such SQL may read, and so what a pass depends on, and which fields of a prompt it must fill. It does not
know what the texts are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from pipeline import plugins
from pipeline.errors import ConfigError, QueryError
from pipeline.execution.passes import Shard, lookup_rows
from pipeline.records import Image, column_names
from pipeline.sections import Run, key
from pipeline.storage import database
from pipeline.storage.database import quote_identifier, quote_literal
from stages.text.conditions import (
    CONDITION,
    CRITERIA,
    build_images,
    build_rows,
    check_labels,
    find_finders,
    list_finder_folders,
    suggest_quotes,
)
from stages.text.prompts import fence_texts

SELECT = re.compile(r"\s*(SELECT|FROM|WITH)\b", re.IGNORECASE)  # the beginning of what is not an expression
IMAGE = "image"  # the view that every pass of captions depends on anyway
FIELDS_COLUMN = "fields"  # of captions without a model: what else there is to know of one, stored as JSON
VIEWS = frozenset(record.table for record in database.RECORDS)
# The key of an image, the number of a field, and one of its texts, in the order in which the user's SQL gives them.
TEXTS = """
    SELECT key, {number} AS field, place, text FROM (
        SELECT *, row_number() OVER () AS place FROM (SELECT key::VARCHAR AS key, {text} AS text FROM ({sql}))
    ) WHERE text IS NOT NULL"""

Texts = Mapping[str, tuple[str, ...]]  # by field


@dataclass(frozen=True, kw_only=True)
class GivenTexts:
    """Checked SQL for texts about an image, by field."""

    fields: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()  # folders of the tables that it depends on, besides those of images
    query: str = ""  # for key, number of the field, and text
    where: str = ""  # the section of run.toml, for errors
    are_objects: bool = False  # each text is JSON: {"text": ..., "fields": ...}

    def open(self, shard: Shard) -> Callable[[str], Texts]:
        """A function from an image's key to the texts of each field. Keys must be looked up in ascending order."""
        find_rows = lookup_rows(self._read_rows(shard) if self.fields else (), itemgetter(0))

        def find_texts(key: str) -> Texts:
            texts: dict[str, list[str]] = {name: [] for name in self.fields}
            for _, number, _, text in find_rows(key):
                if text.strip():
                    texts[self.fields[number]].append(text)
            return {name: tuple(some) for name, some in texts.items()}

        return find_texts

    def _read_rows(self, shard: Shard) -> Iterator[tuple[str, int, int, str]]:
        """
        Raises:
            ConfigError: the SQL fails on this shard's rows.
        """
        try:
            yield from shard.query(self.query, threads=1)
        except QueryError as error:
            raise ConfigError(self.where, f"fails on shard {shard.number:05d}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class OpenFields:
    """The fields of a prompt that `given` fills."""

    prompt: str = "this kind"  # what has the prompt, for errors
    fields: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()  # of them: those that may be left out
    remark: str = ""  # in the error about one that is left open, after its name


@dataclass(frozen=True, kw_only=True)
class GivenKeys:
    """The keys of a TOML file whose prompt has fields that `given` fills."""

    max_given: int = key(6000, "characters of each other field to show", least=100, stamp_default=False)
    optional: tuple[str, ...] = key(
        (), "fields that `given` may leave out; (none) is shown, as for one without a text", stamp=False
    )

    def __post_init__(self) -> None:
        if unknown := [name for name in self.optional if name not in self.open_fields.fields]:
            raise ValueError(f"optional: the prompt has no {{{unknown[0]}}}")

    @property
    def open_fields(self) -> OpenFields:
        """Those fields of the prompt."""
        raise NotImplementedError

    def fence_given(self, names: Iterable[str], given: Texts) -> dict[str, str]:
        """The texts that the prompt shows for these fields."""
        return {name: fence_texts(given.get(name, ()), limit=self.max_given) for name in names}


def fill_fields(
    run: Run, open_fields: OpenFields, given: Mapping[str, str], *, field: str, caption: str = "", partly: bool = False
) -> GivenTexts:
    """Checks that `given` of a section fills the fields of its prompt, and prepares the SQL.

    Args:
        field: of run.toml that holds `given`.
        caption: the caption pass that the section is of, which the SQL may not read.
        partly: `given` may have fields that the prompt has not.

    Raises:
        ConfigError: `given` leaves a field open, has one that the prompt has not, or is not valid.
    """
    where = f"{run.file}: {field}"
    others = [other for other in run.sections["caption"] if other != caption]
    for missing in sorted(open_fields.fields - open_fields.optional - given.keys()):
        raise ConfigError(
            f"{where}.{missing}",
            f"is missing: the prompt of {open_fields.prompt} has {{{missing}}}{open_fields.remark}; fill it with SQL"
            f' over columns of the image, e.g. "alt_text" or "metadata->>\'$.{missing}\'", or with a SELECT of key and'
            f" text over {' or '.join([IMAGE, *others])}",
        )
    used = {one: sql for one, sql in given.items() if one in open_fields.fields}
    for unused in sorted(given.keys() - used.keys()) if not partly else ():
        has = ", ".join(f"{{{one}}}" for one in sorted(open_fields.fields)) or "none"
        raise ConfigError(f"{where}.{unused}", f"the prompt of {open_fields.prompt} has no {{{unused}}}; it has {has}")
    return prepare_texts(run, used, caption=caption, field=field)


def prepare_texts(
    run: Run, sql: Mapping[str, str], *, caption: str, field: str, with_fields: bool = False
) -> GivenTexts:
    """Checks SQL of a section, and finds what it reads.

    Args:
        sql: by field, an expression over columns of an image and finders, or a SELECT of `key` and one more column over
            images, what finders found, and usable captions of other passes, each a relation by the pass's name.
        caption: the caption pass that the section is of, which the SQL may not read; "": it is of none.
        field: of run.toml that holds `sql`.
        with_fields: a SELECT may have a third column, `fields`; see `GivenTexts.are_objects`.

    Raises:
        ConfigError: it is neither, or reads what it may not.
    """
    if not sql:
        return GivenTexts()
    where = {name: f"{run.file}: {field}.{name}" for name in sql}
    sources = [_find_sources(run, text, caption, where[name]) for name, text in sql.items()]
    columns: dict[str, frozenset[str]] = {}
    for table, some in (item for source in sources for item in source.tables.items()):
        columns[table] = columns.get(table, frozenset()) | some
    names = [name for name in run.sections["caption"] if name.lower() in columns.keys() - VIEWS]
    finders = [name for name in run.sections["find"] if name.lower() in columns.keys() - VIEWS]
    scores = {name: _find_scores(run, name, columns[name.lower()]) for name in names}
    relations = [f"{quote_identifier(name)} AS ({_build_relation(name, *scores[name])})" for name in names]
    relations += [f"{quote_identifier(name)} AS ({_list_found(name)})" for name in finders]
    prefix = f"WITH {', '.join(relations)} " if relations else ""
    with database.connect(run.folder, files="none.parquet") as connection:
        selects = {name: _as_select(run, one) for name, one in sql.items()}
        texts = [
            _find_text(connection, prefix, sql[name], selects[name], where[name], with_fields=with_fields)
            for name in sql
        ]
    parts = [
        TEXTS.format(number=number, text=text, sql=select)
        for number, (select, text) in enumerate(zip(selects.values(), texts, strict=True))
    ]
    folders = [[f"caption/{name}", *(f"score/{score}/{name}" for score in scores[name][0])] for name in names]
    used = {*finders, *(name for one in sql.values() if not SELECT.match(one) for name in find_finders(run, one))}
    return GivenTexts(
        fields=tuple(sql),
        reads=(*list_finder_folders(used), *(folder for some in folders for folder in some)),
        query=f"{prefix}SELECT * FROM ({' UNION ALL '.join(parts)}) ORDER BY key, field, place",
        where=f"{run.file}: {field}",
        are_objects=with_fields and any(text.startswith("json_object") for text in texts),
    )


def _find_sources(run: Run, sql: str, caption: str, where: str) -> database.Sources:
    """The passes and columns that one piece of SQL names.

    Raises:
        ConfigError: it is not valid, or names what it may not.
    """
    captions, finders = [name for name in run.sections["caption"] if name != caption], list(run.sections["find"])
    try:
        if not SELECT.match(sql):
            columns = database.find_columns(sql, clause=CONDITION, kind="expression")
            if unknown := sorted(columns - {*column_names(Image), *finders}):
                known = ", ".join(sorted({*column_names(Image), *finders}))
                advice = f"a SELECT of key and text may read {', '.join([IMAGE, *captions, *finders])}"
                raise ConfigError(where, f"{sql!r} uses {', '.join(unknown)}; the columns are {known}; {advice}")
            check_labels(run, where.removeprefix(f"{run.file}: "), sql)
            return database.Sources(tables={}, common=frozenset())
        sources = database.find_sources(sql.strip().rstrip(";"))
    except QueryError as error:
        raise ConfigError(where, f"{error}{suggest_quotes(run, sql, stages=('caption', 'find', 'score'))}") from error
    readable = {name.lower() for name in (*captions, *finders)} - VIEWS
    twice = {name.lower() for name in run.sections["caption"]} & {name.lower() for name in finders}
    if shared := sorted(twice & sources.tables.keys()):
        raise ConfigError(where, f"{shared[0]} is the name of a caption pass and of a finder; rename one")
    if taken := sorted(sources.common & (readable | VIEWS)):
        raise ConfigError(where, f"WITH {taken[0]} hides a table of that name; choose another name")
    if caption.lower() in sources.tables.keys() - readable:
        raise ConfigError(where, f"{sql!r} reads {caption}, the pass itself; it may read passes before it")
    if unreadable := sorted(sources.tables.keys() - readable - {IMAGE}):
        advice = plugins.explain_unknown(unreadable[0], [IMAGE, *sorted(readable)])
        raise ConfigError(where, f"{sql!r} reads {unreadable[0]}: {advice}")
    return sources


def _find_scores(run: Run, caption: str, columns: frozenset[str]) -> tuple[list[str], list[str]]:
    """The scores of a caption pass among these columns, and those of which the criteria are."""
    rated = [name for name, s in run.sections["score"].items() if not s.captions or caption in s.captions]
    criteria = [name for name in rated if f"{name}{CRITERIA}".lower() in columns]
    return [name for name in rated if name.lower() in columns or name in criteria], criteria


def _build_relation(caption: str, scores: Sequence[str], criteria: Sequence[str]) -> str:
    """The usable captions of a pass in order, with their images' columns and their scores."""
    rows = build_rows(scores, [caption], criteria=criteria)
    return f"SELECT * FROM ({rows}) WHERE status = 'ok' ORDER BY key, candidate"


def _list_found(finder: str) -> str:
    """What a finder found, in order: the columns of the view `found`."""
    return f"SELECT * EXCLUDE (name) FROM found WHERE name = {quote_literal(finder)} ORDER BY key, position"


def _as_select(run: Run, sql: str) -> str:
    """A SELECT on lines of its own, so that a comment at its end ends there."""
    if SELECT.match(sql):
        return f"\n{sql.strip().rstrip(';')}\n"
    return f"SELECT key, (\n{sql}\n) AS text FROM {build_images(find_finders(run, sql))}"


def _find_text(
    connection: database.Connection, prefix: str, sql: str, select: str, where: str, *, with_fields: bool
) -> str:
    """An expression for the text, or a list's texts, of a row of the user's SQL, which `select` makes a SELECT.

    Raises:
        ConfigError: its columns are not `key` and one that has a text, nor these and `fields` where it may be.
    """
    try:
        result = database.run_query(connection, f"{prefix}SELECT * FROM ({select})")
    except QueryError as error:
        raise ConfigError(where, str(error)) from error
    types = {str(name): str(kind) for name, kind, *_ in result.description}
    extra = [name for name in types if name.lower() == FIELDS_COLUMN] if with_fields else []
    others = [name for name in types if name.lower() != "key" and name not in extra]
    if len(others) != 1 or len(types) != 2 + len(extra):
        more = f", and may have {FIELDS_COLUMN}" if with_fields else ""
        columns = ", ".join(types)
        raise ConfigError(where, f"{sql!r} has the columns {columns}; it must have key and one more, the text{more}")
    column, kind = quote_identifier(others[0]), types[others[0]]
    if "JSON" in kind:
        raise ConfigError(where, f"{sql!r} gives JSON; write ->> instead of -> for text")
    if kind.startswith(("STRUCT", "MAP")):
        raise ConfigError(where, f"{sql!r} gives {kind}; name one of its fields")
    if extra and kind.endswith("[]"):
        raise ConfigError(where, f"{sql!r} gives lists of texts, which have no {FIELDS_COLUMN}; unnest them to rows")
    if extra:
        return f"json_object('text', {column}::VARCHAR, 'fields', {quote_identifier(extra[0])})"
    return f"unnest({column}::VARCHAR[])" if kind.endswith("[]") else f"{column}::VARCHAR"
