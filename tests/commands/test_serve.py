"""The server that `recap serve` describes; tests marked vllm start and stop it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.commands import serve
from pipeline.engines import vllm
from pipeline.errors import ConfigError
from tests.support.faults import Faulty


def run(tmp_path: Path, **engines: dict[str, Any]) -> config.Run:
    values = {"source": {"kind": "folder", "path": "."}, "engines": engines}
    return config.parse(values, file=tmp_path / "run.toml")


JUDGE: dict[str, Any] = {"kind": "openai", "model": "some/judge", "base_url": "endpoint", "api_key_env": "JUDGE_KEY"}


@pytest.mark.slow
def test_server_has_the_flags_for_image_batches(tmp_path: Path) -> None:
    how = {"max_num_seqs": 32, "replicas": 2, "dtype": "bfloat16", "args": ["--quantization=fp8"]}
    server = serve.describe_server(run(tmp_path, judge={**JUDGE, "serve": how}), "judge")
    command = server.command(host="127.0.0.1", port=8123)
    flags = dict(flag.partition("=")[::2] for flag in command if flag.startswith("--"))
    assert flags["--model"] == flags["--served-model-name"] == "some/judge"
    assert json.loads(flags["--limit-mm-per-prompt"]) == {"image": 1, "video": 0}
    assert json.loads(flags["--structured-outputs-config"]) == {"backend": "xgrammar"}
    names = ("--host", "--port", "--mm-processor-cache-gb", "--max-model-len", "--max-num-seqs", "--data-parallel-size")
    assert [flags[name] for name in names] == ["127.0.0.1", "8123", "0", "auto", "32", "2"]
    assert flags["--dtype"] == "bfloat16" and command[-1] == "--quantization=fp8"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "imitates", "dtype"),
    [
        ({"dtype": "float32"}, False, "float32"),
        ({"text_config": {"torch_dtype": "float32"}}, False, "float32"),
        ({"dtype": "bfloat16"}, False, "bfloat16"),
        ({"dtype": "bfloat16"}, True, "float32"),
    ],
)
def test_vllm_engine_is_served_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], imitates: bool, dtype: str
) -> None:
    monkeypatch.setattr(vllm, "is_cpu_build", lambda: True)
    monkeypatch.setattr(vllm.machine, "emulates_bfloat16", lambda: imitates)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text(json.dumps(stored))
    engine = {"kind": "vllm", "model": "mine", "max_model_len": 4096}
    command = serve.describe_server(run(tmp_path, captioner=engine), "captioner").command(host="127.0.0.1", port=1)
    assert f"--model={tmp_path / 'models' / 'mine'}" in command
    assert "--served-model-name=mine" in command and "--max-model-len=4096" in command
    assert f"--dtype={dtype}" in command


def test_api_key_is_not_in_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame-1234")
    server = serve.describe_server(run(tmp_path, judge={**JUDGE, "serve": {"dtype": "float32"}}), "judge")
    assert server.key == "sesame-1234"
    assert "sesame" not in f"{server!r} {server.command(host='127.0.0.1', port=1)}"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_server_that_others_can_reach_requires_a_key(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"engines\.judge.*api_key_env"):
        serve.serve_engine(run(tmp_path, judge=JUDGE), "judge", host=host)


def test_engine_without_a_server_is_a_user_error(tmp_path: Path) -> None:
    engines = run(tmp_path, judge=JUDGE, echo={"kind": "echo"})
    with pytest.raises(ConfigError, match="'echo' has no server"):
        serve.describe_server(engines, "echo")
    with pytest.raises(ConfigError, match="did you mean 'judge'"):
        serve.describe_server(engines, "jugde")


def test_health_check_bypasses_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Faulty() as server:
        assert serve._is_healthy(server.url.removesuffix("/v1") + "/health")


@pytest.mark.parametrize("host", ["::", "::1"])
def test_ipv6_addresses_have_ports_and_urls(host: str) -> None:
    try:
        assert serve._find_free_port(host) > 0
    except OSError as error:  # this machine has no IPv6
        assert error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    assert serve._format_host(host) == f"[{host}]" and serve._format_host("0.0.0.0") == "0.0.0.0"
