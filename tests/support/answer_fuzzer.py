"""Mutated answers of a server: `python -m tests.support.answer_fuzzer --mutations 2000 --seed 0`.

Each request of a run gets another mutation of a sound answer. Every one must leave one row that a table holds, and the
API key, which mutations repeat, may be in no file and no message.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from aiohttp import web

from pipeline.records import Caption
from pipeline.storage import tables
from tests.support import runs
from tests.support.scripted import SOUND, Scripted, complete

KEY = "Sesame-1234-open"
CANDIDATES = 50  # requests for each image
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


def mutate(random: Random) -> web.Response:
    """One response."""
    answer = complete(SOUND)
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


def fuzz(folder: Path, *, num_mutations: int, seed: int) -> Counter[str]:
    """Makes a run of which every caption is a mutated answer; returns its statuses and their rows.

    Raises:
        AssertionError: a row is missing, or the key is in a file, a row or a message.
    """
    num_images = max(1, num_mutations // CANDIDATES)
    photos = runs.corpus(folder / "photos", ["jpg"] * num_images)
    with Scripted(lambda *_: mutate(Random(f"{seed} {server.seen['']}"))) as server:
        engine = {"kind": "openai", "model": "m", "base_url": server.url, "num_tries": 1, "api_key_env": "FUZZER_KEY"}
        caption = {"recipe": "plain", "engine": "captioner", "num_candidates": CANDIDATES, "temperature": 1.0}
        parts = {
            "source": {"kind": "folder", "path": str(photos), "shard_size": num_images},
            "engines.captioner": engine,
            "caption.dense": {**caption, "ladder": [], "max_error_share": 1.0},
        }
        with patch.dict(os.environ, {"FUZZER_KEY": KEY}):
            run = runs.begin(folder / "run", parts)
            runs.recap("run", "ingest", "--run", run)
            done = runs.recap("run", "caption", "--run", run, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(tables.read_rows(run / "caption" / "dense" / "00000.parquet", Caption))
    assert len(rows) == num_images * CANDIDATES
    assert KEY not in repr(rows) + done.stdout + done.stderr
    assert not [name for name, data in runs.files(run, without=()).items() if KEY.encode() in data]
    return Counter(row.status for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        counts = fuzz(Path(made), num_mutations=arguments.mutations, seed=arguments.seed)
    print(f"{counts.total()} mutations, {counts.total()} rows, keys shown 0:", dict(counts))
