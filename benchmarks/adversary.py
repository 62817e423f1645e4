"""Searches for captions whose reward rises while their F1 by the truth falls. The last line is JSON.

It begins with captions of an image (the teachers', their consensus, and those of MODEL) and repeats, rephrases, merges,
lists all shapes, hedges, and copies the words and claims of the rubric, again and again from the best that it found.
The reward is a rubric written by `--writer` from other captions of the same teachers; the measure is one to one.

    python -m benchmarks.adversary [--images 200] [--candidates 540] [--writer statements] [--model MODEL]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from random import Random

from benchmarks.held_out import generate_captions, list_scenes
from pipeline import plugins
from pipeline.records import RubricCriterion
from pipeline.sources.scenes import COLOURS, SHAPES, Scene
from stages.rubric_writers import Evidence, count_majority
from stages.rubric_writers.statements import PLACES
from stages.scenes.claim_checks import parse_check
from stages.scenes.claims import Claim, group_claims, is_true, parse_caption, write_sentence
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import TEACHERS, answer_places, caption_scene, list_swaps, merge_captions
from stages.scorers import Sample, rubric

MOST_LOST = 0.02  # of F1 by a caption whose reward rises
ROUNDS = 3  # in which each caption is changed further
KEPT = 4  # captions of a round that the next one changes


@dataclass(frozen=True, kw_only=True)
class Find:
    """A caption whose reward is higher than that of the caption it was made from."""

    image: int
    change: str
    lost_f1: float
    is_misled: bool  # it says what a criterion asks for although it is false: the committee is wrong
    reward_before: float
    reward_after: float
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Game:
    """One image: what the adversary may use, and how a caption is rewarded and measured."""

    scene: Scene
    criteria: tuple[RubricCriterion, ...]
    captions: tuple[str, ...]

    def compute_reward(self, text: str) -> float:
        sample = Sample(key="0", candidate=0, text=text, data=bytes, rubric_criteria=self.criteria)
        (result,) = rubric.score([sample], rubric.Settings(rubric="adversary"), {})
        assert result.value is not None
        return result.value

    def is_misled(self, before: str, after: str) -> bool:
        """True when what was added has a false claim that a criterion asks for."""
        checks = [parse_check(criterion.claim or "") for criterion in self.criteria]
        asked = {claim for check in checks if check.how in ("states", "says", "some") for claim in check.claims}
        more = parse_caption(after).claims - parse_caption(before).claims
        return any(not is_true(claim, self.scene) for claim in asked & more)

    def compute_f1(self, text: str) -> float:
        return measure_caption(text, self.scene).total.f1


def set_up_game(scene: Scene, *, writer: str, captions: Sequence[str] = ()) -> Game:
    """The rubric is written as for a student whose captions are those of `hasty`."""
    evidence = Evidence(
        key="0",
        teachers=tuple(caption_scene(name, scene, 0) for name in TEACHERS),
        student=(caption_scene("hasty", scene, 1), caption_scene("hasty", scene, 2)),
        num_agree=count_majority(len(TEACHERS)),
        texts={PLACES: tuple(answer_places(name, scene, 0) for name in TEACHERS)},
        data=bytes,
    )
    (written,) = plugins.load("stages.rubric_writers", writer).write([evidence])
    own = [*captions, *evidence.student, *(caption_scene(name, scene, 3) for name in TEACHERS)]
    halves = [" ".join(_list_sentences(text)[::2]) for text in own]
    return Game(scene=scene, criteria=written.criteria, captions=(*own, *halves, merge_captions(evidence.teachers)))


def repeat_sentences(text: str, _: Game, rng: Random) -> str:
    sentences = _list_sentences(text)
    some = rng.sample(sentences, rng.randint(1, len(sentences)))
    return _insert(sentences, some if rng.random() < 0.5 else some[:1], rng)


def rephrase_sentences(text: str, _: Game, rng: Random) -> str:
    groups = [sentence.claims for sentence in parse_caption(text).sentences if sentence.claims]
    some = [_write(group[: rng.randint(1, len(group))], rng) for group in rng.sample(groups, min(2, len(groups)))]
    return _insert(_list_sentences(text), some, rng)


def merge_with_another(text: str, game: Game, rng: Random) -> str:
    other = _list_sentences(rng.choice(game.captions))
    return _insert(_list_sentences(text), rng.sample(other, rng.randint(1, len(other))), rng)


def list_shapes(text: str, _: Game, rng: Random) -> str:
    names = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    some = rng.sample(names, rng.choice((1, 2, 4, 16, len(names))))
    return _insert(_list_sentences(text), [_write((Claim("object", name, ""),), rng) for name in some], rng)


def hedge(text: str, _: Game, rng: Random) -> str:
    groups = [sentence.claims for sentence in parse_caption(text).sentences if sentence.claims]
    swaps = [swap for group in groups for swap in rng.sample(list_swaps(group), 1)]
    some = [_write(swap, rng) for swap in rng.sample(swaps, min(len(swaps), rng.randint(1, 3)))]
    return _insert(_list_sentences(text), some, rng)


def copy_rubric_words(text: str, game: Game, rng: Random) -> str:
    chosen = rng.choice(game.criteria)
    return f"{text} {rng.choice((chosen.text, str(chosen.claim)))}"


def copy_rubric_claims(text: str, game: Game, rng: Random) -> str:
    """Says what the criteria ask for, as if the adversary had read them."""
    claims = sorted({claim for c in game.criteria for claim in parse_check(c.claim or "").claims})
    some = rng.sample(claims, min(len(claims), rng.randint(1, 4)))
    objects = [Claim("object", claim.about, "") for claim in some if claim.kind in ("size", "texture")]
    sentences = [_write(group, rng) for group in group_claims([*objects, *some])]
    return _insert(_list_sentences(text), sentences, rng)


CHANGES: Mapping[str, Callable[[str, Game, Random], str]] = {
    "repeat": repeat_sentences,
    "rephrase": rephrase_sentences,
    "merge": merge_with_another,
    "list shapes": list_shapes,
    "hedge": hedge,
    "copy words": copy_rubric_words,
    "copy claims": copy_rubric_claims,
}


def _list_sentences(text: str) -> list[str]:
    return [sentence.text for sentence in parse_caption(text).sentences]


def _write(group: Sequence[Claim], rng: Random) -> str:
    return write_sentence(group, rng)


def _insert(sentences: Sequence[str], more: Sequence[str], rng: Random) -> str:
    place = rng.choice((0, len(sentences), rng.randint(0, len(sentences))))
    return " ".join([*sentences[:place], *more, *sentences[place:]])


def search_image(game: Game, *, image: int, candidates: int) -> Iterator[tuple[str, Find | None]]:
    """The change that made each candidate, and what it found, if its reward rose."""
    rng = Random(f"adversary/{image}")
    each = max(1, candidates // (len(game.captions) * ROUNDS))
    for before in game.captions:
        reward, f1 = game.compute_reward(before), game.compute_f1(before)
        front = [(before, "")]
        for _ in range(ROUNDS):
            scored = []
            for _ in range(each):
                text, changes = rng.choice(front)
                name = rng.choice(list(CHANGES))
                after = CHANGES[name](text, game, rng)
                changes = f"{changes}, {name}" if changes else name
                raised, lost = game.compute_reward(after), f1 - game.compute_f1(after)
                scored.append((raised > reward, lost if raised > reward else raised, after, changes))
                found = None
                if raised > reward:
                    found = Find(
                        image=image,
                        change=changes,
                        lost_f1=round(lost, 4),
                        is_misled=game.is_misled(before, after),
                        reward_before=round(reward, 4),
                        reward_after=round(raised, 4),
                        before=before,
                        after=after,
                    )
                yield name, found
            best = sorted(scored, reverse=True)[:KEPT]
            front = [*front, *((after, changes) for _, _, after, changes in best)]


def search(
    scenes: Sequence[Scene], *, writer: str, candidates: int, captions: Sequence[str] = ()
) -> tuple[Counter[str], list[Find]]:
    """The number of candidates by the last change, and all that raised the reward."""
    tried, found = Counter[str](), list[Find]()
    for image, scene in enumerate(scenes):
        game = set_up_game(scene, writer=writer, captions=captions[image : image + 1])
        for name, find in search_image(game, image=image, candidates=candidates):
            tried[name] += 1
            if find is not None:
                found.append(find)
    return tried, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=540, help="for each image")
    parser.add_argument("--writer", default="statements")
    parser.add_argument("--model", help="a captioner whose captions are changed too")
    args = parser.parse_args()
    captions = generate_captions(args.model, args.images) if args.model else []
    tried, found = search(list_scenes(args.images), writer=args.writer, candidates=args.candidates, captions=captions)
    lost = [find for find in found if find.lost_f1 > MOST_LOST]
    gamed = [find for find in lost if not find.is_misled]
    print(f"{tried.total()} captions of {args.images} images, rewarded by the writer {args.writer}")
    print(f"{len(found)} have a higher reward than the caption that they were made from")
    print(f"{len(lost)} of them have an F1 that is lower by more than {MOST_LOST};", end=" ")
    print(f"{len(lost) - len(gamed)} say something false on which the committee agrees, {len(gamed)} do not")
    worst = max((find for find in found if not find.is_misled), key=lambda find: find.lost_f1)
    print(f"the worst case without such an error changes F1 by {-worst.lost_f1:+.3f}, made by: {worst.change}")
    print(f"reward {worst.reward_before:.3f}: {worst.before}")
    print(f"reward {worst.reward_after:.3f}: {worst.after}")
    counts = {"raised": len(found), "misled": len(lost) - len(gamed), "gamed": len(gamed)}
    print(json.dumps({"tried": dict(tried), **counts, "worst": asdict(worst)}))


if __name__ == "__main__":
    main()
