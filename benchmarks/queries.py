"""The seconds that each named query takes over a synthetic run, before and after `recap compact`.

python -m benchmarks.queries                          # 10,000,000 captions in 1,000 shards
python -m benchmarks.queries --captions 1000000
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb

from pipeline import config
from pipeline.commands import answers, compact, init
from pipeline.commands.sql import list_queries
from pipeline.sections import Run

IMAGES_PER_SHARD, CANDIDATES, NUM_WORDS = 2500, 2, 60  # candidates of each of the two passes
RUN = """
[source]
kind = "scenes"

[engines.captioner]
kind = "echo"

[caption.dense]
recipe = "dense"
engine = "captioner"

[caption.short]
recipe = "short"
engine = "captioner"

[score.form]
kind = "text"

[score.judge]
kind = "judge"
engine = "captioner"
rubric = "dense"

[filter.rules]
faithful = "judge >= 0.5"

[export]
"""
# The columns of one shard's tables, by folder.
CAPTIONS = f"(SELECT key, range AS candidate, hash(key, range) AS chance FROM images, range({CANDIDATES}))"
WORDS = f"list_transform(range({NUM_WORDS} - (chance % 30)::INTEGER), lambda i: 'w' || (hash(chance, i) % 20000))"
TABLES = {
    "image": """SELECT key, shard, index, 'ok' AS status, sha256, 'name ' || key AS source_key, 'a w1 w2' AS alt_text,
        640 AS width, 480 AS height, 100000 AS num_bytes FROM images""",
    **{
        f"caption/{name}": f"""SELECT key, '{name}' AS name, candidate,
        list_aggregate({WORDS}, 'string_agg', ' ') AS text, 'ok' AS status,
        if(chance % 100 = 0, ['refusal'], []) AS flags, 1 AS attempt, 50 AS num_output_tokens
        FROM {CAPTIONS}"""
        for name in ("dense", "short")
    },
    **{
        f"score/{score}/{name}": f"""SELECT key, '{name}' AS caption, candidate, '{score}' AS name, 'ok' AS status,
        (chance % {10**6 + len(score)}) / 1e6 AS value,
        [{{id: 'true', verdict: 'yes', value: 1.0::DOUBLE, weight: 1.0::DOUBLE, reason: NULL::VARCHAR}}] AS criteria
        FROM {CAPTIONS}"""
        for score in ("form", "judge")
        for name in ("dense", "short")
    },
    "verdict": f"""SELECT key, caption, candidate, chance % 3 > 0 AS keep,
        if(chance % 3 > 0, NULL, 'faithful') AS reason,
        chance % 3 > 0 AND candidate = 0 AND caption = 'dense' AS chosen
        FROM {CAPTIONS}, (VALUES ('dense'), ('short')) AS passes (caption)""",
    "stats/verdict": """SELECT 'filter' AS stage, '' AS name, '' AS caption, 0 AS shard, 0.5 AS started_at,
        1.5 AS seconds, 10 AS num_rows, 10 AS num_new_rows, 0 AS num_errors, 0 AS num_retries, 0 AS num_prompt_tokens,
        0 AS num_output_tokens, 0.1 AS waiting""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=10_000_000)
    parser.add_argument("--only-after", action="store_true", help="do not time the queries before compaction")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recap-queries-") as folder:
        num_shards = max(2, options.captions // (IMAGES_PER_SHARD * CANDIDATES * 2))
        (Path(folder) / "run.toml").write_text(RUN)
        run = config.load(Path(folder))
        print(f"written in {measure(lambda: write_tables(run, num_shards)):.0f} s", flush=True)
        before = {} if options.only_after else time_queries(run)
        seconds = measure(lambda: list(compact.compact_run(run)))
        after = time_queries(run)
    num_captions = num_shards * IMAGES_PER_SHARD * CANDIDATES * 2
    print(f"{num_captions:,} captions in {num_shards} shards; compacted in {seconds:.0f} s")
    for name, seconds in after.items():
        print(f"{name:18} {seconds:8.2f} s" + (f", {before[name]:8.2f} s before" if before else ""))
    slowest = max(after.values())
    print(json.dumps({"benchmark": "queries", "captions": num_captions, "slowest_after": round(slowest, 2)}))


def measure(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def time_queries(run: Run) -> dict[str, float]:
    return {
        name: measure(lambda name=name: answers.print_named_query(run, name, "json", io.BytesIO()))  # type: ignore[misc]
        for name, _ in list_queries()
    }


def write_tables(run: Run, num_shards: int) -> None:
    init.extend_plan(run)
    with duckdb.connect() as duck:
        for shard in range(num_shards):
            duck.execute(f"""CREATE OR REPLACE TABLE images AS SELECT range AS index, {shard} AS shard,
                format('{{:06d}}{{:06d}}', {shard}, range) AS key,
                sha256(({shard} * {IMAGES_PER_SHARD} + range - (range % 50 = 49)::INTEGER)::VARCHAR) AS sha256
                FROM range({IMAGES_PER_SHARD})""")
            for folder, sql in TABLES.items():
                file = run.folder / folder / f"{shard:05d}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                duck.execute(f"COPY ({sql}) TO '{file}' (COMPRESSION zstd)")


if __name__ == "__main__":
    main()
