"""Inspection of models and servers before they are opened: their existence, their context, and if they take images.

No weights are loaded and no prompt is sent.
"""

from __future__ import annotations

import json
import platform
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.engines import Inspection
from pipeline.engines._options import Model
from pipeline.engines._redaction import Redactor
from pipeline.errors import ConfigError, EngineDiedError

TIMEOUT = 5.0  # seconds for a server to list its models
MAX_BODY = 2**20  # bytes of that list
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
VISION = re.compile(r"vis|imag|img|vit|clip|pixel", re.IGNORECASE)  # in the keys of a model's config.json
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # files of models that take more than text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would take the API key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)  # as the engine: past http_proxy


def check_installed(module: str, *, kind: str, how: str) -> None:
    """Looks for a module without importing it.

    Raises:
        ConfigError: it is not installed; `how` is the command that installs it.
    """
    if find_spec(module) is None:
        raise ConfigError(f"kind {kind!r}", f"{how} (there is no module {module})")


def inspect_model(config: Model, *, max_model_len: int = 0) -> Inspection:
    """Reads the config.json of a model in a directory, in the cache, or on the Hub.

    Raises:
        ConfigError: there is no such model, or it has no weights in safetensors.
    """
    folder, where = Path(config.model), f"model {config.model!r}"
    values = _read_config(folder / "config.json", where) if folder.is_dir() else _read_hub_config(config, where)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ConfigError(where, "has no weights: there is no .safetensors file in it")
    text = values.get("text_config")
    longest = {**values, **(text if isinstance(text, dict) else {})}.get("max_position_embeddings")
    has_processor = any((folder / name).exists() for name in PROCESSORS)
    takes_images = has_processor or any(VISION.search(name) for name in values)
    context = max_model_len or (longest if isinstance(longest, int) else None)
    return Inspection(
        summary=f"{config.model_name} is there ({values.get('model_type', 'of unknown type')})",
        takes_images=takes_images,
        context=context,
    )


def _read_config(file: Path, where: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(where, "is no model: there is no config.json in it") from error
    except (OSError, ValueError) as error:
        raise ConfigError(where, f"its config.json cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _read_hub_config(config: Model, where: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if not HUB_NAME.fullmatch(config.model):
        raise ConfigError(where, "is neither a directory nor a name on the Hugging Face Hub")
    try:
        file = hf_hub_download(config.model, "config.json", revision=config.revision, etag_timeout=TIMEOUT)
    except (OSError, HFValidationError) as error:  # the Hub's errors are OSErrors
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = "is the name right, and is HF_TOKEN set if access is restricted?"
        raise ConfigError(where, f"neither a directory nor on the Hub: {first_line} ({advice})") from error
    return _read_config(Path(file), where)


def inspect_server(urls: Sequence[str], *, model: str, key: str, key_env: str) -> Inspection:
    """Asks servers of OpenAI's protocol for their models.

    Raises:
        ConfigError: a server does not have the model, rejects the API key, or is none of this protocol.
        EngineDiedError: a server does not answer.
    """
    contexts = [_inspect_url(url, model=model, key=key, key_env=key_env) for url in urls]
    context = min((one for one in contexts if one), default=None)
    length = f", with a context of {context} tokens" if context else ""
    return Inspection(summary=f"{', '.join(urls)} answers and has {model}{length}", context=context)


def _inspect_url(url: str, *, model: str, key: str, key_env: str) -> int | None:
    """The context of the model at one server, if it names it."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError("base_url", f"{url} is not an http or https URL")
    redactor = Redactor(key)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with DIRECT.open(urllib.request.Request(f"{url}/models", headers=headers), timeout=TIMEOUT) as response:
            body = response.read(MAX_BODY)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            advice = f"it rejects the key in {key_env}" if key else "it requires one; name its environment variable"
            raise ConfigError("api_key_env", f"{url} answers {error.code}: {advice}") from error
        if error.code < 500:
            message = f"{url}/models answers {error.code}; is this the server, and does the URL end in its /v1?"
            raise ConfigError("base_url", message) from error
        raise EngineDiedError(f"{url}/models answers {error.code}; see the server's log") from error
    except (OSError, ValueError, HTTPException) as error:
        reason = redactor.quote(str(getattr(error, "reason", error)))
        raise EngineDiedError(f"{url} does not answer: {reason}; start its server, or correct base_url") from error
    models = _parse_models(body)
    if models is None:
        raise ConfigError("base_url", f"{url}/models answers, but not as OpenAI's protocol has it: is this the server?")
    if model not in models:
        known = redactor.quote(", ".join(models) or "none")
        raise ConfigError("model", f"{url} does not have {model!r}; it has {known}")
    return models[model]


def _parse_models(body: bytes) -> Mapping[str, int | None] | None:
    """The models in a response of /models with their contexts; None if it is something else."""
    try:
        models = json.loads(body)["data"]
        lengths = {str(one["id"]): one.get("max_model_len") for one in models}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return {name: length if isinstance(length, int) else None for name, length in lengths.items()}


def read_endpoint(file: Path) -> str:
    """The URL in the file that `recap serve` writes.

    Raises:
        EngineDiedError: there is no such file, it is damaged, or its server has ended.
    """
    advice = "start the server with `recap serve`"
    try:
        endpoint = json.loads(file.read_text(encoding="utf-8"))
        url, host, pid = str(endpoint["base_url"]), endpoint.get("host"), endpoint.get("pid")
    except FileNotFoundError as error:
        raise EngineDiedError(f"no server is running: {file} does not exist; {advice}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineDiedError(f"{file} is damaged; remove it and {advice} again") from error
    if host == platform.node() and isinstance(pid, int) and not Path(f"/proc/{pid}").exists():
        raise EngineDiedError(f"the server of {file} has ended; {advice} again")
    return url.rstrip("/")
