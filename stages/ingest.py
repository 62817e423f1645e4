"""Ingest stage: one image row for each input of the corpus, usable or not.

Knows neither where the bytes came from nor where they will be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.decoding import measures
from pipeline.decoding.images import Limits, Probe
from pipeline.decoding.probe_pool import ProbePool
from pipeline.engines import Engine
from pipeline.execution.passes import Pass, Shard
from pipeline.records import Image, MeasuredImage, Raw, make_key
from pipeline.sections import Run, stamped
from pipeline.storage.layout import PACKED
from pipeline.storage.payloads import ImagePacker, PackedImage
from stages.text.prompts import map_with_context

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class IngestInput:
    """One input of the plan and its position."""

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
    measured = bool(run.sections["curate"])
    probe = f"pipeline.decoding.images:{'probe_and_measure' if measured else 'probe'}"
    decoders = ProbePool(limits=limits, num_procs=run.num_cores, probe=probe)  # starts them with the first file
    yield Pass(
        stage="ingest",
        folder="image",
        version=VERSION,
        slice={
            "source": run.source.stamp,
            **stamped(corpus),
            **({"measures": measures.VERSION} if measured else {}),
        },
        record=MeasuredImage if measured else Image,
        max_error_share=run.resolve_error_share(corpus.max_error_share),
        inputs=inputs,
        work=partial(work, decoders=decoders, measured=measured),
        close=decoders.close,
        payload=lambda shard: ImagePacker(run.folder, shard.number),
        restore=restore,
    )


def inputs(shard: Shard) -> Iterator[IngestInput]:
    for index, raw in enumerate(shard.read_inputs()):
        if shard.run.corpus.pack:
            raw = replace(raw, file=None, offset=None)
        yield IngestInput(shard=shard.number, index=index, source=shard.run.source.kind, raw=raw)


def work(
    inputs: Iterator[IngestInput], _: Mapping[str, Engine], *, decoders: ProbePool, measured: bool
) -> Iterator[PackedImage]:
    files = ((item, item.raw.data or b"") for item in inputs)
    for item, probe in map_with_context(decoders.map, files):
        packed = _build_row(item, None if item.raw.data is None else probe)
        yield replace(packed, row=_add_measures(packed.row, probe)) if measured else packed


def _add_measures(row: Image, probe: Probe) -> MeasuredImage:
    pixels = (row.width or 0) * (row.height or 0)
    return MeasuredImage(
        **vars(row),
        phash=probe.phash,
        bits_per_pixel=round(8 * row.num_bytes / pixels, 4) if pixels and row.num_bytes else None,
        entropy=probe.entropy,
        aspect=round(row.width / row.height, 4) if row.width and row.height else None,
    )


def restore(shard: Shard, row: Image) -> PackedImage:
    """The finished row with the bytes that are packed, which a retry of other rows packs again."""
    is_packed = row.file is not None and Path(row.file).parts[0] == PACKED
    return PackedImage(row=row, data=shard.read_image(row) if is_packed else None)


def _build_row(item: IngestInput, probe: Probe | None) -> PackedImage:
    """Combines the source's description of an input with the decoder's probe (None: there were no bytes)."""
    raw, usable = item.raw, probe is not None and probe.status == "ok"
    in_place = raw.offset is not None
    row = Image(
        key=item.key,
        shard=item.shard,
        index=item.index,
        status=probe.status if probe else "unreadable",
        error=probe.error if probe else raw.error,
        source=item.source,
        source_key=raw.source_key,
        file=raw.file if usable and in_place else None,
        offset=raw.offset if usable else None,
        num_bytes=None if raw.data is None else len(raw.data),
        format=probe.format if probe else None,
        width=probe.width if probe else None,
        height=probe.height if probe else None,
        orientation=probe.orientation if probe else None,
        num_frames=probe.num_frames if probe else None,
        sha256=probe.sha256 if probe else None,
        alt_text=raw.alt_text,
        metadata=raw.metadata,
    )
    return PackedImage(row=row, data=raw.data if usable and not in_place else None)
