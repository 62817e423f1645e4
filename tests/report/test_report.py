"""The report: its numbers agree with SQL, the page is self-contained, and text from a corpus stays text."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.commands.sql import read_query
from pipeline.report import render, samples
from pipeline.report.numbers import Lengths, read_numbers
from pipeline.report.samples import draw_sheets
from pipeline.storage import database
from tests.support.runs import ROOT, begin, corpus, files, make, recap, sections, write

EVIL = "<script>alert(1)</script><img src=http://evil/ onerror=alert(1)>\"'&<|im_end|>\x07\x1b[31m\u202e</style>"
VOID = ("meta", "img", "input")
MIX = ["jpg", "png", "cut", "webp", "empty", "jpg", "text"]


class Page(HTMLParser):
    """A page as a browser parses it: elements with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.elements for key, value in attributes.items() if key == name]


def report(run: Path, **options: Any) -> Page:
    written = render.write_report(config.load(run), **options)
    assert written == run / "report.html"
    return Page(written.read_text())


def funnel(run: Path) -> dict[str, int]:
    with database.connect(run) as connection:
        sql = f"SELECT step, images FROM ({read_query('yield')})"
        return dict(database.query_rows(connection, sql))


def check_self_contained(html: Page) -> None:
    """Nothing in it is fetched, and no script runs but the template's own, by its digest."""
    (script,) = html.scripts
    (policy,) = (value for value in html.attributes("content") if value.startswith("default-src"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}';" in policy
    assert script == (ROOT / "pipeline/report/templates/page.js").read_text().rstrip("\n")
    tags = {tag for tag, _ in html.elements}
    assert html.elements.count(("script", {})) == 1
    assert not tags & {"link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in html.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "xlink:href")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in html.attributes("src"))
    assert all(value.startswith("#") for value in html.attributes("href"))
    assert {value[1:] for value in html.attributes("href")} <= set(html.attributes("id"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    parts = sections(
        corpus(folder / "photos", MIX * 4),
        source={"shard_size": 14, "pack": True},
        caption__dense={"num_candidates": 2},
        caption__wide={"recipe": "dense", "engine": "judge"},
        engines__captioner={"truncated_share": 0.2, "error_share": 0.1},
        filter={"rules": {"judged": "judge >= 0.63"}, "choose": "judge DESC"},
    )
    run = begin(folder / "run", parts, max_error_share=1.0)
    assert make(run).exit_code == 0
    return run


def test_funnel_agrees_with_sql(finished: Path) -> None:
    reported = read_numbers(config.load(finished)).funnel
    assert {"images": reported["in"], **{k: v for k, v in reported.items() if k != "in"}} == funnel(finished)
    assert 0 < reported["kept"] < reported["captioned"] <= reported["usable"] < reported["in"] == 28


def test_tallies_agree_with_sql(finished: Path) -> None:
    found = read_numbers(config.load(finished))
    with database.connect(finished) as connection:
        rows = dict(database.query_rows(connection, "SELECT status, count(*) FROM image GROUP BY status"))
        scored = dict(
            database.query_rows(connection, "SELECT name || ' ' || caption, count(*) FROM score GROUP BY ALL")
        )
        (refused,) = database.query_rows(connection, "SELECT count(*) FROM verdict WHERE NOT keep")
        (num_answers,) = database.query_rows(connection, "SELECT sum(len(criteria)) FROM score")
    assert {tally.label: tally.count for tally in found.images} == rows
    assert sum(tally.count for tally in found.refusals) == refused[0]
    assert {f"{one.score} {one.caption}": sum(one.bins) + one.num_unknown for one in found.scores} == scored
    assert sum(answer.count for one in found.answers for answer in one.answers) == num_answers[0]
    assert {cost.title for cost in found.costs} >= {"ingest", "caption:dense", "filter", "export"}


@pytest.mark.slow
def test_page_is_complete_and_self_contained(finished: Path) -> None:
    html = report(finished)
    check_self_contained(html)
    assert "28" in html.text
    assert html.elements.count(("h1", {})) == 1
    drawings = [attributes for tag, attributes in html.elements if tag == "svg"]
    assert drawings
    assert all(attributes["role"] == "img" for attributes in drawings)


@pytest.mark.slow
def test_command_is_deterministic_and_writes_one_file(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "report.html").unlink(missing_ok=True)
    before = files(run)
    done = recap("report", "--run", run, "--images", 5)
    assert done.stdout == f"{run / 'report.html'}\n"
    first = (run / "report.html").read_text()
    render.write_report(config.load(run), num_images=5)
    assert (run / "report.html").read_text() == first
    assert {name: data for name, data in files(run).items() if name != "report.html"} == before


@pytest.mark.slow
def test_sheets_show_kept_refused_and_unusable_samples_with_reasons(finished: Path) -> None:
    found = {sheet.kind: sheet.samples for sheet in draw_sheets(config.load(finished), num_images=20)}
    sizes = {"kept": 4, "worst": 4, "best": 4, "refused": 4, "unusable": 2}  # only eight are kept
    assert {kind: len(samples) for kind, samples in found.items()} == sizes
    assert len({sample.image.key for samples in found.values() for sample in samples}) == sum(sizes.values())
    assert all(any(shown.verdict and shown.verdict.keep for shown in sample.captions) for sample in found["kept"])
    assert not any(shown.verdict and shown.verdict.keep for sample in found["refused"] for shown in sample.captions)
    assert all(sample.captions[0].verdict and sample.captions[0].verdict.chosen for sample in found["kept"])
    assert all(sample.picture for sample in (*found["kept"], *found["refused"]))
    assert len({sample.image.status for sample in found["unusable"]}) == 2
    assert all(sample.error and sample.picture is None for sample in found["unusable"])
    reasons = [
        c.reason for sample in found["kept"] for shown in sample.captions for s in shown.scores for c in s.criteria
    ]
    html = report(finished, num_images=20)
    assert all(reason in html.text for reason in reasons if reason)


@pytest.mark.slow
def test_worst_kept_and_best_refused_samples_have_the_extreme_scores(finished: Path) -> None:
    found = {sheet.kind: sheet.samples for sheet in draw_sheets(config.load(finished), num_images=5)}
    with database.connect(finished) as connection:
        sql = """
            SELECT v.key, any_value(v.chosen), any_value(reason), avg(value) AS mean, v.caption, v.candidate
            FROM verdict AS v JOIN score AS s USING (key, caption, candidate)
            WHERE v.chosen OR v.key NOT IN (SELECT key FROM verdict WHERE keep)
            GROUP BY v.key, v.caption, v.candidate ORDER BY mean, v.key"""
        rows = list(database.query_rows(connection, sql))
    assert [sample.image.key for sample in found["worst"]] == [key for key, chosen, *_ in rows if chosen][:1]
    best_by_reason = {reason: key for key, chosen, reason, *_ in rows if not chosen}
    assert {sample.image.key for sample in found["best"]} <= set(best_by_reason.values())


@pytest.mark.slow
def test_pictures_become_smaller_until_the_page_fits(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_bytes() -> int:
        sheets = draw_sheets(config.load(run), num_images=4)
        return sum(len(sample.picture or b"") for sheet in sheets for sample in sheet.samples)

    noise = PIL.Image.effect_noise((1500, 1000), 90)
    photos = finished.parent / "large"
    photos.mkdir()
    for number in range(3):
        noise.save(photos / f"{number}.jpg")
    run = begin(photos / "run", sections(photos))
    assert make(run, "ingest").exit_code == 0
    large = count_bytes()
    monkeypatch.setattr(samples, "MAX_BYTES", large // 2)
    assert 0 < count_bytes() <= large // 2


@pytest.mark.slow
def test_missing_tar_is_reported(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "shards")
    html = report(run)
    assert html.attributes("src") == []
    assert "No such file" in html.text


@pytest.mark.slow
def test_report_of_a_run_in_every_state(tmp_path: Path) -> None:
    run = write(tmp_path / "run", sections(corpus(tmp_path / "photos", MIX)))
    unplanned = report(run)
    assert "No image has been read yet" in unplanned.text
    begin(run, sections(tmp_path / "photos"))
    assert "7 more are planned" in report(run).text
    for stage, seen in {
        "ingest": "Nothing is captioned yet",
        "caption": "Nothing is filtered yet",
        "score": "Mean",
        "filter": "were kept",
        "export": "written to the training set",
    }.items():
        assert make(run, stage).exit_code == 0
        html = report(run)
        check_self_contained(html)
        assert seen in html.text
        reported = read_numbers(config.load(run)).funnel
        assert {"images": reported["in"], **{k: v for k, v in reported.items() if k != "in"}} == funnel(run)


@pytest.mark.slow
def test_report_of_a_run_without_kept_or_usable_images(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", MIX), filter={"rules": {"never": "judge > 2"}})
    run = begin(tmp_path / "none", parts)
    make(run)
    found = {sheet.kind for sheet in draw_sheets(config.load(run), num_images=9)}
    assert found == {"best", "refused", "unusable"}
    assert "0 were kept" in report(run).text
    broken = begin(tmp_path / "broken", sections(corpus(tmp_path / "bad", ["cut", "empty"])), max_error_share=1.0)
    make(broken, "ingest")
    assert "Of 2 images, 0 could be used" in report(broken).text


@pytest.mark.slow
def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 3)
    (photos / "00000.txt").write_text(EVIL)
    (photos / "00001.txt").write_text("<b>" * 350_000)
    run = begin(tmp_path / "<i>run & co", sections(photos, engines__captioner={"text": f"A cup. {EVIL} It is red."}))
    assert make(run).exit_code in (0, 1)
    html = report(run)
    check_self_contained(html)
    shown = EVIL.replace("\x07", "␇").replace("\x1b", "␛")
    assert html.text.count(shown) >= 4
    assert "(1,050,000 characters)" in html.text
    written = (run / "report.html").read_text()
    assert len(written) < 200_000
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", written)


@pytest.mark.slow
def test_judge_of_sentences_has_one_line_per_criterion(tmp_path: Path) -> None:
    rubric = 'prompt = "{criteria} {sentence}"\nunit = "sentence"\n[[criteria]]\nid = "true"\nquestion = "Is it?"\n'
    run = write(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 3), score__judge={"rubric": "own"}))
    (run / "rubrics").mkdir()
    (run / "rubrics" / "own.toml").write_text(rubric + 'answers = ["no", "yes"]\n')
    begin(run, sections(tmp_path / "photos", score__judge={"rubric": "own"}))
    assert make(run).exit_code == 0
    assert [one.criterion for one in read_numbers(config.load(run)).answers if one.score == "judge"] == ["true"]


@pytest.mark.slow
def test_training_curves_are_drawn(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"])))
    (run / "step").mkdir()
    points = {"step": [10, 10, 20, 20, 20], "value": [0.5, 2.0, 1.0, 1.5, 60.0]}
    names = {"name": ["entropy", "loss", "loss", "eval_loss", "eval_runtime"]}
    pq.write_table(pa.table(names | points), run / "step" / "00000.parquet")
    curves = {curve.name: curve.points for curve in read_numbers(config.load(run)).curves}
    assert curves == {"entropy": ((10, 0.5),), "loss": ((10, 2.0), (20, 1.0)), "eval_loss": ((20, 1.5),)}
    shown = report(run).text
    assert "held out: 1.5" in shown
    drawn = shown.partition("below each curve")[2]
    assert drawn.index("loss") < drawn.index("entropy")


def test_long_training_is_drawn_with_few_points(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"])))
    (run / "step").mkdir()
    values = {"name": ["loss"] * 50_000, "step": range(50_000), "value": [float("nan"), *[1.0] * 49_999]}
    pq.write_table(pa.table({name: list(column) for name, column in values.items()}), run / "step" / "a.parquet")
    (curve,) = read_numbers(config.load(run)).curves
    assert len(curve.points) <= 301
    assert {value for _, value in curve.points} == {1.0}


def test_settings_show_no_password_and_no_path(tmp_path: Path) -> None:
    parts = sections(corpus(tmp_path / "photos", ["jpg"]), engines__captioner={"text": "see https://me:secret@host/x"})
    html = report(begin(tmp_path / "run", parts))
    assert "secret" not in html.text
    assert "https://host/x" in html.text
    assert str(tmp_path) not in html.text


def test_quantiles_of_lengths() -> None:
    lengths = Lengths(name="dense", counts=((1, 5), (10, 4), (100, 1)))
    assert (lengths.quantile(0.5), lengths.quantile(0.9), lengths.quantile(1.0)) == (1, 10, 100)
    assert Lengths(name="dense", counts=()).quantile(0.5) == 0


def test_values_are_escaped_and_invisible_characters_replaced() -> None:
    template = render.make_environment().from_string('<p title="{{ text }}">{{ text }}</p>')
    assert template.render(text="<&\"'\ud800\x00\x7f\x85") == (
        '<p title="&lt;&amp;&#34;&#39;\ufffd␀␡\ufffd">&lt;&amp;&#34;&#39;\ufffd␀␡\ufffd</p>'
    )


def test_nothing_in_the_report_turns_escaping_off() -> None:
    files = [path for path in (ROOT / "pipeline" / "report").rglob("*") if path.suffix in (".py", ".j2")]
    assert len(files) > 5
    for file in files:
        assert not re.search(r"\bsafe\b|autoescape (false|off)|Markup\(|forceescape|xmlattr", file.read_text()), file


@pytest.mark.slow
def test_unjudged_captions_are_in_no_bin_and_not_in_the_mean(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", sections(corpus(tmp_path / "photos", ["jpg"] * 4)))
    assert make(run).exit_code == 0
    path = run / "score" / "judge" / "dense" / "00000.parquet"
    table = pq.read_table(path)
    values = pa.array([0.2, None, 0.4, None], table.schema.field("value").type)
    statuses = pa.array(["ok", "unknown", "ok", "error"], table.schema.field("status").type)
    for name, column in {"value": values, "status": statuses}.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(position), column)
    pq.write_table(table, path)
    (scores,) = (one for one in read_numbers(config.load(run)).scores if one.score == "judge")
    assert scores.mean == pytest.approx(0.3)
    assert (sum(scores.bins), scores.bins[-1], scores.num_unknown) == (2, 0, 2)
