"""Chains of questions about one image: how many of them are kept in flight at once, and what ends each.

A chain is a generator that yields questions and is sent their answers. It knows no engine; the engines know no chain:
each is fed one stream of requests, in which the next question of a chain comes as soon as its last one is answered.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

from pipeline.decoding.images import Region
from pipeline.engines import MAX_TOP_TOKENS, Engine, Reply, Request, Sampling, find_no_loop
from pipeline.errors import EngineDiedError, UserError
from pipeline.records import CaptionStatus, CaptionStep, Finding, Image
from stages.text.answers import Answer, AnswerFormat, read_answer
from stages.text.given import Texts
from stages.text.prompts import derive_seed
from stages.text.repetition import find_lasting_loop
from stages.text.verdicts import read_probabilities

T = TypeVar("T")
Show = Literal["whole", "none", "crop", "both"]
Box = tuple[float, float, float, float]  # left, top, right, bottom; [0, 1] of the picture as displayed
NO_REPLY = Reply()
MAX_OPEN = 4096  # chains that are begun and not yet yielded; all but those in flight have ended, and hold no image
MAX_READY = 64  # questions that wait for an engine; with more, no further chain is begun
MAX_QUESTIONS = 1000  # of one chain


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The image that a chain is about."""

    image: Image
    candidate: int  # from 0
    texts: Texts  # what `given` has about it, by field
    findings: Mapping[str, Finding]  # what the finders of the chain found in it, by finder


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a chain."""

    step: str  # its name in the column `steps`, and in errors
    prompt: str
    item: str | None = None  # what it is about, for the column `steps`
    show: Show = "whole"  # the whole image, none, the part within `box`, or both of them
    box: Box | None = None
    system: str = ""
    engine: str = ""  # a name in [engines]; "": the engine of the pass
    answer_format: AnswerFormat | None = None  # None: prose
    verdicts: tuple[str, ...] = ()  # the values of "verdict" in a structured answer whose probabilities are wanted
    ladder: tuple[Sampling, ...] = ()  # (): the recipe's


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A usable answer."""

    text: str
    fields: str | None = None  # the JSON of a structured answer
    probabilities: Mapping[str, float] | None = None  # of the question's verdicts; None: the engine does not say

    @property
    def value(self) -> Any:
        """The value of a structured answer."""
        return None if self.fields is None else json.loads(self.fields)


Questions = Generator[Any, Any, Any]  # yields a Question or several, is sent as many Answered, returns text or Answered


class ChainError(ValueError):
    """Raised by a chain that cannot go on; its message becomes the error of its row."""

    def __init__(self, status: CaptionStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a chain: the columns of its row."""

    answer: Answer
    reply: Reply  # the last one, or the one that ended it
    attempt: int  # the highest rung of any question
    steps: tuple[CaptionStep, ...]
    num_prompt_tokens: int | None
    num_output_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class ChainSetup:
    """What the requests of one chain have in common."""

    id: str  # for messages
    source_key: str
    data: Callable[[], bytes]  # reads the image file
    seed: tuple[str | int, ...]  # parts of every question's seed
    engine: str  # of questions that name none
    ladder: tuple[Sampling, ...]  # of questions that have none


@dataclass(kw_only=True)
class Asked:
    """A question with its place in its chain."""

    chain: Chain
    question: Question
    number: int  # among the chain's questions
    reply: Reply = NO_REPLY
    answer: Answer | None = None  # that of the reply


class Chain:
    """The questions of one image and the answers so far. Used by one thread at a time."""

    def __init__(self, questions: Questions, setup: ChainSetup) -> None:
        self.setup = setup
        self.outcome: Outcome | None = None  # once it has ended
        self._questions = questions
        self._asked: list[Asked] = []  # all of them
        self._together: list[Asked] = []  # those whose answers the generator waits for
        self._is_list = False  # whether it yielded a list of them

    def start(self) -> Sequence[Asked]:
        """Returns the first questions."""
        return self._advance(lambda: next(self._questions))

    def receive(self, asked: Asked, reply: Reply) -> Sequence[Asked]:
        """Takes a reply; returns the next questions when it was the last that the chain waited for."""
        asked.reply, asked.answer = reply, read_answer(reply, asked.question.answer_format)
        answers = [(one, one.answer) for one in self._together if one.answer is not None]
        if len(answers) < len(self._together):
            return ()
        for one, answer in answers:
            if answer.status != "ok":
                self._end(replace(answer, error=f"step {one.question.step}: {answer.error}"), one.reply)
                return ()
        usable = [
            Answered(text=answer.text, fields=answer.fields, probabilities=_find_probabilities(one))
            for one, answer in answers
        ]
        return self._advance(lambda: self._questions.send(usable if self._is_list else usable[0]))

    def _advance(self, go_on: Callable[[], Any]) -> Sequence[Asked]:
        """Runs the generator to its next questions, or to its end."""
        last = self._asked[-1].reply if self._asked else NO_REPLY
        try:
            self._together = self._read_questions(go_on())
            while not self._together:
                self._together = self._read_questions(self._questions.send([]))
        except StopIteration as end:
            result = end.value if isinstance(end.value, Answered) else Answered(text=str(end.value or ""))
            text = result.text.strip()
            answer = Answer(text=text, fields=result.fields, status="ok", error=None)
            self._end(answer if text else replace(answer, status="empty", error="the chain gives no text"), last)
        except ValueError as error:
            status = error.status if isinstance(error, ChainError) else "invalid"
            self._end(Answer(text="", fields=None, status=status, error=str(error)), last)
        return self._together

    def _read_questions(self, asked: Question | Iterable[Question]) -> list[Asked]:
        self._is_list = not isinstance(asked, Question)
        questions = [asked] if isinstance(asked, Question) else [*asked]
        first = len(self._asked)
        if first + len(questions) > MAX_QUESTIONS:
            raise ChainError("invalid", f"the chain asks more than {MAX_QUESTIONS} questions")
        together = [Asked(chain=self, question=one, number=number) for number, one in enumerate(questions, first)]
        self._asked += together
        return together

    def _end(self, answer: Answer, reply: Reply) -> None:
        self._questions.close()
        steps = tuple(_build_step(one, one.answer) for one in self._asked if one.answer is not None)
        self.outcome = Outcome(
            answer=answer,
            reply=reply,
            attempt=max((step.attempt for step in steps), default=0),
            steps=steps,
            num_prompt_tokens=_add_known([step.num_prompt_tokens for step in steps]),
            num_output_tokens=_add_known([step.num_output_tokens for step in steps]),
        )
        self._asked, self._together = [], []


def _find_probabilities(asked: Asked) -> Mapping[str, float] | None:
    tokens, verdicts = asked.reply.tokens, asked.question.verdicts
    return None if tokens is None or not verdicts else next(read_probabilities(tokens, [verdicts]))


def _build_step(asked: Asked, answer: Answer) -> CaptionStep:
    question, reply = asked.question, asked.reply
    return CaptionStep(
        name=question.step,
        item=question.item,
        text=answer.text,
        status=answer.status,
        attempt=reply.attempt,
        num_prompt_tokens=reply.num_prompt_tokens,
        num_output_tokens=reply.num_output_tokens,
    )


def _add_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _build_request(asked: Asked) -> Request:
    question, setup = asked.question, asked.chain.setup
    answer_format = question.answer_format
    return Request(
        id=f"{setup.id}/{question.step}/{asked.number}",
        system=question.system,
        prompt=question.prompt,
        images=_list_images(question, setup.data),
        source_key=setup.source_key,
        schema=None if answer_format is None else json.dumps(answer_format.schema, ensure_ascii=False),
        ladder=question.ladder or setup.ladder,
        accept=lambda reply: read_answer(reply, answer_format).error or "",
        find_loop=find_no_loop if answer_format else find_lasting_loop,  # JSON repeats its keys
        seed=derive_seed(*setup.seed, question.step, asked.number),
        top_tokens=MAX_TOP_TOKENS if question.verdicts else 0,
    )


def _list_images(question: Question, read: Callable[[], bytes]) -> tuple[bytes | Region, ...]:
    """The whole picture comes first, so that questions about one image share a prefix."""
    if question.show == "none":
        return ()
    data = read()
    whole = (data,) if question.show in ("whole", "both") else ()
    if question.show == "whole":
        return whole
    assert question.box is not None, f"step {question.step} shows a part of the image, and has no box"
    return (*whole, Region(data=data, box=question.box))


def ask_chains(
    inputs: Iterator[T], start: Callable[[T], Chain], engines: Mapping[str, Engine]
) -> Iterator[tuple[T, Outcome]]:
    """Yields each input with the outcome of its chain, in order, lazily.

    Args:
        inputs: one chain each.
        start: a new chain.
        engines: those that chains ask, by name.

    Raises:
        UserError: a chain asks an engine that is not among them.
        EngineDiedError: an engine cannot answer any more.
        OSError: an image file has gone.
    """
    yield from _Window(inputs, start, engines).run()


@dataclass
class _Open(Generic[T]):
    """A chain that is not yet yielded, with its input."""

    item: T
    chain: Chain = field(repr=False)


class _Window(Generic[T]):
    """The chains in flight. One thread per engine asks and receives; whichever finds nothing to ask begins a chain.

    A chain that is not answered has a question that waits for an engine or is in one. So no thread waits for ever:
    engines answer what they have drawn without waiting for more, and a chain is begun while no question waits.
    """

    def __init__(self, inputs: Iterator[T], start: Callable[[T], Chain], engines: Mapping[str, Engine]) -> None:
        self._inputs, self._start, self._engines = inputs, start, engines
        lock = threading.Lock()
        self._may_ask = threading.Condition(lock)
        self._may_yield = threading.Condition(lock)
        self._open: deque[_Open[T]] = deque()  # in input order
        self._num_running = 0  # chains that have not ended
        self._ready: dict[str, deque[Asked]] = {name: deque() for name in engines}  # questions, by engine
        self._sent: dict[str, deque[Asked]] = {name: deque() for name in engines}  # in the order of the replies
        self._is_drawing = False  # whether a thread draws an input
        self._input_ended = self._is_stopped = False
        self._error: BaseException | None = None

    def run(self) -> Iterator[tuple[T, Outcome]]:
        threads = [
            threading.Thread(target=self._serve, args=(name, engine), name=f"chains of {name}", daemon=True)
            for name, engine in self._engines.items()
        ]
        for thread in threads:
            thread.start()
        try:
            while ended := self._take_ended():
                for one in ended:
                    assert one.chain.outcome is not None
                    yield one.item, one.chain.outcome
        finally:
            self._stop(None)
            for thread in threads:
                thread.join(timeout=1)  # one that waits for a slow reply ends with it

    def _take_ended(self) -> list[_Open[T]]:
        """Waits for the next chains in order. Returns [] at the end, or raises what ended a thread."""
        with self._may_yield:
            self._may_yield.wait_for(lambda: self._error or self._is_over or self._first_has_ended)
            ended = []
            while self._first_has_ended:
                ended.append(self._open.popleft())
            if not ended and self._error:
                raise self._error
            self._may_ask.notify_all()
            return ended

    @property
    def _first_has_ended(self) -> bool:
        return bool(self._open) and self._open[0].chain.outcome is not None

    @property
    def _is_over(self) -> bool:
        return self._input_ended and not self._open

    def _stop(self, error: BaseException | None) -> None:
        with self._may_ask:
            self._is_stopped = True
            self._error = self._error or error
            self._may_ask.notify_all()
            self._may_yield.notify_all()

    # The threads of engines, and those in which engines draw requests.

    def _serve(self, name: str, engine: Engine) -> None:
        try:
            for reply in engine.generate(self._draw_requests(name)):
                if self._is_stopped:
                    return
                self._receive(name, reply)
            if not (self._is_stopped or self._has_ended):
                raise EngineDiedError(f"the engine {name} gave fewer replies than it was sent requests")
        except BaseException as error:  # re-raised in the caller's thread
            self._stop(error)

    def _draw_requests(self, name: str) -> Iterator[Request]:
        while (asked := self._take_question(name)) is not None:
            yield _build_request(asked)

    def _take_question(self, name: str) -> Asked | None:
        """Waits for a question to this engine, and begins chains meanwhile. Returns None at the end."""
        ready = self._ready[name]
        while True:
            with self._may_ask:
                self._may_ask.wait_for(lambda: self._is_stopped or ready or self._has_ended or self._may_begin)
                if self._is_stopped or (self._has_ended and not ready):
                    return None
                if ready:
                    self._sent[name].append(ready[0])
                    return ready.popleft()
                self._is_drawing = True
            self._begin_chain()

    @property
    def _has_ended(self) -> bool:
        """True if nothing will be asked any more."""
        return self._input_ended and not self._num_running

    @property
    def _may_begin(self) -> bool:
        is_full = len(self._open) >= MAX_OPEN or any(len(ready) >= MAX_READY for ready in self._ready.values())
        return not (self._is_drawing or self._input_ended or is_full)

    def _begin_chain(self) -> None:
        """Draws one input; only one thread at a time does."""
        begun: _Open[T] | None = None
        questions: Sequence[Asked] = ()
        try:
            for item in islice(self._inputs, 1):
                begun = _Open(item, self._start(item))
                questions = begun.chain.start()
        finally:
            with self._may_ask:
                self._is_drawing = False
                self._input_ended = begun is None
                if begun is not None:
                    self._open.append(begun)
                    self._num_running += 1
                    self._add_questions(begun.chain, questions)
                self._may_ask.notify_all()
                self._may_yield.notify_all()

    def _receive(self, name: str, reply: Reply) -> None:
        with self._may_ask:
            asked = self._sent[name].popleft()
            self._add_questions(asked.chain, asked.chain.receive(asked, reply))

    def _add_questions(self, chain: Chain, questions: Sequence[Asked]) -> None:
        """Queues the questions of a chain, or counts it as ended. Under the lock."""
        for asked in questions:
            engine = asked.question.engine or chain.setup.engine
            if engine not in self._ready:
                known = ", ".join(self._ready)
                raise UserError(f"step {asked.question.step} asks the engine {engine!r}; the chain has {known}")
            self._ready[engine].append(asked)
        if chain.outcome is not None:
            self._num_running -= 1
            if self._open[0].chain is chain:
                self._may_yield.notify_all()
        if questions or self._has_ended:
            self._may_ask.notify_all()
