"""The captions of the scenes world in German: there and back, sentence by sentence, in the same phrasing.

Every phrase of the grammar (stages/scenes/claims.py) has one German phrase for each case, with its gender and endings,
so that a German caption can be read by turning it into English. Any other sentence is outside the grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from pipeline.sources.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES
from stages.scenes.claims import NUMBERS, PLURALS, THINGS, split_sentences

NOUNS = {  # shape -> gender, singular, plural
    "circle": ("m", "Kreis", "Kreise"),
    "square": ("n", "Quadrat", "Quadrate"),
    "triangle": ("n", "Dreieck", "Dreiecke"),
    "star": ("m", "Stern", "Sterne"),
    "cross": ("n", "Kreuz", "Kreuze"),
    "ring": ("m", "Ring", "Ringe"),
    "diamond": ("f", "Raute", "Rauten"),
    "heart": ("n", "Herz", "Herzen"),
}
COUNTED = {**NOUNS, "object": ("n", "Objekt", "Objekte")}
ADJECTIVES = {  # without their endings
    "red": "rot",
    "orange": "orangefarben",
    "yellow": "gelb",
    "green": "grün",
    "blue": "blau",
    "purple": "violett",
    "white": "weiß",
    "black": "schwarz",
    "grey": "grau",
    "pink": "rosafarben",
    "brown": "braun",
    "teal": "türkisfarben",
    "small": "klein",
    "large": "groß",
    "solid": "einfarbig",
    "striped": "gestreift",
    "dotted": "gepunktet",
}
DIGITS = ("null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
INDEFINITE = {  # case -> gender -> article, ending of an adjective after it
    "nominative": {"m": ("ein", "er"), "n": ("ein", "es"), "f": ("eine", "e")},
    "accusative": {"m": ("einen", "en"), "n": ("ein", "es"), "f": ("eine", "e")},
}
DEFINITE = {
    "nominative": {"m": ("der", "e"), "n": ("das", "e"), "f": ("die", "e")},
    "accusative": {"m": ("den", "en"), "n": ("das", "e"), "f": ("die", "e")},
    "dative": {"m": ("dem", "en"), "n": ("dem", "en"), "f": ("der", "en")},
}
RELATIONS = {  # word -> German, case of the second thing
    "left of": ("ist links von {}", "dative"),
    "right of": ("ist rechts von {}", "dative"),
    "above": ("ist über {}", "dative"),
    "below": ("ist unter {}", "dative"),
    "inside": ("ist in {}", "dative"),
    "around": ("ist um {} herum", "accusative"),
    "touching": ("berührt {}", "accusative"),
}

Phrases = Mapping[str, str]  # English -> German


@dataclass(frozen=True, kw_only=True)
class Template:
    """A sentence in both languages; {} is where a phrase goes."""

    english: str
    german: str
    phrases: tuple[Phrases, ...]


def translate(text: str) -> str:
    """A caption of the grammar in German.

    Raises:
        ValueError: it has a sentence outside the grammar.

    >>> translate("There is a small red circle. The red circle is left of the blue diamond.")
    'Es gibt einen kleinen roten Kreis. Der rote Kreis ist links von der blauen Raute.'
    """
    return " ".join(_translate_sentence(sentence) for sentence in split_sentences(text))


def translate_back(text: str) -> str:
    """A German caption in English; a sentence outside the grammar stays as it is.

    >>> translate_back("Ein kleiner roter Kreis. Das ist schön.")
    'A small red circle. Das ist schön.'
    """
    return " ".join(_turn(sentence, to_german=False) or sentence for sentence in split_sentences(text))


def _translate_sentence(sentence: str) -> str:
    german = _turn(sentence, to_german=True)
    if german is None:
        raise ValueError(f"{sentence!r} is outside the grammar of the scenes world")
    return german


def _turn(sentence: str, *, to_german: bool) -> str | None:
    for pattern, phrases, other in _compile(to_german):
        match = pattern.fullmatch(sentence[:1].lower() + sentence[1:])
        if match and all(phrase in known for phrase, known in zip(match.groups(), phrases, strict=True)):
            text = other.format(*(known[phrase] for phrase, known in zip(match.groups(), phrases, strict=True)))
            return text[0].upper() + text[1:]
    return None


@cache
def _compile(to_german: bool) -> Sequence[tuple[re.Pattern[str], tuple[Phrases, ...], str]]:
    """For each template: the pattern of its sentences, its phrases, and the template in the other language."""
    compiled = []
    for one in _list_templates():
        source, target = (one.english, one.german) if to_german else (one.german, one.english)
        phrases = one.phrases
        if not to_german:
            phrases = tuple({german: english for english, german in known.items()} for known in phrases)
        lower = source[:1].lower() + source[1:]
        compiled.append((re.compile(re.escape(lower).replace(r"\{\}", "(.+)")), phrases, target))
    return compiled


def _list_templates() -> Sequence[Template]:
    things = {case: _list_things(case) for case in INDEFINITE}
    one = {case: _list_counts([1], case) for case in INDEFINITE}
    many = _list_counts([0, *range(2, len(NUMBERS))], "accusative")
    named = {case: _list_named(case) for case in DEFINITE}
    plain, strong, weak = ({word: ADJECTIVES[word] + ending for word in BACKGROUNDS} for ending in ("", "er", "en"))
    sentences = [
        ("There is {}.", "Es gibt {}.", things["accusative"]),
        ("{}.", "{}.", things["nominative"]),
        ("The picture shows {}.", "Das Bild zeigt {}.", things["accusative"]),
        ("There is {}.", "Es gibt {}.", one["accusative"]),
        ("There are {}.", "Es gibt {}.", many),
        ("{}.", "{}.", {**one["nominative"], **many}),
        ("The picture has {}.", "Das Bild hat {}.", {**one["accusative"], **many}),
        ("The background is {}.", "Der Hintergrund ist {}.", plain),
        ("All is on a {} background.", "Alles ist auf einem {} Hintergrund.", weak),
        ("A {} background.", "Ein {} Hintergrund.", strong),
    ]
    templates = [Template(english=english, german=german, phrases=(known,)) for english, german, known in sentences]
    for word, (german, case) in RELATIONS.items():
        phrases = (named["nominative"], named[case])
        templates.append(Template(english=f"The {{}} is {word} the {{}}.", german=f"{{}} {german}.", phrases=phrases))
    return templates


def _list_things(case: str) -> Phrases:
    """A thing that is mentioned first: `a small red circle`."""
    phrases = {}
    for size, texture, colour, shape in product(("", *SIZES), ("", *TEXTURES), COLOURS, SHAPES):
        words = [word for word in (size, texture, colour) if word]
        english = " ".join([*words, shape])
        phrases[f"{'an' if english[0] in 'aeiou' else 'a'} {english}"] = _decline(words, shape, INDEFINITE[case])
    return phrases


def _list_named(case: str) -> Phrases:
    """A thing that is known, without its English article: `red circle`."""
    return {
        f"{colour} {shape}": _decline([colour], shape, DEFINITE[case]) for colour, shape in product(COLOURS, SHAPES)
    }


def _decline(words: Sequence[str], shape: str, endings: Mapping[str, tuple[str, str]]) -> str:
    gender, noun, _ = NOUNS[shape]
    article, ending = endings[gender]
    return " ".join([article, *(ADJECTIVES[word] + ending for word in words), noun])


def _list_counts(numbers: Iterable[int], case: str) -> Phrases:
    """How many there are of a shape or of all things; only of one does the case show."""
    phrases = {}
    for number, (shape, (gender, singular, plural)) in product(numbers, COUNTED.items()):
        english = shape if number == 1 else PLURALS.get(shape, THINGS)
        german = f"{INDEFINITE[case][gender][0]} {singular}" if number == 1 else f"{DIGITS[number]} {plural}"
        phrases[f"{NUMBERS[number]} {english}"] = german
    return phrases
