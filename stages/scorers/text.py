"""Decides what a caption's text must be like, whatever the image: checks without a model, each a criterion.

Length, loops, what flags/ notices, printable characters, a proper end, and not a copy of the alt text. It knows no
image and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import Criterion
from pipeline.sections import key
from stages import flags
from stages.scorers import Sample, ScoreResult, weighted_mean
from stages.text.repetition import find_loop, split_words

VERSION = 1
WEIGHTS: Mapping[str, float] = {  # of the checks, and of the flags that ship; of other flags 1
    "words": 2.0,
    "loop": 3.0,
    "printable": 2.0,
    "ending": 1.0,
    "copy": 2.0,
    "refusal": 3.0,
    "prompt_leak": 2.0,
    "special_token": 2.0,
    "meta_commentary": 1.0,
    "self_praise": 1.0,
    "markdown": 1.0,
}
COPIED = 3  # words in a row that the alt text has too
CheckResult = tuple[bool | None, str]  # whether the check is passed, None where it does not apply, and why


@dataclass(frozen=True, kw_only=True)
class Config:
    min_words: int = key(5, "fewer words fail", least=0)
    max_words: int = key(600, "more words fail", least=1)
    min_printable: float = key(0.99, "share of characters that print; less fails", least=0, most=1)
    max_copied: float = key(0.8, "share of three words in a row that the alt text has too; more fails", least=0, most=1)
    flags: str = key("english", "what else fails: a file of flags/", stamp=False)
    weights: Mapping[str, float] = key(factory=dict, help="of checks, by name; the others keep theirs")

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words = {self.min_words} is more than max_words = {self.max_words}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The bounds, and the words of the flags."""

    bounds: Config
    patterns: flags.Patterns
    weights: Mapping[str, float]


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: there are no such flags, or a weight is no check's.
    """
    try:
        patterns = flags.load(config.flags, run=run)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.flags", str(error)) from error
    weights = {name: WEIGHTS.get(name, 1.0) for name in (*CHECKS, *patterns)}
    for name, weight in config.weights.items():
        if name not in weights or weight < 0:
            raise ConfigError(f"{field}.weights.{name}", f"no such check, or below 0; there are {', '.join(weights)}")
    return Settings(bounds=config, patterns=patterns, weights=weights | dict(config.weights))


def score(samples: Iterable[Sample], config: Settings, _: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    for sample in samples:
        criteria = tuple(_criteria(sample, config))
        value = weighted_mean(criteria)
        if value is None:
            yield ScoreResult(
                value=None, criteria=criteria, status="unknown", error="no check that applies weighs anything"
            )
        else:
            yield ScoreResult(value=value, criteria=criteria)


def _criteria(sample: Sample, config: Settings) -> Iterator[Criterion]:
    for name, check in CHECKS.items():
        yield _criterion(name, check(sample, config.bounds), config)
    noticed = flags.find_flags(sample.text, config.patterns)
    for name in config.patterns:
        yield _criterion(name, (name not in noticed, "noticed" if name in noticed else "not noticed"), config)


def _criterion(name: str, found: CheckResult, config: Settings) -> Criterion:
    passed, reason = found
    return Criterion(
        id=name,
        verdict=None if passed is None else "yes" if passed else "no",
        value=None if passed is None else float(passed),
        weight=config.weights[name],
        reason=reason,
    )


def _words(sample: Sample, bounds: Config) -> CheckResult:
    num = len(sample.text.split())
    return bounds.min_words <= num <= bounds.max_words, f"{num} words"


def _loop(sample: Sample, _: Config) -> CheckResult:
    loop = find_loop(sample.text)
    return not loop, loop or "nothing loops"


def _printable(sample: Sample, bounds: Config) -> CheckResult:
    num = sum(char in "\n\t" or (char.isprintable() and char != "\ufffd") for char in sample.text)
    share = num / max(1, len(sample.text))
    return share >= bounds.min_printable, f"{share:.1%} of its characters print"


def _ending(sample: Sample, _: Config) -> CheckResult:
    last = sample.text.rstrip().rstrip("\"'”’»)]*_」』）")[-1:]
    return last in tuple(".!?…。！？"), f"ends with {last!r}"


def _copy(sample: Sample, bounds: Config) -> CheckResult:
    if not (sample.alt_text and sample.alt_text.strip()):
        return None, "no alt text"
    own, other = _runs(sample.text), _runs(sample.alt_text)
    share = sum(run in other for run in own) / max(1, len(own))
    return share <= bounds.max_copied, f"{share:.0%} stands in the alt text"


def _runs(text: str) -> list[tuple[str, ...]]:
    """Of three words each; the whole text when it is shorter."""
    words = split_words(text)
    return [tuple(words[i : i + COPIED]) for i in range(max(1, len(words) - COPIED + 1))]


CHECKS = {"words": _words, "loop": _loop, "printable": _printable, "ending": _ending, "copy": _copy}
