"""Decides what a trainer gets: one sample for each image whose caption was chosen, with where it came from.

The whole-run summary (stats.json, the dataset card) is made from the index that this stage writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import UnknownNameError
from pipeline.execution.passes import Pass
from pipeline.execution.shard import Shard
from pipeline.records import Exported, Image, NamedScore
from pipeline.sections import Run, key, stamped
from pipeline.storage import database, tables
from pipeline.storage.views import list_score_folders
from stages.exporters import ExportPayload, ExportSample
from stages.sql import find_scores

VERSION = 1

# A row for each chosen caption; its list has the scores that the filter uses, where they could say something.
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
        ("webdataset", "parquet"), "forms to write, of stages/exporters/: webdataset, parquet, or a module with a dot"
    )
    image_extension: Literal["jpg", "original"] = key(
        "jpg",
        "of the image in a WebDataset sample; the bytes are the original's either way. Loaders that infer columns from "
        "the first samples need one name for all",
    )
    license: str = key("", "of the corpus, for the dataset card, e.g. cc-by-4.0", stamp=False)

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            choices = ", ".join(plugins.list_names("stages.exporters"))
            raise ValueError(f"formats is {list(self.formats)}; it names one or more of {choices}, each once")
        try:
            for name in self.formats:
                plugins.load("stages.exporters", name)
        except UnknownNameError as error:
            raise ValueError(f"formats names a form that does not exist: {error}") from error
        if not re.fullmatch(r"[\w.-]*", self.license):
            raise ValueError(f"license is {self.license!r}; the Hub knows names such as cc-by-4.0")


@dataclass(frozen=True, kw_only=True)
class ExportInput:
    """A chosen caption, its image row, and the shard that has the bytes."""

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
        payload=partial(_payload, settings),
        finish=finish,
    )


def inputs(shard: Shard, *, scores: Iterable[str]) -> Iterator[ExportInput]:
    """Joins the chosen captions with their image rows; both come sorted by key."""
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


def work(chosen: Iterator[ExportInput], _engines: Mapping[str, Engine]) -> Iterator[ExportSample]:
    for one in chosen:
        yield ExportSample(row=exported(one), data=one.shard.read_image(one.image))


def exported(chosen: ExportInput) -> Exported:
    image = chosen.image
    assert image.sha256 and image.format and image.width and image.height and image.num_bytes
    return Exported(
        key=image.key,
        source_key=image.source_key,
        sha256=image.sha256,
        caption=chosen.text,
        alt_text=image.alt_text or "",
        caption_pass=chosen.caption,
        candidate=chosen.candidate,
        model=chosen.model,
        revision=chosen.revision,
        scores=chosen.scores,
        format=image.format,
        width=image.width,
        height=image.height,
        num_bytes=image.num_bytes,
        metadata=image.metadata,
    )


def _payload(settings: Config, shard: Shard) -> ExportPayload:
    return ExportPayload(
        shard.run.folder, shard.number, formats=settings.formats, image_extension=settings.image_extension
    )


SUMMARY = """
    SELECT count(*) AS num_samples, coalesce(sum(num_bytes), 0)::BIGINT AS num_bytes,
        count(DISTINCT sha256) AS num_distinct_images,
        coalesce(avg(len(regexp_extract_all(caption, '\\S+'))), 0) AS mean_words,
        coalesce(avg(len(regexp_extract_all(alt_text, '\\S+'))), 0) AS mean_alt_text_words
    FROM export"""


def finish(run: Run, is_new: bool) -> None:
    """Writes export/stats.json and the dataset card over all that is exported, unless nothing is new."""
    folder = run.folder / "export"
    if not is_new and (folder / "stats.json").exists() and (folder / "README.md").exists():
        return
    with database.connect(run.folder) as connection:
        result = database.run_query(connection, SUMMARY)
        stats = dict(zip([column[0] for column in result.description or ()], result.fetchone() or (), strict=True))
        passes = database.run_query(
            connection, "SELECT caption_pass, model, count(*) FROM export GROUP BY ALL ORDER BY ALL"
        ).fetchall()
    stats["captions"] = [{"pass": name, "model": model, "num_samples": num} for name, model, num in passes]
    for name, text in {"stats.json": json.dumps(stats, indent=2) + "\n", "README.md": card(run, stats)}.items():
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
            with tables.open_atomic(folder / name) as file:
                file.write(text.encode())


def card(run: Run, stats: Mapping[str, Any]) -> str:
    """The dataset card, with the header that the Hugging Face Hub reads."""
    settings: Config = run.sections["export"][""]
    num = stats["num_samples"]
    size = next((name for top, name in SIZES if num < top), SIZES[-1][1])
    licence = f"license: {settings.license}\n" if settings.license else ""
    data = (
        ""
        if "parquet" not in settings.formats
        else ("configs:\n- config_name: default\n  data_files: parquet/*.parquet\n")
    )
    models = "\n".join(f"- `{c['pass']}`: {c['num_samples']:,} captions by `{c['model']}`" for c in stats["captions"])
    rules = "\n".join(f"- `{name}`: `{sql}`" for name, sql in run.sections["filter"][""].rules.items())
    return f"""---
{licence}task_categories:
- image-to-text
- text-to-image
size_categories:
- {size}
{data}---

# {run.folder.name}

{num:,} images with captions, {stats["mean_words"]:.1f} words on average (the corpus's own alt text: \
{stats["mean_alt_text_words"]:.1f}). Made by recap from a `{run.source.kind}` source; image bytes are the originals'.

{models}

A caption was kept when it met these conditions, in this order:

{rules or "- (none)"}

| column | what it is |
| --- | --- |
| `image` / `jpg` | the original file |
| `caption` / `txt` | the caption |
| `alt_text` | what the corpus had; empty when it had nothing |
| `key`, `source_key`, `sha256` | the sample in this run, in the corpus, and its content: join on the last two |
| `caption_pass`, `candidate`, `model`, `revision` | who wrote the caption |
| `scores` | what the scorers said, in [0, 1] |
| `format`, `width`, `height`, `num_bytes`, `metadata` | of the original |
"""


SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**12, "n>1B"),
)
