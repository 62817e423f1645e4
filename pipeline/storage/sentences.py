"""Sentence splitting that respects decimals, abbreviations, initials, list numbers and quotations.

Knows no further grammar, and drops only the white space between sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# never end a sentence: a name or an example follows
_LEADING = "mr mrs ms dr prof rev hon st mt ft gen col capt lt sgt gov sen rep vs e.g i.e eg ie cf fig figs"
# end a sentence unless a number follows
_OTHERS = (
    "sr jr etc ca c approx no nos vol vols pp ed eds al inc ltd co corp dept est ave blvd rd sq a.m p.m am pm u.s u.k"
    " u.s.a jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun min max avg"
)
LEADING, ABBREVIATIONS = frozenset(_LEADING.split()), frozenset((_LEADING + " " + _OTHERS).split())
_SURE = "。！？।॥؟۔။።։"  # Chinese, Japanese, Hindi, Arabic, Urdu, Burmese, Amharic, Armenian
_END = re.compile(rf"[.!?…]+[\"'”’»)\]*_]*(?=\s)|[{_SURE}]+[」』”’）»\"]*")
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[*_]*$")
_OPENS, _CLOSES = "“«「『", "”»」』"


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in order, stripped; a line break always ends one.

    >>> split_sentences('The 3.5 m sign reads "Stop. Go back." It is by St. Mary\\'s, e.g. on p. 4.')
    ['The 3.5 m sign reads "Stop. Go back."', "It is by St. Mary's, e.g. on p. 4."]
    """
    return [sentence for line in text.splitlines() for sentence in _split_line(line.strip())]


def _split_line(line: str) -> Iterator[str]:
    start, quoted = 0, _mark_quoted(line)
    for end in _END.finditer(line):
        if not quoted[end.end() - 1] and _is_end(line[start : end.start()], end[0], line[end.end() :].lstrip()):
            yield line[start : end.end()].strip()
            start = end.end()
    if rest := line[start:].strip():
        yield rest


def _is_end(before: str, mark: str, after: str) -> bool:
    """True if a punctuation mark between two stretches of a line ends a sentence."""
    if not after or not before.strip():
        return False
    if mark[0] in _SURE:
        return True
    if after[0].islower() or after[0] in ",;:":
        return False
    if mark[0] != "." or mark.startswith(".."):
        return True
    return not _is_abbreviation(before, after)


def _is_abbreviation(before: str, after: str) -> bool:
    last_word = _LAST_WORD.search(before)
    word = last_word[0] if last_word else ""
    if before.strip() == word and re.fullmatch(r"\d{1,3}|[A-Za-z]|[ivxIVX]+", word):
        return True  # a list number
    if len(word) == 1 and word.isalpha() and word != "I":
        return word.isupper() or after[0].isdigit()  # an initial; p. 4
    lower = word.lower()
    if lower in ABBREVIATIONS:
        return lower in LEADING or after[0].isdigit()
    return False


def _mark_quoted(line: str) -> list[bool]:
    """For each character, True if it is inside a quotation; unpaired quotation marks are ignored."""
    flags, level, straight = [False] * len(line), 0, False
    straight_marks = _find_straight_marks(line)
    for i, char in enumerate(line):
        if i in straight_marks:
            straight = not straight
        level += (char in _OPENS) - (char in _CLOSES)
        flags[i] = straight or level > 0
    return flags if not straight and level == 0 else [False] * len(line)


def _find_straight_marks(line: str) -> frozenset[int]:
    """Positions of straight quotation marks, except inch signs: marks after a digit outside a quotation."""
    positions: list[int] = []
    for i, char in enumerate(line):
        is_inch = i > 0 and line[i - 1].isdigit() and len(positions) % 2 == 0
        if char == '"' and not is_inch:
            positions.append(i)
    return frozenset(positions)
