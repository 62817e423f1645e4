"""The find stage: its table and views, and conditions that use finders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import list_passes
from pipeline.execution.passes import Shard
from pipeline.records import Finding
from pipeline.storage import database, tables
from stages.text.conditions import build_images
from stages.text.given import prepare_texts
from tests.support.runs import ROOT, begin, corpus, make, recap, sections, write

pytestmark = pytest.mark.slow

FINDERS: Mapping[str, Mapping[str, Any]] = {
    "find__faults": {"kind": "quality", "min_confidence": 0.0},
    "find__seen": {"kind": "asked", "engine": "judge"},
    "find__facts": {"kind": "metadata"},
}


def query(run: Path, sql: str) -> list[tuple[Any, ...]]:
    with database.connect_run(config.load(run)) as connection:
        return list(database.query_rows(connection, sql))


def find_pass(run: Path, title: str) -> Any:
    return next(p for p in list_passes(config.load(run)) if p.title == title)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("find") / "photos", ["jpg", "png", "cut", "webp", "jpg", "empty", "jpg"])


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    """A run in which finders are used by a caption pass, a rule, the order and the weight."""
    parts = sections(
        photos,
        **FINDERS,
        source={"shard_size": 3},
        curate={"where": "format = 'jpeg'"},
        caption__few={"recipe": "short", "engine": "captioner", "where": "faults.low_entropy > 0.5"},
        filter={"rules": {"seen": "seen.num_found >= 2"}, "choose": "faults.Low_Entropy DESC"},
        export={"weight": "1 + seen.num_found", "texts": "all"},
    )
    run = begin(photos.parent / "run", parts)
    assert make(run).exit_code == 0
    return run


def test_every_usable_image_has_a_row_of_each_finder(run: Path) -> None:
    expected = query(run, "SELECT key FROM image WHERE status = 'ok' ORDER BY key")
    for name in ("faults", "seen", "facts"):
        assert query(run, f"SELECT key FROM finding WHERE name = '{name}' AND status = 'ok' ORDER BY key") == expected
    assert query(run, "SELECT DISTINCT model, engine FROM finding WHERE name = 'seen'") == [("echo", "judge")]


def test_the_view_found_has_the_items_of_the_lists_in_order(run: Path) -> None:
    lists = {(key, name): found for key, name, found in query(run, "SELECT key, name, found FROM finding")}
    columns = "key, name, position, label, text, x0, y0, x1, y1, confidence, other"
    rows = query(run, f"SELECT {columns} FROM found ORDER BY key, name, position")
    assert len(rows) == sum(map(len, lists.values())) > 10
    for key, name, position, *values in rows:
        assert list(lists[key, name][position].values()) == values
    assert query(run, "SELECT count(*) FROM found WHERE x0 NOT BETWEEN 0 AND x1 OR y0 NOT BETWEEN 0 AND y1") == [(0,)]


def test_conditions_use_finders_as_columns(run: Path) -> None:
    found = "SELECT key FROM found WHERE label = 'low_entropy' AND confidence > 0.5"
    kept = "SELECT key FROM image WHERE format = 'jpeg' AND status = 'ok'"
    captioned = query(run, "SELECT DISTINCT key FROM caption WHERE name = 'few' ORDER BY key")
    assert captioned == query(run, f"{kept} AND key IN ({found}) ORDER BY key") != []
    num_found = "SELECT key, len(found) AS num FROM finding WHERE name = 'seen'"
    refused = "SELECT DISTINCT key FROM verdict WHERE reason = 'seen' ORDER BY key"
    assert query(run, refused) == query(run, f"SELECT key FROM ({num_found}) JOIN ({kept}) USING (key) WHERE num < 2")
    weights = f"SELECT count(*) FROM export JOIN ({num_found}) USING (key) WHERE weight <> 1 + num"
    assert query(run, weights) == [(0,)]


def test_passes_depend_on_the_finders_that_they_use_and_on_no_others(run: Path) -> None:
    finding = {folder for p in list_passes(config.load(run)) for folder in p.depends_on if folder.startswith("finding")}
    assert finding == {"finding/faults", "finding/seen"}
    reads = {
        title: {folder for folder in find_pass(run, title).reads if folder.startswith("finding")}
        for title in ("caption:dense", "caption:few", "filter", "export")
    }
    assert reads == {
        "caption:dense": set(),
        "caption:few": {"finding/faults"},
        "filter": {"finding/faults", "finding/seen"},
        "export": {"finding/faults", "finding/seen"},
    }


def test_another_setting_makes_stale_what_uses_the_finder(run: Path) -> None:
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace('kind = "quality"', 'kind = "quality"\nblank = 9.0'))
    try:
        states = json.loads(recap("status", "--json", "--run", run).stdout)
        stale = {state["title"] for state in states if state["stale"]}
    finally:
        (run / "run.toml").write_text(text)
    assert "find:faults" in stale
    assert not stale & {"ingest", "curate", "find:seen", "find:facts", "caption:dense"}


def test_given_reads_what_finders_found(run: Path) -> None:
    """As relations in a SELECT, with one row a thing, and as columns in an expression."""
    sql = {
        "things": "SELECT key, label FROM Seen WHERE x0 IS NOT NULL",
        "number": "'about ' || seen.num_found",
        "faults": "faults.labels",
    }
    parsed = config.load(run)
    given = prepare_texts(parsed, sql, caption="dense", field="caption.dense.given")
    assert given.reads == ("finding/faults", "finding/seen")
    expected: dict[str, dict[str, list[str]]] = {}
    lists = query(run, "SELECT key, name, found FROM finding WHERE name IN ('seen', 'faults')")
    for key, name, found in lists:
        labels = [one["label"] for one in found if name == "faults" or one["x0"] is not None]
        expected.setdefault(key, {})["faults" if name == "faults" else "things"] = labels
        if name == "seen":
            expected[key]["number"] = [f"about {len(found)}"]
    for number in range(3):
        with closing(Shard(run=parsed, number=number, pieces=())) as shard:
            find_texts = given.open(shard)
            for key in sorted(key for key in expected if key.startswith(f"{number:06d}")):
                assert {name: [*texts] for name, texts in find_texts(key).items()} == expected.pop(key)
    assert not expected


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT key, label FROM glasses", r"reads glasses: 'glasses' is none of image, .*seen"),
        ("glasses.text", r"uses glasses; the columns are .*seen.* may read image, .*seen"),
        ("faults.sharp::VARCHAR", r"dense\.given\.x: .* a label that faults never finds: 'sharp' is none of .*blurred"),
        ("SELECT key, * FROM seen", r"has the columns key, .*it must have key and one more"),
        ("SELECT key, label FROM twin", r"twin is the name of a caption pass and of a finder"),
    ],
)
def test_mistakes_in_given_are_named(run: Path, tmp_path: Path, sql: str, message: str) -> None:
    twin = {"find__twin": {"kind": "metadata"}, "caption__twin": {"recipe": "short", "engine": "captioner"}}
    write(tmp_path, sections(run.parent / "photos", **FINDERS, **twin))
    with pytest.raises(ConfigError, match=message):
        prepare_texts(config.load(tmp_path), {"x": sql}, caption="dense", field="caption.dense.given")


def test_every_field_of_a_finder_sums_up_its_list(run: Path) -> None:
    with database.connect_run(config.load(run)) as connection:
        fields = {"faults": {"num_found", "Low_Entropy", "no such label"}}
        sql = f"SELECT key, faults FROM {build_images(fields)} WHERE status = 'ok'"
        rows = dict(database.query_rows(connection, sql))
    lists = dict(query(run, "SELECT key, found FROM finding WHERE name = 'faults'"))
    assert rows.keys() == lists.keys()
    for key, found in lists.items():
        by_label = {one["label"]: one["confidence"] for one in found}
        assert rows[key] == {
            "num_found": len(found),
            "confidence": max(by_label.values(), default=0),
            "labels": list(by_label),
            "text": "",
            "low_entropy": by_label.get("low_entropy", 0),
            "no such label": 0,
        }


@pytest.fixture(scope="module")
def failing(photos: Path) -> Path:
    """A run whose finder never gets an answer, and a rule that needs one."""
    parts = sections(
        photos,
        engines__broken={"kind": "echo", "error_share": 1.0},
        find__seen={"kind": "asked", "engine": "broken", "max_error_share": 1.0},
        caption__few={"recipe": "short", "engine": "captioner", "where": "seen.num_found >= 0"},
        filter={"rules": {"few": "seen.num_found < 9"}},
    )
    run = begin(photos.parent / "failing", parts)
    assert make(run).exit_code == 0
    return run


def test_a_finder_that_failed_is_null_in_conditions(failing: Path) -> None:
    assert {status for (status,) in query(failing, "SELECT status FROM finding")} == {"error"}
    assert query(failing, "SELECT count(*) FROM caption WHERE name = 'few'") == [(0,)]
    assert query(failing, "SELECT DISTINCT reason FROM verdict WHERE reason NOT IN ('empty', 'repeated')") == [
        ("unscored:seen",)
    ]
    assert "failed by error_share" in recap("query", "statuses", "--run", failing).stdout


def test_failed_rows_are_retried(failing: Path) -> None:
    text = (failing / "run.toml").read_text()
    (failing / "run.toml").write_text(text.replace("error_share = 1.0\n\n", "error_share = 0.0\n\n"))
    try:
        recap("run", "find", "--retry", "error", "--run", failing, "--stale", "redo")
        assert query(failing, "SELECT DISTINCT status FROM finding") == [("ok",)]
    finally:
        (failing / "run.toml").write_text(text)


def test_commands_know_the_stage(run: Path) -> None:
    states = [state["title"] for state in json.loads(recap("status", "--json", "--run", run).stdout)]
    assert states.index("find:seen") < states.index("caption:dense")
    tried = recap("try", "find:faults", "--images", 2, "--run", run).stdout
    assert "find:faults: " in tried and "low_entropy" in tried
    assert recap("check", "--run", run).returncode == 0
    assert recap("verify", "--run", run).returncode == 0
    schema = json.loads(recap("schema").stdout)
    kinds = schema["properties"]["find"]["additionalProperties"]["anyOf"]
    assert {"asked", "metadata", "nudity", "ocr", "quality"} == {one["title"] for one in kinds if "title" in one}


def test_a_removed_finder_leaves_the_views_and_is_named(run: Path, tmp_path: Path) -> None:
    for folder in ("finding", "stats"):
        shutil.copytree(run / folder, tmp_path / folder)
    write(tmp_path, sections(run.parent / "photos", find__seen={"kind": "asked", "engine": "judge"}))
    assert query(tmp_path, "SELECT DISTINCT name FROM found ORDER BY name") == [("seen",)]
    assert query(tmp_path, "SELECT DISTINCT name FROM stats WHERE stage = 'find'") == [("seen",)]
    assert database.find_leftovers(config.load(tmp_path)) == ["finding/facts", "finding/faults"]


def test_a_run_without_finders_imports_none(photos: Path, tmp_path: Path) -> None:
    write(tmp_path, sections(photos))
    code = (
        "import sys; from pathlib import Path; from pipeline import config; from pipeline.execution.pass_graph import"
        " list_passes; list_passes(config.load(Path(sys.argv[1]))); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not [name for name in done.stdout.split() if name.startswith(("stages.find", "cv2"))]


def test_rows_survive_a_round_trip(run: Path) -> None:
    rows = [row for file in sorted((run / "finding/seen").iterdir()) for row in tables.read_rows(file, Finding)]
    assert all(row.name == "seen" and row.found and row.found[0].label for row in rows)
