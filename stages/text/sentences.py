"""Decides where a sentence ends: not in a decimal, an abbreviation, an initial, a list's number or a quotation.

It knows no grammar beyond that, and loses no character but white space between sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# these never end a sentence: a name or an example follows
_LEADING = "mr mrs ms dr prof rev hon st mt ft gen col capt lt sgt gov sen rep vs e.g i.e eg ie cf fig figs"
# these end one unless a number follows
_OTHERS = (
    "sr jr etc ca c approx no nos vol vols pp ed eds al inc ltd co corp dept est ave blvd rd sq a.m p.m am pm u.s u.k"
    " u.s.a jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun min max avg"
)
LEADING, ABBREVIATIONS = frozenset(_LEADING.split()), frozenset((_LEADING + " " + _OTHERS).split())
_END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?=\s)|[。！？]+[」』”’）]*")
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[*_]*$")
_OPENS, _CLOSES = "“«「『", "”»」』"


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in order, stripped; a line break always ends one.

    >>> split_sentences('The 3.5 m sign reads "Stop. Go back." It is by St. Mary\\'s, e.g. on p. 4.')
    ['The 3.5 m sign reads "Stop. Go back."', "It is by St. Mary's, e.g. on p. 4."]
    """
    return [sentence for line in text.splitlines() for sentence in _of_line(line.strip())]


def _of_line(line: str) -> Iterator[str]:
    start, inside = 0, _quoted(line)
    for end in _END.finditer(line):
        if not inside[end.end() - 1] and _ends(line[start : end.start()], end[0], line[end.end() :].lstrip()):
            yield line[start : end.end()].strip()
            start = end.end()
    if rest := line[start:].strip():
        yield rest


def _ends(before: str, mark: str, after: str) -> bool:
    """Whether a mark between two stretches of a line ends a sentence."""
    if not after or not before.strip():
        return False
    if mark[0] in "。！？":
        return True
    if after[0].islower() or after[0] in ",;:":
        return False
    if mark[0] != "." or mark.startswith(".."):
        return True
    return not _abbreviated(before, after)


def _abbreviated(before: str, after: str) -> bool:
    found = _LAST_WORD.search(before)
    word = found[0] if found else ""
    if before.strip() == word and re.fullmatch(r"\d{1,3}|[A-Za-z]|[ivxIVX]+", word):
        return True  # a list's number
    if len(word) == 1 and word.isalpha() and word != "I":
        return word.isupper() or after[0].isdigit()  # an initial; p. 4
    lower = word.lower()
    if lower in ABBREVIATIONS:
        return lower in LEADING or after[0].isdigit()
    return False


def _quoted(line: str) -> list[bool]:
    """For each character, whether it lies inside a quotation; quotation marks that do not pair are ignored."""
    flags, level, straight = [False] * len(line), 0, False
    pairs = _marks(line)
    for i, char in enumerate(line):
        if i in pairs:
            straight = not straight
        level += (char in _OPENS) - (char in _CLOSES)
        flags[i] = straight or level > 0
    return flags if not straight and level == 0 else [False] * len(line)


def _marks(line: str) -> frozenset[int]:
    """Where straight quotation marks stand, without the inches: a mark right after a digit that nothing opened."""
    found: list[int] = []
    for i, char in enumerate(line):
        is_inch = i > 0 and line[i - 1].isdigit() and len(found) % 2 == 0
        if char == '"' and not is_inch:
            found.append(i)
    return frozenset(found)
