"""The certificate of a guarantee: when it is written, where it is shown, and what makes it stale."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from pipeline import config
from stages.audit.certificates import describe_certificate, digest_parts, write_certificate
from stages.audit.thresholds import Guarantee
from tests.support.runs import begin, corpus, make, recap, sections

FOUND = Guarantee(
    precision=0.9, confidence=0.9, threshold=0.5, kept=0.4, bound=0.912, num_labels=46, num_more=0
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    run = begin(folder / "run", sections(corpus(folder / "photos", ["jpg"] * 12)))
    assert make(run).exit_code == 0
    return run


@pytest.fixture
def certified(run: Path) -> Path:
    write_certificate(config.load(run), "judge", FOUND)
    return run


def describe(run: Path) -> list[str]:
    return list(describe_certificate(config.load(run)))


def test_a_run_without_an_audit_has_none(run: Path) -> None:
    (run / "audit/certificate.json").unlink(missing_ok=True)
    assert describe(run) == []


def test_it_has_the_figures_and_a_digest_of_each_part(certified: Path) -> None:
    stored = json.loads((certified / "audit/certificate.json").read_text())
    assert {name: stored[name] for name in ("score", "threshold", "precision", "confidence", "num_labels")} == {
        "score": "judge", "threshold": 0.5, "precision": 0.9, "confidence": 0.9, "num_labels": 46,
    }  # fmt: skip
    assert sorted(stored["made_from"]) == ["captioner", "corpus", "judge", "rubric", "rules"]
    assert all(len(digest) == 64 for digest in stored["made_from"].values())
    assert describe(certified) == [
        "certificate: at least 90% of the captions with judge >= 0.5 are acceptable, with 90% confidence "
        "(91.2% by 46 labels); they are 40.0% of all",
        "  not applied: captions are kept by other rules",
    ]


def test_an_audit_that_finds_no_threshold_removes_it(certified: Path) -> None:
    write_certificate(config.load(certified), "judge", Guarantee(precision=0.9, confidence=0.9, threshold=None))
    assert describe(certified) == []


def test_a_damaged_one_is_named(certified: Path) -> None:
    (certified / "audit/certificate.json").write_text('{"score": "judge"}')
    (line,) = describe(certified)
    assert "certificate.json cannot be read" in line


@pytest.mark.slow
def test_status_report_and_card_show_it_and_whether_its_rule_is_applied(certified: Path) -> None:
    text = (certified / "run.toml").read_text()
    (certified / "run.toml").write_text(text.replace("judge >= 0.4", "judge >=  0.5"))
    try:
        recap("run", "all", "--stale", "redo", "--run", certified)
        status = recap("status", "--run", certified).stdout
        recap("report", "--run", certified)
        report, card = (html.unescape((certified / name).read_text()) for name in ("report.html", "export/README.md"))
        for line in (lines := describe(certified)):
            assert line in status and line.strip() in report and line.strip() in card
        assert lines[1] == "  captions are kept by this condition alone"
        assert "certificate: " not in recap("status", "--run", certified, "--json").stdout
    finally:
        (certified / "run.toml").write_text(text)
        recap("run", "all", "--stale", "redo", "--run", certified)


@pytest.mark.slow
def test_the_card_follows_a_new_certificate(certified: Path) -> None:
    assert make(certified).exit_code == 0
    write_certificate(config.load(certified), "judge", Guarantee(**{**vars(FOUND), "num_labels": 77}))
    assert make(certified).exit_code == 0
    assert "77 labels" in (certified / "export/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ('recipe = "dense"', 'recipe = "dense"\nmax_tokens = 77', {"captioner"}),
        ('rubric = "dense"', 'rubric = "scenes"', {"rubric"}),
        ('rubric = "dense"', 'rubric = "dense"\nverdict = "logprob"', {"judge"}),
        ("judge >= 0.4", "judge >= 0.3", {"rules"}),
    ],
)
def test_it_is_stale_when_a_part_has_changed_and_names_it(
    certified: Path, old: str, new: str, changed: set[str]
) -> None:
    text = (certified / "run.toml").read_text()
    assert old in text
    before = digest_parts(config.load(certified), "judge")
    (certified / "run.toml").write_text(text.replace(old, new))
    try:
        assert digest_parts(config.load(certified), "judge") == before, "only tables count"
        recap("run", "all", "--stale", "redo", "--run", certified)
        assert describe(certified)[1] == f"  STALE: changed since the audit: {', '.join(changed)}; audit again"
    finally:
        (certified / "run.toml").write_text(text)
        recap("run", "all", "--stale", "redo", "--run", certified)
    assert digest_parts(config.load(certified), "judge") == before


@pytest.mark.slow
def test_it_is_stale_when_the_corpus_has_grown(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg"] * 6)
    run = begin(tmp_path / "run", sections(photos))
    assert make(run).exit_code == 0
    write_certificate(config.load(run), "judge", FOUND)
    corpus(photos, ["jpg"] * 4, first=6)
    recap("plan", "--run", run)
    assert describe(run)[1] == "  STALE: changed since the audit: corpus; audit again"


def test_the_command_writes_it(run: Path, tmp_path: Path) -> None:
    from tests.audit.test_audit import label, list_captions

    kept, refused = list_captions(run)
    file = tmp_path / "labels.jsonl"
    labels = [label(caption, "acceptable") for caption in (*kept, *refused)]
    file.write_text("".join(json.dumps(one) + "\n" for one in labels))
    out = recap(
        "audit", "--run", run, "--labels", file, "--precision", 0.5, "--confidence", 0.5, "--score", "judge"
    ).stdout
    condition = json.loads((run / "audit/certificate.json").read_text())["threshold"]
    assert f'audited = "judge >= {condition}"' in out
    assert "certificate.json: its certificate" in out
    assert describe(run)[0].startswith(f"certificate: at least 50% of the captions with judge >= {condition} ")
