"""The words of words.toml, and where a text has them: what surrounds a word says whether it may be exchanged.

Plain rules on ordinary English, which pass over a word rather than change it wrongly. Knows no kinds of spoiled copies.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

from pipeline.storage.sentences import split_sentences

_QUOTED = re.compile(r"\"[^\"\n]+\"|“[^”\n]+”")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_VOWEL_SOUND = re.compile(r"[aeiou]|8|1[18]\b", re.IGNORECASE)
_STOPPED = re.compile(r"[.!?…]+[\"'”’»)\]*_]*\s*$")
_OPENED = re.compile(r"(?:^|[.!?:…][\"'”’»)]*\s|\n)\s*$")
_LISTED = re.compile(r"(?:^|[.;:]\s)\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)  # lists of things, which have no sentences


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Pairs of directions, and the words around them by which they are known."""

    opposites: Mapping[str, str]
    before: frozenset[str]  # empty: any
    never_after: frozenset[str]
    after: frozenset[str]
    unless: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Words:
    """The lists of words.toml; see there."""

    colours: Mapping[str, tuple[str, ...]]  # colour -> those that it cannot be mistaken for
    shades: frozenset[str]
    shaded: frozenset[str]
    no_things: frozenset[str]
    numbers: tuple[str, ...]
    before_number: frozenset[str]
    after_number: frozenset[str]
    objects: Mapping[str, tuple[str, ...]]  # word -> others of its group
    plurals: Mapping[str, str]  # of all objects
    also_called: Mapping[str, frozenset[str]]
    before_object: frozenset[str]
    after_object: frozenset[str]
    axes: tuple[Axis, ...]
    inventions: tuple[str, ...]
    added_sentences: tuple[str, ...]  # each with a {} for an invention
    signs: tuple[str, ...]  # of one word
    sign_texts: tuple[str, ...]  # of several
    cues: frozenset[str]
    generic: frozenset[str]
    pronouns: frozenset[str]
    connecting: frozenset[str]
    unsure: frozenset[str]
    exclusive: frozenset[str]
    counted: frozenset[str]


class Place(NamedTuple):
    """A word or phrase in a text, with the words around it; "" where a mark or an end is nearer."""

    start: int
    end: int
    word: str  # lower case, as the two that follow
    before: str
    after: str


@cache
def load_words() -> Words:
    values = tomllib.loads(read_words())
    groups, objects = values["objects"].values(), values["object_words"]
    names = [name for group in groups for name in group]
    chosen = {name for name in names if name not in objects["never_chosen"]}
    colours, numbers, sentences = values["colour_words"], values["numbers"], values["sentences"]
    return Words(
        colours={colour: tuple(far) for colour, far in values["colours"].items()},
        shades=frozenset(colours["shades"]),
        shaded=frozenset(colours["shaded"]),
        no_things=frozenset(colours["no_things"]),
        numbers=tuple(numbers["words"]),
        before_number=frozenset(numbers["before"]),
        after_number=frozenset(numbers["after"]),
        objects={
            name: tuple(one for one in group if one != name and one in chosen) for group in groups for name in group
        },
        plurals={name: values["plurals"].get(name, f"{name}s") for name in names},
        also_called={name: frozenset(others) for name, *others in objects["also_called"]},
        before_object=frozenset(objects["before"]) | values["colours"].keys(),
        after_object=frozenset(objects["after"]),
        axes=tuple(_make_axis(**axis) for axis in values["axes"]),
        inventions=tuple(values["added"]["things"]),
        added_sentences=tuple(values["added"]["sentences"]),
        signs=tuple(values["quotes"]["words"]),
        sign_texts=tuple(values["quotes"]["texts"]),
        cues=frozenset(values["quotes"]["cues"]),
        **{name: frozenset(words) for name, words in sentences.items()},
    )


def read_words() -> str:
    return (resources.files("stages.audit") / "words.toml").read_text(encoding="utf-8")


def _make_axis(*, pairs: Sequence[Sequence[str]], **lists: Any) -> Axis:
    opposites = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    return Axis(opposites=opposites, **{name: frozenset(words) for name, words in lists.items()})


def list_words(text: str) -> list[str]:
    """The words of a text in lower case, with their hyphens and apostrophes."""
    return _WORD.findall(text.lower().replace("’", "'"))


def has_word(text: str, word: str) -> bool:
    return bool(_compile_words((word,), r"\w").search(text))


def find_words(text: str, words: Collection[str], *, compounds: bool = False) -> list[Place]:
    """The places of words or phrases; those in compounds with hyphens only if asked for."""
    pattern = _compile_words(tuple(words), r"\w" if compounds else r"\w-")
    return [place for place in find_pattern(text, pattern) if place.word in words]


@lru_cache(maxsize=2048)  # all words of words.toml; the cache of re is too small for them
def _compile_words(words: tuple[str, ...], around: str) -> re.Pattern[str]:
    """Finds any of the words where none of the characters `around` is next to it."""
    longest_first = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.compile(rf"(?<![{around}])(?:{longest_first})(?![{around}])", re.IGNORECASE)


def find_pattern(text: str, pattern: re.Pattern[str]) -> list[Place]:
    return [_make_place(text, match.start(), match.end()) for match in pattern.finditer(text)]


def _make_place(text: str, start: int, end: int) -> Place:
    before = re.search(r"([\w.'’-]+) $", text[:start])
    after = re.match(r"(?: |(?=['’%]))([\w'’%-]+)", text[end:])
    around = [match[1].lower() if match else "" for match in (before, after)]
    return Place(start, end, text[start:end].lower(), *around)


def find_colours(text: str) -> list[tuple[Place, str]]:
    """Where a colour describes a thing, with the word after it; "" in "it is red"."""
    words, found = load_words(), []
    for place in find_words(text, words.colours):
        shade = len(place.before) + 1 if place.before in words.shades else 0
        verb = _make_place(text, place.start - shade, place.end).before
        is_photograph = re.search(r"\b(?:black|white) and $", text[: place.start].lower())  # black and white
        if is_name(text, place) or is_photograph:
            continue
        if verb in ("is", "are", "was", "were") and place.after in ("", "with", "inside", "in", "on", "at"):
            found.append((place, ""))
        elif place.after.isalpha() and place.after not in words.no_things and text[place.end + 1].islower():
            found.append((place, place.after))
    return found


def list_far_colours(place: Place) -> list[str]:
    """The colours that a thing cannot have beside its own, such that its shade, if any, fits them."""
    words = load_words()
    return [one for one in words.colours[place.word] if place.before not in words.shades or one in words.shaded]


def is_bare(text: str, place: Place) -> bool:
    """True if a word names a thing by itself, in no compound, name or quotation."""
    words = load_words()
    follows = not place.before or place.before in words.before_object
    leads = place.after.replace("’", "'").removesuffix("'s") in ("", *words.after_object)
    alone = text[place.start - 1 : place.start] != "-" and text[place.end : place.end + 1] != "-"
    return follows and leads and alone and not is_name(text, place) and not is_quoted(text, place)


def is_direction(place: Place, axis: Axis) -> bool:
    follows = not axis.before or place.before in axis.before or place.after == "of"
    return follows and place.before not in axis.never_after and place.after in axis.after


def is_symmetric(text: str, place: Place, axis: Axis) -> bool:
    """True in a sentence such as "on the left and on the right", which a mirror does not change."""
    sentence = " ".join(list_words("".join(cut_sentence(text, place))))
    between = r"(?: (?:edge|corner|side|and|or|on|at|to|in|of|the|one|two|three))+ "
    pairs = (f"{one}{between}{two}" for one, two in axis.opposites.items())
    return any(re.search(rf"\b{pair}\b|\b(?:both|either) sides?\b", sentence) for pair in pairs)


def may_change(text: str, place: Place) -> bool:
    """True if a place is in no quotation and its sentence denies and guesses nothing."""
    return not is_quoted(text, place) and not is_unsure("".join(cut_sentence(text, place)))


def is_quoted(text: str, place: Place) -> bool:
    return any(quote.start() < place.start < quote.end() for quote in find_quotes(text))


def find_quotes(text: str) -> list[re.Match[str]]:
    """Quotations with their marks."""
    return list(_QUOTED.finditer(text))


def is_name(text: str, place: Place) -> bool:
    """True for a word with a capital within a sentence, as in "the Red Cross"."""
    return text[place.start].isupper() and not _OPENED.search(text[: place.start])


def is_unsure(sentence: str) -> bool:
    """True if a sentence denies, guesses or compares, so that it may stay true when a word is swapped."""
    words = list_words(sentence)
    return any(word.endswith("n't") for word in words) or not load_words().unsure.isdisjoint(words)


def refers_back(sentence: str) -> bool:
    """True if a sentence needs the one before it."""
    words, known = list_words(sentence), load_words()
    return not known.pronouns.isdisjoint(words) or not known.connecting.isdisjoint(words[:6])


def is_about_others(sentence: str, text: str) -> bool:
    """True if a sentence speaks mostly of things that a text does not have."""
    words = load_words()
    named = {word for word in list_words(sentence) if len(word) > 3 or word == "red"}
    named -= words.generic | words.pronouns | words.connecting
    own = re.findall(r"\w+", text.lower())
    new = {word for word in named if not any(one.startswith(word.rstrip("s")) for one in own)}
    return len(new) >= 2 and len(new) * 2 > len(named) and not new <= words.colours.keys()


def takes_sentences(text: str) -> bool:
    """True if a sentence may be added, dropped or repeated: not in a list, nor where there is "nothing else"."""
    is_prose = is_finished(text) and not _LISTED.search(text)
    return is_prose and load_words().exclusive.isdisjoint(list_words(text))


def is_finished(sentence: str) -> bool:
    """True if a sentence has an end and is no part of another, cut at an abbreviation."""
    return bool(_STOPPED.search(sentence)) and sentence.count("(") == sentence.count(")")


@lru_cache(maxsize=64)
def find_sentences(text: str) -> Sequence[tuple[int, int]]:
    """Where each sentence begins and ends."""
    spans: list[tuple[int, int]] = []
    for sentence in split_sentences(text):
        start = text.index(sentence, spans[-1][1] if spans else 0)
        spans.append((start, start + len(sentence)))
    return spans


def cut_sentence(text: str, place: Place) -> tuple[str, str]:
    """The sentence around a place, cut at the end of the place."""
    for start, end in find_sentences(text):
        if start <= place.start < end:
            return text[start : place.end], text[place.end : max(end, place.end)]
    return text[: place.end], text[place.end :]


def replace_places(text: str, new: Mapping[Place, str]) -> str:
    """The text with new words, written as the old ones were and with articles that fit them."""
    for place in sorted(new, reverse=True):
        before, old, word = text[: place.start], text[place.start : place.end], new[place]
        if article := re.search(r"\b([Aa])n? $", before):
            before = f"{before[: article.end(1)]}{'n' if _VOWEL_SOUND.match(word) else ''} "
        if old.isupper() and len(old) > 1:
            word = word.upper()
        elif old[0].isupper():
            word = word[0].upper() + word[1:]
        text = f"{before}{word}{text[place.end :]}"
    return text
