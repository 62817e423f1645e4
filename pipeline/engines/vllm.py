"""Decides how vLLM is asked in this process: its asynchronous engine behind one window, opened again when it dies.

Prompts and pixels are made ready in threads ahead of it, once for all candidates of an image; it never drains between
batches or shards. It does not know how tokens are scheduled: that is vLLM's affair.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engines import Reply, Request, Sampling, _chat
from pipeline.engines._options import Model, Serving, require_module
from pipeline.engines._reaper import Reaper
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, ScheduledEngine, SingleFlightCache
from pipeline.errors import BadRequestError, EngineDiedError
from pipeline.machine import emulates_bfloat16
from pipeline.sections import key

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SHUTDOWN = 30.0  # seconds for vLLM's processes to end by themselves
NUM_TEXTS = 256  # prompts whose tokens are kept: with images all may have the same words
TOLD_TO_END = "vLLM was told to end, by a signal or by an operator"

ON_DEVICES = True  # each worker process is to have GPUs of its own


@dataclass(frozen=True, kw_only=True)
class Config(Serving, Model):
    """`[engines.NAME]` with kind = "vllm".

    `max_model_len` is not derived from recipes: what a prompt brings in (alt text, captions) has no bound, and vLLM
    takes memory for the tokens that there are, not for those that there might be.
    """

    extra: dict[str, Any] = key(factory=dict, help="more arguments of vLLM's AsyncEngineArgs, such as quantization")
    max_in_flight: int = key(0, "requests inside vLLM at once; 0: twice max_num_seqs", stamp=False, least=0)
    num_restarts: int = key(2, "times that an engine that died is opened again", stamp=False, least=0)


def open(config: Config) -> Vllm:  # noqa: A001
    """Loads the model; minutes for a large one.

    Raises:
        ConfigError: vLLM is not installed, there is no such model, or vLLM refuses the arguments.
        EngineDiedError: vLLM did not start.
    """
    set_default_environment(kv_cache_gib=config.kv_cache_gib)
    require_vllm()
    prompter = _chat.Prompter(config)
    loop = EventLoopThread("vllm")
    try:
        return Vllm(config, prompter, loop)
    except BaseException:  # a Ctrl-C too must not leave the loop's thread behind; raised again
        loop.close()
        raise


def require_vllm() -> None:
    require_module(
        "vllm", kind="vllm", how="`make vllm` installs it for a CPU, `pip install 'recap-pipeline[vllm]'` for a GPU"
    )


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed computes on a CPU. Its packages say so by their name or their version."""
    packages = metadata.packages_distributions().get("vllm", [])
    return any("cpu" in f"{package} {metadata.version(package)}" for package in packages)


def set_default_environment(*, kv_cache_gib: int) -> None:
    """What vLLM takes from the environment alone; what the user has set there stays."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads: a fork could inherit a held lock
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is data
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)


class Vllm(ScheduledEngine):
    """vLLM in this process, on an event loop of its own."""

    def __init__(self, config: Config, prompter: _chat.Prompter, loop: EventLoopThread) -> None:
        self.model = config.model_name
        self._loop = loop
        self._prompter = prompter
        self._prompts: SingleFlightCache[Any] = SingleFlightCache(_chat.CACHED_IMAGES)
        self._tokens: SingleFlightCache[Sequence[int]] = SingleFlightCache(NUM_TEXTS)
        self._core = _Core(config, prompter.tokenizer)
        loop.run(self._core.start())
        self.revision = str(config.revision or self._core.commit or "")
        max_in_flight = config.max_in_flight or 2 * config.max_num_seqs
        bounds = Bounds(
            max_in_flight=max_in_flight,
            enough=min(config.max_num_seqs, max_in_flight),
            num_ahead=2 * config.threads + 4,
            max_unordered=4 * max_in_flight,
            num_threads=config.threads,
        )
        self._window = RequestScheduler(bounds, prepare=self._prepare, ask=self._core.ask, loop=loop)

    def close(self) -> None:
        self._window.close()
        self._loop.close(self._core.stop)

    def _prepare(self, request: Request) -> Any:
        """The prompt as vLLM's processor makes it: tokens and pixel values. Candidates of an image share it."""
        return self._prompts((request.system, request.prompt, request.images), partial(self._rendered, request))

    def _rendered(self, request: Request) -> Any:
        text, pictures = self._prompter.render_text(request), self._prompter.load_images(request)
        data: dict[str, Any] = {}
        if pictures:
            names = [_name(*shown) for shown in zip(request.images, pictures, strict=True)]
            data = {"multi_modal_data": {"image": list(pictures)}, "multi_modal_uuids": {"image": names}}
        try:
            tokens = self._tokens(text, partial(self._core.tokens, text))
            return self._core.render({"prompt_token_ids": list(tokens), **data})
        except Exception as error:  # the model's own processor, which promises no type
            raise BadRequestError(f"{type(error).__name__}: {error}") from error


def _name(image: bytes, picture: Picture) -> str:
    """Which picture it is, so that vLLM need not hash the pixels; a large file takes longer to hash than they do."""
    width, height = picture.size
    small = len(image) <= 3 * width * height
    return hashlib.sha256(image if small else b"%d x %d " % (width, height) + picture.tobytes()).hexdigest()


class _Core:
    """The engine that is alive now, and how often it was opened. Lives on the loop, but for `tokens` and `render`."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._engine: Any = None
        self._reaper: Reaper | None = None
        self._num_deaths = 0
        self._starting: asyncio.Lock | None = None
        self._numbers = itertools.count()

    @property
    def commit(self) -> str | None:
        found = getattr(self._engine.model_config.hf_config, "_commit_hash", None)
        return found if isinstance(found, str) else None

    async def start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            arguments = AsyncEngineArgs(**build_engine_arguments(self._config, num_threads=self._config.threads))
            config = arguments.create_engine_config()
        except (OSError, ValueError, TypeError) as error:
            raise _chat.make_load_error(self._config, error) from error
        self._reaper = Reaper()
        with nullcontext() if self._config.enforce_eager else serialize_first_start(_compiled(self._config)):
            try:
                with self._reaper.tag_children():
                    self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
            except (RuntimeError, OSError, ValueError) as error:
                self._reaper.stop()
                raise EngineDiedError(f"vLLM did not start: {error}; its own log above says why") from error

    async def stop(self) -> None:
        if self._engine is not None:
            self._shut(self._engine)
            self._engine = None

    def _shut(self, engine: Any) -> None:
        engine.shutdown(timeout=SHUTDOWN)
        if self._reaper is not None:
            self._reaper.stop()

    def tokens(self, text: str) -> Sequence[int]:
        """In any thread. vLLM has a tokenizer for each of `renderer_num_workers` threads."""
        renderer, parameters = self._renderer()
        found: Sequence[int] = renderer.tokenize_prompt({"prompt": text}, parameters)["prompt_token_ids"]
        return found

    def render(self, prompt: dict[str, Any]) -> Any:
        """In any thread."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer, parameters = self._renderer()
        (rendered,) = renderer.render_cmpl([parse_model_prompt(renderer.model_config, prompt)], parameters)
        return rendered

    def _renderer(self) -> tuple[Any, Any]:
        if (engine := self._engine) is None:
            raise EngineDiedError("the engine is closed")
        return engine.renderer, engine.renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)

    async def ask(self, prepared: Any, request: Request, sampling: Sampling, seed: int) -> Reply:
        """Asks again when the engine dies and could be opened again."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        while True:
            engine, number = self._engine, next(self._numbers)
            try:
                parameters = _parameters(request, sampling, seed)
                return await self._answer(engine, dict(prepared), parameters, f"recap-{number}")
            except EngineDeadError as error:
                await self._replace(engine, error)
            except EngineGenerateError as error:
                if not engine.errored:
                    raise BadRequestError(f"{error.__cause__ or error}") from error
                await self._replace(engine, error)

    async def _answer(self, engine: Any, prompt: dict[str, Any], parameters: Any, name: str) -> Reply:
        from vllm.exceptions import VLLMClientError

        try:
            async for output in engine.generate(prompt, parameters, name):
                last = output
        except (VLLMClientError, ValueError, TypeError) as error:
            raise BadRequestError(str(error)) from error
        (answer,) = last.outputs
        if answer.finish_reason == "abort":  # what there is of the answer is cut off
            raise EngineDiedError(TOLD_TO_END)
        try:
            text = _chat.decode_answer(self._tokenizer, answer.token_ids, stopped=answer.finish_reason == "stop")
        except (OverflowError, ValueError, TypeError) as error:  # tokens that are no words; models have more places
            raise BadRequestError(f"the answer cannot be read: {error}") from error
        return Reply(
            text=text,
            finish_reason=answer.finish_reason,
            num_prompt_tokens=len(last.prompt_token_ids or ()),
            num_output_tokens=len(answer.token_ids),
            logprobs=_chosen(answer.token_ids, answer.logprobs),
        )

    async def _replace(self, dead: Any, error: Exception) -> None:
        """Opens a new engine, once for all who noticed."""
        self._starting = self._starting or asyncio.Lock()
        async with self._starting:
            if self._engine is not dead:
                return
            self._num_deaths += 1
            ended = _was_told_to_end(dead)
            self._shut(dead)
            if ended:
                raise EngineDiedError(TOLD_TO_END) from error
            if self._num_deaths > self._config.num_restarts:
                raise EngineDiedError(f"vLLM died {self._num_deaths} times, the last time: {error}") from error
            await self.start()


def _processes(engine: Any) -> list[Any]:
    """vLLM's engine cores; their workers end with them."""
    return list(getattr(engine.engine_core.resources.engine_manager, "processes", ()))


def _was_told_to_end(engine: Any) -> bool:
    """Whether the process of the engine ended as asked, by a signal that may have been meant for us all."""
    processes = _processes(engine)
    for process in processes:
        process.join(5)
    return bool(processes) and all(p.exitcode in (0, -signal.SIGTERM, -signal.SIGINT) for p in processes)


def build_engine_arguments(config: Config, *, num_threads: int) -> dict[str, Any]:
    """vLLM's arguments, in process or as a server, for images that come once each."""
    return {
        "model": str(config.model),
        "revision": config.revision,
        "tokenizer_revision": config.revision,
        "dtype": _auto_dtype(config) if config.dtype == "auto" else config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "load_format": "safetensors",  # never a pickle
        "max_model_len": config.max_model_len or -1,  # as many as the model has and the memory holds
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        # A prefill that is cut turns the random generators of seeded requests back, which those of a CPU cannot do.
        "enable_chunked_prefill": False if is_cpu_build() else None,
        "limit_mm_per_prompt": {"image": config.images_per_prompt, "video": 0},
        "mm_processor_cache_gb": 0,
        # Whitespace stays the model's choice: `disable_any_whitespace` would force a style on it that it never learnt.
        "structured_outputs_config": {"backend": "xgrammar"},
        "renderer_num_workers": num_threads,
        **config.extra,
    }


def _auto_dtype(config: Config) -> str:
    """As the engine transformers has it: vLLM's own "auto" would compute in 16 bits what is stored in 32."""
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(config.model, revision=config.revision)
    except OSError:  # vLLM will say what is wrong with the model
        return "auto"
    places = (values, values.get("text_config") or {})
    found = (place.get(name) for place in places for name in ("dtype", "torch_dtype"))
    stored = next((str(dtype) for dtype in found if dtype), "auto")
    return "float32" if stored != "auto" and is_cpu_build() and emulates_bfloat16() else stored


def _compiled(config: Config) -> str:
    """What vLLM's compile cache hangs on, as far as a run.toml decides it."""
    import vllm

    extra = sorted(config.extra.items())
    return f"{vllm.__version__} {config.model} {config.revision} {config.dtype} {config.tensor_parallel_size} {extra}"


def _parameters(request: Request, sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        seed=seed % 2**63 if sampling.temperature > 0 else None,
        logprobs=0 if request.logprobs else None,
        structured_outputs=StructuredOutputsParams(json=request.schema) if request.schema is not None else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,  # token by token in this process, which has to feed the engine; the whole is ours, at once
    )


def _chosen(tokens: Iterable[int], logprobs: Any) -> tuple[float, ...] | None:
    if logprobs is None:
        return None
    return tuple(float(step[token].logprob) for token, step in zip(tokens, logprobs, strict=True))


@contextmanager
def serialize_first_start(what: str, *, folder: Path | None = None) -> Iterator[None]:
    """Lets the first process on this machine that starts `what` do it alone, for it fills the compile cache; those that
    come meanwhile wait for it, and all later ones start at once."""
    place = folder or Path(tempfile.gettempdir())
    name = f"recap-vllm-{hashlib.sha256(f'{os.getuid()} {what}'.encode()).hexdigest()[:16]}"
    done = place / f"{name}.done"
    with (place / f"{name}.lock").open("w") as lock:
        if not done.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            fcntl.flock(lock, fcntl.LOCK_UN)
        yield
        done.touch()
