"""Every kind of source in an object store: the same samples as on a disk, no sample lost to a kill, no secret shown."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pytest

from pipeline.commands.init import guess_source
from pipeline.errors import ConfigError, MachineError
from pipeline.records import Raw
from pipeline.sources import folder, hf, parquet
from tests.sources.test_sources import SOURCES, read_all
from tests.support import object_store
from tests.support.runs import begin, corpus, files, make, recap, sections, start_recap

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with object_store.serve_s3() as environment:
        yield environment


@pytest.mark.parametrize("source", SOURCES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_remote_corpus_gives_the_samples_of_the_local_one(
    source: ModuleType, store: dict[str, str], tmp_path: Path
) -> None:
    config, name = SOURCES[source](tmp_path / "corpus", 7), source.__name__.rpartition(".")[2]
    url = object_store.put_folder(tmp_path / "corpus", f"v1.0/{name}")
    cached = {"cache": str(tmp_path / "cache")} if source is hf else {}
    remote = replace(config, path=url, **cached)
    assert [strip_place(raw) for raw in read_all(source, remote)] == [
        strip_place(raw) for raw in read_all(source, config)
    ]
    assert guess_source(url) == {"kind": name, "path": url}


def strip_place(raw: Raw) -> Raw:
    return replace(raw, file=None, offset=None)


def test_a_remote_folder_is_walked_as_a_local_one(store: dict[str, str], tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "cut", "png"])
    corpus(photos / "deep" / "er", ["jpg"] * 3, first=5)
    corpus(photos / ".hidden", ["jpg"])
    (photos / "deep" / "metadata.csv").write_text("file_name,text\ner/00006.jpg,from a table\n")
    (photos / "00000.TXT").write_text("spelled in another case")
    remote = folder.Config(path=object_store.put_folder(photos, "walked"))
    local = folder.Config(path=str(photos))
    assert list(folder.pieces(remote)) == list(folder.pieces(local))
    assert [strip_place(raw) for raw in read_all(folder, remote)] == [
        strip_place(raw) for raw in read_all(folder, local)
    ]
    pieces = list(folder.pieces(remote))
    object_store.connect().rm_file(f"{object_store.BUCKET}/walked/00001.jpg")
    (raw,) = folder.read(pieces[1], remote)
    assert raw.error == "it cannot be read: no such object"
    with pytest.raises(ConfigError, match=r"source\.path: 's3://corpus/none' has no files"):
        list(folder.pieces(folder.Config(path="s3://corpus/none")))


def test_paths_in_a_table_are_opened_below_a_remote_root(store: dict[str, str], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = object_store.put_folder(corpus(tmp_path / "photos", ["jpg"] * 2), "below")
    paths = ["00000.jpg", "../below/00001.jpg", str(tmp_path / "photos" / "00001.jpg"), "00009.jpg"]
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [{"bytes": None, "path": path} for path in paths]}), table)
    raws = read_all(parquet, parquet.Config(path=str(table), image="image", image_root=root))
    assert [raw.data is not None for raw in raws] == [True, False, False, False]


def test_a_killed_ingest_of_a_remote_corpus_loses_nothing(store: dict[str, str], tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png", "cut", "webp"] * 30)
    local = begin(tmp_path / "local" / "run", sections(photos, source={"shard_size": 20, "pack": True}))
    assert make(local).exit_code == 0
    url = object_store.put_folder(photos, "killed")
    run = begin(tmp_path / "run", sections(photos, source={"path": url, "shard_size": 20}))
    process = start_recap("run", "ingest", "--run", run, **store)
    wait_for(run / "image", 2, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(list((run / "image").iterdir())) < 6
    done = recap("run", "all", "--run", run)
    assert done.returncode == 0
    both = [files(one / "export", without=("index",)) for one in (run, local)]
    assert both[0] == both[1]
    assert count_keys(run) == count_keys(local) == (120, 120)
    everything = b"".join(files(run, without=()).values()) + done.stderr.encode()
    assert object_store.SECRET.encode() not in everything


def count_keys(run: Path) -> Any:
    return duckdb.sql(f"SELECT count(*), count(DISTINCT key) FROM '{run}/image/*.parquet'").fetchall()[0]


def wait_for(folder: Path, num: int, process: subprocess.Popen[bytes]) -> None:
    while len(list(folder.glob("*"))) < num:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.005)


def test_a_store_that_refuses_is_one_line_without_the_secret(
    store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match=r"^s3://corpus/dead: EndpointConnectionError: ") as error:
        list(folder.pieces(folder.Config(path="s3://corpus/dead")))
    assert object_store.SECRET not in str(error.value)
    fsspec.filesystem("s3").clear_instance_cache()
