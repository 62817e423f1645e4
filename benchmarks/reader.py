"""Measures a model that reads: it fuses captions, translates them, keeps names that fit and says what signs say.

It fuses the captions of the five teachers without the picture; by the truth, the fused captions stand beside the
teachers' and beside what a majority of them says. It translates the captions of one teacher into German; each is turned
back into English by the grammar, and counted where it claims what the caption claims and nothing else. Of the names in
an alt text, which no pixel shows, those of things that are in the picture are right: one is kept when the caption says
it of its thing, a wrong one when it occurs at all, and each sentence that gives a name to another thing is one more
wrong name. A sign is read when the caption has its words letter by letter, given what the finder `ocr` found in the
picture, or nothing; beside it, how often the finder alone found just these words, and how often a sign is said of a
picture without one. The last line is JSON.

    python -m benchmarks.reader MODEL [--scenes 1000] [--world 91001]

MODEL is one of manifests/scenes-reader.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import chain
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from PIL import Image

from benchmarks.held_out import (
    CORPUS,
    bootstrap_interval,
    list_scenes,
    measure_captions,
    open_engine,
    print_table,
    round_figures,
)
from benchmarks.worlds import HELD_OUT, TEST
from pipeline.engines import Engine, Request
from pipeline.records import Raw
from pipeline.sources._scene_words import draw_sign_text
from pipeline.sources.scenes import Config, Scene, draw_sample, name_things
from stages import recipes
from stages.finders import ocr
from stages.scenes.claims import parse_caption
from stages.scenes.german import translate_back
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import TEACHERS, caption_scene, merge_captions, say_name, say_sign
from stages.text.given import Texts

MANIFEST = Path(str(resources.files("manifests") / "scenes-reader"))
TRANSLATED = "hasty"  # the teacher whose captions are translated
SIGNED_SIDE = 224  # pixels of the short side of the smallest picture with a sign
MIN_CONFIDENCE = 0.5  # of lines that count as found
NAME_SAID = re.compile(re.escape(say_name("THING", "NAME")).replace("THING", "[a-z ]+").replace("NAME", "[^.]+"))
SIGN_SAID = say_sign("").partition('"')[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--world", type=int, default=TEST[0], choices=sorted(HELD_OUT))
    args = parser.parse_args()
    scenes = list_scenes(args.scenes, world=args.world)
    captions = {name: [caption_scene(name, scene, 0) for scene in scenes] for name in TEACHERS}
    groups = list(zip(*captions.values(), strict=True))
    named = [draw_sample(scene.index, make_corpus(scene, named_share=1.0)) for scene in scenes]
    signed = [draw_sample(scene.index, make_corpus(scene, sign_share=1.0, short_side=SIGNED_SIDE)) for scene in scenes]
    plain = [draw_sample(scene.index, make_corpus(scene, short_side=SIGNED_SIDE)) for scene in scenes]
    read, read_plain = ([find_lines(sample) for sample in samples] for samples in (signed, plain))
    engine = open_engine(args.model)
    try:
        fused = answer(engine, "scenes_fuse", [{"captions": group} for group in groups])
        german = answer(engine, "scenes_translate", [{"caption": (text,)} for text in captions[TRANSLATED]])
        realigned = answer(engine, "scenes_realign", [{}] * len(named), named)
        with_ocr = answer(engine, "scenes_text", [{"seen": lines} for lines in read], signed)
        without = answer(engine, "scenes_text", [{"seen": ()}] * len(signed), signed)
        unsigned = answer(engine, "scenes_text", [{"seen": lines} for lines in read_plain], plain)
    finally:
        engine.close()
    captions |= {"majority": [merge_captions(group) for group in groups], "fused": fused}
    figures = {name: measure_captions(texts, world=args.world) for name, texts in captions.items()}
    print_table(figures)
    best = max(TEACHERS, key=lambda name: figures[name].f1)
    gains = [
        measure_caption(text, scene).total.f1 - measure_caption(other, scene).total.f1
        for text, other, scene in zip(fused, captions[best], scenes, strict=True)
    ]
    print(f"fused over {best}, the best teacher: F1 {describe_mean(gains, sign='+')}")
    same = [has_same_claims(text, source) for text, source in zip(german, captions[TRANSLATED], strict=True)]
    print(f"translated with the same claims: {describe_mean(same)}")
    right, wrong = measure_names(realigned, scenes)
    print(f"right names kept: {describe_shares(right)}; wrong ones: {describe_shares(wrong)}")
    signs = {name: measure_signs(texts, scenes) for name, texts in (("with ocr", with_ocr), ("without", without))}
    texts_on_signs = [draw_sign_text(scene.seed, scene.index) for scene in scenes]
    signs["ocr alone"] = [lines == (text,) for lines, text in zip(read, texts_on_signs, strict=True)]
    print(f"signs read: {'; '.join(f'{name} {describe_mean(values)}' for name, values in signs.items())}")
    signs["of none"] = [SIGN_SAID in text for text in unsigned]
    print(f"signs said of pictures without one: {describe_mean(signs['of none'])}")
    lines = {name: round_figures(quality) for name, quality in figures.items()}
    figures_of_words = {
        "right names": fmean(chain.from_iterable(right)),
        "wrong names": fmean(chain.from_iterable(wrong)),
    }
    figures_of_words |= {f"signs {name}": fmean(values) for name, values in signs.items()}
    means = {"gain": fmean(gains), "translated": fmean(same), **figures_of_words}
    print(json.dumps({"benchmark": "reader", "captions": lines, **means}))


def make_corpus(scene: Scene, **options: Any) -> Config:
    return replace(CORPUS, seed=scene.seed, **options)


def find_lines(sample: Raw) -> tuple[str, ...]:
    """What the finder `ocr` reads in a picture."""
    picture = Image.open(io.BytesIO(sample.data or b"")).convert("RGB")
    return tuple(found.text or "" for found in ocr.read_lines(picture, lock=Lock(), min_confidence=MIN_CONFIDENCE))


def answer(engine: Engine, recipe: str, given: Sequence[Texts], samples: Sequence[Raw] | None = None) -> list[str]:
    """A model's answers to the prompts of a recipe about samples; without these, the prompts show no picture."""
    loaded = recipes.load(recipe, run=MANIFEST)

    def requests() -> Iterator[Request]:
        for number, texts in enumerate(given):
            sample = samples[number] if samples else None
            prompt = loaded.build_prompt(sample.alt_text if sample else None, texts).prompt
            images = (sample.data,) if sample and sample.data else ()
            rungs = loaded.spec.sampling.rungs[:1]
            yield Request(id=str(number), prompt=prompt, images=images, ladder=rungs, seed=number)

    return [reply.text for reply in engine.generate(requests())]


def describe_mean(values: Sequence[float], *, sign: str = "") -> str:
    """The mean with its 95 % interval over scenes."""
    low, high = bootstrap_interval(lambda drawn: fmean(values[i] for i in drawn), len(values))
    return f"{fmean(values):{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def describe_shares(values: Sequence[Sequence[bool]]) -> str:
    """The share over all scenes' values with its 95 % interval over scenes."""

    def share(drawn: Sequence[int]) -> float:
        some = [value for i in drawn for value in values[i]]
        return fmean(some) if some else 0.0

    low, high = bootstrap_interval(share, len(values))
    return f"{share(range(len(values))):.3f} ({low:.3f} to {high:.3f})"


def measure_names(captions: Sequence[str], scenes: Sequence[Scene]) -> tuple[list[list[bool]], list[list[bool]]]:
    """For each scene, of each right name whether it is kept, and of each wrong one; others that are said are wrong."""
    right, wrong = list[list[bool]](), list[list[bool]]()
    for text, scene in zip(captions, scenes, strict=True):
        names = name_things(scene)
        given = {say_name(named.thing, named.name) for named in names}
        right.append([say_name(named.thing, named.name) in text for named in names if named.is_right])
        kept = [re.search(rf"\b{named.name}\b", text) is not None for named in names if not named.is_right]
        wrong.append([*kept, *(True for said in NAME_SAID.findall(text) if said not in given)])
    return right, wrong


def measure_signs(captions: Sequence[str], scenes: Sequence[Scene]) -> list[bool]:
    return [
        say_sign(draw_sign_text(scene.seed, scene.index)) in text for text, scene in zip(captions, scenes, strict=True)
    ]


def has_same_claims(german: str, english: str) -> bool:
    parsed = parse_caption(translate_back(german))
    return not parsed.unparsed and parsed.claims == parse_caption(english).claims


if __name__ == "__main__":
    main()
