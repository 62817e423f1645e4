"""Decides what is asked about an image, and what becomes of the answer: one row for each candidate.

It knows recipes and where they are asked; it does not know who answers, nor what makes a caption good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from pipeline import plugins
from pipeline.engines import Engine, Reply, Request
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.execution.passes import Pass
from pipeline.execution.shard import Shard
from pipeline.records import Caption, Image, column_names
from pipeline.sections import Run, key
from pipeline.storage import database
from stages import recipes
from stages.recipes import Recipe
from stages.sql import check_query, find_scores
from stages.text import answers
from stages.text.prompts import SamplingConfig, derive_seed, encode_sampling, engine_slice, map_with_context

NAMED = True
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[caption.NAME]`."""

    recipe: str = key("dense", "what is asked: a file of recipes/, your own or one that ships")
    engine: str = key(help="who is asked: a name in [engines]")
    num_candidates: int = key(1, "captions of each image", least=1)
    where: str | None = key(
        None, "only these images: an SQL condition over image columns and, with `of`, the names of scores"
    )
    of: str | None = key(
        None, "the caption pass whose scores `where` means; a score is that of an image's best candidate there"
    )
    temperature: float | None = key(None, "in the place of the recipe's", least=0, most=2)
    top_p: float | None = key(None, "in the place of the recipe's", least=0, most=1)
    top_k: int | None = key(None, "in the place of the recipe's", least=0)
    repetition_penalty: float | None = key(None, "in the place of the recipe's", least=0.1, most=10)
    max_tokens: int | None = key(None, "in the place of the recipe's", least=1)
    ladder: tuple[float, ...] | None = key(None, "temperatures of the attempts after the first, like the recipe's")
    max_error_share: float | None = key(None, "in the place of the run's", stamp=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class CaptionInput:
    """One candidate to be made."""

    image: Image
    candidate: int  # from 0
    data: Callable[[], bytes]  # the image file, read when it is called
    again: tuple[str, ...] = ()  # see Shard

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.image.key, self.candidate)


@dataclass(frozen=True, kw_only=True)
class CaptionWork:
    """A pass of the caption stage, with all that its questions and rows need."""

    name: str
    engine: str
    seed: int  # the run's
    recipe: Recipe
    drawing: SamplingConfig

    def work(self, inputs: Iterator[CaptionInput], engines: Mapping[str, Engine]) -> Iterator[Caption]:
        engine = engines[self.engine]
        for wanted, reply in map_with_context(engine.generate, ((wanted, self.request(wanted)) for wanted in inputs)):
            yield self.row(wanted, reply, engine)

    def request(self, wanted: CaptionInput) -> Request:
        """
        Raises:
            OSError: the image's bytes have gone.
        """
        return Request(
            id=f"{wanted.image.key}/{wanted.candidate}",
            system=self.recipe.spec.system,
            prompt=self.recipe.build_prompt(wanted.image.alt_text).prompt,
            images=(wanted.data(),),
            source_key=wanted.image.source_key,
            schema=self.recipe.schema,
            ladder=self.drawing.rungs,
            accept=lambda reply: answers.read_answer(reply, self.recipe.answer_format).error or "",
            seed=derive_seed(self.seed, wanted.image.key, self.name, wanted.candidate, *wanted.again),
        )

    def row(self, wanted: CaptionInput, reply: Reply, engine: Engine) -> Caption:
        answer = answers.read_answer(reply, self.recipe.answer_format)
        asked = self.recipe.build_prompt(wanted.image.alt_text)
        return Caption(
            key=wanted.image.key,
            name=self.name,
            candidate=wanted.candidate,
            text=answer.text,
            fields=answer.fields,
            status=answer.status,
            error=answer.error,
            flags=self.recipe.find_flags(answer.text, asked),
            finish_reason=reply.finish_reason,
            attempt=reply.attempt,
            seed=reply.seed,
            num_prompt_tokens=reply.num_prompt_tokens,
            num_output_tokens=reply.num_output_tokens,
            model=engine.model,
            revision=engine.revision,
            prompt_hash=asked.hash,
            sampling=encode_sampling(reply.sampling),
            engine=self.engine,
        )


def passes(run: Run) -> Iterable[Pass]:
    """One for each `[caption.NAME]`.

    Raises:
        ConfigError: a section names what is not there, or its `where` is no condition.
    """
    return [_pass(run, name, config) for name, config in run.sections["caption"].items()]


def _pass(run: Run, name: str, config: Config) -> Pass:
    where = f"{run.file}: caption.{name}"
    try:
        recipe = recipes.load(config.recipe, run=run.file.parent)
    except UnknownNameError as error:
        raise ConfigError(f"{where}.recipe", str(error)) from error
    drawing = _drawing(config, recipe, where)
    engine = engine_slice(run, config.engine, field=f"caption.{name}.engine")
    scores = _scores(run, name, config)
    return Pass(
        stage="caption",
        name=name,
        folder=f"caption/{name}",
        reads=("image", *(f"score/{score}/{config.of}" for score in scores)),
        engines=(config.engine,),
        version=VERSION,
        slice={
            "recipe": recipe.slice,
            "sampling": [asdict(rung) for rung in drawing.rungs],
            "num_candidates": config.num_candidates,
            "where": config.where,
            "of": config.of,
            "seed": run.seed,
            "engine": engine,
        },
        record=Caption,
        max_error_share=run.max_error_share if config.max_error_share is None else config.max_error_share,
        inputs=partial(inputs, num_candidates=config.num_candidates, query=_query(config, scores)),
        work=CaptionWork(name=name, engine=config.engine, seed=run.seed, recipe=recipe, drawing=drawing).work,
    )


def inputs(shard: Shard, *, num_candidates: int, query: str | None) -> Iterator[CaptionInput]:
    """The candidates to be made, those of one image adjacent, images in key order.

    Args:
        shard: the shard.
        num_candidates: of each image.
        query: SQL that gives the keys wanted, in order; None: those of all images that are ok.
    """
    images = shard.read_table("image", Image)
    wanted = (image for image in images if image.status == "ok") if query is None else _chosen(shard, images, query)
    for image in wanted:
        for candidate in range(num_candidates):
            yield CaptionInput(
                image=image, candidate=candidate, data=partial(shard.read_image, image), again=shard.retry_of
            )


def _chosen(shard: Shard, images: Iterator[Image], query: str) -> Iterator[Image]:
    for (wanted,) in shard.query(query):
        yield next(image for image in images if image.key == wanted)


def _drawing(config: Config, recipe: Recipe, where: str) -> SamplingConfig:
    """The recipe's sampling with what the section says instead."""
    instead = {name: value for name in column_names(SamplingConfig) if (value := getattr(config, name)) is not None}
    try:
        drawing = replace(recipe.spec.sampling, **instead)
    except ValueError as error:
        raise ConfigError(where, str(error)) from error
    if config.num_candidates > 1 and drawing.temperature == 0:
        raise ConfigError(
            f"{where}.num_candidates", f"{config.num_candidates} candidates would be equal: the temperature is 0"
        )
    return drawing


def _scores(run: Run, name: str, config: Config) -> list[str]:
    """The scores that `where` names.

    Raises:
        ConfigError: it is no condition, names something else, or `of` does not fit.
    """
    if config.where is None and config.of is None:
        return []
    field, others = f"{run.file}: caption.{name}", sorted(set(run.sections["caption"]) - {name})
    named = sorted(find_scores(run, f"caption.{name}.where", config.where or "true"))
    if named and config.of is None:
        raise ConfigError(f"{field}.of", f"is missing: {named[0]} of which captions? {', '.join(others)}")
    if config.of is not None and config.of not in others:
        raise ConfigError(f"{field}.of", plugins.explain_unknown(config.of, others))
    if config.of is not None and not named:
        raise ConfigError(f"{field}.of", "says whose scores `where` means, but `where` names no score")
    check_query(run, f"caption.{name}.where", _query(config, named) or "SELECT 1")
    return named


def _query(config: Config, scores: list[str]) -> str | None:
    """The keys of the images that are wanted, in order."""
    if config.where is None:
        return None
    joined = ""
    if scores:
        best = ", ".join(
            f"max(value) FILTER (name = {database.quote_literal(s)}) AS {database.quote_identifier(s)}" for s in scores
        )
        of = database.quote_literal(config.of or "")
        joined = f" LEFT JOIN (SELECT key, {best} FROM score WHERE caption = {of} GROUP BY key) AS scores USING (key)"
    return f"SELECT key FROM image{joined} WHERE status = 'ok' AND ({config.where}) ORDER BY key"
