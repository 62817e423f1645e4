"""The examples of a recipe: pictures with texts, shown as earlier questions and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.records import Caption
from stages.caption import passes
from tests.stages.test_caption import build_pass, make_image, parse_run, write_shard
from tests.stages.test_given import Recorder, read, write_recipe
from tests.support import tiny
from tests.support.runs import begin, corpus, make, recap, sections

RECIPE = 'prompt = "What is this? {alt_text}"\nprompt_without_alt_text = "What is this?"\nexamples = "shots"\n'
SECTION = {"recipe": "mine"}


def write_examples(folder: Path, *texts: str) -> list[bytes]:
    (folder / "shots").mkdir(parents=True, exist_ok=True)
    pictures = [tiny.make_picture(number) for number, _ in enumerate(texts)]
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        (folder / "shots" / f"{number}.jpg").write_bytes(picture)
        (folder / "shots" / f"{number}.txt").write_text(text)
    return pictures


def test_each_request_shows_the_examples_before_the_image(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE)
    pictures = write_examples(tmp_path, "A cat.\n", "A dog.")
    engine = Recorder()
    with write_shard(tmp_path, [make_image(0, alt_text="a cow"), make_image(1)]) as shard:
        p = build_pass(tmp_path, SECTION)
        rows = list(p.work(p.inputs(shard), {"model": engine}))
    assert [row.status for row in rows] == ["ok", "ok"]
    for request, own in zip(engine.requests, (b"00000000", b"00000001"), strict=True):
        assert request.images == (*pictures, own)
        assert request.examples == (("What is this?", "A cat."), ("What is this?", "A dog."))
    assert [request.prompt[:13] for request in engine.requests] == ["What is this?"] * 2
    assert "a cow" in engine.requests[0].prompt


def test_the_stamp_has_them_where_there_are_some(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE)
    write_examples(tmp_path, "A cat.", "A dog.")
    stamped = build_pass(tmp_path, SECTION).slice["recipe"]["examples"]
    assert [text for _, text in stamped] == ["A cat.", "A dog."] and len(stamped[0][0]) == 64
    (tmp_path / "shots" / "1.txt").write_text("A hound.")
    assert build_pass(tmp_path, SECTION).slice["recipe"]["examples"][1][1] == "A hound."
    assert "examples" not in build_pass(tmp_path).slice["recipe"]


SCHEMA = 'text = "{a}"\n[schema]\ntype = "object"\nrequired = ["a"]\n[schema.properties.a]\ntype = "string"\n'


@pytest.mark.parametrize(
    ("recipe", "files", "message"),
    [
        (RECIPE, {}, r"recipes/mine.toml: examples: '.*shots' is no folder; it must have pictures, each with its text"),
        (RECIPE, {"a.txt": b"x"}, r"examples: '.*shots' has no picture"),
        (RECIPE, {"a.jpg": tiny.make_picture(0)}, r"examples: .*a.jpg or its text cannot be read: .*a.txt"),
        (RECIPE, {"a.jpg": tiny.make_picture(0), "a.txt": b" "}, r"examples: .*a.txt is empty; write what the answer"),
        (RECIPE, {"a.jpg": tiny.make_picture(0), "a.txt": b"\xff"}, r"a.jpg or its text cannot be read: .*utf-8"),
        (RECIPE, {"a.png": b"\x89PNG", "a.txt": b"x"}, r"examples: .*a.png: "),
        (RECIPE, {f"{n}.jpg": b"" for n in range(17)}, r"examples: '.*shots' has 17 pictures; at most 16"),
        (f"image = false\n{RECIPE}", {}, r"examples are pictures with texts, and image = false shows none"),
        (
            f"{RECIPE}{SCHEMA}",
            {"a.jpg": tiny.make_picture(0), "a.txt": b'{"b": 1}'},
            r"examples: '{\"b\": 1}' is no answer of this recipe's schema: .*",
        ),
    ],
)
def test_errors_name_the_file(tmp_path: Path, recipe: str, files: dict[str, bytes], message: str) -> None:
    write_recipe(tmp_path, recipe)
    for name, data in files.items():
        (tmp_path / "shots").mkdir(exist_ok=True)
        (tmp_path / "shots" / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        build_pass(tmp_path, SECTION)


def test_an_engine_that_takes_too_few_images_is_named(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE)
    write_examples(tmp_path, "A cat.", "A dog.")
    engine: dict[str, Any] = {"kind": "vllm", "model": "m"}
    run = parse_run(tmp_path, caption={"dense": {"engine": "model", **SECTION}}, engines={"model": engine})
    with pytest.raises(ConfigError, match=r"engines.model.images_per_prompt: is 1, .* shows 3 images .* = 3"):
        list(passes(run))


@pytest.mark.slow
def test_a_run_with_examples(tmp_path: Path) -> None:
    photos = corpus(tmp_path / "photos", ["jpg", "png"])
    (tmp_path / "run").mkdir()
    write_recipe(tmp_path / "run", RECIPE)
    write_examples(tmp_path / "run", "A cat.")
    mine = {"recipe": "mine", "engine": "captioner"}
    train = {"captions": ["mine"], "model": "m", "output": "x"}
    run = begin(tmp_path / "run", sections(photos, caption__mine=mine, train=train))
    assert make(run, "ingest").exit_code == 0 and make(run, "caption:mine").exit_code == 0
    assert [row.status for row in read(run, "caption/mine", Caption)] == ["ok", "ok"]
    (run / "shots" / "0.txt").write_text("A lynx.")
    refused = recap("run", "caption:mine", "--run", run, check=False)
    assert "caption:mine: recipe.examples" in refused.stderr
    loaded = config.load(run)
    settings = loaded.sections["train"][""]
    with pytest.raises(ConfigError, match=r"train.recipe: the recipe of mine shows examples, which a model"):
        settings.options.module.open(loaded, settings)
