"""Fails or kills a stage at its n-th rename, fsync, unlink and rmdir, and counts what is lost after it has run again.

    python -m tests.support.syscalls                   # every such call of every stage
    python -m tests.support.syscalls --every 5         # each fifth

strace injects the faults: EIO in place of the call, or SIGKILL before it. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from tests.support import disasters
from tests.support.disasters import IMPORTED, STAGES, Toll, compare, print_toll, run_stage
from tests.support.runs import begin, corpus, sections

CALLS = {  # as C libraries make them, under any of their names
    "rename": "rename,renameat,renameat2",
    "fsync": "fsync,fdatasync",
    "unlink": "unlink,unlinkat",
    "rmdir": "rmdir",
}
FAULTS = {"EIO": "error=EIO", "SIGKILL": "signal=KILL"}


def break_calls(folder: Path, *, every: int = 1) -> Toll:
    """Makes each stage with a fault at every `every`-th call, then without, and compares it with an undisturbed run."""
    toll = Toll(kills_by_stage=dict.fromkeys(STAGES, 0))
    disasters.preload(IMPORTED[""])
    photos = corpus(folder / "photos", ["jpg", "cut", "png", "jpg"])
    before = begin(folder / "quiet", sections(photos, source={"shard_size": 4}))
    number = 0
    for stage in STAGES:
        after = Path(shutil.copytree(before, folder / f"after {stage}"))
        calls = count_calls(after, stage, folder / "trace")
        for call, fault, n in list_faults(calls):
            number += 1
            if number % every:
                continue
            run = Path(shutil.copytree(before, folder / "run"))
            code = run_traced(run, stage, folder / "trace", f"inject={CALLS[call]}:{FAULTS[fault]}:when={n}")
            log = disasters.log_file(run).read_text()
            assert code in (0, 1, -signal.SIGKILL) and "Traceback" not in log, f"{stage}, {fault} at {call} {n}\n{log}"
            process = disasters.start(run, stage)
            process.join()
            assert process.exitcode == 0, disasters.log_file(run).read_text()
            toll.runs += 1
            toll.kills += code < 0
            toll.errors += code >= 0
            toll.kills_by_stage[stage] += 1
            compare(after, run, toll, alike=True)
            shutil.rmtree(run)
            disasters.log_file(run).unlink()
        before = after
    return toll


def count_calls(run: Path, stage: str, trace: Path) -> dict[str, int]:
    """Makes a stage and returns, for each kind of call, the most that one of its threads made."""
    assert run_traced(run, stage, trace, f"trace={','.join(CALLS.values())}") == 0
    made = Counter(re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE))
    most = Counter[str]()
    for (_, name), num in made.items():
        (call,) = (call for call, names in CALLS.items() if name in names.split(","))
        most[call] = max(most[call], num)
    return most


def list_faults(calls: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    return ((call, fault, n) for call, num in calls.items() for n in range(1, num + 1) for fault in FAULTS)


def run_traced(run: Path, stage: str, trace: Path, expression: str) -> int:
    """Makes a stage under strace with this expression, and returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    gate = context.Event()
    process = context.Process(target=_run_behind_gate, args=(gate, run, stage))
    process.start()
    command = ["strace", "-f", "-p", str(process.pid), "-o", str(trace), "-e", expression]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        assert "attached" in attached, attached
        gate.set()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run_behind_gate(gate: Event, run: Path, stage: str) -> None:
    gate.wait()
    try:
        run_stage(run, stage, {})
    except OSError as error:  # as the command line prints it
        sys.exit(f"recap: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    every = parser.parse_args().every
    with tempfile.TemporaryDirectory() as folder:
        toll = break_calls(Path(folder), every=every)
    print_toll(toll, faults="system calls")


if __name__ == "__main__":
    main()
