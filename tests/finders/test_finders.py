"""Each finder on pictures whose content is known."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from skimage import data

from pipeline import config
from pipeline.engines import Reply, echo
from pipeline.errors import ConfigError
from pipeline.execution.pass_graph import list_passes
from pipeline.sections import Plugin
from stages import finders
from stages.finders import FinderInput, FinderResult, asked, load_finder, metadata, nudity, quality, scale_box
from stages.finders._questions import QuestionSpec, Settings, load
from tests.support.runs import picture, sections, write
from tests.support.scoring import ScriptedEngine, image_row

HERE = Path(__file__).parent


def encode(image: Image.Image, format: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_input(content: bytes, **changes: Any) -> FinderInput:
    return FinderInput(image=replace(image_row(0, "ok"), **changes), data=lambda: content)


def find(module: Any, *contents: bytes, **settings: Any) -> list[FinderResult]:
    finder = load_finder(Plugin(kind="x", module=module, config=module.Config(**settings)), run=None, field="find.x")
    return list(finder.find(map(make_input, contents), engines={"model": echo.open(echo.Config())}))


def labels(content: bytes | Image.Image, **settings: Any) -> dict[str, float | None]:
    content = content if isinstance(content, bytes) else encode(content)
    return {one.label: one.confidence for one in find(quality, content, **settings)[0].found}


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")


PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_blurred_photograph_is_found_and_the_sharp_one_is_not(name: str) -> None:
    sharp = photograph(name)
    assert "blurred" not in labels(sharp)
    assert (labels(sharp.filter(ImageFilter.GaussianBlur(3)))["blurred"] or 0) > 0.5
    assert not {"bright", "blank", "placeholder", "low_entropy"} & labels(sharp).keys()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_exposure_is_found(name: str) -> None:
    photo = photograph(name)
    assert (labels(photo.point(lambda value: value * 0.1))["dark"] or 0) > 0.5
    assert (labels(photo.point(lambda value: 225 + value * 0.12))["bright"] or 0) > 0.5


def test_blank_and_placeholder_pictures_are_found() -> None:
    plain = Image.new("RGB", (300, 200), "#cccccc")
    assert labels(plain)["blank"] == 1.0
    draw = ImageDraw.Draw(plain)
    draw.rectangle((130, 80, 170, 120), outline="#888888", width=3)
    draw.text((110, 130), "no image", fill="#888888")
    found = labels(plain)
    assert "blank" not in found and (found["placeholder"] or 0) > 0.8 and (found["low_entropy"] or 0) > 0.8


def test_a_limit_sets_where_the_confidence_is_half_and_zero_turns_a_fault_off() -> None:
    plain = Image.new("RGB", (64, 64), (51, 51, 51))
    assert labels(plain, dark=0.2)["dark"] == pytest.approx(0.5)
    assert "dark" not in labels(plain, dark=0.2, min_confidence=0.6)
    assert "dark" not in labels(plain, dark=0.0)


@pytest.mark.parametrize("kind", ["quality", "ocr", "nudity"])
def test_a_finder_of_pixels_gives_one_result_per_image_in_order(kind: str) -> None:
    module = __import__(f"stages.finders.{kind}", fromlist=["Config"])
    strip, tiny = encode(Image.new("RGB", (3000, 16))), encode(Image.new("L", (1, 1)))
    contents = [picture(1), b"no image", picture(2, "png"), picture(3, size=(400, 300))[:300], strip, tiny]
    results = find(module, *contents)
    assert [result.status for result in results] == ["ok", "error", "ok", "error", "ok", "ok"]
    assert all((result.error is None) == (result.status == "ok") for result in results)


def write_sign(words: str) -> Image.Image:
    image = photograph("astronaut")
    draw = ImageDraw.Draw(image)
    draw.rectangle((100, 300, 420, 360), fill="white")
    draw.text((110, 305), words, fill="black", font=ImageFont.load_default(40))
    return image


@pytest.mark.slow
def test_text_is_read_where_it_is_shown() -> None:
    from stages.finders import ocr

    sign = write_sign("OPEN DAILY 9-5")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(sign.transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif, quality=95)
    for result in find(ocr, encode(sign), turned):
        (line,) = result.found
        assert line.text == "OPEN DAILY 9-5" and (line.confidence or 0) > 0.9
        assert line.x0 == pytest.approx(110 / 512, abs=0.03) and line.y0 == pytest.approx(310 / 512, abs=0.03)
        assert line.x1 == pytest.approx(410 / 512, abs=0.05) and line.y1 == pytest.approx(350 / 512, abs=0.03)
        assert result.model == "rapidocr" and result.revision


@pytest.mark.slow
def test_a_face_is_found_where_it_is() -> None:
    from stages.finders import nudity

    (result,) = find(nudity, encode(photograph("astronaut")))
    (face,) = [one for one in result.found if one.label == "face_female"]
    assert (face.confidence or 0) > 0.5
    assert 170 / 512 < ((face.x0 or 0) + (face.x1 or 0)) / 2 < 280 / 512
    assert find(nudity, encode(photograph("coffee")))[0].found == ()


@given(
    st.integers(1, 8),
    st.sampled_from(["xyxy", "xywh", "cxcywh"]),
    st.sampled_from(["pixel", "share", "percent"]),
    st.tuples(st.integers(0, 8), st.integers(1, 8), st.integers(0, 20), st.integers(1, 20)),
)
def test_a_box_is_where_the_displayed_picture_shows_it(
    orientation: int, corners: Any, unit: Any, place: tuple[int, int, int, int]
) -> None:
    """A rectangle is drawn in the stored picture, its box written in any form, and the picture turned by Pillow."""
    left, width, top, height = place
    stored = Image.new("L", (16, 40))
    stored.paste(255, (left, top, left + width, top + height))
    stored.getexif()[0x0112] = orientation
    shown = ImageOps.exif_transpose(stored)
    box = {
        "xyxy": (left, top, left + width, top + height),
        "xywh": (left, top, width, height),
        "cxcywh": (left + width / 2, top + height / 2, width, height),
    }[corners]
    size = {"pixel": (1, 1), "share": (16, 40), "percent": (0.16, 0.4)}[unit]
    written = [number / size[i % 2] for i, number in enumerate(box)]
    item = make_input(b"", width=shown.width, height=shown.height, orientation=orientation)
    item = replace(item, image=replace(item.image, metadata=json.dumps({"a": {"b": [{"box": written, "class": 3}]}})))
    config = metadata.Config(boxes="a.b", exif=False, corners=corners, unit=unit, upright=False)
    (result,) = metadata.find([item], config, {})
    (found,) = result.found
    expected = shown.getbbox()
    assert expected and found.label == "3"
    actual = (found.x0, found.y0, found.x1, found.y1)
    assert actual == pytest.approx([number / shown.size[i % 2] for i, number in enumerate(expected)], abs=1e-4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[1, 2, 3, 4]], [("", None, None)]),
        ([{"bbox": [1, 2, 3, 4], "label": "cat", "score": 1.5, "id": 7}], [("cat", 1.0, '{"id": 7}')]),
        ({"bbox": [[1, 2, 3, 4]] * 2, "category": ["a", "b"]}, [("a", None, None), ("b", None, None)]),
        (
            [{"label": "no box"}, {"box": [90, 90, 95, 95], "label": "outside"}],
            [("no box", None, None), ("outside", None, None)],
        ),
        (None, []),
        ([], []),
    ],
)
def test_boxes_of_several_forms_are_read(value: Any, expected: list[tuple[str, float | None, str | None]]) -> None:
    item = make_input(b"", width=10, height=10, metadata=json.dumps({} if value is None else {"boxes": value}))
    (result,) = metadata.find([item], metadata.Config(boxes="boxes", exif=False), {})
    assert [(one.label, one.confidence, one.other) for one in result.found] == expected
    assert all(one.x0 is None for one in result.found if one.label in ("no box", "outside"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cat", "metadata.boxes: 'cat' is no list of boxes"),
        ([[1, 2, 3]], "number 0 has the box [1, 2, 3], which is not four numbers"),
        ([{"box": [1, 2, 3, "4"]}], "which is not four numbers"),
        ({"box": [[1, 2, 3, 4]], "label": []}, "its lists box, label have different lengths"),
        ([{"box": [1, 2, 3, 4], "score": "high"}], "has the confidence 'high'"),
    ],
)
def test_metadata_that_is_no_list_of_boxes_is_a_row_with_an_error(value: Any, message: str) -> None:
    item = make_input(b"", width=10, height=10, metadata=json.dumps({"boxes": value}))
    (result,) = metadata.find([item], metadata.Config(boxes="boxes", exif=False), {})
    assert result.status == "invalid" and message in (result.error or "")


def test_tags_and_exif_are_found() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Leica\0"
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 51.0, 36.0), 3: "E", 4: (151.0, 12.0, 0.0)})
    content = encode(Image.new("RGB", (20, 20)), "jpeg", exif=exif)
    settings = metadata.Config(tags="tags")
    for tags in (["sea", "ferry "], "sea, ferry,", None):
        (result,) = metadata.find([make_input(content, metadata=json.dumps({"tags": tags}))], settings, {})
        found = {one.label: one.text for one in result.found}
        assert list(found)[:2] == (["sea", "ferry"] if tags else ["Make", "GPSLatitudeRef"])
        assert found["Make"] == "Leica"
        assert (found["GPSLatitude"], found["GPSLongitude"]) == ("-33.86", "151.2")
    for broken in (b"", content[:300], content.replace(b"Exif", b"\xff\xff\xff\xff"), picture(1, "png")):
        assert metadata.find([make_input(broken)], settings, {}).__next__().status == "ok"


def ask(answer: Callable[[Any, int], Any], spec: QuestionSpec | None = None) -> tuple[FinderResult, ScriptedEngine]:
    engine = ScriptedEngine(answer)
    settings = asked.Settings(engine="model", spec=spec or load("objects", run=None))
    item = make_input(picture(1), alt_text="A ```sly``` text")
    (result,) = asked.find([item], settings, {"model": engine})
    return result, engine


def test_boxes_of_a_model_are_shares_of_the_picture() -> None:
    things = [{"label": "dog", "box": [100, 200, 1200, 400]}, {"label": "spot", "box": [5, 5, 5, 5]}]
    result, engine = ask(lambda request, attempt: json.dumps({"found": things}))
    dog, spot = result.found
    assert (dog.label, dog.x0, dog.y0, dog.x1, dog.y1) == ("dog", 0.1, 0.2, 1.0, 0.4)
    assert spot.x0 is None
    assert engine.requests[0].images == (picture(1),)
    assert json.loads(engine.requests[0].schema or "")["properties"]["found"]["maxItems"] == 32


def test_an_answer_that_is_no_list_is_asked_again_and_then_invalid() -> None:
    replies = ["a dog", '{"found": [{"label": ""}]}', '{"found": []}']
    result, _ = ask(lambda request, attempt: replies[attempt - 1])
    assert (result.status, result.found, result.attempt) == ("ok", (), 3)
    result, _ = ask(lambda request, attempt: "a dog")
    assert result.status == "invalid" and "not JSON" in (result.error or "")
    result, _ = ask(lambda request, attempt: Reply(error="too large"))
    assert (result.status, result.error) == ("error", "too large")


def test_a_question_of_ones_own_has_its_own_schema(tmp_path: Path) -> None:
    (tmp_path / "finders").mkdir()
    text = """
        prompt = "List the signs. Context: {alt_text}"
        max_found = 2
        scale = 1
        [schema]
        type = "object"
        required = ["label", "text", "kind"]
        properties = { label = { type = "string" }, text = { type = "string" }, kind = { type = "integer" } }
    """
    (tmp_path / "finders" / "signs.toml").write_text(text)
    spec = load("signs", run=tmp_path)
    sign = {"label": "sign", "text": "STOP", "kind": 3}
    assert Settings(engine="m", spec=spec).labels is None
    result, engine = ask(lambda request, attempt: json.dumps({"found": [sign]}), spec)
    assert [(one.text, one.other) for one in result.found] == [("STOP", '{"kind": 3}')]
    assert "````\nA ```sly``` text\n````" in engine.requests[0].prompt
    listed = text.replace('label = { type = "string" }', 'label = { enum = ["stop", "no entry"] }')
    (tmp_path / "finders" / "signs.toml").write_text(listed)
    assert Settings(engine="m", spec=load("signs", run=tmp_path)).labels == ["stop", "no entry"]
    (tmp_path / "finders" / "signs.toml").write_text(text.replace("label = {", "name = {"))
    with pytest.raises(ConfigError, match=r"schema\.properties has no label"):
        load("signs", run=tmp_path)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.integers(1, 3), st.integers(1, 3))
def test_a_box_is_within_the_picture_and_in_order_or_there_is_none(box: list[float], width: int, height: int) -> None:
    corners = scale_box(box, width, height)
    assert not corners or (0 <= corners["x0"] < corners["x1"] <= 1 and 0 <= corners["y0"] < corners["y1"] <= 1)


def test_an_image_that_is_gone_is_the_machines_trouble() -> None:
    def read() -> bytes:
        raise FileNotFoundError("gone.jpg")

    with pytest.raises(FileNotFoundError):
        list(quality.find([replace(make_input(b""), data=read)], quality.Config(), {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"find__seen": {"kind": "asked", "engine": "absent"}}, r"find\.seen\.engine: 'absent' is none of"),
        (
            {"find__seen": {"kind": "asked", "engine": "judge", "question": "x"}},
            r"find\.seen\.question: 'x' is none of",
        ),
        ({"find__seen": {"kind": "glasses"}}, r"find\.seen\.kind: 'glasses' is none of asked, metadata"),
        ({"find__seen": {"kind": "metadata", "exif": False}}, r"find\.seen: there is nothing to find"),
        ({"find__judge": {"kind": "metadata"}}, r"score\.judge: judge is the name of a finder"),
        ({"find__Width": {"kind": "metadata"}}, r"find\.Width: width is the name of a column"),
        ({"filter": {"rules": {"r": "faults.blank < 1"}}}, r"filter\.rules\.r.*uses faults; the columns are"),
        (
            {"find__faults": {"kind": "quality"}, "filter": {"rules": {"r": "faults.Dark < 1 OR faults.blured > 0"}}},
            r"filter\.rules\.r: .* has a label that faults never finds: 'blured' is none of .* mean 'blurred'\?",
        ),
        (
            {
                "find__faults": {"kind": "quality"},
                "caption__dense": {"where": "list_has_any(faults.labels, ['dark', 'blnk'])"},
            },
            r"caption\.dense\.where: .* that faults never finds: 'blnk' is none of .* mean 'blank'\?",
        ),
        (
            {"find__lines": {"kind": "ocr"}, "filter": {"choose": "lines.num_found, lines.sign DESC"}},
            r"filter\.choose: .* that lines never finds: 'sign' is none of text",
        ),
        (
            {"find__bare": {"kind": "nudity"}, "export": {"weight": "1 - bare.face"}},
            r"export\.weight: .* that bare never finds: 'face' is none of .*face_female",
        ),
        (
            {"find__a-b": {"kind": "metadata"}, "filter": {"rules": {"r": "a-b.num_found < 1"}}},
            r"the finder a-b needs double quotes in SQL.*'\"a-b\"\.num_found < 1'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, sections(tmp_path, **changes))
    with pytest.raises(ConfigError, match=message):
        list_passes(config.load(tmp_path))


@pytest.mark.parametrize(("kind", "package"), [("ocr", "rapidocr"), ("nudity", "nudenet")])
def test_a_missing_package_is_named(kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finders, "find_spec", lambda name: None)
    write(tmp_path, sections(tmp_path, find__x={"kind": kind}))
    with pytest.raises(ConfigError, match=rf"find\.x\.kind: '{kind}' needs {package}.*'\.\[{kind}\]'"):
        list_passes(config.load(tmp_path))


def test_the_labels_that_a_finder_declares_are_those_that_it_can_find() -> None:
    from nudenet import nudenet

    assert quality.measure_picture(Image.new("RGB", (8, 8))).keys() == {*quality.Config.labels}
    assert {label.lower() for label in vars(nudenet)["__labels"]} == {*nudity.Config.labels}
    assert len(nudity.Config.labels) == len({*nudity.Config.labels})


def test_every_finder_is_short() -> None:
    for file in (HERE.parent.parent / "stages" / "finders").glob("[a-z]*.py"):
        assert len(file.read_text().splitlines()) < 60, file.name
