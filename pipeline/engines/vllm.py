"""The vllm engine: vLLM's asynchronous engine in this process, behind one scheduler, restarted when it dies.

Threads prepare prompts and pixels ahead of it, once for all candidates of an image, and it does not drain between
batches or shards. It does not know how vLLM schedules tokens.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import machine
from pipeline.decoding.images import Region
from pipeline.engines import Inspection, Reply, Request, Sampling, TokenChoice, _chat, find_no_loop
from pipeline.engines._inspection import check_installed, inspect_model
from pipeline.engines._options import LOOP_DETECTION, Loops, Model, Serving, require_module
from pipeline.engines._reaper import Reaper
from pipeline.engines._scheduler import Bounds, EventLoopThread, RequestScheduler, ScheduledEngine, SingleFlightCache
from pipeline.errors import BadRequestError, EngineDiedError
from pipeline.sections import key

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SHUTDOWN_TIMEOUT = 30.0  # seconds for vLLM's processes to end
CACHED_TEXTS = 256  # tokenized prompts: requests about different images may have the same text
HOW_TO_INSTALL = "for a CPU: make vllm; for a GPU: pip install '.[vllm]' in a clone of recap"
TERMINATED = "vLLM was terminated by a signal or by an operator"

ON_DEVICES = True  # each worker process gets its own GPUs


@dataclass(frozen=True, kw_only=True)
class Config(Loops, Serving, Model):
    """`[engines.NAME]` with kind = "vllm".

    `max_model_len` is not derived from recipes: alt text and captions in a prompt have no bound, and vLLM allocates
    memory for tokens as they come.
    """

    extra: dict[str, Any] = key(factory=dict, help="further arguments of vLLM's AsyncEngineArgs, such as quantization")
    max_in_flight: int = key(0, "requests inside vLLM at once; 0: twice max_num_seqs", stamp=False, least=0)
    num_restarts: int = key(2, "restarts of a vLLM that died, at most", stamp=False, least=0)


def open(config: Config) -> Vllm:
    """Loads the model, which takes minutes for a large one.

    Raises:
        ConfigError: vLLM is not installed, there is no such model, or vLLM rejects the arguments.
        EngineDiedError: vLLM did not start.
    """
    set_default_environment(kv_cache_gib=config.kv_cache_gib)
    require_vllm()
    prompter = _chat.Prompter(config)
    loop = EventLoopThread("vllm")
    try:
        return Vllm(config, prompter, loop)
    except BaseException:  # even Ctrl-C must not leave the loop's thread behind; re-raised
        loop.close()
        raise


def inspect(config: Config) -> Inspection:
    """
    Raises:
        ConfigError: vLLM is not installed, or there is no such model.
    """
    check_installed("vllm", kind="vllm", how=HOW_TO_INSTALL)
    return inspect_model(config, max_model_len=config.max_model_len)


def require_vllm() -> None:
    require_module("vllm", kind="vllm", how=HOW_TO_INSTALL)


def is_cpu_build() -> bool:
    """Tests whether the installed vLLM is a CPU build, by its package's name and version."""
    packages = metadata.packages_distributions().get("vllm", [])
    return any("cpu" in f"{package} {metadata.version(package)}" for package in packages)


def set_default_environment(*, kv_cache_gib: int) -> None:
    """Sets the options that vLLM reads from the environment only. Variables that the user has set stay."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of this multi-threaded process could inherit a held lock
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is data
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)


class Vllm(ScheduledEngine):
    """vLLM in this process, on its own event loop."""

    def __init__(self, config: Config, prompter: _chat.Prompter, loop: EventLoopThread) -> None:
        self.model = config.model_name
        self._loop = loop
        self._prompter = prompter
        self._prompt_cache: SingleFlightCache[Any] = SingleFlightCache(_chat.CACHED_IMAGES)
        self._token_cache: SingleFlightCache[Sequence[int]] = SingleFlightCache(CACHED_TEXTS)
        self._core = _Core(config, prompter.tokenizer)
        loop.run(self._core.start())
        self.revision = str(config.revision or self._core.commit or "")
        max_in_flight = config.max_in_flight or 2 * config.max_num_seqs
        bounds = Bounds(
            max_in_flight=max_in_flight,
            saturation=min(config.max_num_seqs, max_in_flight),
            num_ahead=2 * config.threads + 4,
            max_unordered=4 * max_in_flight,
            num_threads=config.threads,
        )
        self._scheduler = RequestScheduler(bounds, prepare=self._prepare, ask=self._core.ask, loop=loop)

    def close(self) -> None:
        self._scheduler.close()
        self._loop.close(self._core.stop)

    def _prepare(self, request: Request) -> Any:
        """Returns vLLM's processed prompt, tokens and pixel values, which candidates of one image share."""
        return self._prompt_cache(
            (request.system, request.examples, request.prompt, request.images), partial(self._render_prompt, request)
        )

    def _render_prompt(self, request: Request) -> Any:
        text, pictures = self._prompter.render_text(request), self._prompter.load_images(request)
        data: dict[str, Any] = {}
        if pictures:
            names = [_hash_image(*pair) for pair in zip(request.images, pictures, strict=True)]
            data = {"multi_modal_data": {"image": list(pictures)}, "multi_modal_uuids": {"image": names}}
        try:
            tokens = self._token_cache(text, partial(self._core.tokenize, text))
            return self._core.render({"prompt_token_ids": list(tokens), **data})
        except Exception as error:  # the model's own processor, which promises no type
            if trouble := machine.find_trouble(error):
                raise trouble from error
            raise BadRequestError(f"{type(error).__name__}: {error}") from error


def _hash_image(image: bytes | Region, picture: Picture) -> str:
    """Hashes an image for vLLM's cache, by its file or by its pixels, whichever is smaller."""
    width, height = picture.size
    if isinstance(image, bytes) and len(image) <= 3 * width * height:
        return hashlib.sha256(image).hexdigest()
    return hashlib.sha256(b"%d x %d " % (width, height) + picture.tobytes()).hexdigest()


class _Core:
    """The running vLLM engine and its restarts. Used on the event loop, except `tokenize` and `render`."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._engine: Any = None
        self._reaper: Reaper | None = None
        self._num_deaths = 0
        self._restart_lock: asyncio.Lock | None = None
        self._numbers = itertools.count()

    @property
    def commit(self) -> str | None:
        commit = getattr(self._engine.model_config.hf_config, "_commit_hash", None)
        return commit if isinstance(commit, str) else None

    async def start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            arguments = AsyncEngineArgs(**build_engine_arguments(self._config, num_threads=self._config.threads))
            config = arguments.create_engine_config()
        except (OSError, ValueError, TypeError) as error:
            raise _chat.make_load_error(self._config, error) from error
        self._reaper = Reaper()
        with nullcontext() if self._config.enforce_eager else serialize_first_start(_make_cache_key(self._config)):
            try:
                with self._reaper.tag_children():
                    self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
            except (RuntimeError, OSError, ValueError) as error:
                self._reaper.stop()
                raise EngineDiedError(f"vLLM did not start: {error}; see its log above") from error

    async def stop(self) -> None:
        if self._engine is not None:
            self._shut_down(self._engine)
            self._engine = None

    def _shut_down(self, engine: Any) -> None:
        engine.shutdown(timeout=SHUTDOWN_TIMEOUT)
        if self._reaper is not None:
            self._reaper.stop()

    def tokenize(self, text: str) -> Sequence[int]:
        """Callable from any thread: vLLM has a tokenizer for each of `renderer_num_workers` threads."""
        renderer, parameters = self._get_renderer()
        tokens: Sequence[int] = renderer.tokenize_prompt({"prompt": text}, parameters)["prompt_token_ids"]
        return tokens

    def render(self, prompt: dict[str, Any]) -> Any:
        """Callable from any thread."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer, parameters = self._get_renderer()
        (rendered,) = renderer.render_cmpl([parse_model_prompt(renderer.model_config, prompt)], parameters)
        return rendered

    def _get_renderer(self) -> tuple[Any, Any]:
        if (engine := self._engine) is None:
            raise EngineDiedError("the engine is closed")
        return engine.renderer, engine.renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)

    async def ask(self, prepared: Any, request: Request, sampling: Sampling, seed: int) -> Reply:
        """Answers one attempt, again after each restart of the engine."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        while True:
            engine, number = self._engine, next(self._numbers)
            try:
                parameters = _build_parameters(request, sampling, seed, stop_loops=self._config.stop_loops)
                return await self._generate_once(engine, dict(prepared), parameters, f"recap-{number}")
            except EngineDeadError as error:
                await self._restart(engine, error)
            except EngineGenerateError as error:
                if not engine.errored:
                    raise BadRequestError(f"{error.__cause__ or error}") from error
                await self._restart(engine, error)

    async def _generate_once(self, engine: Any, prompt: dict[str, Any], parameters: Any, name: str) -> Reply:
        from vllm.exceptions import VLLMClientError

        try:
            async for output in engine.generate(prompt, parameters, name):
                last = output
        except (VLLMClientError, ValueError, TypeError) as error:
            raise BadRequestError(str(error)) from error
        (answer,) = last.outputs
        if answer.finish_reason == "abort":  # the answer so far is incomplete
            raise EngineDiedError(TERMINATED)
        try:
            text = _chat.decode_answer(self._tokenizer, answer.token_ids, stopped=answer.finish_reason == "stop")
            tokens = self._decode_choices(answer) if answer.logprobs is not None else None
        except (
            OverflowError,
            ValueError,
            TypeError,
        ) as error:  # ids beyond the vocabulary: models pad their output layer
            raise BadRequestError(f"the answer cannot be decoded: {error}") from error
        return Reply(
            text=text,
            finish_reason=answer.finish_reason,
            num_prompt_tokens=len(last.prompt_token_ids or ()),
            num_output_tokens=len(answer.token_ids),
            tokens=tokens,
        )

    def _decode_choices(self, answer: Any) -> tuple[TokenChoice, ...]:
        choices = ({token: chance.logprob for token, chance in step.items()} for step in answer.logprobs)
        return _chat.decode_choices(self._tokenizer, answer.token_ids, choices)

    async def _restart(self, dead: Any, error: Exception) -> None:
        """Starts a new engine, once for all requests that saw the old one die."""
        self._restart_lock = self._restart_lock or asyncio.Lock()
        async with self._restart_lock:
            if self._engine is not dead:
                return
            self._num_deaths += 1
            terminated = _was_terminated(dead)
            self._shut_down(dead)
            if terminated:
                raise EngineDiedError(TERMINATED) from error
            if self._num_deaths > self._config.num_restarts:
                raise EngineDiedError(f"vLLM died {self._num_deaths} times, the last time: {error}") from error
            await self.start()


def _was_terminated(engine: Any) -> bool:
    """Tests whether the engine's processes ended by a signal that may have been sent to the whole process group."""
    processes = list(getattr(engine.engine_core.resources.engine_manager, "processes", ()))
    for process in processes:
        process.join(5)
    return bool(processes) and all(p.exitcode in (0, -signal.SIGTERM, -signal.SIGINT) for p in processes)


def build_engine_arguments(config: Config, *, num_threads: int) -> dict[str, Any]:
    """Returns vLLM's arguments, in process or as a server, for a workload that sees each image once."""
    return {
        "model": str(config.model),
        "revision": config.revision,
        "tokenizer_revision": config.revision,
        "dtype": _choose_dtype(config) if config.dtype == "auto" else config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "load_format": "safetensors",  # never a pickle
        "max_model_len": config.max_model_len or -1,  # -1: as many as the model has and memory holds
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        # A chunked prefill rewinds the random generators of seeded requests, which those of a CPU do not support.
        "enable_chunked_prefill": False if is_cpu_build() else None,
        "limit_mm_per_prompt": {"image": config.images_per_prompt, "video": 0},
        "mm_processor_cache_gb": 0,
        # `disable_any_whitespace` would force a style on the model that it was not trained on.
        "structured_outputs_config": {"backend": "xgrammar"},
        "renderer_num_workers": num_threads,
        **config.extra,
    }


def _choose_dtype(config: Config) -> str:
    """Agrees with the transformers engine: vLLM's own "auto" computes in 16 bits what is stored in 32."""
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(config.model, revision=config.revision)
    except OSError:  # vLLM reports what is wrong with the model
        return "auto"
    configs = (values, values.get("text_config") or {})
    dtypes = (config.get(name) for config in configs for name in ("dtype", "torch_dtype"))
    stored = next((str(dtype) for dtype in dtypes if dtype), "auto")
    return "float32" if stored != "auto" and is_cpu_build() and machine.emulates_bfloat16() else stored


def _make_cache_key(config: Config) -> str:
    """Returns the options of run.toml that decide whether vLLM's compile cache applies."""
    import vllm

    extra = sorted(config.extra.items())
    return f"{vllm.__version__} {config.model} {config.revision} {config.dtype} {config.tensor_parallel_size} {extra}"


def _build_parameters(request: Request, sampling: Sampling, seed: int, *, stop_loops: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

    detects = stop_loops and request.find_loop is not find_no_loop

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        seed=seed % 2**63 if sampling.temperature > 0 else None,
        logprobs=request.top_tokens or None,
        structured_outputs=StructuredOutputsParams(json=request.schema) if request.schema is not None else None,
        repetition_detection=RepetitionDetectionParams(**LOOP_DETECTION) if detects else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,  # whole answers are decoded here; doing it per token would slow the engine's input
    )


@contextmanager
def serialize_first_start(cache_key: str, *, folder: Path | None = None) -> Iterator[None]:
    """Lets the machine's first process with this key start alone, because it fills the compile cache.

    Processes that come meanwhile wait for it; later ones start at once.
    """
    folder = folder or Path(tempfile.gettempdir())
    name = f"recap-vllm-{hashlib.sha256(f'{os.getuid()} {cache_key}'.encode()).hexdigest()[:16]}"
    done = folder / f"{name}.done"
    with (folder / f"{name}.lock").open("w") as lock:
        if not done.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            fcntl.flock(lock, fcntl.LOCK_UN)
        yield
        done.touch()
