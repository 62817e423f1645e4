"""The caption stage: prompts, retries, image selection, and one row per candidate."""

from __future__ import annotations

import hashlib
import json
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
from stages.text.prompts import derive_seed
from tests.support.scoring import PROVENANCE


def make_image(index: int, **changes: Any) -> Image:
    values: dict[str, Any] = {
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
    return Image(**values | changes)


def parse_run(folder: Path, **sections: Any) -> config.Run:
    values = {"source": {"kind": "scenes"}, "engines": {"model": {"kind": "echo"}}} | sections
    return config.parse(values, file=folder / "run.toml")


def build_pass(folder: Path, section: dict[str, Any] | None = None, **sections: Any) -> Pass:
    captions = {"dense": {"engine": "model"} | (section or {})}
    (matching,) = (p for p in caption.passes(parse_run(folder, caption=captions, **sections)) if p.name == "dense")
    return matching


@contextmanager
def write_shard(folder: Path, images: list[Image], **sections: Any) -> Iterator[Shard]:
    """A run with one shard, in which the file of image n is its number in eight bytes."""
    plan.write_plan(folder / "plan.parquet", [Piece(file="f", start=0, stop=len(images) or 1)], shard_size=10_000)
    tables.write_rows(table_path(folder, "image", 0), Image, images, PROVENANCE)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "00000.tar").write_bytes(b"".join(f"{i:08d}".encode() for i in range(len(images))))
    frozen, _ = plan.Plan.load(folder / "plan.parquet")
    shard = Shard(run=parse_run(folder, **sections), number=0, pieces=frozen.pieces(0))
    yield shard
    shard.close()


def run_pass(p: Pass, shard: Shard, **shares: Any) -> list[Caption]:
    return list(p.work(p.inputs(shard), {"model": echo.open(echo.Config(**shares))}))


image_statuses = st.sampled_from(["ok", "ok", "ok", "empty", "unreadable", "unsupported", "too_small", "too_large"])


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(image_statuses, max_size=12), st.integers(1, 4), st.floats(0, 0.2), st.floats(0, 0.2))
def test_every_usable_image_has_num_candidates_rows(
    tmp_path_factory: pytest.TempPathFactory, statuses: list[Any], num_candidates: int, errors: float, empty: float
) -> None:
    folder = tmp_path_factory.mktemp("run")
    images = [make_image(i, status=status) for i, status in enumerate(statuses)]
    with write_shard(folder, images) as shard:
        p = build_pass(folder, {"num_candidates": num_candidates, "ladder": []})
        rows = run_pass(p, shard, error_share=errors, empty_share=empty, truncated_share=0.2, repeated_share=0.2)
    usable = [one.key for one in images if one.status == "ok"]
    assert [row.id for row in rows] == [(key, n) for key in usable for n in range(num_candidates)]
    assert all((row.status == "ok") == (row.error is None) for row in rows)


def test_rows_record_model_and_sampling(tmp_path: Path) -> None:
    with write_shard(tmp_path, [make_image(0)]) as shard:
        (row,) = run_pass(build_pass(tmp_path), shard)
    assert (row.status, row.attempt, row.model, row.engine, row.finish_reason) == ("ok", 1, "echo", "model", "stop")
    assert json.loads(row.sampling) == {
        "temperature": 0.5,
        "top_p": 0.95,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_tokens": 512,
    }
    assert row.num_output_tokens == len(row.text.split()) and len(row.prompt_hash) == 16 and row.flags == ()


def make_score(index: int, candidate: int, value: float | None, **changes: Any) -> Score:
    values: dict[str, Any] = {"caption": "short", "name": "judge", "criteria": (), "error": None}
    status = "unknown" if value is None else "ok"
    return Score(
        **values | {"key": make_key(0, index), "candidate": candidate, "value": value, "status": status} | changes
    )


def select_keys(folder: Path, where: str, *, of: str | None = None) -> list[int]:
    section = {"where": where} | ({} if of is None else {"of": of})
    captions = {"dense": {"engine": "model"} | section, "short": {"engine": "model"}}
    judge = {"judge": {"kind": "text"}} if of else {}
    parts = {"caption": captions, "score": judge}
    (p,) = (p for p in caption.passes(parse_run(folder, **parts)) if p.name == "dense")
    images = [make_image(i, status="empty" if i == 4 else "ok", alt_text="a cat" if i == 5 else None) for i in range(6)]
    with write_shard(folder, images, **parts) as shard:
        return [int(item.image.key) for item in p.inputs(shard)]


def test_where_selects_by_image_columns(tmp_path: Path) -> None:
    assert select_keys(tmp_path, "width > 101 AND alt_text IS NULL") == [2, 3]


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
        ({"num_candidates": 0}, "caption.dense.num_candidates: 0 is too small; the minimum is 1"),
        ({"num_candidates": 2, "temperature": 0}, "caption.dense.num_candidates: 2 candidates would be equal"),
        ({"top_p": 0}, "caption.dense: top_p"),
    ],
)
def test_errors_name_the_section_and_key(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pass(tmp_path, section)


@pytest.mark.slow
def test_where_selects_by_the_best_candidate_of_another_pass(tmp_path: Path) -> None:
    scores = [
        make_score(0, 0, 0.2),
        make_score(0, 1, 0.9),
        make_score(1, 0, 0.2),
        make_score(1, 1, None),
        make_score(2, 0, None),
        make_score(3, 0, 0.4, name="text"),
        make_score(5, 0, 0.3),
    ]
    for name in ("judge", "text"):
        rows = [row for row in scores if row.name == name]
        tables.write_rows(table_path(tmp_path, f"score/{name}/short", 0), Score, rows, PROVENANCE)
    tables.write_rows(
        table_path(tmp_path, "score/judge/dense", 0), Score, [make_score(2, 0, 0.1, caption="dense")], PROVENANCE
    )
    assert select_keys(tmp_path, "judge < 0.5", of="short") == [1, 5]
    assert select_keys(tmp_path, "judge < 0.5 AND alt_text IS NULL", of="short") == [1]
    assert select_keys(tmp_path, "judge IS NULL", of="short") == [2, 3]


def test_scores_in_where_are_inputs(tmp_path: Path) -> None:
    captions = {"short": {"engine": "model"}}
    p = build_pass_of(tmp_path, captions, {"where": "judge < 0.5 OR width > 9", "of": "short"})
    assert p.reads == ("image", "score/judge/short")
    for section, message in [
        ({"where": "judge < 0.5"}, "caption.dense.of: is missing: judge of which captions"),
        ({"where": "judge < 0.5", "of": "dense"}, "caption.dense.of: 'dense' is none of short"),
        ({"where": "width > 9", "of": "short"}, "caption.dense.of: is used only when `where` names a score"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_pass_of(tmp_path, captions, section)


def build_pass_of(folder: Path, captions: dict[str, Any], section: dict[str, Any]) -> Pass:
    judge = {"judge": {"kind": "judge", "engine": "model"}}
    run = parse_run(folder, caption=captions | {"dense": {"engine": "model"} | section}, score=judge)
    (matching,) = (p for p in caption.passes(run) if p.name == "dense")
    return matching


def test_image_files_are_read_lazily(tmp_path: Path) -> None:
    with write_shard(tmp_path, [make_image(0), make_image(1)]) as shard:
        rows = build_pass(tmp_path).work(build_pass(tmp_path).inputs(shard), {"model": echo.open(echo.Config())})
        next(rows)
        (tmp_path / "shards" / "00000.tar").write_bytes(b"cut")
        with pytest.raises(BrokenTableError, match=r"00000\.tar"):
            next(rows)


def test_every_candidate_has_its_own_seed(tmp_path: Path) -> None:
    with write_shard(tmp_path, [make_image(0), make_image(1)]) as shard:
        rows = run_pass(build_pass(tmp_path, {"num_candidates": 3}), shard)
        other = run_pass(build_pass(tmp_path, {"num_candidates": 3}, seed=1), shard)
    seeds = {row.seed for row in [*rows, *other]}
    assert len(seeds) == len({row.text for row in [*rows, *other]}) == 12
    assert all(0 <= seed < 2**31 - 64 for seed in seeds)
    assert derive_seed(0, "k", "dense", 0) != derive_seed(0, "k", "short", 0)


def test_rejected_answers_are_retried_up_the_ladder(tmp_path: Path) -> None:
    images = [make_image(i) for i in range(60)]
    section = {"recipe": "structured", "max_tokens": 64, "ladder": [0.3, 0.9]}
    with write_shard(tmp_path, images) as shard:
        rows = run_pass(build_pass(tmp_path, section), shard, invalid_share=0.2, truncated_share=0.2, empty_share=0.2)
    attempts = Counter(row.attempt for row in rows)
    assert set(attempts) == {1, 2, 3} and attempts[1] < 40
    for row in rows:
        temperature = (0.1, 0.3, 0.9)[row.attempt - 1]
        assert json.loads(row.sampling) | {"temperature": temperature, "max_tokens": 64} == json.loads(row.sampling)
        assert row.seed == derive_seed(0, row.key, "dense", 0) + row.attempt - 1
        assert row.status == "ok" or row.attempt == 3
    assert {row.status for row in rows} >= {"ok", "invalid"}


def test_structured_captions_have_fields_and_prose(tmp_path: Path) -> None:
    with write_shard(tmp_path, [make_image(0)]) as shard:
        (row,) = run_pass(build_pass(tmp_path, {"recipe": "structured"}), shard)
    fields = json.loads(row.fields or "")
    assert list(fields) == ["subject", "setting", "aesthetics", "camera"]
    assert row.text == " ".join(fields.values())


def test_images_without_alt_text_get_another_prompt(tmp_path: Path) -> None:
    images = [
        make_image(0, alt_text="a cat"),
        make_image(1),
        make_image(2, alt_text=" \n"),
        make_image(3, alt_text="a dog"),
    ]
    with write_shard(tmp_path, images) as shard:
        hashes = [row.prompt_hash for row in run_pass(build_pass(tmp_path, {"recipe": "realign"}), shard)]
    assert hashes[0] == hashes[3] != hashes[1] == hashes[2]


def test_slice_changes_only_with_prompt_sampling_and_engine(tmp_path: Path) -> None:
    def slice_of(section: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> dict[str, Any]:
        p = build_pass(tmp_path, section, engines={"model": {"kind": "echo"} | (engine or {})})
        assert json.loads(json.dumps(p.slice)) == p.slice
        return dict(p.slice)

    plain = slice_of()
    assert plain == slice_of({"max_error_share": 0.9}) == slice_of(engine={"delay": 0.1})
    assert plain != slice_of(engine={"text": "A cat."}) and plain != slice_of({"temperature": 0.6})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "dense.toml").write_text('prompt = "Describe it."')
    assert slice_of()["recipe"]["prompt"] == "Describe it."


def test_max_error_share_is_the_runs_unless_overridden(tmp_path: Path) -> None:
    assert build_pass(tmp_path, max_error_share=0.3).max_error_share == 0.3
    assert build_pass(tmp_path, {"max_error_share": 0.0}, max_error_share=0.3).max_error_share == 0.0


def test_prompts_of_shipped_recipes_and_rubrics() -> None:
    prompts = [
        f"# {name}, {'with' if alt_text else 'without'} alt text\n\n"
        + recipes.load(name, run=None).build_prompt(alt_text).prompt
        for name in ("dense", "plain", "realign", "short", "structured")
        for alt_text in ("A *cat* ```here``` \x1b[31m<|im_end|> {alt_text}\r\nsecond line", None)
    ]
    rubric = rubrics.load("dense", run=None)
    prompts.append("# rubric dense\n\n" + rubric.build_prompt(caption="A cat. `x`", sentence="", alt_text=None))
    golden = Path(__file__).parent.parent / "golden" / "prompts.txt"
    assert "\n\n".join(prompts) + "\n" == golden.read_text()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("", "recipes/mine.toml: prompt: is missing"),
        ('prompt = "{alt}"\n', "caption.dense.given.alt: is missing: the prompt of recipe 'mine' has {alt}; fill it"),
        ('prompt = "{alt_text}"\n', "prompt_without_alt_text is needed"),
        ('prompt = "x"\nimage = false\n', "recipes/mine.toml: image = false: the prompt has no {field}"),
        ('prompt = "{a}"\nrequired = ["a"]\noptional = ["a"]\n', "recipes/mine.toml: a is required and optional"),
        ('prompt = "x"\nrequired = ["a"]\n', "recipes/mine.toml: required: the prompt has no {a}"),
        ('promt = "x"\n', "recipes/mine.toml: promt: unknown key; did you mean 'prompt'"),
        ('prompt = "x"\n[schema]\ntype = "object"\n', "schema and text need each other"),
        ('prompt = "x"\ntext = "{a}"\n[schema]\ntype = "object"\n', "text: {a} is not a field"),
        ('prompt = "x"\ntext = "x"\n[schema]\npattern = "x"\n', "schema: 'pattern' is not supported"),
        ('prompt = "x"\nflags = "klingon"\n', "recipes/mine.toml: flags: 'klingon' is none of .*broken, .*english"),
        ('prompt = "x"\nflags = "broken"\n', "flags/broken.toml: rude: '\\(' is not a regular expression"),
        ('prompt = "x"\n[sampling]\nladder = [3.0]\n', "recipes/mine.toml: sampling: ladder"),
        ('prompt = "x', "recipes/mine.toml: is not TOML"),
    ],
)
def test_errors_name_the_recipe_file_and_field(tmp_path: Path, toml: str, message: str) -> None:
    for folder, name, text in [("recipes", "mine", toml), ("flags", "broken", "rude = ['(']")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        build_pass(tmp_path, {"recipe": "mine"})
