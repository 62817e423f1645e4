"""The command line: help texts, stdout as data, exit codes, and SQL that cannot leave the run."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from pipeline import config
from pipeline.cli import app
from pipeline.commands import init, status
from pipeline.commands.sql import list_queries, print_query, read_query
from pipeline.errors import MachineError, QueryError
from pipeline.execution.run_state import RunState
from pipeline.progress import say
from pipeline.slurm.jobs import JobMonitor
from pipeline.storage import database
from pipeline.storage.layout import work_folder
from pipeline.storage.parts import write_failure
from stages.exporters import webdataset
from tests.support.runs import ROOT, begin, corpus, files, make, picture, recap, recap_alone, sections, times, write
from tests.support.wrapped import make_tar

COMMANDS = sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)
GROUPS = [group.name for group in app.registered_groups]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    run = begin(folder / "run", sections(corpus(folder / "photos", ["jpg", "png", "cut", "webp"] * 6)))
    assert make(run).exit_code == 0
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_an_example_and_a_mention_in_the_readme(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.help and command.help.split("\n")[0].endswith(".")
    assert f"Example: recap {name}" in command.epilog
    assert all(param.help for param in command.params if param.name not in ("help",))
    assert f"recap {name}" in (ROOT / "README.md").read_text()


def test_help_shows_whole_sentences() -> None:
    shown = recap("--help", COLUMNS="80").stdout
    sentences = re.findall(r"^  [a-z]+ {2,}(.+)$", shown.partition("Commands:")[2], re.MULTILINE)
    assert len(sentences) == len(COMMANDS) + len(GROUPS)
    assert all(re.fullmatch(r"[A-Z].*[^.]\.", sentence) for sentence in sentences), sentences


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["run", ""], ["all", "ingest", "caption", "score", "filter", "export", "caption:dense"]),
        (["try", "score:j"], ["score:judge:dense"]),
        (["serve", "j"], ["judge"]),
        (["query", "yi"], ["yield"]),
    ],
)
def test_the_shell_completes_what_the_run_has(run: Path, typed: list[str], words: list[str]) -> None:
    command, text = typed
    shell = {"_RECAP_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = recap(_TYPER_COMPLETE_ARGS=f"recap {command} --run {run} {text}", check=False, **shell)
    assert {*words} <= {*done.stdout.split()}
    nowhere = recap(_TYPER_COMPLETE_ARGS=f"recap {command} --run {run}/nowhere {text}", check=False, **shell)
    assert nowhere.stderr == ""


def test_version_is_that_of_the_distribution() -> None:
    assert recap("--version").stdout == f"recap {version('recap-pipeline')}\n"


def test_unknown_option_is_a_user_error() -> None:
    assert recap("status", "--jsn", check=False).returncode == 2


@pytest.mark.slow
def test_init_run_status_on_a_folder_of_photographs(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "cut", "png"] * 4)
    recap("init", tmp_path / "run", "--source", photos, "--shard-size", 5)
    done = recap_alone("run", "all", "--run", tmp_path / "run")
    assert done.stdout == ""
    assert re.search(r"^  usable +8 ", done.stderr, re.MULTILINE) and "recap query worst --run" in done.stderr
    assert f"  {tmp_path}/run/export/webdataset\n" in done.stderr
    found = {p["title"]: p for p in json.loads(recap("status", "--run", tmp_path / "run", "--json").stdout)}
    assert found["ingest"]["statuses"] == {"ok": 8, "unreadable": 4}
    assert all(p["num_missing"] == p["stale"] == 0 for p in found.values())
    assert (tmp_path / "run" / "export" / "README.md").exists()


@pytest.mark.slow
def test_a_run_that_keeps_nothing_says_so(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 3)
    run = begin(tmp_path / "run", sections(photos, filter={"rules": {"never": "form > 2"}}))
    done = recap("run", "all", "--run", run)
    assert "NO CAPTION WAS KEPT" in done.stderr and "never (3)" in done.stderr


def test_init_quotes_the_next_command_for_a_shell(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"])
    assert f"--run '{tmp_path}/my run'" in recap("init", tmp_path / "my run", "--source", photos).stderr


def test_init_uses_the_server_that_recap_serve_starts(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"])
    done = recap("init", tmp_path / "run", "--source", photos, "--engine", "openai", "--model", "m")
    assert "recap serve captioner" in done.stderr
    assert 'base_url = "endpoint"' in (tmp_path / "run" / "run.toml").read_text()


def test_failed_init_leaves_nothing_and_does_not_name_its_removed_file(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"])
    done = recap("init", tmp_path / "new" / "run", "--source", photos, "--engine", "vllm", check=False)
    assert (done.returncode, "run.toml" in done.stderr) == (2, False)
    assert done.stderr.startswith("recap: engines.captioner.model: is missing")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["2024/a/000.tar", "README.md"], "webdataset"),
        (["00/000.tar", "00/000_stats.json"], "img2dataset"),
        (["data/train/0.parquet", "preview.png"], "parquet"),
        (["cats/1.jpg", "dogs/2.jpg", "dogs/3.jpg", "boxes/all.parquet"], "folder"),
        (["cats/1.jpg", "metadata.parquet"], "folder"),
        ([".cache/0.tar", "cats/1.jpg"], "folder"),
        (["2020/a/1.jpg", "2020/b/2.jpg", "2020/backup/old.tar.gz"], "folder"),
        (["0.parquet", "1.parquet", "assets/1.png", "assets/2.png", "assets/3.png"], "parquet"),
        (["index.parquet", "train/0.tar", "train/1.tar"], "webdataset"),
        (["captions.parquet", "img/1.jpg", "img/2.jpg"], "folder"),
        (["README.md"], "folder"),
    ],
)
def test_source_is_guessed_from_nested_directories(tmp_path: Path, files: list[str], kind: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert init.guess_source(str(tmp_path))["kind"] == kind


def test_init_refuses_to_overwrite_and_to_guess(tmp_path: Path, run: Path) -> None:
    again = recap("init", run, "--source", "scenes", check=False)
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    nowhere = recap("init", tmp_path / "run", "--source", tmp_path / "nowhere", check=False)
    assert (nowhere.returncode, "nowhere" in nowhere.stderr) == (2, True)
    (tmp_path / "empty").mkdir()
    empty = recap("init", tmp_path / "run", "--source", tmp_path / "empty", check=False)
    assert (empty.returncode, "no images" in empty.stderr) == (2, True)
    inside = recap("init", tmp_path / "empty" / "run", "--source", tmp_path / "empty", check=False)
    assert (inside.returncode, "is inside the corpus" in inside.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b--c d;e ä{}", "o'q p\"q"])
def test_run_may_have_any_name_that_sql_can_quote(tmp_path: Path, name: str) -> None:
    run = begin(tmp_path / name, sections(corpus(tmp_path / "photos", ["jpg"] * 3), filter={"rules": {}}))
    assert make(run).exit_code == 0
    with database.connect(run) as connection:
        assert database.run_query(connection, "SELECT count(*) FROM export").fetchone() == (3,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a[1]", "f*g x?"])
def test_run_with_a_glob_in_its_name_reads_its_own_tables_alone(tmp_path: Path, name: str) -> None:
    for folder, num in ((name, 3), (name.translate({ord(c): "1" for c in "[]*?"}), 5)):
        photos = corpus(tmp_path / f"photos{num}", ["jpg"] * num)
        recap("init", tmp_path / folder, "--source", photos)
        recap("run", "ingest", "--run", tmp_path / folder)
    done = recap("sql", "SELECT count(*) AS n FROM image", "--run", tmp_path / name, "--format", "json")
    assert json.loads(done.stdout) == [{"n": 3}]


def test_section_appended_to_a_fresh_run_toml_is_read(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 3)
    recap("init", tmp_path / "run", "--source", photos)
    with open(tmp_path / "run" / "run.toml", "a") as file:
        file.write('[caption.second]\nrecipe = "short"\nengine = "captioner"\n')
    assert "caption:second" in recap("status", "--run", tmp_path / "run").stdout


@pytest.mark.slow
def test_plan_grows_at_its_end(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 12)
    run = begin(tmp_path / "run", sections(photos))
    make(run)
    names = (
        "README.md",
        "stats.json",
        "croissant.json",
        "index/SHA256SUMS",
        *(f"webdataset/{name}" for name in webdataset.INDEXES),
    )
    of_the_whole_run = ("plan.parquet", *(f"export/{name}" for name in names))
    before = {name: data for name, data in files(run).items() if name not in of_the_whole_run}
    corpus(photos, ["png"] * 5, first=3 * 10**4)
    assert "3 shards, 1 of them new" in recap("plan", "--run", run).stderr
    assert "missing ingest: --array=2" in recap("status", "--run", run).stdout
    assert make(run).exit_code == 0
    assert {name: data for name, data in files(run).items() if name in before} == before
    assert len(json.loads(recap("sql", "SELECT key FROM image", "--run", run, "--format", "json").stdout)) == 17


def test_plan_refuses_a_shard_size_without_effect_and_names_lost_files(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 12)
    run = begin(tmp_path / "run", sections(photos))
    write(run, sections(photos, source={"shard_size": 4}))
    for command in (("plan",), ("run", "all")):
        done = recap(*command, "--run", run, check=False)
        assert (done.returncode, "source.shard_size = 4 has no effect" in done.stderr) == (2, True)
    write(run, sections(photos))
    assert make(run).exit_code == 0
    write(run, sections(photos, source={"shard_size": 4}))
    done = recap("run", "all", "--run", run, check=False)
    assert (done.returncode, "source.shard_size = 4 has no effect" in done.stderr) == (2, True)
    corpus(photos, ["jpg"] * 5, first=20)
    assert "4 shards, 2 of them new" in recap("plan", "--run", run).stderr
    (photos / "00003.jpg").unlink()
    assert "1 planned file missing from the corpus: '00003.jpg'" in recap("plan", "--run", run).stderr


@pytest.mark.slow
def test_plan_names_what_was_edited_after_it_was_ingested(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 6)
    for folder in ("sub", "described"):
        corpus(photos / folder, ["png"] * 4)
    metadata = photos / "described/metadata.csv"
    metadata.write_text("file_name,note\n00001.png,one\n00002.png,two\n")
    run = begin(tmp_path / "run", sections(photos, source={"shard_size": 5}))
    assert make(run, "ingest").exit_code == 0
    for table in (run / "image").iterdir():
        os.utime(table, (time.time() - 10,) * 2)

    def edit(path: Path, text: bytes) -> str:
        path.write_bytes(text)
        return recap("plan", "--run", run).stderr

    (photos / "00000.txt").touch()
    assert "they were ingested" not in recap("plan", "--run", run).stderr
    assert "1 image changed, or what describes them, after they were ingested: '00000.jpg'" in edit(
        photos / "00000.txt", b"another text"
    )
    assert "2 images changed" in edit(photos / "sub/00001.json", b'{"caption": "new"}')
    stderr = edit(metadata, b"file_name,note\n00001.png,one\n00002.png,three\n")
    assert "3 images changed" in stderr
    assert "'described/00002.png'" in stderr
    stderr = edit(photos / "sub/00003.png", (photos / "sub/00002.png").read_bytes())
    assert "4 images changed" in stderr
    (photos / "00003.txt").unlink()
    assert "5 images changed" in recap("plan", "--run", run).stderr
    metadata.unlink()
    stderr = recap("plan", "--run", run).stderr
    assert "6 images changed" in stderr
    older = photos / "sub/00000.png"
    older.write_bytes(older.read_bytes() + b" ")
    os.utime(older, (1e9, 1e9))  # a file with an older time took its place
    stderr = recap("plan", "--run", run).stderr
    assert "7 images changed" in stderr
    (remedy,) = re.findall(r"again: rm (.*?), then `recap (.*?)`", stderr)
    for path in remedy[0].split():
        Path(path).unlink()
    assert recap(*remedy[1].split()).returncode == 0
    assert "they were ingested" not in recap("plan", "--run", run).stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_plan_names_what_was_edited_in_files_of_many_images(tmp_path: Path, kind: str) -> None:
    def write_corpus(names: str, seed: int) -> None:
        rows = [(f"{name}.png", picture(seed if name == "b" else n)) for n, name in enumerate(names)]
        if kind == "parquet":
            table = pa.table({"image": [data for _, data in rows], "text": [name for name, _ in rows]})
            pq.write_table(table, tmp_path / "00000.parquet")
        else:
            (tmp_path / "00000.tar").write_bytes(make_tar(dict(rows)))

    write_corpus("abc", seed=7)
    run = begin(tmp_path / "run", sections(tmp_path, source={"kind": kind, "path": f"{tmp_path}/0*"}))
    assert make(run, "ingest").exit_code == 0
    assert "they were ingested" not in recap("plan", "--run", run).stderr
    write_corpus("abcd" if kind == "webdataset" else "abc", seed=8)
    stderr, parts = recap("plan", "--run", run).stderr, ("2 images changed, or what describes them", "again: rm ")
    if kind == "parquet":  # ingest would refuse it
        parts = ("00000.parquet has been rewritten since it was planned", "set source.allow_rewritten = true")
    assert all(part in stderr for part in parts) and ("rm " in stderr) == (kind == "webdataset")


@pytest.mark.slow
def test_only_the_requested_shards_are_made(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 45)))
    recap("run", "all", "--run", run, "--shard", "1-3:2")
    assert sorted(path.name for path in (run / "image").iterdir()) == ["00001.parquet", "00003.parquet"]
    recap("run", "all", "--run", run, "--shard", "0/2")
    assert sorted(path.name[:5] for path in (run / "verdict").iterdir()) == ["00000", "00001", "00003"]
    wrong = recap("run", "all", "--run", run, "--shard", "9", check=False)
    assert (wrong.returncode, "0-4" in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_sql_prints_every_format(run: Path) -> None:
    query = "SELECT key, status FROM image ORDER BY key"
    rows = [{"key": k, "status": s} for k, s in database.query_rows(database.connect(run), query)]
    assert json.loads(recap("sql", query, "--run", run, "--format", "json").stdout) == rows
    assert list(csv.DictReader(io.StringIO(recap("sql", query, "--run", run, "--format", "csv").stdout))) == rows
    table = recap("sql", query, "--run", run).stdout.splitlines()
    assert (table[0].split(), len(table)) == (["key", "status"], 1 + len(rows))


@pytest.mark.slow
def test_every_format_keeps_numbers_lists_and_columns_of_one_name(run: Path) -> None:
    query = "SELECT 0.25 AS share, 1 AS n, 2 AS n, ['a', 'b'] AS names, {'x': 1.5} AS place"
    (row,) = json.loads(recap("sql", query, "--run", run, "--format", "json").stdout)
    assert row == {"share": 0.25, "n": 1, "n_1": 2, "names": ["a", "b"], "place": {"x": 1.5}}
    (_, cells) = csv.reader(io.StringIO(recap("sql", query, "--run", run, "--format", "csv").stdout))
    assert cells == ["0.25", "1", "2", '["a", "b"]', '{"x": 1.5}']
    query = "SELECT '\\xAA'::BLOB AS data"
    assert json.loads(recap("sql", query, "--run", run, "--format", "json").stdout) == [{"data": "aa"}]
    assert recap("sql", query, "--run", run, "--format", "csv").stdout == "data\naa\n"
    with pytest.raises(QueryError, match="write iv::VARCHAR in the query"):
        print_query(database.connect(run), "SELECT INTERVAL 1 DAY AS iv", "parquet", io.BytesIO())
    query, out = "SELECT 1 AS share, 1 AS n, 2 AS n, 1 AS names, 1 AS place", io.BytesIO()
    print_query(database.connect(run), query, "parquet", out)
    assert pq.read_table(out).column_names == ["share", "n", "n_1", "names", "place"]


@pytest.mark.slow
def test_status_prints_every_format(run: Path, tmp_path: Path) -> None:
    expected = json.loads(recap("status", "--run", run, "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(recap("status", "--run", run, "--format", "csv").stdout)))
    assert [(row["title"], int(row["done"])) for row in rows] == [(p["title"], p["done"]) for p in expected]
    assert [json.loads(row["statuses"]) for row in rows] == [p["statuses"] for p in expected]
    passes = status.summarise_passes(state := RunState(config.load(run)), JobMonitor.query_slurm(state))
    with open(tmp_path / "status.parquet", "wb") as out:
        status.print_passes(passes, JobMonitor.query_slurm(state), "parquet", out)
    stored = pq.read_table(tmp_path / "status.parquet").to_pylist()
    assert [(row["title"], row["num_rows"], row["rows_per_second"]) for row in stored] == [
        (p["title"], p["num_rows"], p["rows_per_second"]) for p in expected
    ]


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "num"), [(io.BytesIO, 500), (Terminal, 99)])
def test_tables_are_cut_on_a_terminal_only(run: Path, kind: type[io.BytesIO], num: int) -> None:
    out = kind()
    with database.connect(run) as connection:
        print_query(connection, f"SELECT '{'x' * 500}' AS text", "table", out)
    assert out.getvalue().decode().count("x") == num + 1  # the heading has one


def test_json_has_no_infinity(run: Path) -> None:
    out = io.BytesIO()
    with database.connect(run) as connection:
        query = "SELECT i, 1 / i AS x, [{'v': 'nan'::DOUBLE}] AS y FROM range(0, 3, 2) AS t(i)"
        print_query(connection, query, "json", out)
        print_query(connection, "FROM image WHERE false", "json", out)
    first, second = {"i": 0, "x": None, "y": [{"v": None}]}, {"i": 2, "x": 0.5, "y": [{"v": None}]}
    assert out.getvalue().decode() == f"{json.dumps([first, second], indent=2)}\n[]\n"


def test_json_keeps_strings_unchanged(run: Path) -> None:
    out = io.BytesIO()
    with database.connect(run) as connection:
        print_query(connection, "SELECT 'a' || chr(8232) || 'b' || chr(133) || chr(10) || 'c' AS x", "json", out)
    assert json.loads(out.getvalue()) == [{"x": "a\u2028b\x85\nc"}]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["csv", "json"])
def test_rows_are_printed_as_they_arrive(run: Path, format: str) -> None:
    out = io.BytesIO()
    with database.connect(run) as connection, pytest.raises(QueryError, match="too far"):
        query = "SELECT CASE WHEN i < 900_000 THEN i ELSE error('too far') END AS i FROM range(1_000_000) AS t(i)"
        print_query(connection, query, format, out)
    assert b"1999" in out.getvalue()


def test_sql_as_parquet_can_be_piped(run: Path, tmp_path: Path) -> None:
    with database.connect(run) as connection, open(tmp_path / "out.parquet", "wb") as out:
        print_query(connection, "FROM verdict", "parquet", out)
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 18


@pytest.mark.parametrize(
    "query",
    [
        "COPY image TO '{run}/x.parquet'",
        "CREATE TABLE x AS SELECT 1",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_text('{run}/../../secret')",
        "ATTACH '{run}/x.db'",
        "SELECT 1; SELECT 2",
        "SET enable_external_access = true",
        "SELECT nothing FROM image",
        "SELEC",
    ],
)
def test_sql_only_reads_and_only_the_run(run: Path, query: str) -> None:
    before = times(run)
    done = recap("sql", query.format(run=run), "--run", run, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("recap: ")
    assert times(run) == before


@pytest.mark.parametrize("comment", ["-- one\n", "--one = two\n", "-- a\n-- b\n", "/* one */ ", "\n--x\n"])
@pytest.mark.parametrize("begin_with", ["", "EXPLAIN "])
def test_a_statement_may_begin_with_a_comment(run: Path, comment: str, begin_with: str) -> None:
    done = recap("sql", f"{comment}{begin_with}SELECT count(*) AS num FROM image", "--run", run)
    assert begin_with or done.stdout.split() == ["num", "24"]


@pytest.mark.slow
def test_sql_reads_nothing_outside_of_the_run_through_links_or_parent_folders(run: Path, tmp_path: Path) -> None:
    outside = run.parent / "outside"
    shutil.copytree(run / "verdict", outside)
    (outside / "secret.txt").write_text("secret")
    link = run / "linked"
    link.symlink_to(outside)
    try:
        for path in (link, run / ".." / "outside", run / "verdict" / ".." / ".." / "outside"):
            for query in ("FROM read_parquet('{}/*.parquet')", "FROM read_text('{}/secret.txt')", "FROM glob('{}/*')"):
                done = recap("sql", query.format(path), "--run", run, check=False)
                assert (done.returncode, done.stdout) == (2, ""), query.format(path)
    finally:
        link.unlink()
        shutil.rmtree(outside)


def test_a_query_without_memory_is_the_fault_of_the_machine(run: Path) -> None:
    import duckdb

    duck = duckdb.connect(config={"memory_limit": "20MB"})
    query = "SELECT list(range::VARCHAR || repeat('x', 99)) FROM range(1000000)"
    with (
        database.Connection(duck, [], handle=os.open(run, os.O_RDONLY)) as connection,
        pytest.raises(MachineError, match="Out of Memory"),
    ):
        list(database.query_rows(connection, query))


COPY = "COPY (SELECT 1) TO '{run}/verdict/00000.parquet'"


@pytest.mark.parametrize(
    "query",
    [
        "EXPLAIN (FORMAT JSON) SELECT count(*) FROM image",
        "EXPLAIN (FORMAT 'json') FROM image",
        "EXPLAIN (FROM image)",
        "EXPLAIN (SELECT key FROM image) UNION (SELECT key FROM image)",
        "EXPLAIN(ANALYZE) FROM image",
        "explain analyze FROM image",
        "FROM repeat('a', 3)",
    ],
)
def test_explain_and_from_are_allowed(run: Path, query: str) -> None:
    out = io.BytesIO()
    with database.connect(run) as connection:
        print_query(connection, query, "json", out)
    assert json.loads(out.getvalue())
    assert "EMPTY_RESULT" not in out.getvalue().decode().upper().replace(" ", "_")


@pytest.mark.parametrize(
    "query",
    [
        f"EXPLAIN ANALYZE {COPY}",
        f"EXPLAIN (ANALYZE) {COPY}",
        f"explain /* a */ analyze {COPY}",
        f"WITH a AS ({COPY}) SELECT 1",
        f"EXPLAIN ANALYZE WITH a AS ({COPY}) SELECT 1",
        f"SELECT 1 WHERE EXISTS (WITH a AS ({COPY}) SELECT 1)",
        "FROM json_execute_serialized_sql(json_serialize_sql($$WITH a AS (" + COPY + ") SELECT 1$$))",
        "FROM query($$WITH a AS (" + COPY + ") SELECT 1$$)",
        "EXPLAIN ANALYZE CREATE TABLE x AS SELECT 1",
        "FROM histogram(image, width)",
        "PRAGMA enable_profiling",
        "CALL enable_logging()",
    ],
)
def test_queries_that_write_are_refused(run: Path, query: str) -> None:
    before = times(run)
    with (
        database.connect(run) as connection,
        pytest.raises(QueryError, match=r"only one reading|not allowed|needs a SELECT"),
    ):
        database.run_query(connection, query.format(run=run))
    assert times(run) == before


@pytest.mark.parametrize(
    "query",
    [
        "EXPLAIN SELECT * FROM image",
        "EXPLAIN ANALYZE FROM image",
        "SUMMARIZE verdict",
        "DESCRIBE SELECT key FROM score",
        "SHOW TABLES",
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3) FROM n",
        "SELECT unnest(flags) FROM caption UNION SELECT key FROM read_parquet('{run}/image/*.parquet')",
    ],
)
def test_reading_statements_are_allowed(run: Path, query: str) -> None:
    with database.connect(run) as connection:
        assert database.run_query(connection, query.format(run=run)).fetchall()


@pytest.mark.slow
def test_damaged_file_fails_only_the_queries_that_read_it(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    damaged = run / "stats" / "caption" / "dense" / "00001.parquet"
    os.truncate(damaged, 50)
    with database.connect_run(config.load(run), files="00000.parquet") as shard:
        assert list(database.query_rows(shard, "SELECT count(*) FROM image")) == [(10,)]
    with database.connect_run(config.load(run)) as connection:
        assert list(database.query_rows(connection, "SELECT 1")) == [(1,)]
        assert ("stats",) in database.query_rows(connection, "SHOW TABLES")
        assert list(database.query_rows(connection, "WITH a AS (FROM IMAGE) SELECT count(*) FROM a, plan")) != [(0,)]
        with pytest.raises(MachineError, match=f"{damaged.name}.*may be removed"):
            database.run_query(connection, "SELECT (SELECT count(*) FROM Stats)")
    done = recap("query", "cost", "--run", run, check=False)
    assert (done.returncode, done.stderr.startswith("recap: a file of stats cannot be read: ")) == (1, True)
    found = {p["title"]: p for p in json.loads(recap("status", "--run", run, "--format", "json").stdout)}
    assert found["caption:dense"]["rows_per_second"] > 0


@pytest.mark.slow
def test_every_named_query_runs_on_a_full_and_on_an_empty_run(run: Path, tmp_path: Path) -> None:
    bare = begin(tmp_path / "bare", sections(corpus(tmp_path / "photos", ["jpg"] * 3)))
    names = [name for name, sentence in list_queries() if sentence.endswith(".")]
    assert names == [line.split()[0] for line in recap("query").stdout.splitlines()]
    assert {"yield", "refusals", "lengths", "worst", "cost"} <= set(names)
    for name in names:
        for folder in (run, bare):
            with database.connect(folder) as connection:
                found = database.run_query(connection, read_query(name)).fetchall()
        assert found or name != "yield"
    steps = {
        row["step"]: row["images"]
        for row in json.loads(recap("query", "yield", "--run", run, "--format", "json").stdout)
    }
    assert (steps["images"], steps["usable"], steps["captioned"]) == (24, 18, 18)
    wrong = recap("query", "yeild", "--run", run, check=False)
    assert (wrong.returncode, "did you mean 'yield'" in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_try_shows_captions_and_scores_and_writes_nothing(run: Path) -> None:
    before = times(run)
    shown = recap("try", "score:judge:dense", "--images", 3, "--run", run).stdout
    assert times(run) == before
    assert shown.count("alt text: ") == shown.count("    score:judge:dense 0: ") == 3
    assert len(re.findall(r"^    dense 0: \w.*\n(?: {8}.*\n)*    score:judge:dense 0: ", shown, re.MULTILINE)) == 3
    assert re.search(r"^score:judge:dense made 3 rows in .*, [\d.,]+ rows/s$", shown, re.MULTILINE)
    captions = recap("try", "caption:dense", "--images", 2, "--run", run).stdout.splitlines()
    again = recap("try", "caption:dense", "--images", 2, "--run", run).stdout.splitlines()
    asked = recap("try", "caption:dense", "--images", 2, "--prompts", "--run", run).stdout.splitlines()
    assert [line for line in asked if line not in captions] and [
        line for line in captions[:-1] if line not in asked
    ] == []
    assert asked.count("    captioner is asked:") == 2 and asked.count("        [image]") == 2
    assert captions[:-1] == again[:-1]  # without the rate
    assert not any("00000.jpg" in line or "00001.png" in line for line in captions)  # not the first images


@pytest.mark.slow
def test_try_shows_images_that_the_pass_asks_for(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png", "cut"] * 12)
    run = begin(tmp_path / "run", sections(photos, caption__dense={"where": "format = 'png'"}))
    shown = recap("try", "caption:dense", "--images", 5, "--run", run).stdout
    names = re.findall(r"^(\S+)  \(ok, ", shown, re.MULTILINE)
    assert len(set(names)) == 5 and all(name.endswith(".png") for name in names)
    assert re.search(r"^caption:dense asks for 5 of \d+ random images$", shown, re.MULTILINE)
    write(run, sections(photos, caption__dense={"where": "width > 9000"}))
    assert recap("try", "caption:dense", "--run", run).stdout == "caption:dense asks for 0 of 36 random images\n"


@pytest.mark.parametrize("stage", ["ingest", "filter"])
def test_try_refuses_passes_that_it_cannot_show(tmp_path: Path, stage: str) -> None:
    run = write(tmp_path / "run", sections(tmp_path / "nowhere"))
    done = recap("try", stage, "--run", run, check=False)
    assert (done.returncode, f"{stage} makes none of them" in done.stderr) == (2, True)


@pytest.mark.parametrize("option", [("--shard", "0"), ("--retry", "error"), ("--workers", "2")])
def test_training_refuses_options_for_shards(run: Path, option: tuple[str, str]) -> None:
    done = recap("run", "train", *option, "--run", run, check=False)
    assert (done.returncode, "do not apply to it" in done.stderr) == (2, True)


def test_plain_duckdb_reads_a_run(run: Path) -> None:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(f"SET file_search_path = '{run}'")
        for view in connection.extract_statements((ROOT / "manifests" / "views.sql").read_text()):
            with suppress(duckdb.IOException):  # this run has no rubrics
                connection.execute(view)
        assert connection.execute("SELECT count(*) FROM caption JOIN image USING (key)").fetchone() == (18,)
        globbed = f"SELECT count(*) FROM read_parquet('{run}/caption/*/*.parquet')"
        assert connection.execute(globbed).fetchone() == (18,)


def test_init_warns_about_ignored_files(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png"])
    (photos / "more.tar").write_bytes(make_tar({"a.jpg": picture(7)}))
    stderr = recap("init", tmp_path / "run", "--source", photos).stderr
    assert f'tars and tables in {photos} are ignored (more.tar): kind = "folder" does not read them' in stderr
    stderr = recap("init", tmp_path / "tars", "--source", photos, "--kind", "webdataset").stderr
    ignored = "(00000.jpg, 00001.png)"
    assert f'image files in {photos} are ignored {ignored}: kind = "webdataset" does not read them' in stderr
    (photos / "more.tar").rename(tmp_path / "more.tar")
    assert "are ignored" not in recap("init", tmp_path / "other", "--source", photos).stderr


@pytest.mark.slow
def test_try_reads_several_tars(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for number in range(9):
        images = {f"{number}_{letter}.jpg": picture(10 * number + n) for n, letter in enumerate("abc")}
        (tmp_path / "tars" / f"{number}.tar").write_bytes(make_tar(images))
    run = begin(tmp_path / "run", sections(tmp_path / "tars", source={"kind": "webdataset"}))
    shown = recap("try", "caption:dense", "--images", 5, "--run", run).stdout
    names = re.findall(r"^(\S+)  \(ok, ", shown, re.MULTILINE)
    assert len(set(names)) == 5 and len({name[0] for name in names}) > 2


@pytest.mark.slow
def test_tables_of_a_removed_pass_are_not_shown(tmp_path: Path) -> None:
    parts = sections(
        corpus(tmp_path / "photos", ["jpg", "png"]), caption__old={"recipe": "short", "engine": "captioner"}
    )
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    query = (
        "SELECT name, '' FROM caption UNION SELECT name, caption FROM score"
        " UNION SELECT name, caption FROM stats WHERE name <> '' ORDER BY ALL"
    )

    def shown() -> list[list[str]]:
        return list(csv.reader(io.StringIO(recap("sql", query, "--format", "csv", "--run", run).stdout)))[1:]

    every = [["dense", ""], ["form", "dense"], ["form", "old"], ["judge", "dense"], ["judge", "old"], ["old", ""]]
    assert shown() == every
    parts["caption.new"] = parts.pop("caption.old")
    write(run, parts)
    assert shown() == [row for row in every if "old" not in row]
    stderr = recap("status", "--json", "--run", run).stderr
    assert stderr.endswith("that run.toml no longer has: caption/old, score/form/old, score/judge/old\n")
    with database.connect(run) as connection:  # plain DuckDB reads every file
        assert sorted(map(list, database.query_rows(connection, query))) == every


@pytest.mark.slow
def test_score_removed_from_run_toml_decides_nothing(tmp_path: Path) -> None:
    parts = sections(
        corpus(tmp_path / "photos", ["jpg", "png"]), caption__old={"recipe": "short", "engine": "captioner"}
    )
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    query = "SELECT DISTINCT reason = 'unscored:judge' IS TRUE FROM verdict WHERE caption = 'old'"
    with database.connect(run) as connection:
        assert list(database.query_rows(connection, query)) == [(False,)]
    parts["score.judge"]["captions"] = ["dense"]
    write(run, parts)
    assert make(run).exit_code == 0
    assert (run / "score" / "judge" / "old").is_dir()
    with database.connect(run) as connection:
        assert list(database.query_rows(connection, query)) == [(True,)]


def test_slow_query_prints_no_progress_bar(run: Path) -> None:
    with database.connect(run) as connection:
        (shown,) = next(database.query_rows(connection, "SELECT current_setting('enable_progress_bar')"))
    assert not shown


def test_missing_input_is_reported_once(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 4), source={"shard_size": 1}))
    done = recap("run", "caption", "--run", run, check=False)
    assert done.returncode == 1
    assert done.stderr.count("`recap run ingest --run") == 1
    assert "caption:dense 00000" in done.stderr and "(and 3 shards more like it)" in done.stderr


@pytest.mark.slow
def test_every_pass_with_missing_input_is_named(tmp_path: Path) -> None:
    parts = sections(
        corpus(tmp_path / "photos", ["jpg"] * 2), source={"shard_size": 1}, filter={"rules": {}, "choose": "form DESC"}
    )
    del parts["score.judge"]
    run = begin(tmp_path / "run", {**parts, "caption.other": {"engine": "captioner"}})
    for stage in ("ingest", "caption"):
        assert make(run, stage).exit_code == 0
    for name in ("dense", "other"):
        (run / "caption" / name / "00001.parquet").unlink()
    stderr = recap("run", "score", "--run", run, check=False).stderr
    assert "score:form:dense 00001 failed" in stderr and "score:form:other 00001 failed" in stderr


def test_missing_api_key_is_named_with_its_engine(tmp_path: Path) -> None:
    engine = {"kind": "openai", "model": "m", "base_url": "endpoint", "api_key_env": "NO_SUCH_KEY"}
    parts = sections(corpus(tmp_path / "photos", ["jpg"])) | {"engines.captioner": engine}
    run = begin(tmp_path / "run", parts)
    done = recap("run", "all", "--run", run, check=False)
    message = f"{run}/run.toml: engines.captioner: api_key_env: the environment has no NO_SUCH_KEY"
    assert (done.returncode, message in done.stderr) == (2, True)


HOSTILE = "a\x1b[2Jb\x9b31mc\u202ed\u2066e\x07f\rg\x00h"


@pytest.mark.slow
def test_no_output_for_people_has_raw_control_or_bidi_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "cut"])
    (photos / "00000.txt").write_text(HOSTILE.replace("\x00", ""), encoding="utf-8")
    run = begin(tmp_path / "run", sections(photos, engines__captioner={"text": HOSTILE}))
    shown = [
        recap("try", "caption:dense", "--images", 2, "--run", run).stdout,
        recap("sql", f'SELECT {database.quote_literal(HOSTILE[:-2])} AS "x\x1by"', "--run", run).stdout,
        recap("sql", f"SELECT nothing AS {database.quote_identifier(HOSTILE[:-2])}", "--run", run, check=False).stderr,
    ]
    write_failure(work_folder(run, "image", 0), HOSTILE)
    shown.append(recap("status", "--run", run).stdout)
    for text in shown:
        assert "\\x1b" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    say(HOSTILE)
    assert capsys.readouterr().err == "a\\x1b[2Jb\\x9b31mc\\u202ed\\u2066e\\x07f\\rg\\x00h\n"
