"""What SECURITY.md promises and no other test holds: secrets stay where they are, and data decides nothing but data."""

from __future__ import annotations

import ast
import io
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.engines import openai, transformers, vllm
from pipeline.errors import ConfigError
from pipeline.execution.run_state import RunState
from stages.exporters import webdataset
from tests.support.faults import Faulty
from tests.support.runs import ROOT, begin, corpus, files, make, picture, recap_alone, sections, write

SESAME = "sesame-1234"
TOKENIZER = "Tokenizer.from_pretrained"  # reads JSON alone
PICKLES = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize(
    "file", [p for name in ("pipeline", "stages", "manifests") for p in (ROOT / name).rglob("*.py")]
)
def test_no_pickle_is_ever_loaded(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.partition(".")[0] for alias in node.names}
            names.add(getattr(node, "module", None) or "")
            assert not names & PICKLES and getattr(node, "module", None) != "pickle", ast.unparse(node)
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("torch.load", "pickle.load", "pickle.Unpickler", "pd.read_pickle"), ast.unparse(node)
            if called == "pickle.loads":  # whether an object of our own can travel between our own processes
                assert ast.unparse(node.args[0]).startswith("pickle.dumps("), ast.unparse(node)
            if called == "np.load":
                assert given["allow_pickle"] == "False"
            if called.endswith("from_pretrained") and "Processor" not in called and called != TOKENIZER:
                assert given["use_safetensors"] == "True", ast.unparse(node)


def test_code_that_comes_with_a_model_is_not_run_unless_told_to() -> None:
    given: dict[str, Any] = {"model": "some/model"}
    engines = [
        vllm.Config(**given),
        transformers.Config(**given),
        openai.Config(**given, base_url="http://127.0.0.1/v1"),
    ]
    assert [engine.trust_remote_code for engine in engines] == [False] * 3
    arguments = vllm.build_engine_arguments(vllm.Config(**given, dtype="float32"), num_threads=1)
    assert (arguments["trust_remote_code"], arguments["load_format"]) == (False, "safetensors")


@pytest.mark.slow
def test_a_key_is_in_no_file_and_no_message(tmp_path: Path) -> None:
    judge = {"kind": "openai", "model": "echo", "api_key_env": "JUDGE_KEY", "give_up_after": 5.0}
    parts = sections(corpus(tmp_path / "photos", ["jpg"] * 3))
    with Faulty() as server:
        server.key = SESAME
        run = begin(tmp_path / "run", parts | {"engines.judge": {**judge, "base_url": server.url}})
        said = [recap_alone("run", "all", "--run", run, JUDGE_KEY=SESAME)]
        said += [recap_alone("slurm", "script", "--run", run, JUDGE_KEY=SESAME), recap_alone("report", "--run", run)]
        server.key = "another"
        (run / "score" / "judge" / "dense" / "00000.parquet").unlink()
        said += [recap_alone("run", "score", "--run", run, JUDGE_KEY=SESAME, check=False)]
    assert [done.returncode for done in said] == [0, 0, 0, 1]
    assert "answered 401" in said[-1].stderr
    assert all(SESAME not in done.stdout + done.stderr for done in said)
    everything = files(run, without=())
    assert {"report.html", "stats/score/judge/dense/00000.parquet"} <= everything.keys()
    assert not [name for name, data in everything.items() if SESAME.encode() in data]


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        (f"https://me:{SESAME}@host/a.tar", "a password"),
        (f"https://{SESAME}@host/a.tar", "a password"),
        (f"s3://id:{SESAME}@bucket/{{00..07}}.tar", "a password"),
        (f"https://host/a.tar?X-Amz-Expires=9&X-Amz-Signature={SESAME}", "X-Amz-Signature"),
        (f"https://host/a.tar?sv=2024&sig={SESAME}", "sig"),
        (f"https://host/a.tar?Expires=9&Key-Pair-Id={SESAME}", "Key-Pair-Id"),
        ("https://host/a.tar?download=true", ""),
        ("hdfs://me@host/a.tar", ""),
        ("abfs://container@account.dfs.core.windows.net/a.tar", ""),
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, url: str, secret: str) -> None:
    parts = sections(tmp_path) | {"source": {"kind": "webdataset", "path": url}}
    write(tmp_path / "run", parts)
    if not secret:
        assert str(config.load(tmp_path / "run").source.config.path).endswith(url.rpartition("/")[2])
        return
    with pytest.raises(ConfigError, match=rf"source\.path: .*{secret}.*AWS_ACCESS_KEY_ID") as error:
        config.load(tmp_path / "run")
    assert SESAME not in str(error.value)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"base_url": f"https://me:{SESAME}@host/v1"}, "engines.judge.base_url"),
        ({"base_url": "endpoint", "extra": {"api_key": SESAME}}, "engines.judge.extra.api_key"),
        ({"base_url": "endpoint", "serve": {"args": [f"--api-key={SESAME}"]}}, "engines.judge.serve"),
    ],
)
def test_run_toml_is_no_place_for_keys(tmp_path: Path, engine: dict[str, Any], says: str) -> None:
    values = {
        "source": {"kind": "folder", "path": "."},
        "engines": {"judge": {"kind": "openai", "model": "judge", **engine}},
    }
    with pytest.raises(ConfigError, match=f"{re.escape(says)}.*api_key_env") as error:
        config.parse(values, file=tmp_path / "run.toml")
    assert SESAME not in str(error.value)


@pytest.mark.slow
def test_names_in_the_data_decide_no_place(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with tarfile.open(home / "a.tar", "w") as tar:
        for number, name in enumerate(
            ["../../up.jpg", "/tmp/down.jpg", "a/../b.jpg", "c\\d.jpg", "'; DROP TABLE x.jpg"]
        ):
            about = tarfile.TarInfo(name)
            data = picture(number)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    parts = sections(tmp_path) | {"source": {"kind": "webdataset", "path": str(home / "a.tar")}}
    parts["filter"] = {"rules": {"all": "true"}}
    run = begin(home / "run", parts | {"export": {"image_extension": "original"}})
    assert make(run).exit_code == 0
    assert RunState(config.load(run)).plan.num_shards == 1
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert {path.name for path in home.iterdir()} == {"a.tar", "run"}
    shard = re.compile(
        r"((image|caption|score|verdict|stats|export)/[a-z/]*)?(00000\.(parquet|tar)|plan\.parquet|run\.toml)"
    )
    assert {name for name in files(run) if not shard.fullmatch(name)} == {
        "export/README.md",
        "export/stats.json",
        "export/croissant.json",
        "export/webdataset/00000.tar.idx",
        *(f"export/webdataset/{name}" for name in webdataset.INDEXES),
        "export/index/SHA256SUMS",
    }
    with tarfile.open(run / "export" / "webdataset" / "00000.tar") as made:
        assert all(re.fullmatch(r"\d{12}\.(jpg|txt|json)", name) for name in made.getnames())


def test_every_promise_names_tests_that_there_are() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(), f"{file}::{test}"
