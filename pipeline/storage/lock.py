"""A lock file that holds between processes and hosts. Its user knows what it protects."""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import RefusedError

MAX_AGE = 600.0  # seconds after which the lock of an unreachable owner counts as abandoned
MAX_WAIT = 60.0  # seconds for another process to release it
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # errors of link(2)
POLL = 0.1  # seconds between attempts


@contextmanager
def hold_lock(path: Path, *, max_wait: float = MAX_WAIT) -> Iterator[Callable[[], bool]]:
    """Holds the lock, and yields a function that checks whether it is still held.

    link(2) creates the file: it is atomic on NFS too, where flock may hold on one host only and O_EXCL depends on the
    version. A link whose response is lost still raises the file's number of links. File systems without links, such as
    exFAT and some of FUSE, have O_EXCL.

    Raises:
        RefusedError: another process holds it for longer than `max_wait` seconds.
    """
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    own.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "id": own.name}))

    def is_held() -> bool:
        return _read_owner(path).get("id") == own.name

    try:
        end = time.monotonic() + max_wait
        while not _try_link(own, path):
            if _is_abandoned(path, own):
                _remove_abandoned(path, own)
            elif time.monotonic() > end:
                raise RefusedError(f"{path} is held by another process, {_read_owner(path)}; if it is gone, remove it")
            else:
                time.sleep(POLL)
        yield is_held
    finally:
        if is_held():
            path.unlink(missing_ok=True)
        own.unlink(missing_ok=True)


@contextmanager
def keep_fresh(path: Path) -> Iterator[None]:
    """Keeps a lock that this process holds from counting as abandoned, however long the work takes."""
    released = threading.Event()

    def touch() -> None:
        while not released.wait(MAX_AGE / 10):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()


def _try_link(own: Path, path: Path) -> bool:
    with suppress(FileExistsError):
        try:
            os.link(own, path)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            with path.open("x") as file:
                file.write(own.read_text())
    return own.stat().st_nlink == 2 or _read_owner(path) == _read_owner(own)


def _is_abandoned(path: Path, own: Path) -> bool:
    """True if the lock is too old, by the file server's clock, or its owner was a process of this host that is gone."""
    os.utime(own)
    try:
        age = own.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # released just now
        return False
    owner = _read_owner(path)
    is_gone = owner.get("host") == platform.node() and not Path(f"/proc/{owner.get('pid')}").exists()
    return age > MAX_AGE or is_gone


def _remove_abandoned(path: Path, own: Path) -> None:
    """Renames the lock away: of several processes that find it abandoned, one succeeds."""
    aside = own.with_suffix(".old")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if not _is_abandoned(aside, own):  # another process was faster, and this is its new lock
            _try_link(aside, path)
        aside.unlink()


def _read_owner(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else {}
    return {}
