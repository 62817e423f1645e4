"""Recipes with steps: what each step asks about, what goes on to later ones, and the one row that comes out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding.images import Region
from pipeline.engines import Inspection, Reply, Request, TokenChoice, echo
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass
from pipeline.records import Caption, CaptionStep, ChainedCaption, Finding, Found, Image, SharedChainedCaption, Verdict
from pipeline.storage import tables
from pipeline.storage.layout import table_path
from stages import caption
from stages.recipes import _items
from stages.training.prompts import load_recipe
from tests.stages.test_caption import make_image, parse_run, write_shard
from tests.support.runs import ROOT, begin, corpus, make, recap, sections
from tests.support.scoring import PROVENANCE
from tests.support.window import Window

CHAIN = """
system = "You describe pictures."

[[steps]]
name = "whole"
prompt = "Describe the picture. The title is {title}."

[[steps]]
name = "parts"
prompt = "Describe the part at the {item}."
each = "2x1"
show = "crop"

[[steps]]
name = "true"
prompt = "Is it true?\\n{item}"
each = "parts.sentences"
show = "both"
answers = ["no", "yes"]
keep = ["yes"]
system = "You compare."
sampling = { temperature = 0.0, max_tokens = 20 }

[[steps]]
name = "merged"
prompt = "Merge.\\n{whole}\\n{true}"
show = "none"

[sampling]
temperature = 0.5
max_tokens = 99
"""
TWO_STEPS = """
[[steps]]
name = "first"
prompt = "Describe the picture."

[[steps]]
name = "second"
prompt = "Correct it: {first}"
"""


def write_recipe(folder: Path, toml: str = CHAIN) -> None:
    (folder / "recipes").mkdir(exist_ok=True, parents=True)
    (folder / "recipes" / "mine.toml").write_text(toml)


def build_pass(folder: Path, section: dict[str, Any] | None = None, **parts: Any) -> Pass:
    captions = {"mine": {"recipe": "mine", "engine": "model"} | (section or {})}
    (p,) = caption.passes(parse_run(folder, caption=captions, **parts))
    return p


def answer(request: Request) -> Reply:
    """Describes parts in two sentences each, one of which both share, and believes those with a B."""
    step, number = request.id.split("/")[2:]
    text = {
        "whole": "A whole.",
        "parts": f"Part {'AB'[int(number) % 2]} is there. Both B show it.",
        "merged": "All of it.",
    }.get(step)
    if step == "true":
        item = request.prompt.splitlines()[-1]
        text = json.dumps({"reason": "seen", "verdict": "yes" if "B" in item else "no"})
    return Reply(text=text or "", finish_reason="stop", attempt=1, num_prompt_tokens=2, num_output_tokens=3)


def run_pass(p: Pass, folder: Path, engine: Window, images: list[Image], **parts: Any) -> list[ChainedCaption]:
    with write_shard(folder, images, **parts) as shard:
        return list(p.work(p.inputs(shard), {"model": engine, "judge": engine}))


GIVEN = {"given": {"title": "metadata->>'$.title'"}}


def test_each_step_asks_with_its_own_words_and_pictures(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    engine = Window(4, answer)
    image = make_image(0, metadata=json.dumps({"title": "Two parts"}), width=400, height=200)
    (row,) = run_pass(build_pass(tmp_path, GIVEN), tmp_path, engine, [image])
    prompts = [request.prompt for request in engine.seen]
    assert prompts == [
        "Describe the picture. The title is ```\nTwo parts\n```.",
        "Describe the part at the left.",
        "Describe the part at the right.",
        "Is it true?\nPart B is there.",
        "Is it true?\nBoth B show it.",
        "Is it true?\nPart A is there.",
        "Merge.\n```\nA whole.\n```\n1.\n```\nPart B is there.\n```\n\n2.\n```\nBoth B show it.\n```",
    ]
    data = b"00000000"
    left, right = (Region(data=data, box=(x, 0.0, x + 0.6, 1.0)) for x in (0.0, 0.4))
    images = [request.images for request in engine.seen]
    assert images == [(data,), (left,), (right,), (data, left), (data, left), (data, right), ()]
    assert [request.system for request in engine.seen][2:5] == [
        "You describe pictures.",
        "You compare.",
        "You compare.",
    ]
    temperatures = [request.ladder[0].temperature for request in engine.seen]
    assert temperatures == [0.5, 0.5, 0.5, 0, 0, 0, 0.5] and engine.seen[3].ladder[0].max_tokens == 20
    assert json.loads(engine.seen[3].schema or "")["properties"]["verdict"]["enum"] == ["no", "yes"]
    assert (row.text, row.status, row.fields, row.attempt) == ("All of it.", "ok", None, 1)
    assert (row.num_prompt_tokens, row.num_output_tokens, row.seed) == (14, 21, 0)
    assert row.steps[3] == CaptionStep(
        name="true",
        item="Part B is there.",
        text="yes",
        status="ok",
        attempt=1,
        num_prompt_tokens=2,
        num_output_tokens=3,
    )
    assert [(step.name, step.item) for step in row.steps][:3] == [
        ("whole", None),
        ("parts", "left"),
        ("parts", "right"),
    ]


def test_the_text_may_be_that_of_several_steps(tmp_path: Path) -> None:
    last = CHAIN.index('[[steps]]\nname = "merged"')
    write_recipe(tmp_path, 'text = "{whole} {true}"\n' + CHAIN[:last])
    (row,) = run_pass(build_pass(tmp_path, GIVEN), tmp_path, Window(4, answer), [make_image(0)])
    assert row.text == "A whole. Part B is there. Both B show it."


def test_a_failed_step_is_the_rows_status_and_the_images_beside_it_have_theirs(tmp_path: Path) -> None:
    def fail(request: Request) -> Reply:
        if request.id.startswith("000000000001/") and "/parts/2" in request.id:
            return Reply(text="cut off in the", finish_reason="length", attempt=1)
        return answer(request)

    write_recipe(tmp_path)
    images = [make_image(n) for n in range(3)]
    rows = run_pass(build_pass(tmp_path, GIVEN), tmp_path, Window(4, fail), images)
    assert [row.status for row in rows] == ["ok", "truncated", "ok"]
    assert str(rows[1].error).startswith("step parts: the answer was cut")
    assert (rows[1].text, len(rows[1].steps), rows[1].steps[-1].status) == ("cut off in the", 3, "truncated")


def test_a_step_that_keeps_nothing_leaves_nothing_to_later_ones(tmp_path: Path) -> None:
    engine = Window(4, lambda request: answer(replace_item(request)))
    write_recipe(tmp_path)
    (row,) = run_pass(build_pass(tmp_path, GIVEN), tmp_path, engine, [make_image(0)])
    assert "(none)" in engine.seen[-1].prompt and row.status == "ok"
    end = CHAIN.index('[[steps]]\nname = "merged"')
    write_recipe(tmp_path, CHAIN[:end])
    (row,) = run_pass(build_pass(tmp_path, GIVEN), tmp_path, engine, [make_image(0)])
    assert (row.status, row.text, row.error) == ("empty", "", "the chain gives no text")


def test_what_is_kept_may_be_bounded_by_its_probability(tmp_path: Path) -> None:
    def write(request: Request) -> Reply:
        reply = answer(request)
        if not request.top_tokens:
            return reply
        chance = 0.6 if "Part" in request.prompt else 0.9
        texts = ['{"reason":"seen","verdict":"', "yes", '"}']
        logprobs = [{texts[0]: 0.0}, {"yes": math.log(chance), "no": math.log(1 - chance)}, {texts[2]: 0.0}]
        tokens = tuple(TokenChoice(text=text, logprobs=one) for text, one in zip(texts, logprobs, strict=True))
        return replace(reply, text="".join(texts), tokens=tokens)

    last = CHAIN.index('[[steps]]\nname = "merged"')
    write_recipe(tmp_path, CHAIN[:last].replace('keep = ["yes"]', 'keep = ["yes"]\nmin_probability = 0.8'))
    engine = Window(4, write)
    (row,) = run_pass(build_pass(tmp_path, GIVEN), tmp_path, engine, [make_image(0)])
    assert {bool(request.top_tokens) for request in engine.seen if request.schema} == {True}
    assert row.text == "Both B show it." and [step.text for step in row.steps[3:]] == ["yes", "yes", "yes"]


def replace_item(request: Request) -> Request:
    return replace(request, prompt=request.prompt.replace("B", "C"))


def test_required_texts_are_asked_for_first(tmp_path: Path) -> None:
    write_recipe(tmp_path, 'required = ["alt_text"]' + TWO_STEPS.replace("picture.", "picture: {alt_text}"))
    images = [make_image(0), make_image(1, alt_text="a cat")]
    rows = run_pass(build_pass(tmp_path), tmp_path, Window(2), images)
    assert [(row.status, len(row.steps)) for row in rows] == [("empty", 0), ("ok", 2)]
    assert rows[0].error == "a required field has no text: alt_text"


@settings(max_examples=15)
@given(st.integers(0, 6), st.integers(1, 3), st.integers(1, 9), st.floats(0, 0.1), st.floats(0, 0.1))
def test_every_candidate_has_one_row_whatever_fails_and_whatever_is_in_flight(
    tmp_path_factory: pytest.TempPathFactory, num: int, num_candidates: int, size: int, errors: float, cut: float
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write_recipe(folder)
    p = build_pass(folder, {**GIVEN, "num_candidates": num_candidates})
    failing = echo.open(echo.Config(error_share=errors, truncated_share=cut, empty_share=0.05))
    images = [make_image(n, metadata=json.dumps({"title": str(n)})) for n in range(num)]
    with write_shard(folder, images) as shard:
        rows = list(p.work(p.inputs(shard), {"model": failing}))
        window = Window(size, lambda request: next(failing.generate([request])))
        others = [replace(row, model="echo") for row in p.work(p.inputs(shard), {"model": window})]
    assert others == rows
    assert [row.id for row in rows] == [(one.key, n) for one in images for n in range(num_candidates)]
    assert all((row.status == "ok") == (row.error is None) and row.steps for row in rows)


def write_findings(folder: Path, findings: list[Finding]) -> None:
    tables.write_rows(table_path(folder, "finding/things", 0), Finding, findings, PROVENANCE)


THINGS = """
[[steps]]
name = "things"
prompt = "Describe the {item}."
each = "found.things"
show = "crop"
"""


def test_the_boxes_of_a_finder_are_asked_about(tmp_path: Path) -> None:
    write_recipe(tmp_path, THINGS)
    finders = {"find": {"things": {"kind": "quality"}}}
    p, engine = build_pass(tmp_path, **finders), Window(4)
    assert p.reads == ("image", "finding/things")
    images = [make_image(n, width=1000, height=1000) for n in range(2)]
    found = (
        Found(label="cat", text="Tom", x0=0.5, y0=0.5, x1=0.7, y1=0.7),
        Found(label="blurred", confidence=0.9),
        Found(label="line", x0=0.1, y0=0.98, x1=0.9, y1=0.99),
    )
    with write_shard(tmp_path, images, **finders) as shard:
        write_findings(
            tmp_path,
            [
                Finding(key=images[0].key, name="things", status="ok", error=None, found=found),
                Finding(key=images[1].key, name="things", status="error", error="no answer", found=()),
            ],
        )
        rows = list(p.work(p.inputs(shard), {"model": engine}))
    assert [request.prompt for request in engine.seen] == ["Describe the cat: Tom.", "Describe the line."]
    boxes = [image.box for request in engine.seen for image in request.images if isinstance(image, Region)]
    assert boxes == [(0.48, 0.48, 0.72, 0.72), (0.02, 0.961, 0.98, 1.0)]
    assert (rows[0].status, rows[1].status) == ("ok", "error")
    assert rows[1].error == "step things: the finder things failed: no answer"


def test_tiles_cover_the_picture_and_overlap() -> None:
    for columns, rows in ((1, 1), (2, 2), (3, 1), (1, 4), (8, 8)):
        tiles = list(_items.list_tiles(columns, rows))
        assert len({tile.text for tile in tiles}) == len({tile.box for tile in tiles}) == columns * rows
        boxes = [tile.box for tile in tiles if tile.box]
        assert min(box[0] for box in boxes) == min(box[1] for box in boxes) == 0
        assert max(box[2] for box in boxes) == max(box[3] for box in boxes) == 1
        across = sorted({(box[0], box[2]) for box in boxes})
        assert all(left[1] > right[0] for left, right in pairwise(across))
    assert [tile.text for tile in _items.list_tiles(2, 2)] == ["top left", "top right", "bottom left", "bottom right"]
    assert [tile.text for tile in _items.list_tiles(3, 3)][3:6] == ["left", "centre", "right"]


def test_a_list_of_an_answer_is_gone_through(tmp_path: Path) -> None:
    schema = """
[steps.schema]
type = "object"
required = ["names"]
[steps.schema.properties]
names = { type = "array", items = { type = "string" } }
"""
    listed = '\n[[steps]]\nname = "listed"\nprompt = "List."\n' + schema
    detailed = '\n[[steps]]\nname = "detailed"\nprompt = "What is {item}?"\neach = "listed.names"\nmax_items = 2\n'
    write_recipe(tmp_path, listed + detailed)
    names = json.dumps({"names": ["a cat", "a dog", "a cat", "a bird"]})
    engine = Window(
        4, lambda r: Reply(text=names if r.schema else f"{r.prompt} That.", finish_reason="stop", attempt=1)
    )
    (row,) = run_pass(build_pass(tmp_path), tmp_path, engine, [make_image(0)])
    assert [request.prompt for request in engine.seen] == ["List.", "What is a cat?", "What is a dog?"]
    assert (
        row.text == "What is a cat? That. What is a dog? That." and row.steps[0].text == "a cat, a dog, a cat, a bird"
    )
    write_recipe(tmp_path, listed)
    (row,) = run_pass(build_pass(tmp_path), tmp_path, engine, [make_image(0)])
    assert (row.text, row.fields) == ("a cat, a dog, a cat, a bird", names)


CHANGES = [
    ('each = "2x1"', 'each = "9x9"', r"steps\[1\].each: '9x9' are more than 64 tiles"),
    (
        'each = "parts.sentences"',
        'each = "part.sentences"',
        r"steps\[2\].each: 'part.sentences' .*mean 'parts'",
    ),
    ('each = "parts.sentences"', 'each = "parts"', r"steps\[2\].each: 'parts' is none of \"2x2\" tiles"),
    ('each = "parts.sentences"', 'each = "parts.things"', r"steps\[2\].each: the step parts has no list 'things'"),
    ('each = "parts.sentences"', 'each = "merged.sentences"', r"steps\[2\].each: 'merged.sentences' is none of"),
    ('each = "parts.sentences"', 'each = "whole.sentences"', r"steps\[2\].show: 'both' needs a part of the image"),
    ('each = "2x1"\n', "", r"steps\[1\]: prompt has \{item\}, which needs `each`"),
    ('show = "crop"', 'show = "part"', r"steps\[1\].show: 'part' is not one of"),
    ('name = "parts"', 'name = "whole"', r"steps\[1\].name: 'whole' is the name of an earlier step"),
    ('name = "parts"', 'name = "Part 2"', r"steps\[1\]: name is 'Part 2'; it may have small letters"),
    ("Describe the picture. The", "{merged} The", r"steps\[0\].prompt: \{merged\} is a later step"),
    ("Describe the picture. The", "{whole} The", r"steps\[0\].prompt: \{whole\} is the step itself"),
    ('keep = ["yes"]', 'keep = ["maybe"]', r"steps\[2\]: keep: 'maybe' is none of no, yes"),
    ('keep = ["yes"]', "min_probability = 0.5", r"steps\[2\]: min_probability: needs `keep`"),
    ('answers = ["no", "yes"]', 'answers = ["yes"]', r"steps\[2\]: answers are \['yes'\]; at least two"),
    ("max_tokens = 20", "max_token = 20", r"steps\[2\].sampling.max_token: unknown key; did you mean 'max_tokens'"),
    ("max_tokens = 20", "top_p = 0.0", r"steps\[2\].sampling: top_p = 0 leaves no token"),
    ('show = "none"', 'shows = "none"', r"steps\[3\].shows: unknown key; did you mean 'show'"),
    (
        'show = "none"',
        'engine = "absent"',
        r"steps\[3\].engine: 'absent' is none of judge, model; .*needs",
    ),
    ('each = "2x1"', 'each = "found.thing"', r"steps\[1\].each: 'thing' is none of things; .*needs \[find.thing\]"),
    ("{true}", "{checked}", r"given.checked: is missing: .*which is none of its steps \(whole, parts, true, merged\)"),
    (
        'system = "You describe pictures."',
        'text = "{whol}"',
        r"text: \{whol\} is not a field; the fields are",
    ),
    ('system = "You describe pictures."', 'prompt = "Describe."', "prompt: unknown key"),
    ('system = "You describe pictures."', 'required = ["place"]', r"required: no step's prompt has \{place\}"),
    ('system = "You describe pictures."', 'program = "mine.ask"', r"program: is in place of \[\[steps\]\]"),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_a_wrong_step_is_an_error_that_names_it(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert CHAIN.count(old) == 1
    write_recipe(tmp_path, CHAIN.replace(old, new))
    engines = {"model": {"kind": "echo"}, "judge": {"kind": "echo"}}
    with pytest.raises(ConfigError, match=message):
        build_pass(tmp_path, GIVEN, engines=engines, find={"things": {"kind": "quality"}})


def test_sentences_of_verdicts_are_an_error(tmp_path: Path) -> None:
    more = '\n[[steps]]\nname = "again"\nprompt = "{item}"\neach = "true.sentences"\n'
    at = CHAIN.index('[[steps]]\nname = "merged"')
    write_recipe(tmp_path, CHAIN[:at].replace('keep = ["yes"]\n', "") + more)
    with pytest.raises(ConfigError, match="the step true has no sentences: its answers are no, yes"):
        build_pass(tmp_path, GIVEN)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"num_candidates": 2, "temperature": 0}, "num_candidates: 2 candidates would be equal"),
        ({"engines": {"frist": "judge"}}, "engines.frist: 'frist' is none of first, second; did you mean 'first'"),
        (
            {"engines": {"first": "absent"}},
            r"mine.engines.first: 'absent' is none of .*needs \[engines.absent\]",
        ),
    ],
)
def test_a_wrong_section_is_an_error(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    write_recipe(tmp_path, TWO_STEPS)
    with pytest.raises(ConfigError, match=message):
        build_pass(tmp_path, section)


def test_steps_of_a_recipe_with_one_prompt_are_an_error(tmp_path: Path) -> None:
    write_recipe(tmp_path, 'prompt = "Describe."')
    with pytest.raises(ConfigError, match=r"engines\.first: 'first' is none of"):
        build_pass(tmp_path, {"engines": {"first": "model"}})


def test_steps_are_asked_of_the_engines_that_they_name(tmp_path: Path) -> None:
    engines = {
        "model": {"kind": "echo"},
        "judge": {"kind": "echo", "text": "J"},
        "other": {"kind": "echo", "text": "O"},
    }
    write_recipe(tmp_path, TWO_STEPS + 'show = "none"\nengine = "judge"\n')
    own, other = (build_pass(tmp_path, s, engines=engines) for s in (None, {"engines": {"second": "other"}}))
    assert (own.engines, own.blind_engines, own.shows_images) == (("model", "judge"), ("judge",), True)
    assert other.engines == ("model", "other") and own.slice != other.slice
    main, judge = Window(2), Window(2)
    with write_shard(tmp_path, [make_image(n) for n in range(5)]) as shard:
        rows = list(own.work(own.inputs(shard), {"model": main, "judge": judge}))
    assert [len(engine.seen) for engine in (main, judge)] == [5, 5] and {row.status for row in rows} == {"ok"}


def test_two_pictures_need_an_engine_that_takes_two(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    engines = {"model": {"kind": "vllm", "model": "m"}}
    with pytest.raises(ConfigError, match=r"engines.model.images_per_prompt: is 1, .*set images_per_prompt = 2"):
        build_pass(tmp_path, GIVEN, engines=engines)
    engines["model"] |= {"images_per_prompt": 2}  # type: ignore[dict-item]
    assert build_pass(tmp_path, GIVEN, engines=engines).engines == ("model",)


def test_a_model_in_training_learns_one_prompt(tmp_path: Path) -> None:
    write_recipe(tmp_path, TWO_STEPS)
    train = {"method": "sft", "model": "m", "captions": ["mine"], "output": "out"}
    captions = {"mine": {"recipe": "mine", "engine": "model"}}
    run = parse_run(tmp_path, caption=captions, train=train)
    with pytest.raises(ConfigError, match=r"recipes/mine.toml: steps: asks several questions; name a recipe with one"):
        load_recipe(run, run.sections["train"][""], "mine")


def start(folder: Path, toml: str = CHAIN, num: int = 15, **changes: Any) -> Path:
    photos = corpus(folder / "photos", ["jpg", "png", "cut"] * (num // 3))
    write_recipe(folder / "run", toml)
    texts = GIVEN if "{title}" in toml else {}
    section = {"recipe": "mine", "engine": "captioner", "num_candidates": 2, "temperature": 0.5, **texts}
    parts = {name: part for name, part in sections(photos, **changes).items() if name != "caption.dense"}
    return begin(folder / "run", {**parts, "caption.mine": section})


def read(run: Path, folder: str = "caption/mine", record: Any = ChainedCaption) -> list[Any]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in tables.read_rows(path, record)]


def test_a_run_has_one_row_per_candidate_and_other_readers_need_no_steps(tmp_path: Path) -> None:
    run = start(tmp_path)
    assert make(run).exit_code == 0
    rows = read(run)
    usable = [row.key for row in read(run, "image", Image) if row.status == "ok"]
    assert [row.id for row in rows] == [(key, n) for key in usable for n in (0, 1)]
    assert all(row.steps[0].name == "whole" and row.steps[-1].name == "merged" for row in rows)
    assert len({row.text for row in rows}) == len(rows)
    assert [row.id for row in read(run, record=Caption)] == [row.id for row in rows]
    assert len(read(run, "verdict", Verdict)) == len(rows)
    found = recap("sql", "SELECT step.name, count(*) AS n FROM (SELECT unnest(steps) AS step FROM caption) GROUP BY 1",
                  "--format", "json", "--run", run).stdout  # fmt: skip
    assert {row["name"] for row in json.loads(found)} == {"whole", "parts", "true", "merged"}
    shown = recap("try", "caption:mine", "--images", 1, "--run", run).stdout
    assert "parts (left):" in shown and "mine 1:" in shown


def test_copies_share_the_rows_of_chains(tmp_path: Path) -> None:
    run = start(tmp_path, curate={"share": True})
    (copy,) = [tmp_path / "photos" / "99999.jpg"]
    copy.write_bytes((tmp_path / "photos" / "00000.jpg").read_bytes())
    recap("plan", "--run", run)
    assert make(run).exit_code == 0
    rows = read(run, record=SharedChainedCaption)
    shared = [row for row in rows if row.shared_from]
    assert len(shared) == 2 and shared[0].steps == next(row for row in rows if row.key == shared[0].shared_from).steps


KILLED = """
import os, signal, threading
from pipeline import cli
from pipeline.engines import echo
from pipeline.storage import parts

flush, count, saved = parts.Parts.flush, echo.Echo._count_attempt, threading.Event()

def flush_and_tell(self):
    flush(self)
    saved.set()

def count_and_die(self):
    count(self)
    if self._num_attempts > 113 and saved.wait(60):
        os.kill(os.getpid(), signal.SIGKILL)

parts.MAX_ROWS, parts.Parts.flush, echo.Echo._count_attempt = 2, flush_and_tell, count_and_die
cli.main()
"""


def test_a_kill_between_steps_ends_in_the_same_rows(tmp_path: Path) -> None:
    whole, killed = start(tmp_path / "a"), start(tmp_path / "b")
    for run in (whole, killed):
        make(run, "ingest")
    make(whole, "caption")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, "run", "caption", "--run", str(killed)]
    done = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    parts = list((killed / ".work" / "caption").rglob("*.parquet"))
    assert 0 < sum(len(list(tables.read_rows(part, ChainedCaption))) for part in parts) < len(read(whole))
    make(killed, "caption")
    assert read(killed) == read(whole)


def test_failed_chains_are_asked_again_with_other_seeds(tmp_path: Path) -> None:
    run = start(tmp_path, engines__captioner={"error_share": 0.02})
    make(run, "ingest")
    assert make(run, "caption").exit_code == 0
    before = {row.id: row for row in read(run)}
    failed = {row.id for row in before.values() if row.status == "error"}
    assert 0 < len(failed) < len(before)
    assert all(str(before[one].error).startswith("step ") for one in failed)
    assert make(run, "caption", retry=frozenset({"error"})).exit_code == 0
    after = {row.id: row for row in read(run)}
    assert after.keys() == before.keys()
    assert all(after[one] == before[one] for one in after.keys() - failed)
    assert sum(after[one].status == "ok" for one in failed) > 0


def test_an_edited_step_makes_the_table_stale(tmp_path: Path) -> None:
    run = start(tmp_path)
    make(run, "ingest")
    make(run, "caption")
    write_recipe(run, CHAIN.replace("Merge.", "Merge them."))
    done = recap("run", "caption", "--run", run, check=False)
    assert done.returncode == 2 and "recipe.steps" in done.stderr and "them" in done.stderr


@pytest.mark.parametrize("show", ["none", "whole"])
def test_check_accepts_a_text_model_for_steps_that_show_it_nothing(
    tmp_path: Path, show: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspect(loaded: echo.Config) -> Inspection:
        return Inspection(summary="a model", takes_images=loaded.text is None)

    monkeypatch.setattr(echo, "inspect", inspect, raising=False)
    run = start(
        tmp_path,
        TWO_STEPS + f'show = "{show}"\nengine = "writer"\n',
        engines__writer={"kind": "echo", "text": "A cat."},
    )
    found = recap("check", "--run", run, check=False)
    assert (found.returncode == 0) == (show == "none")
    assert ("takes no images, and caption:mine shows it some" in found.stdout + found.stderr) == (show == "whole")
