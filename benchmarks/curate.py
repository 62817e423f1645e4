"""Measures curation: the planted copies that it finds, the distinct pictures that it merges, and the search's speed.

    python -m benchmarks.curate copies [--distinct 5000]
    python -m benchmarks.curate search [--hashes 1000000]

`copies` makes two corpora and takes them through ingest, curate and caption with the engine `echo`:

- photographs: those that ship with scikit-image and scikit-learn, and their crops of 200 pixels that do not overlap and
  are not flat; of each one exact copy, four encoded again, three resized, one cropped by 2 % and one mirrored;
- distinct pictures: crops of 64 pixels of the same photographs that do not overlap and are not flat, drawn scenes, and
  drawings like clip-art on white; no two show the same.

`search` finds planted pairs, 1 to 31 bits apart, among random hashes; where faiss is installed (`pip install
faiss-cpu`), it times its exhaustive and its multi-hash index on some of the same queries.
"""

from __future__ import annotations

import argparse
import io
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from pipeline import config
from pipeline.commands.init import create_run
from pipeline.decoding.near_duplicates import find_pairs
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.machine import num_cores
from pipeline.sources import scenes
from pipeline.storage import database

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
MIN_CONTRAST = 8.0  # standard deviation of the luminance, of 255, of a crop that is used
MAX_DISTANCE = 31
NUM_QUERIES = 2_000  # that faiss answers
KINDS = {  # name of a copy -> what is counted together
    "exact": "exact",
    **dict.fromkeys(("jpeg50", "jpeg70", "jpeg85", "webp"), "re-encoded"),
    **dict.fromkeys(("half", "smaller", "larger"), "resized"),
    "cropped": "cropped by 2 %",
    "mirrored": "mirrored",
}


def load_photographs() -> list[Image]:
    import skimage
    import sklearn.datasets
    from PIL import Image

    folder, more = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
    files = [*(folder / name for name in PHOTOGRAPHS), more / "china.jpg", more / "flower.jpg"]
    return [Image.open(file).convert("RGB") for file in files]


def cut_crops(photographs: list[Image], side: int) -> Iterator[Image]:
    """Crops that do not overlap and are not flat, such as the black around a retina."""
    from PIL import ImageStat

    for picture in photographs:
        for top in range(0, picture.height - side + 1, side):
            for left in range(0, picture.width - side + 1, side):
                crop = picture.crop((left, top, left + side, top + side))
                if ImageStat.Stat(crop.convert("L")).stddev[0] >= MIN_CONTRAST:
                    yield crop


def encode(picture: Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def make_copies(picture: Image) -> Iterator[tuple[str, bytes]]:
    from PIL import ImageOps
    from PIL.Image import Resampling

    original = encode(picture, "JPEG", quality=92)
    yield from (("0original", original), ("exact", original), ("webp", encode(picture, "WEBP", quality=75)))
    for quality in (50, 70, 85):
        yield f"jpeg{quality}", encode(picture, "JPEG", quality=quality)
    for name, scale in (("half", 0.5), ("smaller", 0.75), ("larger", 1.5)):
        size = round(picture.width * scale), round(picture.height * scale)
        yield name, encode(picture.resize(size, Resampling.LANCZOS), "JPEG", quality=85)
    x, y = round(picture.width * 0.01), round(picture.height * 0.01)
    cropped = picture.crop((x, y, picture.width - x, picture.height - y))
    yield "cropped", encode(cropped, "JPEG", quality=90)
    yield "mirrored", encode(ImageOps.mirror(picture), "JPEG", quality=90)


def draw_clip_art(seed: int) -> Image:
    """Three to six filled shapes on white."""
    from PIL import Image, ImageDraw

    noise, picture = Random(seed), Image.new("RGB", (160, 120), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(noise.randint(3, 6)):
        left, top = noise.randrange(120), noise.randrange(90)
        box = (left, top, left + noise.randint(20, 70), top + noise.randint(15, 60))
        colour = tuple(noise.randrange(230) for _ in range(3))
        draw_shape = noise.choice((draw.ellipse, draw.rectangle))
        draw_shape(box, fill=colour, outline="black" if noise.random() < 0.5 else None)
    return picture


def make_distinct(num: int) -> Iterator[tuple[str, bytes]]:
    crops = [encode(crop, "JPEG", quality=90) for crop in cut_crops(load_photographs(), 64)]
    yield from (("crop", data) for data in crops[:num])
    rest = max(0, num - len(crops))
    for index in range(rest - rest // 2):
        scene = scenes.draw_scene(0, index)
        yield "scene", encode(scenes.render_scene(scene, short=112), "JPEG", quality=90)
    yield from (("clip-art", encode(draw_clip_art(seed), "PNG")) for seed in range(rest // 2))


def curate(folder: Path) -> list[tuple[Any, ...]]:
    """Name of the file, group, reason and captions of each image of a corpus, after ingest, curate and caption."""
    run, _ = create_run(
        folder.with_name(f"{folder.name}-run"),
        {
            "source": {"kind": "folder", "path": str(folder)},
            "curate": {"max_distance": MAX_DISTANCE},
            "engines.captioner": {"kind": "echo"},
            "caption.dense": {"recipe": "dense", "engine": "captioner"},
        },
    )
    state = RunState(config.load(run.folder))
    passes = [p for stage in ("ingest", "curate", "caption") for p in select_passes(state.passes, stage)]
    assert Runner(state).execute(passes).exit_code == 0
    sql = """
        SELECT i.source_key, c."group", c.reason, (SELECT count(*) FROM caption AS t WHERE t.key = c.key)
        FROM curation AS c JOIN image AS i USING (key) ORDER BY c.key"""
    with database.connect_run(run) as connection:
        return list(database.query_rows(connection, sql))


def measure_copies(folder: Path, num_distinct: int) -> None:
    photographs = load_photographs()
    originals = [*photographs, *cut_crops(photographs, 200)]
    (copies := folder / "copies").mkdir()
    for number, picture in enumerate(originals):
        for name, data in make_copies(picture):
            (copies / f"{number:05d}_{name}{'.webp' if name == 'webp' else '.jpg'}").write_bytes(data)
    rows = curate(copies)
    group = {key.partition(".")[0]: found for key, found, _, _ in rows}
    found = Counter[str]()
    for name, kind in KINDS.items():
        hits = sum(group[f"{n:05d}_{name}"] == group[f"{n:05d}_0original"] for n in range(len(originals)))
        found[kind] += hits
        print(f"{name:12} {hits:5} of {len(originals)} in the group of their original")
    for kind, hits in found.items():
        num = len(originals) * [*KINDS.values()].count(kind)
        print(f"{kind}: {hits / num:.4f} of {num} found")
    dropped = sum(reason == "duplicate" for _, _, reason, _ in rows)
    print(f"exact copies dropped: {dropped} of {len(originals)}")
    num_groups, num_captions = len({found for _, found, _, _ in rows}), sum(num for *_, num in rows)
    print(f"captions asked: {num_captions}; groups: {num_groups}; images: {len(rows)}")

    (distinct := folder / "distinct").mkdir()
    kinds = Counter[str]()
    for number, (name, data) in enumerate(make_distinct(num_distinct)):
        (distinct / f"{number:05d}_{name}.{'png' if name == 'clip-art' else 'jpg'}").write_bytes(data)
        kinds[name] += 1
    rows = curate(distinct)
    merged = Counter(key.partition("_")[2].partition(".")[0] for key, _, reason, _ in rows if reason)
    print(f"distinct pictures: {sum(kinds.values())} ({', '.join(f'{num} {name}' for name, num in kinds.items())})")
    print(f"false merges: {merged.total()}, {merged.total() / len(rows):.3%} {dict(merged) or ''}")


def plant_pairs(num: int) -> tuple[npt.NDArray[np.uint64], set[tuple[int, int]]]:
    """Random hashes, one in ten a copy of another with 1 to `MAX_DISTANCE` flipped bits, and these pairs."""
    import numpy as np

    random = np.random.default_rng(0)
    bits = np.unpackbits(random.integers(0, 256, (num, 32), dtype=np.uint8), axis=1)
    order = random.permutation(num)
    pairs = order[: num // 10 * 2].reshape(-1, 2)
    for original, copy in pairs:
        bits[copy] = bits[original]
        bits[copy, random.permutation(256)[: random.integers(1, MAX_DISTANCE + 1)]] ^= 1
    hashes = np.packbits(bits, axis=1).view(">u8").astype(np.uint64)
    return hashes, {(int(min(pair)), int(max(pair))) for pair in pairs}


def measure_search(num: int) -> None:
    hashes, planted = plant_pairs(num)
    before, wall, cpu = read_peak(), time.perf_counter(), time.process_time()
    pairs = find_pairs(hashes, max_distance=MAX_DISTANCE, num_threads=num_cores())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = planted & {*zip(pairs.earlier.tolist(), pairs.later.tolist(), strict=True)}
    print(f"{num:,} hashes, {num_cores()} cores: {len(found):,} of {len(planted):,} planted pairs in {wall:.1f} s")
    print(f"CPU time {cpu:.1f} s; peak memory {read_peak():,.0f} MiB, {before:,.0f} of it before the search")
    if not find_spec("faiss"):
        print("faiss is not installed")
        return
    faiss: Any = import_module("faiss")
    data = hashes.byteswap().view("uint8").reshape(num, 32)
    faiss.omp_set_num_threads(num_cores())
    for name, index in (
        ("IndexBinaryFlat", faiss.IndexBinaryFlat(256)),
        ("IndexBinaryMultiHash, 16 x 16 bits, 1 flip", make_multi_hash(faiss)),
    ):
        began = time.perf_counter()
        index.add(data)
        added, began = time.perf_counter() - began, time.perf_counter()
        limits, _, neighbours = index.range_search(data[:NUM_QUERIES], MAX_DISTANCE + 1)
        seconds = time.perf_counter() - began
        hits = {
            (min(n, int(other)), max(n, int(other)))
            for n in range(NUM_QUERIES)
            for other in neighbours[limits[n] : limits[n + 1]]
            if n != other
        }
        expected = {pair for pair in planted if min(pair) < NUM_QUERIES}
        print(
            f"faiss {name}: {added:.1f} s to build, {seconds:.1f} s for {NUM_QUERIES:,} queries, "
            f"{added + seconds * num / NUM_QUERIES:,.0f} s for all; {len(hits & expected)} of {len(expected)} pairs"
        )


def make_multi_hash(faiss: Any) -> Any:
    index = faiss.IndexBinaryMultiHash(256, 16, 16)
    index.nflip = 1
    return index


def read_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("copies").add_argument("--distinct", type=int, default=5000)
    commands.add_parser("search").add_argument("--hashes", type=int, default=1_000_000)
    args = parser.parse_args()
    if args.command == "search":
        measure_search(args.hashes)
        return
    folder = Path(tempfile.mkdtemp(prefix="recap-curate-"))
    try:
        measure_copies(folder, args.distinct)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
