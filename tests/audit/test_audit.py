"""`recap audit` on a finished run: the draw, the page, labels from files, and the lines that it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import UserError
from pipeline.storage import database
from stages.audit import describe_guarantee, read_audit
from stages.audit.drawing import draw_captions
from stages.audit.labels import (
    CaptionVerdict,
    combine_labels,
    fleiss_kappa,
    import_labels,
    measure_agreement,
    read_labels,
)
from stages.audit.page import render_page
from tests.support.runs import begin, corpus, make, recap, sections


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    photos = corpus(folder / "photos", ["jpg"] * 36)
    folder = begin(folder / "run", sections(photos, filter={"rules": {"judged": "judge >= 0.6"}}))
    assert make(folder).exit_code == 0
    return folder


def list_captions(run: Path, limit: int = 100) -> list[Any]:
    with database.connect_run(config.load(run)) as connection:
        return [list(draw_captions(connection, population, seed=0, limit=limit)) for population in ("kept", "refused")]


def label(caption: Any, verdict: str, **more: Any) -> dict[str, Any]:
    return {"key": caption.key, "caption": caption.caption, "candidate": caption.candidate, "verdict": verdict} | more


def read_page(run: Path) -> Any:
    text = (run / "audit.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', text)
    assert found
    return json.loads(found[1])


def test_a_larger_draw_begins_with_a_smaller_one(run: Path) -> None:
    for few, many in zip(list_captions(run, 5), list_captions(run, 12), strict=True):
        assert [c.id for c in few] == [c.id for c in many[: len(few)]]
        assert len({c.id for c in many}) == len(many)


def test_the_page_shows_captions_but_neither_scores_nor_verdicts(run: Path) -> None:
    assert "audit.html" in recap("audit", "--run", run, "--draw", 8).stdout
    items = read_page(run)["items"]
    assert len(items) == 8
    assert {name for item in items for name in item} == {
        "key", "caption", "candidate", "text", "sentences", "picture",
    }  # fmt: skip
    assert all(item["picture"].startswith("data:image/jpeg;base64,") for item in items)
    kept = {caption.id for caption in list_captions(run)[0]}
    order = [(item["key"], item["caption"], item["candidate"]) in kept for item in items]
    assert set(order) == {True, False}


def test_text_of_the_run_cannot_end_the_page_s_script() -> None:
    text = '</script><script>alert(1)</script><!-- "'
    item = {"key": "1", "caption": "dense", "candidate": 0, "text": text, "sentences": [text], "picture": None}
    page = render_page(text, [item])
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_labels_give_the_shares_of_both_populations(run: Path, tmp_path: Path, form: str) -> None:
    kept, refused = list_captions(run)
    labels = [label(caption, "acceptable", labeller=form) for caption in kept]
    labels += [label(caption, "unacceptable", labeller=form) for caption in refused]
    file = tmp_path / f"labels.{form}"
    if form == "json":
        file.write_text(json.dumps({"run": "x", "labels": labels}))
    elif form == "jsonl":
        file.write_text("".join(json.dumps(one) + "\n" for one in labels))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(labels), file)
    out = recap("audit", "--run", run, "--labels", file).stdout
    again = recap("audit", "--run", run, "--labels", file).stdout
    assert out == again, "a file that was read before changed something"
    assert f"{len(kept)} kept captions: 100.0% acceptable" in out
    assert f"{len(refused)} refused captions: 0.0% acceptable" in out


@pytest.mark.slow
def test_labels_of_a_text_that_has_changed_do_not_count(run: Path, tmp_path: Path) -> None:
    kept, _ = list_captions(run)
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps(label(kept[0], "unacceptable", labeller="late", text="an earlier caption")))
    recap("audit", "--run", run, "--labels", file)
    votes = combine_labels(one for one in read_labels(config.load(run)) if one.text == kept[0].text)
    assert "late" not in votes[kept[0].id].votes
    _, audits = read_audit(config.load(run), seed=0)
    assert audits[0].verdicts[0] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "good"}, "verdict is 'good'; it must be one of acceptable, unacceptable, unsure"),
        ({"verdict": "true"}, "verdict is 'true'"),
        ({"sentence": -1}, "sentence is '-1'"),
        ({"key": "999999999999"}, "is not in this run"),
        ({"candidate": "0"}, "needs key"),
    ],
)
def test_a_wrong_label_is_named_with_its_file_and_place(
    run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    caption = list_captions(run)[0][0]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps([label(caption, "acceptable"), label(caption, "acceptable") | change]))
    result = recap("audit", "--run", run, "--labels", file, check=False)
    assert result.returncode == 2
    assert f"{file}, label 2: " in result.stderr
    assert message in result.stderr


def test_a_threshold_needs_a_score_of_the_run(run: Path) -> None:
    result = recap("audit", "--run", run, "--precision", 0.9, "--score", "beauty", check=False)
    assert result.returncode == 2
    assert "'beauty' is not a score" in result.stderr


def test_a_threshold_needs_values_of_the_score(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps(label(list_captions(run)[0][0], "acceptable")))
    import_labels(config.load(run), file)
    monkeypatch.setattr("stages.audit.collect_scores", lambda audits, score: ([], []))
    with pytest.raises(UserError, match="--score: no caption has a value of 'judge'"):
        list(describe_guarantee(config.load(run), score="judge", precision=0.9, confidence=0.9, seed=0))


@pytest.mark.parametrize(("option", "value"), [("--precision", 1.5), ("--precision", 0), ("--confidence", 1)])
def test_shares_that_no_threshold_can_have_are_refused(run: Path, option: str, value: float) -> None:
    result = recap("audit", "--run", run, option, value, "--score", "judge", check=False)
    assert result.returncode == 2
    assert option in result.stderr


def test_agreement_of_labellers() -> None:
    votes = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    verdicts = [CaptionVerdict(votes={"ada": a, "bob": b}) for a, b in votes]
    (pair, (kappa, num)) = next(iter(measure_agreement(verdicts).items()))
    assert (pair, num) == (("ada", "bob"), 50)
    assert kappa == pytest.approx(0.4)  # Cohen's own kind of example: 0.7 observed, 0.5 by chance
    same = [CaptionVerdict(votes={"a": one, "b": one, "c": one}) for one in (True, False)]
    assert fleiss_kappa(same) == pytest.approx(1.0)
    assert fleiss_kappa([CaptionVerdict(votes={"a": True})]) is None
