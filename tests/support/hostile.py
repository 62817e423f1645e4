"""Counts the damage that hostile files do, for each hostile corpus in a whole run.

    python -m tests.support.hostile --mutants 10000

Mutated images, hostile files, tars, Parquet and downloads go through `recap run all` with the engine echo, and every
row is compared with the expected one. Each file is then decoded once more, alone, to measure the longest decode and
the memory of the decoder. The last line is JSON.
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
DECODER_ERRORS = ("the decoder crashed", "decoding took more", "the decoder ended")  # a file ended its decoder
RECORD = "RECAP_TEST_MEASURED"  # the environment variable that names the output file of `probe_measured`
# Runs a command and prints the KiB of its largest process. It is a separate process, because the kernel counts a child
# as at least as large as its parent was at the start, and reports the largest of all children.
MEASURE_MEMORY = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


@dataclass(kw_only=True)
class Counts:
    """The results for one corpus."""

    corpus: str
    files: int = 0  # inputs, by the source's own count
    rows_expected: int = 0
    rows_right: int = 0
    rows_too_many: int = 0
    crashes: int = 0  # decoders that a file ended, and runs that failed
    captions_missing: int = 0  # rows missing for images that are ok, in captions, verdicts and the export
    longest_decode: float = 0.0  # seconds
    run_mib: int = 0  # peak memory of any process of the run
    decoder_mib: int = 0  # peak memory of a decoder

    @property
    def harm(self) -> int:
        return self.rows_expected - self.rows_right + self.rows_too_many + self.crashes + self.captions_missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for counts in count_all(Path(folder), seed=args.seed, num_mutants=args.mutants):
            results.append(counts)
            print(describe_counts(counts), flush=True)
    print(json.dumps({"hostile": [asdict(counts) for counts in results], "harm": sum(c.harm for c in results)}))
    sys.exit(any(counts.harm for counts in results))


def describe_counts(counts: Counts) -> str:
    return (
        f"{counts.corpus:12} {counts.rows_expected:6,} rows expected, {counts.rows_right:6,} right, "
        f"{counts.rows_too_many} too many, {counts.crashes} crashes, {counts.captions_missing} captions missing; "
        f"longest decode {counts.longest_decode:.2f} s of {TIMEOUT:g}; "
        f"peak memory {counts.run_mib} MiB, of a decoder {counts.decoder_mib} MiB"
    )


def count_all(folder: Path, *, seed: int, num_mutants: int) -> Iterator[Counts]:
    """Writes each corpus below `folder` and yields its counts."""
    packed = {"max_tar_bytes": wrapped.MOST}
    yield count_corpus(
        folder / "mutants", write_mutants(folder / "mutants" / "corpus", seed, num_mutants), kind="folder"
    )
    yield count_corpus(folder / "files", corpora.write_hostile_files(folder / "files" / "corpus", seed), kind="folder")
    yield count_corpus(folder / "tars", wrapped.tars(folder / "tars" / "corpus", seed), kind="webdataset", **packed)
    yield count_corpus(folder / "tables", wrapped.tables(folder / "tables" / "corpus", seed), kind="parquet")
    downloads = wrapped.downloads(folder / "downloads" / "corpus", seed)
    yield count_corpus(folder / "downloads", downloads, kind="img2dataset", **packed)


def write_mutants(folder: Path, seed: int, num: int) -> list[Expected]:
    """Writes mutated images. Their expected statuses are those of a probe in this process."""
    folder.mkdir(parents=True)
    rows = []
    for number, data in enumerate(corpora.make_mutants(seed, num)):
        name = f"{number:06d}.bin"
        (folder / name).write_bytes(data)
        rows.append(Expected(source_key=name, status=images.probe(data).status))
    return rows


def count_corpus(folder: Path, expected: list[Expected], **source: Any) -> Counts:
    """Runs all stages over `<folder>/corpus`."""
    counts = Counts(corpus=folder.name, rows_expected=len(expected))
    about = {"path": str(folder / "corpus"), "shard_size": 500, "max_error_share": 1.0, **source}
    parts = sections(folder / "corpus", filter={"rules": {}}, caption__dense={"recipe": "short"})
    run = begin(folder / "run", {**parts, "source": about})
    command = [sys.executable, "-c", MEASURE_MEMORY, sys.executable, "-m", "pipeline", "run", "all", "--run", str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    counts.crashes += done.returncode != 0
    counts.run_mib = int(done.stdout) >> 10
    rows = [row for path in sorted((run / "image").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    counts.crashes += sum((row["error"] or "").startswith(DECODER_ERRORS) for row in rows)
    counts.rows_right, counts.rows_too_many = compare_rows(expected, rows)
    usable = Counter(row["key"] for row in rows if row["status"] == "ok")
    for table in ("caption/dense", "verdict", "export/index"):
        counts.captions_missing += ((usable - _count_keys(run / table)) + (_count_keys(run / table) - usable)).total()
    _measure_decoding(run, counts)
    return counts


def compare_rows(expected: Iterable[Expected], rows: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Returns how many expected rows exist, and how many others, in any order."""
    left: dict[tuple[str, str, str | None], list[str]] = {}
    for row in rows:
        left.setdefault((row["source_key"], row["status"], row["alt_text"]), []).append(row["error"] or "")
    right = 0
    for one in expected:
        errors = left.get((one.source_key, one.status, one.alt_text), [])
        match = next((error for error in errors if one.error in error and bool(error) == (one.status != "ok")), None)
        if match is None:
            print(f"missing row: {str(one)[:300]}", file=sys.stderr)
        else:
            errors.remove(match)
            right += 1
    others = [(key, error) for key, errors in left.items() for error in errors]
    for other in others:
        print(f"unexpected row: {str(other)[:300]}", file=sys.stderr)
    return right, len(others)


def _count_keys(folder: Path) -> Counter[str]:
    paths = folder.glob("*.parquet")
    return Counter(key for path in paths for key in pq.read_table(path, columns=["key"]).column(0).to_pylist())


def _measure_decoding(run: Path, counts: Counts) -> None:
    """Decodes every file in a decoder that records its time and memory."""
    source = config.load(run).source
    record = run.parent / "measured"
    os.environ[RECORD] = str(record)
    files = (
        raw.data or b""
        for piece in source.module.pieces(source.config)
        for raw in source.module.read(piece, source.config)
    )
    with ProbePool(num_procs=1, timeout=TIMEOUT, probe="tests.support.hostile:probe_measured") as pool:
        counts.files = sum(1 for _ in pool.map(files))
    measurements = [line.split() for line in record.read_text().splitlines()]
    counts.longest_decode = max(float(seconds) for seconds, _ in measurements)
    counts.decoder_mib = max(int(kib) for _, kib in measurements) >> 10


def probe_measured(data: bytes, *, limits: images.Limits) -> images.Probe:
    """Probes a file, and appends the seconds and the peak KiB of this process to the record."""
    start = time.perf_counter()
    result = images.probe(data, limits=limits)
    seconds = time.perf_counter() - start
    with open(os.environ[RECORD], "a") as record, open("/proc/self/status") as status:
        record.write(f"{seconds} {next(line.split()[1] for line in status if line.startswith('VmHWM'))}\n")
    return result


if __name__ == "__main__":
    main()
