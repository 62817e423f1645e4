"""The certificate of a guarantee: what was found, and what it holds for; stale once any of that has changed.

It names what it holds for by digests of the stamps that tables have. Does not decide what is guaranteed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.execution.sharing import asked_folder, shares_rows
from pipeline.progress import format_quantity
from pipeline.sections import Run
from pipeline.storage import tables
from pipeline.storage.layout import CERTIFICATE, table_path
from pipeline.storage.payloads import hash_file
from stages.audit.canaries import choose_shards
from stages.audit.thresholds import Guarantee
from stages.scorers._samples import list_score_passes


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A guarantee on the captions at or above a threshold, and what it holds for."""

    score: str
    threshold: float
    precision: float  # [0, 1]: of the captions there, at least
    confidence: float  # [0, 1]
    bound: float  # [0, 1]: the lower bound of the precision that was found
    kept: float  # [0, 1]: share of all captions
    num_labels: int  # of captions there
    made_from: Mapping[str, str]  # judge, rubric, captioner, corpus, rules -> digest, hex

    @property
    def condition(self) -> str:
        """The rule that keeps the captions it holds for."""
        return f"{self.score} >= {self.threshold!r}"


def write_certificate(run: Run, score: str, guarantee: Guarantee) -> None:
    """Replaces the certificate of an earlier audit; removes it if no threshold was found."""
    path = run.folder / CERTIFICATE
    if guarantee.threshold is None:
        path.unlink(missing_ok=True)
        return
    certificate = Certificate(
        score=score,
        threshold=guarantee.threshold,
        precision=guarantee.precision,
        confidence=guarantee.confidence,
        bound=guarantee.bound,
        kept=guarantee.kept,
        num_labels=guarantee.num_labels,
        made_from=digest_parts(run, score),
    )
    with tables.open_atomic(path) as file:
        file.write(f"{json.dumps(asdict(certificate), indent=2)}\n".encode())


def describe_certificate(run: Run) -> Iterator[str]:
    """Lines on the run's certificate, and on what has changed since; none without one."""
    path = run.folder / CERTIFICATE
    try:
        certificate = Certificate(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return
    except (TypeError, ValueError) as error:
        yield f"certificate: {path} cannot be read ({error}); audit again"
        return
    current = digest_parts(run, certificate.score)
    changed = [part for part, digest in certificate.made_from.items() if current.get(part) != digest]
    is_applied = current["rules"] == _digest([[certificate.condition]])
    if is_applied:
        changed.remove("rules")
    yield (
        f"certificate: at least {certificate.precision:.0%} of the captions with {certificate.condition} are"
        f" acceptable, with {certificate.confidence:.0%} confidence ({certificate.bound:.1%} by"
        f" {format_quantity(certificate.num_labels, 'label')}); they are {certificate.kept:.1%} of all"
    )
    if changed:
        yield f"  STALE: changed since the audit: {', '.join(changed)}; audit again"
    elif is_applied:
        yield "  captions are kept by this condition alone"
    else:
        yield "  not applied: captions are kept by other rules"


def digest_parts(run: Run, score: str) -> dict[str, str]:
    """Digests of what the tables of a sample of shards were made from, and of the plan; part -> hex."""
    locate = asked_folder if shares_rows(run) else str
    passes = [p for p in list_score_passes(run) if p.name == score]
    stamps = [stamp for p in passes for stamp in _read_stamps(run, locate(f"score/{score}/{p.caption}"))]
    rubrics = {f"rubric/{p.scorer.rubric}" for p in passes if p.scorer.rubric}
    captions = [stamp for name in run.sections["caption"] for stamp in _read_stamps(run, locate(f"caption/{name}"))]
    rules = [stamp.get("rules", []) for stamp in _read_stamps(run, "verdict")]
    return {
        "judge": _digest({name: value for name, value in stamp.items() if name != "rubric"} for stamp in stamps),
        "rubric": _digest(
            [
                *(stamp.get("rubric") for stamp in stamps),
                *(stamp for folder in sorted(rubrics) for stamp in _read_stamps(run, folder)),
            ]
        ),
        "captioner": _digest(captions),
        "corpus": _digest([hash_file(run.folder / "plan.parquet"), *_read_digests(run, "image")]),
        "rules": _digest([" ".join(sql.split()) for _, sql in conditions] for conditions in rules),
    }


def _read_stamps(run: Run, folder: str) -> Iterator[Mapping[str, Any]]:
    """The part of the configuration that decided the rows of each table."""
    for footer in _read_footers(run, folder):
        yield {**footer.provenance.slice, "stage version": footer.provenance.version}


def _read_digests(run: Run, folder: str) -> Iterator[str]:
    return (footer.digest for footer in _read_footers(run, folder))


def _read_footers(run: Run, folder: str) -> Iterator[tables.TableFooter]:
    found = (tables.read_whole_footer(table_path(run.folder, folder, shard)) for shard in choose_shards(run))
    return (footer for footer in found if footer is not None)


def _digest(values: Iterable[Any]) -> str:
    """Of the distinct values, in any order."""
    distinct: Sequence[str] = sorted({tables.canonical_json(value) for value in values})
    return hashlib.sha256("\n".join(distinct).encode()).hexdigest()
