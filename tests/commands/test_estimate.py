"""`recap estimate`: its intervals, and its figures against the run itself."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from pipeline.commands import estimate
from pipeline.commands.estimate import Range
from pipeline.records import Image, Piece
from pipeline.storage import tables
from tests.support.runs import begin, corpus, make, recap, sections, times


def exact(num: float) -> Range:
    return Range(value=num, low=num, high=num)


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.776), (9, 2.262), (29, 2.045), (999, 1.962)])
def test_quantiles_are_those_of_students_t(freedom: int, quantile: float) -> None:
    assert estimate._quantile_t(freedom) == pytest.approx(quantile, rel=3e-3)


@pytest.mark.parametrize("num", [12, 60])
def test_intervals_hold_the_total_as_often_as_they_say(num: int) -> None:
    random = Random(0)
    tokens = [random.gauss(100, 30) if random.random() < 0.9 else 0.0 for _ in range(400)]

    def holds(values: Sequence[float]) -> bool:
        found = estimate.expand(values, exact(400))
        return found.low <= sum(tokens) <= found.high

    assert 0.9 < sum(holds(random.sample(tokens, num)) for _ in range(500)) / 500 <= 0.99


def test_the_whole_population_leaves_no_doubt() -> None:
    assert estimate.expand([1.0, 2.0, 6.0], exact(3)) == exact(9)


def test_a_sample_in_which_all_agree_leaves_doubt_about_the_others() -> None:
    none, each = (estimate.expand_rows([share] * 8, exact(160)) for share in (0.0, 1.0))
    assert (none.value, none.low, each.value, each.high) == (0, 0, 160, 160)
    assert 50 < none.high < 65 and 95 < each.low < 110
    assert estimate.expand_rows([0.0] * 3, exact(3)) == exact(0)


def test_sums_widen_and_unknown_numbers_of_images_widen() -> None:
    one = Range(value=10, low=7, high=13)
    assert one + Range(value=10, low=6, high=14) == Range(value=20, low=15, high=25)
    assert estimate.expand([5.0, 5.0], one).high == pytest.approx(65)


def test_images_of_files_of_unknown_length_are_counted_by_their_bytes(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 4)))
    assert make(run, "ingest").exit_code == 0
    images = list(tables.read_rows(run / "image" / "00000.parquet", Image))
    sizes = sum((image.num_bytes or 0) + estimate.MEMBER_BYTES for image in images)
    found = estimate.count_images([Piece(file="a.tar", num_bytes=sizes * 50)], images, {})
    assert found.value == pytest.approx(200) and found.low < 200 < found.high


def test_counted_files_tell_the_number_of_images() -> None:
    pieces = [Piece(file=f"{n}.tar", num_bytes=1000 + n) for n in range(20)]
    all_counted = dict.fromkeys(pieces, 10)
    assert estimate.count_images(pieces, [], all_counted) == exact(200)
    some = {piece: 10 + n % 3 for n, piece in enumerate(pieces) if n % 2}
    found = estimate.count_images(pieces, [], some)
    assert found.low < 220 < found.high and found.high - found.low < 40


@pytest.mark.slow
def test_an_estimate_is_near_the_run_and_status_compares_them(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg", "png", "cut", "webp"] * 15)), seed=1)
    before = set(times(run))
    done = recap("estimate", "--images", 40, "--tasks", 4, "--price", 2, "--run", run)
    assert set(times(run)) - before == {str(run / "estimate.json")}
    assert "from 40 random images of 60" in done.stdout and " at 4 tasks" in done.stdout
    assert make(run).exit_code == 0
    found = {p["title"]: p for p in json.loads((run / "estimate.json").read_text())["passes"]}
    status = {p["title"]: p for p in json.loads(recap("status", "--run", run, "--json").stdout)}
    for title in ("ingest", "caption:dense", "score:judge:dense", "export"):
        assert found[title]["rows"]["low"] <= status[title]["num_rows"] <= found[title]["rows"]["high"]
    against = status["caption:dense"]["against_estimate"]
    assert abs(float(against.split("%")[0].removeprefix("tokens "))) <= 20
    assert "against the estimate, caption:dense: tokens " in recap("status", "--run", run).stdout


@pytest.mark.slow
def test_no_image_of_tars_is_estimated_twice(tmp_path: Path) -> None:
    """What is made first, while engines start, is not measured: [curate] would drop its second copy."""
    photos = corpus(tmp_path / "photos", ["jpg"] * 60)
    for number in range(4):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in sorted(photos.glob("*.jpg"))[number * 15 : number * 15 + 15]:
                tar.add(path, path.name)
    source = {"kind": "webdataset", "path": f"{tmp_path}/*.tar"}
    values = {**sections(photos), "source": source, "curate": {"max_distance": 0}}
    run = begin(tmp_path / "run", values, seed=1)
    recap("estimate", "--images", 40, "--run", run)
    stored = json.loads((run / "estimate.json").read_text())
    assert stored["num_images"] == {"value": 60, "low": 60, "high": 60}
    found = {p["title"]: p for p in stored["passes"]}
    assert found["caption:dense"]["rows"]["value"] == found["ingest"]["rows"]["value"] > 0
    assert found["caption:dense"]["output_tokens"]["value"] > 0
