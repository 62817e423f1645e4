"""Tars that are sound, damaged and hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.records import Piece, Raw
from pipeline.sections import stamped
from pipeline.sources import _tar_format, _tars, webdataset
from tests.support.serving import serve_folder
from tests.support.wrapped import add, make_tar

LONG = "folder/" * 30 + "name" * 40  # fits in no plain header


def list_members(data: bytes) -> list[_tar_format.Member]:
    return list(_tar_format.read_members(io.BytesIO(data)))


def read_sound_members(data: bytes) -> dict[str, bytes]:
    return {m.name: data[m.offset : m.offset + m.size] for m in list_members(data) if m.error is None}


def read_tars(path: Path, **keys: object) -> list[Raw]:
    config = webdataset.Config(path=str(path), **keys)  # type: ignore[arg-type]
    return [raw for piece in webdataset.pieces(config) for raw in webdataset.read(piece, config)]


def collect_errors(raws: list[Raw]) -> dict[str, str]:
    assert all((raw.data is None) == (raw.error is not None) for raw in raws)
    return {raw.source_key: raw.error for raw in raws if raw.error is not None}


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150).filter(
    lambda name: not name.startswith("/") and not name.endswith("/") and ".." not in name.split("/")
)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
MEMBERS = st.dictionaries(NAMES, st.binary(max_size=1500), max_size=8)


class TestMembers:
    @given(members=MEMBERS, format=FORMATS)
    def test_are_those_that_were_written(self, members: dict[str, bytes], format: int) -> None:
        data = make_tar(members, format=format)
        assert read_sound_members(data) == members
        assert len(list_members(data)) == len(members)

    @given(members=MEMBERS, format=FORMATS, at=st.floats(0, 1, exclude_max=True))
    def test_before_a_cut_are_intact_and_the_cut_is_an_error(
        self, members: dict[str, bytes], format: int, at: float
    ) -> None:
        whole = list_members(data := make_tar(members, format=format))
        last = max((m.offset + m.size for m in whole), default=0)
        cut = int(at * (-(-last // 512) * 512 + 1))
        after = list_members(data[:cut])
        intact = [m for m in whole if m.offset + m.size <= cut]
        assert after[: len(intact)] == intact
        assert all(m.error for m in after[len(intact) :])
        assert after[-1].error

    @given(at=st.integers(0, 511), bit=st.integers(0, 7), which=st.integers(0, 4))
    def test_one_damaged_header_loses_one_member(self, at: int, bit: int, which: int) -> None:
        members = {f"{number}.jpg": bytes([number]) * 700 for number in range(5)}
        data = bytearray(make_tar(members, format=tarfile.USTAR_FORMAT))
        data[which * 1536 + at] ^= 1 << bit
        others = {name: one for name, one in members.items() if name != f"{which}.jpg"}
        assert others.items() <= read_sound_members(bytes(data)).items()
        assert len(list_members(bytes(data))) == 5

    @pytest.mark.slow
    @settings(max_examples=300)
    @given(data=st.binary(max_size=3000), at=st.integers(0, 6000), members=MEMBERS)
    def test_in_random_bytes_are_errors_or_in_the_file(self, data: bytes, at: int, members: dict[str, bytes]) -> None:
        good = make_tar(members)
        bad = good[:at] + data + good[at + len(data) :]
        for member in list_members(bad):
            assert member.error or member.offset + member.size <= len(bad)

    def test_of_concatenated_tars_are_all_found(self) -> None:
        data = make_tar({"a.jpg": b"a"}) + make_tar({"b.jpg": b"b"})
        assert read_sound_members(data) == {"a.jpg": b"a", "b.jpg": b"b"}

    def test_may_be_absent(self) -> None:
        assert list_members(make_tar({})) == []
        assert [m.error for m in list_members(b"")] == ["the tar is cut off: its end mark is missing at byte 0"]
        assert [m.error for m in list_members(b"no tar" * 1000)] == ["the tar is not a tar at byte 0"]

    def test_may_be_larger_than_octal_digits_express(self) -> None:
        header = tarfile.TarInfo("big.jpg")
        header.size = 1 << 40
        member, end = list_members(header.tobuf(tarfile.GNU_FORMAT) + b"data")
        assert member.size == 1 << 40
        assert member.error == f"the tar has 4 of its {1 << 40} bytes"
        assert end.error


class TestSamples:
    def test_are_those_of_the_webdataset_library(self, tmp_path: Path) -> None:
        import webdataset as wds

        members = {"a.jpg": b"1", "a.txt": b"one", "b/a.x.png": b"2", "b/a.json": b"{}", "B.JPG": b"3", "./c.jpg": b"4"}
        (tmp_path / "a.tar").write_bytes(make_tar(members | {".hidden.jpg": b"", "d/": b""}))
        theirs = [sample["__key__"] for sample in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)]
        assert [raw.source_key for raw in read_tars(tmp_path)] == theirs == ["a", "b/a", "B", "./c"]

    def test_alt_text_comes_from_texts_then_from_json(self, tmp_path: Path) -> None:
        json = b'{"caption": "json", "url": "http://x", "deep": {"nan": NaN}}'
        members = {"a.jpg": b"1", "a.txt": b"text\n", "a.json": json, "b.jpg": b"2", "b.json": json, "c.jpg": b"3"}
        members |= {
            "c.json": b"[" * 100_000,
            "e.jpg": b"5",
            "e.json": b"[" * 65 + b"]" * 65,
            "d.jpg": b"4",
            "d.re.txt": b"re",
            "d.json": b'{"bad": "\\ud800"}',
        }
        (tmp_path / "a.tar").write_bytes(make_tar(members))
        a, b, c, e, d = read_tars(tmp_path)
        assert (a.alt_text, a.metadata) == (
            "text",
            '{"caption": "json", "url": "http://x", "deep": {"nan": null}}',
        )
        assert (b.alt_text, b.metadata) == ("json", '{"url": "http://x", "deep": {"nan": null}}')
        assert c.alt_text is None
        assert c.metadata == '{"json": "' + "[" * 100_000 + '"}'
        assert e.metadata == '{"json": "' + "[" * 65 + "]" * 65 + '"}'
        assert (d.alt_text, d.metadata) == (None, '{"bad": "\ufffd"}')
        assert [raw.alt_text for raw in read_tars(tmp_path, alt_text="re.txt")] == [None, None, None, None, "re"]
        assert [raw.alt_text for raw in read_tars(tmp_path, alt_text="url")] == [
            "http://x",
            "http://x",
            None,
            None,
            None,
        ]

    def test_have_the_image_with_the_configured_extension(self, tmp_path: Path) -> None:
        members = {"a.seg.png": b"mask", "a.jpg": b"photo", "b.jpg": b"photo", "c.cls": b"1"}
        (tmp_path / "a.tar").write_bytes(make_tar(members))
        assert [raw.data for raw in read_tars(tmp_path)] == [b"photo", b"photo", None, None]
        assert [raw.data for raw in read_tars(tmp_path, image="seg.png")] == [b"mask", None, None]
        assert collect_errors(read_tars(tmp_path, image="seg.png"))["b"] == "there is no seg.png in the sample"
        assert collect_errors(read_tars(tmp_path)) == {
            "c": "there is no image in the sample",
            "a.seg.png": _tars.NOT_TAKEN_ERROR,
        }

    def test_every_image_that_is_not_taken_is_a_row(self, tmp_path: Path) -> None:
        names = ["www.site_0.jpg", "www.site_0.txt", "www.site_1.jpg", "www.site_1.txt", "b.mask.png", "b.jpg"]
        (tmp_path / "a.tar").write_bytes(make_tar({name: name.encode() for name in names}))
        raws = read_tars(tmp_path)
        assert [(raw.source_key, raw.data) for raw in raws] == [
            ("www", b"www.site_0.jpg"),
            ("b", b"b.jpg"),
            ("www.site_1.jpg", None),
            ("b.mask.png", None),
        ]
        for error in collect_errors(raws).values():
            assert (
                "set source.image to the extension to take or, when file names contain dots, source.split_keys" in error
            )
        assert len(read_tars(tmp_path, image="jpg")) == 2

    def test_may_have_keys_that_end_at_the_last_dot(self, tmp_path: Path) -> None:
        members = {f"a.b/www.site_{n}{end}": f"{n}".encode() for n in range(3) for end in (".jpg", ".txt")}
        (tmp_path / "a.tar").write_bytes(make_tar(members | {"a.b/.hidden.jpg": b"", "plain.jpg": b"p"}))
        raws = read_tars(tmp_path, split_keys="last")
        assert [(raw.source_key, raw.data, raw.alt_text) for raw in raws] == [
            *((f"a.b/www.site_{n}", f"{n}".encode(), f"{n}") for n in range(3)),
            ("plain", b"p", None),
        ]

    def test_split_keys_is_in_the_fingerprint_only_when_it_is_set(self) -> None:
        default, last = (stamped(webdataset.Config(path="x", **keys)) for keys in ({}, {"split_keys": "last"}))
        assert last == default | {"split_keys": "last"}

    def test_that_are_hostile_are_errors_and_the_others_are_read(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as writer:
            add(writer, "../../up.jpg", b"1")
            add(writer, "/etc/absolute.jpg", b"2")
            add(writer, "a/../b.jpg", b"3")
            add(writer, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
            add(writer, "soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add(writer, "device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
            add(writer, "pipe.jpg", type=tarfile.FIFOTYPE)
            add(writer, "twice.jpg", b"1")
            add(writer, "twice.jpg", b"2")
            add(writer, "sparse.jpg", b"4", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
            add(writer, "good.jpg", b"good")
            add(writer, "good.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add(writer, f"{LONG}.jpg", b"long")
        raws = read_tars(tmp_path)
        assert {raw.source_key: raw.data for raw in raws if raw.data} == {
            "twice": b"1",
            "good": b"good",
            LONG: b"long",
        }
        assert collect_errors(raws) == {
            "../../up": "its name leads out of the folder",
            "/etc/absolute": "its name leads out of the folder",
            "a/../b": "its name leads out of the folder",
            "hard": "is a hard link to good.jpg",
            "soft": "is a symbolic link to /etc/passwd",
            "device": "is a device",
            "pipe": "is a pipe",
            "twice": "another member has its name",
            "sparse": "is a sparse file",
        }
        assert {raw.source_key: raw.alt_text for raw in raws}["good"] is None
        assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]

    @pytest.mark.parametrize("size", [0, 1, 512, 513, 1 << 33, (1 << 63) - 1, 1 << 80])
    def test_with_a_false_size_hide_no_later_sample(self, tmp_path: Path, size: int) -> None:
        member = tarfile.TarInfo("false.jpg")
        member.size = size
        header = member.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(header + b"x" * 1024 + make_tar({"a.jpg": b"a", "b.jpg": b"b"}))
        raws = read_tars(tmp_path)
        assert raws[0].source_key == "false"
        assert [(raw.source_key, raw.data) for raw in raws if raw.source_key in "ab"] == [("a", b"a"), ("b", b"b")]

    def test_that_would_fill_the_memory_are_errors(self, tmp_path: Path) -> None:
        """The tar is a file with a hole: eight gibibytes that take no space on disk."""
        big = tarfile.TarInfo("big.jpg")
        big.size = 1 << 33
        with (tmp_path / "a.tar").open("wb") as file:
            file.write(big.tobuf(tarfile.GNU_FORMAT))
            file.truncate(512 + big.size + 1024)
        (raw,) = read_tars(tmp_path)
        assert raw.error == f"its {big.size} bytes exceed the limit of {1 << 30}"


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


PLAIN = {f"{n:03d}.jpg": bytes([n]) * 3000 for n in range(20)}


class TestStaging:
    def test_reads_a_plain_local_tar_in_place(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(data := make_tar(PLAIN))
        for raw in read_tars(tmp_path):
            assert raw.file == str(tmp_path / "a.tar")
            assert raw.data == data[raw.offset :][:3000]

    @pytest.mark.parametrize("ending", PACKERS)
    def test_unpacks_a_compressed_tar_and_removes_the_copy(self, tmp_path: Path, ending: str) -> None:
        (tmp_path / "scratch").mkdir()
        (tmp_path / f"a.tar.{ending}").write_bytes(PACKERS[ending](make_tar(PLAIN)))
        raws = read_tars(tmp_path, scratch=str(tmp_path / "scratch"))
        assert [(raw.data, raw.file, raw.offset) for raw in raws] == [(d, None, None) for d in PLAIN.values()]
        assert list((tmp_path / "scratch").iterdir()) == []

    @pytest.mark.parametrize("ending", PACKERS)
    def test_yields_the_readable_part_of_a_broken_archive_and_its_error(self, tmp_path: Path, ending: str) -> None:
        packed = PACKERS[ending](make_tar({f"{n}.jpg": bytes(range(n, 256)) * 300 for n in range(9)}))
        (tmp_path / f"a.tar.{ending}").write_bytes(packed[: len(packed) * 2 // 3])
        *_, last = read_tars(tmp_path)
        assert last.data is None
        assert last.error
        assert "is cut off" in last.error

    @pytest.mark.parametrize("ending", PACKERS)
    def test_keeps_everything_before_a_fault_behind_the_data(self, tmp_path: Path, ending: str) -> None:
        (tmp_path / f"a.tar.{ending}").write_bytes(PACKERS[ending](make_tar(PLAIN)) + b"garbage")
        assert [raw.data for raw in read_tars(tmp_path)] == list(PLAIN.values())

    @pytest.mark.slow
    @pytest.mark.parametrize("ending", PACKERS)
    def test_keeps_the_samples_before_a_cut(self, tmp_path: Path, ending: str) -> None:
        noise = {f"{n:03d}.jpg": random.Random(n).randbytes(9000) for n in range(200)}
        packed = PACKERS[ending](make_tar(noise))
        (tmp_path / f"a.tar.{ending}").write_bytes(packed[: len(packed) * 9 // 10])
        raws = [raw.data for raw in read_tars(tmp_path) if raw.error is None]
        lost_block = {"bz2": 100, "zst": 15}.get(ending, 2)  # a packing unpacks whole blocks
        assert raws == list(noise.values())[: len(raws)]
        assert len(raws) >= 180 - lost_block

    def test_packings_are_known_by_all_first_bytes_that_their_formats_define(self, tmp_path: Path) -> None:
        data = make_tar(PLAIN)
        packed = {
            "skippable frame first": b"\x5a\x2a\x4d\x18\x03\0\0\0abc" + pa.compress(data, "zstd", asbytes=True),
            "lz4": pa.compress(data, "lz4", asbytes=True),
            "lzma": lzma.compress(data, format=lzma.FORMAT_ALONE),
            "two members": gzip.compress(data[:5000]) + gzip.compress(data[5000:]),
        }
        for name, content in packed.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.tar").write_bytes(content)
            assert [raw.data for raw in read_tars(tmp_path / name)] == list(PLAIN.values()), name

    @pytest.mark.parametrize("name", ["BZh91AY&SY.jpg", "]", "\x04\x22\x4d\x18"])
    def test_a_members_name_is_not_taken_for_a_packing(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "a.tar").write_bytes(make_tar({name: b"data", "a.jpg": b"a"}))
        assert [raw.data for raw in read_tars(tmp_path) if raw.error is None][-1] == b"a"

    def test_stops_an_archive_bomb(self, tmp_path: Path) -> None:
        bomb = make_tar({"a.jpg": b"a", "bomb.jpg": bytes(1 << 24), "b.jpg": b"b"})
        (tmp_path / "a.tgz").write_bytes(gzip.compress(bomb))
        good, bomb_raw, end = read_tars(tmp_path, max_tar_bytes=1 << 20)
        assert good.data == b"a"
        assert bomb_raw.error is not None
        assert "unpacks to more than 1048576 bytes" in (end.error or "")

    def test_compression_is_detected_from_bytes_not_from_the_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(gzip.compress(make_tar({"a.jpg": b"a"})))
        (tmp_path / "b.tar.gz").write_bytes(make_tar({"b.jpg": b"b"}))
        assert [raw.data for raw in read_tars(tmp_path)] == [b"a", b"b"]

    def test_fetches_remote_tars(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(make_tar(PLAIN))
        (tmp_path / "b.tar.gz").write_bytes(gzip.compress(make_tar({"b.jpg": b"b"})))
        with serve_folder(tmp_path) as address:
            config = webdataset.Config(path=(f"{address}/a.tar", f"{address}/{{b,b}}.tar.gz"))
            pieces = list(webdataset.pieces(config))
            assert pieces == [Piece(file=f"{address}/a.tar"), Piece(file=f"{address}/b.tar.gz")]
            raws = [raw for piece in pieces for raw in webdataset.read(piece, config)]
        assert [(raw.data, raw.file) for raw in raws] == [(data, None) for data in [*PLAIN.values(), b"b"]]

    def test_a_missing_remote_tar_raises(self, tmp_path: Path) -> None:
        with serve_folder(tmp_path) as address:
            config = webdataset.Config(path=f"{address}/gone.tar")
            (piece,) = webdataset.pieces(config)
            with pytest.raises(FileNotFoundError):
                list(webdataset.read(piece, config))


class TestPaths:
    def test_globs_ranges_lists_and_urls_match_files_in_order_each_once(self, tmp_path: Path) -> None:
        import fsspec

        for name in ("00.tar", "01.tar", "10.tar", "deep/02.tar.gz", "[x].tar", "notes.txt", ".hidden.tar"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        for name in ("a.tar", "b/c.tar", "b/notes.txt"):
            fsspec.filesystem("memory").pipe(f"/corpus/{name}", b"")

        def list_files(*paths: str) -> list[str]:
            pieces = webdataset.pieces(webdataset.Config(path=tuple(p.replace("@", str(tmp_path)) for p in paths)))
            return [piece.file.removeprefix(f"{tmp_path}/").removeprefix("memory:///corpus/") for piece in pieces]

        assert list_files("@") == ["00.tar", "01.tar", "10.tar", "[x].tar", "deep/02.tar.gz"]
        assert list_files("@/0*.tar", "@/00.tar") == ["00.tar", "01.tar"]
        assert list_files("@/**/*.tar*") == ["00.tar", "01.tar", "10.tar", "[x].tar", "deep/02.tar.gz"]
        assert list_files("@/{00..01}.tar", "file://@/{10,00}.tar") == ["00.tar", "01.tar", "10.tar"]
        assert list_files("@/[x].tar") == ["[x].tar"]
        assert sorted(list_files("memory://corpus")) == ["a.tar", "b/c.tar"]
        assert list_files("memory://corpus/*.tar") == ["a.tar"]
        assert list_files("memory://corpus/{a,b/c}.tar")[1:] == ["memory://corpus/b/c.tar"]

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("@/{00..02}.tar", r"source\.path: .*/02\.tar' does not exist; write the path of a file or folder, a glob"),
            ("@/*.zip", r"source\.path: .*\*\.zip' matches no file; files must end with \.tar, \.tar\.gz, "),
            ("nosuch://bucket", r"source\.path: 'nosuch://bucket' cannot be opened: Protocol not known: nosuch"),
        ],
    )
    def test_that_match_no_file_are_named(self, tmp_path: Path, path: str, message: str) -> None:
        for number in range(2):
            (tmp_path / f"{number:02d}.tar").write_bytes(b"")
        with pytest.raises(ConfigError, match=message):
            list(webdataset.pieces(webdataset.Config(path=path.replace("@", str(tmp_path)))))
