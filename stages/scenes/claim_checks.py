"""Decides when a caption meets a criterion about claims: it makes one, avoids some, or makes none besides those listed.

What counts for a caption is what its sentences say. Where it is rewarded, pieces of sentences that say nothing count
against it besides: what is wrong in a caption cannot be unsaid by more text that runs on from it.

Whoever writes a criterion and whoever marks a caption by it ask here. The text of a criterion makes no claim itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, groupby
from typing import Literal

from stages.scenes.claims import Claim, Kind, contradicts, find_fragments, parse_caption

How = Literal["states", "avoids", "only", "plain"]
PLAIN = "Each sentence is a statement about the picture, and none says again what was said"


@dataclass(frozen=True, kw_only=True)
class CaptionClaims:
    """What a caption says."""

    claims: Mapping[Kind, frozenset[Claim]]
    loose: frozenset[Claim] = frozenset()  # of pieces of sentences that make no claim; never for the caption
    is_plain: bool  # each sentence makes claims, and at least one that no sentence before it made

    @property
    def all(self) -> Iterator[Claim]:
        return chain.from_iterable(self.claims.values())

    def __contains__(self, claim: Claim) -> bool:
        return claim in self.claims.get(claim.kind, ())

    def denies(self, claim: Claim) -> bool:
        return any(contradicts(claim, other) for other in self.against(claim.kind))

    def against(self, kind: Kind) -> frozenset[Claim]:
        """What it is held to have claimed where that is to its harm."""
        return self.claims.get(kind, frozenset()).union(claim for claim in self.loose if claim.kind == kind)


@lru_cache(maxsize=4096)
def collect_claims(text: str) -> CaptionClaims:
    claims: set[Claim] = set()
    sentences = parse_caption(text).sentences
    is_plain = bool(sentences)
    for sentence in sentences:
        is_plain &= not claims.issuperset(sentence.claims)
        claims.update(sentence.claims)
    by_kind = groupby(sorted(claims), key=lambda claim: claim.kind)
    return CaptionClaims(claims={kind: frozenset(some) for kind, some in by_kind}, is_plain=is_plain)


@lru_cache(maxsize=4096)
def collect_rewarded_claims(text: str) -> CaptionClaims:
    """What a caption is rewarded by: text that is added to it makes the reward higher only by making claims."""
    strays = (sentence.text for sentence in parse_caption(text).sentences if not sentence.claims)
    return replace(collect_claims(text), loose=frozenset(chain.from_iterable(map(find_fragments, strays))))


@dataclass(frozen=True, kw_only=True)
class Check:
    """How one criterion is decided.

    states: the caption makes all of the claims, and none that contradicts one: naming every texture does not say which
    it is. avoids: none of them. only: of one kind it makes no claim besides
    these, and, unless it may be silent, one of that kind at least. plain: see `Heard`.

    >>> check = Check(how="states", claims=frozenset({Claim("relation", "red ring", "left of", "blue star")}))
    >>> check.text
    'Says: relation(red ring, left of, blue star)'
    >>> check.is_met(collect_claims("The blue star is right of the red ring."))
    True
    """

    how: How
    kind: Kind | None = None  # of `only`
    claims: frozenset[Claim] = field(default_factory=frozenset)
    may_be_silent: bool = True  # of `only`

    def is_met(self, caption: CaptionClaims) -> bool:
        match self.how:
            case "states":
                return all(claim in caption and not caption.denies(claim) for claim in self.claims)
            case "avoids":
                return not any(claim in caption.against(claim.kind) for claim in self.claims)
            case "only":
                assert self.kind is not None
                is_silent = self.kind not in caption.claims
                return caption.against(self.kind) <= self.claims and (self.may_be_silent or not is_silent)
        return caption.is_plain

    @property
    def text(self) -> str:
        listed = "; ".join(format_claim(claim) for claim in sorted(self.claims))
        match self.how:
            case "states":
                return f"Says: {listed}"
            case "avoids":
                return f"Does not say: {listed}"
            case "only":
                begin = f"Of the kind {self.kind} says"
                something = "" if self.may_be_silent else "something, and "
                return f"{begin} {something}nothing besides: {listed}" if listed else f"{begin} nothing"
        return PLAIN

    @property
    def json(self) -> str:
        claims = sorted(map(list, self.claims))
        values = {"how": self.how, "kind": self.kind, "claims": claims, "may_be_silent": self.may_be_silent}
        return json.dumps(values)


def format_claim(claim: Claim) -> str:
    """A claim for readers: object(red ring)."""
    return f"{claim.kind}({', '.join(part for part in claim[1:] if part)})"


@lru_cache(maxsize=65536)
def parse_check(text: str) -> Check:
    """The check that a criterion's `claim` holds as JSON."""
    values = json.loads(text)
    return Check(**{**values, "claims": frozenset(Claim(*claim) for claim in values["claims"])})
