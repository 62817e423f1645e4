"""The share of failed rows counts failures, and no images that their sample does not take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.errors import ShardFailedError
from pipeline.execution.tally import MIN_ROWS, ShardTally
from pipeline.progress import ProgressMeter
from pipeline.sources._tars import NOT_TAKEN_ERROR
from tests.support.scoring import image_row

TAKEN = image_row(0, "ok")
NOT_TAKEN = replace(TAKEN, status="unreadable", error=NOT_TAKEN_ERROR, source_key="000.mask.png")
BROKEN = replace(TAKEN, status="unreadable", error="a JPEG file that cannot be read: broken")


def test_masks_beside_photographs_do_not_fail_a_shard_and_broken_photographs_do() -> None:
    with ProgressMeter("ingest", num_shards=1, num_rows=None) as meter:
        tally = ShardTally(meter, max_error_share=0.2)
        for _ in range(2 * MIN_ROWS):
            tally.count(NOT_TAKEN)
            tally.count(TAKEN)
        for _ in range(2 * MIN_ROWS // 4):
            tally.count(BROKEN)
        assert tally.num_rows - tally.num_errors == 4 * MIN_ROWS
        with pytest.raises(ShardFailedError, match="101 of its first 501 rows failed"):
            tally.count(BROKEN)


def test_a_corpus_of_which_keys_make_one_sample_fails() -> None:
    with ProgressMeter("ingest", num_shards=1, num_rows=None) as meter:
        tally = ShardTally(meter, max_error_share=0.2)
        tally.count(TAKEN)
        for _ in range(MIN_ROWS - 2):
            tally.count(NOT_TAKEN)
        with pytest.raises(ShardFailedError, match="split_keys"):
            tally.count(NOT_TAKEN)
