"""Decides how `recap serve ENGINE` runs vLLM's server: with which flags, when it is ready, and where it is to be found.

It starts one process and ends that one, no other. It does not know what is asked of the server.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.engines import openai, vllm
from pipeline.engines._options import Model, Serving, require_api_key
from pipeline.engines._reaper import Reaper
from pipeline.errors import ConfigError, EngineDiedError
from pipeline.plugins import explain_unknown
from pipeline.progress import format_duration, say
from pipeline.sections import Run, endpoint_file
from pipeline.storage import tables

READY_TIMEOUT = 1800.0  # seconds; large models load from slow disks
SHUTDOWN = 60.0  # seconds that the server has to end by itself
POLL = 0.5  # seconds
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is for what lies outside


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server to be started."""

    name: str  # what clients call the model
    engine: vllm.Config
    replicas: int
    args: tuple[str, ...]
    key: str = field(repr=False)  # the API key; "" demands none

    def command(self, *, host: str, port: int) -> list[str]:
        arguments = vllm.build_engine_arguments(self.engine, num_threads=1) | {
            "served_model_name": self.name,
            "host": host,
            "port": port,
            "data_parallel_size": self.replicas,
            "disable_uvicorn_access_log": True,
        }
        # `vllm serve` is the same; but under the package's name for CPUs it does not find its own version.
        # -P: as with any command, what lies in the folder that one stands in is not for Python to find.
        return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *_flags(arguments), *self.args]


def serve_engine(
    run: Run, name: str, *, host: str = "127.0.0.1", port: int = 0, ready_timeout: float = READY_TIMEOUT
) -> None:
    """Runs the server that an engine of run.toml describes until a signal ends it.

    Args:
        host: the address to listen on; on any but loopback an API key is demanded.
        port: 0 takes a free one.
        ready_timeout: seconds after which a server that is not ready is given up.

    Raises:
        ConfigError: there is no such engine, vLLM does not serve its kind, or the server would be open to everyone.
        EngineDiedError: the server did not get ready in time, or ended by itself.
    """
    server = describe_server(run, name)
    require_api_key(host, has_key=bool(server.key), where=f"{run.file}: engines.{name}")
    port = port or _free_port(host)
    url = f"http://{_bracketed(_reachable(host))}:{port}"
    note = endpoint_file(run.file.parent, name)
    with _child(server.command(host=host, port=port), key=server.key, kv_cache_gib=server.engine.kv_cache_gib) as child:
        took = _wait_until_ready(child, f"http://{_bracketed(host)}:{port}/health", timeout=ready_timeout)
        if took is None:
            return
        with _noted(
            note, {"base_url": f"{url}/v1", "model": server.name, "host": socket.gethostname(), "pid": child.pid}
        ):
            say(f"{server.name} is served at {url}/v1, ready after {format_duration(took)}; noted in {note}")
            while child.poll() is None and not child.asked_to_end:  # nobody is sent to a server that is ending
                time.sleep(POLL)
        if not child.asked_to_end:
            raise EngineDiedError(f"the server of {name} ended by itself with exit code {child.returncode}")


def describe_server(run: Run, name: str) -> Server:
    """What an engine of run.toml says of its server."""
    if name not in run.engines:
        raise ConfigError(f"{run.file}: engines", explain_unknown(name, sorted(run.engines)))
    found = run.engines[name].config
    if isinstance(found, vllm.Config):
        key = os.environ.get("VLLM_API_KEY", "")
        return Server(name=found.model_name, engine=found, replicas=1, args=(), key=key)
    if isinstance(found, openai.Config):
        return _of_openai(found)
    kind = run.engines[name].kind
    raise ConfigError(f"{run.file}: engines.{name}.kind", f"{kind!r} has no server; vllm and openai have")


def _of_openai(found: openai.Config) -> Server:
    how = {field.name: getattr(found.serve, field.name) for field in fields(Serving)}
    what = {field.name: getattr(found, field.name) for field in fields(Model)}
    engine = vllm.Config(**what, **how)
    key = os.environ.get(found.api_key_env, "") if found.api_key_env else ""
    return Server(name=found.model_name, engine=engine, replicas=found.serve.replicas, args=found.serve.args, key=key)


def _flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag.removeprefix('--')}"
        elif isinstance(value, dict):
            yield f"{flag}={json.dumps(value)}"
        elif value is not None:
            yield f"{flag}={'auto' if value == -1 else value}"


def _reachable(host: str) -> str:
    """The address by which others find it."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host


def _bracketed(host: str) -> str:
    """As it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class _Child(subprocess.Popen[bytes]):
    """The server's process, in a session of its own: a Ctrl-C reaches it through us, once."""

    asked_to_end = False

    def ask_to_end(self, *_: int | FrameType | None) -> None:
        self.asked_to_end = True
        self.send_signal(signal.SIGTERM)


@contextmanager
def _child(command: list[str], *, key: str, kv_cache_gib: int) -> Iterator[_Child]:
    """Starts the server; on the way out it is gone. SIGTERM and SIGINT are passed on meanwhile."""
    vllm.set_default_environment(kv_cache_gib=kv_cache_gib)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    reaper = Reaper()
    environment |= reaper.environment | ({"VLLM_API_KEY": key} if key else {})
    child = _Child(command, env=environment, stdout=sys.stderr, start_new_session=True)
    before = {number: signal.signal(number, child.ask_to_end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield child
    finally:
        _end(child)
        reaper.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: _Child) -> None:
    if child.poll() is None:
        child.ask_to_end()
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=SHUTDOWN)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what is left of its session: the server's processes and no other
    child.wait()


def _wait_until_ready(child: _Child, url: str, *, timeout: float) -> float | None:
    """Seconds until the server said that it is well; None when it was asked to end before."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < timeout:
        if child.poll() is not None:
            if child.asked_to_end:
                return None
            raise EngineDiedError(
                f"the server ended before it was ready, with exit code {child.returncode}; see its log above"
            )
        if _is_well(url):
            return waited
        time.sleep(POLL)
    raise EngineDiedError(f"{url} did not answer within {timeout:.0f} s (--ready-timeout)")


def _is_well(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _noted(note: Path, about: dict[str, Any]) -> Iterator[None]:
    """Keeps the server's address in a file while it runs. Another server's is left alone."""
    text = json.dumps(about)
    with tables.open_atomic(note) as file:
        file.write(text.encode())
    try:
        yield
    finally:
        if note.is_file() and note.read_text(encoding="utf-8") == text:
            note.unlink()
