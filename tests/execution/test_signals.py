"""A second signal ends a command, whatever its engine is waiting for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.execution.signals import ECHO
from tests.support.faults import Faulty
from tests.support.runs import ROOT, begin, corpus, sections

STUCK = """
import time
from dataclasses import dataclass
from pathlib import Path
from pipeline.engines import echo

@dataclass(frozen=True, kw_only=True)
class Config(echo.Config):
    pass

def open(config):
    return Stuck(config)

class Stuck(echo.Echo):
    def generate(self, requests):
        Path("asked").touch()
        time.sleep(600)
        yield
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openai", "mine.stuck"])
def test_a_second_signal_ends_the_command_while_its_engine_hangs(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stuck.py").write_text(STUCK)
    with Faulty(share=1.0, faults=("hang",)) as server:
        served = {"kind": "openai", "model": "echo", "base_url": server.url}
        engine: dict[str, Any] = served if kind == "openai" else {"kind": "echo"}
        photos = corpus(tmp_path / "photos", ["jpg"] * 3)
        run = begin(tmp_path / "run", sections(photos) | {"engines.captioner": engine})
        file = run / "run.toml"
        if kind == "mine.stuck":  # a module that this process cannot import
            text = file.read_text()
            file.write_text(text.replace('[engines.captioner]\nkind = "echo"', f'[engines.captioner]\nkind = "{kind}"'))
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", "all", "--run", str(run)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        while not server.most_in_flight and not (tmp_path / "asked").exists():
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        time.sleep(ECHO + 0.2)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        _, words = child.communicate(timeout=60)  # the engine would take ten minutes
    assert (child.returncode, "stopped at once; the same command resumes" in words) == (75, True), words


@pytest.mark.slow
def test_the_first_signal_ends_a_command_whose_server_is_gone(tmp_path: Path) -> None:
    """It waited on for `give_up_after`, ten minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    engine = {"kind": "openai", "model": "echo", "base_url": url}
    photos = corpus(tmp_path / "photos", ["jpg"] * 3)
    run = begin(tmp_path / "run", sections(photos) | {"engines.captioner": engine})
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "all", "--run", str(run)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr
    for line in child.stderr:
        if "retrying for" in line:
            break
    child.send_signal(signal.SIGINT)
    _, words = child.communicate(timeout=60)
    assert (child.returncode, "SIGINT: finishing what is in flight" in words) == (75, True), words
