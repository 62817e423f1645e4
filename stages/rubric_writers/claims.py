"""Decides what a rubric asks when no model writes it: what teachers agree on and the student misses, claim by claim.

Three sorts of criteria. What the committee says and the student left out at least once is to be said. Things that the
student named and the committee does not bear out are to be avoided. And whatever the student says now: of each kind of
claim nothing may be said besides what the committee bears out, so that inventing costs a student that learns to talk;
where the committee has a word on that kind, silence is no way to meet it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.records import SEVERITY_WEIGHTS, RubricCriterion, Severity
from stages.rubric_writers import Evidence, WrittenRubric
from stages.scenes.claim_checks import CaptionClaims, Check, collect_claims
from stages.scenes.claims import DIRECTIONS, KINDS, Claim, Kind, contradicts

if TYPE_CHECKING:
    from stages.rubric import Config

VERSION = 3
SEVERITY: Mapping[Kind, Severity] = {
    "object": "critical",
    "count": "critical",
    "relation": "important",
    "size": "important",
    "texture": "important",
    "background": "minor",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """None."""


def prepare(config: Config, *, field: str, **_: Path) -> Settings:
    """
    Raises:
        ConfigError: the section names an engine, or words to ask it.
    """
    for name in ("engine", "words"):
        if getattr(config, name):
            raise ConfigError(f"{field}.{name}", "is nobody's: the writer claims asks no model; did you mean llm?")
    return Settings()


def engines(_: Settings) -> tuple[str, ...]:
    return ()


def write(inputs: Iterable[Evidence], **_: object) -> Iterator[WrittenRubric]:
    for evidence in inputs:
        teachers, student = (
            [collect_claims(t) for t in evidence.teachers],
            [collect_claims(t) for t in evidence.student],
        )
        checks = list(_checks(teachers, student, evidence.num_agree))
        demands = tuple(_demand(number, check, teachers, student) for number, check in enumerate(checks, start=1))
        if demands:
            yield WrittenRubric(criteria=demands)
        else:
            yield WrittenRubric(status="empty", error=f"there is nothing that {evidence.num_agree} of its teachers say")


def _checks(teachers: Sequence[CaptionClaims], student: Sequence[CaptionClaims], num_agree: int) -> Iterator[Check]:
    votes = Counter(claim for teacher in teachers for claim in teacher.all)
    agreed = agreement(votes, num_agree)
    if not agreed:
        return
    borne_out = agreed | _borne_out(votes, agreed, num_agree)
    missed = [claim for claim in agreed if not all(claim in caption for caption in student)]
    things = {claim for caption in student for claim in caption.all if claim.kind == "object"}
    yield from (Check(how="states", claims=frozenset({claim})) for claim in _sorted(missed))
    yield from (Check(how="avoids", claims=frozenset({claim})) for claim in _sorted(things - borne_out))
    for kind in KINDS:
        allowed = frozenset(claim for claim in borne_out if claim.kind == kind)
        yield Check(how="only", kind=kind, claims=allowed, may_be_silent=not allowed & agreed)
    yield Check(how="plain")


def agreement(votes: Mapping[Claim, int], num_agree: int) -> set[Claim]:
    """The committee's word: what enough teachers say, and no more or as many of them contradict."""
    enough = {claim for claim, num in votes.items() if num >= num_agree}
    return {c for c in enough if not any(contradicts(c, other) and votes[other] >= votes[c] for other in enough)}


def _borne_out(votes: Mapping[Claim, int], agreed: set[Claim], num_agree: int) -> set[Claim]:
    """What may be said besides what is agreed: nothing that contradicts it.

    One teacher's word may be its own mistake, that of more than half of those who make an agreement hardly is.
    """
    others = {claim for claim, num in votes.items() if 2 * num > num_agree} | set(_entailed(agreed))
    return {claim for claim in others if not any(contradicts(claim, word) for word in agreed)}


def _demand(
    number: int, check: Check, teachers: Sequence[CaptionClaims], student: Sequence[CaptionClaims]
) -> RubricCriterion:
    kind = check.kind or next((claim.kind for claim in check.claims), None)
    severity = SEVERITY[kind] if kind else "important"
    return RubricCriterion(
        id="_".join([check.how, *([kind] if kind else []), str(number)]),
        text=check.text,
        severity=severity,
        weight=SEVERITY_WEIGHTS[severity],
        agreed=sum(map(check.is_met, teachers)),
        missed=sum(not check.is_met(caption) for caption in student) / len(student),
        claim=check.json,
    )


def _sorted(claims: Iterable[Claim]) -> list[Claim]:
    return sorted(claims, key=lambda claim: (KINDS.index(claim.kind), claim))


def _entailed(claims: Iterable[Claim]) -> Iterator[Claim]:
    """Directions that follow over several steps: what is left of something is left of all that this is left of."""
    for word in DIRECTIONS:
        known = {(c.about, c.other) for c in claims if c.kind == "relation" and c.value == word}
        more = known
        while more:
            more = {(a, d) for (a, b), (c, d) in product(known, known) if b == c and a != d} - known
            known |= more
        yield from (Claim("relation", a, word, b) for a, b in known)
