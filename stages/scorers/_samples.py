"""The captions that a score pass rates, for the stages that score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from pipeline import plugins
from pipeline.errors import ConfigError
from pipeline.execution.passes import Pass, Shard
from pipeline.execution.sharing import asked_folder, shares_rows
from pipeline.records import Caption, Image, ImageRubric
from pipeline.sections import Run
from stages import scorers
from stages.scorers import Sample, Scorer
from stages.text.given import GivenTexts, OpenFields, fill_fields
from stages.text.prompts import derive_seed


@dataclass(frozen=True, kw_only=True)
class ScorePass:
    """A score of run.toml on one caption pass."""

    name: str
    caption: str
    scorer: Scorer
    captions: str  # the folder of the captions: of those that an engine was asked for
    given: Mapping[str, str]  # SQL, by field of the scorer's prompt
    texts: GivenTexts  # the same, checked
    max_error_share: float | None  # None: the run's

    @property
    def is_shared(self) -> bool:
        """Whether images with equal bytes share these captions, and so their scores."""
        return self.captions == asked_folder(f"caption/{self.caption}")

    @property
    def reads(self) -> tuple[str, ...]:
        """Folders of the tables that its samples come from."""
        rubrics = [f"rubric/{self.scorer.rubric}"] if self.scorer.rubric else []
        return tuple(dict.fromkeys(("image", *rubrics, *self.texts.reads, self.captions)))

    def slice(self, run: Run) -> dict[str, Any]:
        """The part of the fingerprint that decides the scores of equal samples."""
        given = {"given": dict(self.given)} if self.given else {}
        return {**self.scorer.slice(run, field=f"score.{self.name}"), **given}

    def build_pass(self, run: Run, *, stage: str, **more: Any) -> Pass:
        """The pass of a stage that scores these captions, or copies of them; `more` are its other fields."""
        return Pass(
            stage=stage,
            name=self.name,
            caption=self.caption,
            folder=f"{stage}/{self.name}/{self.caption}",
            reads=self.reads,
            engines=self.scorer.engines,
            shows_images=self.scorer.shows_images,
            max_error_share=run.resolve_error_share(self.max_error_share),
            **more,
        )


def list_score_passes(run: Run) -> Iterator[ScorePass]:
    """One for each `[score.NAME]` and caption pass.

    Raises:
        ConfigError: a section names something that does not exist.
    """
    known, shared = tuple(run.sections["caption"]), shares_rows(run)
    for name, config in run.sections["score"].items():
        field = f"{run.file}: score.{name}"
        scorer = scorers.load_scorer(config.scorer, run=run.file.parent, field=field)
        if scorer.rubric and scorer.rubric not in (rubrics := sorted(run.sections["rubric"])):
            raise ConfigError(f"{field}.rubric", plugins.explain_unknown(scorer.rubric, rubrics))
        texts = prepare_given(run, name, scorer.open_fields)
        for caption in config.captions or known:
            if caption not in known:
                raise ConfigError(f"{field}.captions", plugins.explain_unknown(caption, sorted(known)))
            folder = f"caption/{caption}"
            yield ScorePass(
                name=name,
                caption=caption,
                scorer=scorer,
                captions=asked_folder(folder) if shared and not run.sections["caption"][caption].words else folder,
                given=config.given,
                texts=texts,
                max_error_share=config.max_error_share,
            )


def prepare_given(run: Run, score: str, open_fields: OpenFields) -> GivenTexts:
    """The texts that `given` of a score has for these fields of its prompt.

    Raises:
        ConfigError: it leaves one open, has another one, or is not valid.
    """
    given = run.sections["score"][score].given
    return fill_fields(run, open_fields, given, field=f"score.{score}.given")


def read_samples(shard: Shard, p: ScorePass, *, seed: int) -> Iterator[Sample]:
    """The usable captions of a shard, in order; of those that images share, one."""
    images = shard.read_table("image", Image)
    find_texts = p.texts.open(shard)
    rubrics = shard.lookup(f"rubric/{p.scorer.rubric}", ImageRubric) if p.scorer.rubric else None
    usable = (row for row in shard.read_table(p.captions, Caption) if row.status == "ok")
    for image_key, candidates in groupby(usable, lambda row: row.key):
        image = next(image for image in images if image.key == image_key)
        rows = rubrics(image_key) if rubrics else ()
        criteria = next((row.criteria for row in rows if row.status != "error"), None)
        texts = find_texts(image_key)
        for row in candidates:
            yield Sample(
                key=row.key,
                candidate=row.candidate,
                text=row.text,
                alt_text=image.alt_text,
                source_key=image.source_key,
                data=partial(shard.read_image, image),
                seed=derive_seed(seed, row.key, p.name, p.caption, row.candidate, *shard.retry_of),
                texts=texts,
                rubric_criteria=criteria,
            )
