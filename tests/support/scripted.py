"""A server of OpenAI's protocol whose responses are written by the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.support.faults import Faulty

SOUND = "A red rectangle lies on a plain coloured ground, near its upper left corner."


class Scripted(Faulty):
    """Answers each chat request with `respond(request, body)`, and probes of its health with sound answers."""

    def __init__(self, respond: Callable[[web.Request, dict[str, Any]], Any]) -> None:
        super().__init__()
        self._respond = respond

    async def _answer_or_fault(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if b'"content": "Hello"' in body:
            return web.json_response(complete(SOUND))
        self.seen[""] += 1
        response = self._respond(request, json.loads(body))
        if isinstance(response, bytes):
            return web.Response(body=response, content_type="application/json")
        if isinstance(response, web.StreamResponse):
            return response
        if isinstance(response, dict):
            return web.json_response(response)
        sent: web.StreamResponse = await response
        return sent


def complete(content: Any, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish_reason,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 20}}
