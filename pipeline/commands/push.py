"""Uploads of a finished export: to a store, or as commits to the Hugging Face Hub. Both resume.

Data goes first and the list of digests last, so a copy that has the list is complete. Of the files at the target, only
those that an earlier upload listed and that the export no longer has are removed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import MachineError, StoppedError, UserError
from pipeline.execution.exported_files import load_form
from pipeline.execution.run_state import RunState
from pipeline.execution.signals import stop_on_signal
from pipeline.progress import format_bytes, say
from pipeline.records import Exported
from pipeline.sections import Run
from pipeline.storage import stores
from pipeline.storage.layout import find_numbers
from pipeline.storage.payloads import SUMS, hash_file, parse_sums, read_sums
from pipeline.storage.tables import open_atomic, read_batches

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INDEX = "export/index"  # folder of the export's tables and digests
LAST = f"index/{SUMS}"
HUB = "hf://datasets/"
THREADS = 8  # uploads at once to a store
FILES_PER_COMMIT, BYTES_PER_COMMIT = 50, 20 << 30  # the Hub advises up to 100 files; a killed commit is repeated
SAY_SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True, kw_only=True)
class ExportFile:
    """A file of the export."""

    name: str  # relative to export/
    path: Path
    num_bytes: int
    sha256: str


class Progress:
    """Counts uploaded files, prints a line now and then, and stops on a signal."""

    def __init__(self, due: Sequence[ExportFile], stop: threading.Event) -> None:
        self._num_files, self._num_bytes = len(due), sum(file.num_bytes for file in due)
        self._stop, self._done, self._sent, self._said = stop, 0, 0, time.monotonic()

    def add(self, *files: ExportFile) -> None:
        """
        Raises:
            StoppedError: a signal came.
        """
        self._done += len(files)
        self._sent += sum(file.num_bytes for file in files)
        if time.monotonic() - self._said > SAY_SECONDS:
            sent = f"{format_bytes(self._sent)} of {format_bytes(self._num_bytes)}"
            say(f"push: {self._done} of {self._num_files} files, {sent}")
            self._said = time.monotonic()
        self.check()

    def check(self) -> None:
        if self._stop.is_set():
            raise StoppedError


def push_export(run: Run, target: str, *, is_private: bool = False) -> str:
    """Uploads the export to a URL, to a repository of the Hub, or, for "", to `url` in `[export]`; returns where it is.

    Raises:
        RefusedError, UserError: the export is not finished, or there is no target.
        MachineError: the target cannot be written.
        StoppedError: a signal came; the same command resumes.
    """
    target = (target or run.sections["export"][""].url).rstrip("/")
    if not target:
        raise UserError(f"where to? name a repository of the Hub or a URL, or set [export] url in {run.file}")
    RunState(run).check_done([INDEX])
    files, stop = list_files(run.folder, own=run.sections["export"][""].formats), threading.Event()
    with stop_on_signal(stop):
        if "://" in target and not target.startswith(HUB):
            journal = run.folder / ".work" / "push" / f"{hashlib.sha256(target.encode()).hexdigest()[:16]}.jsonl"
            num_sent = push_to_store(files, target, journal=journal, stop=stop)
        else:
            repository = target.removeprefix(HUB)
            num_sent, target = push_to_hub(files, repository, is_private=is_private, stop=stop), HUB + repository
    say(f"{num_sent} of {len(files)} files uploaded, {len(files) - num_sent} already there")
    return target


def check_target(target: str) -> None:
    """Finds, without writing, what would stop an upload.

    Raises:
        UserError: the target's name is wrong, or no installed package reaches it.
        MachineError: it does not answer, is not there, or does not let us in.
    """
    if "://" in target and not target.startswith(HUB):
        stores.require_bucket(target)
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils._validators import validate_repo_id

    repository = target.removeprefix(HUB)
    with _translate_hub_errors(repository):
        validate_repo_id(repository)
    if get_token() is None:
        raise MachineError("no token of the Hub is here; log in with `hf auth login`, or set HF_TOKEN")


def list_files(run: Path, *, own: Sequence[str]) -> list[ExportFile]:
    """All files of the export, the list of digests last.

    Args:
        run: the run's folder.
        own: the names of its forms.

    Raises:
        MachineError: the list is damaged, or a file is missing.
    """
    try:
        digests = read_sums(run, INDEX)
        digests |= {f"{INDEX}/{path.name}": hash_file(path) for path in sorted((run / INDEX).glob("*.parquet"))}
        digests |= dict(_list_loose_files(run, own, list(digests)))
        digests[f"{INDEX}/{SUMS}"] = hash_file(run / INDEX / SUMS)
        return [_describe_file(run / name, digest) for name, digest in digests.items()]
    except (ValueError, FileNotFoundError) as error:
        raise MachineError(
            f"the export is not whole ({error}); `recap verify --run {run}` names what is damaged"
        ) from error


def _list_loose_files(run: Path, own: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Images and texts that are files of their own, which exported files list, with their digests, from their rows.

    Files of the corpus itself, to which a training set may refer, are none of them.
    """
    images: dict[str, str] = {}  # key -> SHA-256
    for name in names:
        form = load_form(Path(name).parts[1], own) if len(Path(name).parts) > 2 else None
        if form is None or not hasattr(form, "list_loose_files") or not find_numbers(name):
            continue
        images = images or _read_digests(run)
        for loose in form.list_loose_files(run / name):
            if loose.path.is_relative_to(run / "export"):
                text = loose.text
                digest = images[loose.key] if text is None else hashlib.sha256(text.encode()).hexdigest()
                yield str(loose.path.relative_to(run)), digest


def _read_digests(run: Path) -> dict[str, str]:
    """The SHA-256 of each exported image as it was written, by its key."""
    names = ["key", "sha256", "written_sha256"]
    batches = (
        b for path in sorted((run / INDEX).glob("*.parquet")) for b in read_batches(path, Exported, columns=names)
    )
    rows = (row for batch in batches for row in zip(*(batch[name].to_pylist() for name in names), strict=True))
    return {key: written or original for key, original, written in rows}


def _describe_file(path: Path, sha256: str) -> ExportFile:
    name = str(path).rpartition("/export/")[2]
    return ExportFile(name=name, path=path, num_bytes=path.stat().st_size, sha256=sha256)


def push_to_store(files: Sequence[ExportFile], url: str, *, journal: Path, stop: threading.Event) -> int:
    """Uploads the files that a store lacks; returns their number.

    A store knows sizes alone: what was sent is noted in `journal`, and in the list of digests of a finished upload. The
    journal counts where no list is, or the one that it notes: with another, somebody else has uploaded since.
    """
    sizes, earlier, noted = stores.list_tree(url), _read_earlier_list(url), _read_journal(journal)
    if earlier and noted.get(LAST) != earlier[LAST]:
        noted = {}
        journal.unlink(missing_ok=True)
    sent = earlier | noted
    due = [file for file in files if sizes.get(file.name) != file.num_bytes or sent.get(file.name) != file.sha256]
    due, progress = _end_with_list(due, files), Progress(due, stop)
    journal.parent.mkdir(parents=True, exist_ok=True)
    if due and LAST in sizes:
        with journal.open("a") as notes:  # so that a resumed upload knows what the removed list had
            _note_files(notes, earlier)
        stores.remove_file(f"{url}/{LAST}")

    def upload(file: ExportFile) -> ExportFile:
        progress.check()
        stores.upload_file(file.path, f"{url}/{file.name}")
        return file

    with journal.open("a") as notes, ThreadPoolExecutor(THREADS) as pool:
        try:
            for file in pool.map(upload, due[:-1]):
                _note_files(notes, {file.name: file.sha256})
                progress.add(file)
        finally:
            pool.shutdown(cancel_futures=True)
    for name in sorted(sent.keys() - {file.name for file in files}):
        stores.remove_file(f"{url}/{name}")
    if due:
        upload(due[-1])
    with open_atomic(journal, durable=False) as whole:  # all that is there now, and nothing else
        whole.write(_format_notes({file.name: file.sha256 for file in files}).encode())
    return len(due)


def _note_files(notes: IO[str], digests: Mapping[str, str]) -> None:
    notes.write(_format_notes(digests))
    notes.flush()


def _format_notes(digests: Mapping[str, str]) -> str:
    return "".join(json.dumps({"name": name, "sha256": digest}) + "\n" for name, digest in digests.items())


def _end_with_list(due: list[ExportFile], files: Sequence[ExportFile]) -> list[ExportFile]:
    """The files with the list of digests, which is removed while others are replaced."""
    return [*due, files[-1]] if due and due[-1] is not files[-1] else due


def _read_earlier_list(url: str) -> dict[str, str]:
    """Name -> SHA-256 of the files of a finished upload; itself included."""
    try:
        text = stores.read_url(f"{url}/{LAST}")
        return _parse_list(text)
    except (FileNotFoundError, ValueError):
        return {}


def _parse_list(text: bytes) -> dict[str, str]:
    digests = {name.removeprefix("export/"): digest for name, digest in parse_sums(text.decode(), INDEX).items()}
    return digests | {LAST: hashlib.sha256(text).hexdigest()}


def _read_journal(journal: Path) -> dict[str, str]:
    sent: dict[str, str] = {}
    for line in journal.read_text().splitlines() if journal.exists() else ():
        with suppress(ValueError):  # half a line, of an upload that was killed
            note = json.loads(line)
            sent[note["name"]] = note["sha256"]
    return sent


def push_to_hub(files: Sequence[ExportFile], repository: str, *, is_private: bool, stop: threading.Event) -> int:
    """Commits the files that a dataset repository lacks, some in each commit; returns their number."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with _translate_hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", private=is_private, exist_ok=True)
        remote = {one.path: one for one in api.list_repo_tree(repository, recursive=True, repo_type="dataset")}
        earlier = _fetch_earlier_list(api, repository) if LAST in remote else {}
        due = _end_with_list([file for file in files if not _is_same(file, remote.get(file.name))], files)
        progress, batches = Progress(due, stop), list(_split_commits(due))
        kept = {file.name for file in files}
        for number, batch in enumerate(batches):
            operations: list[Any] = [CommitOperationAdd(file.name, str(file.path)) for file in batch]
            if number == 0:  # in the commit that removes the list, which names them
                removed = earlier.keys() & remote.keys() - {file.name for file in batch}
                operations += [CommitOperationDelete(name) for name in sorted(removed - kept | removed & {LAST})]
            message = f"Upload {len(batch)} files ({number + 1} of {len(batches)})"
            api.create_commit(repository, operations, commit_message=message, repo_type="dataset")
            progress.add(*batch)
    return len(due)


def _split_commits(files: Sequence[ExportFile]) -> Iterator[list[ExportFile]]:
    batch: list[ExportFile] = []
    for file in files:
        num_bytes = sum(one.num_bytes for one in batch) + file.num_bytes
        if batch and (len(batch) == FILES_PER_COMMIT or num_bytes > BYTES_PER_COMMIT):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _is_same(file: ExportFile, remote: Any) -> bool:
    """True if a repository has the file, by its SHA-256 or, where git itself holds the content, by git's digest."""
    if remote is None or remote.size != file.num_bytes:
        return False
    if remote.lfs:
        return bool(remote.lfs.sha256 == file.sha256)
    content = file.path.read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _fetch_earlier_list(api: HfApi, repository: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder, suppress(ValueError):
        path = api.hf_hub_download(repository, LAST, repo_type="dataset", local_dir=folder)
        return _parse_list(Path(path).read_bytes())
    return {}


@contextmanager
def _translate_hub_errors(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except (MachineError, UserError, StoppedError):
        raise
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a repository of the Hub, which is USER/NAME: {error}") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_refused = isinstance(error, RepositoryNotFoundError) or status in (401, 403)
        advice = "; log in with `hf auth login`, or set HF_TOKEN, with the right to write" if is_refused else ""
        why = stores.hide_credentials(" ".join(str(error).split()))[: stores.MAX_MESSAGE]
        raise MachineError(f"{repository}: {why}{advice}; the same command resumes") from None
