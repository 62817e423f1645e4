"""Decides how any image-text-to-text model is asked in this process: in batches, through transformers.

Slower than vLLM and more patient: every model that transformers loads, on a CPU or a GPU. What a request may ask for
besides, the other engines decide alike; a bad request never takes its batch along.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.engines import Reply, Request, Sampling, _chat
from pipeline.engines._options import Model, Weights, require_module
from pipeline.engines._sampler import Grammars, Row, TokenSampler
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, ScheduledEngine
from pipeline.errors import BadRequestError, EngineDiedError
from pipeline.machine import emulates_bfloat16
from pipeline.sections import key

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LINGER = 0.05  # seconds that a batch waits for those that would fill it

ON_DEVICES = True  # each worker process is to have GPUs of its own


@dataclass(frozen=True, kw_only=True)
class Config(Weights, Model):
    """`[engines.NAME]` with kind = "transformers"."""

    device: str = key("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one", stamp=False)
    batch_size: int = key(8, "questions that the model answers at once", stamp=False, least=1)


def open(config: Config) -> Transformers:  # noqa: A001
    """Loads the model.

    Raises:
        ConfigError: there is no such model, it does not load, or it has no chat template.
    """
    require_module("transformers", kind="transformers", how="pip install 'recap-pipeline[transformers]'")
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    prompter = _chat.Prompter(config)
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # never a pickle
        )
    except (OSError, ValueError) as error:
        raise _chat.make_load_error(config, error) from error
    device = _device(config.device)
    if config.dtype == "auto" and device == "cpu" and emulates_bfloat16():
        model = model.float()
    return Transformers(config, model.to(device).eval(), prompter)


def _device(asked: str) -> str:
    import torch

    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    text: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One attempt at one request, on its way into a batch."""

    prepared: Prepared
    request: Request
    sampling: Sampling
    seed: int
    tell: Callable[[Reply | Exception], None]


class Transformers(ScheduledEngine):
    """A model in this process. One thread of its own runs it; all callers fill the same batches."""

    def __init__(self, config: Config, model: Any, prompter: _chat.Prompter) -> None:
        self.model = config.model_name
        self.revision = str(config.revision or getattr(model.config, "_commit_hash", None) or "")
        self._asker = _Asker(model, prompter.processor)
        self._prompter = prompter
        self._batches = _Batches(self._asker.answer, size=config.batch_size)
        self._loop = EventLoopThread("transformers")
        bounds = Bounds(
            max_in_flight=2 * config.batch_size,  # one batch runs, the next stands ready
            enough=config.batch_size,
            num_ahead=config.threads + config.batch_size,
            max_unordered=6 * config.batch_size,
            num_threads=config.threads,
        )
        self._window = RequestScheduler(bounds, prepare=self._prepare, ask=self._ask, loop=self._loop)

    def close(self) -> None:
        self._window.close()
        self._batches.close()
        self._loop.close()
        self._asker.close()

    def _prepare(self, request: Request) -> Prepared:
        return Prepared(text=self._prompter.render_text(request), pictures=self._prompter.load_images(request))

    async def _ask(self, prepared: Prepared, request: Request, sampling: Sampling, seed: int) -> Reply:
        loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def tell(outcome: Reply | Exception) -> None:
            loop.call_soon_threadsafe(_settle, answer, outcome)

        self._batches.add(Question(prepared=prepared, request=request, sampling=sampling, seed=seed, tell=tell))
        reply: Reply = await answer
        return reply


def _settle(answer: asyncio.Future[Reply], outcome: Reply | Exception) -> None:
    if answer.done():  # nobody waits any more
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


class _Batches:
    """Forms batches from what comes, whoever asked, and has them answered in a thread of its own."""

    def __init__(self, answer: Callable[[list[Question]], None], *, size: int) -> None:
        self._answer, self._size = answer, size
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def add(self, question: Question) -> None:
        self._questions.put(question)

    def close(self) -> None:
        """Waits for the batch that runs. Idempotent."""
        self._closed = True
        self._questions.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._questions.get()) is not None:
            batch, last = self._filled(first)
            if self._closed:
                _tell(batch, EngineDiedError("the engine was closed while it was asked"))
            else:
                self._answer(batch)
            if last:
                return

    def _filled(self, first: Question) -> tuple[list[Question], bool]:
        batch, until = [first], time.monotonic() + LINGER
        while len(batch) < self._size:
            try:
                question = self._questions.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if question is None:
                return batch, True
            batch.append(question)
        return batch, False


class _Asker:
    """Runs the model on a batch of questions and tells each what came of it."""

    def __init__(self, model: Any, processor: Any) -> None:
        import torch
        from transformers import GenerationConfig

        self._model, self._processor = model, processor
        self._tokenizer = processor.tokenizer
        self._tokenizer.padding_side = "left"
        self._ends = _ends(model, self._tokenizer)
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        # The checkpoint's own defaults (temperature, penalties) must not creep in: sampling is explicit.
        model.generation_config = GenerationConfig(eos_token_id=self._ends, pad_token_id=pad)
        text = model.config.get_text_config()
        self._context = int(getattr(text, "max_position_embeddings", 0) or 2**31)
        self._suppressed = torch.tensor(_suppressed(model, self._tokenizer, self._ends), device=model.device)
        self._grammars = Grammars(self._tokenizer, vocabulary=text.vocab_size, ends=self._ends)

    def close(self) -> None:
        self._model = None

    def answer(self, batch: list[Question]) -> None:
        """Answers all; when the batch fails, in halves, so that only the question that is to blame gets the error."""
        import torch

        for part in _alike(batch):
            try:
                with torch.inference_mode():
                    self._generate(part)
            except EngineDiedError as error:
                _tell(part, error)
            except torch.AcceleratorError as error:  # a GPU that failed once fails always
                _tell(part, EngineDiedError(f"{self._model.device} failed: {error}"))
            except Exception as error:  # processor and model are the model's own code, which promises no type
                if len(part) == 1:
                    wrong = (
                        error
                        if isinstance(error, BadRequestError)
                        else BadRequestError(f"{type(error).__name__}: {error}")
                    )
                    _tell(part, wrong)
                else:
                    self.answer(part[: len(part) // 2])
                    self.answer(part[len(part) // 2 :])

    def _generate(self, batch: list[Question]) -> None:
        inputs = self._inputs(batch)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        if fitting := [q for q, length in zip(batch, lengths, strict=True) if length < self._context]:
            if len(fitting) < len(batch):
                self._refuse_long(batch, lengths)
                self._generate(fitting)
                return
            rows = [self._row(q, length) for q, length in zip(batch, lengths, strict=True)]
            self._run(rows, inputs)
            for q, row, length in zip(batch, rows, lengths, strict=True):
                q.tell(self._reply(row, length))
        else:
            self._refuse_long(batch, lengths)

    def _inputs(self, batch: list[Question]) -> Any:
        pictures = [list(q.prepared.pictures) for q in batch]
        images = {"images": pictures} if any(pictures) else {}
        inputs = self._processor(
            text=[q.prepared.text for q in batch], padding=True, return_tensors="pt", add_special_tokens=False, **images
        )
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def _refuse_long(self, batch: list[Question], lengths: list[int]) -> None:
        for q, length in zip(batch, lengths, strict=True):
            if length >= self._context:
                q.tell(BadRequestError(f"the prompt has {length} tokens; the model's context is {self._context}"))

    def _row(self, q: Question, length: int) -> Row:
        return Row(
            sampling=q.sampling,
            seed=q.seed,
            max_tokens=min(q.sampling.max_tokens, self._context - length),
            logprobs=q.request.logprobs,
            matcher=self._grammars.matcher(q.request.schema) if q.request.schema is not None else None,
        )

    def _run(self, rows: Sequence[Row], inputs: Any) -> None:
        import torch

        ends = torch.tensor(self._ends)
        chooser = TokenSampler(
            rows,
            prompt=inputs["input_ids"],
            mask=inputs["attention_mask"],
            ends=ends,
            suppressed=self._suppressed,
        )
        self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max(row.max_tokens for row in rows),
            logits_processor=[chooser],
            stopping_criteria=[chooser.finished],
        )

    def _reply(self, row: Row, num_prompt_tokens: int) -> Reply:
        return Reply(
            text=_chat.decode_answer(self._tokenizer, row.tokens, stopped=row.stopped),
            finish_reason="stop" if row.stopped else "length",
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=len(row.tokens),
            logprobs=tuple(row.chosen_logprobs) if row.logprobs else None,
        )


def _tell(batch: list[Question], outcome: Exception) -> None:
    for question in batch:
        question.tell(outcome)


def _alike(batch: list[Question]) -> list[list[Question]]:
    """Those with images and those without: few processors take both at once."""
    parts = [[q for q in batch if bool(q.prepared.pictures) is shown] for shown in (True, False)]
    return [part for part in parts if part]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    given = model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


def _suppressed(model: Any, tokenizer: Any, ends: Sequence[int]) -> list[int]:
    """Tokens that are no words: special ones, and the places of images, which would break the next step."""
    places = [
        value
        for config in (model.config, model.config.get_text_config())
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    ]
    return sorted({*tokenizer.all_special_ids, *places} - set(ends))
