"""Chains of questions: order, several engines, failures, and the number of chains in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding.images import Region
from pipeline.engines import Engine, Reply, Request, Sampling, echo
from pipeline.errors import EngineDiedError, UserError
from stages.text import chains
from stages.text.answers import AnswerFormat
from stages.text.chains import Answered, Chain, ChainError, ChainSetup, Outcome, Question, Questions, ask_chains
from tests.support.window import Window

FORMAT = AnswerFormat(
    schema={"type": "object", "properties": {"verdict": {"enum": ["no", "yes"]}}, "required": ["verdict"]},
    to_prose=lambda value: value["verdict"],
)


def ask(*prompts: str, **changes: Any) -> list[Question]:
    return [Question(step="ask", prompt=prompt, item=prompt, **changes) for prompt in prompts]


def start(number: int, questions: Questions, data: Callable[[], bytes] = lambda: b"image") -> Chain:
    setup = ChainSetup(
        id=str(number), source_key=str(number), data=data, seed=(7, number), engine="main", ladder=(Sampling(),)
    )
    return Chain(questions, setup)


def run(numbers: Iterable[int], write: Callable[[int], Questions], **engines: Engine) -> list[tuple[int, Outcome]]:
    engines = engines or {"main": echo.open(echo.Config())}
    return list(ask_chains(iter(numbers), lambda number: start(number, write(number)), engines))


def branch(number: int) -> Questions:
    """A chain whose number of questions depends on `number` and on its answers."""
    said = yield Question(step="first", prompt=f"Describe picture {number}.")
    words = said.text.split()[: number % 4]
    parts = yield ask(*words)
    for part in parts[: number % 3]:
        said = yield Question(step="more", prompt=f"Is this true? {part.text}", answer_format=FORMAT)
    return f"{number}: {said.text}"


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_chains_end_alike_and_in_order_whatever_is_in_flight(num: int, size: int, most: int) -> None:
    expected = run(range(num), branch)
    assert [number for number, _ in expected] == [*range(num)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "MAX_OPEN", most)
        assert run(range(num), branch, main=Window(size)) == expected


def test_a_window_is_full_while_chains_wait_for_their_answers() -> None:
    engine = Window(8)
    run(range(100), branch, main=engine)
    assert engine.most == 8
    numbers = [int(request.id.split("/")[0]) for request in engine.seen]
    assert numbers != sorted(numbers)  # other chains are asked before a chain ends


def test_no_more_chains_are_begun_than_are_in_flight() -> None:
    begun: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield number

    outcomes = ask_chains(numbers(), lambda number: start(number, branch(number)), {"main": Window(4)})
    first = [number for number, _ in islice(outcomes, 3)]
    outcomes.close()  # type: ignore[attr-defined]
    assert first == [0, 1, 2] and len(begun) <= chains.MAX_OPEN + 3


def test_a_failed_step_ends_its_chain_with_its_status() -> None:
    def answer(request: Request) -> Reply:
        if request.prompt == "bad":
            return Reply(error="no picture", attempt=1)
        text = " ".join(["loop around"] * 40) if request.prompt == "loop" else f"{request.prompt}, answered."
        return Reply(text=text, finish_reason="stop", attempt=2, num_prompt_tokens=3, num_output_tokens=5)

    def write(number: int) -> Questions:
        answers = yield [*ask("one"), *ask(("fine", "bad", "loop")[number]), *ask("three")]
        (last,) = yield ask("last")
        return " ".join(answer.text for answer in [*answers, last])

    (_, fine), (_, bad), (_, loop) = run(range(3), write, main=Window(3, answer))
    assert (fine.answer.status, fine.answer.text) == (
        "ok",
        "one, answered. fine, answered. three, answered. last, answered.",
    )
    assert (fine.num_prompt_tokens, fine.num_output_tokens, fine.attempt, len(fine.steps)) == (12, 20, 2, 4)
    assert (bad.answer.status, bad.answer.error) == ("error", "step ask: no picture")
    assert (loop.answer.status, loop.answer.text) == ("repeated", " ".join(["loop around"] * 40))
    assert [step.status for step in bad.steps] == ["ok", "error", "ok"]
    assert [step.item for step in loop.steps] == ["one", "loop", "three"]


def test_a_chain_may_end_without_a_question_or_with_an_error_of_its_own() -> None:
    def write(number: int) -> Questions:
        if number == 0:
            return "nothing to ask"
        if number == 1:
            raise ChainError("empty", "a field has no text: place")
        if number == 2:
            (answer,) = yield ask("how many?")
            return str(int(answer.text))
        yield from ([] for _ in range(3))
        return Answered(text="structured", fields='{"a": 1}')

    outcomes = [outcome for _, outcome in run(range(4), write)]
    assert [outcome.answer.status for outcome in outcomes] == ["ok", "empty", "invalid", "ok"]
    assert [len(outcome.steps) for outcome in outcomes] == [0, 0, 1, 0]
    assert outcomes[1].answer.error == "a field has no text: place" and "int()" in str(outcomes[2].answer.error)
    assert outcomes[3].answer.fields == '{"a": 1}'


def test_more_chains_that_ask_nothing_than_may_be_open_do_not_stop_the_others() -> None:
    def write(number: int) -> Questions:
        if number % 500 == 499:
            yield ask("one")
        return "done"

    assert len(run(range(2 * chains.MAX_OPEN), write)) == 2 * chains.MAX_OPEN


def test_a_chain_that_never_ends_is_an_error() -> None:
    def write(_: int) -> Questions:
        while True:
            yield ask("again")

    ((_, outcome),) = run([0], write)
    assert outcome.answer.status == "invalid" and "more than 1000 questions" in str(outcome.answer.error)


def test_each_question_is_shown_what_it_says_and_has_a_seed_of_its_own() -> None:
    engine, box = Window(2), (0.0, 0.0, 0.5, 1.0)

    def write(_: int) -> Questions:
        yield [
            Question(step="whole", prompt="a"),
            Question(step="none", prompt="a", show="none"),
            Question(step="crop", prompt="a", show="crop", box=box, system="You look."),
            Question(step="both", prompt="a", show="both", box=box, answer_format=FORMAT),
        ]

    run([0], write, main=engine)
    part = Region(data=b"image", box=box)
    assert [request.images for request in engine.seen] == [(b"image",), (), (part,), (b"image", part)]
    assert [request.id for request in engine.seen] == ["0/whole/0", "0/none/1", "0/crop/2", "0/both/3"]
    assert [bool(request.schema) for request in engine.seen] == [False, False, False, True]
    assert len({request.seed for request in engine.seen}) == 4 and engine.seen[2].system == "You look."


def test_steps_may_be_asked_of_several_engines_at_once() -> None:
    judge, main = Window(3), Window(3)

    def write(number: int) -> Questions:
        (first,) = yield ask(f"describe {number}")
        verdicts = yield [*ask("a", "b", engine="judge"), *ask("c")]
        return " ".join([first.text, *(verdict.text for verdict in verdicts)])

    found = run(range(200), write, main=main, judge=judge)
    assert [number for number, _ in found] == [*range(200)]
    assert (len(main.seen), len(judge.seen)) == (400, 400)
    assert {outcome.answer.status for _, outcome in found} == {"ok"}


def test_an_engine_that_the_chain_does_not_have_is_an_error() -> None:
    def write(_: int) -> Questions:
        yield ask("a", engine="absent")

    with pytest.raises(UserError, match="step ask asks the engine 'absent'; the chain has main"):
        run([0], write)


@pytest.mark.parametrize("name", ["main", "judge"])
def test_an_engine_that_dies_ends_all_of_them(name: str) -> None:
    def write(number: int) -> Questions:
        yield [*ask(f"{number}"), *ask(f"{number}", engine="judge")]
        return "done"

    engines = {one: echo.open(echo.Config(die_after=20 if one == name else 0)) for one in ("main", "judge")}
    found = []
    with pytest.raises(EngineDiedError):
        for number, _ in ask_chains(iter(range(1000)), lambda number: start(number, write(number)), engines):
            found.append(number)
    assert found == [*range(len(found))] and len(found) <= 20


def test_an_engine_that_forgets_a_request_is_an_error() -> None:
    class Forgetful(Window):
        def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
            return islice(super().generate(requests), 5)

    with pytest.raises(EngineDiedError, match="the engine main gave fewer replies"):
        run(range(20), branch, main=Forgetful(3))


def test_an_image_that_has_gone_and_inputs_that_fail_are_raised() -> None:
    def gone() -> bytes:
        raise FileNotFoundError("a.jpg")

    def numbers() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    engines = {"main": echo.open(echo.Config())}
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        list(ask_chains(iter([0]), lambda number: start(number, branch(number), gone), engines))
    with pytest.raises(OSError, match="the disk is gone"):
        list(ask_chains(numbers(), lambda number: start(number, branch(number)), engines))


def test_closing_early_ends_the_threads() -> None:
    before = threading.active_count()
    outcomes = ask_chains(iter(range(1000)), lambda number: start(number, branch(number)), {"main": Window(4)})
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    while threading.active_count() > before:
        time.sleep(0.01)
