"""Measures a model that reads: captions that it fuses, and captions that it translates. The last line is JSON.

It fuses the captions of the five teachers without the picture; by the truth, the fused captions stand beside the
teachers' and beside what a majority of them says. It translates the captions of one teacher into German; each is turned
back into English by the grammar, and counted where it claims what the caption claims and nothing else.

    python -m benchmarks.reader MODEL [--scenes 1000] [--world 91001]

MODEL is one of manifests/scenes-reader.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean

from benchmarks.held_out import (
    bootstrap_interval,
    list_scenes,
    measure_captions,
    open_engine,
    print_table,
    round_figures,
)
from benchmarks.worlds import HELD_OUT, TEST
from pipeline.engines import Engine, Request
from stages import recipes
from stages.scenes.claims import parse_caption
from stages.scenes.german import translate_back
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import TEACHERS, caption_scene, merge_captions
from stages.text.given import Texts

MANIFEST = Path(str(resources.files("manifests") / "scenes-reader"))
TRANSLATED = "hasty"  # the teacher whose captions are translated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--world", type=int, default=TEST[0], choices=sorted(HELD_OUT))
    args = parser.parse_args()
    scenes = list_scenes(args.scenes, world=args.world)
    captions = {name: [caption_scene(name, scene, 0) for scene in scenes] for name in TEACHERS}
    groups = list(zip(*captions.values(), strict=True))
    engine = open_engine(args.model)
    try:
        fused = answer(engine, "scenes_fuse", ({"captions": group} for group in groups))
        german = answer(engine, "scenes_translate", ({"caption": (text,)} for text in captions[TRANSLATED]))
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
    lines = {name: round_figures(quality) for name, quality in figures.items()}
    print(json.dumps({"benchmark": "reader", "captions": lines, "gain": fmean(gains), "translated": fmean(same)}))


def answer(engine: Engine, recipe: str, given: Iterable[Texts]) -> list[str]:
    """A model's answers to the prompts of a recipe, which show no picture."""
    loaded = recipes.load(recipe, run=MANIFEST)

    def requests() -> Iterator[Request]:
        for number, texts in enumerate(given):
            prompt = loaded.build_prompt(None, texts).prompt
            yield Request(id=str(number), prompt=prompt, ladder=loaded.spec.sampling.rungs[:1], seed=number)

    return [reply.text for reply in engine.generate(requests())]


def describe_mean(values: Sequence[float], *, sign: str = "") -> str:
    """The mean with its 95 % interval over scenes."""
    low, high = bootstrap_interval(lambda drawn: fmean(values[i] for i in drawn), len(values))
    return f"{fmean(values):{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def has_same_claims(german: str, english: str) -> bool:
    parsed = parse_caption(translate_back(german))
    return not parsed.unparsed and parsed.claims == parse_caption(english).claims


if __name__ == "__main__":
    main()
