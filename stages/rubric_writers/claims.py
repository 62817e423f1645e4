"""Rubrics written without a model, claim by claim: what the teachers agree on and the student misses.

There are three sorts of criteria. A claim that the teachers agree on and a caption of the student lacks is to be made.
An object that the student names and the teachers do not support is to be avoided. And for each kind of claim, no other
claims may be made than those the teachers support, so that inventing costs a student that learns to say more; where
the teachers agree on a claim of that kind, making none does not meet the criterion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.records import SEVERITY_WEIGHTS, RubricCriterion, Severity
from stages.rubric_writers import Evidence, WriterOptions, WrittenRubric
from stages.scenes.claim_checks import SEVERITY, CaptionClaims, Check, collect_claims
from stages.scenes.claims import DIRECTIONS, KINDS, Claim, Kind, contradicts

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The writer has no settings."""


def prepare(config: WriterOptions, *, field: str, **_: Path) -> Settings:
    """
    Raises:
        ConfigError: the section has `engine` or `words`, which only models need.
    """
    for name in ("engine", "words"):
        if getattr(config, name):
            raise ConfigError(f"{field}.{name}", "is not for the writer claims, which uses no model; did you mean llm?")
    return Settings()


def engines(_: Settings) -> tuple[str, ...]:
    return ()


def write(inputs: Iterable[Evidence], **_: object) -> Iterator[WrittenRubric]:
    for evidence in inputs:
        teachers = [collect_claims(text) for text in evidence.teachers]
        student = [collect_claims(text) for text in evidence.student]
        checks = enumerate(_choose_checks(teachers, student, evidence.num_agree), start=1)
        criteria = tuple(build_criterion(number, check, teachers, student) for number, check in checks)
        if criteria:
            yield WrittenRubric(criteria=criteria)
        else:
            yield WrittenRubric(status="empty", error=f"there is nothing that {evidence.num_agree} of its teachers say")


def _choose_checks(
    teachers: Sequence[CaptionClaims], student: Sequence[CaptionClaims], num_agree: int
) -> Iterator[Check]:
    votes = Counter(claim for teacher in teachers for claim in teacher.all)
    agreed = find_agreed(votes, num_agree)
    if not agreed:
        return
    supported = agreed | find_supported(votes, agreed, num_agree)
    missed = [claim for claim in agreed if not all(claim in caption for caption in student)]
    objects = {claim for caption in student for claim in caption.all if claim.kind == "object"}
    yield from (Check(how="states", claims=frozenset({claim})) for claim in sort_claims(missed))
    yield from (Check(how="avoids", claims=frozenset({claim})) for claim in sort_claims(objects - supported))
    for kind in KINDS:
        allowed = frozenset(claim for claim in supported if claim.kind == kind)
        yield Check(how="only", kind=kind, claims=allowed, may_be_silent=not allowed & agreed)
    yield Check(how="plain")


def find_agreed(votes: Mapping[Claim, int], num_agree: int) -> set[Claim]:
    """Claims that enough teachers make, and that fewer teachers contradict."""
    enough = {claim for claim, num in votes.items() if num >= num_agree}
    return {c for c in enough if not any(contradicts(c, other) and votes[other] >= votes[c] for other in enough)}


def find_supported(votes: Mapping[Claim, int], agreed: set[Claim], num_agree: int) -> set[Claim]:
    """Claims that are allowed beyond the agreed ones, which they do not contradict.

    One teacher alone may be mistaken; more than half of those needed for an agreement rarely are.
    """
    others = {claim for claim, num in votes.items() if 2 * num > num_agree} | set(derive_relations(agreed))
    return {claim for claim in others if not any(contradicts(claim, other) for other in agreed)}


def build_criterion(
    number: int, check: Check, teachers: Sequence[CaptionClaims], student: Sequence[CaptionClaims]
) -> RubricCriterion:
    kind = check.kind or next((claim.kind for claim in check.claims), None)
    severity = choose_severity(check, kind)
    return RubricCriterion(
        id="_".join([check.how, *([kind] if kind and check.how != "beyond" else []), str(number)]),
        text=check.text,
        severity=severity,
        weight=SEVERITY_WEIGHTS[severity],
        agreed=sum(map(check.is_met, teachers)),
        missed=sum(not check.is_met(caption) for caption in student) / len(student),
        claim=check.json,
    )


def choose_severity(check: Check, kind: Kind | None) -> Severity:
    """A claim's own; the number of a kind weighs little, because each of its things is a criterion already."""
    if check.how == "beyond":
        return "critical"
    if check.how == "says" and len(check.claims) > 1:
        return "minor"
    return SEVERITY[kind] if kind else "important"


def sort_claims(claims: Iterable[Claim]) -> list[Claim]:
    return sorted(claims, key=lambda claim: (KINDS.index(claim.kind), claim))


def derive_relations(claims: Iterable[Claim]) -> Iterator[Claim]:
    """Relations that follow from others: left of A, which is left of B, is left of B."""
    for word in DIRECTIONS:
        known = {(c.about, c.other) for c in claims if c.kind == "relation" and c.value == word}
        more = known
        while more:
            more = {(a, d) for (a, b), (c, d) in product(known, known) if b == c and a != d} - known
            known |= more
        yield from (Claim("relation", a, word, b) for a, b in known)
