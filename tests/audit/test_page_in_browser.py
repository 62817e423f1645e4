"""The audit's page in a real browser: a person labels every caption by keyboard alone, at every width, and saves a file
that `recap audit` reads. Text of a run never runs, and nothing is fetched."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.storage import database
from tests.support.browser import BrowserTab, start_browser
from tests.support.runs import begin, corpus, make, recap, sections

pytestmark = pytest.mark.browser

RUN = "document.title='taken'"
HOSTILE = f"""<script>{RUN}</script><img src=http://127.0.0.1:9/x onerror="{RUN}">"'`</script><!-- <b>"""
LONG = "".join(sha256(bytes([n])).hexdigest() for n in range(3))  # a word that cannot be broken
NUM_CAPTIONS = 6
WIDTHS = pytest.mark.parametrize("width", [1400, 390])
VERDICTS = {"t": "true", "f": "false", "u": "unsure", "a": "acceptable", "x": "unacceptable"}  # by key


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose captions are HTML, with the page of an audit."""
    folder = tmp_path_factory.mktemp("audit")
    parts = sections(
        corpus(folder / "photos", ["jpg", "png"] * 8),
        engines__captioner={"text": f"A cup. {HOSTILE} It is red. {LONG} It is round."},
        filter={"rules": {"judged": "judge >= 0.6"}},
    )
    made = begin(folder / "<i>run", parts)
    assert make(made).exit_code == 0
    recap("audit", "--draw", NUM_CAPTIONS, "--run", made)
    return made


@pytest.fixture
def tab(run: Path, width: int) -> Iterator[BrowserTab]:
    """The page in a browser of its own, since a browser keeps marks."""
    with start_browser() as tab:
        tab.open((run / "audit.html").as_uri(), width=width)
        yield tab


def read_items(tab: BrowserTab) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = tab.evaluate("JSON.parse(document.getElementById('data').textContent).items")
    return items


def find_focus(tab: BrowserTab) -> str:
    focus: str = tab.evaluate("document.activeElement.id || document.activeElement.tagName")
    return focus


def sign(tab: BrowserTab, name: str) -> None:
    """Reaches the field for the name with the Tab key, writes, and leaves it."""
    while find_focus(tab) != "labeller":
        tab.press("Tab")
    tab.call("Input.insertText", text=name)
    tab.press("Tab")
    assert find_focus(tab) != "labeller"


def label_captions(tab: BrowserTab, *, check: str = "true") -> list[list[str]]:
    """Labels every caption by keys; returns the verdicts of each. A JavaScript expression must hold after each key."""
    keys, wholes, given = cycle("tfut"), cycle("axu"), []
    for item in read_items(tab):
        pressed = [next(keys) for _ in item["sentences"]] + [next(wholes)]
        for key in pressed:
            tab.press(key)
            assert tab.evaluate(check), (key, item["text"])
        given.append([VERDICTS[key] for key in pressed])
    return given


@WIDTHS
def test_every_caption_is_labelled_by_keyboard_saved_and_read(
    tab: BrowserTab, run: Path, width: int, tmp_path: Path
) -> None:
    sign(tab, f"Ada {width}")
    given = label_captions(tab)
    place = tab.evaluate("document.getElementById('place').textContent")
    assert place == f"{NUM_CAPTIONS} of {NUM_CAPTIONS}; {NUM_CAPTIONS} labelled"
    file = tab.save_download(lambda: tab.press("s"), tmp_path)
    assert file.name == f"labels-Ada-{width}.json"
    saved = json.loads(file.read_text())["labels"]
    assert {label["labeller"] for label in saved} == {f"Ada {width}"}
    items = read_items(tab)
    for item, verdicts in zip(items, given, strict=True):
        own = [one for one in saved if all(one[name] == item[name] for name in ("key", "caption", "candidate", "text"))]
        assert {one["sentence"]: one["verdict"] for one in own} == dict(
            zip([*range(len(item["sentences"])), None], verdicts, strict=True)
        )
    num_labels = sum(map(len, given))
    assert len(saved) == num_labels > 3 * NUM_CAPTIONS
    done = recap("audit", "--labels", file, "--run", run)
    assert f"{num_labels} labels" in done.stdout
    with database.connect_run(config.load(run)) as connection:
        query = f"SELECT verdict, count(*) FROM label WHERE labeller = 'Ada {width}' GROUP BY verdict"
        assert dict(database.query_rows(connection, query)) == Counter(verdict for own in given for verdict in own)


@WIDTHS
def test_marks_are_kept_changed_and_found_again_by_keyboard(tab: BrowserTab, width: int) -> None:
    def list_pressed() -> list[str]:
        pressed: list[str] = tab.evaluate(
            "[...document.querySelectorAll('#sentences [aria-pressed=true]')].map(one => one.dataset.verdict)"
        )
        return pressed

    for key in ("t", "f", "ArrowUp", "u", "ArrowRight", "x", "ArrowLeft", "ArrowLeft"):
        tab.press(key)
    assert list_pressed() == ["true", "unsure"]
    end = time.monotonic() + 30
    tab.open(tab.evaluate("location.href"), width=width)
    while list_pressed() != ["true", "unsure"] and time.monotonic() < end:
        tab.open(
            tab.evaluate("location.href"), width=width
        )  # the browser stores a moment later what a page has written
    assert list_pressed() == ["true", "unsure"]
    for key in ("f", "ArrowDown", "t", "ArrowRight"):
        tab.press(key)
    assert list_pressed() == ["unacceptable"]
    tab.press("ArrowLeft")
    assert list_pressed() == ["false", "unsure", "true"]


@WIDTHS
def test_text_of_the_run_does_not_run_and_nothing_is_fetched(
    tab: BrowserTab, run: Path, width: int, tmp_path: Path
) -> None:
    label_captions(tab)
    tab.save_download(lambda: tab.press("s"), tmp_path)
    assert any(RUN in item["text"] for item in read_items(tab))
    urls = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    page = (run / "audit.html").as_uri()
    assert [url for url in urls if not url.startswith(("data:", "blob:"))] == [page]
    assert not [e for e in tab.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert tab.evaluate("document.title") == "Audit of <i>run · recap"
    assert tab.evaluate("document.querySelectorAll('main script, main b, header i').length") == 0


@WIDTHS
def test_the_picture_and_the_current_sentence_are_whole_after_every_key(tab: BrowserTab, width: int) -> None:
    is_whole = """(() => {
        const root = document.documentElement, bar = document.querySelector("footer").getBoundingClientRect();
        const isCut = (one) => one.scrollWidth > one.clientWidth + 1;
        const isOut = (one) => one.getBoundingClientRect().right > root.clientWidth + 0.5;
        if (isCut(root) || [...document.querySelectorAll("body *")].some(one => isOut(one) || isCut(one))) return false;
        const picture = document.getElementById("picture").getBoundingClientRect();
        const line = document.querySelector("li.current").getBoundingClientRect();
        const above = Math.max(0, line.left < picture.right ? picture.bottom : 0);
        return picture.top >= 0 && picture.bottom <= bar.top && line.top >= above && line.bottom <= bar.top;
    })()"""
    label_captions(tab, check=is_whole)
    for key in ("ArrowUp", "ArrowUp", "ArrowUp"):
        tab.press(key)
        assert tab.evaluate(is_whole), key
