"""Detection of looping text, as models produce it: it repeats itself longer than any writer would.

Four signs, each found in linear time: a long run of repeated words; a text that mostly repeats itself; repeated
sentences; one short string over and over. Numbered items ("chair 1, chair 2, ...") loop when only the number changes.
It does not judge the quality of a text.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache

GRAM = 4  # words in the same order that count as a repetition
MAX_RUN = 24  # repeated words in a row
MAX_NUMBERED_RUN = 36  # the same with all numbers alike: captions of panels and tables do count to ten
MAX_SHARE, MIN_WORDS = 2 / 3, 48  # share of repeated words, in a text of at least this many
MAX_SENTENCE_SHARE, MIN_SENTENCE_WORDS = 1 / 3, 8  # share and number of words in repeated sentences
MAX_STUTTER = 50  # repetitions of one string of up to 12 characters without white space

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:[.,'’-][^\W_]+)*")
_STUTTER = re.compile(rf"(\S{{1,12}}?)\1{{{MAX_STUTTER - 1},}}")
_ENDS = re.compile(r"[.!?…]+\s+|[。！？\n]+")
_NUMBER = re.compile(r"\d[\d.,]*")


@lru_cache(maxsize=4096)  # an answer is checked when it arrives, and again when its row is written
def find_loop(text: str) -> str:
    """A description of what is repeated, for people; "" when the text does not loop."""
    return next(filter(None, _find_signs(text)), "")


def find_lasting_loop(text: str) -> str:
    """As `find_loop`, but only by the signs that stay whatever follows, for a text that is still being written.

    The last words do not count: they may become others.
    """
    words = split_words(text)[:-2]
    repeated = list(_mark_repeated(words))
    return _find_stutter(text) or _find_run(words, repeated, MAX_RUN) or _find_numbered_run(words)


def _find_signs(text: str) -> Iterator[str]:
    words = split_words(text)
    repeated = list(_mark_repeated(words))
    yield _find_stutter(text)
    yield _find_run(words, repeated, MAX_RUN)
    if len(words) >= MIN_WORDS and sum(repeated) > MAX_SHARE * len(words):
        yield f"{sum(repeated)} of its {len(words)} words only repeat what was said before"
    yield _find_repeated_sentences(text, len(words))
    yield _find_numbered_run(words)


def _find_stutter(text: str) -> str:
    stutter = _STUTTER.search(text)
    return f"{stutter[1]!r} comes {len(stutter[0]) // len(stutter[1])} times in a row" if stutter else ""


def split_words(text: str) -> list[str]:
    """Words in lower case without punctuation; 3.5 and it's are one, each Chinese or Japanese character is one."""
    return _WORD.findall(text.lower())


def _mark_repeated(words: Sequence[str]) -> Iterator[bool]:
    """For each word, True if it ends a gram that has occurred before."""
    seen, last = set[tuple[str, ...]](), deque[str](maxlen=GRAM)
    for word in words:
        last.append(word)
        gram = tuple(last)
        yield gram in seen
        if len(gram) == GRAM:
            seen.add(gram)


def _find_run(words: Sequence[str], repeated: Sequence[bool], limit: int) -> str:
    length = 0
    for i, is_repeated in enumerate(repeated):
        length = length + 1 if is_repeated else 0
        if length == limit:
            return f"{' '.join(words[i - 7 : i + 1])!r} goes on saying what was said before"
    return ""


def _find_repeated_sentences(text: str, num_words: int) -> str:
    """Exact sentence ends do not matter here: a wrong end is wrong each time."""
    seen, num_repeated, example = set[str](), 0, ""
    for sentence in _ENDS.split(text.lower()):
        plain = sentence.strip(" \t.!?")
        if plain in seen:
            num_repeated, example = num_repeated + len(split_words(plain)), plain
        seen.add(plain)
    if num_repeated < MIN_SENTENCE_WORDS or num_repeated <= MAX_SENTENCE_SHARE * num_words:
        return ""
    return f"{example[:80]!r} is said again"


def _find_numbered_run(words: Sequence[str]) -> str:
    """Adjacent numbers are left as they are: a row of numbers may be long."""
    is_number = [word[0].isdigit() and _NUMBER.fullmatch(word) is not None for word in words]
    if not any(is_number):
        return ""
    has_neighbour = [a or b for a, b in zip([False, *is_number], [*is_number[1:], False], strict=False)]
    masked = [
        "#" if number and not neighbour else word
        for word, number, neighbour in zip(words, is_number, has_neighbour, strict=True)
    ]
    return _find_run(masked, list(_mark_repeated(masked)), MAX_NUMBERED_RUN)
