"""Words of the scenes world that are not its grammar: names that only an alt text knows, and words on a sign.

Both are made of random syllables, so that a model cannot know them by heart, and depend on (seed, index) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
RIGHT = 0.6  # chance that a name is of a thing in the picture, as long as there is one left
SIGN = 0.26  # height of a sign below the picture, in short sides


@dataclass(frozen=True, kw_only=True)
class Named:
    """A name that an alt text gives to a thing."""

    name: str
    thing: str  # as in red ring
    is_right: bool  # the thing is in the picture

    @property
    def sentence(self) -> str:
        """
        >>> Named(name="Kalu", thing="orange ring", is_right=True).sentence
        'An orange ring called Kalu.'
        """
        return f"{'An' if self.thing[0] in 'aeiou' else 'A'} {self.thing} called {self.name}."


def draw_names(seed: int, index: int, things: Sequence[str], others: Sequence[str]) -> list[Named]:
    """Names for up to three things, in random order.

    Args:
        things: names of what is in the picture, at least one.
        others: names of what is not in it.
    """
    rng = Random(f"names/{seed}/{index}")
    num = rng.randint(1, 3)
    right = [thing for thing in rng.sample(things, min(num, len(things))) if rng.random() < RIGHT]
    chosen = [*((thing, True) for thing in right), *((thing, False) for thing in rng.sample(others, num - len(right)))]
    rng.shuffle(chosen)
    names = _draw_words(rng, num)
    return [Named(name=n, thing=thing, is_right=ok) for n, (thing, ok) in zip(names, chosen, strict=True)]


def draw_sign_text(seed: int, index: int) -> str:
    """One or two words, in capitals or with the first letter as one."""
    rng = Random(f"sign/{seed}/{index}")
    text = " ".join(_draw_words(rng, rng.randint(1, 2)))
    return text.upper() if rng.random() < 0.4 else text


def add_sign(picture: Image.Image, text: str, rng: Random) -> Image.Image:
    """The picture with a sign below it, as wide as it is."""
    short = min(picture.size)
    sign = Image.new("RGB", (picture.width, round(SIGN * short)), rng.choice(("white", "khaki", "lightcyan")))
    draw, size = ImageDraw.Draw(sign), 0.7 * sign.height
    font = ImageFont.load_default(size)
    while draw.textlength(text, font=font) > 0.9 * sign.width:
        size *= 0.9
        font = ImageFont.load_default(size)
    ink = rng.choice(("black", "navy", "darkgreen", "darkred"))
    draw.text((sign.width / 2, sign.height / 2), text, font=font, fill=ink, anchor="mm")
    whole = Image.new("RGB", (picture.width, picture.height + sign.height))
    whole.paste(picture)
    whole.paste(sign, (0, picture.height))
    return whole


def _draw_words(rng: Random, num: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < num:
        syllables = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3))]
        words["".join(syllables).capitalize()] = None
    return list(words)
