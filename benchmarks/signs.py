"""Measures how exactly words on signs are read: photographs with a sign drawn in each, through a run with `ocr`.

The photographs are those that scikit-image ships, without those of text. A sign has one or two words in letters of a
twentieth to a seventh of the short side, on a plate or on the picture itself. A sign counts as read when a line that
was found is its text, letter by letter, case and blanks included; every other line is one too many, unless it is also
found in the photograph without its sign. The last line is JSON.

    python -m benchmarks.signs FOLDER [--pictures 200]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from pipeline import config
from pipeline.commands import init
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from pipeline.storage import database
from stages.audit.intervals import wilson_interval

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "rocket.jpg",
)
WORDS = (
    *("OPEN", "Exit", "Bakery", "STOP", "Museum", "Platform 9", "No Entry", "Library", "CAFE", "Garden", "Room 214"),
    *("Hotel Astoria", "Tickets", "Keep Left", "Harbour", "DANGER", "Market Hall", "Gate 17", "Welcome", "Bus 42"),
    *("Pharmacy", "Lost Property", "Theatre", "PRIVATE", "Quiet Please", "Level 3", "Old Town", "Reception", "TAXI"),
    *("Push", "Fresh Bread", "Bridge Street", "1984", "School", "North Pier", "Sale", "Wet Paint", "Post Office"),
)
PLAIN = "plain-"  # in the names of photographs without a sign
FOUND = """
    SELECT source_key, [one.text FOR one IN found] AS lines FROM finding JOIN image USING (key) ORDER BY source_key"""


def draw_pictures(folder: Path, num: int) -> dict[str, str]:
    """Writes the photographs, plain and with signs; returns the text of each sign by the picture's name."""
    spec = find_spec("skimage")
    assert spec and spec.origin
    texts = {}
    folder.mkdir(parents=True)
    for name in PHOTOGRAPHS:
        with Image.open(Path(spec.origin).parent / "data" / name) as photograph:
            photograph.convert("RGB").save(folder / f"{PLAIN}{name}")
    for number in range(num):
        rng, name = Random(f"sign/{number}"), PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        picture = Image.open(folder / f"{PLAIN}{name}")
        signed = f"{number:04d}-{name.partition('.')[0]}.png"
        texts[signed] = rng.choice(WORDS)
        draw_sign(picture, texts[signed], rng)
        picture.save(folder / signed)
    return texts


def draw_sign(picture: Image.Image, text: str, rng: Random) -> None:
    draw, short = ImageDraw.Draw(picture), min(picture.size)
    font = ImageFont.load_default(rng.uniform(0.05, 0.14) * short)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    while right - left > 0.8 * picture.width:
        font = ImageFont.load_default(0.9 * font.size)  # type: ignore[union-attr]
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height, margin = right - left, bottom - top, round(0.3 * (bottom - top))
    x = rng.randint(margin, max(margin, int(picture.width - width) - margin))
    y = rng.randint(margin, max(margin, int(picture.height - height) - margin))
    dark, light = rng.choice(("black", "navy", "darkgreen", "darkred")), rng.choice(("white", "khaki", "lightcyan"))
    ink, ground = (dark, light) if rng.random() < 0.5 else (light, dark)
    if rng.random() < 0.6:
        draw.rectangle((x - margin, y - margin, x + width + margin, y + height + margin), fill=ground)
        draw.text((x - left, y - top), text, font=font, fill=ink)
    else:
        draw.text((x - left, y - top), text, font=font, fill=light, stroke_width=max(1, short // 200), stroke_fill=dark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one, for the pictures and the run")
    parser.add_argument("--pictures", type=int, default=200)
    args = parser.parse_args()
    texts = draw_pictures(args.folder / "pictures", args.pictures)
    source = {"kind": "folder", "path": str((args.folder / "pictures").absolute())}
    init.create_run(args.folder / "run", {"source": source, "find.words": {"kind": "ocr"}})
    state = RunState(config.load(args.folder / "run"))
    assert Runner(state).execute(select_passes(state.passes, "all")).exit_code == 0
    with database.connect_run(state.run) as connection:
        found: dict[str, list[str]] = dict(database.query_rows(connection, FOUND))
    own = defaultdict(set, {key.removeprefix(PLAIN).partition(".")[0]: set(lines) for key, lines in found.items()})
    exact = [text in found[name] for name, text in texts.items()]
    letters = ["".join(text.split()) in {"".join(line.split()) for line in found[name]} for name, text in texts.items()]
    others = [
        sum(line != text and line not in own[name[5:].partition(".")[0]] for line in found[name])
        for name, text in texts.items()
    ]
    low, high = wilson_interval(sum(exact) / len(exact), len(exact))
    print(f"{len(texts)} signs: read exactly {sum(exact) / len(exact):.3f} ({low:.3f} to {high:.3f}), blanks aside")
    print(f"{sum(letters) / len(letters):.3f}; other lines a picture {sum(others) / len(others):.3f}")
    for name, text in texts.items():
        if text not in found[name]:
            print(f"  {name}: {text!r} was read as {found[name]}")
    figures = {"signs": len(texts), "exact": sum(exact), "letters": sum(letters), "other_lines": sum(others)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
