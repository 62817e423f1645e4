"""What a judge's verdicts on spoiled copies of captions show: whether it is bad, and in which way.

Pure functions over verdicts. They know neither tables nor models, nor how a copy is spoiled.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

MIN_COPIES = 20  # judged copies, of a kind or in all, below which nothing is concluded
MARGIN = 0.005  # smaller differences of two values count as none
MIN_DETECTION = 0.5  # of errors in what the judge accepted; significantly less is an alarm
ONE_SIDED = 1.645  # standard errors of a one-sided 95 % bound
TWO_SIDED = 1.96
CERTAIN = 3.0  # standard errors
MAX_FAILED = 0.2  # share of calls
CONSTANT = 0.9  # share of ratings that are equal, to a tenth
DECISIVE = 0.5  # share of the variance of verdicts that place or length explains
EVIDENT = 0.8  # such a share that nothing else need be known
MAX_GROUPS = 10  # of lengths
NOTICED = 0.25  # share of errors below which a judge does not look at their kind
UNCHANGED = 0.8  # share of copies with the value of the original

CHANGE_LENGTH = frozenset({"dropped", "foreign_first", "foreign_last", "foreign_middle", "invented", "repeated"})
# kind -> (copies of it, what a judge that accepts them does not look at)
WORDS: Mapping[str, tuple[str, str]] = {
    "attribute": ("captions in which two things exchange colours", "which thing has which colour"),
    "colour": ("spoiled colours", "colours"),
    "dropped": ("captions that lack one of their sentences", "completeness"),
    "foreign_first": ("captions with a sentence of another image at the beginning", "the first sentence"),
    "foreign_last": ("captions with a sentence of another image at the end", "the last sentence"),
    "foreign_middle": ("captions with a sentence of another image in the middle", "the middle of a caption"),
    "invented": ("invented objects", "whether things are in the image"),
    "number": ("spoiled numbers", "numbers"),
    "object": ("spoiled objects", "objects"),
    "other_caption": ("captions of another image", "the image"),
    "quote": ("misread text", "text in the image"),
    "repeated": ("captions that have a sentence twice", "repetition"),
    "side": ("spoiled sides and relations", "where things are"),
}
Cause = Literal[
    "failures", "always yes", "always no", "constant", "inverted", "random", "unseeing", "length", "candidate",
    "sentence", "beginning", "end", "blind", "too few", "unasked",
]  # fmt: skip
IRRELEVANT: Mapping[Cause, str] = {
    "candidate": "the place of a caption among the candidates of its image",
    "sentence": "the place of a sentence in its caption",
    "length": "the length of captions",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedCopy:
    """A judge's values of a caption and of one spoiled copy of it."""

    kind: str
    caption: str  # its id; the copies of one caption are not independent
    shard: int = 0
    candidate: int = 0
    original: float | None  # [0, 1]; None: the judge failed
    copy: float | None
    accepted: float | None = None  # value of what was changed, in the original; None: that of the whole caption
    num_words: tuple[int, int] = (0, 0)  # of the original and the copy
    sentences: tuple[float | None, ...] = ()  # values of the copy's sentences, where each is judged by itself

    @property
    def is_judged(self) -> bool:
        return self.original is not None and self.copy is not None

    @property
    def sign(self) -> int:
        """1: the copy has less than the original; -1: more; 0: as much."""
        assert self.original is not None and self.copy is not None
        difference = self.original - self.copy
        return 0 if abs(difference) < MARGIN else 1 if difference > 0 else -1

    @property
    def share_accepted(self) -> float:
        """The value of what was changed, before the change."""
        assert self.original is not None
        return self.original if self.accepted is None else self.accepted


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How far a judge notices errors of a kind, or of several.

    `difference` is J = P(less | spoiled) - P(more | spoiled): for verdicts of yes and no,
    P(yes | original) - P(yes | spoiled) (Youden, Cancer 3, 1950). Only what was accepted can be lost, so that J is at
    most P(yes | original), however good the judge: where 40 % of the numbers in captions are wrong in the first place,
    the best judge has a J of 0.6 for numbers. `share` = J / P(yes | original) is 1 for it, and 0 for one that guesses.
    """

    kind: str
    num_copies: int
    num_judged: int  # with a value of the original and of the copy
    num_captions: int  # judged; the copies of one are averaged, since they are not independent
    difference: float  # [-1, 1], mean over captions
    accepted: float  # [0, 1]: mean value of what was changed, before the change
    variances: tuple[float, float, float]  # of both over captions, and their covariance

    @classmethod
    def measure(cls, kind: str, copies: Sequence[RatedCopy]) -> Detection:
        judged: dict[str, list[RatedCopy]] = {}
        for copy in copies:
            if copy.is_judged:
                judged.setdefault(copy.caption, []).append(copy)
        signs = [_mean([copy.sign for copy in own]) for own in judged.values()]
        accepted = [_mean([copy.share_accepted for copy in own]) for own in judged.values()]
        return cls(
            kind=kind,
            num_copies=len(copies),
            num_judged=sum(map(len, judged.values())),
            num_captions=len(judged),
            difference=_mean(signs),
            accepted=_mean(accepted),
            variances=(_covariance(signs, signs), _covariance(accepted, accepted), _covariance(signs, accepted)),
        )

    @property
    def is_known(self) -> bool:
        return self.num_judged >= MIN_COPIES

    @property
    def share(self) -> float:
        """Of the errors in what was accepted, those noticed, less what guessing gives; [0, 1]."""
        return min(1.0, max(0.0, self.difference / self.accepted)) if self.accepted else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference."""
        half = TWO_SIDED * self.standard_error(0.0)
        return max(-1.0, self.difference - half), min(1.0, self.difference + half)

    def standard_error(self, minimum: float) -> float:
        """Of difference - minimum * accepted."""
        of_signs, of_accepted, of_both = self.variances
        variance = of_signs + minimum**2 * of_accepted - 2 * minimum * of_both
        return math.sqrt(max(0.0, variance) / max(1, self.num_captions))

    def is_below(self, minimum: float, *, num_errors: float = ONE_SIDED) -> bool:
        """True if the share is significantly below `minimum`: J + 1.645 se < minimum * P(yes | original)."""
        excess = self.difference - minimum * self.accepted
        return self.is_known and excess + num_errors * self.standard_error(minimum) < 0

    def is_above(self, minimum: float, *, num_errors: float = ONE_SIDED) -> bool:
        excess = self.difference - minimum * self.accepted
        return self.is_known and excess - num_errors * self.standard_error(minimum) > 0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence on a judge, and why it is written."""

    cause: Cause
    kind: str = ""  # of error; "": of all
    text: str

    @property
    def is_alarm(self) -> bool:
        return self.cause not in ("too few", "unasked")


@dataclass(frozen=True, kw_only=True)
class Health:
    """What spoiled copies show of a judge."""

    num_captions: int  # with copies
    detections: tuple[Detection, ...]  # by kind
    findings: tuple[Finding, ...]  # alarms first

    @property
    def is_bad(self) -> bool:
        return any(finding.is_alarm for finding in self.findings)

    def list_below(self, minimum: float, *, unasked: Collection[str]) -> list[Detection]:
        """The kinds of error of which the judge notices significantly less than this share.

        All kinds together are called so wrongly with a probability of 5 % (Bonferroni's correction).
        """
        asked = [one for one in self.detections if one.kind not in unasked and one.is_known]
        num_errors = NormalDist().inv_cdf(1 - 0.05 / max(1, len(asked)))
        return [one for one in asked if one.is_below(minimum, num_errors=num_errors)]


def examine_judge(copies: Sequence[RatedCopy], *, unasked: Collection[str]) -> Health:
    """The health of a judge.

    A judge that is bad as a whole (it always says yes, guesses, goes by length, ...) has one finding; otherwise each
    kind of error that it does not notice has one.

    Args:
        copies: its ratings of spoiled copies and their originals.
        unasked: kinds of error that its rubric does not ask about; that it does not notice them is no fault of it.
    """
    by_kind: dict[str, list[RatedCopy]] = {}
    for copy in copies:
        by_kind.setdefault(copy.kind, []).append(copy)
    detections = tuple(Detection.measure(kind, by_kind[kind]) for kind in sorted(by_kind))
    asked = [copy for copy in copies if copy.kind not in unasked]
    health = Health(num_captions=len({copy.caption for copy in copies}), detections=detections, findings=())
    findings = [*_find_failures(copies)]
    if sum(copy.is_judged for copy in asked) < MIN_COPIES:
        findings.append(Finding(cause="too few", text=f"fewer than {MIN_COPIES} judged copies: too few to say more"))
    elif overall := _find_overall(asked, [one for one in detections if one.kind not in unasked]):
        findings.append(overall)
    else:
        findings += [_describe_blind(one) for one in health.list_below(MIN_DETECTION, unasked=unasked)]
    findings += [_describe_unasked(one) for one in detections if one.kind in unasked and one.is_below(MIN_DETECTION)]
    return replace(health, findings=tuple(findings))


def _find_failures(copies: Iterable[RatedCopy]) -> Iterator[Finding]:
    calls = [value is None for copy in copies for value in copy.sentences or (copy.copy,)]
    share = _mean(calls)
    if share - ONE_SIDED * math.sqrt(share * (1 - share) / max(1, len(calls))) > MAX_FAILED:
        yield Finding(cause="failures", text=f"fails on {share:.0%} of its calls")


def _find_overall(asked: Sequence[RatedCopy], detections: Sequence[Detection]) -> Finding | None:
    """What is wrong with the judge as a whole, if anything."""
    judged = [copy for copy in asked if copy.is_judged]
    if (finding := _find_constant(judged)) is not None:
        return finding
    if (finding := _find_irrelevance(judged)) is not None:
        return finding
    overall = Detection.measure("", judged)
    if overall.difference + CERTAIN * overall.standard_error(0.0) < 0:
        return Finding(cause="inverted", text="prefers spoiled captions to their originals: its answers are inverted")
    if ends := list(_find_unread(detections)):
        return ends[0]
    is_weak = any(one.is_below(MIN_DETECTION) for one in (overall, *detections))
    if not is_weak or any(one.is_above(MIN_DETECTION, num_errors=CERTAIN) for one in detections):
        return None
    less, more = (_mean([copy.sign == sign for copy in judged]) for sign in (1, -1))
    if less + more <= 1 - UNCHANGED:
        text = "gives spoiled captions the values of their originals: it looks at no kind of error"
        return Finding(cause="unseeing", text=text)
    if more >= less / 3:
        text = f"gives {less:.0%} of spoiled captions less than their originals and {more:.0%} more: it guesses"
        return Finding(cause="random", text=text)
    return None


def _find_constant(judged: Sequence[RatedCopy]) -> Finding | None:
    """Whether nearly all originals and nearly all copies have the same value, to a tenth."""
    originals = Counter({copy.caption: _round_value(copy.original) for copy in judged}.values())
    copies = Counter(_round_value(copy.copy) for copy in judged)
    (level, _), *_ = copies.most_common(1)
    shares = originals[level] / originals.total(), copies[level] / copies.total()
    if min(shares) < CONSTANT:
        return None
    seen = f"{shares[1]:.0%} of spoiled captions and {shares[0]:.0%} of their originals"
    if level in (0, 10):
        return (
            Finding(cause="always yes", text=f"accepts {seen}: it always says yes")
            if level
            else Finding(cause="always no", text=f"refuses {seen}: it always says no")
        )
    return Finding(cause="constant", text=f"gives {seen} about the value {level / 10}: it always says the same")


def _round_value(value: float | None) -> int:
    assert value is not None
    return round(10 * value)


def _find_irrelevance(judged: Sequence[RatedCopy]) -> Finding | None:
    """Whether place or length decides the verdicts, above all if a change that keeps the length is not noticed."""
    ratings = [(copy.copy, copy.candidate, copy.num_words[1]) for copy in judged]
    ratings += {c.caption: (c.original, c.candidate, c.num_words[0]) for c in judged}.values()
    values = [value for value, *_ in ratings if value is not None]
    lengths = sorted(words for *_, words in ratings)
    bounds = [lengths[len(lengths) * i // MAX_GROUPS] for i in range(1, MAX_GROUPS)]
    places = [(value, place) for c in judged for place, value in enumerate(c.sentences) if value is not None]
    shares: dict[Cause, float] = {
        "candidate": explain_variance(values, [candidate for _, candidate, _ in ratings]),
        "sentence": explain_variance([value for value, _ in places], [place for _, place in places]),
        "length": explain_variance(values, [bisect(bounds, words) for *_, words in ratings]),
    }
    cause = max(shares, key=lambda name: shares[name])
    same_length = Detection.measure("", [copy for copy in judged if copy.kind not in CHANGE_LENGTH])
    is_blind = same_length.is_below(MIN_DETECTION)
    if shares[cause] < (DECISIVE if is_blind else EVIDENT):
        return None
    text = f"decides by {IRRELEVANT[cause]}, which explains {shares[cause]:.0%} of the variance of its verdicts"
    return Finding(cause=cause, text=text)


def explain_variance(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """The share of the variance of values that lies between groups, without what chance gives (epsilon squared; Kelley,
    PNAS 21, 1935); 0 if nothing varies."""
    by_group: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    total = _sum_of_squares(values)
    num_free = len(values) - len(by_group)
    if not total or num_free < 1:
        return 0.0
    return max(0.0, 1 - math.fsum(map(_sum_of_squares, by_group.values())) / total * (len(values) - 1) / num_free)


def _find_unread(detections: Sequence[Detection]) -> Iterator[Finding]:
    """Whether a wrong sentence is noticed at one end of captions and not at the other."""
    by_kind = {one.kind: one for one in detections}
    ends: tuple[tuple[Cause, str, str], ...] = (
        ("beginning", "foreign_first", "foreign_last"),
        ("end", "foreign_last", "foreign_first"),
    )
    for cause, near, far in ends:
        if near not in by_kind or far not in by_kind:
            continue
        seen, unseen = by_kind[near], by_kind[far]
        if seen.is_above(NOTICED) and unseen.is_below(NOTICED):
            text = f"notices {seen.share:.0%} of wrong sentences there and {unseen.share:.0%} at the other end"
            yield Finding(cause=cause, text=f"reads only the {cause} of captions: it {text}")


def _describe_blind(one: Detection) -> Finding:
    copies, subject = WORDS.get(one.kind, (f"captions spoiled by {one.kind}", one.kind))
    how = "does not look at" if one.share < NOTICED else "misses most errors in"
    text = f"accepts {1 - one.share:.0%} of {copies}: it {how} {subject}"
    if one.difference + ONE_SIDED * one.standard_error(0.0) < 0:
        text = f"prefers {copies} to their originals"
    return Finding(cause="blind", kind=one.kind, text=text)


def _describe_unasked(one: Detection) -> Finding:
    copies, subject = WORDS.get(one.kind, (f"captions spoiled by {one.kind}", one.kind))
    text = f"accepts {1 - one.share:.0%} of {copies}; its rubric does not ask about {subject}"
    return Finding(cause="unasked", kind=one.kind, text=text)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _sum_of_squares(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _covariance(a: Sequence[float], b: Sequence[float]) -> float:
    mean_a, mean_b = _mean(a), _mean(b)
    return math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / max(1, len(a) - 1)
