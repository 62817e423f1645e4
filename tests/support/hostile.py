"""Counts what hostile files cost: each corpus that is made to break a reader, through a whole run.

    python -m tests.support.hostile --mutants 10000

Mutated images, hostile files, tars, Parquet and downloads go through `recap run all` with the engine echo, and every
row of every input is compared with what it should be. Each file is then decoded once more, alone, to measure the
longest decode and the memory that decoders took. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import config
from pipeline.decoding import images
from pipeline.decoding.probe_pool import ProbePool
from tests.support import corpora, wrapped
from tests.support.corpora import Expected
from tests.support.runs import ROOT, begin, sections

TIMEOUT = 60.0  # seconds, as ingest sets it for one file
DECODERS_OWN = ("the decoder crashed", "decoding took more", "the decoder ended")  # what a file did to a decoder
RECORD = "RECAP_TEST_MEASURED"  # the environment variable with the file to which `measured` writes
# Runs a command and prints the KiB of its largest process. In a process of its own, for the kernel counts a child as
# large as its parent was when it was started, and remembers the largest of all children.
WEIGHED = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


@dataclass(kw_only=True)
class Counts:
    """What the files of one corpus came to."""

    corpus: str
    files: int = 0  # inputs, as the source sees them
    rows_expected: int = 0
    rows_right: int = 0
    rows_too_many: int = 0
    crashes: int = 0  # decoders that a file ended, and runs that did not end with 0
    captions_missing: int = 0  # of images that are ok, and samples missing in what is exported
    longest_decode: float = 0.0  # seconds
    run_mib: int = 0  # most memory that one process of the run took
    decoder_mib: int = 0  # most memory that a decoder took

    @property
    def harm(self) -> int:
        return self.rows_expected - self.rows_right + self.rows_too_many + self.crashes + self.captions_missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for counts in counted(Path(folder), seed=args.seed, num_mutants=args.mutants):
            found.append(counts)
            print(told(counts), flush=True)
    print(json.dumps({"hostile": [asdict(counts) for counts in found], "harm": sum(c.harm for c in found)}))
    sys.exit(any(counts.harm for counts in found))


def told(counts: Counts) -> str:
    return (
        f"{counts.corpus:12} {counts.rows_expected:6,} rows expected, {counts.rows_right:6,} right, "
        f"{counts.rows_too_many} too many, {counts.crashes} crashes, {counts.captions_missing} captions missing; "
        f"longest decode {counts.longest_decode:.2f} s of {TIMEOUT:g}; "
        f"most memory {counts.run_mib} MiB, a decoder {counts.decoder_mib} MiB"
    )


def counted(folder: Path, *, seed: int, num_mutants: int) -> Iterator[Counts]:
    """Makes the corpora in `folder`, one after the other, and counts."""
    packed = {"max_tar_bytes": wrapped.MOST}
    yield count(folder / "mutants", mutants(folder / "mutants" / "corpus", seed, num_mutants), kind="folder")
    yield count(folder / "files", corpora.write_hostile_files(folder / "files" / "corpus", seed), kind="folder")
    yield count(folder / "tars", wrapped.tars(folder / "tars" / "corpus", seed), kind="webdataset", **packed)
    yield count(folder / "tables", wrapped.tables(folder / "tables" / "corpus", seed), kind="parquet")
    downloads = wrapped.downloads(folder / "downloads" / "corpus", seed)
    yield count(folder / "downloads", downloads, kind="img2dataset", **packed)


def mutants(folder: Path, seed: int, num: int) -> list[Expected]:
    """Writes mutated images; what each has become, this process finds out for itself."""
    folder.mkdir(parents=True)
    rows = []
    for number, data in enumerate(corpora.make_mutants(seed, num)):
        name = f"{number:06d}.bin"
        (folder / name).write_bytes(data)
        rows.append(Expected(source_key=name, status=images.probe(data).status))
    return rows


def count(folder: Path, expected: list[Expected], **source: Any) -> Counts:
    """Takes `<folder>/corpus` through all stages."""
    counts = Counts(corpus=folder.name, rows_expected=len(expected))
    about = {"path": str(folder / "corpus"), "shard_size": 500, "max_error_share": 1.0, **source}
    parts = sections(folder / "corpus", filter={"rules": {}}, caption__dense={"recipe": "short"})
    run = begin(folder / "run", {**parts, "source": about})
    command = [sys.executable, "-c", WEIGHED, sys.executable, "-m", "pipeline", "run", "all", "--run", str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    counts.crashes += done.returncode != 0
    counts.run_mib = int(done.stdout) >> 10
    rows = [row for path in sorted((run / "image").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    counts.crashes += sum((row["error"] or "").startswith(DECODERS_OWN) for row in rows)
    counts.rows_right, counts.rows_too_many = compared(expected, rows)
    usable = Counter(row["key"] for row in rows if row["status"] == "ok")
    for table in ("caption/dense", "verdict", "export/index"):
        counts.captions_missing += ((usable - _keys(run / table)) + (_keys(run / table) - usable)).total()
    _measure(run, counts)
    return counts


def compared(expected: Iterable[Expected], rows: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """How many of the expected rows are there, and how many others; order is the source's own."""
    left: dict[tuple[str, str, str | None], list[str]] = {}
    for row in rows:
        left.setdefault((row["source_key"], row["status"], row["alt_text"]), []).append(row["error"] or "")
    right = 0
    for one in expected:
        errors = left.get((one.source_key, one.status, one.alt_text), [])
        match = next((error for error in errors if one.error in error and bool(error) == (one.status != "ok")), None)
        if match is None:
            print(f"no such row: {str(one)[:300]}", file=sys.stderr)
        else:
            errors.remove(match)
            right += 1
    others = [(key, error) for key, errors in left.items() for error in errors]
    for other in others:
        print(f"a row too many: {str(other)[:300]}", file=sys.stderr)
    return right, len(others)


def _keys(folder: Path) -> Counter[str]:
    paths = folder.glob("*.parquet")
    return Counter(key for path in paths for key in pq.read_table(path, columns=["key"]).column(0).to_pylist())


def _measure(run: Path, counts: Counts) -> None:
    """Decodes every file in a decoder that says what that took."""
    source = config.load(run).source
    record = run.parent / "measured"
    os.environ[RECORD] = str(record)
    files = (
        raw.data or b""
        for piece in source.module.pieces(source.config)
        for raw in source.module.read(piece, source.config)
    )
    with ProbePool(num_procs=1, timeout=TIMEOUT, probe="tests.support.hostile:measured") as pool:
        counts.files = sum(1 for _ in pool.map(files))
    measured_ = [line.split() for line in record.read_text().splitlines()]
    counts.longest_decode = max(float(seconds) for seconds, _ in measured_)
    counts.decoder_mib = max(int(kib) for _, kib in measured_) >> 10


def measured(data: bytes, *, limits: images.Limits) -> images.Probe:
    """What `images.probe` says; its seconds, and the most KiB that this process ever had, go to a file."""
    begun = time.perf_counter()
    found = images.probe(data, limits=limits)
    seconds = time.perf_counter() - begun
    with open(os.environ[RECORD], "a") as record, open("/proc/self/status") as status:
        record.write(f"{seconds} {next(line.split()[1] for line in status if line.startswith('VmHWM'))}\n")
    return found


if __name__ == "__main__":
    main()
