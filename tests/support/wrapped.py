"""Hostile tars, Parquet files and img2dataset downloads, made from a seed, each with its expected rows.

They have false names, sizes, types and offsets. `tests.support.corpora` makes hostile image files.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.records import ImageStatus
from tests.support.corpora import NAMES, Expected, encode, make_alt_texts, make_trap_images

Maker = Callable[[Path, int], list[Expected]]  # of a folder and a seed
MOST = 32 << 20  # bytes that a compressed tar of these corpora may unpack to, for `max_tar_bytes`
BOMB = 64 << 20  # bytes of a value that a Parquet file of a few kilobytes holds sixteen times
OUT = "its name leads out of the folder"
DAMAGED = "is damaged at byte"
CUT = "is cut off: its end mark is missing"
NO_IMAGE = "there is no image in the sample"
LENGTHS = {  # sizes in the header of a member of 1024 bytes
    "nothing": 0,
    "less": 600,
    "more": 1 << 20,
    "gigabytes": 1 << 33,
    "most": (1 << 63) - 1,
    "beyond": 1 << 80,
}


def make_photo(rng: random.Random) -> bytes:
    """Returns a small valid JPEG, different on every call."""
    picture = Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((32, 32), Image.Resampling.BICUBIC)
    return encode(picture, "JPEG")


def ok(key: str, alt_text: str | None = None) -> Expected:
    return Expected(source_key=key, status="ok", alt_text=alt_text)


def lost(key: str, error: str, *, alt_text: str | None = None, status: ImageStatus = "unreadable") -> Expected:
    """Returns the expected row of an input without a usable image."""
    return Expected(source_key=key, status=status, alt_text=alt_text, error=error)


# Tars


def tars(folder: Path, seed: int) -> list[Expected]:
    """Writes tars for the source `webdataset`: false names, kinds and sizes, damage, bombs, texts, broken images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    makers: Sequence[Callable[[random.Random], tuple[dict[str, bytes], list[Expected]]]]
    makers = (_harm, _names, _lengths, _texts, _images, _damaged, _packed)
    rows: list[Expected] = []
    for make in makers:
        files, expected = make(rng)
        rows += expected
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return rows


def make_tar(members: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as writer:
        for name, data in members.items():
            add(writer, name, data)
    return packed.getvalue()


def add(writer: tarfile.TarFile, name: str, data: bytes = b"", **about: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in about.items():
        setattr(member, field, value)
    writer.addfile(member, io.BytesIO(data))


def _harm(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as writer:
        for name in ("../../up.jpg", "/etc/absolute.jpg", "a/../b.jpg", "..", "../.jpg"):
            add(writer, name, make_photo(rng))
        add(writer, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(writer, "soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(writer, "character.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add(writer, "block.jpg", type=tarfile.BLKTYPE, devmajor=8)
        add(writer, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(writer, "strange.jpg", type=b"Z")
        add(writer, "sparse.jpg", b"4", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add(writer, "folder.jpg", type=tarfile.DIRTYPE)
        for _ in range(2):
            add(writer, "twice.jpg", make_photo(rng))
        add(writer, "good.jpg", make_photo(rng))
        add(writer, "good.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(writer, "twice.jpg", make_photo(rng))
        add(writer, "contiguous.jpg", make_photo(rng), type=tarfile.CONTTYPE)
    rows = [lost("../../up", OUT), lost("/etc/absolute", OUT), lost("a/../b", OUT)]
    rows += [lost("hard", "is a hard link to good.jpg"), lost("soft", "is a symbolic link to /etc/passwd")]
    rows += [lost("character", "is a device"), lost("block", "is a device"), lost("pipe", "is a pipe")]
    rows += [lost("strange", "is of the unknown type b'Z'"), lost("sparse", "is a sparse file")]
    rows += [ok("twice"), lost("twice", "another member has its name"), ok("twice"), ok("good"), ok("contiguous")]
    return {"harm.tar": out.getvalue()}, rows


def _names(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    """A member's name is never used as a path, so any name is valid."""
    named = [f"{group}/{name}" for group, some in NAMES.items() for name in some if not name.startswith(".")]
    named += ["x" * 10_000 + ".jpg", "/".join(["deep"] * 2000) + "/down.jpg", "./here.jpg", "a//b.jpg"]
    named.remove("dots/UPPER.JPG")  # webdataset gives it the other one's key
    members = {name: make_photo(rng) for name in named}
    raw = tarfile.TarInfo("latin_%.jpg").tobuf(tarfile.USTAR_FORMAT).replace(b"%", b"\xe9")
    header = raw[:148] + b"%06o\0 " % (sum(raw[:148]) + 256 + sum(raw[156:512])) + raw[156:512]
    rows = [ok(_stem(name)) for name in members]
    members |= {".hidden.jpg": b"hidden", "no_extension": b"no extension", "note.txt": b"alone"}
    rows += [lost("no_extension", NO_IMAGE), lost("note", NO_IMAGE, alt_text="alone")]
    rows += [lost("latin_\\xe9", "", status="empty")]
    return {"names.tar": header + make_tar(members)}, rows


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _lengths(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    """Each false size has its own tar, with two good samples after it that should still be found."""
    files, rows = {}, []
    for what, size in LENGTHS.items():
        lie = tarfile.TarInfo(f"lie_{what}.jpg")
        lie.size = size
        data = b"\xfe" * 1024
        good = {f"{what}_{letter}.jpg": make_photo(rng) for letter in "ab"}
        files[f"length_{what}.tar"] = lie.tobuf(tarfile.GNU_FORMAT) + data + make_tar(good)
        rows += [ok(name.removesuffix(".jpg")) for name in good]
        if size == 0:
            rows += [lost(f"lie_{what}", "", status="empty"), lost(f"length_{what}.tar@512", DAMAGED)]
        else:
            rows.append(lost(f"lie_{what}", "no image format begins with" if size < 1024 else f"of its {size} bytes"))
    pax = io.BytesIO()
    with tarfile.open(fileobj=pax, mode="w") as writer:
        add(
            writer, "pax.jpg", make_photo(rng), pax_headers={"size": "9" * 30}
        )  # not a size, so the header's own counts
        add(writer, "pax_behind.jpg", make_photo(rng))
    files["length_pax.tar"] = pax.getvalue()
    return files, [*rows, ok("pax"), ok("pax_behind")]


def _texts(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    members: dict[str, bytes] = {}
    rows = []
    for name, (data, alt_text) in make_alt_texts(rng).items():
        members |= {f"text_{name}.jpg": make_photo(rng), f"text_{name}.txt": data}
        rows.append(ok(f"text_{name}", alt_text))
        if alt_text is not None:
            about = {"caption": alt_text, "nan": float("nan"), "url": "http://127.0.0.1:9/never"}
            members |= {f"json_{name}.jpg": make_photo(rng), f"json_{name}.json": json.dumps(about).encode()}
            rows.append(ok(f"json_{name}", alt_text))
    odd = {
        "deep": b"[" * 100_000,
        "number": b'{"caption": 7}',
        "digits": b'{"caption": "a", "n": ' + b"9" * 10_000 + b"}",
        "null": b'{"caption": null}',
        "object": b'{"caption": {"$ne": ""}}',
        "several": b'{"caption": ["first", "second"]}',
        "surrogate": b'{"caption": "half \\ud800 of one"}',
        "python": b"{'caption': __import__('os')}",
        "pickle": b"\x80\x04cposix\nsystem\n",
        "nothing": b"",
    }
    said = {"several": "first", "surrogate": "half \ufffd of one"}
    for name, data in odd.items():
        members |= {f"odd_{name}.jpg": make_photo(rng), f"odd_{name}.json": data}
        rows.append(ok(f"odd_{name}", said.get(name)))
    return {"texts.tar": make_tar(members)}, rows


def _images(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    found = make_trap_images(rng)
    members = {f"trap/{name.replace('.', '_')}.jpg": data for name, (data, _) in found.items()}
    statuses = [status for _, status in found.values()]
    rows = [Expected(source_key=_stem(name), status=one) for name, one in zip(members, statuses, strict=True)]
    return {"images.tar": make_tar(members)}, rows


def _damaged(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    good = {f"part_{number}.jpg": make_photo(rng) for number in range(4)}
    whole = make_tar(good, format=tarfile.USTAR_FORMAT)
    other = make_tar({name.replace("part", "gone"): data for name, data in good.items()}, format=tarfile.USTAR_FORMAT)
    starts = [whole.index(name.encode()) for name in good]
    wrong = bytearray(whole)
    wrong[starts[1] + 150] ^= 1  # in a checksum
    files = {
        "none.tar": b"",
        "words.tar": b"no tar" * 1000,
        "zeros.tar": bytes(10240),
        "archive.tar": b"PK\3\4" + bytes(600),
        "cut.tar": other[: starts[3] + 700],
        "checksum.tar": bytes(wrong),
        "twice.tar": make_tar({"one.jpg": make_photo(rng)}) + make_tar({"two.jpg": make_photo(rng)}),
    }
    rows = [ok(f"part_{number}") for number in (0, 2, 3)] + [ok(f"gone_{number}") for number in range(3)]
    rows += [lost("none.tar@0", CUT), lost("words.tar@0", "is not a tar"), lost("archive.tar@0", "is not a tar")]
    rows += [lost(f"checksum.tar@{starts[1]}", DAMAGED), lost("gone_3", "the tar has"), ok("one"), ok("two")]
    return files, [*rows, lost(f"cut.tar@{starts[3] + 700}", CUT)]


def _packed(rng: random.Random) -> tuple[dict[str, bytes], list[Expected]]:
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": partial(gzip.compress, mtime=0),
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    pack["zst"] = lambda data: bytes(pa.compress(data, "zstd", asbytes=True))
    files, rows = {}, []
    for ending, packer in pack.items():
        bomb = make_tar({f"fuse_{ending}.jpg": make_photo(rng), f"bomb_{ending}.jpg": bytes(4 * MOST)})
        files[f"bomb.tar.{ending}"] = packer(bomb)
        rows += [ok(f"fuse_{ending}"), lost(f"bomb_{ending}", "the tar has")]
        rows.append(lost(f"bomb.tar.{ending}@{MOST}", "unpacks to more than"))
    inner = gzip.compress(make_tar({"inner.jpg": make_photo(rng)}), mtime=0)
    files["shell.tar.gz"] = gzip.compress(inner, mtime=0)
    files["lying_name.tar.gz"] = make_tar({"plain.jpg": make_photo(rng)})
    files["lying_magic.tar.gz"] = b"\x1f\x8b" + rng.randbytes(500)
    rows += [lost("shell.tar.gz@0", "is "), ok("plain"), lost("lying_magic.tar.gz@0", "it cannot be unpacked")]
    return files, rows


# Parquet


def tables(folder: Path, seed: int) -> list[Expected]:
    """Writes Parquet for the source `parquet`: nulls, wrong types, odd columns, damage, a bomb.

    A null key is the row's number, so rows of different files differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    return [
        *_images_column(folder, rng),
        *_text_columns(folder, rng),
        *_wrong_columns(folder, rng),
        *_torn(folder, rng),
    ]


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCHEMA = pa.schema({"image": IMAGE, "caption": pa.string(), "key": pa.string()})


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, **options: Any) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)


def _images_column(folder: Path, rng: random.Random) -> Iterator[Expected]:
    """The file's name sorts first, so it decides the columns."""
    good = make_photo(rng)
    cases: list[tuple[dict[str, Any], Expected]] = [
        ({"image": None, "key": "null"}, lost("null", "the row has no image")),
        ({"image": {"bytes": None, "path": None}, "key": "nulls"}, lost("nulls", "the row has no image")),
        ({"image": {"bytes": b"", "path": "a.jpg"}, "key": "none"}, lost("none", "", status="empty")),
        *(
            ({"image": {"bytes": None, "path": path}, "key": f"path {path}"}, lost(f"path {path}", "only the path"))
            for path in ("../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/a.jpg", "a\0b")
        ),
        ({"image": {"bytes": good, "path": None}, "key": None}, ok("0_images.parquet:8")),
        ({"image": {"bytes": good, "path": "p/q.jpg"}, "key": ""}, ok("p/q.jpg")),
        *(({"image": {"bytes": good}, "key": "double", "caption": text}, ok("double", text)) for text in ("1", "2")),
        *(({"image": {"bytes": good}, "key": name}, ok(name)) for some in NAMES.values() for name in some),
        ({"image": {"bytes": good}, "key": "k" * 1_000_000}, ok("k" * 1_000_000)),
        ({"image": {"bytes": rng.randbytes(3 << 20)}, "key": "noise"}, lost("noise", "")),
    ]
    for name, (data, status) in make_trap_images(rng).items():
        row = {"image": {"bytes": data}, "key": f"trap/{name}"}
        cases.append((row, Expected(source_key=f"trap/{name}", status=status)))
    for name, (data, alt_text) in make_alt_texts(rng).items():
        text = data.decode("utf-8", "replace")
        kept = text if alt_text is not None else None
        cases.append(
            ({"image": {"bytes": make_photo(rng)}, "key": f"t/{name}", "caption": text}, ok(f"t/{name}", kept))
        )
    _write(folder / "0_images.parquet", [row for row, _ in cases])
    yield from (expected for _, expected in cases)


def _text_columns(folder: Path, rng: random.Random) -> Iterator[Expected]:
    """Writes one file for each type of a caption column. Alt text is a text, the first of a list, or one by name."""
    columns: dict[str, tuple[pa.Array, str | None]] = {
        "int": (pa.array([7]), None),
        "float": (pa.array([float("nan")]), None),
        "bool": (pa.array([True]), None),
        "null": (pa.nulls(1), None),
        "strings": (pa.array([["first", "second"]]), "first"),
        "no_strings": (pa.array([[]], pa.list_(pa.string())), None),
        "numbers": (pa.array([[1, 2]]), None),
        "struct": (pa.array([{"text": "x"}]), "x"),
        "other_struct": (pa.array([{"words": "x"}]), None),
        "map": (pa.array([[("text", "x")]], pa.map_(pa.string(), pa.string())), None),
        "dictionary": (pa.array(["said"]).dictionary_encode(), "said"),
        "large": (pa.array(["said"], pa.large_string()), "said"),
        "binary": (pa.array([b"said"]), "said"),
        "time": (pa.array([datetime(2000, 1, 1)]), None),
        "distant": (pa.array([-(1 << 62)], pa.timestamp("us")), None),
        "latin": (pa.array([b"caf\xe9"]).view(pa.string()), "caf\ufffd"),
    }
    for name, (column, alt_text) in columns.items():
        rows = pa.table({"image": [make_photo(rng)], "caption": column, "key": [f"type {name}"]})
        pq.write_table(rows, folder / f"type_{name}.parquet")
        yield ok(f"type {name}", alt_text)
    for name, key in {"int": 1 << 62, "float": 0.5, "date": datetime(2000, 1, 1).date(), "bytes": b"\xff"}.items():
        pq.write_table(pa.table({"image": [make_photo(rng)], "key": [key]}), folder / f"key_{name}.parquet")
        yield ok("ff" if isinstance(key, bytes) else str(key))


def _wrong_columns(folder: Path, rng: random.Random) -> Iterator[Expected]:
    files = {
        "numbers": pa.table({"image": [1, 2]}),
        "words": pa.table({"image": ["a.jpg", "b.jpg"]}),
        "lists": pa.table({"image": [[make_photo(rng)], []]}),
        "no_image": pa.table({"caption": ["a", "b"]}),
        "two_of_a_name": pa.Table.from_arrays([pa.array([b"a", b"b"])] * 2, names=["image", "image"]),
    }
    for name, table in files.items():
        pq.write_table(table, folder / f"wrong_{name}.parquet")
        yield from (lost(f"wrong_{name}.parquet:{row}", "source.") for row in range(2))
    pq.write_table(pa.table({"image": pa.nulls(2)}), folder / "wrong_nulls.parquet")
    yield from (lost(f"wrong_nulls.parquet:{row}", "the row has no image") for row in range(2))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), folder / "wrong_none.parquet")
    pq.write_table(pa.table({"jpg": pa.array([make_photo(rng)], pa.large_binary())}), folder / "other_name.parquet")
    yield ok("other_name.parquet:0")
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 16, pa.int32()), pa.array([bytes(BOMB)]))
    bomb = pa.table({"image": one, "key": [f"bomb {n}" for n in range(16)]})
    pq.write_table(bomb, folder / "bomb.parquet", compression="zstd", store_schema=False)
    yield from (lost(f"bomb {n}", "no image format begins with") for n in range(16))


def _torn(folder: Path, rng: random.Random) -> Iterator[Expected]:
    rows = [{"image": {"bytes": make_photo(rng)}, "key": f"torn {n}"} for n in range(4)]
    options = {"write_page_checksum": True, "use_dictionary": False, "write_statistics": False, "compression": "none"}
    _write(folder / "torn.parquet", rows, row_group_size=2, **options)
    whole = (folder / "torn.parquet").read_bytes()
    place = whole.index(rows[2]["image"]["bytes"]) + 20
    (folder / "torn.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    yield from (ok(f"torn {n}") for n in range(2))
    yield from (lost(f"torn.parquet:{n}", "the Parquet cannot be read") for n in (2, 3))
    broken = {"half": whole[: len(whole) // 2], "none": b"", "magic": b"PAR1PAR1", "words": b"words" * 100}
    broken["lying"] = whole[:-8] + b"\xff\xff\xff\x7fPAR1"  # its footer is longer than the file
    for name, data in broken.items():
        (folder / f"broken_{name}.parquet").write_bytes(data)
        yield lost(f"broken_{name}.parquet:0", "the Parquet cannot be read")


# img2dataset


def downloads(folder: Path, seed: int) -> list[Expected]:
    """Writes downloads of img2dataset with rows and tars that contradict each other, and odd texts in both."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    files: dict[str, bytes] = {}
    rows: list[dict[str, Any]] = []
    expected: list[Expected] = []

    def row(key: str | None, status: str | None = "success", error: str | None = None, caption: str = "") -> None:
        rows.append({"key": key, "status": status, "error_message": error, "caption": caption or None})

    for name, (data, alt_text) in make_alt_texts(rng).items():
        row(name, caption=data.decode("utf-8", "replace"))
        files |= {f"{name}.jpg": make_photo(rng), f"{name}.txt": b"another", f"{name}.json": b"{"}
        expected.append(ok(name, data.decode("utf-8", "replace") if alt_text is not None else None))
    for name, (data, status) in make_trap_images(rng).items():
        stem = name.replace(".", "_")
        row(stem)
        files[f"{stem}.jpg"] = data
        expected.append(Expected(source_key=stem, status=status))
    for key in ("gone", "../up", "写真"):
        row(key)
        expected.append(lost(key, "img2dataset reports success, but the tar has no such sample"))
    row("refused", "failed_to_download", "HTTP Error 404\x00\x1b[31m")
    row("nothing", None, None)
    row(None, "failed_to_resize", "a null key")
    files |= {"said_failed.jpg": make_photo(rng), "unknown.jpg": make_photo(rng)}
    row("said_failed", "failed_to_resize", "but it is there")
    row("twice")
    row("twice")
    files["twice.jpg"] = make_photo(rng)
    expected += [lost("refused", "failed_to_download: HTTP Error 404"), lost("nothing", "None: None"), ok("unknown")]
    expected += [lost("None", "failed_to_resize: a null key"), ok("said_failed"), ok("twice")]
    expected.append(lost("twice", "img2dataset reports success, but the tar has no such sample"))
    names = {"key": pa.string(), "status": pa.string(), "error_message": pa.string(), "caption": pa.string()}
    _shard(folder / "00000", make_tar(files), pa.Table.from_pylist(rows, pa.schema(names)))
    _shard(
        folder / "00001", make_tar({"a.jpg": make_photo(rng)}), pa.table({"key": [0], "status": [1], "caption": [2.5]})
    )
    _shard(folder / "00002", make_tar({"b.jpg": make_photo(rng)}), pa.table({"url": ["x"]}))
    _shard(folder / "00003", b"no tar" * 200, pa.table({"key": ["c"], "status": ["success"]}))
    for number, damage in enumerate((b"PAR1", b"", b"words" * 100), 4):
        _shard(folder / f"{number:05d}", make_tar({f"{number}.jpg": make_photo(rng)}), pa.table({"key": ["x"]}))
        (folder / f"{number:05d}.parquet").write_bytes(damage)
        expected += [ok(str(number)), lost(f"{number:05d}.parquet", "the failed downloads are unknown")]
    expected += [lost("0", "1: None"), ok("a"), lost("None", "None: None"), ok("b")]
    expected += [lost("c", "the tar has no such sample"), lost("00003.tar@0", "is not a tar")]
    return expected


def _shard(path: Path, tar: bytes, table: pa.Table) -> None:
    path.with_suffix(".tar").write_bytes(tar)
    path.with_name(f"{path.name}_stats.json").write_text("{}")
    pq.write_table(table, path.with_suffix(".parquet"))
