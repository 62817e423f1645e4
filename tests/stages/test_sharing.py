"""Shared captions: of equal files one is asked about, and each has its rows, whoever makes the shards and when."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.execution.pass_graph import list_passes
from pipeline.records import Caption, Curation, Exported, MeasuredImage, Score, SharedCaption, SharedScore
from pipeline.slurm.blocks import plan_jobs
from pipeline.storage import tables
from tests.support.runs import begin, corpus, files, make, recap, sections, write

COPIES = {
    "00000.jpg": ("00001a.jpg", "00004a.jpg", "00007a.jpg"),
    "00005.jpg": ("00005b.jpg",),
    "00003.jpg": ("9.jpg",),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = corpus(tmp_path_factory.mktemp("sharing") / "photos", ["jpg", "png", "cut", "jpg", "webp", "jpg"] * 2)
    for original, copies in COPIES.items():
        for copy in copies:
            shutil.copy(folder / original, folder / copy)
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("shared"), photos, share=True)
    assert make(run).exit_code == 0
    return run


def start(folder: Path, photos: Path, **curate: Any) -> Path:
    return begin(folder / "run", configure(photos, **curate))


def configure(photos: Path, **curate: Any) -> dict[str, dict[str, Any]]:
    return sections(
        photos,
        source={"shard_size": 4},
        curate={"max_distance": 0, **curate},
        caption__dense={"num_candidates": 2},
        filter={"rules": {}},
    )


def read(run: Path, folder: str, record: Any) -> list[Any]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in tables.read_rows(path, record)]


def find_originals(run: Path) -> dict[str, str]:
    """The key of each image that is not dropped -> that of the first with its bytes."""
    images = [image for image in read(run, "image", MeasuredImage) if image.status == "ok"]
    first: dict[str, str] = {}
    return {image.key: first.setdefault(image.sha256, image.key) for image in images}


def test_one_of_equal_files_is_asked_about_and_each_has_its_rows(run: Path) -> None:
    originals = find_originals(run)
    assert len(set(originals.values())) == len(originals) - 5
    kept = [row for row in read(run, "curation", Curation) if not row.drop]
    assert {row.key: row.copy_of for row in kept} == originals
    asked = read(run, "asked/caption/dense", Caption)
    assert Counter(row.key for row in asked) == dict.fromkeys(originals.values(), 2)
    by_id = {row.id: row for row in asked}
    rows = read(run, "caption/dense", SharedCaption)
    assert [row.id for row in rows] == [(key, candidate) for key in sorted(originals) for candidate in (0, 1)]
    for row in rows:
        original = by_id[originals[row.key], row.candidate]
        is_copy = row.key != original.key
        assert (row.text, row.status, row.seed, row.model) == (
            original.text,
            original.status,
            original.seed,
            original.model,
        )
        assert row.shared_from == (original.key if is_copy else None)
        assert row.num_output_tokens == (None if is_copy else original.num_output_tokens)


def test_scores_are_shared_too(run: Path) -> None:
    originals = find_originals(run)
    for name in ("form", "judge"):
        asked = {row.id: row for row in read(run, f"asked/score/{name}/dense", Score)}
        rows = read(run, f"score/{name}/dense", SharedScore)
        assert {key for key, _ in asked} <= set(originals.values())
        assert len(rows) == sum(1 for row in read(run, "caption/dense", SharedCaption) if row.status == "ok")
        for row in rows:
            original = asked[originals[row.key], row.candidate]
            assert (row.value, row.criteria) == (original.value, original.criteria)
            assert row.shared_from == (None if row.key == original.key else original.key)


def test_every_copy_is_exported_and_tokens_are_counted_once(run: Path) -> None:
    originals = find_originals(run)
    rows = {row.key: row for row in read(run, "export/index", Exported)}
    assert rows.keys() == originals.keys()
    assert len({row.source_key for row in rows.values()}) == len(rows)
    assert all(rows[key].caption == rows[original].caption for key, original in originals.items())
    asked = sum(row.num_output_tokens or 0 for row in read(run, "asked/caption/dense", Caption))
    sql = "SELECT sum(num_output_tokens)::BIGINT FROM {} WHERE {}"
    for statement in (sql.format("caption", "true"), sql.format("stats", "name = 'dense'")):
        assert recap("sql", statement, "--format", "csv", "--run", run).stdout.splitlines()[1] == str(asked)
    assert recap("verify", "--run", run).stdout == ""
    assert "0 shard tables made" in recap("run", "all", "--run", run).stderr


@pytest.mark.slow
def test_shards_give_the_same_rows_in_any_order(run: Path, photos: Path, tmp_path: Path) -> None:
    again = start(tmp_path, photos, share=True)
    make(again, "curate")
    make(again, "ingest")
    make(again, "curate")
    for shard in (3, 1):
        make(again, "caption", shards=str(shard))
    assert make(again, workers=1).exit_code == 0
    for folder in ("caption", "score", "export"):
        one, other = files(run / folder, without=("index",)), files(again / folder, without=("index",))
        assert one.keys() == other.keys()
    for folder, record in (("caption/dense", SharedCaption), ("score/judge/dense", SharedScore)):
        assert read(again, folder, record) == read(run, folder, record)


@pytest.mark.slow
def test_an_original_that_is_asked_again_changes_its_copies(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (again / "asked/caption/dense/00000.parquet").unlink()
    text = (again / "run.toml").read_text()
    write_seed = f"seed = 7\n{text}"
    (again / "run.toml").write_text(write_seed)
    assert recap("run", "all", "--stale", "redo", "--run", again).returncode == 0
    originals = find_originals(again)
    rows = {row.id: row for row in read(again, "caption/dense", SharedCaption)}
    before = {row.id: row for row in read(run, "caption/dense", SharedCaption)}
    assert {row.seed for row in rows.values()}.isdisjoint(row.seed for row in before.values())
    assert all(row.seed == rows[originals[row.key], row.candidate].seed for row in rows.values())


def test_copies_of_what_is_left_out_are_left_out(photos: Path, tmp_path: Path) -> None:
    run = start(tmp_path, photos, share=True, where="num_copies < 4")
    make(run, "ingest")
    make(run, "curate")
    reasons = {row.key: row.reason for row in read(run, "curation", Curation)}
    names = {image.source_key: image.key for image in read(run, "image", MeasuredImage)}
    assert {reasons[names[name]] for name in ("00000.jpg", *COPIES["00000.jpg"])} == {"where", "duplicate"}
    assert reasons[names["9.jpg"]] is None


def test_without_it_nothing_is_shared_and_fingerprints_have_no_trace(photos: Path, tmp_path: Path) -> None:
    plain = start(tmp_path / "a", photos)
    explicit = start(tmp_path / "b", photos, share=False)
    found = [{p.folder: p.slice for p in list_passes(config.load(one))} for one in (plain, explicit)]
    assert found[0] == found[1]
    assert "share" not in found[0]["curation"]
    assert not [folder for folder in found[0] if folder.startswith("asked/")]


def test_on_slurm_copies_wait_for_the_captions_of_all_shards(photos: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", configure(photos, share=True))
    jobs = {job.title: job for job in plan_jobs(list_passes(config.load(folder)))}
    assert jobs["caption:dense:copies"].reads_all >= {"caption:dense"}
    assert jobs["score:judge:dense:copies"].reads_all >= {"score:judge:dense"}
    assert "caption:dense" in jobs["score:judge:dense"].reads
