"""MDS files are read without MosaicML's library, and what is no whole file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.exporters.mds import read_images

COLUMNS = {"column_names": ["image", "key", "width"], "column_sizes": [None, None, 8]}
ROWS = {"000000000000": b"first", "000000000001": b"", "000000000002": b"third image"}


def write_shard(folder: Path) -> Path:
    """A file as MosaicML's writer lays it out; tests/docs compares with the writer itself."""
    path, header = folder / "shard.00000.mds", json.dumps(COLUMNS).encode()
    samples = [
        b"".join([_number(len(image)), _number(len(key)), image, key.encode(), (40).to_bytes(8, "little")])
        for key, image in ROWS.items()
    ]
    offsets = [4 + 4 * (len(samples) + 1) + len(header)]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    path.write_bytes(b"".join([_number(len(samples)), *map(_number, offsets), header, *samples]))
    shard = {**COLUMNS, "raw_data": {"basename": path.name}}
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))
    return path


def _number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def test_every_image_is_read_with_its_key(tmp_path: Path) -> None:
    path = write_shard(tmp_path)
    assert dict(read_images(path)) == ROWS
    assert list(read_images(tmp_path / "index.json")) == []


@pytest.mark.parametrize("num_bytes", [0, 3, 9, -1, -12])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, num_bytes: int) -> None:
    path = write_shard(tmp_path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"ends within|not as long"):
        list(read_images(path))
