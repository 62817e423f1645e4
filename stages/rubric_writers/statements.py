"""Rubrics written without a model, statement by statement: what the teachers agree on, once each, and nothing besides.

Every claim that the teachers agree on is a criterion, also one that the student makes today, so that nothing right is
worth giving up. Where they agree on several things of one kind, a criterion asks for all of them. The last criterion
is that a caption says of no thing more than there are and nothing that the teachers do not support. It weighs as much
as all others together, and each claim beyond takes off as much as one of its kind may bring
(stages/scenes/claim_checks.py).

Teachers that leave out different things relate different neighbours, so a teacher's relations count with those that
follow from them, and two things are agreed to be so related when most of the teachers that relate them say so, and more
than one. All else needs as many teachers as must agree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from stages.scenes.claim_checks import CaptionClaims, Check, collect_claims
from stages.scenes.claims import Claim

__all__ = ["Settings", "engines", "prepare", "write"]
VERSION = 3


def write(inputs: Iterable[Evidence], **_: object) -> Iterator[WrittenRubric]:
    for evidence in inputs:
        teachers = [collect_claims(text) for text in evidence.teachers]
        student = [collect_claims(text) for text in evidence.student]
        checks = enumerate(_choose_checks(teachers, evidence.num_agree), start=1)
        criteria = [build_criterion(number, check, teachers, student) for number, check in checks]
        if criteria:
            *others, beyond = criteria
            yield WrittenRubric(criteria=(*others, replace(beyond, weight=sum(c.weight for c in others))))
        else:
            yield WrittenRubric(status="empty", error=f"there is nothing that {evidence.num_agree} of its teachers say")


def _choose_checks(teachers: Sequence[CaptionClaims], num_agree: int) -> Iterator[Check]:
    stated = [_follow_relations(teacher.first) for teacher in teachers]
    votes = Counter(claim for claims in stated for claim in claims)
    agreed = _find_agreed(stated, votes, num_agree)
    if not agreed:
        return
    yield from (Check(how="says", claims=frozenset({claim})) for claim in sort_claims(agreed))
    yield from (Check(how="says", claims=things) for things in _group_things(agreed) if len(things) > 1)
    supported = agreed | find_supported(votes, agreed, num_agree) | _find_undisputed(stated, agreed)
    yield Check(how="beyond", claims=frozenset(supported))


def _follow_relations(claims: frozenset[Claim]) -> frozenset[Claim]:
    """The claims and the relations that follow from them, without those of a thing to itself."""
    every = claims.union(derive_relations(claims))
    return frozenset(claim for claim in every if claim.kind != "relation" or claim.about != claim.other)


def _find_agreed(stated: Sequence[frozenset[Claim]], votes: Mapping[Claim, int], num_agree: int) -> set[Claim]:
    agreed = find_agreed(votes, num_agree)
    speakers, names = _count_speakers(stated), {claim.about for claim in agreed if claim.kind == "object"}
    related = {
        claim: num
        for claim, num in votes.items()
        if claim.kind == "relation" and names.issuperset(_list_pair(claim))
        if num >= min(num_agree, 2) and 2 * num > speakers[_list_pair(claim)]
    }
    others = {claim for claim in agreed if claim.kind in ("count", "background", "object") or claim.about in names}
    return {claim for claim in others if claim.kind != "relation"} | find_agreed(related, 1)


def _find_undisputed(stated: Sequence[frozenset[Claim]], agreed: set[Claim]) -> set[Claim]:
    """Relations of agreed things that one teacher alone speaks of: they bring nothing and cost nothing."""
    speakers, names = _count_speakers(stated), {claim.about for claim in agreed if claim.kind == "object"}
    return {
        claim
        for claims in stated
        for claim in claims
        if claim.kind == "relation" and names.issuperset(_list_pair(claim)) and speakers[_list_pair(claim)] == 1
    }


def _count_speakers(stated: Sequence[frozenset[Claim]]) -> Counter[frozenset[str]]:
    """The number of teachers that relate two things, by their names."""
    return Counter(
        pair for claims in stated for pair in {_list_pair(claim) for claim in claims if claim.kind == "relation"}
    )


def _list_pair(claim: Claim) -> frozenset[str]:
    return frozenset((claim.about, claim.other))


def _group_things(claims: Iterable[Claim]) -> Iterator[frozenset[Claim]]:
    """The things of each kind: red ring and blue ring."""
    kinds = defaultdict[str, set[Claim]](set)
    for claim in sort_claims(claims):
        if claim.kind == "object":
            kinds[claim.about.split()[-1]].add(claim)
    yield from map(frozenset, kinds.values())
