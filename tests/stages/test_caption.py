"""What is asked about an image, what an answer is accepted for, and that every candidate leaves a row."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.engines import echo
from pipeline.errors import BrokenTableError, ConfigError
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Caption, Image, Piece, Score, make_key
from pipeline.storage import plan, tables
from pipeline.storage.layout import table_path
from stages import caption, recipes, rubrics
from stages.text.prompts import derive_seed, fence_text, fill_template, sanitise_text, truncate_text
from tests.support.scoring import PROVENANCE


def image(index: int, **changes: Any) -> Image:
    about: dict[str, Any] = {
        "key": make_key(0, index),
        "shard": 0,
        "index": index,
        "status": "ok",
        "error": None,
        "source": "test",
        "source_key": f"test/{index}",
        "file": "shards/00000.tar",
        "offset": 8 * index,
        "num_bytes": 8,
        "format": "jpeg",
        "width": 100 + index,
        "height": 100,
        "orientation": 1,
        "num_frames": 1,
        "sha256": hashlib.sha256(f"{index:08d}".encode()).hexdigest(),
        "alt_text": None,
        "metadata": "{}",
    }
    return Image(**about | changes)


def run_of(folder: Path, **sections: Any) -> config.Run:
    values = {"source": {"kind": "scenes"}, "engines": {"model": {"kind": "echo"}}} | sections
    return config.parse(values, file=folder / "run.toml")


def pass_of(folder: Path, section: dict[str, Any] | None = None, **sections: Any) -> Pass:
    captions = {"dense": {"engine": "model"} | (section or {})}
    (found,) = (p for p in caption.passes(run_of(folder, caption=captions, **sections)) if p.name == "dense")
    return found


@contextmanager
def shard_of(folder: Path, images: list[Image], **sections: Any) -> Iterator[Shard]:
    """A run with one shard, whose image n is the eight bytes of its number."""
    plan.write_plan(folder / "plan.parquet", [Piece(file="f", start=0, stop=len(images) or 1)], shard_size=10_000)
    tables.write_rows(table_path(folder, "image", 0), Image, images, PROVENANCE)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "00000.tar").write_bytes(b"".join(f"{i:08d}".encode() for i in range(len(images))))
    frozen, _ = plan.Plan.load(folder / "plan.parquet")
    shard = Shard(run=run_of(folder, **sections), number=0, pieces=frozen.pieces(0))
    yield shard
    shard.close()


def rows_of(p: Pass, shard: Shard, **shares: Any) -> list[Caption]:
    return list(p.work(p.inputs(shard), {"model": echo.open(echo.Config(**shares))}))


statuses = st.sampled_from(["ok", "ok", "ok", "empty", "unreadable", "unsupported", "too_small", "too_large"])


@settings(max_examples=15)
@given(st.lists(statuses, max_size=12), st.integers(1, 4), st.floats(0, 0.2), st.floats(0, 0.2))
def test_every_usable_image_leaves_num_candidates_rows(
    tmp_path_factory: pytest.TempPathFactory, found: list[Any], num_candidates: int, errors: float, empty: float
) -> None:
    folder = tmp_path_factory.mktemp("run")
    images = [image(i, status=status) for i, status in enumerate(found)]
    with shard_of(folder, images) as shard:
        p = pass_of(folder, {"num_candidates": num_candidates, "ladder": []})
        rows = rows_of(p, shard, error_share=errors, empty_share=empty, truncated_share=0.2, repeated_share=0.2)
    usable = [one.key for one in images if one.status == "ok"]
    assert [row.id for row in rows] == [(key, n) for key in usable for n in range(num_candidates)]
    assert all((row.status == "ok") == (row.error is None) for row in rows)


def test_a_row_says_how_it_came(tmp_path: Path) -> None:
    with shard_of(tmp_path, [image(0)]) as shard:
        (row,) = rows_of(pass_of(tmp_path), shard)
    assert (row.status, row.attempt, row.model, row.engine, row.finish_reason) == ("ok", 1, "echo", "model", "stop")
    assert json.loads(row.sampling) == {
        "temperature": 0.5,
        "top_p": 0.95,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_tokens": 512,
    }
    assert row.num_output_tokens == len(row.text.split()) and len(row.prompt_hash) == 16 and row.flags == ()


def score(index: int, candidate: int, value: float | None, **changes: Any) -> Score:
    about: dict[str, Any] = {"caption": "short", "name": "judge", "criteria": (), "error": None}
    status = "unknown" if value is None else "ok"
    return Score(
        **about | {"key": make_key(0, index), "candidate": candidate, "value": value, "status": status} | changes
    )


def keys_where(folder: Path, where: str, *, of: str | None = None) -> list[int]:
    section = {"where": where} | ({} if of is None else {"of": of})
    captions = {"dense": {"engine": "model"} | section, "short": {"engine": "model"}}
    judge = {"judge": {"kind": "text"}} if of else {}
    parts = {"caption": captions, "score": judge}
    (p,) = (p for p in caption.passes(run_of(folder, **parts)) if p.name == "dense")
    images = [image(i, status="empty" if i == 4 else "ok", alt_text="a cat" if i == 5 else None) for i in range(6)]
    with shard_of(folder, images, **parts) as shard:
        return [int(wanted.image.key) for wanted in p.inputs(shard)]


def test_where_chooses_by_image_columns(tmp_path: Path) -> None:
    assert keys_where(tmp_path, "width > 101 AND alt_text IS NULL") == [2, 3]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"engine": "modell"}, "caption.dense.engine: 'modell' is none of model; did you mean 'model'"),
        ({"recipe": "dens"}, "caption.dense.recipe: 'dens' is none of .*did you mean 'dense'"),
        ({"where": "width >"}, "caption.dense.where: .*syntax"),
        ({"where": "widht > 3"}, "caption.dense.where: .*uses widht"),
        ({"where": "width LIKE 3 + '{}'::BLOB"}, "caption.dense.where"),
        ({"where": "finish_reason = 'stop'"}, "caption.dense.where: .*finish_reason"),
        ({"of": "dens"}, "caption.dense.of"),
        ({"num_candidates": 0}, "caption.dense.num_candidates: 0 is too small; the least is 1"),
        ({"num_candidates": 2, "temperature": 0}, "caption.dense.num_candidates: 2 candidates would be equal"),
        ({"top_p": 0}, "caption.dense: top_p"),
    ],
)
def test_what_is_wrong_in_a_section_is_named(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pass_of(tmp_path, section)


def test_where_chooses_by_the_best_candidate_of_another_pass(tmp_path: Path) -> None:
    scores = [
        score(0, 0, 0.2),
        score(0, 1, 0.9),
        score(1, 0, 0.2),
        score(1, 1, None),
        score(2, 0, None),
        score(3, 0, 0.4, name="text"),
        score(5, 0, 0.3),
    ]
    for name in ("judge", "text"):
        rows = [row for row in scores if row.name == name]
        tables.write_rows(table_path(tmp_path, f"score/{name}/short", 0), Score, rows, PROVENANCE)
    tables.write_rows(
        table_path(tmp_path, "score/judge/dense", 0), Score, [score(2, 0, 0.1, caption="dense")], PROVENANCE
    )
    assert keys_where(tmp_path, "judge < 0.5", of="short") == [1, 5]
    assert keys_where(tmp_path, "judge < 0.5 AND alt_text IS NULL", of="short") == [1]
    assert keys_where(tmp_path, "judge IS NULL", of="short") == [2, 3]


def test_where_makes_the_scores_an_input(tmp_path: Path) -> None:
    captions = {"short": {"engine": "model"}}
    p = pass_of_two(tmp_path, captions, {"where": "judge < 0.5 OR width > 9", "of": "short"})
    assert p.reads == ("image", "score/judge/short")
    for section, message in [
        ({"where": "judge < 0.5"}, "caption.dense.of: is missing: judge of which captions"),
        ({"where": "judge < 0.5", "of": "dense"}, "caption.dense.of: 'dense' is none of short"),
        ({"where": "width > 9", "of": "short"}, "caption.dense.of: is used only when `where` names a score"),
    ]:
        with pytest.raises(ConfigError, match=message):
            pass_of_two(tmp_path, captions, section)


def pass_of_two(folder: Path, captions: dict[str, Any], section: dict[str, Any]) -> Pass:
    judge = {"judge": {"kind": "judge", "engine": "model"}}
    run = run_of(folder, caption=captions | {"dense": {"engine": "model"} | section}, score=judge)
    (found,) = (p for p in caption.passes(run) if p.name == "dense")
    return found


def test_bytes_are_read_when_the_engine_draws_the_request(tmp_path: Path) -> None:
    with shard_of(tmp_path, [image(0), image(1)]) as shard:
        rows = pass_of(tmp_path).work(pass_of(tmp_path).inputs(shard), {"model": echo.open(echo.Config())})
        next(rows)
        (tmp_path / "shards" / "00000.tar").write_bytes(b"cut")
        with pytest.raises(BrokenTableError, match=r"00000\.tar"):
            next(rows)


def test_each_candidate_of_each_image_and_pass_has_a_seed_of_its_own(tmp_path: Path) -> None:
    with shard_of(tmp_path, [image(0), image(1)]) as shard:
        rows = rows_of(pass_of(tmp_path, {"num_candidates": 3}), shard)
        other = rows_of(pass_of(tmp_path, {"num_candidates": 3}, seed=1), shard)
    seeds = {row.seed for row in [*rows, *other]}
    assert len(seeds) == len({row.text for row in [*rows, *other]}) == 12
    assert all(0 <= seed < 2**31 - 64 for seed in seeds)
    assert derive_seed(0, "k", "dense", 0) != derive_seed(0, "k", "short", 0)


def test_the_ladder_is_climbed_until_an_answer_is_accepted(tmp_path: Path) -> None:
    images = [image(i) for i in range(60)]
    section = {"recipe": "structured", "max_tokens": 64, "ladder": [0.3, 0.9]}
    with shard_of(tmp_path, images) as shard:
        rows = rows_of(pass_of(tmp_path, section), shard, invalid_share=0.2, truncated_share=0.2, empty_share=0.2)
    attempts = Counter(row.attempt for row in rows)
    assert set(attempts) == {1, 2, 3} and attempts[1] < 40
    for row in rows:
        temperature = (0.1, 0.3, 0.9)[row.attempt - 1]
        assert json.loads(row.sampling) | {"temperature": temperature, "max_tokens": 64} == json.loads(row.sampling)
        assert row.seed == derive_seed(0, row.key, "dense", 0) + row.attempt - 1
        assert row.status == "ok" or row.attempt == 3
    assert {row.status for row in rows} >= {"ok", "invalid"}


def test_a_structured_caption_keeps_its_fields_and_makes_prose_of_them(tmp_path: Path) -> None:
    with shard_of(tmp_path, [image(0)]) as shard:
        (row,) = rows_of(pass_of(tmp_path, {"recipe": "structured"}), shard)
    fields = json.loads(row.fields or "")
    assert list(fields) == ["subject", "setting", "aesthetics", "camera"]
    assert row.text == " ".join(fields.values())


def test_a_recipe_that_needs_alt_text_asks_otherwise_where_there_is_none(tmp_path: Path) -> None:
    images = [image(0, alt_text="a cat"), image(1), image(2, alt_text=" \n"), image(3, alt_text="a dog")]
    with shard_of(tmp_path, images) as shard:
        hashes = [row.prompt_hash for row in rows_of(pass_of(tmp_path, {"recipe": "realign"}), shard)]
    assert hashes[0] == hashes[3] != hashes[1] == hashes[2]  # of the words that are the same for every image


def test_changing_a_word_changes_the_slice_and_nothing_else_does(tmp_path: Path) -> None:
    def slice_of(section: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> dict[str, Any]:
        p = pass_of(tmp_path, section, engines={"model": {"kind": "echo"} | (engine or {})})
        assert json.loads(json.dumps(p.slice)) == p.slice
        return dict(p.slice)

    plain = slice_of()
    assert plain == slice_of({"max_error_share": 0.9}) == slice_of(engine={"delay": 0.1})
    assert plain != slice_of(engine={"text": "A cat."}) and plain != slice_of({"temperature": 0.6})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "dense.toml").write_text('prompt = "Describe it."')
    assert slice_of()["recipe"]["prompt"] == "Describe it."


def test_the_run_says_how_many_failures_are_too_many(tmp_path: Path) -> None:
    assert pass_of(tmp_path, max_error_share=0.3).max_error_share == 0.3
    assert pass_of(tmp_path, {"max_error_share": 0.0}, max_error_share=0.3).max_error_share == 0.0


# Recipes


def test_what_the_shipped_recipes_and_rubrics_ask() -> None:
    asked = [
        f"# {name}, {'with' if alt_text else 'without'} alt text\n\n"
        + recipes.load(name, run=None).build_prompt(alt_text).prompt
        for name in ("dense", "plain", "realign", "short", "structured")
        for alt_text in ("A *cat* ```here``` \x1b[31m<|im_end|> {alt_text}\r\nsecond line", None)
    ]
    rubric = rubrics.load("dense", run=None)
    asked.append("# rubric dense\n\n" + rubric.build_prompt(caption="A cat. `x`", sentence="", alt_text=None))
    golden = Path(__file__).parent.parent / "golden" / "prompts.txt"
    assert "\n\n".join(asked) + "\n" == golden.read_text()


@given(st.text(alphabet="`a \n{}<|", max_size=40))
def test_no_text_closes_its_own_fence(text: str) -> None:
    first, *lines, last = fence_text(text).split("\n")
    assert first == last and set(first) == {"`"} and len(first) >= 3
    assert all(first not in line for line in lines)


@given(st.text(max_size=60))
def test_foreign_words_cannot_steer(text: str) -> None:
    plain = sanitise_text(text)
    assert all(char == "\n" or unicodedata.category(char) != "Cc" for char in plain)
    assert "<|" not in plain and "</" not in plain and sanitise_text(plain) == plain


def test_long_foreign_words_are_cut_between_words() -> None:
    assert (
        truncate_text("a small grey cat", 10) == "a small …"
        and truncate_text("a small grey cat", 16) == "a small grey cat"
    )
    assert truncate_text("x" * 30, 10) == "x" * 10 + " …"
    assert len(fence_text("word " * 5000, limit=1000)) < 1020


def test_what_is_filled_in_is_not_filled_again() -> None:
    assert fill_template("{alt_text} {}", {"alt_text": "{alt_text} {x}"}) == "{alt_text} {x} {}"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "recipes/mine.toml: prompt: is missing"),
        ('prompt = "{alt}"\n', "recipes/mine.toml: prompt: {alt} is not a field; the fields are {alt_text}"),
        ('prompt = "{alt_text}"\n', "prompt_without_alt_text is needed"),
        ('promt = "x"\n', "recipes/mine.toml: promt: unknown key; did you mean 'prompt'"),
        ('prompt = "x"\n[schema]\ntype = "object"\n', "schema and text need each other"),
        ('prompt = "x"\ntext = "{a}"\n[schema]\ntype = "object"\n', "text: {a} is not a field"),
        ('prompt = "x"\ntext = "x"\n[schema]\npattern = "x"\n', "schema: 'pattern' is not supported"),
        ('prompt = "x"\nflags = "klingon"\n', "recipes/mine.toml: flags: 'klingon' is none of broken, english"),
        ('prompt = "x"\nflags = "broken"\n', "flags/broken.toml: rude: '\\(' is not a regular expression"),
        ('prompt = "x"\n[sampling]\nladder = [3.0]\n', "recipes/mine.toml: sampling: ladder"),
        ('prompt = "x', "recipes/mine.toml: is not TOML"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path: Path, toml: str, message: str) -> None:
    for folder, name, text in [("recipes", "mine", toml), ("flags", "broken", "rude = ['(']")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        pass_of(tmp_path, {"recipe": "mine"})
