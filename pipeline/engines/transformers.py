"""The transformers engine: image-text-to-text models in this process, in batches.

It is slower than vLLM but runs every model that transformers loads, on a CPU or a GPU, and supports the same requests
as the other engines. A bad request does not fail its batch.
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

from pipeline import machine
from pipeline.engines import Inspection, Reply, Request, Sampling, _chat
from pipeline.engines._inspection import check_installed, inspect_model
from pipeline.engines._options import Model, Weights, require_module
from pipeline.engines._sampler import Grammars, Row, TokenSampler
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, ScheduledEngine
from pipeline.errors import BadRequestError, EngineDiedError
from pipeline.sections import key

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

HOW_TO_INSTALL = "pip install '.[transformers]' in a clone of recap"
LINGER = 0.05  # seconds that a batch waits for further requests

ON_DEVICES = True  # each worker process gets its own GPUs


@dataclass(frozen=True, kw_only=True)
class Config(Weights, Model):
    """`[engines.NAME]` with kind = "transformers"."""

    device: str = key("auto", "cpu, cuda, cuda:1, ...; auto: a GPU if there is one", stamp=False)
    batch_size: int = key(8, "requests that the model answers at once", stamp=False, least=1)


def inspect(config: Config) -> Inspection:
    """
    Raises:
        ConfigError: transformers is not installed, or there is no such model.
    """
    check_installed("transformers", kind="transformers", how=HOW_TO_INSTALL)
    return inspect_model(config)


def open(config: Config) -> Transformers:
    """Loads the model.

    Raises:
        ConfigError: there is no such model, it does not load, or it has no chat template.
    """
    require_module("transformers", kind="transformers", how=HOW_TO_INSTALL)
    import torch
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
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto" and device == "cpu" and machine.emulates_bfloat16():
        model = model.float()
    return Transformers(config, model.to(device).eval(), prompter)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    text: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class QueuedRequest:
    """One attempt at one request, queued for a batch."""

    prepared: Prepared
    request: Request
    sampling: Sampling
    seed: int
    on_done: Callable[[Reply | Exception], None]  # called in the batch thread


class Transformers(ScheduledEngine):
    """A model in this process. One thread runs it; all callers fill the same batches."""

    def __init__(self, config: Config, model: Any, prompter: _chat.Prompter) -> None:
        self.model = config.model_name
        self.revision = str(config.revision or getattr(model.config, "_commit_hash", None) or "")
        self._generator = _BatchGenerator(model, prompter.processor)
        self._prompter = prompter
        self._batches = _Batches(self._generator.answer_batch, size=config.batch_size)
        self._loop = EventLoopThread("transformers")
        bounds = Bounds(
            max_in_flight=2 * config.batch_size,  # one batch runs while the next waits
            saturation=config.batch_size,
            num_ahead=config.threads + config.batch_size,
            max_unordered=6 * config.batch_size,
            num_threads=config.threads,
        )
        self._scheduler = RequestScheduler(bounds, prepare=self._prepare, ask=self._ask, loop=self._loop)

    def close(self) -> None:
        self._scheduler.close()
        self._batches.close()
        self._loop.close()
        self._generator.close()

    def _prepare(self, request: Request) -> Prepared:
        return Prepared(text=self._prompter.render_text(request), pictures=self._prompter.load_images(request))

    async def _ask(self, prepared: Prepared, request: Request, sampling: Sampling, seed: int) -> Reply:
        loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def on_done(outcome: Reply | Exception) -> None:
            loop.call_soon_threadsafe(_set_outcome, answer, outcome)

        self._batches.add(
            QueuedRequest(prepared=prepared, request=request, sampling=sampling, seed=seed, on_done=on_done)
        )
        reply: Reply = await answer
        return reply


def _set_outcome(answer: asyncio.Future[Reply], outcome: Reply | Exception) -> None:
    if answer.done():  # cancelled
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


class _Batches:
    """Forms batches from the attempts of all callers and runs them in a thread of its own."""

    def __init__(self, answer: Callable[[list[QueuedRequest]], None], *, size: int) -> None:
        self._answer, self._size = answer, size
        self._queue: queue.SimpleQueue[QueuedRequest | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def add(self, attempt: QueuedRequest) -> None:
        self._queue.put(attempt)

    def close(self) -> None:
        """Waits for the running batch. Idempotent."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, is_last = self._fill_batch(first)
            if self._closed:
                _finish_all(batch, EngineDiedError("the engine was closed during a request"))
            else:
                self._answer(batch)
            if is_last:
                return

    def _fill_batch(self, first: QueuedRequest) -> tuple[list[QueuedRequest], bool]:
        batch, deadline = [first], time.monotonic() + LINGER
        while len(batch) < self._size:
            try:
                attempt = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if attempt is None:
                return batch, True
            batch.append(attempt)
        return batch, False


class _BatchGenerator:
    """Runs the model on batches of attempts."""

    def __init__(self, model: Any, processor: Any) -> None:
        import torch
        from transformers import GenerationConfig

        self._model, self._processor = model, processor
        self._tokenizer = processor.tokenizer
        self._tokenizer.padding_side = "left"
        self._ends = _find_end_tokens(model, self._tokenizer)
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        # The checkpoint's own temperature and penalties must not apply: sampling is explicit.
        model.generation_config = GenerationConfig(eos_token_id=self._ends, pad_token_id=pad)
        text = model.config.get_text_config()
        self._context = int(getattr(text, "max_position_embeddings", 0) or 2**31)
        self._suppressed = torch.tensor(
            _find_suppressed_tokens(model, self._tokenizer, self._ends), device=model.device
        )
        self._grammars = Grammars(self._tokenizer, vocabulary=text.vocab_size, ends=self._ends)

    def close(self) -> None:
        self._model = None

    def answer_batch(self, batch: list[QueuedRequest]) -> None:
        """Answers a batch. A batch that fails is split in halves, so that only the bad request gets the error."""
        import torch

        for part in _split_by_images(batch):
            try:
                with torch.inference_mode():
                    self._generate(part)
            except EngineDiedError as error:
                _finish_all(part, error)
            except torch.AcceleratorError as error:  # a GPU that has failed stays unusable
                _finish_all(part, EngineDiedError(f"{self._model.device} failed: {error}"))
            except Exception as error:  # the processor and the model may raise anything
                if len(part) == 1:
                    is_bad = isinstance(error, BadRequestError)
                    trouble = machine.find_trouble(error) or BadRequestError(f"{type(error).__name__}: {error}")
                    _finish_all(part, error if is_bad else trouble)
                else:
                    self.answer_batch(part[: len(part) // 2])
                    self.answer_batch(part[len(part) // 2 :])

    def _generate(self, batch: list[QueuedRequest]) -> None:
        inputs = self._build_inputs(batch)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        if fitting := [attempt for attempt, length in zip(batch, lengths, strict=True) if length < self._context]:
            if len(fitting) < len(batch):
                self._reject_long_prompts(batch, lengths)
                self._generate(fitting)
                return
            rows = [self._make_row(attempt, length) for attempt, length in zip(batch, lengths, strict=True)]
            self._run_model(rows, inputs)
            for attempt, row, length in zip(batch, rows, lengths, strict=True):
                attempt.on_done(self._make_reply(row, length))
        else:
            self._reject_long_prompts(batch, lengths)

    def _build_inputs(self, batch: list[QueuedRequest]) -> Any:
        pictures = [list(attempt.prepared.pictures) for attempt in batch]
        images = {"images": pictures} if any(pictures) else {}
        inputs = self._processor(
            text=[attempt.prepared.text for attempt in batch],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
            **images,
        )
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def _reject_long_prompts(self, batch: list[QueuedRequest], lengths: list[int]) -> None:
        for attempt, length in zip(batch, lengths, strict=True):
            if length >= self._context:
                attempt.on_done(
                    BadRequestError(f"the prompt has {length} tokens; the model's context is {self._context}")
                )

    def _make_row(self, attempt: QueuedRequest, length: int) -> Row:
        return Row(
            sampling=attempt.sampling,
            seed=attempt.seed,
            max_tokens=min(attempt.sampling.max_tokens, self._context - length),
            top_tokens=attempt.request.top_tokens,
            matcher=self._grammars.compile_matcher(attempt.request.schema)
            if attempt.request.schema is not None
            else None,
        )

    def _run_model(self, rows: Sequence[Row], inputs: Any) -> None:
        import torch

        ends = torch.tensor(self._ends)
        sampler = TokenSampler(
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
            logits_processor=[sampler],
            stopping_criteria=[sampler.finished],
        )

    def _make_reply(self, row: Row, num_prompt_tokens: int) -> Reply:
        return Reply(
            text=_chat.decode_answer(self._tokenizer, row.tokens, stopped=row.stopped),
            finish_reason="stop" if row.stopped else "length",
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=len(row.tokens),
            tokens=_chat.decode_choices(self._tokenizer, row.tokens, row.choices) if row.top_tokens else None,
        )


def _finish_all(batch: list[QueuedRequest], outcome: Exception) -> None:
    for attempt in batch:
        attempt.on_done(outcome)


def _split_by_images(batch: list[QueuedRequest]) -> list[list[QueuedRequest]]:
    """Splits attempts with and without images: few processors take both at once."""
    parts = [
        [attempt for attempt in batch if bool(attempt.prepared.pictures) is has_images] for has_images in (True, False)
    ]
    return [part for part in parts if part]


def _find_end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Returns the tokens that end an answer."""
    given = model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


def _find_suppressed_tokens(model: Any, tokenizer: Any, ends: Sequence[int]) -> list[int]:
    """Returns tokens that are not text: special ones, and image placeholders, which would break the next step."""
    placeholders = [
        value
        for config in (model.config, model.config.get_text_config())
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    ]
    return sorted({*tokenizer.all_special_ids, *placeholders} - set(ends))
