"""The report in a real browser: it is whole at every width, its controls work, and text of a run never runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.report import render
from tests.support.browser import BrowserTab, start_browser
from tests.support.runs import begin, corpus, make, sections

pytestmark = pytest.mark.browser

RUN = "document.title='taken'"
HOSTILE = f"""<script>{RUN}</script><img src=http://127.0.0.1:9/x onerror="{RUN}">"'`</script><b>"""
WIDTHS = pytest.mark.parametrize("width", [1400, 390])
SHOWN = "[...document.querySelectorAll('main article')].filter(one => one.offsetParent !== null)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose captions, alt texts, file names, errors and model names are HTML."""
    folder = tmp_path_factory.mktemp("report")
    photos = corpus(folder / "photos", ["jpg", "png", "cut", "webp"] * 6)
    (photos / "00000.txt").write_text(HOSTILE)
    (photos / "00001.png").rename(photos / "00001 <img src=x onerror=alert(1)>.png")
    parts = sections(
        photos,
        source={"shard_size": 12},
        caption__dense={"num_candidates": 2},
        caption__wide={"recipe": "dense", "engine": "judge"},
        engines__captioner={"truncated_share": 0.2},
        engines__third={"kind": "echo", "text": f"A cup. {HOSTILE} It is red."},
        caption__evil={"recipe": "dense", "engine": "third"},
        filter={"rules": {"judged": "judge >= 0.63"}, "choose": "judge DESC"},
    )
    run = begin(folder / "<b>run", parts, max_error_share=1.0)
    assert make(run).exit_code == 0
    return render.write_report(config.load(run))


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserTab]:
    with start_browser() as tab:
        yield tab


@pytest.fixture
def tab(browser: BrowserTab, page: Path, width: int) -> BrowserTab:
    browser.open(page.as_uri(), width=width)
    return browser


def choose(tab: BrowserTab, name: str, value: str) -> list[str]:
    """Sets a control of the filter bar; returns the keys of the samples that are then visible."""
    tab.evaluate(
        f"(() => {{ const one = document.querySelector('#filters [name={name}]'); one.value = {json.dumps(value)};"
        " one.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    return list_shown(tab)


def list_shown(tab: BrowserTab) -> list[str]:
    found: list[str] = tab.evaluate(f"{SHOWN}.map(one => one.querySelector('.about').textContent.split(' ')[0])")
    return found


def list_matching(tab: BrowserTab, test: str) -> list[str]:
    """The keys of the samples that have a caption for which a JavaScript expression over `one` is true."""
    captions = f"[...card.querySelectorAll('.caption')].some(one => {test})"
    cards = f"[...document.querySelectorAll('main article')].filter(card => {captions})"
    found: list[str] = tab.evaluate(f"{cards}.map(card => card.querySelector('.about').textContent.split(' ')[0])")
    return found


@WIDTHS
def test_nothing_is_cut_off_fetched_or_run(tab: BrowserTab, page: Path, width: int) -> None:
    urls = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()]
    assert not [e for e in tab.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert "taken" not in tab.evaluate("document.title")
    assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    outside = """(() => {
        const edge = document.documentElement.clientWidth + 0.5;
        const isCut = (one) => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX === "hidden";
        const all = [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll, dialog, svg"));
        return all.filter(one => one.getBoundingClientRect().right > edge || isCut(one)).map(one => one.outerHTML);
    })()"""
    assert tab.evaluate(outside) == []
    assert page.stat().st_size < 5_000_000


@WIDTHS
def test_samples_are_filtered(tab: BrowserTab, width: int) -> None:
    everything = list_shown(tab)
    assert len(everything) == len(set(everything)) > 10
    for name, attribute in (("reason", "reason"), ("pass", "pass")):
        values: list[str] = tab.evaluate(
            f"[...document.querySelector('#filters [name={name}]').options].map(one => one.value).filter(Boolean)"
        )
        assert len(values) >= 2
        for value in values:
            expected = list_matching(tab, f"one.dataset.{attribute} === {json.dumps(value)}")
            assert expected and choose(tab, name, value) == expected, value
        choose(tab, name, "")
    choose(tab, "score", "judge")
    expected = list_matching(tab, "JSON.parse(one.dataset.scores).judge <= 0.5")
    assert choose(tab, "most", "0.5") == expected
    assert 0 < len(expected) < len(everything)
    tab.evaluate("[...document.querySelectorAll('#filters button')].at(-1).click()")
    assert list_shown(tab) == everything
    assert choose(tab, "sheet", "samples-worst") == tab.evaluate(
        "[...document.querySelectorAll('#samples-worst article .about:first-of-type')]"
        ".map(one => one.textContent.split(' ')[0])"
    )


@WIDTHS
def test_captions_and_alt_texts_are_searched(tab: BrowserTab, width: int) -> None:
    assert set(choose(tab, "text", "RED cup")) == set(list_matching(tab, "one.textContent.includes('A cup.')"))
    assert choose(tab, "text", "TEXT of number 21") == ["000001000009"]
    assert choose(tab, "text", "onerror=alert(1)") == ["000000000001"]
    assert choose(tab, "text", "no such words") == []
    assert tab.evaluate("document.querySelector('#filters output').textContent").startswith("0 of ")


@WIDTHS
def test_a_sample_is_enlarged_with_its_captions_side_by_side(tab: BrowserTab, width: int) -> None:
    small: float = tab.evaluate("document.querySelector('article img').getBoundingClientRect().width")
    tab.evaluate("document.querySelector('article .picture').click()")
    assert tab.evaluate("document.querySelector('dialog').open")
    first: str = tab.evaluate("document.querySelector('dialog .about').textContent")
    box: dict[str, Any] = tab.evaluate("document.querySelector('dialog').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= width
    assert tab.evaluate("document.querySelector('dialog img').getBoundingClientRect().width") >= small - 40
    places: list[list[float]] = tab.evaluate(
        "[...document.querySelectorAll('dialog .texts > *')].map(one => one.getBoundingClientRect())"
        ".map(box => [box.left, box.top, box.right])"
    )
    assert len(places) > 2 and all(right <= width for *_, right in places)
    assert (places[0][1] == places[1][1]) == (width == 1400)  # the alt text beside a caption, or above it
    tab.press("ArrowRight")
    assert tab.evaluate("document.querySelector('dialog .about').textContent") != first
    tab.press("ArrowLeft")
    assert tab.evaluate("document.querySelector('dialog .about').textContent") == first
    tab.evaluate("document.querySelectorAll('dialog > p button')[2].click()")
    assert not tab.evaluate("document.querySelector('dialog').open")
    assert "taken" not in tab.evaluate("document.title")
