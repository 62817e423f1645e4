"""SQL of `given` and `words`: what it may read, what a pass then depends on, and the texts that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.records import Caption, make_key
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from stages.text.given import prepare_texts
from tests.stages.test_caption import make_image, make_score, parse_run, write_shard
from tests.support.scoring import PROVENANCE

MODEL = {"engine": "model"}
SECTIONS: dict[str, Any] = {
    "caption": {"one": MODEL, "two": MODEL, "t-w-o": MODEL, "image": MODEL, "mine": MODEL},
    "score": {"judge": {"kind": "judge", "engine": "model"}, "form": {"kind": "text", "captions": ["two"]}},
}


def parse(folder: Path) -> Run:
    return parse_run(folder, **SECTIONS)


def find_reads(folder: Path, **sql: str) -> tuple[str, ...]:
    return prepare_texts(parse(folder), sql, caption="mine", field="caption.mine.given").reads


BEST = "WITH best AS (SELECT key, first(text ORDER BY judge) AS text FROM two GROUP BY key) FROM best"
READS = {  # SQL -> the passes that it reads
    "alt_text": "",
    "metadata->>'$.a' -- a comment": "",
    "'German'": "",
    "SELECT key, source_key FROM image": "",
    "SELECT key, text FROM one;": "caption/one",
    "FROM One SELECT key, text WHERE JUDGE > 0.5 -- a comment": "caption/one score/judge/one",
    "SELECT key, unnest(judge_criteria).reason FROM one": "caption/one score/judge/one",
    "SELECT key, text FROM one WHERE judge > 0 UNION ALL SELECT key, text FROM two": (
        "caption/one score/judge/one caption/two"
    ),
    "SELECT key, text FROM (FROM one) WHERE judge > 0": "caption/one score/judge/one",
    "WITH a AS (FROM one), b AS (SELECT key FROM two) SELECT key, a.text FROM a JOIN b USING (key) WHERE judge > 0": (
        "caption/one score/judge/one caption/two"
    ),
    "SELECT key, (SELECT max(d.text) FROM two AS d WHERE d.key = o.key AND o.judge > 0) FROM one AS o": (
        "caption/one score/judge/one caption/two score/judge/two"
    ),
    "SELECT key, text FROM one JOIN two USING (key, text) WHERE form > 0": "caption/one caption/two score/form/two",
    BEST: "caption/two score/judge/two",
    "SELECT key, alt_text FROM image WHERE key IN (SELECT key FROM one)": "caption/one",
    'SELECT key, text FROM "t-w-o"': "caption/t-w-o",
}


@pytest.mark.parametrize("sql", READS)
def test_what_is_read_is_depended_on(tmp_path: Path, sql: str) -> None:
    assert find_reads(tmp_path, a=sql) == tuple(READS[sql].split())


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("alt_txt", "uses alt_txt; the columns are alt_text, .*SELECT of key and text may read image, one, two"),
        ("alt_text; SELECT 1", "not a valid SQL expression"),
        ("(SELECT text FROM one)", "query inside"),
        ("random()", "random is not a function"),
        ("metadata->'$.a'", "gives JSON; write ->> instead of ->"),
        ("{'a': alt_text}", "gives STRUCT.*name one of its fields"),
        ("SELECT text FROM one", "has the columns text; it must have key and one more"),
        ("SELECT * FROM one", "it must have key and one more"),
        ("SELECT key, text FROM ones", "reads ones: 'ones' is none of .*did you mean 'one'"),
        ("SELECT key, text FROM t-w-o", "the caption t-w-o needs double quotes"),
        ("SELECT key, text FROM mine", "reads mine, the pass itself"),
        ("SELECT key, text FROM one WHERE form > 0", '"form" not found'),
        ("SELECT key, text FROM caption", "reads caption: 'caption' is none of image, one"),
        ("SELECT key, value FROM score", "reads score"),
        ("SELECT key, text FROM read_parquet('caption/one/*.parquet')", "read_parquet is not a function"),
        ("SELECT key, text FROM 'caption/one/00000.parquet'", "reads caption/one/00000.parquet"),
        ("SELECT key, text FROM query('FROM caption')", "query is not a function"),
        ("WITH caption AS (FROM caption) SELECT key, text FROM caption", "WITH caption hides a table"),
        ("WITH two AS (FROM two) SELECT key, text FROM two", "WITH two hides a table"),
        ("SELECT key, text FROM one USING SAMPLE 3", "random sample"),
        ("SELECT key, random() FROM one", "random is not a function"),
        ("SELECT key, current_date FROM one", "current_date changes with time"),
        ("FROM (DESCRIBE one)", "describes a table"),
        ("WITH x AS (DELETE FROM one RETURNING key, text) FROM x", "only one reading statement"),
        ("SELECT key, text FROM one) UNION ALL (SELECT key, text FROM two", "not a valid SELECT"),
        ("SELECT key, text FROM one; DROP TABLE one", "not a valid SELECT"),
        ("SELECT key, $1 FROM one", "parameter"),
    ],
)
def test_what_may_not_be_read_is_refused_by_field(tmp_path: Path, sql: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)run.toml: caption.mine.given.a: .*(?:{message})"):
        find_reads(tmp_path, a=sql)


def make_caption(index: int, candidate: int, text: str, status: str = "ok") -> Caption:
    blank = dict.fromkeys(["fields", "error", "finish_reason", "num_prompt_tokens", "num_output_tokens"])
    about = dict.fromkeys(["model", "revision", "prompt_hash", "sampling", "engine"], "")
    row: dict[str, Any] = {**blank, **about, "key": make_key(0, index), "text": text, "status": status}
    return Caption(**row, name="one", candidate=candidate, flags=(), attempt=1, seed=0)


def read_texts(folder: Path, **sql: str) -> list[dict[str, tuple[str, ...]]]:
    """The texts of three images, of which the first and the last have captions."""
    captions = [make_caption(i, n, f"{i}{n}") for i in (0, 2) for n in (0, 1, 2)]
    captions.append(make_caption(2, 3, "cut", status="truncated"))
    scores = [make_score(i, n, (n + 1) % 3 / 2, caption="one") for i in (0, 2) for n in (0, 1, 2)]
    for place, rows in (("caption/one", captions), ("score/judge/one", scores)):
        tables.write_rows(table_path(folder, place, 0), type(rows[0]), rows, PROVENANCE)
    images = [make_image(i, alt_text=f" {i} " if i else "\t", metadata='{"a": ["x", " ", "y"]}') for i in range(3)]
    with write_shard(folder, images, **SECTIONS) as shard:
        find_texts = prepare_texts(shard.run, sql, caption="mine", field="caption.mine.given").open(shard)
        return [dict(find_texts(image.key)) for image in images]


def test_texts_are_by_key_in_the_order_of_the_query(tmp_path: Path) -> None:
    sql = {
        "own": "alt_text",
        "list": "metadata->>'$.a[*]'",
        "best": "SELECT key, text FROM one WHERE judge > 0 ORDER BY judge DESC",
        "all": "SELECT key, text FROM one UNION ALL SELECT key, 'z' FROM one WHERE candidate = 0",
        "none": "SELECT key, NULL FROM image",
        "other": "SELECT '000000000001' AS key, candidate FROM one WHERE key = '000000000000'",
    }
    rows = read_texts(tmp_path, **sql)
    assert all(row.keys() == sql.keys() for row in rows)
    first, second, third = ({name: texts for name, texts in row.items() if texts} for row in rows)
    assert first == {"list": ("x", "y"), "best": ("01", "00"), "all": ("00", "01", "02", "z")}
    assert second == {"own": (" 1 ",), "list": ("x", "y"), "other": ("0", "1", "2")}
    assert third == {"own": (" 2 ",), "list": ("x", "y"), "best": ("21", "20"), "all": ("20", "21", "22", "z")}


def test_sql_that_fails_on_a_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"caption\.mine\.given: fails on shard 00000: .*Could not convert"):
        read_texts(tmp_path, a="(alt_text || 'x')::INTEGER")
