"""Export stage: the training set, with one sample for each image that has a chosen caption.

The summary of the whole run (stats.json, the dataset card) is computed from the index table that this stage writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import UnknownNameError
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Exported, Image, NamedScore
from pipeline.sections import Run, key, stamped
from pipeline.storage import database, tables
from pipeline.storage.database import list_score_folders
from pipeline.storage.payloads import write_sums
from stages.exporters import ExportPayload, ExportSample
from stages.exporters._card import build_card
from stages.sql import find_scores

VERSION = 1
WHOLE_FILES = ("export/stats.json", "export/README.md")  # of the whole run

# One row per chosen caption, with the scores that the filter uses, without those that have no value.
CHOSEN = """
    SELECT i.key, c.name, c.candidate, c.text, c.model, c.revision,
        coalesce((SELECT list({{'name': s.name, 'value': s.value}} ORDER BY s.name) FROM score AS s
            WHERE s.key = c.key AND s.caption = c.name AND s.candidate = c.candidate AND s.value IS NOT NULL
            AND s.name IN ({scores})), [])
    FROM verdict AS v
    JOIN caption AS c ON c.key = v.key AND c.name = v.caption AND c.candidate = v.candidate
    JOIN image AS i ON i.key = v.key
    WHERE v.chosen ORDER BY i.key"""


@dataclass(frozen=True, kw_only=True)
class Config:
    formats: tuple[str, ...] = key(
        ("webdataset", "parquet"), "forms to write: files of stages/exporters/, or modules of your own with a dot"
    )
    image_extension: Literal["jpg", "original"] = key(
        "jpg",
        "of all images, whose bytes are the original's either way. Loaders that infer columns from the first samples "
        "need the same extension for all",
    )
    license: str = key("", "of the corpus, for the dataset card, such as cc-by-4.0", stamp=False)

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            choices = ", ".join(plugins.list_names("stages.exporters"))
            raise ValueError(f"formats is {list(self.formats)}; it must name at least one of {choices}, each once")
        try:
            for name in self.formats:
                plugins.load("stages.exporters", name)
        except UnknownNameError as error:
            raise ValueError(f"formats names a form that does not exist: {error}") from error
        if not re.fullmatch(r"[\w.-]*", self.license):
            raise ValueError(f"license is {self.license!r}; it must be an identifier of the Hub, such as cc-by-4.0")


@dataclass(frozen=True, kw_only=True)
class ExportInput:
    """A chosen caption, its image row, and the shard that reads the image file."""

    image: Image
    caption: str
    candidate: int
    text: str
    model: str
    revision: str
    scores: tuple[NamedScore, ...]
    shard: Shard

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.image.key,)


def passes(run: Run) -> Iterable[Pass]:
    settings: Config = run.sections["export"][""]
    captions = list(run.sections["caption"])
    if not captions:
        return
    rules = run.sections["filter"][""].rules
    scores = {score for rule, sql in rules.items() for score in find_scores(run, f"filter.rules.{rule}", sql)}
    yield Pass(
        stage="export",
        folder="export/index",
        reads=("image", *(f"caption/{name}" for name in captions), *list_score_folders(run, scores), "verdict"),
        version=VERSION,
        slice=stamped(settings),
        record=Exported,
        max_error_share=1.0,
        inputs=partial(inputs, scores=scores),
        work=work,
        payload=lambda shard: ExportPayload(
            run.folder, shard.number, formats=settings.formats, image_extension=settings.image_extension
        ),
        finish=finish,
        whole_files=WHOLE_FILES,
    )


def inputs(shard: Shard, *, scores: Iterable[str]) -> Iterator[ExportInput]:
    """Joins the chosen captions with their image rows; both are sorted by key."""
    images = shard.read_table("image", Image)
    for name, caption, candidate, text, model, revision, values in shard.query(
        CHOSEN.format(scores=", ".join(map(database.quote_literal, sorted(scores))) or "NULL")
    ):
        yield ExportInput(
            image=next(image for image in images if image.key == name),
            caption=caption,
            candidate=candidate,
            text=text,
            model=model,
            revision=revision,
            scores=tuple(NamedScore(**value) for value in values),
            shard=shard,
        )


def work(inputs: Iterator[ExportInput], _: Mapping[str, Engine]) -> Iterator[ExportSample]:
    for item in inputs:
        yield ExportSample(row=_build_row(item), data=item.shard.read_image(item.image))


def _build_row(item: ExportInput) -> Exported:
    image = item.image
    assert image.sha256 and image.format and image.width and image.height and image.num_bytes
    return Exported(
        key=image.key,
        source_key=image.source_key,
        sha256=image.sha256,
        caption=item.text,
        alt_text=image.alt_text or "",
        caption_pass=item.caption,
        candidate=item.candidate,
        model=item.model,
        revision=item.revision,
        scores=item.scores,
        format=image.format,
        width=image.width,
        height=image.height,
        num_bytes=image.num_bytes,
        metadata=image.metadata,
    )


SUMMARY = """
    SELECT count(*) AS num_samples, coalesce(sum(num_bytes), 0)::BIGINT AS num_bytes,
        count(DISTINCT sha256) AS num_distinct_images,
        coalesce(avg(len(regexp_extract_all(caption, '\\S+'))), 0) AS mean_words,
        coalesce(avg(len(regexp_extract_all(alt_text, '\\S+'))), 0) AS mean_alt_text_words
    FROM export"""


def finish(run: Run, is_new: bool) -> None:
    """Writes export/stats.json, the dataset card and their digests, unless they exist and no shard is new."""
    settings = run.sections["export"][""]
    if not is_new and all((run.folder / name).exists() for name in WHOLE_FILES):
        return
    with database.connect(run.folder) as connection:
        result = database.run_query(connection, SUMMARY)
        stats = dict(zip([column[0] for column in result.description or ()], result.fetchone() or (), strict=True))
        passes = database.run_query(
            connection, "SELECT caption_pass, model, count(*) FROM export GROUP BY ALL ORDER BY ALL"
        ).fetchall()
    stats["captions"] = [{"pass": name, "model": model, "num_samples": num} for name, model, num in passes]
    card = build_card(
        stats,
        title=run.folder.name,
        source=run.source.kind,
        license=settings.license,
        formats=settings.formats,
        rules=run.sections["filter"][""].rules,
    )
    for name, text in zip(WHOLE_FILES, (json.dumps(stats, indent=2) + "\n", card), strict=True):
        path = run.folder / name
        if not path.exists() or path.read_bytes() != text.encode():
            with tables.open_atomic(path) as file:
                file.write(text.encode())
    write_sums(run.folder, "export/index", WHOLE_FILES)
