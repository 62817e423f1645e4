"""Spoiled copies of captions: each reads right and is false of its image, or is poorer, in one known way.

Pure operations on English text, with the words of words.toml; a kind passes where it finds nothing to change. Sentences
with a negation are left alone, since a swap may leave them true, and so is quoted text. It knows neither images nor
judges.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from random import Random

from stages.text.sentences import split_sentences

VERSION = 1  # raised when equal captions get different copies
_NEGATION = re.compile(r"\b(no|not|none|nobody|nothing|neither|nor|never|without|cannot)\b|n't\b", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"]+\"|“[^”]+”")
_DIGITS = re.compile(r"(?<![\w.,:/$€£#-])[2-9](?![\w,:/%-]|\.\d)")
_NOT_A_COLOUR = r"(?!-|['’]| and (?:white|black)\b| (?:juice|wine|house|hole|board|tie)\b)"
_BEFORE_A_COLOUR = r"(?<!black and )(?<!white and )"  # black and white is a kind of photograph
_NO_NOUNS = "on|in|at|of|with|by|near|under|over|beside|behind|between|from|to|is|are|was|were|has|have|that"
_NOT_A_NUMBER = r"(?!-| (?:of|or|to|thirds|o'clock|hundred|thousand|million)\b)"
_VOWELS = "aeiou"


@dataclass(frozen=True, kw_only=True)
class SpoiledText:
    """A copy of a caption that is false, or poorer, in one known way."""

    kind: str
    text: str
    change: str  # for people: the words that were replaced, added or dropped


@dataclass(frozen=True, kw_only=True)
class Words:
    """The lists of words.toml."""

    colours: tuple[str, ...]
    numbers: tuple[str, ...]
    sides: Mapping[str, str]  # phrase -> its opposite
    objects: Mapping[str, tuple[str, ...]]  # word, singular or plural -> others of its group in that number
    inventions: tuple[str, ...]
    signs: tuple[str, ...]


def spoil_text(text: str, *, seed: str, other: str | None = None) -> Iterator[SpoiledText]:
    """All spoiled copies of a caption, by kind in alphabetical order.

    Args:
        text: the caption.
        seed: of the random choices; equal arguments give equal copies.
        other: the caption of another image; None leaves out the kinds that need it.
    """
    for kind, spoil in sorted(KINDS.items()):
        found = spoil(text, Random(f"{seed}/{kind}"), other)
        if found is not None and found[0] != text:
            yield SpoiledText(kind=kind, text=found[0], change=found[1])


Spoiler = Callable[[str, Random, str | None], tuple[str, str] | None]  # the spoiled text and what was changed


def hash_words() -> str:
    """16 hex digits of what decides the copies: the lists of words, and the version of this module."""
    return hashlib.sha256(f"{VERSION}\n{_read_words()}".encode()).hexdigest()[:16]


@cache
def load_words() -> Words:
    values = tomllib.loads(_read_words())
    plurals = values["plurals"]
    objects: dict[str, tuple[str, ...]] = {}
    for group in values["objects"].values():
        for words in (group, [plurals.get(word, f"{word}s") for word in group]):
            objects |= {word: tuple(one for one in words if one != word) for word in words}
    sides = {before: after for pair in values["sides"] for before, after in (pair, pair[::-1])}
    return Words(
        colours=tuple(values["colours"]),
        numbers=tuple(values["numbers"]),
        sides=sides,
        objects=objects,
        inventions=tuple(values["inventions"]),
        signs=tuple(values["signs"]),
    )


def _read_words() -> str:
    return (resources.files("stages.audit") / "words.toml").read_text(encoding="utf-8")


def _swap_colour(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    colours = load_words().colours
    nouns_only = rf"(?! (?:{_NO_NOUNS})\b)(?= \w)"  # an orange on a plate is a fruit
    return _swap_word(text, rng, dict.fromkeys(colours, colours), unless=_NOT_A_COLOUR + nouns_only)


def _swap_number(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    numbers = load_words().numbers
    swapped = _swap_word(text, rng, dict.fromkeys(numbers, numbers), unless=_NOT_A_NUMBER)
    if swapped is not None:
        return swapped
    places = [match for match in _DIGITS.finditer(text) if _may_change(text, match)]
    if not places:
        return None
    place = rng.choice(places)
    digit = rng.choice([one for one in "23456789" if one != place[0]])
    return _put(text, place.start(), place.end(), digit)


def _swap_object(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    return _swap_word(text, rng, load_words().objects)


def _swap_side(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    return _swap_word(text, rng, {before: (after,) for before, after in load_words().sides.items()})


def _move_attribute(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Exchanges the colours of two things."""
    colours = "|".join(load_words().colours)
    pattern = re.compile(rf"(?<![\w-]){_BEFORE_A_COLOUR}({colours})\b{_NOT_A_COLOUR}(?= \w)", re.IGNORECASE)
    places = [match for match in pattern.finditer(text) if _may_change(text, match)]
    pairs = [
        (one, two)
        for number, one in enumerate(places)
        for two in places[number + 1 :]
        if one[0].lower() != two[0].lower() and text[one.end() : one.end() + 12] != text[two.end() : two.end() + 12]
    ]
    if not pairs:
        return None
    one, two = rng.choice(pairs)
    later, _change = _put(text, two.start(), two.end(), one[0].lower())
    spoiled, _change = _put(later, one.start(), one.end(), _like(two[0].lower(), one[0]))
    return spoiled, f"{one[0].lower()} and {two[0].lower()} exchanged"


def _invent_object(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    things = [thing for thing in load_words().inventions if thing.split()[-1] not in text.lower()]
    if not things:
        return None
    thing = rng.choice(things)
    return f"{text.rstrip()} There is also {thing}.", f"added: {thing}"


def _misquote(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    quotes = list(_QUOTED.finditer(text))
    if not quotes:
        return None
    quote = rng.choice(quotes)
    words = list(re.finditer(r"[A-Za-z]{2,}", quote[0]))
    if not words:
        return None
    word = rng.choice(words)
    signs = [sign for sign in load_words().signs if sign.lower() not in quote[0].lower()]
    start = quote.start() + word.start()
    new = rng.choice(signs)
    new = new if word[0].isupper() else new.title() if word[0][0].isupper() else new.lower()
    return _put(text, start, start + len(word[0]), new, articles=False)


def _insert_sentence(text: str, rng: Random, other: str | None, *, place: str) -> tuple[str, str] | None:
    own = split_sentences(text)
    foreign = [sentence for sentence in split_sentences(other or "") if sentence not in own]
    if not foreign or (place == "middle" and len(own) < 2):
        return None
    sentence = rng.choice(foreign)
    at = {"first": 0, "middle": (len(own) + 1) // 2, "last": len(own)}[place]
    return " ".join([*own[:at], sentence, *own[at:]]), f"added {place}: {sentence}"


def _repeat_sentence(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    sentences = split_sentences(text)
    if not sentences:
        return None
    at = rng.randrange(len(sentences))
    return " ".join([*sentences[: at + 1], sentences[at], *sentences[at + 1 :]]), f"said twice: {sentences[at]}"


def _drop_sentence(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    sentences = split_sentences(text)
    if len(sentences) < 2:
        return None
    at = rng.randrange(len(sentences))
    return " ".join([*sentences[:at], *sentences[at + 1 :]]), f"dropped: {sentences[at]}"


def _replace_caption(text: str, _: Random, other: str | None) -> tuple[str, str] | None:
    return (other, "the caption of another image") if other and other != text else None


KINDS: Mapping[str, Spoiler] = {
    "attribute": _move_attribute,
    "colour": _swap_colour,
    "dropped": _drop_sentence,
    "foreign_first": lambda text, rng, other: _insert_sentence(text, rng, other, place="first"),
    "foreign_last": lambda text, rng, other: _insert_sentence(text, rng, other, place="last"),
    "foreign_middle": lambda text, rng, other: _insert_sentence(text, rng, other, place="middle"),
    "invented": _invent_object,
    "number": _swap_number,
    "object": _swap_object,
    "other_caption": _replace_caption,
    "quote": _misquote,
    "repeated": _repeat_sentence,
    "side": _swap_side,
}


def _swap_word(
    text: str, rng: Random, choices: Mapping[str, Sequence[str]], *, unless: str = ""
) -> tuple[str, str] | None:
    """Replaces one word or phrase by another of its choices that the text does not contain."""
    longest_first = "|".join(sorted(map(re.escape, choices), key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-]){_BEFORE_A_COLOUR}({longest_first})\b{unless}", re.IGNORECASE)
    places = [match for match in pattern.finditer(text) if _may_change(text, match)]
    rng.shuffle(places)
    for place in places:
        others = [word for word in choices[place[0].lower()] if word != place[0].lower()]
        if len(others) > 1:
            others = [word for word in others if not re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE)]
        if others:
            return _put(text, place.start(), place.end(), _like(rng.choice(others), place[0]))
    return None


def _may_change(text: str, place: re.Match[str]) -> bool:
    """True if a place is in no quotation and its sentence has no negation."""
    if any(quote.start() < place.start() < quote.end() for quote in _QUOTED.finditer(text)):
        return False
    begin = max(text.rfind(mark, 0, place.start()) for mark in (". ", "! ", "? ", "\n")) + 1
    ends = [end for mark in (". ", "! ", "? ", "\n") if (end := text.find(mark, place.end())) >= 0]
    return not _NEGATION.search(text[begin : min(ends, default=len(text))])


def _put(text: str, start: int, end: int, new: str, *, articles: bool = True) -> tuple[str, str]:
    """The text with `new` between two places, an article before it fitted, and what was changed."""
    before, old = text[:start], text[start:end]
    article = re.search(r"\b([Aa])(n?) $", before) if articles else None
    if article:
        fitted = article[1] + ("n" if new[0].lower() in _VOWELS else "")
        before = f"{before[: article.start()]}{fitted} "
    return f"{before}{new}{text[end:]}", f"{old} -> {new}"


def _like(word: str, old: str) -> str:
    """The word with a capital if the old one has one."""
    return word[0].upper() + word[1:] if old[0].isupper() else word
