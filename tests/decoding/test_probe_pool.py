"""A file that kills its decoder costs only its own row, and no process is left behind."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.decoding.images import Limits, probe
from pipeline.decoding.probe_pool import BATCH_ITEMS, ProbePool, map_ahead
from pipeline.errors import DecoderStartError, OutOfMemoryError

MISBEHAVING = "tests.support.misbehaving:probe"


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, shade // 256, 0)).save(file, "JPEG")
    return file.getvalue()


def make_lying_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def find_decoders(parent: int) -> set[int]:
    """The living decoder processes of `parent`."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[1]) == parent and b"pipeline.decoding.probe_pool" in command:
            found.add(int(status.parent.name))
    return found


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pids: set[int], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"{pids} are still running"
        time.sleep(0.02)


def test_a_pool_returns_the_results_of_probe_in_order() -> None:
    files = [picture(shade) for shade in range(300)]
    files[7], files[8], files[100] = b"", files[9][:-5], b"just text"
    with ProbePool(num_procs=2) as pool:
        assert list(pool.map(files)) == [probe(data) for data in files]


def test_limits_reach_the_processes() -> None:
    with ProbePool(num_procs=1, limits=Limits(min_side=35)) as pool:
        assert [found.status for found in pool.map([picture(0)])] == ["too_small"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evil", "timeout", "message"),
    [
        (b"crash", 60.0, "the decoder crashed (signal 11)"),
        (b"hang", 2.0, "decoding took more than 2 s"),
        (b"leave", 60.0, "the decoder ended (exit status 3)"),
        (b"raise", 60.0, "the decoder ended (exit status 1)"),
    ],
)
def test_a_file_that_kills_its_decoder_costs_its_own_row(evil: bytes, timeout: float, message: str) -> None:
    files = [picture(shade) for shade in range(2 * BATCH_ITEMS)]
    files[3:3] = [evil + b"1"]
    files.append(evil + b"2")
    with ProbePool(num_procs=1, probe=MISBEHAVING, timeout=timeout) as pool:
        rows = list(pool.map(files))
    assert len(rows) == len(files)
    for data, found in zip(files, rows, strict=True):
        if data.startswith(evil):
            assert (found.status, found.error, found.format) == ("unreadable", message, None)
            assert found.sha256 == probe(data).sha256
        else:
            assert found == probe(data)


def test_a_decoder_does_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"JUDGE_KEY", "RECAP_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FSSPEC_HTTPS", "SSH_AUTH_SOCK"}
    for name in (*secret, "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "/of/mine")
    with ProbePool(num_procs=1, probe=MISBEHAVING) as pool:
        (found,) = pool.map([b"tell"])
    given = set((found.error or "").splitlines())
    assert ({"LD_LIBRARY_PATH", "PYTHONPATH"} - given, secret & given) == (set(), set())


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    files = [picture(1), make_lying_png(16000, 16000), picture(2)]
    with ProbePool(num_procs=1, max_memory=256 << 20) as pool:
        first, huge, last = pool.map(files)
    assert (first, last) == (probe(files[0]), probe(files[2]))
    assert huge.status == "unreadable" and huge.error is not None and "more memory" in huge.error
    assert (huge.format, huge.width, huge.height) == ("png", 16000, 16000)


@pytest.mark.slow
def test_a_decoder_killed_from_outside_costs_no_row() -> None:
    files = [picture(shade) for shade in range(4 * BATCH_ITEMS)]
    with ProbePool(num_procs=1) as pool:
        rows = []
        for number, found in enumerate(pool.map(files)):
            rows.append(found)
            if number == 10:
                for pid in find_decoders(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
        assert rows == [probe(data) for data in files]


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [1, 2])
def test_a_file_whose_decoder_was_killed_is_probed_alone(num_kills: int, tmp_path: Path) -> None:
    (tmp_path / "kills").write_bytes(bytes(num_kills))
    files = [picture(1), b"killed %s " % bytes(tmp_path / "kills") + picture(2), picture(3)]
    with ProbePool(num_procs=2, probe=MISBEHAVING) as pool:
        assert list(pool.map(files)) == [probe(picture(shade)) for shade in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("evil", "error"), [(b"killed", "signal 9"), (b"short", "exit status 12")])
def test_what_fails_alone_is_the_files_fault_only_with_memory_to_spare(evil: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "kills").write_bytes(bytes(99))
    files = [picture(1), b"%s %s " % (evil, bytes(tmp_path / "kills")), picture(2)]
    with ProbePool(num_procs=2, probe=MISBEHAVING, max_memory=256 << 20) as pool:
        first, found, last = pool.map(files)
    assert (first, last) == (probe(files[0]), probe(files[2]))
    assert found.status == "unreadable" and error in (found.error or "") and not found.is_doubtful
    with (
        ProbePool(num_procs=2, probe=MISBEHAVING, max_memory=1 << 60) as pool,
        pytest.raises(OutOfMemoryError, match=r"max_pixels.*MiB are free"),
    ):
        list(pool.map(files))


def test_files_are_drawn_lazily_and_a_consumer_may_stop() -> None:
    drawn = 0

    def files() -> Iterator[bytes]:
        nonlocal drawn
        while True:
            drawn += 1
            yield picture(drawn)

    with ProbePool(num_procs=2) as pool:
        rows = pool.map(files())
        assert drawn == 0
        next(rows)
        assert drawn <= 5 * BATCH_ITEMS
        rows.close()
        assert list(pool.map([picture(5)])) == [probe(picture(5))]
        assert len(find_decoders(os.getpid())) == 2
    assert find_decoders(os.getpid()) == set()


def test_threads_share_a_pool() -> None:
    files = [[picture(start + shade) for shade in range(150)] for start in (0, 1000, 2000)]
    rows: dict[int, list[object]] = {}
    with ProbePool(num_procs=2) as pool:

        def work(number: int) -> None:
            rows[number] = list(pool.map(files[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [rows[number] for number in range(3)] == [[probe(data) for data in some] for some in files]


def test_decoders_that_do_not_start_are_an_error() -> None:
    with (
        ProbePool(num_procs=1, probe="no.such.module:probe") as pool,
        pytest.raises(DecoderStartError, match="status 1"),
    ):
        list(pool.map([picture(1)]))


PARENT = """
import os, signal, sys
from pipeline.decoding.probe_pool import ProbePool
if __name__ == "__main__":
    pool = ProbePool(num_procs=1, probe="tests.support.misbehaving:probe", timeout=1)
    assert [found.status for found in pool.map([b""])] == ["empty"]
    print("up", flush=True)
    if sys.argv[1] == "signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
            os.killpg(0, number)
        assert [found.status for found in pool.map([b""])] == ["empty"]
        os.execv("/bin/sleep", ["sleep", "60"])
    list(pool.map([b"hang"] if sys.argv[1] == "hang" else iter(input, None)))
"""


def start_parent(what: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("what", ["wait", "hang"])
def test_decoders_end_with_a_parent_that_was_killed(what: str) -> None:
    with start_parent(what) as process:
        pids = find_decoders(process.pid)
        assert len(pids) == 1
        time.sleep(0.1 if what == "hang" else 0)
        process.kill()
        process.wait()
        wait_until_dead(pids)


def test_decoders_ignore_signals_and_end_when_their_pipes_close() -> None:
    with start_parent("signals") as process:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        pids = find_decoders(process.pid)  # exec closed the pipes
        wait_until_dead(pids)
        process.kill()


def test_map_ahead_keeps_order_and_yields_errors_as_results() -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        if item == 5:
            raise ValueError("five")
        return item * item

    results = list(map_ahead(range(20), work, num_threads=4, depth=6))
    assert [r for r in results if isinstance(r, int)] == [i * i for i in range(20) if i != 5]
    assert isinstance(results[5], ValueError)


def test_map_ahead_draws_no_further_than_its_depth_and_ends_its_threads() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    results = map_ahead(items(), lambda item: item, num_threads=2, depth=8)
    assert drawn == []
    assert next(results) == 0 and len(drawn) == 8
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
