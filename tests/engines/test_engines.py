"""The contract of all engines, run against each of them."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import queue
import string
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.decoding.images import Region
from pipeline.engines import Engine, Reply, Request, Sampling, echo, openai, transformers, vllm
from pipeline.errors import EngineDiedError
from stages.text.repetition import find_lasting_loop
from tests.support import tiny
from tests.support.faults import Faulty
from tests.support.served import ModelServer

HOT = Sampling(temperature=1.0, max_tokens=16)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "verdict": {"type": "string", "enum": ["yes", "partly", "no"]},
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        },
        "required": ["verdict", "stars"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An engine and its limits."""

    engine: Engine
    num_ahead: int  # requests that it may draw beyond the replies taken
    num_tokens: int | None = None  # of its context


class SharedVllm:
    """One vLLM engine in this process for all tests of this file, because each start takes up to two minutes."""

    def __init__(self, config: vllm.Config) -> None:
        self._config = config
        self._engine: vllm.Vllm | None = None

    def get(self) -> vllm.Vllm:
        self._engine = self._engine or vllm.open(self._config)
        return self._engine

    @contextmanager
    def take(self) -> Iterator[vllm.Vllm]:
        """Gives the engine to a test that ends it; the next `get` starts another one."""
        engine, self._engine = self.get(), None
        with closing_twice(engine):
            yield engine


@pytest.fixture(scope="module")
def shared_vllm(tiny_model: Path, vllm_flags: dict[str, Any]) -> Iterator[SharedVllm]:
    flags = {**vllm_flags, "images_per_prompt": 2, "max_in_flight": 8, "num_restarts": 1}
    shared = SharedVllm(vllm.Config(model=str(tiny_model), **flags))
    yield shared
    if shared._engine is not None:
        with shared.take():
            pass


@contextmanager
def closing_twice(engine: Engine) -> Iterator[Engine]:
    yield engine
    engine.close()
    engine.close()  # `close` is idempotent


@contextmanager
def open_echo(_: pytest.FixtureRequest) -> Iterator[Opened]:
    with closing_twice(echo.open(echo.Config())) as engine:
        yield Opened(engine=engine, num_ahead=1)


@contextmanager
def open_transformers(fixtures: pytest.FixtureRequest) -> Iterator[Opened]:
    model = str(fixtures.getfixturevalue("tiny_model"))
    config = transformers.Config(model=model, dtype="float32", batch_size=4)
    with closing_twice(transformers.open(config)) as engine:
        yield Opened(engine=engine, num_ahead=24, num_tokens=8192)


@contextmanager
def open_openai(_: pytest.FixtureRequest) -> Iterator[Opened]:
    with Faulty(share=0.1, faults=("500", "429", "broken", "closed")) as server:
        config = openai.Config(model="echo", base_url=server.url, max_in_flight=4)
        with closing_twice(openai.open(config)) as engine:
            yield Opened(engine=engine, num_ahead=16)


@contextmanager
def open_vllm(fixtures: pytest.FixtureRequest) -> Iterator[Opened]:
    yield Opened(engine=fixtures.getfixturevalue("shared_vllm").get(), num_ahead=32, num_tokens=512)


@contextmanager
def open_served(fixtures: pytest.FixtureRequest) -> Iterator[Opened]:
    server = fixtures.getfixturevalue("tiny_server")
    config = openai.Config(
        model="tiny", base_url=str(server.endpoint), max_in_flight=8, max_pixels=tiny.PIXELS**2, give_up_after=60
    )
    num_tokens = fixtures.getfixturevalue("served_flags")["max_model_len"]
    with closing_twice(openai.open(config)) as engine:
        yield Opened(engine=engine, num_ahead=32, num_tokens=num_tokens)


MODELS = [
    pytest.param(open_transformers, id="transformers", marks=pytest.mark.slow),
    pytest.param(open_vllm, id="vllm", marks=pytest.mark.vllm),
    pytest.param(open_served, id="served", marks=pytest.mark.vllm),
]
ENGINES = [pytest.param(open_echo, id="echo"), pytest.param(open_openai, id="openai"), *MODELS]


@pytest.fixture(scope="module", params=ENGINES)
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    with request.param(request) as opened:
        yield opened


@pytest.fixture
def engine(opened: Opened) -> Engine:
    return opened.engine


@cache
def picture(n: int) -> bytes:
    return tiny.make_picture(n)


def request(n: int, **changes: Any) -> Request:
    plain = Request(id=str(n), prompt="Describe it.", images=(picture(n),), ladder=(HOT,), seed=n)
    return replace(plain, **changes)


def ask(engine: Engine, *requests: Request) -> list[Reply]:
    return list(engine.generate(requests))


def test_every_request_gets_one_reply_in_order(engine: Engine) -> None:
    alone = [ask(engine, request(n))[0].text for n in range(12)]
    assert [reply.text for reply in ask(engine, *(request(n) for n in range(12)))] == alone
    assert len(set(alone)) > 6
    assert ask(engine) == []


def test_a_request_may_wait_for_the_answer_to_the_one_before(engine: Engine) -> None:
    answered: queue.SimpleQueue[Reply] = queue.SimpleQueue()

    def requests() -> Iterator[Request]:
        yield request(0)
        for n in range(1, 4):
            yield request(n, prompt=f"Describe it. {answered.get(timeout=60).text}")

    replies = []
    for reply in engine.generate(requests()):
        replies.append(reply)
        answered.put(reply)
    assert [reply.error for reply in replies] == [None] * 4


def test_a_part_of_an_image_is_answered_like_an_image(engine: Engine) -> None:
    left, right = (Region(data=picture(0), box=box) for box in ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)))
    one, again, other = ask(engine, *(request(0, images=(image,)) for image in (left, left, right)))
    assert one.error is other.error is None
    assert one.text == again.text


@pytest.mark.parametrize(
    "opened", [one for one in ENGINES if one.id in ("echo", "transformers", "vllm")], indirect=True
)
def test_an_example_before_the_image_changes_the_answer(engine: Engine) -> None:
    shown = {"images": (picture(5), picture(0)), "examples": (("Describe it.", "A word."),)}
    requests = [request(0), request(0, **shown), request(0, **{**shown, "examples": (("Describe it.", "Two words."),)})]
    replies = ask(engine, *requests, *requests)
    assert [reply.error for reply in replies] == [None] * 6
    assert [reply.text for reply in replies[:3]] == [reply.text for reply in replies[3:]]
    assert len({reply.text for reply in replies}) == 3


def test_a_bad_request_is_an_error_and_its_neighbours_are_answered(opened: Opened) -> None:
    bad: list[dict[str, Any]] = [{"images": (b"",)}, {"schema": "{"}]
    if opened.num_tokens is not None:
        bad += [
            {"images": (picture(1)[: len(picture(1)) // 2],)},
            {"prompt": "Describe it, please. " * (opened.num_tokens // 10)},
        ]
    requests = [part for n, change in enumerate(bad) for part in (request(n, **change), request(n))]
    replies = ask(opened.engine, *requests)
    assert [reply.error is None for reply in replies] == [False, True] * len(bad)
    assert all(reply.text == "" and reply.attempt == 1 for reply in replies if reply.error)


def test_rejected_answers_are_retried_up_the_ladder(engine: Engine) -> None:
    ladder = (HOT, replace(HOT, top_p=0.9), replace(HOT, top_p=0.8))
    attempts: list[Reply] = []

    def accept(reply: Reply) -> str:
        attempts.append(reply)
        return "" if len(attempts) == 2 else "too early"

    (reply,) = ask(engine, request(5, ladder=ladder, accept=accept))
    assert (reply.attempt, reply.problem, reply.sampling, reply.seed) == (2, "", ladder[1], 6)
    assert [attempt.seed for attempt in attempts] == [5, 6]
    (reply,) = ask(engine, request(5, ladder=ladder, accept=lambda _: "never"))
    assert (reply.attempt, reply.problem, reply.sampling, reply.seed) == (3, "never", ladder[2], 7)


def test_the_seed_decides_the_answer_in_any_batch(engine: Engine) -> None:
    (first,) = ask(engine, request(0, seed=1))
    crowd = ask(engine, *(request(n) for n in range(1, 7)), request(0, seed=1), request(0, seed=2))
    assert crowd[-2].text == first.text != crowd[-1].text


def test_answers_follow_the_schema(engine: Engine) -> None:
    ladder = (replace(HOT, max_tokens=256),)
    for reply in ask(engine, *(request(n, schema=SCHEMA, ladder=ladder) for n in range(6))):
        values = json.loads(reply.text)
        assert sorted(values) == ["stars", "verdict"]
        assert values["verdict"] in ("yes", "partly", "no") and 1 <= values["stars"] <= 5


def test_every_output_token_has_its_probability_and_those_of_others(engine: Engine) -> None:
    without, with_them = ask(engine, request(0), request(0, top_tokens=5))
    assert without.tokens is None and without.num_prompt_tokens
    assert with_them.tokens is not None
    assert len(with_them.tokens) == with_them.num_output_tokens
    squeeze = str.maketrans("", "", string.whitespace)
    written = "".join(token.text for token in with_them.tokens).translate(squeeze)
    assert written.startswith(with_them.text.translate(squeeze))
    for token in with_them.tokens:
        assert token.text in token.logprobs and 1 <= len(token.logprobs) <= 6
        assert sum(map(math.exp, token.logprobs.values())) <= 1.0001


def test_two_threads_share_an_engine(engine: Engine) -> None:
    answers: dict[int, list[str]] = {}

    def work(first: int) -> None:
        answers[first] = [reply.text for reply in ask(engine, *(request(n) for n in range(first, first + 10)))]

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first in (0, 100):
        assert answers[first] == [reply.text for reply in ask(engine, *(request(first + n) for n in range(10)))]


def test_an_engine_has_a_name(engine: Engine) -> None:
    assert isinstance(engine, Engine) and engine.model


@pytest.mark.slow
def test_requests_are_drawn_lazily(opened: Opened) -> None:
    drawn = 0

    def draw() -> Iterator[Request]:
        nonlocal drawn
        for n in range(3 * opened.num_ahead):
            drawn += 1
            yield request(n % 8)

    replies = opened.engine.generate(draw())
    assert drawn == 0
    next(replies)
    time.sleep(0.5)
    assert drawn <= 1 + opened.num_ahead
    for taken, _ in enumerate(replies, 2):
        assert drawn <= taken + opened.num_ahead
    assert drawn == 3 * opened.num_ahead


def test_a_caller_may_stop_early_and_call_again(engine: Engine) -> None:
    replies = engine.generate(request(n % 8) for n in range(1000))
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert len(ask(engine, request(0), request(1))) == 2


def test_an_exception_of_the_request_iterator_follows_the_replies_before_it(engine: Engine) -> None:
    def broken() -> Iterator[Request]:
        yield request(0)
        raise ZeroDivisionError

    replies = engine.generate(broken())
    assert next(replies).error is None
    with pytest.raises(ZeroDivisionError):
        next(replies)


GREEDY = Sampling(max_tokens=32)
NUM_GREEDY = 100


@pytest.fixture(scope="module")
def greedy_texts(tiny_model: Path) -> list[str]:
    """The captions of NUM_GREEDY images by transformers, one at a time."""
    engine = transformers.open(transformers.Config(model=str(tiny_model), dtype="float32", batch_size=1))
    texts = [reply.text for reply in ask(engine, *(request(n, ladder=(GREEDY,)) for n in range(NUM_GREEDY)))]
    engine.close()
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("opened", MODELS, indirect=True)
def test_greedy_captions_agree_with_transformers(
    opened: Opened, greedy_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    replies = ask(opened.engine, *(request(n, ladder=(GREEDY,)) for n in range(NUM_GREEDY)))
    share = sum(reply.text == text for reply, text in zip(replies, greedy_texts, strict=True)) / NUM_GREEDY
    with capsys.disabled():
        print(f" {type(opened.engine).__name__}: {share:.1%} of {NUM_GREEDY} greedy captions agree with transformers ")
    assert share >= 0.99
    assert len(set(greedy_texts)) > NUM_GREEDY * 3 / 4


@pytest.mark.parametrize("opened", MODELS[1:], indirect=True)
def test_vllm_stops_what_loops_for_the_request_alone(engine: Engine) -> None:
    text = json.dumps("la " * 90)  # which the schema forces the model to write, a token for each character
    forced = request(0, schema=json.dumps({"enum": [json.loads(text)]}), ladder=(Sampling(max_tokens=300),))
    stopped, whole, other = ask(
        engine, replace(forced, find_loop=find_lasting_loop), forced, replace(forced, find_loop=lambda _: "")
    )
    assert (whole.text, other) == (text, whole)
    assert stopped.finish_reason == "repetition" and text.startswith(stopped.text)
    assert 144 <= (stopped.num_output_tokens or 0) < 160


FAILURES: list[tuple[str, Callable[[Reply], bool]]] = [
    ("error_share", lambda reply: reply.error is not None),
    ("empty_share", lambda reply: reply.text == ""),
    ("truncated_share", lambda reply: reply.finish_reason == "length"),
    ("repeated_share", lambda reply: max(Counter(reply.text.split()).values()) > 16),
    ("invalid_share", lambda reply: not reply.text.endswith("}")),
]


@pytest.mark.parametrize(("share", "failed"), FAILURES)
def test_echo_fails_at_the_configured_share(share: str, failed: Callable[[Reply], bool]) -> None:
    schema = SCHEMA if share == "invalid_share" else None
    requests = [request(0, seed=seed, schema=schema) for seed in range(400)]
    replies = ask(echo.open(echo.Config(**{share: 0.25})), *requests)
    assert 60 < sum(map(failed, replies)) < 140
    assert replies == ask(echo.open(echo.Config(**{share: 0.25})), *requests)


def test_echo_dies_after_die_after_attempts() -> None:
    engine = echo.open(echo.Config(die_after=3))
    replies = engine.generate(request(n) for n in range(9))
    assert [next(replies).error for _ in range(3)] == [None] * 3
    with pytest.raises(EngineDiedError, match="die_after"):
        next(replies)


def test_every_part_of_a_request_changes_echos_answer() -> None:
    engine = echo.open(echo.Config())
    changes = [
        {"prompt": "x"},
        {"system": "x"},
        {"examples": (("x", "y"),)},
        {"images": (b"x",)},
        {"images": (b"y",)},
        {"seed": 1},
        {},
    ]
    assert len({ask(engine, request(0, **change))[0].text for change in changes}) == len(changes)


def test_only_the_first_start_is_serialized(tmp_path: Path) -> None:
    inside, go, together = threading.Event(), threading.Event(), threading.Barrier(3)
    order: list[str] = []

    def first() -> None:
        with vllm.serialize_first_start("a model", folder=tmp_path):
            inside.set()
            go.wait(30)
            order.append("first")

    def later() -> None:
        with vllm.serialize_first_start("a model", folder=tmp_path):
            order.append("later")
            together.wait(30)  # all three are inside at once

    threads = [threading.Thread(target=first)]
    threads[0].start()
    inside.wait(30)
    threads += [threading.Thread(target=later) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.2)
    go.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "later", "later", "later"]
    assert not together.broken


@pytest.mark.vllm
def test_a_vllm_that_crashes_is_restarted_and_one_that_is_terminated_is_not(shared_vllm: SharedVllm) -> None:
    requests = [request(n % 50, ladder=(GREEDY,)) for n in range(150)]
    with shared_vllm.take() as engine:
        undisturbed = [reply.text for reply in ask(engine, *requests)]
        replies = engine.generate(requests)
        texts = [next(replies).text for _ in range(5)]
        find_engine_core().kill()
        texts += [reply.text for reply in replies]
        assert texts == undisturbed
        replies = engine.generate(requests)
        taken = [next(replies) for _ in range(5)]
        find_engine_core().terminate()
        with pytest.raises(EngineDiedError, match="terminated"):
            taken.extend(replies)
    assert {reply.finish_reason for reply in taken} <= {"stop", "length"}


class CrashedVllm:
    """Behaves as vLLM's engine does after its process has crashed."""

    errored = True
    engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=None))

    async def generate(self, *_: Any) -> AsyncIterator[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        raise EngineDeadError
        yield

    def shutdown(self, timeout: float) -> None:
        pass


@pytest.mark.vllm
def test_a_vllm_that_crashes_more_than_num_restarts_times_ends_the_engine() -> None:
    core = vllm._Core(vllm.Config(model="none", num_restarts=0), tokenizer=None)
    core._engine = CrashedVllm()
    with pytest.raises(EngineDiedError, match="vLLM died 1 times"):
        asyncio.run(core.ask({}, request(0), GREEDY, 0))


def find_engine_core() -> BaseProcess:
    (core,) = (child for child in multiprocessing.active_children() if "EngineCore" in child.name)
    return core


@pytest.mark.vllm
def test_a_server_behind_faults_gives_the_same_answers(tiny_server: ModelServer) -> None:
    requests = [request(n % 50, ladder=(GREEDY,)) for n in range(200)]
    with Faulty(upstream=tiny_server.address) as proxy:
        config = openai.Config(model="tiny", base_url=proxy.url, timeout=20, max_pixels=tiny.PIXELS**2)
        engine = openai.open(config)
        undisturbed = [reply.text for reply in ask(engine, *requests)]
        proxy.share = 0.1
        disturbed = [reply.text for reply in ask(engine, *requests)]
        engine.close()
    assert sum(proxy.seen.values()) - proxy.seen[""] > 20
    assert disturbed == undisturbed
