"""Scorer `text`: checks of the caption's text without a model, each of them a criterion.

Length, loops, the flags of flags/, printable characters, a proper ending, overlap with the alt text, and sentences that
occur twice, if the section says so. Uses no image and no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import plugins
from pipeline.engines import Engine
from pipeline.errors import ConfigError, UnknownNameError
from pipeline.records import Criterion
from pipeline.sections import key
from pipeline.storage.sentences import split_sentences
from pipeline.storage.words import count_words
from stages.scorers import Sample, ScoreResult, combine_criteria
from stages.text import flags
from stages.text.repetition import find_loop, split_words

VERSION = 1
WEIGHTS: Mapping[str, float] = {  # of the checks and the flags that ship; other flags weigh 1
    "words": 2.0,
    "loop": 3.0,
    "printable": 2.0,
    "ending": 1.0,
    "copy": 2.0,
    "repeated_sentence": 2.0,
    "refusal": 3.0,
    "prompt_leak": 2.0,
    "special_token": 2.0,
    "meta_commentary": 1.0,
    "self_praise": 1.0,
    "markdown": 1.0,
}
COPY_LENGTH = 3  # words in a row that count as copied
CheckResult = tuple[bool | None, str]  # passed (None: does not apply), reason


@dataclass(frozen=True, kw_only=True)
class Config:
    min_words: int = key(5, "fewer words fail", least=0)
    max_words: int = key(600, "more words fail", least=1)
    min_printable: float = key(0.99, "share of printable characters; less fails", least=0, most=1)
    max_copied: float = key(0.8, "share of word triples copied from the alt text; more fails", least=0, most=1)
    repeated_sentence: bool = key(False, "whether a sentence that occurs twice fails", stamp_default=False)
    flags: str = key("english", "flags that fail too: a file of flags/", stamp=False)
    weights: Mapping[str, float] = key(factory=dict, help="weights of checks, by name; overrides the defaults")

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words = {self.min_words} is more than max_words = {self.max_words}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    bounds: Config
    patterns: flags.Patterns
    weights: Mapping[str, float]


def prepare(config: Config, *, run: Path | None, field: str) -> Settings:
    """
    Raises:
        ConfigError: the flags do not exist, a weight belongs to no check, or is negative.
    """
    try:
        patterns = flags.load(config.flags, run=run)
    except UnknownNameError as error:
        raise ConfigError(f"{field}.flags", str(error)) from error
    weights = {name: WEIGHTS.get(name, 1.0) for name in (*_list_checks(config), *patterns)}
    for name, weight in config.weights.items():
        if name not in weights:
            raise ConfigError(f"{field}.weights.{name}", plugins.explain_unknown(name, list(weights)))
        if weight < 0:
            raise ConfigError(f"{field}.weights.{name}", f"{weight} is too small; the minimum is 0")
    return Settings(bounds=config, patterns=patterns, weights=weights | dict(config.weights))


def score(samples: Iterable[Sample], settings: Settings, _: Mapping[str, Engine]) -> Iterator[ScoreResult]:
    for sample in samples:
        yield combine_criteria(_check_sample(sample, settings), undecided="all checks that apply have weight 0")


def _check_sample(sample: Sample, settings: Settings) -> Iterator[Criterion]:
    for name in _list_checks(settings.bounds):
        yield _build_criterion(name, CHECKS[name](sample, settings.bounds), settings)
    flagged = flags.find_flags(sample.text, settings.patterns)
    for name in settings.patterns:
        result = (False, "noticed") if name in flagged else (True, "not noticed")
        yield _build_criterion(name, result, settings)


def _list_checks(config: Config) -> list[str]:
    return [name for name in CHECKS if name != "repeated_sentence" or config.repeated_sentence]


def _build_criterion(name: str, result: CheckResult, settings: Settings) -> Criterion:
    passed, reason = result
    return Criterion(
        id=name,
        verdict=None if passed is None else "yes" if passed else "no",
        value=None if passed is None else float(passed),
        weight=settings.weights[name],
        reason=reason,
    )


def _check_length(sample: Sample, bounds: Config) -> CheckResult:
    num_words = count_words(sample.text)
    return bounds.min_words <= num_words <= bounds.max_words, f"{num_words} words"


def _check_loops(sample: Sample, _: Config) -> CheckResult:
    loop = find_loop(sample.text)
    return not loop, loop or "nothing loops"


def _check_sentences(sample: Sample, _: Config) -> CheckResult:
    sentences = [words for text in split_sentences(sample.text) if (words := tuple(split_words(text)))]
    counts = Counter(sentences)
    repeated = next((words for words in sentences if counts[words] > 1), None)
    return repeated is None, f"says twice: {' '.join(repeated)}" if repeated else "no sentence occurs twice"


def _check_printable(sample: Sample, bounds: Config) -> CheckResult:
    num_printable = sum(char in "\n\t" or (char.isprintable() and char != "\ufffd") for char in sample.text)
    share = num_printable / max(1, len(sample.text))
    return share >= bounds.min_printable, f"{share:.1%} of its characters print"


def _check_ending(sample: Sample, _: Config) -> CheckResult:
    last = sample.text.rstrip().rstrip("\"'”’»)]*_」』）")[-1:]
    return last in tuple(".!?…。！？"), f"ends with {last!r}"


def _check_copy(sample: Sample, bounds: Config) -> CheckResult:
    if not (sample.alt_text and sample.alt_text.strip()):
        return None, "no alt text"
    own, other = _list_runs(sample.text), _list_runs(sample.alt_text)
    share = sum(run in other for run in own) / max(1, len(own))
    return share <= bounds.max_copied, f"{share:.0%} stands in the alt text"


def _list_runs(text: str) -> list[tuple[str, ...]]:
    """All runs of `COPY_LENGTH` words; the whole text if it is shorter."""
    words = split_words(text)
    return [tuple(words[i : i + COPY_LENGTH]) for i in range(max(1, len(words) - COPY_LENGTH + 1))]


CHECKS = {
    "words": _check_length,
    "loop": _check_loops,
    "printable": _check_printable,
    "ending": _check_ending,
    "copy": _check_copy,
    "repeated_sentence": _check_sentences,
}
