"""Mutated answers of a server: `python -m tests.support.answer_fuzzer --mutations 2000 --seed 0`.

Each request for a caption, and then each for a judgement, gets another mutation of a sound answer. Every one must leave
one row that a table holds, in at most 300 MiB of memory, and the API key, which mutations repeat, may be in no file and
no message.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from aiohttp import web

from pipeline.records import Caption, Score
from pipeline.storage import tables
from tests.support import runs
from tests.support.scripted import SOUND, Scripted, complete

KEY = "Sesame-1234-open"
CANDIDATES = 50  # requests for each image
MAX_BYTES = 300 << 20  # of resident memory
TABLES = ("caption/dense/00000", "score/judge/dense/00000")
MEASURED = """
import sys
from pathlib import Path
from pipeline import cli
try:
    cli.main()
finally:
    print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
STATUSES = (400, 413, 422, 429, 500, 503)
ENCODINGS = ("gzip", "deflate", "br", "identity")
FIELDS = (
    "refusal",
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "content",
    "finish_reason",
    "usage",
)
MARKS = (
    "<think>", "</think>", "<thinking>", "</thinking>", "[THINK]", "[/THINK]", "◁think▷", "◁/think▷", "<caption>",
    "</caption>", "<|channel|>", "<|channel|>final<|message|>", "<|im_end|>", "</s>", "```json", "\ud83d", "\ude00",
    "\0", "\x1b[31m", "\u202e", KEY,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 7, -1, 2**70, 1.5, float("nan"), float("inf"), "", "\ud83d", KEY, KEY * 30, "length", "content_filter",
    "eos", "abort", "word " * 60_000, SOUND, [], {}, [SOUND], {"type": "text", "text": SOUND}, {"text": 7},
    [{"type": "thinking", "thinking": SOUND}, {"type": "text", "text": SOUND}], {KEY: KEY}, [[[[[[[]]]]]]],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fuzzed:
    """What a stage made of mutated answers."""

    statuses: Counter[str]
    peak_bytes: int  # resident memory of its process
    baseline_bytes: int  # the same with sound answers


def mutate(answer: dict[str, Any], random: Random) -> web.Response:
    """One response."""
    for _ in range(random.randint(1, 3)):
        answer = random.choice((_replace_node, _add_field, _insert_mark))(answer, random)
    body = json.dumps(answer).encode()
    if random.random() < 0.2:
        body = _break_bytes(body, random)
    headers = {}
    if random.random() < 0.1:
        headers["Content-Encoding"] = random.choice(ENCODINGS)
        if random.random() < 0.5:
            body = zlib.compress(body + b" " * random.choice((0, 2**24)))
    status = random.choice(STATUSES) if random.random() < 0.1 else 200
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _replace_node(answer: dict[str, Any], random: Random) -> dict[str, Any]:
    places = list(_list_places(answer))
    node, name = random.choice(places)
    if isinstance(node, dict) and random.random() < 0.2:
        del node[name]
    else:
        node[name] = random.choice(VALUES)
    return answer


def _list_places(node: Any) -> list[tuple[Any, Any]]:
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for name, part in parts for place in ((node, name), *_list_places(part))] or [({"": None}, "")]


def _add_field(answer: dict[str, Any], random: Random) -> dict[str, Any]:
    nodes = [answer, *(node[name] for node, name in _list_places(answer))]
    node = random.choice([node for node in nodes if isinstance(node, dict)])
    node[random.choice(FIELDS)] = json.loads(json.dumps(random.choice(VALUES)))
    return answer


def _insert_mark(answer: dict[str, Any], random: Random) -> dict[str, Any]:
    texts = [(node, name) for node, name in _list_places(answer) if isinstance(node[name], str)]
    if texts:
        node, name = random.choice(texts)
        at = random.randint(0, len(node[name]))
        node[name] = node[name][:at] + random.choice(MARKS) + node[name][at:]
    return answer


def _break_bytes(body: bytes, random: Random) -> bytes:
    at, end = sorted(random.randint(0, len(body)) for _ in range(2))
    return random.choice((
        body[:at],
        body[:at] + random.randbytes(4) + body[at:],
        body[:at] + body[end:],
        body[:end] + body[at:],
        b"[" * 50_000 + body,
    ))  # fmt: skip


def fuzz(folder: Path, *, num_mutations: int, seed: int) -> dict[str, Fuzzed]:
    """Makes a run whose captions, and then whose scores, are mutated answers; returns what came of them by stage.

    Raises:
        AssertionError: a row is missing, or the key is in a file, a row or a message.
    """
    num_images = max(1, num_mutations // CANDIDATES)
    photos = runs.corpus(folder / "photos", ["jpg"] * num_images)
    fuzzed = {}
    with Scripted(lambda _, body: answer(body)) as server, patch.dict(os.environ, {"FUZZER_KEY": KEY}):
        is_sound = True

        def answer(body: dict[str, Any]) -> Any:
            sound = complete(_make_verdicts(body) if "response_format" in body else SOUND)
            return sound if is_sound else mutate(sound, Random(f"{seed} {server.seen['']}"))

        run = _begin_run(folder / "run", photos, server.url, num_images)
        run_measured("ingest", run)
        for stage, record in (("caption", Caption), ("score", Score)):
            is_sound = True
            baseline = run_measured(stage, run)[0]
            table = (run / next(path for path in TABLES if path.startswith(stage))).with_suffix(".parquet")
            sound_table = table.read_bytes()
            table.unlink()
            is_sound = False
            peak, output = run_measured(stage, run)
            rows = list(tables.read_rows(table, record))
            assert len(rows) == num_images * CANDIDATES
            assert KEY not in repr(rows) + output
            assert not [name for name, data in runs.files(run, without=()).items() if KEY.encode() in data]
            statuses = Counter(row.status for row in rows)
            fuzzed[stage] = Fuzzed(statuses=statuses, peak_bytes=peak, baseline_bytes=baseline)
            table.write_bytes(sound_table)  # the next stage reads sound rows
    return fuzzed


def _begin_run(folder: Path, photos: Path, url: str, num_images: int) -> Path:
    engine = {"kind": "openai", "model": "echo", "base_url": url, "num_tries": 1, "api_key_env": "FUZZER_KEY"}
    caption = {"recipe": "plain", "engine": "model", "num_candidates": CANDIDATES, "temperature": 1.0, "ladder": []}
    parts: dict[str, dict[str, Any]] = {
        "source": {"kind": "folder", "path": str(photos), "shard_size": num_images},
        "engines.model": engine,
        "caption.dense": {**caption, "max_error_share": 1.0},
        "score.judge": {"kind": "judge", "engine": "model", "rubric": "dense", "max_error_share": 1.0},
    }
    return runs.begin(folder, parts)


def _make_verdicts(body: dict[str, Any]) -> str:
    """A sound answer of a judge to this request."""
    questions = body["response_format"]["json_schema"]["schema"]["properties"]
    return json.dumps(
        {
            name: {"reason": "It is so.", "verdict": parts["properties"]["verdict"]["enum"][-2]}
            for name, parts in questions.items()
        }
    )


def run_measured(stage: str, run: Path) -> tuple[int, str]:
    """`recap run STAGE` in a process of its own: the most memory that it held, in bytes, and what it printed."""
    command = [sys.executable, "-c", MEASURED, "run", stage, "--no-check", "--run", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1].split()[1]) << 10, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        fuzzed = fuzz(Path(made), num_mutations=arguments.mutations, seed=arguments.seed)
    for stage, found in fuzzed.items():
        over = (found.peak_bytes - found.baseline_bytes) >> 20
        print(
            f"{stage}: {found.statuses.total()} mutations, {found.statuses.total()} rows, keys shown 0, memory at most"
            f" {found.peak_bytes >> 20} MiB, {over} MiB more than with sound answers; {dict(found.statuses)}"
        )
    sys.exit(max(found.peak_bytes for found in fuzzed.values()) > MAX_BYTES)


if __name__ == "__main__":
    main()
