"""`recap serve ENGINE`: vLLM's server with the flags of an engine, its start, and the file with its address.

It starts one process and ends that one only. It knows nothing of the requests that the server answers.
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
from pipeline.engines._inspection import check_installed
from pipeline.engines._options import Model, Serving, require_api_key
from pipeline.engines._reaper import Reaper
from pipeline.errors import ConfigError, EngineDiedError
from pipeline.execution.signals import ECHO
from pipeline.plugins import explain_unknown
from pipeline.progress import format_duration, say
from pipeline.sections import Run, endpoint_file
from pipeline.storage import tables

READY_TIMEOUT = 1800.0  # seconds; large models load from slow disks
SHUTDOWN_TIMEOUT = 60.0  # seconds between SIGTERM and SIGKILL
POLL_INTERVAL = 0.5  # seconds
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past http_proxy: the server is on this machine


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that can be started."""

    name: str  # of the model, for clients
    engine: vllm.Config
    replicas: int
    args: tuple[str, ...]
    key: str = field(repr=False)  # the API key; "" if none is required

    def command(self, *, host: str, port: int) -> list[str]:
        arguments = vllm.build_engine_arguments(self.engine, num_threads=1) | {
            "served_model_name": self.name,
            "host": host,
            "port": port,
            "data_parallel_size": self.replicas,
            "disable_uvicorn_access_log": True,
        }
        # `vllm serve` would be the same, but does not find its own version in the CPU package.
        # -P: a module in the current directory must not shadow an installed one.
        return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *_format_flags(arguments), *self.args]


def serve_engine(
    run: Run, name: str, *, host: str = "127.0.0.1", port: int = 0, ready_timeout: float = READY_TIMEOUT
) -> None:
    """Runs the server of an engine of run.toml until a signal ends it.

    Args:
        host: the address to listen on; any but loopback requires an API key.
        port: 0 selects a free one.
        ready_timeout: seconds until a server that is not ready is stopped.

    Raises:
        ConfigError: there is no such engine, vLLM is not installed or does not serve its kind, or the server would need
            no API key.
        EngineDiedError: the server was not ready in time, or ended by itself.
    """
    server = describe_server(run, name)
    require_api_key(host, has_key=bool(server.key), where=f"{run.file}: engines.{name}")
    check_installed("vllm", kind="vllm", how=vllm.HOW_TO_INSTALL)
    port = port or _find_free_port(host)
    url = f"http://{_format_host(socket.gethostname() if host in ('0.0.0.0', '::') else host)}:{port}/v1"
    file = endpoint_file(run.file.parent, name)
    command = server.command(host=host, port=port)
    with _start_process(command, key=server.key, kv_cache_gib=server.engine.kv_cache_gib) as process:
        seconds = _wait_until_ready(process, f"http://{_format_host(host)}:{port}/health", timeout=ready_timeout)
        if seconds is None:
            return
        endpoint = {"base_url": url, "model": server.name, "host": socket.gethostname(), "pid": process.pid}
        with _publish_endpoint(file, endpoint):
            say(f"{server.name} is served at {url}, ready after {format_duration(seconds)}; its address is in {file}")
            while process.poll() is None and not process.is_stopping:  # clients must not find a server that is stopping
                time.sleep(POLL_INTERVAL)
        if not process.is_stopping:
            raise EngineDiedError(f"the server of {name} ended by itself with exit code {process.returncode}")


def describe_server(run: Run, name: str) -> Server:
    """
    Raises:
        ConfigError: there is no such engine, or vLLM does not serve its kind.
    """
    if name not in run.engines:
        raise ConfigError(f"{run.file}: engines", explain_unknown(name, sorted(run.engines)))
    config = run.engines[name].config
    if isinstance(config, vllm.Config):
        key = os.environ.get("VLLM_API_KEY", "")
        return Server(name=config.model_name, engine=config, replicas=1, args=(), key=key)
    if isinstance(config, openai.Config):
        model = {field.name: getattr(config, field.name) for field in fields(Model)}
        serving = {field.name: getattr(config.serve, field.name) for field in fields(Serving)}
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        engine, replicas, args = vllm.Config(**model, **serving), config.serve.replicas, config.serve.args
        return Server(name=config.model_name, engine=engine, replicas=replicas, args=args, key=key)
    kind = run.engines[name].kind
    raise ConfigError(f"{run.file}: engines.{name}.kind", f"{kind!r} has no server; vllm and openai have one")


def _format_flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag.removeprefix('--')}"
        elif isinstance(value, dict):
            yield f"{flag}={json.dumps(value)}"
        elif value is not None:
            yield f"{flag}={'auto' if value == -1 else value}"


def _format_host(host: str) -> str:
    """A host as part of a URL."""
    return f"[{host}]" if ":" in host else host


def _find_free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class _ServerProcess(subprocess.Popen[bytes]):
    """The server's process, in its own session, so that a Ctrl-C reaches it once, through `stop`."""

    is_stopping = False
    stopped_at = 0.0  # on the monotonic clock

    def stop(self, *received: int | FrameType | None) -> None:
        """Asks the server to end; a second signal kills it."""
        if received and self.is_stopping and time.monotonic() - self.stopped_at > ECHO:
            os.killpg(self.pid, signal.SIGKILL)
            return
        self.is_stopping, self.stopped_at = True, time.monotonic()
        self.send_signal(signal.SIGTERM)


@contextmanager
def _start_process(command: list[str], *, key: str, kv_cache_gib: int) -> Iterator[_ServerProcess]:
    """A server process that ends with the context; SIGTERM and SIGINT are forwarded to it."""
    vllm.set_default_environment(kv_cache_gib=kv_cache_gib)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    reaper = Reaper()
    environment |= reaper.environment | ({"VLLM_API_KEY": key} if key else {})
    process = _ServerProcess(command, env=environment, stdout=sys.stderr, start_new_session=True)
    before = {number: signal.signal(number, process.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield process
    finally:
        _end_process(process)
        reaper.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_process(process: _ServerProcess) -> None:
    if process.poll() is None:
        process.stop()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=SHUTDOWN_TIMEOUT)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the rest of its session
    process.wait()


def _wait_until_ready(process: _ServerProcess, url: str, *, timeout: float) -> float | None:
    """Seconds until the server was healthy; None if it was stopped before."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < timeout:
        if process.poll() is not None:
            if process.is_stopping:
                return None
            raise EngineDiedError(
                f"the server ended before it was ready, with exit code {process.returncode}; see its log above"
            )
        if _is_healthy(url):
            return waited
        time.sleep(POLL_INTERVAL)
    raise EngineDiedError(f"{url} did not answer within {timeout:.0f} s (--ready-timeout)")


def _is_healthy(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _publish_endpoint(file: Path, endpoint: dict[str, Any]) -> Iterator[None]:
    """Keeps the server's address in a file while it runs; does not remove the file of a later server."""
    text = json.dumps(endpoint)
    with tables.open_atomic(file) as out:
        out.write(text.encode())
    try:
        yield
    finally:
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            file.unlink()
