"""Fails the n-th allocation of reading and writing tables, which may end the task but may not be taken for damage.

    python -m tests.support.shortages --steps 200

Each task runs in many processes, in each of which another allocation fails. Prints a line of JSON. Needs gcc, which
compiles a library that the loader puts before the allocator of the C library.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import BrokenTableError
from pipeline.machine import find_trouble
from pipeline.records import Criterion, Piece, Score
from pipeline.storage import integrity, tables
from pipeline.storage.plan import Plan, write_plan

ENOUGH, SHORT, WRONG, OTHER = 0, 12, 13, 14  # exit codes of a task; the loader ends with 127
PROVENANCE = tables.Provenance(stage="score", name="s", version=1, slice={}, inputs={})
NUM_ROWS = tables.ROWS_PER_GROUP + 100
ALLOCATOR = """
#include <errno.h>
#include <stddef.h>
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
static long number, failing = -1;
long arm(long n) { long before = number; number = 0; failing = n; return before; }
static int fails(void) { return __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED) == failing && (errno = ENOMEM); }
void *malloc(size_t n) { return fails() ? NULL : __libc_malloc(n); }
void *calloc(size_t m, size_t n) { return fails() ? NULL : __libc_calloc(m, n); }
void *realloc(void *p, size_t n) { return fails() ? NULL : __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { return fails() ? NULL : __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { return (*p = memalign(a, n)) ? 0 : ENOMEM; }
"""


@dataclass(kw_only=True)
class Shortage:
    """The ends of tasks of which one allocation failed."""

    tasks: int = 0
    finished: int = 0
    refused: int = 0  # with an error that names the machine
    aborted: int = 0  # by a library
    places: int = 0  # lines of code in which an allocation failed
    other_errors: int = 0  # of Python or a library that reports a failed allocation as something else
    taken_for_damage: int = 0  # called a file damaged, or left one that is not whole


def starve_tables(folder: Path, *, num_steps: int) -> Shortage:
    """Reads, verifies and writes a table and a plan, each in `num_steps` processes."""
    table, plan, written = folder / "table.parquet", folder / "plan.parquet", folder / "written.parquet"
    rows = list(map(make_score, range(NUM_ROWS)))
    pieces = [Piece(file=f"{n:06d}.jpg", stop=1, num_bytes=n) for n in range(NUM_ROWS)]
    tables.write_rows(table, Score, rows, PROVENANCE)
    write_plan(plan, pieces, shard_size=100)
    before = (table.read_bytes(), plan.read_bytes())
    tasks: list[Callable[[], object]] = [
        lambda: deque(tables.read_rows(table, Score), maxlen=0),
        lambda: integrity.check_table(table, Score),
        lambda: tables.write_rows(written, Score, rows, PROVENANCE),
        lambda: Plan.load(plan),
        lambda: write_plan(plan, [*pieces, Piece(file="new.jpg", stop=1)], shard_size=100),
    ]
    shortage, places = Shortage(), set[str]()
    allocator = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for task in tasks:
        task()
        allocator.arm(-1)
        task()
        num_allocations = allocator.arm(-1)
        for step in range(num_steps):
            plan.write_bytes(before[1])
            written.unlink(missing_ok=True)
            code, text = run_starved(task, allocator, 1 + step * num_allocations // num_steps)
            shortage.tasks += 1
            shortage.finished += code == ENOUGH
            shortage.refused += code == SHORT
            shortage.aborted += code < 0 or code == 127
            shortage.other_errors += code == OTHER
            is_whole = table.read_bytes() == before[0] and len(Plan.load(plan)[1]) in (21, 22)
            is_whole &= not written.exists() or list(tables.read_rows(written, Score)) == rows
            if code == WRONG or not is_whole:
                shortage.taken_for_damage += 1
                print(text, file=sys.stderr)
            if code > 0:
                places.add(text.rpartition("\n")[2])
    shortage.places = len(places)
    return shortage


def make_score(number: int) -> Score:
    criteria = (Criterion(id="a", verdict="yes", value=1.0, weight=1.0, reason=f"because of {number}"),)
    return Score(
        key=f"{number:012d}", caption="c", candidate=0, name="s", value=0.5, criteria=criteria, status="ok", error=None
    )


def run_starved(task: Callable[[], object], allocator: ctypes.CDLL, number: int) -> tuple[int, str]:
    """Runs a task in a process whose allocation `number` fails; returns its exit code and what it printed."""
    with tempfile.TemporaryFile() as log:
        if pid := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            log.seek(0)
            return code, log.read().decode()
        os.dup2(log.fileno(), 2)
        code = ENOUGH
        try:
            allocator.arm(number)
            task()
        except BaseException as error:  # the process ends here, not in the caller's code
            allocator.arm(-1)
            is_wrong = isinstance(error, BrokenTableError) or "damaged" in str(error)
            code = WRONG if is_wrong else SHORT if find_trouble(error) else OTHER
            last = traceback.extract_tb(error.__traceback__)[-1]
            os.write(2, f"{''.join(traceback.format_exception(error))}{last.filename}:{last.lineno}".encode())
        os._exit(code)


def run_alone(num_steps: int) -> subprocess.CompletedProcess[str]:
    """This program, with the library that fails allocations. Raises FileNotFoundError without gcc."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/allocator.so"
        compiler = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", library]
        subprocess.run(compiler, input=ALLOCATOR, text=True, check=True)
        environment = {**os.environ, "LD_PRELOAD": library}
        command = [sys.executable, "-m", "tests.support.shortages", "--steps", str(num_steps), "--folder", folder]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="processes of each task")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        done = run_alone(args.steps)
        print(done.stdout, end="")
        sys.exit(done.returncode)
    shortage = starve_tables(args.folder, num_steps=args.steps)
    print(json.dumps(asdict(shortage)))
    sys.exit(1 if shortage.taken_for_damage else 0)


if __name__ == "__main__":
    main()
