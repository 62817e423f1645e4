"""The openai engine: requests to servers that speak OpenAI's protocol, with retries.

A request that the server rejects is a reply with an error. A failed request is retried with exponential backoff, until
it succeeds or no server has answered anything for `give_up_after` seconds. It does not know who serves, or with what
flags.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.decoding import images
from pipeline.engines import Inspection, Reply, Request, Sampling, _chat, _output, build_messages, find_no_loop
from pipeline.engines._http import ENCODINGS, MAX_BYTES, bound_bytes, read_body
from pipeline.engines._inspection import check_installed, inspect_server, read_endpoint
from pipeline.engines._options import LOOP_DETECTION, Loops, Model, Serving, require_module
from pipeline.engines._redaction import Redactor
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, ScheduledEngine, SingleFlightCache
from pipeline.errors import BadRequestError, BodyError, ConfigError, EngineDiedError, ServerError, UndecodableError
from pipeline.progress import Patience, say
from pipeline.sections import key

if TYPE_CHECKING:
    import aiohttp

HOW_TO_INSTALL = "pip install '.[openai]' in a clone of recap"
FIRST_DELAY = 0.25  # seconds before the first retry; doubled for each further one ...
MAX_DELAY = 15.0  # ... up to this
STOP_SECONDS = 0.5  # after which a wait sees that the command is asked to stop
MAX_REDIRECTS = 3  # of one request
DETECTION = "repetition_detection"  # vLLM's field, which other servers ignore or reject
BAD_REQUEST = frozenset({400, 413, 414, 415, 422})  # the request is wrong
BAD_SETUP = frozenset({401, 403, 404, 405})  # the API key, the URL or the model's name is wrong


@dataclass(frozen=True, kw_only=True)
class Serve(Serving):
    """`[engines.NAME.serve]`: how `recap serve NAME` starts vLLM. Unused for servers that run elsewhere."""

    replicas: int = key(1, "copies of the model, each on its own GPU", stamp=False, least=1)
    args: tuple[str, ...] = key((), "further flags of vLLM", stamp=False)

    def __post_init__(self) -> None:
        if any(arg.startswith(("--api-key", "--hf-token")) for arg in self.args):
            raise ValueError("args are visible in the process list; set keys with api_key_env and HF_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Config(Loops, Model):
    """`[engines.NAME]` with kind = "openai"."""

    model: str = key(help="the model's name at the server; for `recap serve` also a directory", locate="model")
    revision: str | None = key(None, "recorded with every answer, and loaded by `recap serve`")
    base_url: str | tuple[str, ...] = key(
        help='"endpoint": the server that `recap serve NAME` started; or one or more URLs that end in /v1',
        stamp=False,
        locate="endpoint",
    )
    api_key_env: str = key("", "the environment variable that holds the API key", stamp=False)
    factor: int = key(28, "sides of images are rounded to multiples of it, as the model does; 1: any", least=1)
    vllm: bool = key(True, "send top_k, repetition_penalty and what stop_loops needs, which not every server supports")
    extra: dict[str, Any] = key(factory=dict, help="further fields of every request")
    max_in_flight: int = key(128, "requests at once, over all servers", stamp=False, least=1)
    timeout: float = key(600.0, "seconds to wait for one response", stamp=False, least=0.1)
    give_up_after: float = key(600.0, "seconds without any response after which the servers count as dead", stamp=False)
    num_tries: int = key(8, "attempts at a request that a healthy server keeps failing", stamp=False, least=1)
    trust_remote_code: bool = key(False, "for `recap serve`: run Python code that comes with the model", stamp=False)
    serve: Serve = key(factory=Serve, help="how `recap serve` starts it")

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs, and files of `recap serve`."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    def __post_init__(self) -> None:
        if not self.urls or not all("://" in url or url.endswith(".json") for url in self.urls):
            raise ValueError('base_url is "endpoint", a URL such as http://127.0.0.1:8000/v1, or a list of URLs')


def inspect(config: Config) -> Inspection:
    """Asks every server for its models.

    Raises:
        ConfigError: aiohttp or the API key is missing, or a server does not have the model or rejects the key.
        EngineDiedError: a server does not answer.
    """
    check_installed("aiohttp", kind="openai", how=HOW_TO_INSTALL)
    urls = [url if "://" in url else read_endpoint(Path(url)) for url in config.urls]
    return inspect_server(urls, model=config.model_name, key=_read_key(config), key_env=config.api_key_env)


def open(config: Config) -> OpenAI:
    """Sends nothing yet: a server may still be starting.

    Raises:
        ConfigError: the environment variable of the API key is not set, or aiohttp is not installed.
    """
    require_module("aiohttp", kind="openai", how=HOW_TO_INSTALL)
    _read_key(config)
    return OpenAI(config)


def _read_key(config: Config) -> str:
    """
    Raises:
        ConfigError: the environment has no such variable.
    """
    key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
    if config.api_key_env and not key:
        raise ConfigError("api_key_env", f"the environment has no {config.api_key_env}")
    return key


class OpenAI(ScheduledEngine):
    """One or more servers of one model, with the load spread evenly."""

    def __init__(self, config: Config) -> None:
        self.model = config.model_name
        self.revision = config.revision or ""
        self._config = config
        self._rule = images.PixelRule(max_pixels=config.max_pixels, factor=config.factor)
        self._url_cache: SingleFlightCache[str] = SingleFlightCache(_chat.CACHED_IMAGES)
        self._loop = EventLoopThread("openai")
        self._client = _Client(config, model=self.model)
        self._stops_loops = config.vllm and config.stop_loops
        bounds = Bounds(
            max_in_flight=config.max_in_flight,
            saturation=config.max_in_flight,
            num_ahead=2 * config.threads + 4,
            max_unordered=4 * config.max_in_flight,
            num_threads=config.threads,
        )
        self._scheduler = RequestScheduler(bounds, prepare=self._prepare, ask=self._ask, loop=self._loop)

    def heed(self, stop: threading.Event) -> None:
        self._client.stop = stop

    def close(self) -> None:
        self._scheduler.close()
        self._loop.close(self._client.close)

    def _prepare(self, request: Request) -> str:
        """Encodes the part of the body that all attempts share: encoding images is most of the work."""
        try:
            urls = [self._url_cache(image, partial(self._encode_image, image)) for image in request.images]
        except UndecodableError as error:
            raise BadRequestError(f"an image cannot be decoded: {error}") from error
        parts = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
        body = {"model": self.model, "messages": build_messages(request, parts), **self._config.extra}
        if request.schema is not None:
            try:
                schema = {"name": "answer", "strict": True, "schema": json.loads(request.schema)}
            except json.JSONDecodeError as error:
                raise BadRequestError(f"the schema is not JSON: {error}") from error
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return json.dumps(body)[:-1]

    def _encode_image(self, image: bytes | images.Region) -> str:
        """Returns a data URL: the original bytes if the model sees just those pixels, else a lossless smaller copy."""
        if isinstance(image, images.Region) or not images.can_send_unchanged(image, self._rule):
            image = images.encode_lossless(images.decode_pixels(image, self._rule))
        kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

    async def _ask(self, prepared: str, request: Request, sampling: Sampling, seed: int) -> Reply:
        fields = _build_attempt_fields(sampling, seed, request, vllm=self._config.vllm)
        max_bytes = MAX_BYTES if self._config.extra else bound_bytes(sampling.max_tokens, request.top_tokens)
        if self._stops_loops and request.find_loop is not find_no_loop:
            try:
                return await self._send(prepared, {**fields, DETECTION: LOOP_DETECTION}, max_bytes=max_bytes)
            except BadRequestError as error:
                if DETECTION not in str(error):
                    raise
                self._stops_loops = False  # this server rejects fields that it does not know
        return await self._send(prepared, fields, max_bytes=max_bytes)

    async def _send(self, prepared: str, fields: dict[str, Any], *, max_bytes: int) -> Reply:
        return await self._client.send_request(f"{prepared}, {json.dumps(fields)[1:]}".encode(), max_bytes=max_bytes)


def _build_attempt_fields(sampling: Sampling, seed: int, request: Request, *, vllm: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed % 2**63,
    }
    if vllm:
        body |= {"top_k": sampling.top_k, "repetition_penalty": sampling.repetition_penalty, "min_p": 0.0}
    if request.top_tokens:
        body |= {"logprobs": True, "top_logprobs": request.top_tokens}
    return body


@dataclass
class _Server:
    """One base URL and its state."""

    url: str
    num_in_flight: int = 0
    num_sent: int = 0
    is_down: bool = False
    health_check: asyncio.Task[None] | None = None
    num_failed_checks: int = 0  # since it went down
    next_check: float = 0.0  # on the monotonic clock


@dataclass
class _Health:
    """The time for which all servers together have failed."""

    give_up_after: float  # seconds
    failing_since: float | None = None
    last_error: str = ""
    patience: Patience = field(default_factory=Patience)

    def record_success(self) -> None:
        self.failing_since, self.patience = None, Patience()

    def record_failure(self, error: str) -> None:
        """
        Raises:
            EngineDiedError: no server has answered for `give_up_after` seconds.
        """
        self.last_error = error
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        if (waited := now - self.failing_since) >= self.give_up_after:
            raise EngineDiedError(f"{error}; gave up after {waited:.0f} s without an answer (give_up_after)")
        if self.patience.is_due(waited):
            say(f"recap: {error}; retrying for {waited:.0f} s, at most {self.give_up_after:.0f} s (give_up_after)")


class _Client:
    """Sends requests to the least busy server and retries them. Runs on the event loop."""

    def __init__(self, config: Config, *, model: str) -> None:
        self._config, self._model = config, model
        self._key = _read_key(config)
        self._redactor = Redactor(self._key)
        self._servers: list[_Server] = []
        self._health = _Health(config.give_up_after)
        self._session: aiohttp.ClientSession | None = None
        self.stop = threading.Event()  # set once servers that are gone are not waited for

    async def close(self) -> None:
        for server in self._servers:
            if server.health_check is not None:
                server.health_check.cancel()
        if self._session is not None:
            await self._session.close()

    async def send_request(self, body: bytes, *, max_bytes: int) -> Reply:
        """Sends a request until it is answered, with at most `max_bytes` by each answer.

        Raises:
            BadRequestError: the servers reject it.
            EngineDiedError: the servers are gone, or reject the API key, the URL or the model's name.
        """
        num_failures = 0
        while True:
            server = await self._pick_server()
            try:
                reply = await self._send_once(server, body, max_bytes=max_bytes)
            except ServerError as error:
                self._start_health_check(server)
                num_failures += 1
                if num_failures >= self._config.num_tries and await self._is_healthy(server):
                    raise BadRequestError(f"failed {num_failures} times, the last time: {error}") from error
                await self._wait_after(str(error), max(error.wait, self._choose_delay(num_failures)))
            else:
                self._health.record_success()
                return reply

    async def _pick_server(self) -> _Server:
        """Returns the least busy server; waits while all are down."""
        while True:
            self._update_servers()
            now = time.monotonic()
            for server in self._servers:
                if server.is_down and now >= server.next_check:
                    self._start_health_check(server)
            if up := [server for server in self._servers if not server.is_down]:
                return min(up, key=lambda server: (server.num_in_flight, server.num_sent))
            missing = f"{self._config.base_url} does not exist or cannot be read; `recap serve` writes it"
            await self._wait_after(self._health.last_error if self._servers else missing, self._choose_delay(3))

    async def _wait_after(self, error: str, seconds: float) -> None:
        """
        Raises:
            EngineDiedError: no server has answered for `give_up_after` seconds, or the command is asked to stop.
        """
        self._health.record_failure(error)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.stop.is_set():
                raise EngineDiedError(f"{error}; stopped without waiting for it")
            await asyncio.sleep(min(left, STOP_SECONDS))

    def _update_servers(self) -> None:
        """Reads the URLs again while a server is down: a restarted one may have another port."""
        if self._servers and not any(server.is_down for server in self._servers):
            return
        urls = [url for value in self._config.urls for url in _resolve_urls(value)]
        if urls and urls != [server.url for server in self._servers]:
            known = {server.url: server for server in self._servers}
            self._servers = [known.get(url) or _Server(url) for url in urls]

    async def _send_once(self, server: _Server, body: bytes, *, max_bytes: int) -> Reply:
        server.num_in_flight += 1
        server.num_sent += 1
        try:
            reply = self._read_reply(await self._post(server, body, max_bytes=max_bytes), server.url)
        finally:
            server.num_in_flight -= 1
        server.is_down = False
        return reply

    async def _post(self, server: _Server, body: bytes, *, max_bytes: int) -> bytes:
        import aiohttp

        url = f"{server.url}/chat/completions"
        try:
            response, content = await self._exchange(url, body, max_bytes=max_bytes)
        except TimeoutError as error:
            raise ServerError(f"{url} gave no answer in {self._config.timeout:g} s") from error
        except BodyError as error:
            raise ServerError(f"{url} {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            quoted = self._redactor.quote(str(error))
            raise ServerError(f"{url} cannot be reached: {type(error).__name__} {quoted}") from error
        if response.status == 200:
            return content
        if 300 <= response.status < 400:
            given = response.headers.get("Location", "nowhere")
            target = self._redactor.quote(re.sub(r"//[^/?#]*@", "//", given))  # without a user and password
            raise EngineDiedError(f"{url} redirects to {target}; pictures are not sent there unless base_url names it")
        message = f"{url} answered {response.status}: {self._redactor.quote(_extract_error(content))}"
        if response.status in BAD_REQUEST:
            self._health.record_success()
            raise BadRequestError(message)
        if response.status in BAD_SETUP:
            raise EngineDiedError(message)
        raise ServerError(message, wait=_parse_retry_after(response.headers))

    async def _exchange(self, url: str, body: bytes, *, max_bytes: int) -> tuple[aiohttp.ClientResponse, bytes]:
        """Sends a request, and again where the same server redirects it to; returns the last response and its body."""
        num_redirects = 0
        while True:
            async with self._open_session().post(
                url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False
            ) as response:
                encoding = response.headers.get("Content-Encoding", "")
                content = await read_body(response.content.iter_any(), encoding=encoding, max_bytes=max_bytes)
            target = _find_redirect(response)
            if target is None or num_redirects == MAX_REDIRECTS:
                return response, content
            url, num_redirects = target, num_redirects + 1

    def _open_session(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Accept-Encoding": ENCODINGS}
                | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=5),
            )
        return self._session

    def _read_reply(self, body: bytes, url: str) -> Reply:
        mask = self._redactor.mask_answer
        try:
            output = _output.parse_completion(self._redactor.mask_body(body))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            quoted = self._redactor.quote(body.decode(errors="replace"))
            raise ServerError(f"{url} sent a malformed response ({type(error).__name__}): {quoted}") from error
        return Reply(
            **vars(output)
            | {
                "text": mask(output.text),
                "finish_reason": output.finish_reason and mask(output.finish_reason),
                "fault": mask(output.fault),
                "error": None if output.error is None else self._redactor.quote(output.error),
            }
        )

    def _start_health_check(self, server: _Server) -> None:
        if server.health_check is None or server.health_check.done():
            server.health_check = asyncio.get_running_loop().create_task(self._check_health(server))

    async def _check_health(self, server: _Server) -> None:
        """Records whether the server is up; one that is down gets no requests until a later check succeeds."""
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=10)
            async with self._open_session().get(
                f"{server.url.removesuffix('/v1')}/health", timeout=timeout, allow_redirects=False
            ) as response:
                server.is_down = response.status >= 500
        except (TimeoutError, aiohttp.ClientError, OSError):
            server.is_down = True
        server.num_failed_checks = server.num_failed_checks + 1 if server.is_down else 0
        server.next_check = time.monotonic() + self._choose_delay(server.num_failed_checks)

    def _choose_delay(self, num_failures: int) -> float:
        """Returns seconds, doubled with each failure, with jitter so that clients do not return all at once."""
        longest = min(MAX_DELAY, self._config.give_up_after / 10)
        return min(FIRST_DELAY * 2.0 ** (num_failures - 1), longest) * random.uniform(0.5, 1.5)

    async def _is_healthy(self, server: _Server) -> bool:
        """Tests the server with a trivial request, to tell a bad request from a bad server."""
        probe = {"model": self._model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            await self._send_once(server, json.dumps(probe).encode(), max_bytes=MAX_BYTES)
        except (ServerError, BadRequestError):
            return False
        self._health.record_success()
        return True


def _resolve_urls(given: str) -> list[str]:
    """Returns the base URLs of one value of `base_url`: the URL itself, or the one in the endpoint's file, if any."""
    if "://" in given:
        return [given.rstrip("/")]
    try:
        endpoint = json.loads(Path(given).read_text(encoding="utf-8"))
        return [str(endpoint["base_url"]).rstrip("/")]
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # or another program is just writing it
        return []


def _find_redirect(response: aiohttp.ClientResponse) -> str | None:
    """Returns the URL to which the server redirects the request; None if it does not, or to another server."""
    from yarl import URL

    location = response.headers.get("Location")
    if response.status not in (307, 308) or location is None:
        return None
    try:
        target = response.url.join(URL(location))
        return str(target) if target.origin() == response.url.origin() else None
    except ValueError:
        return None


def _parse_retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(float(headers.get("Retry-After", 0)), 60.0)
    except ValueError:  # a date
        return 0.0


def _extract_error(body: bytes) -> str:
    """Returns the error message of a response, or else all of it."""
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        text = json.loads(text)["error"]["message"]
    return str(text)
