"""Finder `asked`: a model that sees the image lists things as JSON; the words are a file of finders/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.sections import key
from stages.finders import FinderInput, FinderResult, _questions
from stages.finders._questions import Settings
from stages.text.prompts import map_with_context


@dataclass(frozen=True, kw_only=True)
class Config:
    engine: str = key(help="the model: a name in [engines]")
    question: str = key("objects", "its prompt and answer format: a file of finders/, your own or one that ships")


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: the question does not exist or is wrong.
    """
    try:
        return Settings(engine=config.engine, spec=_questions.load(config.question, run=run))
    except UnknownNameError as error:
        raise ConfigError(f"{field}.question", str(error)) from error


def engines(settings: Settings) -> Mapping[str, str]:
    return {"engine": settings.engine}


def find(inputs: Iterable[FinderInput], settings: Settings, engines: Mapping[str, Engine]) -> Iterator[FinderResult]:
    engine = engines[settings.engine]
    requests = ((item, _questions.build_request(item, settings.spec)) for item in inputs)
    for _, reply in map_with_context(engine.generate, requests):
        found, problem = _questions.read_answer(reply, settings.spec)
        yield FinderResult(
            found=found,
            status="error" if reply.error else "invalid" if problem else "ok",
            error=problem or None,
            num_prompt_tokens=reply.num_prompt_tokens,
            num_output_tokens=reply.num_output_tokens,
            attempt=reply.attempt,
            model=engine.model,
            revision=engine.revision,
            engine=settings.engine,
        )
