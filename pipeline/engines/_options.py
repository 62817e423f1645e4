"""Decides which keys the engines with a model have in common, so that each is named, bounded and explained once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from pipeline.decoding.images import MAX_PIXELS
from pipeline.errors import ConfigError
from pipeline.machine import num_cores
from pipeline.sections import key


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and what it is shown."""

    model: str = key(help="a folder, or a model's name on the Hugging Face hub", locate="model")
    revision: str | None = key(None, "a branch, tag or commit of the hub; pin it")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    max_pixels: int = key(MAX_PIXELS, "a picture is reduced to at most this many pixels", least=28 * 28)
    num_threads: int = key(0, "threads that make prompts and images ready; 0: one a core", stamp=False, least=0)

    @property
    def model_name(self) -> str:
        """The model as the user wrote it, wherever it was found."""
        return str(getattr(self.model, "given", self.model))

    @property
    def threads(self) -> int:
        return self.num_threads or num_cores()


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How they are computed with."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of the weights; auto: as they are stored, but 32 bits on a CPU that has no quick 16"
    )


@dataclass(frozen=True, kw_only=True)
class Serving(Weights):
    """What vLLM is told, in process or as a server."""

    max_model_len: int = key(0, "tokens of prompt and answer; 0: as many as fit", stamp=False, least=0)
    max_num_seqs: int = key(128, "answers that are written at once", stamp=False, least=1)
    images_per_prompt: int = key(1, "at most", stamp=False, least=1)
    gpu_memory_utilization: float = key(0.9, "share of a GPU's memory", stamp=False, least=0.05, most=1)
    tensor_parallel_size: int = key(1, "GPUs that share one copy of the model", stamp=False, least=1)
    kv_cache_gib: int = key(2, "on a CPU: memory for keys and values", stamp=False, least=1)
    enforce_eager: bool = key(False, "start sooner, answer more slowly: nothing is compiled", stamp=False)


def require_module(module: str, *, kind: str, how: str) -> None:
    """
    Raises:
        ConfigError: what an engine of this kind needs is not installed; `how` says what to type.
    """
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigError(f"kind {kind!r}", f"{how} ({error})") from error


def require_api_key(host: str, *, has_key: bool, where: str) -> None:
    """
    Raises:
        ConfigError: the server would listen on more than this machine and need no API key.
    """
    if not has_key and not is_loopback(host):
        raise ConfigError(
            where,
            f"on {host} anyone could send it requests: set api_key_env to the name of a variable that holds a key",
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
