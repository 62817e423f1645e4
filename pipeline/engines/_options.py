"""The keys that several engines have in common, each named, bounded and explained once."""

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
    """The model and its input."""

    model: str = key(help="a directory, or a model's name on the Hugging Face Hub", locate="model")
    revision: str | None = key(None, "a branch, tag or commit on the Hub; pin it")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    max_pixels: int = key(MAX_PIXELS, "larger images are scaled down to this many pixels", least=28 * 28)
    num_threads: int = key(0, "threads that prepare prompts and images; 0: one per core", stamp=False, least=0)

    @property
    def model_name(self) -> str:
        """The model as the user wrote it, before its path was resolved."""
        return str(getattr(self.model, "given", self.model))

    @property
    def threads(self) -> int:
        return self.num_threads or num_cores()


@dataclass(frozen=True, kw_only=True)
class Loops:
    """Early stops."""

    stop_loops: bool = key(
        True, "let vLLM stop a caption in prose as soon as it loops; no caption that is ok changes", stamp=False
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Number formats."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of the weights; auto: as stored, but 32 bits on a CPU without fast 16-bit arithmetic"
    )


@dataclass(frozen=True, kw_only=True)
class Serving(Weights):
    """vLLM's options, in process or as a server."""

    max_model_len: int = key(0, "tokens of prompt and answer together; 0: as many as fit", stamp=False, least=0)
    max_num_seqs: int = key(128, "requests that are decoded at once", stamp=False, least=1)
    images_per_prompt: int = key(1, "maximum number of images in a prompt", stamp=False, least=1)
    gpu_memory_utilization: float = key(0.9, "share of a GPU's memory", stamp=False, least=0.05, most=1)
    tensor_parallel_size: int = key(1, "GPUs that share one copy of the model", stamp=False, least=1)
    kv_cache_gib: int = key(2, "on a CPU: GiB of memory for keys and values", stamp=False, least=1)
    enforce_eager: bool = key(False, "skip compilation: starts sooner, answers more slowly", stamp=False)


# vLLM's repetition_detection: an answer stops when it ends with `min_count` copies of one sequence of tokens. Sequences
# of 16 tokens and more have at least 5 words in most languages, and 8 copies of 5 words are what
# stages/text/repetition.py calls a loop; shorter sequences are found as a multiple of themselves. For each token after
# the first 128, vLLM's scheduler compares up to 16 lengths in Python: a wider range would slow short steps of large
# batches.
LOOP_DETECTION = {"min_pattern_size": 16, "max_pattern_size": 31, "min_count": 8}


def require_module(module: str, *, kind: str, how: str) -> None:
    """
    Raises:
        ConfigError: the module is not installed; `how` is the command that installs it.
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
