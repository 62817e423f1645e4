"""A server of OpenAI's protocol that misbehaves on purpose: in front of a real one, or alone with the echo engine.

`python -m tests.support.faults --upstream http://127.0.0.1:8000 --share 0.1` puts it before a server of one's own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import threading
from collections import Counter
from itertools import count
from random import Random
from types import TracebackType
from typing import Any

from aiohttp import ClientSession, web

from pipeline.engines import Request, Sampling, echo
from pipeline.engines._scheduler import EventLoopThread

FAULTS = ("500", "429", "hang", "broken", "closed")


class Faulty:
    """Runs on 127.0.0.1 in a thread of its own. Public attributes may be changed while it runs."""

    def __init__(
        self, *, upstream: str = "", share: float = 0.0, faults: tuple[str, ...] = FAULTS, port: int = 0
    ) -> None:
        self.upstream, self.share, self.faults = upstream, share, faults
        self.delay = 0.0  # seconds that an answer takes
        self.jitter = 0.0  # share of the delay by which it may be longer or shorter
        self.status = 0  # answer everything with it
        self.key = ""  # demand it
        self.model = "echo"  # the name that it serves
        self.seen: Counter[str] = Counter()
        self.most_in_flight = 0
        self.bodies: list[dict[str, Any]] = []
        self._num_in_flight = 0
        self._numbers = count()
        self._lock = threading.Lock()
        self._loop = EventLoopThread("faulty")
        self._runner: web.AppRunner | None = None
        self._port = port  # 0: a free one

    def __enter__(self) -> Faulty:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        self._loop.run(self._start())

    def stop(self) -> None:
        """Drops all connections, as a killed server does."""
        self._loop.run(self._stop())

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._num_in_flight)
        try:
            return await self._answer_or_fault(request)
        finally:
            self._num_in_flight -= 1

    async def _answer_or_fault(self, request: web.Request) -> web.StreamResponse:
        random = Random(next(self._numbers))
        fault = random.choice(self.faults) if random.random() < self.share else ""
        self.seen[fault] += 1
        body = await request.read()
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, f"a wrong key: {request.headers.get('Authorization')}")
        if self.status:
            return _error(self.status, "as configured")
        if fault in ("500", "429"):
            return _error(int(fault), "a fault was injected")
        await asyncio.sleep(self.delay * random.uniform(1 - self.jitter, 1 + self.jitter))
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "closed" and request.transport is not None:
            request.transport.abort()
        answer = await self._forward(body) if self.upstream else self._echo(json.loads(body))
        if fault == "broken":
            return web.Response(body=answer[: len(answer) // 2], content_type="application/json")
        return web.Response(body=answer, content_type="application/json")

    async def _forward(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        async with (
            ClientSession() as session,
            session.post(f"{self.upstream}/v1/chat/completions", data=body, headers=headers) as response,
        ):
            return await response.read()

    def _echo(self, body: dict[str, Any]) -> bytes:
        self.bodies.append(body)
        (reply,) = echo.open(echo.Config()).generate([_request(body)])
        message = {"role": "assistant", "content": reply.text}
        tokens = [(token.text, token.logprobs) for token in reply.tokens or ()]
        listed = [
            {
                "token": text,
                "logprob": logprobs[text],
                "top_logprobs": [{"token": other, "logprob": value} for other, value in logprobs.items()],
            }
            for text, logprobs in tokens
        ]
        logprobs = {"content": listed} if reply.tokens is not None else None
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": logprobs}
        usage = {"prompt_tokens": reply.num_prompt_tokens, "completion_tokens": reply.num_output_tokens}
        return json.dumps({"choices": [choice], "usage": usage}).encode()


def _request(body: dict[str, Any]) -> Request:
    content = body["messages"][-1]["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    return Request(
        id="",
        prompt=parts[-1]["text"],
        system=body["messages"][0]["content"] if len(body["messages"]) > 1 else "",
        images=tuple(base64.b64decode(url.partition(",")[2]) for url in urls),
        schema=json.dumps(schema) if schema is not None else None,
        ladder=(Sampling(max_tokens=body["max_tokens"]),),
        seed=body.get("seed", 0),
        top_tokens=body.get("top_logprobs", 0),
    )


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers={"Retry-After": "0"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", default="", help="a server's address without /v1; none: the echo engine answers")
    parser.add_argument("--share", type=float, default=0.1, help="of requests that fail")
    arguments = parser.parse_args()
    with Faulty(upstream=arguments.upstream, share=arguments.share) as server:
        print(server.url, flush=True)
        threading.Event().wait()
