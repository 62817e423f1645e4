"""run.toml is read strictly; errors name the file, the field, the value and the choices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline import config, plugins
from pipeline.commands import init
from pipeline.errors import ConfigError, UnknownNameError
from tests.support.runs import recap, sections, write


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"source": {"pth": "x"}}, ["source.pth", "unknown key", "did you mean 'path'"]),
        ({"source": {"kind": "foldr"}}, ["source.kind", "'foldr'", "did you mean 'folder'", "webdataset"]),
        ({"source": {"shard_size": 0}}, ["source.shard_size", "0", "the minimum is 1"]),
        ({"source": {"shard_size": "many"}}, ["source.shard_size", "'many'", "an integer"]),
        ({"engines__captioner": {"kind": "ecko"}}, ["engines.captioner.kind", "'ecko'", "did you mean 'echo'"]),
        ({"engines__captioner": {"error_share": 2.0}}, ["engines.captioner.error_share", "2.0", "the maximum is 1"]),
        ({"caption__dense": {"engine": "captoner"}}, ["caption.dense", "'captoner'", "captioner"]),
        ({"caption__dense": {"recipe": "dens"}}, ["caption.dense", "'dens'", "dense"]),
        ({"caption__dense": {"where": "widht > 3"}}, ["caption.dense.where", "widht", "width"]),
        ({"caption__dense": {"where": "width >"}}, ["caption.dense.where", "width >"]),
        ({"filter": {"rules": {"x": "jugde > 0.1"}}}, ["filter.rules.x", "jugde", "judge"]),
        ({"filter": {"rules": {"x": "1; DROP TABLE image"}}}, ["filter.rules.x"]),
        ({"filter": {"rules": {"x": "width > 1) OR (1=1"}}}, ["filter.rules.x", "not a valid SQL condition"]),
        ({"filter": {"rules": {"x": "key IN (SELECT key FROM caption)"}}}, ["filter.rules.x", "a query inside"]),
        ({"filter": {"rules": {"x": "random() < 0.5"}}}, ["filter.rules.x", "random", "the same value for"]),
        ({"filter": {"rules": {"empty": "width > 1"}}}, ["filter.rules.empty", "status"]),
        ({"caption__dense": {"temperature": float("nan")}}, ["caption.dense.temperature", "finite"]),
        ({"export": {"formats": ["parquet", "parquet"]}}, ["export", "each once"]),
        ({"engines__captioner": {"kind": "os.path"}}, ["engines.captioner.kind", "no plugin"]),
        ({"filter": {"choose": "nothing DESC"}}, ["filter.choose", "nothing"]),
        ({"export": {"upright": True, "images": "reference"}}, ["export", "upright", "reference"]),
        ({"export": {"formats": ["webdataset"], "images": "reference"}}, ["export", "reference", "has no effect"]),
        ({"export": {"formats": ["webdataset"], "buckets": [math.nan]}}, ["export", "buckets", "above 0"]),
        ({"export": {"split": {"train": 1, "Val": 0.1}}}, ["export", "split", "small letters"]),
        ({"export": {"split": {"train": 1, "val": 0}}}, ["export", "split", "above 0"]),
        ({"export": {"resize": {"short": 512, "long": 9}}}, ["export", "resize", "short or long"]),
        ({"export": {"resize": {"area": 512}}}, ["export", "resize", "short or long"]),
        ({"export": {"instructions": []}}, ["export", "instructions", "at least one"]),
        ({"export": {"formats": "sidecar"}}, ["export.formats", "is not a list", 'write ["sidecar"]']),
        ({"export": {"formats": ["tfrecord"], "split": {"a": 1}}}, ["export", "formats", "tfrecord"]),
        ({"export": {"formats": ["tfrecord"]}}, ["export", "formats", "tfrecord", "webdataset"]),
        ({"score__judge": {"rubric": "dens"}}, ["score.judge", "'dens'", "dense"]),
        ({"score__judge": {"kind": "juge"}}, ["score.judge.kind", "'juge'", "judge"]),
        ({"caption__a/b": {"recipe": "dense", "engine": "captioner"}}, ["caption.a/b", "letters, digits"]),
        ({"captions__dense": {"recipe": "dense"}}, ["captions", "unknown key", "did you mean 'caption'"]),
    ],
)
def test_errors_name_field_value_and_choices(
    tmp_path: Path, changes: dict[str, dict[str, object]], parts: list[str]
) -> None:
    written = {(f'"{k}"' if "/" in k else k): v for k, v in sections(tmp_path / "photos", **changes).items()}
    written = {k.strip('"').replace("a/b", '"a/b"'): v for k, v in written.items()}
    (tmp_path / "photos").mkdir()
    run = write(tmp_path / "run", written)
    done = recap("run", "all", "--run", run, check=False)
    assert done.returncode == 2, done.stderr
    assert "run.toml" in done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_missing_run_and_broken_toml_are_named(tmp_path: Path) -> None:
    done = recap("status", "--run", tmp_path, check=False)
    assert (done.returncode, "recap init" in done.stderr) == (2, True)
    (tmp_path / "run.toml").write_text("source = [")
    with pytest.raises(ConfigError, match=r"run\.toml: is not TOML"):
        config.load(tmp_path)
    (tmp_path / "run.toml").write_text(f"a = {'[' * 5000}{']' * 5000}")
    with pytest.raises(ConfigError, match="nested too deeply"):
        config.load(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    meant = init.default_sections({"kind": "folder", "path": str(tmp_path)}, engine="echo", model=None)
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + init.render_manifest(meant).encode())
    assert config.load(tmp_path).sections["caption"]["dense"].recipe == "dense"


@pytest.mark.parametrize("name", ["../echo", ".echo", "echo.", "a-b.c", "a b.c"])
def test_a_plugin_name_that_is_no_module_is_named(name: str) -> None:
    with pytest.raises(UnknownNameError, match="is not the name of a module"):
        plugins.load("pipeline.engines", name)


def test_the_run_toml_of_init_reads_as_it_was_meant(tmp_path: Path) -> None:
    meant = init.default_sections({"kind": "folder", "path": str(tmp_path)}, engine="echo", model=None)
    (tmp_path / "run.toml").write_text(init.render_manifest(meant))
    run = config.load(tmp_path)
    assert run.sections["caption"]["dense"].recipe == meant["caption.dense"]["recipe"]
    assert dict(run.sections["filter"][""].rules) == meant["filter"]["rules"]
    assert config.stamped(run.corpus) == config.stamped(config.Corpus())
    commented = [line for line in (tmp_path / "run.toml").read_text().splitlines() if line.startswith("# ")]
    assert len(commented) > 30
    lines = (tmp_path / "run.toml").read_text().splitlines()
    assert {"# seed = 0", "# max_error_share = 0.2", "[slurm]", "# gpus = 1"} <= set(lines)
    assert not any("die_after" in line or "_share = 0.0" in line for line in lines)  # what only tests set


def test_defaults_and_urls_decide_no_rows(tmp_path: Path) -> None:
    meant = init.default_sections({"kind": "folder", "path": str(tmp_path)}, engine="echo", model=None)
    (tmp_path / "run.toml").write_text(init.render_manifest(meant))
    stamp = config.load(tmp_path).source.stamp
    (tmp_path / "run.toml").write_text(
        init.render_manifest({**meant, "source": {"kind": "folder", "path": "elsewhere"}})
    )
    assert config.load(tmp_path).source.stamp == stamp
