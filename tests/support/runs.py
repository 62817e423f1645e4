"""Makes corpora and runs for the tests."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

from pipeline import cli, config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState, Stale
from pipeline.execution.runner import Outcome, Runner

ROOT = Path(__file__).parent.parent.parent
GOOD, BAD = ["jpg", "png", "webp"], ["cut", "empty", "text"]


def picture(seed: int, format: str = "jpeg", size: tuple[int, int] = (40, 30)) -> bytes:
    """A small picture, different for every seed."""
    noise = random.Random(seed)
    image = Image.new("RGB", size, tuple(noise.randrange(256) for _ in range(3)))
    image.paste(tuple(noise.randrange(256) for _ in range(3)), (5, 5, noise.randrange(8, 36), noise.randrange(8, 26)))
    out = BytesIO()
    image.save(out, format)
    return out.getvalue()


def corpus(folder: Path, kinds: Iterable[str], *, first: int = 0) -> Path:
    """A folder of files, one of each kind in GOOD or BAD, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, kind in enumerate(kinds, first):
        (folder / f"{i:05d}.{kind if kind in GOOD else 'jpg'}").write_bytes(_file(kind, i))
        if i % 3 == 0 and kind in GOOD:
            (folder / f"{i:05d}.txt").write_text(f"alt text of number {i}")
    return folder


def _file(kind: str, number: int) -> bytes:
    if kind == "cut":
        return picture(number, size=(400, 300))[:500]
    if kind in ("empty", "text"):
        return {"empty": b"", "text": b"words"}[kind]
    return picture(number, "jpeg" if kind == "jpg" else kind)


def sections(photos: Path, /, **changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A run.toml with everything in it, on the echo engine; `a__b={...}` changes [a.b]."""
    made: dict[str, dict[str, Any]] = {
        "source": {"kind": "folder", "path": str(photos), "shard_size": 10},
        "engines.captioner": {"kind": "echo"},
        "engines.judge": {"kind": "echo"},
        "caption.dense": {"recipe": "dense", "engine": "captioner"},
        "score.form": {"kind": "text"},
        "score.judge": {"kind": "judge", "engine": "judge", "rubric": "dense"},
        "filter": {"rules": {"judged": "judge >= 0.4"}, "choose": "judge DESC"},
        "export": {},
    }
    for name, values in changes.items():
        made.setdefault(name.replace("__", "."), {}).update(values)
    return made


def write(folder: Path, parts: Mapping[str, Mapping[str, Any]], **top: Any) -> Path:
    """Writes run.toml, replacing an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{key} = {init.format_toml(value)}\n" for key, value in top.items())
    for name, values in parts.items():
        text += f"\n[{name}]\n" + "".join(f"{key} = {init.format_toml(value)}\n" for key, value in values.items())
    (folder / "run.toml").write_text(text)
    return folder


def begin(folder: Path, parts: Mapping[str, Mapping[str, Any]], **top: Any) -> Path:
    """Creates a run with its plan."""
    write(folder, parts, **top)
    init.extend_plan(config.load(folder))
    return folder


def make(folder: Path, what: str = "all", *, shards: str = "all", stale: Stale = "stop", **options: Any) -> Outcome:
    """`recap run` in this process."""
    state = RunState(config.load(folder), shards=shards, stale=stale)
    return Runner(state, **options).execute(select_passes(state.passes, what))


def recap(*args: object, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in this process. Unexpected exceptions are raised.

    Raises:
        CalledProcessError: its exit code is not 0, and `check`.
    """
    out, err = (TextIOWrapper(BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code: str | int | None = 0
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, env))
        stack.enter_context(patch.object(sys, "argv", ["recap", *map(str, args)]))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    output = [stream.buffer.getvalue().decode() for stream in (out, err)]
    done = subprocess.CompletedProcess(["recap", *map(str, args)], int(code or 0), *output)
    if check:
        done.check_returncode()
    return done


def recap_alone(*args: object, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, args)],
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def start_recap(*args: object, **env: str) -> subprocess.Popen[bytes]:
    """As `recap_alone`, without waiting for its end."""
    command = [sys.executable, "-m", "pipeline", *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, stderr=subprocess.DEVNULL)


KILLED = """
import os, signal
from pipeline import cli
from pipeline.storage import parts

flush = parts.Parts.flush

def flush_and_die(self):
    flush(self)
    os.kill(os.getpid(), signal.SIGKILL)

parts.MAX_ROWS, parts.Parts.flush = 4, flush_and_die
cli.main()
"""


def kill_after_first_rows(run: Path, what: str) -> None:
    """`recap run` in a process of its own, which is killed when its first four rows are on disk."""
    command = [sys.executable, "-c", KILLED, "run", what, "--run", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((run / ".work" / what).rglob("*.parquet"))) == 1


def files(folder: Path, *, without: tuple[str, ...] = ("stats", ".work")) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in without
    }


def times(folder: Path) -> dict[str, int]:
    """The modification time of every file below a folder, by name; nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
