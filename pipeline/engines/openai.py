"""Decides how a server that speaks OpenAI's protocol is asked, and when one that does not answer is given up.

A request that the server refuses is a reply with an error. A server in trouble is asked again, ever less often, until
it is back or has given no answer at all for `give_up_after` seconds. It does not know who serves, or with what flags.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.decoding import images
from pipeline.engines import Reply, Request, Sampling, _chat
from pipeline.engines._options import Model, Serving, require_module
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, ScheduledEngine, SingleFlightCache
from pipeline.errors import BadRequestError, ConfigError, EngineDiedError, ServerError, UndecodableError
from pipeline.sections import key

if TYPE_CHECKING:
    import aiohttp

FIRST_DELAY = 0.25  # seconds before a request is sent again; doubled each time ...
MOST_DELAY = 15.0  # ... up to this
REFUSED = frozenset({400, 413, 414, 415, 422})  # the request is to blame
FORBIDDEN = frozenset({401, 403, 404, 405})  # the user is: key, URL or model's name
MOST_SAID = 300  # characters of a server's answer that a message repeats


@dataclass(frozen=True, kw_only=True)
class Serve(Serving):
    """`[engines.NAME.serve]`: how `recap serve NAME` starts vLLM. Nothing for servers that others run."""

    replicas: int = key(1, "copies of the model, each on its own GPU", stamp=False, least=1)
    args: tuple[str, ...] = key((), "more of vLLM's own flags", stamp=False)

    def __post_init__(self) -> None:
        if any(arg.startswith(("--api-key", "--hf-token")) for arg in self.args):
            raise ValueError("a key in args would stand in a command line; api_key_env and HF_TOKEN are for keys")


@dataclass(frozen=True, kw_only=True)
class Config(Model):
    """`[engines.NAME]` with kind = "openai"."""

    model: str = key(help="the model's name at the server; for `recap serve` also a folder", locate="model")
    revision: str | None = key(None, "recorded with every answer; `recap serve` loads it")
    base_url: str | tuple[str, ...] = key(
        help='"endpoint": the server that `recap serve NAME` started; or one or several URLs that end in /v1',
        stamp=False,
        locate="endpoint",
    )
    api_key_env: str = key("", "the environment variable that holds the API key", stamp=False)
    factor: int = key(28, "sides of pictures are multiples of it, as the model rounds them itself; 1: any", least=1)
    vllm: bool = key(True, "send top_k and repetition_penalty, which not every server knows")
    extra: dict[str, Any] = key(factory=dict, help="more fields of every request")
    max_in_flight: int = key(128, "requests at once, over all servers", stamp=False, least=1)
    timeout: float = key(600.0, "seconds for one answer", stamp=False, least=0.1)
    give_up_after: float = key(600.0, "seconds without any answer after which the servers count as dead", stamp=False)
    num_tries: int = key(8, "for a request at which a server that is well fails again and again", stamp=False, least=1)
    trust_remote_code: bool = key(False, "for `recap serve`: run Python code that comes with the model", stamp=False)
    serve: Serve = key(factory=Serve, help="how `recap serve` starts it")

    def __post_init__(self) -> None:
        urls = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        if not urls or not all("://" in url or url.endswith(".json") for url in urls):
            raise ValueError('base_url is "endpoint", a URL such as http://127.0.0.1:8000/v1, or a list of URLs')


def open(config: Config) -> OpenAI:  # noqa: A001
    """Asks nothing yet: a server may still be starting.

    Raises:
        ConfigError: the environment has no API key, or aiohttp is not installed.
    """
    require_module("aiohttp", kind="openai", how="pip install 'recap-pipeline[openai]'")
    if config.api_key_env and not os.environ.get(config.api_key_env):
        raise ConfigError("api_key_env", f"the environment has no {config.api_key_env}")
    return OpenAI(config)


class OpenAI(ScheduledEngine):
    """One or several servers of one model, asked evenly."""

    def __init__(self, config: Config) -> None:
        self.model = config.model_name
        self.revision = config.revision or ""
        self._config = config
        self._rule = images.PixelRule(max_pixels=config.max_pixels, factor=config.factor)
        self._decoded: SingleFlightCache[str] = SingleFlightCache(_chat.CACHED_IMAGES)
        self._loop = EventLoopThread("openai")
        self._servers = _Servers(config, model=self.model)
        bounds = Bounds(
            max_in_flight=config.max_in_flight,
            enough=config.max_in_flight,
            num_ahead=2 * config.threads + 4,
            max_unordered=4 * config.max_in_flight,
            num_threads=config.threads,
        )
        self._window = RequestScheduler(bounds, prepare=self._prepare, ask=self._ask, loop=self._loop)

    def close(self) -> None:
        self._window.close()
        self._loop.close(self._servers.close)

    def _prepare(self, request: Request) -> str:
        """The part of the body that all attempts share, as JSON: encoding pictures is most of the work."""
        try:
            urls = [self._decoded(image, partial(self._data_url, image)) for image in request.images]
        except UndecodableError as error:
            raise BadRequestError(f"an image cannot be shown: {error}") from error
        body = {"model": self.model, "messages": _messages(request, urls), **self._config.extra}
        if request.schema is not None:
            body["response_format"] = _response_format(request.schema)
        return json.dumps(body)[:-1]

    def _data_url(self, image: bytes) -> str:
        """The original bytes where these are what the model would see; else the reduced picture, losslessly."""
        if not images.can_send_unchanged(image, self._rule):
            image = images.encode_lossless(images.decode_pixels(image, self._rule))
        kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

    async def _ask(self, prepared: str, request: Request, sampling: Sampling, seed: int) -> Reply:
        rest = json.dumps(_build_attempt_fields(sampling, seed, request, vllm=self._config.vllm))
        return await self._servers.ask(f"{prepared}, {rest[1:]}".encode())


def _messages(request: Request, urls: list[str]) -> list[dict[str, Any]]:
    shown = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": [*shown, {"type": "text", "text": request.prompt}]}]


def _response_format(schema: str) -> dict[str, Any]:
    try:
        return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": json.loads(schema)}}
    except json.JSONDecodeError as error:
        raise BadRequestError(f"the schema is not JSON: {error}") from error


def _build_attempt_fields(sampling: Sampling, seed: int, request: Request, *, vllm: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed % 2**63,
    }
    if vllm:
        body |= {"top_k": sampling.top_k, "repetition_penalty": sampling.repetition_penalty, "min_p": 0.0}
    if request.logprobs:
        body["logprobs"] = True
    return body


@dataclass
class _Server:
    """One base URL, and how it fares."""

    url: str
    num_in_flight: int = 0
    down: bool = False
    checking: asyncio.Task[None] | None = None
    num_checks: int = 0  # in vain, since it went down
    check_at: float = 0.0


@dataclass
class _Health:
    """When all servers together last gave a sign of life."""

    give_up_after: float
    troubled_since: float | None = None
    last: str = field(default="")  # what was wrong

    def good(self) -> None:
        self.troubled_since = None

    def bad(self, what: str) -> None:
        """Raises EngineDiedError when nothing but trouble came for too long."""
        self.last = what
        now = time.monotonic()
        self.troubled_since = self.troubled_since or now
        if (waited := now - self.troubled_since) >= self.give_up_after:
            raise EngineDiedError(f"{what}; gave up after {waited:.0f} s without an answer (give_up_after)")


class _Servers:
    """Sends a request to the server with the least to do, and again until it is answered. Lives on the loop."""

    def __init__(self, config: Config, *, model: str) -> None:
        self._config, self._model = config, model
        self._key = os.environ[config.api_key_env] if config.api_key_env else ""
        self._servers: list[_Server] = []
        self._health = _Health(config.give_up_after)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        for server in self._servers:
            if server.checking is not None:
                server.checking.cancel()
        if self._session is not None:
            await self._session.close()

    async def ask(self, body: bytes) -> Reply:
        """Raises:
        BadRequestError: the servers refuse it.
        EngineDiedError: they are gone, or do not want to talk to us.
        """
        num_failures = 0
        while True:
            server = await self._free_server()
            try:
                answer = await self._send(server, body)
            except ServerError as trouble:
                self._check_soon(server)
                num_failures += 1
                if num_failures >= self._config.num_tries and await self._is_well(server):
                    raise BadRequestError(f"failed {num_failures} times, the last time: {trouble}") from trouble
                self._health.bad(str(trouble))
                await asyncio.sleep(max(trouble.wait, self._delay(num_failures)))
            else:
                self._health.good()
                return answer

    async def _free_server(self) -> _Server:
        """The server in use that has the least to do; waits while all are down."""
        while True:
            self._read_urls()
            now = time.monotonic()
            for server in self._servers:
                if server.down and now >= server.check_at:
                    self._check_soon(server)
            if up := [server for server in self._servers if not server.down]:
                return min(up, key=lambda server: server.num_in_flight)
            none = f"no server has written {self._config.base_url}; `recap serve` does"
            self._health.bad(self._health.last if self._servers else none)
            await asyncio.sleep(self._delay(3))

    def _read_urls(self) -> None:
        """Takes over which servers there are: one that was started again may have another port."""
        if self._servers and not any(server.down for server in self._servers):
            return
        given = self._config.base_url
        urls = [url for one in ((given,) if isinstance(given, str) else given) for url in _urls(one)]
        if urls and urls != [server.url for server in self._servers]:
            known = {server.url: server for server in self._servers}
            self._servers = [known.get(url) or _Server(url) for url in urls]

    async def _send(self, server: _Server, body: bytes) -> Reply:
        server.num_in_flight += 1
        try:
            reply = _reply(await self._post(server, body), server.url)
        finally:
            server.num_in_flight -= 1
        server.down = False
        return reply

    async def _post(self, server: _Server, body: bytes) -> bytes:
        import aiohttp

        url = f"{server.url}/chat/completions"
        try:
            async with self._opened().post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                said = await response.read()
        except TimeoutError as error:
            raise ServerError(f"{url} gave no answer in {self._config.timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(
                f"{url} cannot be reached: {type(error).__name__} {self._without_key(str(error))}"
            ) from error
        if response.status == 200:
            return said
        message = f"{url} answered {response.status}: {self._without_key(_told(said))}"
        if response.status in REFUSED:
            self._health.good()
            raise BadRequestError(message)
        if response.status in FORBIDDEN:
            raise EngineDiedError(message)
        raise ServerError(message, wait=_asked_to_wait(response.headers))

    def _opened(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=10),
            )
        return self._session

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _check_soon(self, server: _Server) -> None:
        if server.checking is None or server.checking.done():
            server.checking = asyncio.get_running_loop().create_task(self._check(server))

    async def _check(self, server: _Server) -> None:
        """Notes whether there is a server at all: one that is not is left alone for a while."""
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=10)
            async with self._opened().get(f"{server.url.removesuffix('/v1')}/health", timeout=timeout) as response:
                server.down = response.status >= 500
        except (TimeoutError, aiohttp.ClientError, OSError):
            server.down = True
        server.num_checks = server.num_checks + 1 if server.down else 0
        server.check_at = time.monotonic() + self._delay(server.num_checks)

    def _delay(self, num_failures: int) -> float:
        """Seconds, doubled with each failure, with jitter so that not all come back at once."""
        most = min(MOST_DELAY, self._config.give_up_after / 10)
        return min(FIRST_DELAY * 2.0 ** (num_failures - 1), most) * random.uniform(0.5, 1.5)

    async def _is_well(self, server: _Server) -> bool:
        """Whether the server still answers the simplest question, so that it is the other one that it fails at."""
        question = {"model": self._model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            await self._send(server, json.dumps(question).encode())
        except (ServerError, BadRequestError):
            return False
        self._health.good()
        return True


def _urls(given: str) -> list[str]:
    """The base URLs that a value of `base_url` stands for: itself, or what the endpoint's file says."""
    if "://" in given:
        return [given.rstrip("/")]
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [str(found["base_url"]).rstrip("/")]


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    try:
        return min(float(headers.get("Retry-After", 0)), 60.0)
    except ValueError:  # a date
        return 0.0


def _told(said: bytes) -> str:
    """What a server says is wrong, in one line."""
    text = said.decode(errors="replace")
    try:
        found = json.loads(text)
        text = found["error"]["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:MOST_SAID]


def _reply(said: bytes, url: str) -> Reply:
    try:
        answer = json.loads(said)
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        logprobs = choice.get("logprobs")
        return Reply(
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            num_prompt_tokens=usage.get("prompt_tokens"),
            num_output_tokens=usage.get("completion_tokens"),
            logprobs=tuple(token["logprob"] for token in logprobs["content"]) if logprobs else None,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        told = " ".join(said[:MOST_SAID].decode(errors="replace").split())
        raise ServerError(f"{url} answered what is no answer ({type(error).__name__}): {told}") from error
