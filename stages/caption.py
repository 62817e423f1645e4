"""Caption stage: prompts an engine about each selected image, and turns its replies into one row per candidate.

Knows recipes and which images to caption; knows neither the model nor what makes a caption good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from pipeline import plugins
from pipeline.engines import Engine, Reply, Request, find_no_loop
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.execution.passes import Pass, Shard, Work
from pipeline.execution.sharing import is_copy, share_rows, shares_rows
from pipeline.records import Caption, ChainedCaption, Curation, Finding, Image, column_names
from pipeline.sections import Run, key
from pipeline.storage import database
from pipeline.validation import Section
from stages import recipes
from stages.recipes import ChainRecipe, Recipe
from stages.text.answers import Answer, read_answer
from stages.text.chains import Chain, ChainSetup, Outcome, Subject, ask_chains
from stages.text.conditions import build_images, check_query, find_finders, find_scores, list_finder_folders
from stages.text.given import GivenTexts, Texts, prepare_texts
from stages.text.prompts import SamplingConfig, derive_seed, encode_sampling, engine_slice, map_where
from stages.text.repetition import find_lasting_loop

NAMED = True
VERSION = 1
WORDS_KEYS = frozenset({"words", "num_candidates", "where", "of", "max_error_share"})
NO_TEXTS = GivenTexts()


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[caption.NAME]`."""

    recipe: str = key("dense", "prompt, answer format and sampling: a file of recipes/, your own or one that ships")
    engine: str = key("", "the captioner: a name in [engines]; required without words")
    words: str = key(
        "",
        'captions without a model: SQL over columns of the image, e.g. "alt_text" or "metadata->>\'$.title\'", or a'
        " SELECT of key and text, and at will fields, over usable captions of other passes; candidate n has the n-th of"
        " several texts",
        in_init=False,
    )
    given: Mapping[str, str] = key(
        factory=dict,
        help='FIELD = "SQL" that fills {FIELD} of the recipe\'s prompt: over columns of the image and finders, e.g.'
        ' "metadata->>\'$.place\'" or "signs.text", or a SELECT of key and text over what finders found and usable'
        " captions of other passes, each a relation by its name, with its scores as columns; several texts become a"
        " numbered list",
        in_init=False,
    )
    engines: Mapping[str, str] = key(
        factory=dict,
        help='STEP = "NAME" asks a step of the recipe of another engine, overriding its own `engine`',
        in_init=False,
    )
    num_candidates: int = key(1, "captions per image", least=1)
    where: str | None = key(
        None, "caption only these images: an SQL condition over image columns, finders and, with `of`, scores"
    )
    of: str | None = key(
        None, "the caption pass whose scores `where` uses; the score of an image is that of its best candidate"
    )
    temperature: float | None = key(None, "overrides the recipe's temperature", least=0, most=2)
    top_p: float | None = key(None, "overrides the recipe's top_p", least=0, most=1)
    top_k: int | None = key(None, "overrides the recipe's top_k", least=0)
    repetition_penalty: float | None = key(None, "overrides the recipe's repetition_penalty", least=0.1, most=10)
    max_tokens: int | None = key(None, "overrides the recipe's max_tokens", least=1)
    ladder: tuple[float, ...] | None = key(None, "overrides the recipe's temperatures of the second and later attempts")
    max_error_share: float | None = key(None, "overrides the run's max_error_share", stamp=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class CaptionInput:
    """One candidate to generate."""

    image: Image
    candidate: int  # from 0
    data: Callable[[], bytes]  # reads the image file
    retry_of: tuple[str, ...] = ()  # see Shard
    texts: Texts = field(default_factory=dict)  # about the image, by field
    findings: Mapping[str, Finding] = field(default_factory=dict)  # what its recipe's finders found, by finder

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.image.key, self.candidate)


@dataclass(frozen=True, kw_only=True)
class CaptionWork:
    """The work of one caption pass."""

    name: str
    engine: str
    seed: int  # the run's
    recipe: Recipe
    sampling: SamplingConfig

    def run(self, inputs: Iterator[CaptionInput], engines: Mapping[str, Engine]) -> Iterator[Caption]:
        """Asks about every input whose required fields have texts.

        Raises:
            OSError: an image file has gone.
        """
        engine = engines[self.engine]

        def ask(items: Iterator[CaptionInput]) -> Iterator[Reply]:
            return engine.generate(map(self._build_request, items))

        for item, reply in map_where(ask, inputs, lambda item: not self._find_missing(item)):
            yield self._build_row(
                item, reply or Reply(fault=f"a required field has no text: {self._find_missing(item)}"), engine
            )

    def _find_missing(self, item: CaptionInput) -> str:
        return self.recipe.find_missing(item.image.alt_text, item.texts)

    def _build_request(self, item: CaptionInput) -> Request:
        return Request(
            id=f"{item.image.key}/{item.candidate}",
            system=self.recipe.spec.system,
            prompt=self.recipe.build_prompt(item.image.alt_text, item.texts).prompt,
            images=(*(one.image for one in self.recipe.examples), *((item.data(),) if self.recipe.spec.image else ())),
            examples=self.recipe.shown_examples,
            source_key=item.image.source_key,
            schema=self.recipe.schema,
            ladder=self.sampling.rungs,
            accept=lambda reply: read_answer(reply, self.recipe.answer_format).error or "",
            find_loop=find_no_loop if self.recipe.answer_format else find_lasting_loop,  # JSON repeats its keys
            seed=derive_seed(self.seed, item.image.key, self.name, item.candidate, *item.retry_of),
        )

    def _build_row(self, item: CaptionInput, reply: Reply, engine: Engine) -> Caption:
        prompt = self.recipe.build_prompt(item.image.alt_text, item.texts)
        answer = read_answer(reply, self.recipe.answer_format)
        flags = self.recipe.find_flags(answer.text, prompt)
        return _build_row(self, item, answer, reply, engine, flags=flags, prompt_hash=prompt.hash)


@dataclass(frozen=True, kw_only=True)
class ChainWork:
    """The work of a caption pass whose recipe is a chain of steps."""

    name: str
    engine: str  # of steps that name none
    seed: int  # the run's
    recipe: ChainRecipe
    sampling: SamplingConfig  # of steps without their own

    def run(self, inputs: Iterator[CaptionInput], engines: Mapping[str, Engine]) -> Iterator[Caption]:
        """Asks each input's questions in turn, and those of many inputs at once.

        Raises:
            OSError: an image file has gone.
        """
        used = {name: engines[name] for name in list_engines(self.recipe, self.engine)}
        for item, outcome in ask_chains(inputs, self._start_chain, used):
            yield self._build_row(item, outcome, engines[self.engine])

    def _start_chain(self, item: CaptionInput) -> Chain:
        subject = Subject(image=item.image, candidate=item.candidate, texts=item.texts, findings=item.findings)
        setup = ChainSetup(
            id=f"{item.image.key}/{item.candidate}",
            source_key=item.image.source_key,
            data=item.data,
            seed=(self.seed, item.image.key, self.name, item.candidate, *item.retry_of),
            engine=self.engine,
            ladder=self.sampling.rungs,
        )
        return Chain(self.recipe.open(subject, self.sampling), setup)

    def _build_row(self, item: CaptionInput, outcome: Outcome, engine: Engine) -> ChainedCaption:
        flags = self.recipe.find_flags(outcome.answer.text)
        row = _build_row(
            self, item, outcome.answer, outcome.reply, engine, flags=flags, prompt_hash=self.recipe.prompt_hash
        )
        of_all_steps = {
            "attempt": outcome.attempt,
            "num_prompt_tokens": outcome.num_prompt_tokens,
            "num_output_tokens": outcome.num_output_tokens,
        }
        return ChainedCaption(**vars(row) | of_all_steps, steps=outcome.steps)


def _build_row(
    work: CaptionWork | ChainWork,
    item: CaptionInput,
    answer: Answer,
    reply: Reply,
    engine: Engine,
    *,
    flags: tuple[str, ...],
    prompt_hash: str,
) -> Caption:
    return Caption(
        key=item.image.key,
        name=work.name,
        candidate=item.candidate,
        text=answer.text,
        fields=answer.fields,
        status=answer.status,
        error=answer.error,
        flags=flags,
        finish_reason=reply.finish_reason,
        attempt=reply.attempt,
        seed=reply.seed,
        num_prompt_tokens=reply.num_prompt_tokens,
        num_output_tokens=reply.num_output_tokens,
        model=engine.model,
        revision=engine.revision,
        prompt_hash=prompt_hash,
        sampling=encode_sampling(reply.sampling),
        engine=work.engine,
    )


def list_engines(recipe: Recipe | ChainRecipe, engine: str) -> tuple[str, ...]:
    """The engines of a pass: its own, then those that steps name."""
    return tuple(dict.fromkeys((engine, *(name for kind, name, _ in recipe.list_names() if kind == "engine"))))


def read_section(section: Section) -> Config:
    """
    Raises:
        ConfigError: a key is unknown, or is for a model and there is none.
    """
    config = section.parse(Config)
    if config.words:
        for name in section.values.keys() - WORDS_KEYS:
            allowed = ", ".join(sorted(WORDS_KEYS))
            raise section.error(name, f"is for a model, and a pass with words asks none; it may have {allowed}")
    elif not config.engine:
        raise section.error("engine", "is missing; it is a string: the captioner, a name in [engines]")
    return config


def passes(run: Run) -> Iterable[Pass]:
    """One pass for each `[caption.NAME]`.

    Raises:
        ConfigError: a section names something that does not exist, or its `where` is not a valid condition.
    """
    for name, config in run.sections["caption"].items():
        if config.words:
            yield _build_words_pass(run, name, config)
            continue
        p = _build_pass(run, name, config)
        yield from share_rows(p) if shares_rows(run) else (p,)


def _build_words_pass(run: Run, name: str, config: Config) -> Pass:
    """Copies of an image have words of their own, so these rows are never shared."""
    words = prepare_texts(run, {"words": config.words}, caption=name, field=f"caption.{name}", with_fields=True)
    return Pass(
        stage="caption",
        name=name,
        folder=f"caption/{name}",
        **_build_inputs(run, name, config, words, shared=False),
        version=VERSION,
        slice={
            "words": config.words,
            "num_candidates": config.num_candidates,
            "where": config.where,
            "of": config.of,
        },
        record=Caption,
        # a corpus may lack texts for most of its images
        max_error_share=1.0 if config.max_error_share is None else config.max_error_share,
        work=partial(write_words, name=name, are_objects=words.are_objects),
    )


def write_words(
    inputs: Iterator[CaptionInput], _: Mapping[str, Engine], *, name: str, are_objects: bool = False
) -> Iterator[Caption]:
    """One row per input: candidate n has the n-th of the image's words.

    Args:
        are_objects: as in GivenTexts.
    """
    for item in inputs:
        words = item.texts.get("words", ())
        text = words[item.candidate] if item.candidate < len(words) else ""
        fields, problem = None, f"{len(words)} texts for this image"
        if are_objects and text:
            problem = "an empty text"
            value = json.loads(text)
            text, fields = value["text"] or "", json.dumps(value["fields"], ensure_ascii=False)
        text = text.strip()
        yield Caption(
            key=item.image.key,
            name=name,
            candidate=item.candidate,
            text=text,
            fields=fields,
            status="ok" if text else "empty",
            error=None if text else f"the SQL of words gives {problem}",
            flags=(),
            finish_reason=None,
            attempt=0,
            seed=0,
            num_prompt_tokens=None,
            num_output_tokens=None,
            model="",
            revision="",
            prompt_hash="",
            sampling="{}",
            engine="",
        )


def _build_pass(run: Run, name: str, config: Config) -> Pass:
    section = f"{run.file}: caption.{name}"
    try:
        recipe, given = recipes.load_any_for_pass(run, name)
    except UnknownNameError as error:
        raise ConfigError(f"{section}.recipe", str(error)) from error
    recipe = _assign_engines(config, recipe, section)
    sampling = _resolve_sampling(config, recipe, section)
    engine = engine_slice(run, config.engine, field=f"caption.{name}.engine")
    work, record = _make_work(recipe, name=name, engine=config.engine, seed=run.seed, sampling=sampling)
    _check_names(run, name, config, recipe)
    own = {place: engine_slice(run, one, field=name) for kind, one, place in recipe.list_names() if kind == "engine"}
    seeing = {one or config.engine for one, show in recipe.list_shown() if show != "none"}
    engines = list_engines(recipe, config.engine)
    return Pass(
        stage="caption",
        name=name,
        folder=f"caption/{name}",
        **_build_inputs(
            run, name, config, given, finders=[one for kind, one, _ in recipe.list_names() if kind == "finder"]
        ),
        engines=engines,
        shows_images=bool(seeing),
        blind_engines=tuple(one for one in engines if one not in seeing),
        version=VERSION,
        slice={
            "recipe": recipe.slice,
            "sampling": [asdict(rung) for rung in sampling.rungs],
            "num_candidates": config.num_candidates,
            "where": config.where,
            "of": config.of,
            "seed": run.seed,
            "engine": engine,
            **({"engines": own} if own else {}),
            **({"given": dict(config.given)} if config.given else {}),
        },
        record=record,
        max_error_share=run.resolve_error_share(config.max_error_share),
        work=work,
    )


def _make_work(recipe: Recipe | ChainRecipe, **settings: Any) -> tuple[Work, type[Caption]]:
    if isinstance(recipe, Recipe):
        return CaptionWork(recipe=recipe, **settings).run, Caption
    return ChainWork(recipe=recipe, **settings).run, ChainedCaption


def _assign_engines(config: Config, recipe: Recipe | ChainRecipe, section: str) -> Recipe | ChainRecipe:
    """The recipe with the engines that the section sets for its steps.

    Raises:
        ConfigError: it has no such step.
    """
    names = [] if isinstance(recipe, Recipe) else [step.name for step in recipe.steps]
    for step in config.engines:
        if step not in names:
            advice = f"{plugins.explain_unknown(step, names)}, the steps of recipe {config.recipe!r}"
            raise ConfigError(f"{section}.engines.{step}", advice)
    return recipe if isinstance(recipe, Recipe) else recipe.assign_engines(config.engines)


def _check_names(run: Run, name: str, config: Config, recipe: Recipe | ChainRecipe) -> None:
    """
    Raises:
        ConfigError: a step names an engine or a finder that run.toml does not have, or shows an engine too many images.
    """
    for kind, one, place in recipe.list_names():
        section, known = ("engines", [*run.engines]) if kind == "engine" else ("find", [*run.sections["find"]])
        if one not in known:
            advice = f"{plugins.explain_unknown(one, sorted(known))}; {run.file} needs [{section}.{one}]"
            step = next((step for step, engine in config.engines.items() if kind == "engine" and engine == one), None)
            own = f"{run.file}: caption.{name}.engines.{step}"
            raise ConfigError(own if step else f"recipes/{config.recipe}.toml: {place}", advice)
    for engine, show in {(one or config.engine, show) for one, show in recipe.list_shown()}:
        num_examples = len(recipe.examples) if isinstance(recipe, Recipe) else 0
        num_shown = num_examples + {"none": 0, "both": 2}.get(show, 1)
        settings = run.engines[engine].config if engine in run.engines else None
        limit = getattr(settings, "images_per_prompt", num_shown)
        if limit < num_shown:
            what = "examples with the image" if num_examples else "both, the image and a part"
            advice = f"is {limit}, and recipe {config.recipe!r} shows {num_shown} images at once: {what}"
            advice += f"; set images_per_prompt = {num_shown}"
            raise ConfigError(f"{run.file}: engines.{engine}.images_per_prompt", advice)


def _build_inputs(
    run: Run, name: str, config: Config, texts: GivenTexts, *, shared: bool = True, finders: Sequence[str] = ()
) -> dict[str, Any]:
    """The inputs of a pass's rows: `reads` and `inputs` of its Pass; `finders` are those of its recipe."""
    scores, curated = _find_scores(run, name, config), bool(run.sections["curate"])
    selecting = find_finders(run, config.where or "true")
    scored = (f"score/{score}/{config.of}" for score in scores)
    found = list_finder_folders([*selecting, *finders])
    reads = (*(["curation"] if curated else []), *texts.reads, "image", *found, *scored)
    query = _build_query(config, scores, selecting)
    return {
        "reads": tuple(dict.fromkeys(reads)),
        "inputs": partial(
            inputs,
            num_candidates=config.num_candidates,
            query=query,
            curated=curated,
            shared=shared,
            texts=texts,
            finders=finders,
        ),
    }


def inputs(
    shard: Shard,
    *,
    num_candidates: int,
    query: str | None,
    curated: bool = False,
    shared: bool = True,
    texts: GivenTexts = NO_TEXTS,
    finders: Sequence[str] = (),
) -> Iterator[CaptionInput]:
    """The candidates to generate, in order of key and candidate.

    Args:
        shard: the shard.
        num_candidates: per image.
        query: SQL that gives the keys of the images in order; None: all images that are ok.
        curated: whether images that curation drops are left out.
        shared: whether images that have their rows from another one are left out too.
        texts: about each image.
        finders: those whose findings the recipe goes through.
    """
    rows = shard.read_table("image", Image)
    if query is None:
        images = (row for row in rows if row.status == "ok")
    else:
        images = (next(row for row in rows if row.key == image_key) for (image_key,) in shard.query(query))
    curation = shard.lookup("curation", Curation) if curated else None
    find_texts = texts.open(shard)
    lookups = {name: shard.lookup(f"finding/{name}", Finding) for name in finders}
    for image in images:
        if curation and any(row.drop or (shared and is_copy(row)) for row in curation(image.key)):
            continue
        given = find_texts(image.key)
        findings = {name: finding for name, lookup in lookups.items() for finding in lookup(image.key)}
        for candidate in range(num_candidates):
            yield CaptionInput(
                image=image,
                candidate=candidate,
                data=partial(shard.read_image, image),
                retry_of=shard.retry_of,
                texts=given,
                findings=findings,
            )


def _resolve_sampling(config: Config, recipe: Recipe | ChainRecipe, section: str) -> SamplingConfig:
    """The recipe's sampling with the overrides of the section."""
    overrides = {name: value for name in column_names(SamplingConfig) if (value := getattr(config, name)) is not None}
    try:
        sampling = replace(recipe.spec.sampling, **overrides)
    except ValueError as error:
        raise ConfigError(section, str(error)) from error
    if config.num_candidates > 1 and not any(recipe.list_temperatures(sampling)):
        raise ConfigError(
            f"{section}.num_candidates", f"{config.num_candidates} candidates would be equal: the temperature is 0"
        )
    return sampling


def _find_scores(run: Run, name: str, config: Config) -> list[str]:
    """The scores that `where` uses.

    Raises:
        ConfigError: `where` is not a valid condition, or `of` does not fit it.
    """
    if config.where is None and config.of is None:
        return []
    section, others = f"{run.file}: caption.{name}", sorted(set(run.sections["caption"]) - {name})
    scores = sorted(find_scores(run, f"caption.{name}.where", config.where or "true"))
    finders = find_finders(run, config.where or "true")
    if scores and config.of is None:
        raise ConfigError(f"{section}.of", f"is missing: {scores[0]} of which captions? {', '.join(others)}")
    if config.of is not None and config.of not in others:
        raise ConfigError(f"{section}.of", plugins.explain_unknown(config.of, others))
    if config.of is not None and not scores:
        raise ConfigError(f"{section}.of", "is used only when `where` names a score, and it names none")
    check_query(run, f"caption.{name}.where", _build_query(config, scores, finders) or "SELECT 1")
    return scores


def _build_query(config: Config, scores: list[str], finders: Mapping[str, frozenset[str]]) -> str | None:
    """SQL for the keys of the images that `where` selects, in order; None: all."""
    if config.where is None:
        return None
    join = ""
    if scores:
        best = ", ".join(
            f"max(value) FILTER (name = {database.quote_literal(s)}) AS {database.quote_identifier(s)}" for s in scores
        )
        of = database.quote_literal(config.of or "")
        join = f" LEFT JOIN (SELECT key, {best} FROM score WHERE caption = {of} GROUP BY key) AS scores USING (key)"
    return f"SELECT key FROM {build_images(finders)}{join} WHERE status = 'ok' AND ({config.where}) ORDER BY key"
