"""The openai engine against servers that fail in many ways."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from pipeline import config, progress
from pipeline.engines import Request, Sampling, openai
from pipeline.errors import ConfigError, EngineDiedError
from tests.support import tiny
from tests.support.faults import Faulty

PICTURE = tiny.make_picture(0, edge=224)


def opened(*servers: Faulty, **changes: Any) -> closing[openai.OpenAI]:
    urls = tuple(server.url for server in servers)
    keys = {"model": "echo", "base_url": urls, "max_in_flight": 16, "timeout": 60.0, "give_up_after": 20.0}
    return closing(openai.open(openai.Config(**{**keys, **changes})))


def request(n: int, **changes: Any) -> Request:
    keys: dict[str, Any] = {"id": str(n), "prompt": f"Describe picture {n}.", "images": (PICTURE,), "seed": n}
    return Request(**{**keys, "ladder": (Sampling(max_tokens=64),), **changes})


def undisturbed(num: int) -> list[str]:
    with Faulty() as server, opened(server) as engine:
        return [reply.text for reply in engine.generate(request(n) for n in range(num))]


@pytest.mark.slow
def test_retried_requests_get_the_same_answers() -> None:
    with Faulty(share=0.1) as server, opened(server, timeout=2.0) as engine:
        replies = list(engine.generate(request(n) for n in range(200)))
    assert set(server.seen) == {"", "500", "429", "hang", "broken", "closed"}
    assert [reply.text for reply in replies] == undisturbed(200)


@pytest.mark.slow
def test_max_in_flight_is_reached_and_not_exceeded() -> None:
    class Gathering(Faulty):
        async def _answer_or_fault(self, request: web.Request) -> web.StreamResponse:
            while self.most_in_flight < 16:
                await asyncio.sleep(0.01)
            return await super()._answer_or_fault(request)

    # Without the fault `hang`: the server would count requests that the client has given up.
    with Gathering(share=0.1, faults=("500", "429", "broken", "closed")) as server, opened(server) as engine:
        assert len(list(engine.generate(request(n) for n in range(200)))) == 200
    assert server.most_in_flight == 16


@pytest.mark.slow
def test_a_restarted_server_is_used_again() -> None:
    with Faulty() as server, opened(server) as engine:
        replies = engine.generate(request(n) for n in range(100))
        texts = [next(replies).text for _ in range(10)]
        server.stop()
        threading.Timer(1.0, server.start).start()
        texts += [reply.text for reply in replies]
    assert texts == undisturbed(100)


def test_a_server_that_stays_dead_ends_the_engine_with_its_url_and_the_seconds_waited() -> None:
    with Faulty() as server, opened(server, give_up_after=1.0) as engine:
        replies = engine.generate(request(n) for n in range(100))
        next(replies)
        server.stop()
        with pytest.raises(EngineDiedError, match=rf"{server.url}/chat/completions cannot be reached: .* after \d+ s"):
            list(replies)


def test_a_dead_server_is_reported_before_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_REPORT", 0.0)
    with Faulty() as server, opened(server, give_up_after=1.0) as engine:
        server.stop()
        with pytest.raises(EngineDiedError):
            list(engine.generate([request(0)]))
    assert f"{server.url}/chat/completions cannot be reached" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_only_returns_errors_counts_as_dead(status: int) -> None:
    with Faulty() as server, opened(server, give_up_after=1.0, num_tries=2) as engine:
        server.status = status
        with pytest.raises(EngineDiedError, match=rf"answered {status}: as configured; gave up after \d+ s"):
            list(engine.generate([request(0)]))


@pytest.mark.slow
def test_a_server_that_hangs_counts_as_dead() -> None:
    with (
        Faulty(share=1.0, faults=("hang",)) as server,
        opened(server, give_up_after=1.0, timeout=0.5) as engine,
        pytest.raises(EngineDiedError, match=r"no answer in 0.5 s; gave up after \d+ s"),
    ):
        list(engine.generate([request(0)]))


def test_a_request_that_a_healthy_server_keeps_failing_is_an_error() -> None:
    class Poisoned(Faulty):
        def _echo(self, body: dict[str, Any]) -> bytes:
            if "picture 3" in json.dumps(body["messages"]):
                raise ZeroDivisionError  # aiohttp answers 500
            return super()._echo(body)

    with Poisoned() as server, opened(server, num_tries=2) as engine:
        replies = list(engine.generate(request(n) for n in range(8)))
    assert [reply.error is None for reply in replies] == [n != 3 for n in range(8)]
    assert "failed 2 times" in str(replies[3].error) and "500" in str(replies[3].error)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_rejected_request_is_an_error_without_a_retry(status: int) -> None:
    with Faulty() as server, opened(server) as engine:
        server.status = status
        (reply,) = engine.generate([request(0)])
        assert f"answered {status}: as configured" in str(reply.error)
    assert server.seen.total() == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_url_or_model_ends_the_engine_at_once(status: int) -> None:
    with Faulty() as server, opened(server) as engine:
        server.status = status
        with pytest.raises(EngineDiedError, match=f"{server.url}/chat/completions answered {status}"):
            list(engine.generate(request(n) for n in range(100)))


def test_the_api_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame-1234")
    with Faulty() as server, opened(server, api_key_env="SOME_KEY") as engine:
        server.key = "sesame-1234"
        (reply,) = engine.generate([request(0)])
        assert reply.error is None
        server.key = "another"
        with pytest.raises(EngineDiedError, match="401") as raised:
            list(engine.generate([request(0)]))
        shown = f"{raised.value} {engine!r} {vars(engine)!r} {config.stamped(engine._config)}"
    assert "sesame" not in shown and "***" in shown


def test_a_missing_api_key_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no NO_SUCH_KEY"):
        openai.open(openai.Config(model="x", base_url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY"))


def test_servers_share_the_load_and_a_dead_one_is_skipped() -> None:
    with Faulty() as first, Faulty() as second, Faulty() as dead, opened(first, second, dead) as engine:
        dead.stop()
        texts = [reply.text for reply in engine.generate(request(n) for n in range(100))]
        assert texts == undisturbed(100)
    assert min(first.seen.total(), second.seen.total()) > 20


@pytest.mark.slow
def test_a_server_restarted_on_another_port_is_found_by_its_endpoint_file(tmp_path: Path) -> None:
    file = tmp_path / "endpoint.json"
    with Faulty() as first, Faulty() as second, opened(base_url=str(file)) as engine:
        replies = engine.generate(request(n) for n in range(150))
        threading.Timer(0.3, lambda: file.write_text(json.dumps({"base_url": first.url}))).start()
        texts = [next(replies).text for _ in range(10)]
        first.stop()
        file.write_text(json.dumps({"base_url": second.url}))
        texts += [reply.text for reply in replies]
    assert texts == undisturbed(150)
    assert second.seen.total() > 0


@pytest.mark.parametrize("text", ["", '{"base_url": "http://127', "[]", "3", '{"url": "http://127.0.0.1:1/v1"}', "\0"])
def test_a_cut_endpoint_file_counts_as_missing_and_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "endpoint.json"
    file.write_text(text)
    with opened(base_url=str(file), give_up_after=0.5) as engine, pytest.raises(EngineDiedError) as raised:
        list(engine.generate([request(0)]))
    assert f"{file} does not exist or cannot be read; `recap serve` writes it" in str(raised.value)


def test_images_of_the_right_size_are_sent_unchanged_and_others_reduced_losslessly() -> None:
    large = tiny.make_picture(1, edge=500)
    with Faulty() as server, opened(server, max_pixels=224 * 224) as engine:
        list(engine.generate([request(0), request(1, images=(large,))]))
    first, second = (base64.b64decode(_url(body).partition(",")[2]) for body in server.bodies)
    assert first == PICTURE
    with Image.open(BytesIO(second)) as image:
        assert image.format == "PNG" and image.size == (224, 224)


def _url(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"][0]["image_url"]["url"])


def test_examples_are_earlier_turns_of_the_chat() -> None:
    other = tiny.make_picture(3)
    shown = request(0, system="Be brief.", images=(other, PICTURE), examples=(("And this?", "A cat."),))
    with Faulty() as server, opened(server, max_pixels=224 * 224) as engine:
        list(engine.generate([shown]))
    (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    sent = [message["content"] for message in body["messages"][1:]]
    images = [base64.b64decode(sent[n][0]["image_url"]["url"].partition(",")[2]) for n in (0, 2)]
    assert images == [other, PICTURE]
    assert [content[-1]["text"] for content in sent] == ["And this?", "A cat.", shown.prompt]


def test_all_sampling_parameters_are_sent() -> None:
    with Faulty() as server, opened(server) as engine:
        list(engine.generate([request(7, system="Be brief.", ladder=(Sampling(temperature=0.5, top_k=9),))]))
    (body,) = server.bodies
    sampling = {
        name: body[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")
    }
    assert list(sampling.values()) == [0.5, 1.0, 9, 1.0, 512, 7]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def loop(text: str) -> str:
    return "a loop" if text else ""


@pytest.mark.parametrize(("keys", "is_sent"), [({}, True), ({"stop_loops": False}, False), ({"vllm": False}, False)])
def test_loops_are_stopped_by_servers_that_can(keys: dict[str, Any], is_sent: bool) -> None:
    with Faulty() as server, opened(server, **keys) as engine:
        assert all(reply.error is None for reply in engine.generate([request(0, find_loop=loop), request(1)]))
    assert ["repetition_detection" in body for body in server.bodies].count(True) == is_sent


def test_a_server_that_rejects_unknown_fields_gets_them_once() -> None:
    class Strict(Faulty):
        async def _answer_or_fault(self, request: web.Request) -> web.StreamResponse:
            if "repetition_detection" in await request.json():
                self.seen["422"] += 1
                detail = [{"type": "extra_forbidden", "loc": ["body", "repetition_detection"]}]
                return web.json_response({"detail": detail}, status=422)
            return await super()._answer_or_fault(request)

    with Strict() as server, opened(server, max_in_flight=1) as engine:
        replies = list(engine.generate(request(n, find_loop=loop) for n in range(4)))
    assert ([reply.error for reply in replies], server.seen["422"]) == ([None] * 4, 1)


def test_two_threads_share_the_servers() -> None:
    texts: dict[int, list[str]] = {}
    with Faulty() as server, opened(server) as engine:

        def work(first: int) -> None:
            texts[first] = [reply.text for reply in engine.generate(request(n) for n in range(first, first + 50))]

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts[0] + texts[50] == undisturbed(100)
    assert server.most_in_flight <= 16


def test_close_ends_requests_to_a_server_that_hangs() -> None:
    with Faulty(share=1.0, faults=("hang",)) as server, opened(server, timeout=60) as engine:
        threading.Timer(0.2, engine.close).start()
        with pytest.raises(EngineDiedError, match="closed"):
            list(engine.generate([request(0)]))


def test_base_url_endpoint_is_the_file_that_serve_writes(tmp_path: Path) -> None:
    values = {"source": {"kind": "folder", "path": "."}, "engines": {"judge": {"kind": "openai", "model": "m"}}}
    values["engines"]["judge"]["base_url"] = "endpoint"  # type: ignore[index]
    run = config.parse(values, file=tmp_path / "run.toml")
    assert run.engines["judge"].config.base_url == str(tmp_path / "endpoints" / "judge.json")
    assert "base_url" not in run.engines["judge"].stamp
    values["engines"]["judge"]["base_url"] = "localhost"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r'engines.judge.*"endpoint"'):
        config.parse(values, file=tmp_path / "run.toml")
