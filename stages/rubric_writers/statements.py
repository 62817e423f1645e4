"""Rubrics written without a model, statement by statement: what the teachers agree on, once each, and nothing besides.

Every claim that the teachers agree on is a criterion, also one that the student makes today, so that nothing right is
worth giving up. Where they agree on several things of one kind, a criterion asks for all of them. The last criterion
is that a caption says of no thing more than there are and nothing that the teachers do not support. It weighs as much
as all others together, and each claim beyond takes off as much as one of its kind may bring
(stages/scenes/claim_checks.py).

Two things are agreed to be so related when most of the teachers that relate them say so, and more than one. A caption
states few of all the relations of a picture, and another teacher other ones, so that a true one is often one that no
caption has: where `given.places` has answers of enough teachers on how all things are placed, these decide relations
instead of the captions and of what follows from them. Any agreed relation may be said. A rubric asks for those of
neighbours from left to right, as a complete caption has them, and for as many as there are neighbours: how two things
with a third one between them are related follows from others. All else needs as many teachers as must agree. A thing
that fewer see, but more than half as many, is doubted: it costs half of one that no two see.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace

from stages.rubric_writers import Evidence, WrittenRubric
from stages.rubric_writers.claims import (
    Settings,
    build_criterion,
    derive_relations,
    engines,
    find_agreed,
    find_supported,
    prepare,
    sort_claims,
)
from stages.scenes.claim_checks import CaptionClaims, Check, collect_claims, list_pair
from stages.scenes.claims import Claim
from stages.text.given import OpenFields

__all__ = ["Settings", "engines", "open_fields", "prepare", "write"]
VERSION = 5
PLACES = "places"  # the field that `given` fills with teachers' answers on how things are placed


def open_fields(_: Settings) -> OpenFields:
    return OpenFields(prompt="the writer statements", fields=frozenset({PLACES}), optional=frozenset({PLACES}))


def write(inputs: Iterable[Evidence], **_: object) -> Iterator[WrittenRubric]:
    for evidence in inputs:
        answers = evidence.texts.get(PLACES, ())
        if len(answers) > len(evidence.teachers):
            error = f"given.{PLACES} has {len(answers)} answers of {len(evidence.teachers)} teachers: one of each"
            yield WrittenRubric(status="error", error=error)
            continue
        teachers = [collect_claims(text) for text in evidence.teachers]
        student = [collect_claims(text) for text in evidence.student]
        placed = [collect_claims(text) for text in answers]
        checks = enumerate(_choose_checks(teachers, placed, evidence.num_agree), start=1)
        criteria = [build_criterion(number, check, teachers, student) for number, check in checks]
        if criteria:
            *others, beyond = criteria
            yield WrittenRubric(criteria=(*others, replace(beyond, weight=sum(c.weight for c in others))))
        else:
            yield WrittenRubric(status="empty", error=f"there is nothing that {evidence.num_agree} of its teachers say")


def _choose_checks(
    teachers: Sequence[CaptionClaims], placed: Sequence[CaptionClaims], num_agree: int
) -> Iterator[Check]:
    votes = Counter(claim for teacher in teachers for claim in teacher.first if claim.kind != "relation")
    plain = find_agreed(votes, num_agree)
    names = {claim.about for claim in plain if claim.kind == "object"}
    agreed = {claim for claim in plain if claim.kind in ("count", "background") or claim.about in names}
    if not agreed:
        return
    undisputed = set[Claim]()
    if len(placed) >= num_agree:
        related, _ = _find_related([_select_relations(answer.first) for answer in placed], names, num_agree)
    else:
        relating = [_select_relations(claims.union(derive_relations(claims))) for claims in (t.first for t in teachers)]
        related, undisputed = _find_related(relating, names, num_agree)
        votes.update(claim for claims in relating for claim in claims)
    asked = _select_neighbours(related)
    pairs = {list_pair(claim) for claim in asked}
    yield from (Check(how="says", claims=frozenset({claim})) for claim in sort_claims(agreed))
    for num in range(1, min(len(pairs), len(names) - 1) + 1):
        yield Check(how="some", claims=asked, num=num)
    yield from (Check(how="says", claims=things) for things in _group_things(agreed) if len(things) > 1)
    agreed |= related
    supported = agreed | find_supported(votes, agreed, num_agree) | undisputed
    doubted = {claim for claim in supported - agreed if claim.kind == "object"}
    yield Check(how="beyond", claims=frozenset(supported - doubted), doubted=frozenset(doubted))


def _select_relations(claims: Iterable[Claim]) -> frozenset[Claim]:
    """The relations among the claims, without those of a thing to itself."""
    return frozenset(claim for claim in claims if claim.kind == "relation" and claim.about != claim.other)


def _find_related(
    relating: Sequence[frozenset[Claim]], names: Set[str], num_agree: int
) -> tuple[set[Claim], set[Claim]]:
    """How agreed things are related: what most that speak of a pair say, and what one alone says of a pair."""
    votes = Counter(claim for claims in relating for claim in claims if names >= list_pair(claim))
    speakers = Counter(pair for claims in relating for pair in {list_pair(claim) for claim in claims})
    most = {
        claim: num for claim, num in votes.items() if num >= min(num_agree, 2) and 2 * num > speakers[list_pair(claim)]
    }
    return find_agreed(most, 1), {claim for claim in votes if speakers[list_pair(claim)] == 1}


def _select_neighbours(related: Set[Claim]) -> frozenset[Claim]:
    """The relations of two things that have no third one between them from left to right."""
    follows = defaultdict[str, set[str]](set)  # thing -> things right of it
    for claim in related:
        if claim.value == "left of":
            follows[claim.about].add(claim.other)
    parted = {
        frozenset((first, last))
        for first, middles in follows.items()
        for one in middles
        for last in follows.get(one, ())
    }
    return frozenset(claim for claim in related if list_pair(claim) not in parted)


def _group_things(claims: Iterable[Claim]) -> Iterator[frozenset[Claim]]:
    """The things of each kind: red ring and blue ring."""
    kinds = defaultdict[str, set[Claim]](set)
    for claim in sort_claims(claims):
        if claim.kind == "object":
            kinds[claim.about.split()[-1]].add(claim)
    yield from map(frozenset, kinds.values())
