"""The scenes world: pictures of coloured shapes, drawn from a seed, whose content is known.

It holds geometry, pixels and web-like alt text, and refuses to know the grammar of captions and their measure
(stages/scenes/claims.py). A scene depends on (seed, index) alone.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.records import Piece, Raw
from pipeline.sections import key
from pipeline.sources._scene_words import SIGN, Named, add_sign, draw_names, draw_sign_text

COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 136, 18),
    "yellow": (250, 226, 50),
    "green": (34, 150, 58),
    "blue": (36, 70, 214),
    "purple": (136, 40, 168),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
BACKGROUNDS = {"grey": (142, 142, 142), "pink": (246, 176, 196), "brown": (126, 84, 52), "teal": (70, 176, 176)}
TEXTURES = ("solid", "striped", "dotted")
RADII = {"small": (0.14, 0.165), "large": (0.225, 0.27)}  # of a thing, in short sides of the picture
SIZES = tuple(RADII)
# shape -> the share of its radius within which it has pixels in every direction
SHAPES = {
    "circle": 0.98,
    "square": 0.77,
    "triangle": 0.48,
    "star": 0.45,
    "cross": 0.5,
    "ring": 0.98,
    "diamond": 0.68,
    "heart": 0.62,
}
CONTAINERS = ("circle", "square", "diamond", "heart")
NUM_THINGS = (1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 6)  # drawn evenly
ASPECTS = ((1, 1), (1, 1), (4, 3), (3, 4), (3, 2), (2, 3))
APART = 1.12  # two things are clearly apart when their distance is this many times the sum of their radii
ASIDE = 0.06  # in short sides: a smaller offset is neither left nor right, neither above nor below
CROWD = 4  # things in a crowded picture, at least
CROWD_CANDIDATES = 32  # scenes of the world that a picture of a chosen crowding is chosen from
BROKEN = ("truncated", "empty", "page", "noise", "missing")


@dataclass(frozen=True, kw_only=True)
class Config:
    num_images: int = key(400, "how many pictures", least=1)
    seed: int = key(0, "another seed is another corpus", least=0)
    start: int = key(0, "the first picture's index in the world", least=0)
    samples_per_piece: int = key(100, "pictures in one piece of the plan", least=1, stamp=False)
    short_side: int = key(112, "pixels of the smallest picture's short side", least=64, most=1024)
    long_side: int = key(320, "pixels that no side is longer than", least=96, most=4096)
    broken_share: float = key(0.04, "share of files that cannot be read", least=0, most=1)
    duplicate_share: float = key(0.06, "share of copies of earlier pictures, half exact, half near", least=0, most=1)
    crowded_share: float | None = key(
        None,
        "share of pictures with four to six things; without it, the world's own, about a quarter",
        stamp_default=False,
        least=0,
        most=1,
    )
    named_share: float = key(
        0.0,
        "share of pictures whose alt text names things, some of them not there",
        stamp_default=False,
        least=0,
        most=1,
    )
    sign_share: float = key(0.0, "share of pictures with words on a sign", stamp_default=False, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Thing:
    shape: str
    colour: str
    size: str
    texture: str
    x: float  # centre, in short sides from the left
    y: float  # centre, in short sides from the top
    radius: float  # in short sides
    angle: float  # of the stripes, radians

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The truth of a picture. No two things share both colour and shape; later ones lie on top."""

    seed: int
    index: int
    background: str
    width: float  # in short sides
    height: float
    things: tuple[Thing, ...]

    @property
    def left_to_right(self) -> tuple[Thing, ...]:
        return tuple(sorted(self.things, key=lambda thing: thing.x))


def find_relation(a: Thing, b: Thing) -> str:
    """The most specific relation of `a` to `b`: inside, around, touching, or the main direction."""
    distance = math.hypot(a.x - b.x, a.y - b.y)
    if distance < abs(a.radius - b.radius):
        return "inside" if a.radius < b.radius else "around"
    if distance <= _inner_radius(a) + _inner_radius(b):
        return "touching"
    if abs(a.x - b.x) >= abs(a.y - b.y):
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def is_related(a: Thing, word: str, b: Thing) -> bool:
    """True when `a` is `word` `b`; a direction may hold together with inside or touching."""
    offsets = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return offsets[word] > ASIDE if word in offsets else find_relation(a, b) == word


def centre_in_tenths(thing: Thing, scene: Scene) -> tuple[int, int]:
    """The centre of a thing, across and down, in tenths of the picture: 0 to 9."""
    return int(10 * thing.x / scene.width), int(10 * thing.y / scene.height)


def _inner_radius(thing: Thing) -> float:
    return thing.radius * SHAPES[thing.shape]


def draw_scene(seed: int, index: int) -> Scene:
    """The scene `index` of the world `seed`.

    >>> draw_scene(0, 7) == draw_scene(0, 7)
    True
    """
    rng = Random(f"scene/{seed}/{index}")
    across, down = rng.choice(ASPECTS)
    width, height = across / min(across, down), down / min(across, down)
    things: list[Thing] = []
    num_things = rng.choice(NUM_THINGS)
    for _ in range(num_things):
        thing = _place_thing(rng, things, width, height, num_things=num_things)
        if thing is not None:
            things.append(thing)
    return Scene(
        seed=seed,
        index=index,
        background=rng.choice(list(BACKGROUNDS)),
        width=width,
        height=height,
        things=tuple(things),
    )


def find_scene(source_key: str) -> Scene:
    """The scene of a sample.

    Raises:
        ValueError: the source key is not one of the scenes world.
    """
    world, seed, index = source_key.split("/")[:3]
    if world != "scenes":
        raise ValueError(f"{source_key!r} is not a picture of the scenes world")
    return draw_scene(int(seed), int(index))


def _place_thing(rng: Random, things: list[Thing], width: float, height: float, *, num_things: int) -> Thing | None:
    names = {thing.name for thing in things}
    for _ in range(40):
        size = "large" if rng.random() < (0.6 if num_things <= 3 else 0.35) else "small"
        thing = Thing(
            shape=rng.choice(list(SHAPES)),
            colour=rng.choice(list(COLOURS)),
            size=size,
            texture=rng.choice(TEXTURES),
            x=0.0,
            y=0.0,
            radius=rng.uniform(*RADII[size]),
            angle=rng.choice((0.25, 0.75)) * math.pi,
        )
        x, y = _draw_position(rng, thing, things, width, height)
        thing = replace(thing, x=round(x, 4), y=round(y, 4))
        fits = _is_inside(thing.x, thing.radius, width) and _is_inside(thing.y, thing.radius, height)
        if thing.name not in names and fits and all(_is_clear(thing, other) for other in things):
            return thing
    return None


def _draw_position(rng: Random, thing: Thing, things: list[Thing], width: float, height: float) -> tuple[float, float]:
    """A position to try: mostly uniform, at times on the rim of another thing or near the centre of one."""
    chance = rng.random()
    outer = [other for other in things if _can_contain(other, thing)]
    if outer and chance < 0.2:
        return _offset_from(rng, other := rng.choice(outer), rng.uniform(0, 0.1) * other.radius)
    if things and chance > 0.87:
        return _offset_from(rng, other := rng.choice(things), 0.97 * (_inner_radius(thing) + _inner_radius(other)))
    return rng.uniform(thing.radius, width - thing.radius), rng.uniform(thing.radius, height - thing.radius)


def _offset_from(rng: Random, thing: Thing, distance: float) -> tuple[float, float]:
    angle = rng.uniform(0, 2 * math.pi)
    return thing.x + distance * math.cos(angle), thing.y + distance * math.sin(angle)


def _is_inside(centre: float, radius: float, side: float) -> bool:
    return radius * 0.95 <= centre <= side - radius * 0.95


def _is_clear(a: Thing, b: Thing) -> bool:
    """True when the relation of `a`, laid upon `b`, is unmistakable, and `b` remains visible."""
    distance, radii = math.hypot(a.x - b.x, a.y - b.y), a.radius + b.radius
    if distance >= APART * radii:
        return True
    if distance <= _inner_radius(a) + _inner_radius(b):
        on_rim = distance >= 0.58 * radii and not (a.size == "large" and b.size == "small")
        return on_rim or (distance < 0.12 * b.radius and _can_contain(b, a))
    return False


def _can_contain(outer: Thing, inner: Thing) -> bool:
    return outer.shape in CONTAINERS and outer.size == "large" and inner.size == "small"


def render_scene(scene: Scene, *, short: int, seed: int = 0) -> Image.Image:
    """The picture of a scene, `short` pixels on its short side, with noise drawn from `seed`."""
    width, height = round(scene.width * short), round(scene.height * short)
    rng = Random(f"pixels/{scene.seed}/{scene.index}/{seed}")
    image = Image.new("RGB", (width, height), _jitter_colour(rng, BACKGROUNDS[scene.background], 8))
    for thing in scene.things:
        radius = max(2, round(thing.radius * short))
        corner = (round(thing.x * short) - radius, round(thing.y * short) - radius)
        image.paste(_draw_fill(rng, thing, radius), corner, draw_stencil(thing.shape, radius))
    return _add_noise(rng, image)


@cache
def draw_stencil(shape: str, radius: int) -> Image.Image:
    """The mask of a shape: a grey image of side 2 * radius + 1, cached and not to be changed."""
    image = Image.new("L", (2 * radius + 1, 2 * radius + 1))
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, 2 * radius, 2 * radius), fill=255)
        if shape == "ring":
            hole = round(radius * 0.48)
            draw.ellipse((radius - hole, radius - hole, radius + hole, radius + hole), fill=0)
        return image
    if shape == "heart":
        lobe = radius * 0.54
        for side in (-1, 1):
            x, y = radius + side * lobe * 0.85, radius * 0.68
            draw.ellipse((x - lobe, y - lobe, x + lobe, y + lobe), fill=255)
    draw.polygon([(radius * (1 + x), radius * (1 + y)) for x, y in _list_corners(shape)], fill=255)
    return image


def _list_corners(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit circle, y downwards."""
    if shape == "cross":
        w = 0.36
        arms = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w)]
        return [*arms, (-w, -w)]
    if shape == "heart":
        return [(-0.95, -0.08), (0, -0.45), (0.95, -0.08), (0, 0.98)]
    corners = {"square": 4, "diamond": 4, "triangle": 3, "star": 10}[shape]
    turn = math.pi / 4 if shape == "square" else 0.0
    lengths = [1.0, 0.45] if shape == "star" else [1.1 if shape == "square" else 1.0]
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [
        (lengths[i % len(lengths)] * math.sin(angle), -lengths[i % len(lengths)] * math.cos(angle))
        for i, angle in enumerate(angles)
    ]


def _draw_fill(rng: Random, thing: Thing, radius: int) -> Image.Image:
    """The square behind the stencil: the colour, with stripes or dots in a lighter or darker tone of it."""
    side = 2 * radius + 1
    colour = _jitter_colour(rng, COLOURS[thing.colour], 10)
    tile = Image.new("RGB", (side, side), colour)
    if thing.texture == "solid":
        return tile
    draw = ImageDraw.Draw(tile)
    is_lighter = thing.colour in ("black", "blue", "purple", "red", "green")
    tone = tuple(round(c + 0.55 * (255 - c)) if is_lighter else round(c * 0.5) for c in colour)
    if thing.texture == "striped":
        step, slope = radius * 0.56, -1 if thing.angle < math.pi / 2 else 1
        for i in range(-5, 6):
            middle = radius + i * step * 1.4
            start, end = (middle - slope * side, -radius), (middle + slope * side, side + radius)
            draw.line([start, end], fill=tone, width=max(1, round(step * 0.5)))
        return tile
    step, dot = radius * 0.62, radius * 0.19
    for row in range(-2, 3):
        for column in range(-2, 3):
            x, y = radius + column * step, radius + row * step
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=tone)
    return tile


def _jitter_colour(rng: Random, colour: tuple[int, ...], amount: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)


def _add_noise(rng: Random, image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int16)
    noise = np.frombuffer(rng.randbytes(pixels.size), np.int8).reshape(pixels.shape)
    pixels += noise // rng.choice((8, 12, 24))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def assign_cells(scene: Scene, *, columns: int, rows: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """The index of the thing that fills most of each cell of a grid over the picture; -1 is the background."""
    fine = 4
    ids = Image.new("L", (columns * fine, rows * fine), 0)
    across, down = columns * fine / scene.width, rows * fine / scene.height
    for number, thing in enumerate(scene.things, 1):
        size = (max(1, round(2 * thing.radius * across)), max(1, round(2 * thing.radius * down)))
        corner = (round((thing.x - thing.radius) * across), round((thing.y - thing.radius) * down))
        ids.paste(number, corner, draw_stencil(thing.shape, 20).resize(size))
    blocks = np.asarray(ids).reshape(rows, fine, columns, fine).swapaxes(1, 2).reshape(rows, columns, -1)
    shares = np.stack([(blocks == n).sum(-1) for n in range(1, len(scene.things) + 1)], -1)
    return np.where(shares.max(-1) * 3 >= fine * fine, shares.argmax(-1), -1).astype(np.int8)


def claims(path: str) -> bool:
    """True for the word `scenes`: the pictures are drawn, not read."""
    return path == "scenes"


def pieces(config: Config) -> Iterator[Piece]:
    step = config.samples_per_piece
    for start in range(0, config.num_images, step):
        yield Piece(file=f"scenes/{config.seed}", start=start, stop=min(start + step, config.num_images))


def read(piece: Piece, config: Config) -> Iterator[Raw]:
    assert piece.stop is not None
    for index in range(config.start + piece.start, config.start + piece.stop):
        yield draw_sample(index, config)


def draw_sample(index: int, config: Config) -> Raw:
    """One sample of the corpus: a picture or a broken file, with alt text and the truth as metadata."""
    rng = Random(f"sample/{config.seed}/{index}")
    original, take = _choose_original(index, config)
    truth = _choose_scene(original, config)
    broken = rng.choice(BROKEN) if rng.random() < config.broken_share else None
    kind, alt_text = _write_alt_text(rng, truth)
    if has_names := Random(f"named/{config.seed}/{index}").random() < config.named_share:
        kind, alt_text = "named", " ".join(named.sentence for named in name_things(truth))
    sign = find_sign(truth, config)
    data = _encode_picture(truth, config, take=take, sign=sign)
    metadata: dict[str, Any] = {"scene": asdict(truth), "alt_text": kind, "broken": broken}
    if has_names:
        metadata["names"] = [asdict(named) for named in name_things(truth)]
    if sign:
        metadata["sign"] = sign
    metadata["copy_of"] = truth.index if original != index else None
    return Raw(
        source_key=f"scenes/{config.seed}/{truth.index}" + (f"/copy-{index}" if original != index else ""),
        data=_break_file(rng, data, broken) if broken else data,
        alt_text=alt_text,
        metadata=json.dumps(metadata, separators=(",", ":")),
        error="404: the picture has gone" if broken == "missing" else None,
    )


def _choose_scene(index: int, config: Config) -> Scene:
    """The scene of the picture `index`: the same number of the world, unless the config decides how crowded it is.

    Then it is the first of the picture's own `CROWD_CANDIDATES` scenes that fits, or their last, so that a picture
    shows an ordinary scene of the world and no two pictures show the same one.
    """
    if config.crowded_share is None:
        return draw_scene(config.seed, index)
    is_crowded = Random(f"crowd/{config.seed}/{index}").random() < config.crowded_share
    numbers = range(index * CROWD_CANDIDATES, (index + 1) * CROWD_CANDIDATES)
    drawn = (draw_scene(config.seed, number) for number in numbers)
    return next(
        (scene for scene in drawn if (len(scene.things) >= CROWD) == is_crowded), draw_scene(config.seed, numbers[-1])
    )


def _choose_original(index: int, config: Config) -> tuple[int, int]:
    """The indices of the scene that a picture shows and of the first picture with the same bytes: mostly its own."""
    rng = Random(f"copy/{config.seed}/{index}")
    if rng.random() >= config.duplicate_share or index == config.start:
        return index, index
    is_near = rng.random() < 0.5
    original, take = _choose_original(rng.randrange(max(config.start, index - 50), index), config)
    return original, index if is_near else take


def name_things(scene: Scene) -> list[Named]:
    """The names that the alt text of a scene gives, where it gives any."""
    things = [thing.name for thing in scene.things]
    others = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in things]
    return draw_names(scene.seed, scene.index, things, others)


def find_sign(scene: Scene, config: Config) -> str | None:
    """The words on the sign of a scene's picture; None: it has no sign."""
    if Random(f"signed/{scene.seed}/{scene.index}").random() >= config.sign_share:
        return None
    return draw_sign_text(scene.seed, scene.index)


def _encode_picture(scene: Scene, config: Config, *, take: int, sign: str | None = None) -> bytes:
    """The picture as a JPEG; another `take` of a scene has another size, noise and quality."""
    rng = Random(f"file/{scene.seed}/{scene.index}/{take}")
    tall = scene.height + (SIGN * min(scene.width, scene.height) if sign else 0.0)
    longest = max(config.short_side, int(config.long_side / max(scene.width, tall)))
    image = render_scene(scene, short=rng.randint(config.short_side, longest), seed=take)
    if sign:
        image = add_sign(image, sign, rng)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(70, 95))
    return buffer.getvalue()


def _break_file(rng: Random, data: bytes, fault: str) -> bytes | None:
    match fault:
        case "truncated":
            return data[: len(data) // 3]
        case "empty":
            return b""
        case "page":
            return b"<!DOCTYPE html><title>404 Not Found</title>"
        case "noise":
            return rng.randbytes(len(data) // 2)
        case _:
            return None


def _write_alt_text(rng: Random, scene: Scene) -> tuple[str, str | None]:
    """The kind of an alt text, and the text: right half of the time, else wrong, too short, a file name or none."""
    kind = rng.choice(["right"] * 10 + ["wrong"] * 4 + ["short"] * 2 + ["file name"] * 3 + ["none"])
    match kind:
        case "right" | "wrong":
            things = scene.things if kind == "right" else _swap_things(rng, scene)
            named = rng.sample(things, min(len(things), rng.choice((1, 2, 2))))
            return kind, " ".join(f"{'An' if thing.name[0] in 'aeiou' else 'A'} {thing.name}." for thing in named)
        case "short":
            return kind, rng.choice(("picture", "shapes", "img", "untitled"))
        case "file name":
            return kind, f"{rng.choice(('IMG', 'DSC', 'scan'))}_{rng.randint(0, 9999):04d}.jpg"
        case _:
            return kind, None


def _swap_things(rng: Random, scene: Scene) -> tuple[Thing, ...]:
    """The scene's things under names of which none is in the scene."""
    present = {thing.name for thing in scene.things}
    names = [(shape, colour) for shape in SHAPES for colour in COLOURS if f"{colour} {shape}" not in present]
    return tuple(
        replace(thing, shape=shape, colour=colour)
        for thing, (shape, colour) in zip(scene.things, rng.sample(names, len(scene.things)), strict=True)
    )
