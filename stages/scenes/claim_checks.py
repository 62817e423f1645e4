"""Criteria about claims: a caption makes some, avoids some, or makes no others of a kind.

A caption's claims come from its sentences. Where it is rewarded, claims in fragments of sentences outside the grammar
count against it too, so that appending text to a false claim does not undo it. The writer of a criterion and the scorer
share these checks. The text of a criterion itself makes no claim.

The checks `says` and `beyond` count statements instead of comparing sets: a thing named twice is stated twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, groupby
from typing import Literal

from pipeline.records import SEVERITY_WEIGHTS, Severity
from stages.scenes.claims import Claim, Kind, Sentence, contradicts, find_fragments, is_exceeded, parse_caption

How = Literal["states", "avoids", "only", "plain", "says", "some", "beyond"]
PLAIN = "Each sentence is a statement about the picture, and none says again what was said"
SEVERITY: Mapping[Kind, Severity] = {
    "object": "critical",
    "count": "critical",
    "relation": "important",
    "size": "important",
    "texture": "important",
    "background": "minor",
}
# No claim costs less than a relation brings, of which a caption may add many.
LEAST_COST = SEVERITY_WEIGHTS["important"]
# What a doubted claim costs, and one said again, in what an unsupported one does: saying a thing again is never right.
DOUBT, AGAIN = 0.5, 3.0


@dataclass(frozen=True, kw_only=True)
class CaptionClaims:
    """A caption's claims by kind."""

    claims: Mapping[Kind, frozenset[Claim]]
    stray: frozenset[Claim] = frozenset()  # in fragments of sentences outside the grammar; only count against it
    is_plain: bool  # each sentence makes at least one claim that no sentence before it makes
    first: frozenset[Claim] = frozenset()  # stated by the first mention of a thing, or by another sentence
    again: tuple[Claim, ...] = ()  # said of a thing named before, or said before
    exceeded: tuple[Claim, ...] = ()  # counts below what is listed
    num_stray: int = 0  # sentences outside the grammar

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the things that it states, one by one."""
        return frozenset(claim.about for claim in self.first if claim.kind == "object")

    @property
    def all(self) -> Iterator[Claim]:
        return chain.from_iterable(self.claims.values())

    def __contains__(self, claim: Claim) -> bool:
        return claim in self.claims.get(claim.kind, ())

    def denies(self, claim: Claim) -> bool:
        return any(contradicts(claim, other) for other in self.claims_against(claim.kind))

    def claims_against(self, kind: Kind) -> frozenset[Claim]:
        """The claims that may count against the caption: stray ones too."""
        return self.claims.get(kind, frozenset()).union(claim for claim in self.stray if claim.kind == kind)


@lru_cache(maxsize=4096)
def collect_claims(text: str) -> CaptionClaims:
    claims: set[Claim] = set()
    sentences = parse_caption(text).sentences
    is_plain = bool(sentences)
    for sentence in sentences:
        is_plain &= not claims.issuperset(sentence.claims)
        claims.update(sentence.claims)
    kinds = groupby(sorted(claims), key=lambda claim: claim.kind)
    first, again, exceeded = _split_statements(sentences)
    return CaptionClaims(
        claims={kind: frozenset(group) for kind, group in kinds},
        is_plain=is_plain,
        first=first,
        again=again,
        exceeded=exceeded,
        num_stray=sum(not sentence.claims for sentence in sentences),
    )


def _split_statements(
    sentences: Sequence[Sentence],
) -> tuple[frozenset[Claim], tuple[Claim, ...], tuple[Claim, ...]]:
    """The claims that may be credited, those that are said again, and counts that are too low: both only cost.

    A picture has one thing of each name.
    """
    mentions = [sentence.claims for sentence in sentences if sentence.claims and sentence.claims[0].kind == "object"]
    first: set[Claim] = set()
    again: list[Claim] = []
    exceeded: list[Claim] = []
    for sentence in sentences:
        is_new = bool(sentence.claims) and sentence.claims[0] not in first
        for claim in sentence.claims:
            if not is_new:
                again.append(claim)
            elif is_exceeded(claim, mentions):
                exceeded.append(claim)
            else:
                first.add(claim)
    return frozenset(first), tuple(again), tuple(exceeded)


@lru_cache(maxsize=4096)
def collect_rewarded_claims(text: str) -> CaptionClaims:
    """The claims that decide a reward, with stray ones: added text can raise it only by making claims."""
    strays = (sentence.text for sentence in parse_caption(text).sentences if not sentence.claims)
    return replace(collect_claims(text), stray=frozenset(chain.from_iterable(map(find_fragments, strays))))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One criterion. `how` is one of:

    states: makes all of the claims, and none that contradicts one, so naming every texture does not pass;
    avoids: makes none of the claims;
    only: of one kind, makes no claim besides these, and at least one unless `may_be_silent`;
    plain: see `CaptionClaims.is_plain`;
    says: as states, but of a thing named twice only the first mention counts;
    some: as says, but of relations, and of these for `num` pairs of things that the caption also names by themselves;
    beyond: states nothing besides the claims, none that is doubted, and nothing twice; see `cost`.

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
    num: int = 0  # of `some`
    doubted: frozenset[Claim] = field(default_factory=frozenset)  # of `beyond`: claims that cost less than others

    def is_met(self, caption: CaptionClaims) -> bool:
        match self.how:
            case "states":
                return all(claim in caption and not caption.denies(claim) for claim in self.claims)
            case "says":
                return all(claim in caption.first and not caption.denies(claim) for claim in self.claims)
            case "some":
                said = {list_pair(claim) for claim in self.claims & caption.first if not caption.denies(claim)}
                return sum(pair <= caption.names for pair in said) >= self.num
            case "beyond":
                return bool(self.claims & caption.first) and not self.cost(caption)
            case "avoids":
                return not any(claim in caption.claims_against(claim.kind) for claim in self.claims)
            case "only":
                assert self.kind is not None
                is_silent = self.kind not in caption.claims
                return caption.claims_against(self.kind) <= self.claims and (self.may_be_silent or not is_silent)
        return caption.is_plain

    def cost(self, caption: CaptionClaims) -> float:
        """The excess of a caption beyond the claims: what is unsupported costs at least what one of its kind may bring.

        A sentence outside the grammar costs as much as a thing.
        """
        known = self.claims | self.doubted
        costs = chain(
            map(weigh_cost, chain(caption.first - known, caption.stray - known, caption.exceeded)),
            (DOUBT * weigh_cost(claim) for claim in self.doubted & (caption.first | caption.stray)),
            (AGAIN * weigh_cost(claim) for claim in caption.again),
        )
        return sum(costs) + STRAY_COST * caption.num_stray

    @property
    def text(self) -> str:
        listed = "; ".join(format_claim(claim) for claim in sorted(self.claims))
        match self.how:
            case "states" | "says":
                return f"Says: {listed}"
            case "some":
                return f"Says of {self.num} or more pairs of things that it names how they are related: {listed}"
            case "beyond":
                doubted = "; ".join(format_claim(claim) for claim in sorted(self.doubted))
                besides = f"; and does not say: {doubted}" if doubted else ""
                return f"Says of no thing more than there are, and nothing besides: {listed}{besides}"
            case "avoids":
                return f"Does not say: {listed}"
            case "only":
                subject = f"Of the kind {self.kind} says"
                minimum = "" if self.may_be_silent else "something, and "
                return f"{subject} {minimum}nothing besides: {listed}" if listed else f"{subject} nothing"
        return PLAIN

    @property
    def json(self) -> str:
        claims = sorted(map(list, self.claims))
        values = {"how": self.how, "kind": self.kind, "claims": claims, "may_be_silent": self.may_be_silent}
        more = {"num": self.num, "doubted": sorted(map(list, self.doubted))}
        return json.dumps({**values, **{name: value for name, value in more.items() if value}})


def list_pair(relation: Claim) -> frozenset[str]:
    """The names of the two things, in no order."""
    return frozenset((relation.about, relation.other))


def weigh_claim(claim: Claim) -> float:
    """The reward of a claim on which the teachers agree.

    >>> weigh_claim(Claim("object", "red ring", ""))
    3.0
    """
    return SEVERITY_WEIGHTS[SEVERITY[claim.kind]]


def weigh_cost(claim: Claim) -> float:
    """What an unsupported claim costs; a thing more is also one more of its kind, whose number is a minor criterion."""
    return max(LEAST_COST, weigh_claim(claim) + (SEVERITY_WEIGHTS["minor"] if claim.kind == "object" else 0.0))


STRAY_COST = weigh_cost(Claim("object", "", ""))  # of a sentence outside the grammar


def discount(met: float, cost: float, allowance: float) -> tuple[float, float]:
    """The shares that a caption keeps of the allowance and of its met criteria when it says more than is supported.

    Unsupported statements are subtracted from the allowance first, so that captions with many errors still differ in
    reward. A caption that meets nothing keeps nothing.

    Args:
        met: the weights of the criteria that it meets.
        cost: of what it says beyond.
        allowance: the weight of the criterion that it says nothing beyond.

    >>> discount(8.0, 4.0, 16.0), discount(8.0, 20.0, 16.0), discount(0.0, 0.0, 16.0)
    ((0.75, 1.0), (0.0, 0.5), (0.0, 0.0))
    """
    if not met:
        return 0.0, 0.0
    return max(0.0, 1.0 - cost / allowance), min(1.0, max(0.0, 1.0 - (cost - allowance) / met))


def format_claim(claim: Claim) -> str:
    """As in object(red ring)."""
    return f"{claim.kind}({', '.join(part for part in claim[1:] if part)})"


@lru_cache(maxsize=65536)
def parse_check(text: str) -> Check:
    """The inverse of `Check.json`."""
    values = json.loads(text)
    sets = {name: frozenset(Claim(*claim) for claim in values.get(name, ())) for name in ("claims", "doubted")}
    return Check(**{**values, **sets})
