"""Spoiled copies of captions: each reads right and is false of its image, or is poorer, in one known way.

Pure operations on English text; a kind passes where it finds nothing that it can change safely. Sentences with a
negation or a guess are left alone, since a swap may leave them true, and so is quoted text. A thing keeps its new
colour, name or side wherever the caption speaks of it. It knows neither images nor judges.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from pipeline.storage.sentences import split_sentences
from stages.audit.words import (
    cut_sentence,
    find_colours,
    find_pattern,
    find_quotes,
    find_sentences,
    find_words,
    has_word,
    is_about_others,
    is_bare,
    is_direction,
    is_finished,
    is_name,
    is_quoted,
    is_symmetric,
    is_unsure,
    list_far_colours,
    list_words,
    load_words,
    may_change,
    read_words,
    refers_back,
    replace_places,
    takes_sentences,
)

VERSION = 2  # raised when equal captions get different copies
_DIGITS = re.compile(r"(?<![\w.,:/$€£#–-])(?<!\d, )(?<!and )[1-9]\d?(?![\w:/%–,-]|\.\d| and \d)")

T = TypeVar("T")
Spoiler = Callable[[str, Random, str | None], tuple[str, str] | None]  # the spoiled text and what was changed


@dataclass(frozen=True, kw_only=True)
class SpoiledText:
    """A copy of a caption that is false, or poorer, in one known way."""

    kind: str
    text: str
    change: str  # for people: the words that were replaced, added or dropped


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


def hash_words() -> str:
    """16 hex digits of what decides the copies: the lists of words, and the version of this module."""
    return hashlib.sha256(f"{VERSION}\n{read_words()}".encode()).hexdigest()[:16]


def _swap_colour(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Gives one thing another colour, wherever the caption has that colour and thing."""
    places = find_colours(text)
    for place, noun in _shuffle(places, rng):
        colours = [one for one in list_far_colours(place) if not has_word(text, one)]
        if colours and may_change(text, place):
            new = rng.choice(colours)
            same = [one for one, its in places if noun and (one.word, its) == (place.word, noun)]
            return replace_places(text, dict.fromkeys(same or [place], new)), f"{place.word} -> {new}"
    return None


def _move_attribute(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Exchanges the colours of two things."""
    all_places = find_colours(text)
    known = {(place.word, noun) for place, noun in all_places}
    places = [(place, noun) for place, noun in all_places if noun and place.before not in ("and", "or")]
    places = [(place, noun) for place, noun in places if may_change(text, place)]
    pairs = [
        (one, its, two, others)
        for number, (one, its) in enumerate(places)
        for two, others in places[number + 1 :]
        if two.word in list_far_colours(one) and one.word in list_far_colours(two)
        if its.rstrip("s") != others.rstrip("s") and known.isdisjoint({(one.word, others), (two.word, its)})
    ]
    if not pairs:
        return None
    one, its, two, others = rng.choice(pairs)
    new = {place: two.word for place, noun in all_places if (place.word, noun) == (one.word, its)}
    new |= {place: one.word for place, noun in all_places if (place.word, noun) == (two.word, others)}
    return replace_places(text, new), f"{one.word} {its} and {two.word} {others} exchanged"


def _swap_number(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    words = load_words()
    for place in _shuffle([*find_words(text, words.numbers), *find_pattern(text, _DIGITS)], rng):
        is_count = place.before not in words.before_number and place.after not in ("", *words.after_number)
        is_listed = not words.counted.isdisjoint(list_words(text[place.end :])) or ":" in cut_sentence(text, place)[1]
        choices = words.numbers if place.word.isalpha() else _list_other_numbers(place.word)
        numbers = [one for one in choices if one != place.word and not has_word(text, one)]
        if numbers and is_count and not is_listed and may_change(text, place) and not is_name(text, place):
            new = rng.choice(numbers)
            return replace_places(text, {place: new}), f"{place.word} -> {new}"
    return None


def _list_other_numbers(digits: str) -> list[str]:
    """Numbers of as many digits that no slip in counting makes of this one; none for 1, since a plural follows."""
    if len(digits) == 1:
        return [one for one in "23456789" if digits != "1"]
    return [f"{tens}{digits[1]}" for tens in "123456789" if tens != digits[0]]


def _swap_object(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Gives a thing the name of another, in singular and plural, wherever the caption names it."""
    words, own = load_words(), set(list_words(text))
    named = {name for name, plural in words.plurals.items() if has_word(text, name) or has_word(text, plural)}
    for name in _shuffle([name for name in words.objects if name in named], rng):
        mentions = find_words(text, [name, words.plurals[name]], compounds=True)
        others = [other for other in words.objects[name] if other not in named]
        has_number = words.plurals[name] != name  # one sheep or ten: what follows may not fit another word
        is_free = others and has_number and own.isdisjoint(words.also_called.get(name, ()))
        if is_free and all(is_bare(text, one) for one in mentions) and any(may_change(text, one) for one in mentions):
            new = rng.choice(others)
            changed = {place: new if place.word == name else words.plurals[new] for place in mentions}
            return replace_places(text, changed), f"{name} -> {new}"
    return None


def _swap_side(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Mirrors a caption along one axis."""
    for axis in _shuffle(load_words().axes, rng):
        places = find_words(text, axis.opposites, compounds=True)
        fits = axis.unless.isdisjoint(list_words(text)) and all(is_direction(place, axis) for place in places)
        if fits and any(may_change(text, place) and not is_symmetric(text, place, axis) for place in places):
            changed = {place: axis.opposites[place.word] for place in places if not is_quoted(text, place)}
            changes = dict.fromkeys(f"{place.word} -> {new}" for place, new in changed.items())
            return replace_places(text, changed), ", ".join(changes)
    return None


def _invent_object(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    words = load_words()
    things = [thing for thing in words.inventions if thing.split()[-1] not in text.lower()]
    if not things or not takes_sentences(text):
        return None
    thing = rng.choice(things)
    return f"{text.rstrip()} {rng.choice(words.added_sentences).format(thing)}", f"added: {thing}"


def _misquote(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Replaces text that the caption quotes from the picture by other text of signs."""
    words = load_words()
    for quote in _shuffle(find_quotes(text), rng):
        near = list_words(text[: quote.start()])[-5:] + list_words(text[quote.end() :])[:3]
        quoted = quote[0][1:-1].rstrip(".,!?;:")
        others = [one for one in (words.sign_texts if " " in quoted else words.signs) if not has_word(text, one)]
        if others and not words.cues.isdisjoint(near) and re.search(r"[A-Za-z]{2}", quoted):
            new = rng.choice(others)
            new = new.upper() if quoted.isupper() else new.title() if quoted.istitle() else new.capitalize()
            start = quote.start() + 1
            return f"{text[:start]}{new}{text[start + len(quoted) :]}", f"{quoted} -> {new}"
    return None


def _insert_sentence(text: str, rng: Random, other: str | None, *, place: str) -> tuple[str, str] | None:
    """Adds a sentence of another caption that can stand by itself and speaks of other things."""
    foreign = [one for one in split_sentences(other or "") if is_finished(one) and one[0].isupper()]
    foreign = [one for one in foreign if not refers_back(one) and not is_unsure(one) and is_about_others(one, text)]
    starts = [start for start, _ in find_sentences(text)]
    if place == "middle":
        starts = [start for start, end in find_sentences(text)[1:] if not refers_back(text[start:end])]
    if not foreign or not starts or not takes_sentences(text):
        return None
    sentence = rng.choice(foreign)
    at = starts[0 if place == "first" else len(starts) // 2]
    spoiled = f"{text.rstrip()} {sentence}" if place == "last" else f"{text[:at]}{sentence} {text[at:]}"
    return spoiled, f"added {place}: {sentence}"


def _repeat_sentence(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    spans = [(start, end) for start, end in find_sentences(text) if is_finished(text[start:end])]
    if not spans or not takes_sentences(text):
        return None
    start, end = rng.choice(spans)
    return f"{text[:end]} {text[start:end]}{text[end:]}", f"said twice: {text[start:end]}"


def _drop_sentence(text: str, rng: Random, _: str | None) -> tuple[str, str] | None:
    """Drops a sentence to which the next one does not refer."""
    spans = find_sentences(text)
    if len(spans) < 2 or not takes_sentences(text):
        return None
    nexts = [text[start:end] for start, end in spans[1:]]
    at = rng.choice([number for number in range(len(spans)) if number == len(nexts) or not refers_back(nexts[number])])
    start, end = spans[at]
    rest = text[:start] + text[spans[at + 1][0] :] if at < len(nexts) else text[:start].rstrip()
    return rest, f"dropped: {text[start:end]}"


def _replace_caption(text: str, _: Random, other: str | None) -> tuple[str, str] | None:
    if not other or not any(is_about_others(one, text) for one in split_sentences(other)):
        return None
    return other, "the caption of another image"


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


def _shuffle(values: Sequence[T], rng: Random) -> Sequence[T]:
    return rng.sample(values, len(values))
