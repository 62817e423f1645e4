"""Decides when a text loops: it says again what it has said, for so long that no writer would.

Four signs, each in linear time: a run of words that were all said before; most of a text said before; sentences that
come again; one short string without end. Numbered items ("chair 1, chair 2, ...") loop when only the number changes.
It does not know whether a text is any good.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache

GRAM = 4  # words that must come again in the same order to count as said before
RUN = 24  # words said before in a row
NUMBERED_RUN = 36  # the same with all numbers taken for one: panels and tables do count to ten
SHARE, ENOUGH = 2 / 3, 48  # more than this share of a text of at least so many words
SENTENCE_SHARE, SENTENCE_WORDS = 1 / 3, 8  # more than this share, and so many words, in sentences that come again
CHARACTERS = 50  # times one string of up to 12 characters without white space

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:[.,'’-][^\W_]+)*")
_STUTTER = re.compile(rf"(\S{{1,12}}?)\1{{{CHARACTERS - 1},}}")
_ENDS = re.compile(r"[.!?…]+\s+|[。！？\n]+")
_NUMBER = re.compile(r"\d[\d.,]*")


@lru_cache(maxsize=4096)  # an answer is looked at when it comes, and again when its row is written
def find_loop(text: str) -> str:
    """What is repeated, in words for a person; "" when nothing is."""
    return next(filter(None, _signs(text)), "")


def _signs(text: str) -> Iterator[str]:
    words = split_words(text)
    before = list(_said_before(words))
    yield _stutter(text)
    yield _run(words, before, RUN)
    yield _mostly_said_before(before)
    yield _sentences_again(text, len(words))
    yield _numbered(words)


def split_words(text: str) -> list[str]:
    """Words in lower case without punctuation; 3.5 and it's are one, each Chinese or Japanese character is one."""
    return _WORD.findall(text.lower())


def _stutter(text: str) -> str:
    found = _STUTTER.search(text)
    return f"{found[1]!r} comes {len(found[0]) // len(found[1])} times in a row" if found else ""


def _said_before(words: Sequence[str]) -> Iterator[bool]:
    """For each word, whether it ends a gram that has come before."""
    seen, last = set[tuple[str, ...]](), deque[str](maxlen=GRAM)
    for word in words:
        last.append(word)
        gram = tuple(last)
        yield gram in seen
        if len(gram) == GRAM:
            seen.add(gram)


def _run(words: Sequence[str], before: Sequence[bool], limit: int) -> str:
    length = 0
    for i, again in enumerate(before):
        length = length + 1 if again else 0
        if length == limit:
            return f"{' '.join(words[i - 7 : i + 1])!r} goes on saying what was said before"
    return ""


def _mostly_said_before(before: Sequence[bool]) -> str:
    again = sum(before)
    if len(before) < ENOUGH or again <= SHARE * len(before):
        return ""
    return f"{again} of its {len(before)} words only repeat what was said before"


def _sentences_again(text: str, num_words: int) -> str:
    """Where exactly a sentence ends matters little here: a wrong end is wrong each time."""
    seen, num_again, example = set[str](), 0, ""
    for sentence in _ENDS.split(text.lower()):
        plain = sentence.strip(" \t.!?")
        if plain in seen:
            num_again, example = num_again + len(split_words(plain)), plain
        seen.add(plain)
    if num_again < SENTENCE_WORDS or num_again <= SENTENCE_SHARE * num_words:
        return ""
    return f"{example[:80]!r} is said again"


def _numbered(words: Sequence[str]) -> str:
    """Numbers beside each other are a row of numbers, which may be long: they are left as they are."""
    is_number = [word[0].isdigit() and _NUMBER.fullmatch(word) is not None for word in words]
    if not any(is_number):
        return ""
    beside = [a or b for a, b in zip([False, *is_number], [*is_number[1:], False], strict=False)]
    masked = ["#" if own and not other else word for word, own, other in zip(words, is_number, beside, strict=True)]
    return _run(masked, list(_said_before(masked)), NUMBERED_RUN)
