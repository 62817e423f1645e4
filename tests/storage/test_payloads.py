"""Payload files: tars of the standard bytes, digests of the bytes on disk, and no file that is not synced."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import disk, payloads
from pipeline.storage.payloads import TarWriter, UnfinishedFile, Written, commit_files, digest_payload, list_members

NAMES = st.text("abcdefghij0123456789_-", min_size=1, max_size=90)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=30, unique_by=lambda member: member[0])


def write_standard_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@given(MEMBERS)
def test_a_tar_has_the_bytes_of_the_standard_librarys(members: list[tuple[str, bytes]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tars" / "a.tar"
        tar = TarWriter(UnfinishedFile(path, work=Path(folder)))
        offsets = [tar.add(name, data) for name, data in members]
        sizes = commit_files(Path(folder), tar)
        assert list(sizes) == (["tars/a.tar"] if members else [])
        if members:
            data = path.read_bytes()
            assert data == write_standard_tar(members)
            assert sizes["tars/a.tar"] == len(data)
            assert [data[at : at + len(content)] for at, (_, content) in zip(offsets, members, strict=True)] == [
                content for _, content in members
            ]
            assert [(m.name, m.offset) for m in list_members(path)] == [
                (name, at) for at, (name, _) in zip(offsets, members, strict=True)
            ]


@given(st.lists(st.binary(max_size=300_000), min_size=1, max_size=6))
def test_a_digest_is_that_of_the_file(parts: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        file = UnfinishedFile(Path(folder) / "a", work=Path(folder))
        for part in parts:
            file.open().write(part)
        written = file.commit()
        data = (Path(folder) / "a").read_bytes()
        assert written == len(data) == sum(map(len, parts))
        assert written is not None
        assert written.sha256 == hashlib.sha256(data).hexdigest()


def test_files_that_were_not_hashed_as_they_were_written_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    digests = digest_payload(tmp_path, {"a": 1, "b": Written(1, "0" * 64)})
    assert digests == {"a": hashlib.sha256(b"a").hexdigest(), "b": "0" * 64}


def test_a_hashed_file_is_written_from_beginning_to_end(tmp_path: Path) -> None:
    file = UnfinishedFile(tmp_path / "a", work=tmp_path).open()
    file.write(b"abc")
    with pytest.raises(io.UnsupportedOperation, match="not seekable"):
        file.seek(0)


def test_a_tree_is_synced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b/c", "b/d/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    disk.sync_tree(tmp_path)
    assert sorted(synced) == sorted(str(path) for path in (tmp_path, *tmp_path.rglob("*")))


def test_a_part_of_a_file_may_be_written_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's call is a hint: it changes no byte, and a chunk that is due is begun once."""
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(payloads, "start_writing", lambda _, offset, num_bytes: started.append((offset, num_bytes)))
    monkeypatch.setattr(payloads, "CHUNK", 100_000)
    file = UnfinishedFile(tmp_path / "a", work=tmp_path)
    for _ in range(5):
        file.open().write(bytes(70_000))
    assert file.commit() == 350_000
    assert started == [(0, 140_000), (140_000, 140_000)]
