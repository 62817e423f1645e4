"""Decides what an input of the corpus is: usable, or why not. One row for each, whatever it is.

It knows neither where the bytes came from nor where they will lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.decoding.images import Limits, Probe
from pipeline.decoding.probe_pool import ProbePool
from pipeline.engines import Engine
from pipeline.execution.passes import Pass
from pipeline.execution.shard import Shard
from pipeline.records import Image, Raw, make_key
from pipeline.sections import Run, stamped
from pipeline.storage.payloads import ImagePacker, PackedImage
from stages.text.prompts import map_with_context

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class IngestInput:
    """One input of the plan, with its place."""

    shard: int
    index: int
    source: str
    raw: Raw

    @property
    def key(self) -> str:
        return make_key(self.shard, self.index)

    @property
    def id(self) -> tuple[str | int, ...]:
        return (self.key,)


def passes(run: Run) -> Iterable[Pass]:
    corpus = run.corpus
    limits = Limits(min_side=corpus.min_side, max_pixels=corpus.max_pixels)
    decoders = ProbePool(limits=limits, num_procs=run.num_cores)  # its processes start with the first file
    yield Pass(
        stage="ingest",
        folder="image",
        version=VERSION,
        slice={"source": run.source.stamp, **stamped(corpus)},
        record=Image,
        max_error_share=run.max_error_share if corpus.max_error_share is None else corpus.max_error_share,
        inputs=inputs,
        work=partial(work, decoders=decoders),
        close=decoders.close,
        payload=lambda shard: ImagePacker(run.folder, shard.number),
    )


def inputs(shard: Shard) -> Iterator[IngestInput]:
    for index, raw in enumerate(shard.read_inputs()):
        yield IngestInput(shard=shard.number, index=index, source=shard.run.source.kind, raw=raw)


def work(found: Iterator[IngestInput], _engines: Mapping[str, Engine], *, decoders: ProbePool) -> Iterator[PackedImage]:
    for one, seen in map_with_context(decoders.map, ((one, one.raw.data or b"") for one in found)):
        yield packed(one, None if one.raw.data is None else seen)


def packed(found: IngestInput, seen: Probe | None) -> PackedImage:
    """The row of an input: what the source says of it, and what the decoder saw (None: there were no bytes)."""
    raw, usable = found.raw, seen is not None and seen.status == "ok"
    in_place = raw.offset is not None
    row = Image(
        key=found.key,
        shard=found.shard,
        index=found.index,
        status=seen.status if seen else "unreadable",
        error=seen.error if seen else raw.error,
        source=found.source,
        source_key=raw.source_key,
        file=raw.file if usable and in_place else None,
        offset=raw.offset if usable else None,
        num_bytes=None if raw.data is None else len(raw.data),
        format=seen.format if seen else None,
        width=seen.width if seen else None,
        height=seen.height if seen else None,
        orientation=seen.orientation if seen else None,
        num_frames=seen.num_frames if seen else None,
        sha256=seen.sha256 if seen else None,
        alt_text=raw.alt_text,
        metadata=raw.metadata,
    )
    return PackedImage(row=row, data=raw.data if usable and not in_place else None)
