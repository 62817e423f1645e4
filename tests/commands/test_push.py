"""`recap push`: to a real S3 server and to a stand-in of the Hub, whole, in order, and on after a kill."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from pipeline.commands import push
from pipeline.commands.push import FILES_PER_COMMIT, LAST, ExportFile, push_to_store
from pipeline.errors import MachineError, StoppedError
from pipeline.storage import stores
from tests.support import object_store
from tests.support.hub import serve_hub
from tests.support.runs import begin, corpus, files, make, recap, recap_alone, sections, start_recap, write

pytestmark = pytest.mark.slow

NUM_SHARDS = 18
SOURCE = {"shard_size": 1}
FORMS = {"formats": ["webdataset", "parquet"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    photos = corpus(folder / "photos", ["jpg"] * NUM_SHARDS)
    run = begin(folder / "run", sections(photos, source=SOURCE, filter={"rules": {}}, export=FORMS))
    assert make(run).exit_code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with object_store.serve_s3() as environment:
        yield environment


def list_export(run: Path) -> dict[str, bytes]:
    return files(run / "export", without=())


def read_store(name: str) -> dict[str, bytes]:
    root = f"{object_store.BUCKET}/{name}"
    store = object_store.connect()
    return {path.removeprefix(f"{root}/"): store.cat_file(path) for path in store.find(root)}


def kill_when(condition: Callable[[], bool], *arguments: object, **env: str) -> None:
    process = start_recap(*arguments, **env)
    while not condition():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_bucket_that_is_not_there_is_found_beforehand(store: dict[str, str]) -> None:
    push.check_target(f"s3://{object_store.BUCKET}/new")
    with pytest.raises(MachineError, match="there is no bucket 'no-such-bucket'; make it, or correct the name"):
        push.check_target("s3://no-such-bucket/new")


@pytest.mark.parametrize("keys", [{}, {"shard_bytes": 2000, "resize": {"short": 20}}])
def test_images_and_texts_that_are_files_of_their_own_are_uploaded(
    tmp_path: Path, store: dict[str, str], keys: dict[str, Any]
) -> None:
    """Only the lists of them were."""
    photos = corpus(tmp_path / "photos", ["jpg", "png"] * 3)
    forms = {"formats": ["messages", "llava", "sidecar"], "split": {"train": 0.5, "val": 0.5}, **keys}
    run = begin(tmp_path / "run", sections(photos, filter={"rules": {}}, export=forms))
    make(run)
    name = f"loose{len(keys)}"
    url = f"s3://{object_store.BUCKET}/{name}"
    recap("push", url, "--run", run)
    assert read_store(name) == list_export(run)
    digests = {file.name: file.sha256 for file in push.list_files(run, own=())}
    assert digests == {path: sha256(data).hexdigest() for path, data in list_export(run).items()}
    assert len(digests) > 6 * 4
    assert "0 of " in recap("push", url, "--run", run).stderr


def test_what_another_run_uploaded_in_between_is_replaced(run: Path, tmp_path: Path, store: dict[str, str]) -> None:
    """Files of the same size passed for our own, by the notes of our earlier upload."""
    url, name = f"s3://{object_store.BUCKET}/shared", "parquet/00003.parquet"
    recap("push", url, "--run", run)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    shutil.rmtree(other / ".work", ignore_errors=True)
    sums = other / "export/index/SHA256SUMS"
    data = (other / "export" / name).read_bytes()
    changed = data[:200] + bytes([data[200] ^ 1]) + data[201:]
    sums.write_text(sums.read_text().replace(sha256(data).hexdigest(), sha256(changed).hexdigest()))
    (other / "export" / name).write_bytes(changed)
    recap("push", url, "--run", other)
    assert read_store("shared")[name] == changed
    recap("push", url, "--run", run)
    assert read_store("shared") == list_export(run)


def test_an_export_is_uploaded_whole_and_only_once(run: Path, store: dict[str, str]) -> None:
    url = f"s3://{object_store.BUCKET}/once"
    num = len(list_export(run))
    done = recap("push", url, "--run", run)
    assert (done.stdout, f"{num} of {num} files uploaded" in done.stderr) == (f"{url}\n", True)
    assert read_store("once") == list_export(run)
    assert f"0 of {num} files uploaded" in recap("push", url, "--run", run).stderr
    object_store.connect().rm_file(f"{object_store.BUCKET}/once/parquet/00003.parquet")
    assert f"2 of {num} files uploaded" in recap("push", url, "--run", run).stderr  # with the list of digests
    assert read_store("once") == list_export(run)
    assert object_store.SECRET.encode() not in b"".join(files(run, without=()).values()) + done.stderr.encode()


def test_a_killed_upload_resumes_and_the_list_of_digests_comes_last(run: Path, store: dict[str, str]) -> None:
    url, seen = f"s3://{object_store.BUCKET}/killed", set[str]()

    def has_some() -> bool:
        found = object_store.connect().find(f"{object_store.BUCKET}/killed")
        seen.update(name.partition("/killed/")[2] for name in found)
        return len(found) > 10

    kill_when(has_some, "push", url, "--run", run, **store)
    assert LAST not in seen
    assert {name: data for name, data in read_store("killed").items() if list_export(run)[name] != data} == {}
    done = recap("push", url, "--run", run)
    assert read_store("killed") == list_export(run)
    assert ", 0 already there" not in done.stderr


def test_a_changed_export_replaces_the_earlier_one_and_nothing_else(
    finished: Path, run: Path, store: dict[str, str]
) -> None:
    url = f"s3://{object_store.BUCKET}/changed"
    recap("push", url, "--run", run)
    object_store.connect().pipe_file(f"{object_store.BUCKET}/changed/NOTES", b"mine")
    rules = {"rules": {"judged": "judge >= 0.6"}}
    write(run, sections(finished.parent / "photos", source=SOURCE, filter=rules, export={**FORMS, "url": url}))
    done = recap("run", "all", "--stale", "redo", "--run", run)
    assert done.stdout == f"{url}\n"
    assert read_store("changed") == {**list_export(run), "NOTES": b"mine"}
    assert len(list_export(run)) < len(list_export(finished))


def make_files(folder: Path, contents: dict[str, str]) -> list[ExportFile]:
    """Files of an export with these contents, and the list of their digests at the end."""
    digests = {name: sha256(text.encode()).hexdigest() for name, text in contents.items()}
    listed = "".join(f"{digest}  ../{name}\n" for name, digest in digests.items())
    made = []
    for name, text in (contents | {LAST: listed}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = sha256(text.encode()).hexdigest()
        made.append(ExportFile(name=name, path=path, num_bytes=len(text), sha256=digest))
    return made


def test_an_interrupted_replacement_removes_what_the_earlier_list_named(tmp_path: Path) -> None:
    url, journal, stop = "memory://replaced", tmp_path / "journal", Event()
    push_to_store(make_files(tmp_path / "1", {"a": "1", "b": "1"}), url, journal=journal, stop=stop)
    stores.upload_file(tmp_path / "1" / "a", f"{url}/mine")
    changed = make_files(tmp_path / "2", {"a": "22"})
    stop.set()
    with pytest.raises(StoppedError):
        push_to_store(changed, url, journal=journal, stop=stop)
    assert stores.list_tree(url).keys() == {"a", "b", "mine"}  # without the list
    journal.write_text(journal.read_text() + '{"name": "half')
    stop.clear()
    assert push_to_store(changed, url, journal=journal, stop=stop) == 2
    assert stores.list_tree(url).keys() == {"a", "mine", LAST}
    assert stores.read_url(f"{url}/a") == b"22"


def test_what_is_not_finished_or_has_no_target_is_refused(run: Path, tmp_path: Path) -> None:
    assert "where to? name a repository of the Hub or a URL" in recap("push", "--run", run, check=False).stderr
    (run / "export" / "index" / "00002.parquet").unlink()
    done = recap("push", "memory://x", "--run", run, check=False)
    assert done.returncode == 2 and "export: 1 of 18 shards are not up to date" in done.stderr


def test_a_killed_upload_to_the_hub_resumes_in_small_commits(run: Path, tmp_path: Path) -> None:
    with serve_hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_0"}
        hub.seconds = 0.05
        kill_when(lambda: len(hub.commits) == 1, "push", "me/photos", "--run", run, **env)
        assert LAST not in hub.files and hub.files.keys() < list_export(run).keys()
        hub.seconds = 0
        done = recap_alone("push", "me/photos", "--run", run, **env)
        assert done.stdout == "hf://datasets/me/photos\n"
        assert hub.files == list_export(run)
        assert max(map(len, hub.commits)) <= FILES_PER_COMMIT
        assert hub.num_puts == len(hub.objects)  # none was sent again after its commit
        num_commits = len(hub.commits)
        again = recap_alone("push", "me/photos", "--run", run, **env)
        assert "0 of " in again.stderr and len(hub.commits) == num_commits
        refused = recap_alone("push", "no repository", "--run", run, check=False, **env)
        assert refused.returncode == 2 and "which is USER/NAME" in refused.stderr
