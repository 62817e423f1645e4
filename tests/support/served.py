"""Model servers for tests: `recap serve` in its own process, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelServer:
    endpoint: Path  # the file with the server's address
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return str(json.loads(self.endpoint.read_text())["base_url"]).removesuffix("/v1")

    def num_answered(self) -> int:
        """Returns the number of requests answered, by the server's own metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total")))

    def kill(self) -> None:
        """Ends the server as a power failure does, without cleanup."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serve_model(model: Path, **keys: Any) -> Iterator[ModelServer]:
    """Serves the model under the name "tiny" until the block ends. `keys` are those of `[engines.NAME.serve]`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "models").mkdir()
        (run / "models" / "tiny").symlink_to(model)
        (run / "run.toml").write_text(_write_run_toml(keys))
        with start_server(run, "tiny") as served:
            yield served


@contextmanager
def start_server(run: Path, engine: str) -> Iterator[ModelServer]:
    """Runs the server of an engine of a run until the block ends."""
    endpoint = run / "endpoints" / f"{engine}.json"
    endpoint.unlink(missing_ok=True)  # left by a server that was killed
    process = subprocess.Popen([sys.executable, "-m", "tests.support.served", str(run), engine], start_new_session=True)
    try:
        while not endpoint.exists():
            assert process.poll() is None, "the server ended before it was ready"
            time.sleep(0.2)
        yield ModelServer(endpoint=endpoint, process=process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _write_run_toml(keys: dict[str, Any]) -> str:
    lines = ['[source]\nkind = "folder"\npath = "."', '[engines.tiny]\nkind = "openai"\nmodel = "tiny"']
    lines += ['base_url = "endpoint"\n[engines.tiny.serve]']
    options = {"kv_cache_gib": 1} | keys
    return "\n".join([*lines, *(f"{name} = {json.dumps(value)}" for name, value in options.items())])


def _end_with_parent(parent: int) -> None:
    """Ends the server with its parent, so that a killed test leaves none behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    from pipeline import config
    from pipeline.commands import serve

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    serve.serve_engine(config.load(Path(sys.argv[1])), sys.argv[2])
