"""Real photographs, hostile files and mutated files: each has one row, with the right status, at a bounded cost."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline.decoding.images import PixelRule, Probe, decode_pixels, probe
from pipeline.decoding.probe_pool import ProbePool
from pipeline.errors import UndecodableError
from pipeline.sources import folder
from tests.support.corpora import make_mutants, write_hostile_files, write_photographs

pytestmark = pytest.mark.slow

BUDGET = 64 * 28 * 28


def is_decodable(data: bytes, result: Probe) -> bool:
    """True when the image decodes at the size and in the mode that a model takes."""
    try:
        picture = decode_pixels(data, PixelRule(max_pixels=BUDGET))
    except UndecodableError:
        return False
    assert picture.mode == "RGB" and picture.width % 28 == picture.height % 28 == 0
    assert picture.width * picture.height <= BUDGET and result.width and result.height
    assert (picture.width > picture.height) <= (result.width >= result.height)
    return True


def test_photographs_have_the_right_status_and_decode(tmp_path: Path) -> None:
    expected = write_photographs(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in expected}
    results = {name: probe(data) for name, data in files.items()}
    assert {name: one.status for name, one in results.items()} == expected
    assert len(files) == len(list(tmp_path.iterdir())) > 70
    for name, one in results.items():
        assert is_decodable(files[name], one) == (one.status == "ok") or one.status == "too_small", name
        assert (one.error is None) == (one.status == "ok")
    assert [results[f"animated.{ending}"].num_frames for ending in ("gif", "webp", "png")] == [3, 2, 2]
    assert [results[f"misnamed_{name}"].format for name in ("png.jpg", "jpeg.webp")] == ["png", "jpeg"]
    assert {(results[f"turned_{n}.jpg"].width, results[f"turned_{n}.jpg"].orientation) for n in range(1, 9)} == {
        *((160, n) for n in range(1, 5)),
        *((106, n) for n in range(5, 9)),
    }


def test_hostile_files_have_one_right_row_each(tmp_path: Path) -> None:
    expected = write_hostile_files(tmp_path, seed=1)
    config = folder.Config(path=str(tmp_path))
    raws = [raw for piece in folder.pieces(config) for raw in folder.read(piece, config)]
    with ProbePool(num_procs=2, timeout=20, max_memory=2 << 30) as pool:
        rows = list(pool.map(raw.data or b"" for raw in raws))
    seen = {raw.source_key: (row.status, raw.alt_text) for raw, row in zip(raws, rows, strict=True)}
    assert seen == {row.source_key: (row.status, row.alt_text) for row in expected}
    assert len(rows) == len(expected)
    for raw, row in zip(raws, rows, strict=True):
        assert not re.search(r"crashed|took more|ended", row.error or ""), raw.source_key
        assert len(row.error or "") < 400


def test_a_hostile_corpus_is_determined_by_its_seed(tmp_path: Path) -> None:
    def read_contents(name: str, seed: int) -> dict[str, bytes]:
        write_hostile_files(tmp_path / name, seed)
        return {
            os.path.relpath(Path(place) / file, tmp_path / name): (Path(place) / file).read_bytes()
            for place, _, files in os.walk(tmp_path / name)
            for file in files
        }

    once, again, other = read_contents("once", 1), read_contents("again", 1), read_contents("other", 2)
    assert once == again
    assert once != other and once.keys() == other.keys()


def test_bombs_are_refused_or_left_packed(tmp_path: Path) -> None:
    expected = {row.source_key: row.status for row in write_hostile_files(tmp_path, seed=2)}
    bombs = [name for name in expected if name.startswith(("bomb", "lying")) and name != "lying_size.png"]
    with ProbePool(num_procs=1, max_memory=128 << 20) as pool:
        rows = list(pool.map((tmp_path / name).read_bytes() for name in bombs))
    assert len(bombs) == 14
    for name, row in zip(bombs, rows, strict=True):
        assert row.status == expected[name] and "more memory" not in (row.error or ""), (name, row.error)


def check_mutants(seed: int, num: int, pool: ProbePool) -> Counter[str]:
    """Each mutant has one deterministic row, and those with status ok decode."""
    files = list(make_mutants(seed, num))
    rows = list(pool.map(files))
    assert len(rows) == len(files) == num
    for data, row in zip(files, rows, strict=True):
        assert not re.search(r"crashed|took more|ended| 0x[0-9a-f]{6}", row.error or ""), row
        assert row == probe(data)
        if row.status == "ok" and row.width and row.height:
            is_strip = max(row.width, row.height) > 200 * min(row.width, row.height)
            assert is_strip or is_decodable(data, row), row
    return Counter(row.status for row in rows)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutants_have_deterministic_rows() -> None:
    with ProbePool(num_procs=2, timeout=20, max_memory=2 << 30) as pool:
        statuses = check_mutants(1, 400, pool)
    assert statuses["ok"] > 40 and statuses["unreadable"] > 40
