"""Trains on given answers, token by token: the texts of captions, or a judge's verdicts on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError
from pipeline.execution.passes import Shard
from pipeline.records import Caption, Criterion, Image, Score
from pipeline.sections import Run, key, stamped
from pipeline.storage import tables
from pipeline.storage.sentences import split_sentences
from stages import rubrics
from stages.rubrics import Rubric
from stages.scorers._samples import prepare_given
from stages.text.given import GivenTexts
from stages.text.selection import draw
from stages.training import supervised
from stages.training.dataset import TrainExample, Turn, make_example, read_images
from stages.training.prompts import check_captions, list_given_tables, load_recipe, open_prompts, slice_recipes
from stages.training.settings import TrainConfig
from stages.training.trainer import TrainingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """`[train]` with `method = "sft"`."""

    scores: str = key("", "a judge's score pass, whose verdicts are learnt; empty: learn the captions' texts")
    unsure: bool = key(False, "whether the judge's undecided answers are learnt too", stamp_default=False)
    reasons: float = key(
        1.0,
        "share of verdicts that are learnt with their reason; the others are learnt as answers without one",
        least=0,
        most=1,
        stamp_default=False,
    )
    turns: int = key(1, "questions about one image in one example", least=1)
    regions: float = key(0.0, "weight of a second loss: naming what each image token shows", least=0)


def check_config(config: TrainConfig) -> None:
    if config.lora and (config.options.config.regions or config.optimizer == "masters"):
        raise ValueError('lora needs optimizer = "adamw" and no regions')


def open(run: Run, config: TrainConfig) -> Sft:
    """
    Raises:
        ConfigError: a pass or the recipe does not exist, the verdicts have no reasons to learn, or signs shift regions.
    """
    own: Config = config.options.config
    scores = own.scores
    check_captions(run, config, without_image=not own.regions, are_answers=not scores)
    if scores and scores not in run.sections["score"]:
        raise ConfigError(f"{run.file}: train.scores", plugins.explain_unknown(scores, sorted(run.sections["score"])))
    if scores and own.reasons and not getattr(run.sections["score"][scores].scorer.config, "reasons", True):
        message = f"{own.reasons} of the verdicts are learnt with reasons, and score.{scores} has none; set it to 0"
        raise ConfigError(f"{run.file}: train.reasons", message)
    if own.regions and getattr(run.source.config, "sign_share", 0):
        message = "the labels of image tokens are those of pictures without signs; set source.sign_share to 0"
        raise ConfigError(f"{run.file}: train.regions", message)
    return Sft(run, config)


class Sft:
    """The method `sft`."""

    generates, answers_per_example = False, 1

    def __init__(self, run: Run, config: TrainConfig) -> None:
        self._run, self._config = run, config
        self._own: Config = config.options.config
        self.learns_regions = self._own.regions > 0

    def list_tables(self) -> Sequence[str]:
        captions = [f"caption/{name}" for name in self._config.captions]
        scores = [f"score/{self._own.scores}/{name}" for name in self._config.captions if self._own.scores]
        given = self._given.reads if self._own.scores else list_given_tables(self._run, self._config)
        return list(dict.fromkeys(["image", *captions, *scores, *given]))

    def slice(self) -> Mapping[str, Any]:
        if not self._own.scores:
            return {"asks": slice_recipes(self._run, self._config)}
        given = dict(self._run.sections["score"][self._own.scores].given)
        return {"asks": {**stamped(self._rubrics[True]), **({"given": given} if given else {})}}

    def read_examples(self) -> Iterator[TrainExample]:
        read = self._read_verdicts if self._own.scores else self._read_texts
        for file, usable in read_images(self._run):
            images = {image.key: image for image in usable}
            for caption in self._config.captions:
                is_shown = bool(self._own.scores) or load_recipe(self._run, self._config, caption).spec.image
                for image_key, turns in groupby(read(caption, file.name), key=lambda turn: turn.key):
                    for some in tables.split_batches(turns, self._own.turns):
                        yield make_example(images[image_key], some, shows_image=is_shown)

    def _read_texts(self, name: str, file: str) -> Iterator[Turn]:
        """Every usable caption, as the answer to its recipe's prompt."""
        recipe = load_recipe(self._run, self._config, name)
        build_prompt = open_prompts(self._run, self._config, name, file)
        images = tables.read_rows(self._run.folder / "image" / file, Image)
        for image_key, candidates in groupby(self._read_captions(name, file), key=lambda caption: caption.key):
            question = build_prompt(next(image for image in images if image.key == image_key))
            if question is None:
                continue
            for caption in candidates:
                answer = caption.fields or caption.text
                yield Turn(key=image_key, system=recipe.spec.system, question=question, answer=answer)

    def _read_verdicts(self, name: str, file: str) -> Iterator[Turn]:
        """Every verdict of the score pass, as the answer to its rubric's prompt."""
        images = tables.read_rows(self._run.folder / "image" / file, Image)
        alt_texts = {image.key: image.alt_text for image in images}
        find_texts = self._given.open(Shard(run=self._run, number=int(Path(file).stem), pieces=()))
        captions = {caption.id: caption for caption in self._read_captions(name, file)}
        rows = tables.read_rows(self._run.folder / "score" / self._own.scores / name / file, Score)
        usable = (row for row in rows if row.status == "ok" or (self._own.unsure and row.status == "unknown"))
        for image_key, scores in groupby(usable, key=lambda score: score.key):
            texts = find_texts(image_key)
            for score in scores:
                text = captions[score.key, score.candidate].text
                for criteria in tables.split_batches(score.criteria, len(self._rubrics[True].criteria)):
                    drawn = draw(score.key, name, score.candidate, criteria[0].id)
                    rubric = self._rubrics[drawn < self._own.reasons]
                    if not all(self._is_answered(criterion, rubric) for criterion in criteria):
                        continue
                    before, part = _find_passage(text, criteria[0])
                    question = rubric.build_prompt(
                        caption=text, sentence=part, alt_text=alt_texts[score.key], before=before, given=texts
                    )
                    answer = format_verdicts(rubric, criteria)
                    yield Turn(key=score.key, system=rubric.spec.system, question=question, answer=answer)

    def _is_answered(self, criterion: Criterion, rubric: Rubric) -> bool:
        """An undecided answer has a reason, an invalid one has none."""
        if criterion.verdict is not None:
            return True
        return self._own.unsure and bool(rubric.spec.unsure) and criterion.reason is not None

    @cached_property
    def _given(self) -> GivenTexts:
        """The texts that the judge was given for its prompts."""
        return prepare_given(self._run, self._own.scores, self._rubrics[True].spec.open_fields)

    @cached_property
    def _rubrics(self) -> Mapping[bool, Rubric]:
        """The judge's rubric, by whether its answers have reasons."""
        name = self._run.sections["score"][self._own.scores].scorer.config.rubric
        return {
            with_reasons: rubrics.load(name, run=self._run.folder, with_reasons=with_reasons)
            for with_reasons in (True, False)
        }

    def _read_captions(self, name: str, file: str) -> Iterator[Caption]:
        rows = tables.read_rows(self._run.folder / "caption" / name / file, Caption)
        return (row for row in rows if row.status == "ok")

    def make_trainer(self, task: TrainingTask, _: Mapping[str, Engine]) -> Any:
        def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any], compute_own: Any) -> Any:
            regions = inputs.pop("regions", None)
            loss = compute_own()
            if regions is None:
                return loss
            region_loss = trainer.model.region_reader.loss(regions)
            trainer._metrics["train" if model.training else "eval"]["regions_loss"].append(region_loss.item())
            return loss + self._own.regions * region_loss if model.training else loss

        return supervised.make_trainer(task, add_region_head=self.learns_regions, compute_loss=compute_loss)

    def describe(self) -> str:
        captions = ", ".join(self._config.captions)
        if self._own.scores:
            return f"on the verdicts of {self._own.scores} on the captions of {captions}"
        return f"on the texts of {captions}"


def _find_passage(text: str, criterion: Criterion) -> tuple[str, str]:
    """The text before a criterion's sentence, and the sentence; the whole text where its id ends in no number."""
    _, slash, number = criterion.id.rpartition("/")
    if not slash:
        return "", text
    sentences = split_sentences(text)
    return " ".join(sentences[: int(number) - 1]), sentences[int(number) - 1]


def format_verdicts(rubric: Rubric, criteria: Sequence[Criterion]) -> str:
    """The JSON with which a judge would have given these verdicts."""
    verdicts = [criterion.verdict or rubric.spec.unsure for criterion in criteria]
    if rubric.is_bare:
        return json.dumps(verdicts[0], ensure_ascii=False)
    answers = [
        {**({"reason": criterion.reason or ""} if rubric.with_reasons else {}), "verdict": verdict}
        for criterion, verdict in zip(criteria, verdicts, strict=True)
    ]
    value = answers[0] if len(answers) == 1 else dict(zip(rubric.criteria, answers, strict=True))
    return json.dumps(value, ensure_ascii=False)
