"""The openai engine against servers that fail in every way that servers do."""

from __future__ import annotations

import base64
import json
import threading
import time
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import config
from pipeline.engines import Request, Sampling, openai
from pipeline.errors import ConfigError, EngineDiedError
from tests.support import tiny
from tests.support.faults import Faulty

PICTURE = tiny.make_picture(0, edge=224)


def opened(*servers: Faulty, **changes: Any) -> closing[openai.OpenAI]:
    urls = tuple(server.url for server in servers)
    keys = {"model": "echo", "base_url": urls, "max_in_flight": 16, "timeout": 0.5, "give_up_after": 20.0}
    return closing(openai.open(openai.Config(**{**keys, **changes})))


def request(n: int, **changes: Any) -> Request:
    keys: dict[str, Any] = {"id": str(n), "prompt": f"Describe picture {n}.", "images": (PICTURE,), "seed": n}
    return Request(**{**keys, "ladder": (Sampling(max_tokens=64),), **changes})


def undisturbed(num: int) -> list[str]:
    with Faulty() as server, opened(server) as engine:
        return [reply.text for reply in engine.generate(request(n) for n in range(num))]


def test_a_tenth_of_all_requests_failing_changes_no_answer() -> None:
    with Faulty(share=0.1) as server, opened(server) as engine:
        replies = list(engine.generate(request(n) for n in range(200)))
    assert set(server.seen) == {"", "500", "429", "hang", "broken", "closed"}
    assert [reply.text for reply in replies] == undisturbed(200)


def test_no_more_questions_are_under_way_than_the_window_holds() -> None:
    """Seen from the server, which notices late that somebody stopped waiting: so without the fault `hang`."""
    faults = ("500", "429", "broken", "closed")
    with Faulty(share=0.1, faults=faults) as server, opened(server, timeout=60.0) as engine:
        server.delay = 0.01
        assert len(list(engine.generate(request(n) for n in range(200)))) == 200
    assert 8 < server.most_in_flight <= 16


def test_a_server_that_comes_back_is_used_again() -> None:
    with Faulty() as server, opened(server) as engine:
        replies = engine.generate(request(n) for n in range(100))
        texts = [next(replies).text for _ in range(10)]
        server.stop()
        threading.Timer(1.0, server.start).start()
        texts += [reply.text for reply in replies]
    assert texts == undisturbed(100)


def test_a_server_that_stays_dead_is_named_with_what_it_answered_and_how_long_was_waited() -> None:
    with Faulty() as server, opened(server, give_up_after=1.0, timeout=60.0) as engine:
        replies = engine.generate(request(n) for n in range(100))
        next(replies)
        server.stop()
        with pytest.raises(EngineDiedError, match=rf"{server.url}/chat/completions cannot be reached: .* after \d+ s"):
            list(replies)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_answers_errors_only_is_dead(status: int) -> None:
    with Faulty() as server, opened(server, give_up_after=1.0, num_tries=2) as engine:
        server.status = status
        with pytest.raises(EngineDiedError, match=rf"answered {status}: as it was told; gave up after \d s"):
            list(engine.generate([request(0)]))


def test_a_server_that_hangs_is_dead() -> None:
    with (
        Faulty(share=1.0, faults=("hang",)) as server,
        opened(server, give_up_after=1.0) as engine,
        pytest.raises(EngineDiedError, match=r"no answer in 0.5 s; gave up after \d s"),
    ):
        list(engine.generate([request(0)]))


def test_a_request_that_a_well_server_fails_at_is_an_error_and_the_server_goes_on() -> None:
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
def test_a_refused_request_is_an_error_at_once(status: int) -> None:
    with Faulty() as server, opened(server) as engine:
        server.status = status
        (reply,) = engine.generate([request(0)])
        assert f"answered {status}: as it was told" in str(reply.error)
    assert server.seen.total() == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_only_the_user_can_put_right_ends_it_at_once(status: int) -> None:
    with Faulty() as server, opened(server) as engine:
        server.status = status
        with pytest.raises(EngineDiedError, match=f"{server.url}/chat/completions answered {status}"):
            list(engine.generate(request(n) for n in range(100)))


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame-1234")
    with Faulty() as server, opened(server, api_key_env="SOME_KEY") as engine:
        server.key = "sesame-1234"
        (reply,) = engine.generate([request(0)])
        assert reply.error is None
        server.key = "another"
        with pytest.raises(EngineDiedError, match="401") as raised:
            list(engine.generate([request(0)]))
        told = f"{raised.value} {engine!r} {vars(engine)!r} {config.stamped(engine._config)}"
    assert "sesame" not in told and "***" in told


def test_a_missing_key_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="no NO_SUCH_KEY"):
        openai.open(openai.Config(model="x", base_url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY"))


def test_several_servers_share_the_work_and_one_that_is_dead_is_left_out() -> None:
    with Faulty() as first, Faulty() as second, Faulty() as dead, opened(first, second, dead) as engine:
        dead.stop()
        texts = [reply.text for reply in engine.generate(request(n) for n in range(100))]
        assert texts == undisturbed(100)
    assert min(first.seen.total(), second.seen.total()) > 20


def test_a_server_that_starts_again_on_another_port_is_found_by_its_file(tmp_path: Path) -> None:
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


def test_a_picture_that_fits_travels_as_it_is_and_one_that_does_not_losslessly_reduced() -> None:
    large = tiny.make_picture(1, edge=500)
    with Faulty() as server, opened(server, max_pixels=224 * 224) as engine:
        list(engine.generate([request(0), request(1, images=(large,))]))
    first, second = (base64.b64decode(_url(body).partition(",")[2]) for body in server.bodies)
    assert first == PICTURE
    with Image.open(BytesIO(second)) as image:
        assert image.format == "PNG" and image.size == (224, 224)


def _url(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"][0]["image_url"]["url"])


def test_sampling_is_always_explicit() -> None:
    with Faulty() as server, opened(server) as engine:
        list(engine.generate([request(7, system="Be brief.", ladder=(Sampling(temperature=0.5, top_k=9),))]))
    (body,) = server.bodies
    asked = {name: body[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")}
    assert list(asked.values()) == [0.5, 1.0, 9, 1.0, 512, 7]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


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


def test_closing_ends_what_waits_for_a_server_that_hangs() -> None:
    with Faulty(share=1.0, faults=("hang",)) as server, opened(server, timeout=60) as engine:
        start = time.monotonic()
        threading.Timer(0.2, engine.close).start()
        with pytest.raises(EngineDiedError, match="closed"):
            list(engine.generate([request(0)]))
        assert time.monotonic() - start < 10


def test_run_toml_finds_the_server_that_serve_starts_for_this_engine(tmp_path: Path) -> None:
    values = {"source": {"kind": "folder", "path": "."}, "engines": {"judge": {"kind": "openai", "model": "m"}}}
    values["engines"]["judge"]["base_url"] = "endpoint"  # type: ignore[index]
    run = config.parse(values, file=tmp_path / "run.toml")
    assert run.engines["judge"].config.base_url == str(tmp_path / "endpoints" / "judge.json")
    assert "base_url" not in run.engines["judge"].stamp
    values["engines"]["judge"]["base_url"] = "localhost"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r'engines.judge.*"endpoint"'):
        config.parse(values, file=tmp_path / "run.toml")
