"""The SQL of run.toml: it may use columns of captions and images, and scores and finders by their sections' names.

A score is a number. A finder is a struct, whose fields sum up what was found in an image: FIELDS, and any label.

Of what conditions are used for, it knows only that rules of `[filter]` may have a column of their own, `quantile`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches

from pipeline import plugins
from pipeline.errors import ConfigError, QueryError
from pipeline.records import Caption, Image, column_names
from pipeline.sections import Run
from pipeline.storage import database
from stages.text.loaded import prepare_plugin

IMAGE_COLUMNS = tuple(name for name in column_names(Image) if name not in column_names(Caption))
CRITERIA = "_criteria"  # after the name of a score: the column of its criteria
QUANTILE = "quantile"  # of a caption in its group, for rules
FIELDS = {  # of a finder, SQL over its row
    "num_found": "len(found)",
    "confidence": "{highest}",  # the highest of any label
    "labels": "[one.label FOR one IN found]",
    "text": "array_to_string([one.text FOR one IN found IF one.text IS NOT NULL], chr(10))",
}
HIGHEST = "coalesce(list_max([coalesce(one.confidence, 1.0) FOR one IN found{condition}]), 0.0)"
NO_FINDERS: Mapping[str, frozenset[str]] = {}
NO_RULES: Mapping[str, str] = {}
CONDITION, ORDER_BY = "SELECT {}", "SELECT 1 ORDER BY {}"  # the context of a user's SQL


def list_competing(run: Run) -> list[str]:
    """The caption passes whose captions may be exported.

    Raises:
        ConfigError: `[filter] captions` names none, one that does not exist, or one twice.
    """
    known, chosen = list(run.sections["caption"]), run.sections["filter"][""].captions
    if chosen is None:
        return known
    field = f"{run.file}: filter.captions"
    for name in chosen:
        if name not in known:
            raise ConfigError(field, plugins.explain_unknown(name, sorted(known)))
    if not chosen or len({*chosen}) < len(chosen):
        raise ConfigError(field, f"is {list(chosen)}; it must name at least one of {', '.join(known)}, each once")
    return [name for name in known if name in chosen]


def find_rule_scores(run: Run) -> dict[str, set[str]]:
    """The score passes that each rule of `[filter]` uses, by the rule's name; for `quantile` those it is made from.

    Raises:
        ConfigError: as `find_scores`.
    """
    settings, found = run.sections["filter"][""], dict[str, set[str]]()
    more = (QUANTILE,) if settings.balance else ()
    for rule, sql in settings.rules.items():
        found[rule] = find_scores(run, f"filter.rules.{rule}", sql, more_columns=more)
        if more and QUANTILE in database.find_columns(sql, clause=CONDITION):
            found[rule] |= find_scores(run, "filter.balance_by", settings.balance_by)
    return found


def find_scores(
    run: Run, field: str, sql: str, *, clause: str = CONDITION, more_columns: Sequence[str] = ()
) -> set[str]:
    """The score passes that a piece of SQL of run.toml uses.

    Args:
        more_columns: that it may use besides those of captions and images.

    Raises:
        ConfigError: it is not valid SQL, ends with a comment, or uses a column that does not exist.
    """
    if rest := database.find_rest(sql):
        message = f"{sql!r} ends with {rest!r}, which is no part of an expression; leave it out"
        raise ConfigError(f"{run.file}: {field}", message)
    try:
        names = database.find_columns(sql, clause=clause)
    except QueryError as error:
        raise ConfigError(f"{run.file}: {field}", f"{error}{suggest_quotes(run, sql)}") from error
    taken = {*column_names(Caption), *column_names(Image), "caption", "num_words", *more_columns}
    folded = {name.casefold(): f"{name} is the name of a column" for name in taken}  # SQL ignores the case
    for stage, article in (("find", "a finder"), ("score", "a score")):
        for name in run.sections[stage]:
            if problem := folded.get(name.casefold()):
                raise ConfigError(f"{run.file}: {stage}.{name}", f"{problem} already; choose another")
            folded[name.casefold()] = f"{name} is the name of {article}, which in SQL is the same name,"
    known = {*run.sections["find"], *run.sections["score"], *taken}
    if unknown := sorted(names - known):
        close = get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; the columns are {', '.join(sorted(known))}"
        message = f"{sql!r} uses {', '.join(unknown)}{hint}"
        raise ConfigError(f"{run.file}: {field}", f"{message}{suggest_quotes(run, sql)}")
    check_labels(run, field, sql, clause=clause)
    return set(names & set(run.sections["score"]))


def check_labels(run: Run, field: str, sql: str, *, clause: str = CONDITION) -> None:
    """Checks the labels that a piece of SQL of run.toml has of finders that declare theirs: others are never found.

    Raises:
        ConfigError: the finder cannot find a label.
    """
    members = database.find_members(sql, clause=clause)
    for name, used in find_finders(run, sql, clause=clause).items():
        labels = _list_labels(run, name)
        if labels is None:
            continue
        known = {label.casefold() for label in labels} | FIELDS.keys()
        wrong = [label for label in sorted(used) if label.casefold() not in known]
        wrong += sorted(text for path, text in members if _is_labels(path, name) and text not in labels)
        if wrong:
            advice = plugins.explain_unknown(wrong[0], sorted(labels))
            raise ConfigError(f"{run.file}: {field}", f"{sql!r} has a label that {name} never finds: {advice}")


def check_flags(run: Run, field: str, sql: str, known: Collection[str], *, clause: str = CONDITION) -> None:
    """
    Raises:
        ConfigError: a piece of SQL of run.toml looks for a flag that no caption can have.
    """
    members = database.find_members(sql, clause=clause)
    names = {text for path, text in members if [one.casefold() for one in path] == ["flags"]}
    if unknown := sorted(names.difference(known)):
        advice = plugins.explain_unknown(unknown[0], sorted(known))
        raise ConfigError(f"{run.file}: {field}", f"{sql!r} has a flag that no caption can have: {advice}")


def _is_labels(path: tuple[str, ...], finder: str) -> bool:
    return path[0] == finder and [field.casefold() for field in path[1:]] == ["labels"]


def _list_labels(run: Run, name: str) -> Collection[str] | None:
    """The labels that a finder can find; None where its module does not say."""
    plugin = run.sections["find"][name].finder
    loaded = prepare_plugin(plugin, run=run.file.parent, field=f"{run.file}: find.{name}")
    labels: Collection[str] | None = getattr(loaded.settings, "labels", None)
    return labels


def find_finders(run: Run, *expressions: str, clause: str = CONDITION) -> dict[str, frozenset[str]]:
    """The finders that pieces of SQL of run.toml use, and of each the fields; `find_scores` checks the SQL.

    Raises:
        QueryError: a piece is not valid SQL.
    """
    paths = [path for sql in expressions for path in database.find_column_paths(sql, clause=clause)]
    used = sorted({path[0] for path in paths} & set(run.sections["find"]))
    return {name: frozenset(path[1] for path in paths if path[0] == name and path[1:]) for name in used}


def merge_finders(*parts: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """The finders of all parts, each with the fields of all."""
    names = sorted({name for part in parts for name in part})
    return {name: frozenset[str]().union(*(part.get(name, ()) for part in parts)) for name in names}


def list_finder_folders(finders: Iterable[str]) -> list[str]:
    return [f"finding/{name}" for name in sorted(finders)]


def build_finders(finders: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """For each finder its name as an SQL identifier, and a SELECT of `key` and its struct, in a column of that name.

    A label that was not found has the confidence 0. Where the finder failed there is no row.

    Args:
        finders: name -> the fields that are used; all but those of FIELDS are labels, in any case.
    """
    selects = []
    for name, used in finders.items():
        labels = sorted({field.casefold() for field in used} - FIELDS.keys())
        values = {field: sql.format(highest=HIGHEST.format(condition="")) for field, sql in FIELDS.items()}
        for label in labels:
            condition = f" IF lower(one.label) = lower({database.quote_literal(label)})"
            values[label] = HIGHEST.format(condition=condition)
        packed = ", ".join(f"{database.quote_identifier(field)} := {sql}" for field, sql in values.items())
        quoted = database.quote_identifier(name)
        select = f"SELECT key, struct_pack({packed}) AS {quoted} FROM finding"
        selects.append((quoted, f"{select} WHERE name = {database.quote_literal(name)} AND status = 'ok'"))
    return selects


def join_finders(finders: Mapping[str, Collection[str]]) -> str:
    """The joins that add a column for each finder to the rows of `image AS i`."""
    return "\n".join(
        f'LEFT JOIN ({select}) AS "finder {number}" ON "finder {number}".key = i.key'
        for number, (_, select) in enumerate(build_finders(finders))
    )


def list_finder_columns(finders: Iterable[str]) -> str:
    """The columns that `join_finders` adds, as a SELECT lists them after others."""
    return "".join(f", {database.quote_identifier(name)}" for name in finders)


def build_images(finders: Mapping[str, Collection[str]]) -> str:
    """What a query reads FROM: the view `image`, with finders as columns."""
    if not finders:
        return "image"
    return f"(SELECT i.*{list_finder_columns(finders)} FROM image AS i {join_finders(finders)}) AS image"


def suggest_quotes(run: Run, sql: str, *, stages: Sequence[str] = ("find", "score")) -> str:
    """Advice on a pass of these stages whose name is an SQL keyword or no identifier; "" if the SQL has none."""
    for stage, name in ((one, name) for one in stages for name in run.sections[one]):
        quoted = re.sub(rf'(?<!["\w]){re.escape(name)}(?!["\w])', f'"{name}"', sql)
        if quoted != sql and not _is_identifier(name):
            what = "finder" if stage == "find" else stage
            return f"; the {what} {name} needs double quotes in SQL, which single quotes keep in TOML: '{quoted}'"
    return ""


def _is_identifier(name: str) -> bool:
    try:
        return database.find_columns(name, clause=CONDITION) == {name}
    except QueryError:
        return False


def build_rows(
    scores: Sequence[str],
    captions: Sequence[str],
    finders: Mapping[str, Collection[str]] = NO_FINDERS,
    *,
    criteria: Sequence[str] = (),
) -> str:
    """A SELECT over a shard's views that the SQL of run.toml is applied to.

    One row for each caption of these passes, with `num_words`, its image's columns, and scores and finders as columns;
    of those of the scores that `criteria` names, the criteria too, as SCORE_criteria.
    """
    quoted = [database.quote_identifier(score) for score in scores]
    values = "".join(f", {name}.value AS {name}" for name in quoted)
    for score in criteria:
        column = database.quote_identifier(f"{score}{CRITERIA}")
        values += f", {database.quote_identifier(score)}.criteria AS {column}"
    joins = "\n".join(
        f"LEFT JOIN (FROM score WHERE name = {database.quote_literal(score)}) AS {name}"
        f" ON {name}.key = c.key AND {name}.caption = c.name AND {name}.candidate = c.candidate"
        for score, name in zip(scores, quoted, strict=True)
    )
    values += list_finder_columns(finders)
    image = ", ".join(f"i.{name}" for name in IMAGE_COLUMNS)
    return f"""
        SELECT c.*, count_words(c.text) AS num_words, {image}{values}
        FROM caption AS c JOIN image AS i ON i.key = c.key
        {joins}
        {join_finders(finders)}
        WHERE c.name IN ({", ".join(map(database.quote_literal, captions))})"""


def check_query(run: Run, field: str, query: str, *, rules: Mapping[str, str] = NO_RULES, rows: str = "") -> None:
    """Plans a query over empty tables, to find wrong types and functions before the first shard.

    Args:
        run: whose tables are named.
        field: of run.toml, for errors.
        query: to plan.
        rules: conditions over the rows, each planned by its name.
        rows: a SELECT for them.

    Raises:
        ConfigError: the query cannot be planned, or a rule is a number or a text, which SQL would take for true.
    """
    with database.connect(run.folder, files="none.parquet") as connection:
        where = f"{run.file}: {field}"
        try:
            for name, sql in rules.items():
                where = f"{run.file}: {field}.rules.{name}"
                described = database.query_rows(connection, f"DESCRIBE SELECT ({sql}) AS value FROM ({rows})")
                _require_condition(where, sql, kind=str(next(iter(described))[1]))
            where = f"{run.file}: {field}"
            database.run_query(connection, f"EXPLAIN {query}")
        except QueryError as error:
            raise ConfigError(where, str(error)) from error


def _require_condition(where: str, sql: str, *, kind: str) -> None:
    if kind not in ("BOOLEAN", '"NULL"'):
        example = f"{sql} <> ''" if kind == "VARCHAR" else f"{sql} >= 0.7"
        raise ConfigError(where, f"{sql!r} is of type {kind}, not a condition; compare it, as in {example}")
