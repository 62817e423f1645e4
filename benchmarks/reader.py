"""Measures a model that reads: it fuses captions, translates them, keeps names that fit and says what signs say.

It fuses the captions of the five teachers without the picture; by the truth, the fused captions stand beside the
teachers' and beside what a majority of them says. It translates the captions of one teacher into German; each is turned
back into English by the grammar, and counted where it claims what the caption claims and nothing else. Of the names in
an alt text, which no pixel shows, those of things that are in the picture are right: one is kept when the caption says
it of its thing, a wrong one when it occurs at all. A sign is read when the caption has its words letter by letter,
given what the finder `ocr` found in the picture, or nothing. The last line is JSON.

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
    read = [find_lines(sample) for sample in signed]
    engine = open_engine(args.model)
    try:
        fused = answer(engine, "scenes_fuse", [{"captions": group} for group in groups])
        german = answer(engine, "scenes_translate", [{"caption": (text,)} for text in captions[TRANSLATED]])
        realigned = answer(engine, "scenes_realign", [{}] * len(named), named)
        with_ocr = answer(engine, "scenes_text", [{"seen": lines} for lines in read], signed)
        without = answer(engine, "scenes_text", [{"seen": ()}] * len(signed), signed)
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
    print(f"right names kept: {describe_mean(right)}; wrong ones: {describe_mean(wrong)}")
    signs = {name: measure_signs(texts, scenes) for name, texts in (("with ocr", with_ocr), ("without", without))}
    print(f"signs read: {'; '.join(f'{name} {describe_mean(values)}' for name, values in signs.items())}")
    lines = {name: round_figures(quality) for name, quality in figures.items()}
    figures_of_words = {"right names": fmean(right), "wrong names": fmean(wrong)}
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


def measure_names(captions: Sequence[str], scenes: Sequence[Scene]) -> tuple[list[bool], list[bool]]:
    """Of each right name whether it is kept, and of each wrong one."""
    right, wrong = list[bool](), list[bool]()
    for text, scene in zip(captions, scenes, strict=True):
        for named in name_things(scene):
            if named.is_right:
                right.append(say_name(named.thing, named.name) in text)
            else:
                wrong.append(re.search(rf"\b{named.name}\b", text) is not None)
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
