"""The runner: rows are conserved, finished work is skipped, changes are named, and killed runs resume."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, progress
from pipeline.errors import MachineError, RefusedError
from pipeline.execution.pass_graph import list_passes
from pipeline.execution.states import ShardStates
from pipeline.records import Caption, Image, Record, Score, Stat, Verdict
from pipeline.storage import tables
from pipeline.storage.layout import unfinished_path, work_folder
from pipeline.storage.parts import Parts
from pipeline.storage.plan import Plan
from tests.support.runs import BAD, GOOD, ROOT, begin, corpus, files, make, recap_alone, sections, times, write

# The command line with parts ten times a second, so that a short shard has some to adopt.
HASTY = "from pipeline import cli; from pipeline.storage import parts; parts.MAX_AGE = 0.1; cli.main()"
MIX = [*GOOD, *BAD, *GOOD, *GOOD, "cut", *GOOD, *GOOD, *GOOD, *GOOD]


def rows(run: Path, folder: str, record: type[Record]) -> list[Record]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in tables.read_rows(path, record)]


@pytest.mark.slow
@given(
    kinds=st.lists(st.sampled_from([*GOOD, *GOOD, *BAD]), min_size=1, max_size=25),
    candidates=st.integers(1, 3),
    shares=st.fixed_dictionaries(
        {f"{name}_share": st.sampled_from([0.0, 0.15]) for name in ("error", "empty", "invalid")}
    ),
    shard_size=st.integers(3, 9),
)
@settings(max_examples=8)
def test_rows_are_conserved(kinds: list[str], candidates: int, shares: dict[str, float], shard_size: int) -> None:
    """Row counts match for any mix of inputs, statuses, candidates and passes."""
    with TemporaryDirectory() as tmp:
        run = begin(
            Path(tmp) / "run",
            sections(
                corpus(Path(tmp) / "photos", kinds),
                source={"shard_size": shard_size},
                engines__captioner=shares,
                engines__judge=shares,
                caption__dense={"num_candidates": candidates},
                caption__wide={"recipe": "short", "engine": "judge", "where": "width >= height AND key LIKE '%2'"},
                score__form={"captions": ["dense"]},
            ),
        )
        assert make(run).exit_code == 0
        images = rows(run, "image", Image)
        dense, wide = rows(run, "caption/dense", Caption), rows(run, "caption/wide", Caption)
        verdicts = rows(run, "verdict", Verdict)
        scores = {name: rows(run, f"score/{name}", Score) for name in ("form/dense", "judge/dense", "judge/wide")}
    assert [image.source_key for image in images] == [
        f"{i:05d}.{k if k in GOOD else 'jpg'}" for i, k in enumerate(kinds)
    ]
    ok = [image.key for image in images if image.status == "ok"]
    assert len(ok) == sum(kind in GOOD for kind in kinds)
    assert [row.id for row in dense] == [(key, c) for key in ok for c in range(candidates)]
    assert [row.id for row in wide] == [(key, 0) for key in ok if key.endswith("2")]
    assert [row.id for row in scores["form/dense"]] == [row.id for row in dense if row.status == "ok"]
    assert [row.id for row in scores["judge/dense"]] == [row.id for row in dense if row.status == "ok"]
    assert [row.id for row in scores["judge/wide"]] == [row.id for row in wide if row.status == "ok"]
    assert [row.id for row in verdicts] == sorted((row.key, row.name, row.candidate) for row in [*dense, *wide])
    assert all(count == 1 for count in Counter(v.key for v in verdicts if v.chosen).values())
    assert {v.key for v in verdicts if v.chosen} == {v.key for v in verdicts if v.keep}
    assert all((v.reason is None) == v.keep for v in verdicts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run = begin(folder / "run", sections(corpus(folder / "photos", MIX * 3), caption__dense={"num_candidates": 2}))
    assert make(run).exit_code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_finished_run_is_left_alone(run: Path) -> None:
    before = times(run)
    outcome = make(run)
    assert (outcome.done, outcome.exit_code) == (0, 0)
    assert times(run) == before


def test_changed_timeouts_and_windows_change_nothing(run: Path, finished: Path) -> None:
    photos = finished.parent / "photos"
    write(run, sections(photos, caption__dense={"num_candidates": 2}, engines__captioner={"delay": 0.001}))
    before = times(run)
    assert make(run).done == 0
    assert times(run) == before


@pytest.mark.slow
def test_a_new_pass_judge_or_engine_leaves_the_finished_tables_alone(run: Path, finished: Path) -> None:
    photos = finished.parent / "photos"
    before = {name: data for name, data in times(run).items() if "/verdict/" not in name and "/export/" not in name}
    write(
        run,
        sections(
            photos,
            caption__dense={"num_candidates": 2},
            engines__third={"kind": "echo", "text": "Something else."},
            caption__second={"recipe": "short", "engine": "third"},
            score__other={"kind": "judge", "engine": "third", "rubric": "dense", "captions": ["dense"]},
        ),
    )
    assert make(run).exit_code == 0
    after = times(run)
    assert {name: after[name] for name in before if not name.endswith("run.toml")} == {
        name: when for name, when in before.items() if not name.endswith("run.toml")
    }
    assert len(rows(run, "caption/second", Caption)) * 3 == len(rows(run, "verdict", Verdict))


def states(run: Path) -> dict[str, str]:
    loaded = config.load(run)
    plan, _ = Plan.load(run / "plan.parquet")
    passes = list_passes(loaded)
    ledger = ShardStates(loaded, plan, passes)
    return {p.title: ledger.state(p, 0).kind for p in passes}


@pytest.mark.slow
def test_a_changed_word_is_named_and_makes_exactly_its_dependants_stale(run: Path) -> None:
    recipe = (ROOT / "stages" / "recipes" / "dense.toml").read_text()
    (run / "recipes").mkdir()
    (run / "recipes" / "dense.toml").write_text(recipe.replace("Describe", "Depict", 1))
    assert "Depict" in (run / "recipes" / "dense.toml").read_text()
    before = times(run)
    with pytest.raises(RefusedError, match=r"\[Describe\] -> \[Depict\]"):
        make(run)
    assert times(run) == before
    assert states(run) == {
        "ingest": "done",
        "caption:dense": "stale",
        "score:form:dense": "stale",
        "score:judge:dense": "stale",
        "filter": "stale",
        "export": "stale",
    }
    assert make(run, stale="keep").done == 0
    assert times(run) == before
    assert make(run, stale="redo").exit_code == 0
    assert set(states(run).values()) == {"done"}


def test_a_changed_condition_leaves_captions_and_scores_done(run: Path, finished: Path) -> None:
    photos = finished.parent / "photos"
    write(run, sections(photos, caption__dense={"num_candidates": 2}, filter={"rules": {"judged": "judge >= 0.6"}}))
    with pytest.raises(RefusedError, match=r"judge >= \[?.*0\.4.*0\.6|\[0\.4\] -> \[0\.6\]"):
        make(run)
    assert states(run)["score:judge:dense"] == "done"
    assert states(run)["filter"] == "stale"


@pytest.mark.slow
def test_retry_makes_exactly_the_failed_rows_again(tmp_path: Path) -> None:
    source = corpus(tmp_path / "photos", ["jpg"] * 30)
    parts = sections(source, engines__captioner={"error_share": 0.3}, caption__dense={"num_candidates": 2})
    run = begin(tmp_path / "run", parts, max_error_share=1.0)
    make(run, "ingest")
    make(run, "caption")
    before = rows(run, "caption/dense", Caption)
    failed = [row.id for row in before if row.status == "error"]
    assert failed
    outcome = make(run, "caption", retry=frozenset({"error"}))
    after = rows(run, "caption/dense", Caption)
    assert [row.id for row in after] == [row.id for row in before]
    assert [row for row in after if row.id not in failed] == [row for row in before if row.status != "error"]
    stats = [s for p in sorted((run / "stats" / "caption" / "dense").glob("*")) for s in tables.read_rows(p, Stat)]
    assert sum(s.num_new_rows for s in stats if s.num_new_rows != s.num_rows) == len(failed)
    assert outcome.exit_code == 0


@pytest.mark.slow
def test_tables_that_a_retry_made_stale_are_named_and_not_skipped(run: Path, finished: Path) -> None:
    photos = finished.parent / "photos"
    parts = sections(photos, caption__dense={"num_candidates": 2}, engines__captioner={"empty_share": 0.5})
    write(run, parts, max_error_share=1.0)
    make(run, stale="redo")
    with pytest.raises(RefusedError, match="score:judge:dense: its input caption/dense changed"):
        make(run, retry=frozenset({"empty"}))
    assert states(run)["caption:dense"] == "done"
    assert states(run)["score:judge:dense"] == "stale"


def test_retry_excludes_stale_keep_and_tables_without_statuses(run: Path) -> None:
    with pytest.raises(RefusedError, match="choose one"):
        make(run, "caption", retry=frozenset({"empty"}), stale="keep")
    with pytest.raises(RefusedError, match="no row here has a status"):
        make(run, "export", retry=frozenset({"error"}))


@pytest.mark.slow
def test_a_retry_of_images_packs_the_sound_ones_again_without_reading_them(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "cut", "jpg", "png", "empty", "jpg"])
    run = begin(tmp_path / "run", sections(photos, source={"shard_size": 3, "pack": True}))
    reference = Path(shutil.copytree(run, tmp_path / "reference"))
    make(reference, "ingest")
    broken = photos / "00002.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300].ljust(len(whole), b"\0"))
    make(run, "ingest")
    assert [row.status for row in rows(run, "image", Image)].count("unreadable") == 2
    broken.write_bytes(whole)
    for name in ("00000.jpg", "00003.png", "00005.jpg"):
        (photos / name).write_bytes(b"lost since")
    before = times(run / "shards")
    assert make(run, "ingest", retry=frozenset({"unreadable"})).done == 1
    assert files(run) == files(reference)
    assert times(run / "shards").items() - before.items() == {
        (str(run / "shards/00000.tar"), (run / "shards/00000.tar").stat().st_mtime_ns)
    }


@pytest.mark.slow
def test_rows_of_a_damaged_part_are_made_again(tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "caption")
    loaded = config.load(run)
    (p,) = (p for p in list_passes(loaded) if p.folder == "caption/dense")
    recipe = ShardStates(loaded, Plan.load(run / "plan.parquet")[0], list_passes(loaded)).provenance(p, 0)
    parts = Parts(work_folder(run, p.folder, 0), Caption, recipe)
    rows_of_shard = list(tables.read_rows(finished / "caption" / "dense" / "00000.parquet", Caption))
    for row in rows_of_shard[:7]:
        parts.add(row)
    parts.flush()
    (part,) = (run / ".work" / "caption" / "dense" / "00000").glob("*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 4] ^= 0xFF
    part.write_bytes(data)
    assert make(run).exit_code == 0
    assert files(run / "caption") == files(finished / "caption")


@pytest.mark.slow
def test_a_retry_adopts_no_parts_of_the_table_that_it_replaces(tmp_path: Path) -> None:
    source = corpus(tmp_path / "photos", ["jpg"] * 30)
    run = begin(tmp_path / "run", sections(source, engines__captioner={"empty_share": 0.4}), max_error_share=1.0)
    make(run, "ingest")
    make(run, "caption")
    table = run / "caption" / "dense" / "00000.parquet"
    footer = tables.read_footer(table)
    assert footer is not None and footer.statuses["empty"] > 0
    parts = Parts(work_folder(run, "caption/dense", 0), Caption, footer.provenance)  # as after a kill before clean-up
    for row in tables.read_rows(table, Caption):
        parts.add(row)
    parts.flush()
    make(run, "caption", shards="0", retry=frozenset({"empty"}))
    (stat,) = tables.read_rows(run / "stats" / "caption" / "dense" / "00000.parquet", Stat)
    assert stat.num_new_rows == footer.statuses["empty"]
    interrupted = tables.read_footer(table)
    assert interrupted is not None
    again = Parts(
        work_folder(run, "caption/dense", 0), Caption, footer.provenance, retry_of=(interrupted.digest, "empty")
    )
    for row in tables.read_rows(table, Caption):
        if row.status == "empty":
            again.add(replace(row, status="ok", text="made by a retry that was killed"))
    again.flush()
    make(run, "caption", shards="0", retry=frozenset({"empty"}))
    texts = [row.text for row in tables.read_rows(table, Caption)]
    assert texts.count("made by a retry that was killed") == interrupted.statuses.get("empty", 0)


@pytest.mark.slow
def test_work_in_use_outlives_the_shard_and_abandoned_work_does_not(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 3)))
    make(run, "ingest")
    make(run, "caption")
    table = run / "caption" / "dense" / "00000.parquet"
    footer, caption_rows = tables.read_footer(table), list(tables.read_rows(table, Caption))
    assert footer is not None
    table.unlink()
    work = work_folder(run, "caption/dense", 0)
    other = Parts(work, Caption, replace(footer.provenance, version=99))
    other.add(caption_rows[0])
    other.flush()
    (used,) = work.glob("*.parquet")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    live = unfinished_path(table, work=work)
    gone = work / live.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    old_part, old = work / "0123456789abcdef-0.parquet", work / ".00000.parquet.0123456789ab.tmp"
    beside = [run / path.name.replace("00000.parquet", "run.toml") for path in (live, gone, old)]
    for path in (live, gone, old_part, old, *beside):
        path.write_bytes(b"")
    for path in (old_part, old, beside[-1]):
        os.utime(path, (0, 0))
    assert make(run, "caption").exit_code == 0
    assert sorted(work.iterdir()) == sorted([used, live])
    assert [path for path in beside if path.exists()] == [beside[0]]
    assert {row.id for row in tables.read_rows(used, Caption)} == {caption_rows[0].id}


def test_statistics_are_in_place_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 3)))

    def die(_: Parts) -> None:
        raise MachineError("killed after the table")

    monkeypatch.setattr(Parts, "discard", die)
    assert make(run, "ingest").exit_code == 1
    assert (run / "image" / "00000.parquet").exists()
    (stat,) = tables.read_rows(run / "stats" / "image" / "00000.parquet", Stat)
    assert (stat.num_rows, stat.num_new_rows) == (3, 3)


@pytest.mark.slow
def test_a_dead_engine_is_a_failure_and_not_a_stop(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 60), engines__captioner={"die_after": 15})
    run = begin(tmp_path / "run", parts)
    make(run, "ingest")
    outcome = make(run, "caption")
    assert (outcome.exit_code, outcome.stopped) == (1, False)
    assert any("die_after" in why for why in outcome.failures.values())
    assert len(outcome.failures) <= 2  # no further shard is begun
    assert make(run, "caption").done >= 1  # a new engine goes on


@pytest.mark.slow
def test_an_image_that_changed_since_ingest_is_not_captioned(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 4), source={"pack": True}))
    make(run, "ingest")
    tar = run / "shards" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 0xFF
    tar.write_bytes(data)
    outcome = make(run)
    assert outcome.exit_code == 1
    assert any("changed since ingest" in why for why in outcome.failures.values())


@pytest.mark.slow
def test_shards_exported_one_by_one_end_with_a_card_of_the_whole_run(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 25)))
    for shard in ("0", "1"):
        make(run, shards=shard)
    assert not (run / "export" / "README.md").exists()
    make(run, shards="2")
    assert (run / "export" / "README.md").exists()


def test_retry_of_an_unknown_status_is_refused(run: Path) -> None:
    with pytest.raises(RefusedError, match="--retry eror: the statuses here are empty, error, invalid"):
        make(run, "caption", retry=frozenset({"eror"}))


@pytest.mark.slow
def test_a_shard_fails_when_too_many_rows_fail(tmp_path: Path) -> None:
    source = corpus(tmp_path / "photos", ["jpg"] * 260)
    parts = sections(source, source={"shard_size": 260}, engines__captioner={"invalid_share": 1.0})
    parts["caption.dense"] = {"recipe": "structured", "engine": "captioner"}
    run = begin(tmp_path / "run", parts)
    done = recap_alone("run", "all", "--run", run, check=False)
    assert done.returncode == 1
    assert "200 of its first 200 rows failed" in done.stderr
    assert "invalid" in done.stderr
    assert not list((run / "caption").rglob("*.parquet"))


@pytest.mark.slow
def test_a_pass_whose_input_is_missing_names_it(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 3)))
    done = recap_alone("run", "caption", "--run", run, check=False)
    assert done.returncode == 1
    assert "image/00000.parquet is missing" in done.stderr


@pytest.mark.slow
def test_seconds_of_overlapping_shards_add_up_to_those_of_the_pass(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 20), engines__captioner={"delay": 0.1})
    run = begin(tmp_path / "run", parts)
    make(run, "ingest")
    start = time.monotonic()
    make(run, "caption")
    whole = time.monotonic() - start
    seconds = [stat.seconds for stat in rows(run, "stats/caption/dense", Stat)]
    assert len(seconds) == 2
    assert 10 * 0.1 <= sum(seconds) <= whole


@pytest.mark.slow
def test_an_engine_opens_once_serves_two_shards_at_a_time_and_closes_before_the_next(tmp_path: Path) -> None:
    record = tmp_path / "record"
    names = {
        f"engines__{n}": {"kind": "tests.support.recording", "name": n, "record": str(record)}
        for n in ("captioner", "judge")
    }
    names["engines__captioner"]["overlap"] = 2  # it would wait for ever if shards came one after the other
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 40), **names)
    parts["caption.second"] = {"recipe": "short", "engine": "captioner"}
    run = begin(tmp_path / "run", parts)
    assert make(run).exit_code == 0
    events = record.read_text().splitlines()
    calls = [line for line in events if not line.startswith("generate")]
    assert calls == ["open captioner", "close captioner", "open judge", "close judge"]
    assert events.count("generate captioner") == 2 * 4  # two passes over four shards
    record.unlink()
    make(run)
    assert not record.exists()  # what is done needs no engine


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_one_and_several_workers_make_the_same_tables(finished: Path, tmp_path: Path, workers: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.toml", "plan.parquet"):
        shutil.copy(finished / name, run / name)
    assert make(run, "all", workers=workers).exit_code == 0
    assert files(run) == files(finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_runs_killed_at_any_moment_resume_to_the_same_bytes(tmp_path: Path, finished: Path, seed: int) -> None:
    """After SIGKILLs, the same command gives the same bytes."""
    run = tmp_path / "run"
    run.mkdir()
    photos = finished.parent / "photos"
    slow = {"delay": 0.004}
    write(run, sections(photos, caption__dense={"num_candidates": 2}, engines__captioner=slow, engines__judge=slow))
    shutil.copy(finished / "plan.parquet", run)
    noise, kills = random.Random(seed), 0
    while kills < 4:
        child = subprocess.Popen(
            [sys.executable, "-c", HASTY, "run", "all", "--run", str(run)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        time.sleep(noise.uniform(0.8, 2.2))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() != 0
        if child.returncode == 0:
            break
    assert kills
    assert make(run).exit_code == 0
    assert {k: v for k, v in files(run).items() if k != "run.toml"} == {
        k: v for k, v in files(finished).items() if k != "run.toml"
    }


@pytest.mark.slow
def test_a_signal_stops_in_time_and_the_same_command_resumes(tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    parts = sections(
        finished.parent / "photos", caption__dense={"num_candidates": 2}, engines__captioner={"delay": 0.05}
    )
    write(run, parts)
    shutil.copy(finished / "plan.parquet", run)
    make(run, "ingest")
    child = subprocess.Popen(
        [sys.executable, "-c", HASTY, "run", "caption", "--run", str(run)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((run / ".work" / "caption").rglob("*.parquet")):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, words = child.communicate()
    assert child.returncode == 75
    assert "SIGTERM" in words
    kept = sum(1 for path in (run / ".work" / "caption").rglob("*.parquet") for _ in tables.read_rows(path, Caption))
    assert kept > 0
    assert make(run).exit_code == 0
    assert files(run / "caption") == files(finished / "caption")


def test_time_left_is_not_estimated_from_the_first_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    with progress.ProgressMeter("caption:dense", num_shards=1, num_rows=1000) as meter:
        for seconds, rows, end in [(4.0, 19, "0 failed\n"), (4.5, 1, " left\n"), (5.0, 0, " left\n")]:
            now[0] = seconds
            meter.add(rows, 0)
            assert capsys.readouterr().err.endswith(end)
    now[0] = 0.0
    with progress.ProgressMeter("caption:dense", num_shards=1, num_rows=1000) as meter:
        now[0] = 5.0
        meter.add(1, 0)
        assert capsys.readouterr().err.endswith("0 failed, 1 h 23 min left\n")


def test_time_left_counts_only_rows_that_are_still_to_be_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress.ProgressMeter("caption:dense", num_shards=1, num_rows=1000) as meter:
        meter.add(0, 0, restored=700)
        now[0] = 100.0
        meter.add(200, 1)
        assert capsys.readouterr().err.endswith("200 rows, 2.0 rows/s, 1 failed, 50 s left\n")
        meter.shard_done()
