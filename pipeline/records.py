"""Records: the rows of every table, with their types, units and statuses.

A record is a frozen dataclass; its Arrow schema is derived from its annotations alone.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import pyarrow as pa

R = TypeVar("R", bound="Record")
ImageStatus = Literal["ok", "empty", "unreadable", "unsupported", "too_small", "too_large"]
CaptionStatus = Literal["ok", "empty", "truncated", "repeated", "invalid", "error"]
LabelVerdict = Literal["true", "false", "acceptable", "unacceptable", "unsure"]
FindingStatus = Literal["ok", "invalid", "error"]
ScoreStatus = Literal["ok", "unknown", "error"]
RubricStatus = Literal["ok", "empty", "error"]
Severity = Literal["critical", "important", "minor"]
NOT_TAKEN = "another image of its sample is taken"  # begins the error of an image row whose image has no fault
SEVERITY_WEIGHTS: Mapping[Severity, float] = {"critical": 3.0, "important": 2.0, "minor": 1.0}  # as in RubiCap


class Record:
    """A row of a table. `id` is unique in the table's file and orders it."""

    table: ClassVar[str]
    version: ClassVar[int] = 1  # of the columns; written into every file
    failed: ClassVar[frozenset[str]] = frozenset()  # statuses that count towards max_error_share

    @property
    def id(self) -> tuple[str | int, ...]:
        raise NotImplementedError


def added(version: int, default: Any) -> Any:
    """Declares a column that tables before `version` of their record lack; their rows have the default."""
    return dataclasses.field(default=default, metadata={"since": version})


def status_of(row: Record) -> str:
    """The row's status; "ok" for tables whose rows have none."""
    return getattr(row, "status", "ok")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of the corpus: samples `start` to `stop` of `file`; `stop` is None when it is unknown before reading."""

    file: str  # the source's name for it: a path, a URL, the name of a split
    start: int = 0
    stop: int | None = None
    num_bytes: int | None = None

    @property
    def num_samples(self) -> int | None:
        return None if self.stop is None else self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class FileStatus:
    """A file of the corpus as it is now. Times are seconds since 1970."""

    file: str  # as in its pieces
    changed_at: float  # the file, or what describes it
    lost_at: float = 0.0  # the last time that it may have lost what described it
    num_bytes: int | None = None  # where its pieces have it too


@dataclass(frozen=True, kw_only=True)
class Planned(Record):
    """One piece of one shard, in the frozen plan."""

    table: ClassVar[str] = "plan"
    shard: int
    file: str
    start: int
    stop: int | None
    num_bytes: int | None

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.shard, self.file, self.start)

    @property
    def piece(self) -> Piece:
        return Piece(file=self.file, start=self.start, stop=self.stop, num_bytes=self.num_bytes)


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A sample as the corpus has it, not yet decoded."""

    source_key: str  # the corpus's name for it
    data: bytes | None  # the image file; None when it is unavailable, see `error`
    alt_text: str | None = None
    metadata: str = "{}"  # JSON: everything else in the corpus about the sample
    error: str | None = None
    file: str | None = None  # the image file or plain tar that holds the bytes; None: ingest packs them
    offset: int | None = None  # of the bytes in `file`


@dataclass(frozen=True, kw_only=True)
class Image(Record):
    """One input of the plan."""

    table: ClassVar[str] = "image"
    failed: ClassVar[frozenset[str]] = frozenset({"empty", "unreadable", "unsupported"})

    key: str  # shard and index, six digits each
    shard: int
    index: int
    status: ImageStatus
    error: str | None
    source: str  # the kind of source
    source_key: str
    file: str | None  # the image file or the tar that holds the bytes: a path in the run, or an absolute path
    offset: int | None
    num_bytes: int | None
    format: str | None  # Pillow's name in lower case: jpeg, png, webp, gif, avif, tiff, ...
    width: int | None  # pixels, as displayed, with the EXIF orientation applied
    height: int | None
    orientation: int | None  # EXIF, 1 to 8; 1 when the file has none
    num_frames: int | None
    sha256: str | None  # of the original bytes, hex: the identity of the content
    alt_text: str | None
    metadata: str  # JSON

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class MeasuredImage(Image):
    """An image row of a run with `[curate]`; without it the table has the columns up to `metadata`."""

    version: ClassVar[int] = 2

    phash: str | None = added(2, None)  # perceptual hash, 256 bits in hex; null: no picture, or a flat one
    bits_per_pixel: float | None = added(2, None)  # of the file
    entropy: float | None = added(2, None)  # [0, 8] bits a pixel, of the luminance at 64 x 64 pixels
    aspect: float | None = added(2, None)  # width by height, as displayed


@dataclass(frozen=True, kw_only=True)
class Curation(Record):
    """The selection of an image for captioning, and the group of its copies."""

    table: ClassVar[str] = "curation"

    key: str
    group: str | None  # the key of the first image of its near duplicates; null where it is dropped for itself
    representative: bool  # the first of its group
    distance: int | None  # bits of the hash that differ from the representative's, or from the excluded picture's
    copy_of: str | None  # the key of the first image with the same bytes
    drop: bool  # never captioned
    reason: str | None  # the image's status, where, excluded, placeholder, duplicate or near_duplicate; null: kept

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing that a finder found in an image. It has four coordinates or none."""

    label: str  # what it is: a class, a tag, the name of an EXIF field
    text: str | None = None  # what is written there, or its value
    x0: float | None = None  # [0, 1] of the picture as displayed; from the left
    y0: float | None = None  # from the top
    x1: float | None = None
    y1: float | None = None
    confidence: float | None = None  # [0, 1]; null where the finder has none, which conditions take as 1
    other: str | None = None  # JSON object: everything else about it


@dataclass(frozen=True, kw_only=True)
class Finding(Record):
    """What one finder found in one image; nothing is a finding too."""

    table: ClassVar[str] = "finding"
    failed: ClassVar[frozenset[str]] = frozenset({"invalid", "error"})

    key: str
    name: str  # the finder's pass
    status: FindingStatus  # invalid: metadata or a model's answer is not as expected; error: there is no answer
    error: str | None
    found: tuple[Found, ...]
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0  # rung of the sampling ladder, from 1; 0 when no engine was used
    model: str | None = None  # or the library that found it
    revision: str | None = None
    engine: str | None = None

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class FoundRow(Record):
    """One thing that was found in one image: a row of the view that unnests `finding`."""

    table: ClassVar[str] = "found"

    key: str
    name: str  # the finder's pass
    position: int  # among what it found in the image, from 0
    label: str
    text: str | None
    x0: float | None  # [0, 1] of the picture as displayed
    y0: float | None
    x1: float | None
    y1: float | None
    confidence: float | None  # [0, 1]
    other: str | None  # JSON object

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.name, self.position)


@dataclass(frozen=True, kw_only=True)
class Caption(Record):
    """One candidate of one pass for one image."""

    table: ClassVar[str] = "caption"
    failed: ClassVar[frozenset[str]] = frozenset({"empty", "truncated", "repeated", "invalid", "error"})

    key: str
    name: str
    candidate: int  # from 0
    text: str  # prose; the raw answer when the status is not ok
    fields: str | None  # JSON of a structured recipe
    status: CaptionStatus
    error: str | None
    flags: tuple[str, ...]  # refusal, prompt_leak, meta_commentary, ...; flagged text is kept
    finish_reason: str | None  # stop, length, repetition (the engine stopped a loop), ...
    attempt: int  # rung of the sampling ladder, from 1; 0 when nothing was generated
    seed: int
    num_prompt_tokens: int | None
    num_output_tokens: int | None
    model: str
    revision: str
    prompt_hash: str  # of the prompt's fixed text, 16 hex digits
    sampling: str  # JSON of the rung's sampling
    engine: str

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.candidate)


@dataclass(frozen=True, kw_only=True)
class CaptionStep:
    """One question of a chain, and its answer."""

    name: str  # the step
    item: str | None  # what the question is about: a tile, a sentence, a thing; null for a step that asks once
    text: str  # the answer, or one of the answers that the step allows; the raw answer when the status is not ok
    status: CaptionStatus
    attempt: int  # rung of the sampling ladder, from 1; 0 when nothing was generated
    num_prompt_tokens: int | None
    num_output_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class ChainedCaption(Caption):
    """A caption row of a pass whose recipe is a chain of steps. Its tokens are those of all steps."""

    version: ClassVar[int] = 3

    steps: tuple[CaptionStep, ...] = added(3, ())  # in the order in which they were asked


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A judge's verdict on one criterion of a rubric."""

    id: str
    verdict: str | None  # one of the criterion's ordered answers; None: undecided
    value: float | None  # [0, 1]
    weight: float
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class RubricCriterion:
    """One criterion of an image's own rubric: what its captions must say, or must not say."""

    id: str  # letters, digits and _; unique in its rubric
    text: str  # can be decided without the image
    severity: Severity
    weight: float  # 3, 2 or 1; of the criterion against unsupported statements, that of all others
    agreed: int  # teachers whose captions meet it
    missed: float  # [0, 1]: share of the student's captions that fail it
    claim: str | None  # JSON: the check of claims; None: only a judge can decide it


@dataclass(frozen=True, kw_only=True)
class ImageRubric(Record):
    """The criteria that a student's captions of one image fail, according to a committee of teachers."""

    table: ClassVar[str] = "rubric"
    failed: ClassVar[frozenset[str]] = frozenset({"error"})

    key: str
    name: str
    status: RubricStatus  # empty: the teachers agree on nothing, or the student misses nothing
    error: str | None  # also the reason for empty
    criteria: tuple[RubricCriterion, ...]
    num_teachers: int  # with a usable caption of this image
    writer: str
    prompt_hash: str | None = None  # of the prompt's fixed text, 16 hex digits
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0  # rung of the sampling ladder, from 1; 0 when no model was used
    model: str | None = None
    revision: str | None = None
    engine: str | None = None

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class Score(Record):
    """One scorer's score of one caption."""

    table: ClassVar[str] = "score"
    failed: ClassVar[frozenset[str]] = frozenset({"unknown", "error"})

    key: str
    caption: str  # the caption's pass
    candidate: int
    name: str  # the score's pass
    value: float | None  # [0, 1]; None when undecided, never 0
    criteria: tuple[Criterion, ...]
    status: ScoreStatus
    error: str | None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    attempt: int = 0
    model: str | None = None
    revision: str | None = None
    engine: str | None = None

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.candidate)


@dataclass(frozen=True, kw_only=True)
class SharedCaption(Caption):
    """A caption row of a run whose copies share captions."""

    version: ClassVar[int] = 2

    shared_from: str | None = added(2, None)  # the key of the image that was captioned; null: this one


@dataclass(frozen=True, kw_only=True)
class SharedChainedCaption(SharedCaption):
    """A row of a chain of steps in a run whose copies share captions."""

    version: ClassVar[int] = 3

    steps: tuple[CaptionStep, ...] = added(3, ())


@dataclass(frozen=True, kw_only=True)
class SharedScore(Score):
    """A score row of a run whose copies share captions."""

    version: ClassVar[int] = 2

    shared_from: str | None = added(2, None)  # the key of the image whose caption was scored; null: this one


@dataclass(frozen=True, kw_only=True)
class Canary(Score):
    """One scorer's score of a spoiled copy of a caption; the original's is in the table `score`."""

    table: ClassVar[str] = "canary"

    kind: str  # how the copy is spoiled
    change: str  # the words that were replaced, added or dropped
    text: str  # the spoiled copy

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.candidate, self.kind)


@dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """The filter's decision on a caption, and the first reason for a refusal."""

    table: ClassVar[str] = "verdict"

    key: str
    caption: str
    candidate: int
    keep: bool
    reason: str | None  # the first rule that refused, unscored:NAME, or the caption's status
    chosen: bool  # exported by default: at most one row per key

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.caption, self.candidate)


@dataclass(frozen=True, kw_only=True)
class Label(Record):
    """A person's judgement of one sentence of a caption, or of the whole caption."""

    table: ClassVar[str] = "label"

    key: str
    caption: str  # the caption's pass
    candidate: int
    sentence: int | None  # from 0; None: the whole caption
    verdict: LabelVerdict  # of a sentence: true, false or unsure; of a caption: acceptable, unacceptable or unsure
    labeller: str
    at: str  # ISO 8601; "" where the labels do not say
    text: str  # the whole caption that was labelled: a label counts while the caption reads the same

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key, self.caption, self.candidate, -1 if self.sentence is None else self.sentence, self.labeller)


@dataclass(frozen=True, kw_only=True)
class NamedScore:
    """A score that is not null, by its pass."""

    name: str
    value: float  # [0, 1]


@dataclass(frozen=True, kw_only=True)
class ExportedText:
    """A kept caption of an image, as it may be exported."""

    text: str
    caption_pass: str
    candidate: int
    score: float  # [0, 1]: the mean of the scores that the filter or the training set uses; -1 without any
    num_tokens: int  # by the tokenizer that `[export]` names; 0 without one
    cut: int  # tokens that were cut off at the end


@dataclass(frozen=True, kw_only=True)
class Exported(Record):
    """One sample of the training set, without its pixels; no field is null, because loaders infer types."""

    table: ClassVar[str] = "export"
    version: ClassVar[int] = 2

    key: str
    source_key: str
    sha256: str  # of the corpus's file
    caption: str  # the text; "" when it was dropped
    alt_text: str  # "" when the corpus had none
    caption_pass: str  # raw: the caption is the alt text
    candidate: int
    model: str
    revision: str
    fields: str = added(2, "{}")  # JSON of a structured recipe; {} for others
    scores: tuple[NamedScore, ...]
    weight: float = added(2, 1.0)  # of the sample, by the SQL of run.toml
    num_tokens: int = added(2, 0)  # of the caption, by the tokenizer of run.toml
    cut: int = added(2, 0)  # tokens that were cut off at its end
    texts: tuple[ExportedText, ...] = added(2, ())  # all kept captions
    format: str
    width: int  # pixels, as displayed
    height: int
    orientation: int = added(2, 1)  # EXIF, 1 to 8, of the exported file; width and height are of the upright picture
    num_bytes: int
    metadata: str  # JSON, as the corpus had it
    reencoded: str = added(2, "")  # how the exported file was encoded; "": it is the corpus's, byte for byte
    written_sha256: str = added(2, "")  # of the exported file if it was re-encoded, hex

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


@dataclass(frozen=True, kw_only=True)
class Selected(Exported):
    """A sample of a repartitioned training set, before it is assigned to a file, with the location of its image."""

    table: ClassVar[str] = "selected"

    source: str
    file: str  # as in the image's row
    name: str  # of that file in the plan, or as `file` if the run has it
    offset: int
    part: int  # of the training set: its samples are in files of their own
    split: str  # of the part
    bucket: float  # of the part: an aspect; 0 without buckets
    num_estimated: int  # bytes that the sample takes in a file


@dataclass(frozen=True, kw_only=True)
class Placed(Exported):
    """A sample of a repartitioned training set, and its file."""

    version: ClassVar[int] = 3

    split: str = added(3, "")
    bucket: float = added(3, 0.0)  # the aspect, width by height, of the images in its file; 0 without buckets
    number: int = added(3, 0)  # of the file, within the split
    position: int = added(3, 0)  # in the file

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.split, self.number, self.position)


@dataclass(frozen=True, kw_only=True)
class Step(Record):
    """One point of a training curve."""

    table: ClassVar[str] = "step"

    step: int
    name: str  # loss, eval_loss, learning_rate, ...
    value: float

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.step, self.name)


@dataclass(frozen=True, kw_only=True)
class Stat(Record):
    """Statistics of one shard of one pass. Rewritten with its table; nothing depends on them.

    Seconds and tokens are those of all attempts: a kill loses at most what was not saved yet.
    """

    table: ClassVar[str] = "stats"

    stage: str
    name: str
    caption: str  # for scores: the caption pass that was scored
    shard: int
    started_at: float  # seconds since 1970, UTC
    seconds: float  # of process time; two shards that overlap get half each
    num_rows: int
    num_new_rows: int  # from the last attempt; the others are from earlier ones
    num_errors: int
    num_retries: int  # retries up the sampling ladder
    num_prompt_tokens: int
    num_output_tokens: int
    waiting: float | None  # [0, 1]: mean share of the engine's slots that were idle for lack of input
    host: str
    pid: int
    code_version: str

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.stage, self.name, self.caption, self.shard)


def make_key(shard: int, index: int) -> str:
    """The key of sample `index` of shard `shard`: 12 digits, no dots, safe as a file name and in a tar.

    >>> make_key(7, 42)
    '000007000042'
    """
    assert shard < 10**6 > index, f"sample {index} of shard {shard} has no key: a shard holds at most a million samples"
    return f"{shard:06d}{index:06d}"


def replace_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which no file can hold, replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def make_storable(row: R) -> R:
    """The row, or, if a table cannot hold one of its values, the same row with that value replaced and its status.

    The status is "invalid", or "error" in tables without it. Rows without either are returned as they are.
    """
    unstorable = [name for name, value in vars(row).items() if not _is_storable(value)]
    if not unstorable:
        return row
    statuses = get_args(get_type_hints(type(row)).get("status"))
    status = next((status for status in ("invalid", "error") if status in statuses), None)
    if status is None:
        return row
    changes = {name: _replace_unstorable(getattr(row, name)) for name in unstorable}
    changes |= dict.fromkeys({"value", "fields"} & vars(row).keys())
    error = f"a table cannot hold its {' and '.join(unstorable)}"
    plain: Any = row
    repaired: R = dataclasses.replace(plain, **{**changes, "status": status, "error": error})
    return repaired


def _is_storable(value: Any) -> bool:
    kind = type(value)  # of every value of every row, so the commonest kinds come first
    if kind is str:
        return bool(value.isascii()) or replace_surrogates(value) == value
    if value is None or kind is float or kind is bool:
        return True
    if kind is int:
        return bool(-(2**63) <= value < 2**63)
    if kind is tuple:
        return all(map(_is_storable, value))
    if isinstance(value, str):  # NumPy's, for example
        return _is_storable(str(value))
    return not dataclasses.is_dataclass(value) or all(map(_is_storable, vars(value).values()))


def _replace_unstorable(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, int) and not _is_storable(value):
        return 0
    if isinstance(value, tuple):
        return tuple(map(_replace_unstorable, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _replace_unstorable(part) for name, part in vars(value).items()})
    return value


def arrow_schema(record: type[Record], *, version: int | None = None) -> pa.Schema:
    """The explicit, versioned Arrow schema of a record; `version` is an earlier one of its columns."""
    return _build_schema(cast(Any, record), version or record.version)


@cache  # every part of every table asks for it, and type hints are slow to resolve
def _build_schema(record: Any, version: int) -> pa.Schema:
    import pyarrow as pa

    since = {field.name: field.metadata.get("since", 1) for field in dataclasses.fields(record)}
    fields = [field for field in _arrow_fields(record) if since[field.name] <= version]
    return pa.schema(fields, metadata={"recap.table": record.table, "recap.version": str(version)})


def column_names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(record))


def _arrow_fields(record: type) -> list[pa.Field]:
    import pyarrow as pa

    hints = get_type_hints(record)
    return [
        pa.field(name, _arrow_type(hints[name]), nullable=_is_optional(hints[name])) for name in column_names(record)
    ]


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _arrow_type(hint: Any) -> pa.DataType:
    import pyarrow as pa

    if _is_optional(hint):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        hint = str
    if get_origin(hint) is tuple:
        return pa.list_(pa.field("element", _arrow_type(get_args(hint)[0]), nullable=False))
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return pa.struct(_arrow_fields(hint))
    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), bytes: pa.binary()}
    return plain[hint]
