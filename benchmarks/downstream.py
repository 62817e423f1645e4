"""What captions teach: a small dual encoder is trained on captions of each arm, then finds pictures by descriptions.

All arms have the same pictures of the scenes world, the same encoder, first weights and number of pairs. They differ in
texts, and in how often a picture is drawn: alt text; the captioner's teacher; the captioner, all of its captions, those
that the demo's rule keeps, as many at random, all drawn by the judge's soft score, as many as the rule keeps but the
best of each length, those that it keeps drawn so that lengths are as common as in all; and true descriptions, of whose
sentences 0 to 40 % have a wrong word. The captioner is judged as the demo has it; only true descriptions use the truth.

Measured is retrieval at 1, both ways, among pictures of a world that nothing was trained on and their true
descriptions, also by the number of things; beside it, how often a true sentence is nearer to its picture than the same
sentence with one wrong word. Outcomes are recorded, and recorded ones are skipped, so that the table can grow over
days. The last line is JSON.

    python -m benchmarks.downstream                      # prints the recorded outcomes
    python -m benchmarks.downstream FOLDER [--seeds 5] [--arms NAME ...] [--scenes 4000] [--steps 600]

FOLDER keeps captions and scores, as those of benchmarks.coverage, which it shares.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from benchmarks.coverage import JudgedCaption, passes_demo_rule, read_captions
from benchmarks.held_out import list_scenes, read_alt_text, render_image
from benchmarks.worlds import TEST
from pipeline.progress import say
from pipeline.sources.scenes import Scene
from pipeline.storage.sentences import split_sentences
from stages.scenes.claims import group_claims, list_facts, write_sentence
from stages.scenes.teachers import caption_scene, swap_word

RESULTS = Path(__file__).parent / "results" / "downstream.jsonl"
TEST_WORLD, NUM_TEST = TEST[0], 1000
SIDE = 64  # pixels of a picture
CHANNELS = (16, 32, 64, 128)
WIDTH, MAX_WORDS, DIMENSIONS = 128, 112, 128
BATCH = 128
CROWDED = 4  # things
DOSES = (0, 10, 20, 40)  # percent of the sentences of true descriptions that have a wrong word
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t by the number of seeds

CAPTIONS_ARM, KEPT_ARM, RANDOM_ARM = "captioner, all", "captioner, kept", "captioner, as many at random"
TRUTH_ARM = "truth"
COMPARISONS = (
    (CAPTIONS_ARM, "alt text"),
    (CAPTIONS_ARM, "teacher"),
    (KEPT_ARM, RANDOM_ARM),
    (KEPT_ARM, CAPTIONS_ARM),
    ("captioner, soft score", CAPTIONS_ARM),
    ("captioner, balanced", CAPTIONS_ARM),
    ("captioner, weighted", CAPTIONS_ARM),
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Texts to learn from."""

    texts: Sequence[str]  # by picture
    weights: Sequence[float]  # how often each is drawn, in proportion; 0: never


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The measures of one training."""

    arm: str
    seed: int
    scenes: int
    steps: int
    pairs: int  # distinct pictures that may be drawn
    to_image: float  # retrieval at 1 of the picture by its description
    to_text: float  # of the description by its picture
    few_things: float  # retrieval at 1, mean of both ways, of pictures with fewer than CROWDED things
    many_things: float
    swaps: float  # share of true sentences that are nearer than with a wrong word
    seconds: float

    @property
    def retrieval(self) -> float:
        return (self.to_image + self.to_text) / 2


def describe_scene(scene: Scene, *, rng: Random, wrong: float = 0.0) -> str:
    """A true description in one style; a share of its sentences, drawn by `rng`, have a wrong word."""
    sentences, style = [], Random(0)
    for group in group_claims(list_facts(scene)):
        if rng.random() < wrong:
            with suppress(ValueError):  # no word of it can be wrong
                group = swap_word(group, scene, rng)
        sentences.append(write_sentence(group, style))
    return " ".join(sentences)


def make_arms(captions: Sequence[JudgedCaption], *, seed: int) -> dict[str, Arm]:
    """The arms over as many scenes as there are captions."""
    num, rng = len(captions), Random(seed)
    scenes, texts, every = list_scenes(num), [one.text for one in captions], [1.0] * num
    kept = [float(passes_demo_rule(one)) for one in captions]
    chosen = set(rng.sample(range(num), int(sum(kept))))
    soft = [next(score.value or 0.0 for score in one.scores if score.name == "soft") for one in captions]
    lengths = [len(split_sentences(text)) for text in texts]
    arms = {
        "alt text": Arm(texts=[read_alt_text(index) for index in range(num)], weights=every),
        "teacher": Arm(texts=[caption_scene("hasty", scene, 0) for scene in scenes], weights=every),
        CAPTIONS_ARM: Arm(texts=texts, weights=every),
        KEPT_ARM: Arm(texts=texts, weights=kept),
        RANDOM_ARM: Arm(texts=texts, weights=[float(index in chosen) for index in range(num)]),
        "captioner, soft score": Arm(texts=texts, weights=soft),
        "captioner, balanced": Arm(texts=texts, weights=keep_best_of_each(soft, lengths, share=fmean(kept))),
        "captioner, weighted": Arm(texts=texts, weights=restore_mix(kept, lengths)),
    }
    for percent in DOSES:
        name = f"{TRUTH_ARM}, {percent} % wrong" if percent else TRUTH_ARM
        written = [describe_scene(s, rng=Random(f"{percent}/{i}"), wrong=percent / 100) for i, s in enumerate(scenes)]
        arms[name] = Arm(texts=written, weights=every)
    return arms


def keep_best_of_each(values: Sequence[float], groups: Sequence[int], *, share: float) -> list[float]:
    """1 for the best `share` of each group by value, 0 for the others."""
    weights = [0.0] * len(values)
    for group in set(groups):
        ranked = sorted((i for i, other in enumerate(groups) if other == group), key=lambda i: -values[i])
        for index in ranked[: round(share * len(ranked))]:
            weights[index] = 1.0
    return weights


def restore_mix(kept: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Weights of what is kept with which each group is drawn as often as it occurs in all."""
    total: dict[int, float] = defaultdict(float)
    left: dict[int, float] = defaultdict(float)
    for weight, group in zip(kept, groups, strict=True):
        total[group] += 1.0
        left[group] += weight
    return [weight * total[group] / max(1.0, left[group]) for weight, group in zip(kept, groups, strict=True)]


class Vocabulary:
    """The numbers of words; 0 is no word, 1 an unknown one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._numbers = {word: i for i, word in enumerate(sorted({w for t in texts for w in split_text(t)}), start=2)}

    def __len__(self) -> int:
        return len(self._numbers) + 2

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 [texts, MAX_WORDS]."""
        rows = torch.zeros(len(texts), MAX_WORDS, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            numbers = [self._numbers.get(word, 1) for word in split_text(text)[:MAX_WORDS]] or [1]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


def split_text(text: str) -> list[str]:
    return re.findall(r"\w+|[.,]", text.lower())


class DualEncoder(nn.Module):  # type: ignore[misc]
    """A convolutional encoder of pictures and a transformer over words, trained by the symmetric contrastive loss of
    CLIP (arXiv 2103.00020, figure 3)."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(4, after), nn.GELU()]
        self.picture = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * (SIDE // 16) ** 2, DIMENSIONS))
        self.words = nn.Embedding(num_words, WIDTH, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_WORDS, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.text_out = nn.Linear(WIDTH, DIMENSIONS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [pictures, 3, SIDE, SIDE] -> unit vectors [pictures, DIMENSIONS]."""
        return functional.normalize(self.picture(pictures.float() / 127.5 - 1.0), dim=-1)

    def encode_texts(self, words: torch.Tensor) -> torch.Tensor:
        """int64 [texts, MAX_WORDS] -> unit vectors [texts, DIMENSIONS]."""
        words = words[:, : int((words > 0).sum(1).max())]
        there = words > 0
        hidden = self.text(self.words(words) + self.places[: words.shape[1]], src_key_padding_mask=~there)
        hidden = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return functional.normalize(self.text_out(hidden), dim=-1)

    def forward(self, pictures: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The loss of pairs."""
        near = self.log_scale.exp().clamp(max=100.0) * self.encode_pictures(pictures) @ self.encode_texts(words).T
        own = torch.arange(len(near))
        return (functional.cross_entropy(near, own) + functional.cross_entropy(near.T, own)) / 2


def render_pictures(num: int, *, world: int | None = None) -> torch.Tensor:
    """uint8 [num, 3, SIDE, SIDE]."""
    pixels = np.empty((num, SIDE, SIDE, 3), np.uint8)
    for index in range(num):
        data = render_image(index) if world is None else render_image(index, world=world)
        with Image.open(BytesIO(data)) as image:
            pixels[index] = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def train_encoder(arm: Arm, pictures: torch.Tensor, vocabulary: Vocabulary, *, seed: int, steps: int) -> DualEncoder:
    torch.manual_seed(seed)
    model, words = DualEncoder(len(vocabulary)), vocabulary.encode(arm.texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    rng, chances = np.random.default_rng(seed), np.array(arm.weights) / sum(arm.weights)
    for _ in range(steps):
        drawn = torch.from_numpy(rng.choice(len(chances), BATCH, p=chances))
        optimizer.zero_grad()
        model(pictures[drawn], words[drawn]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return model


@torch.no_grad()  # type: ignore[untyped-decorator]
def measure_encoder(model: DualEncoder, pictures: torch.Tensor, vocabulary: Vocabulary) -> dict[str, float]:
    """The measures on pictures 0, 1, ... of the test world."""
    scenes = list_scenes(len(pictures), world=TEST_WORLD)
    texts = [describe_scene(scene, rng=Random(0)) for scene in scenes]
    seen = torch.cat([model.encode_pictures(part) for part in pictures.split(BATCH)])
    read = torch.cat([model.encode_texts(part) for part in vocabulary.encode(texts).split(BATCH)])
    near, own = seen @ read.T, torch.arange(len(scenes))
    to_text, to_image = ((matrix.argmax(1) == own).float() for matrix in (near, near.T))
    both, crowded = (to_text + to_image) / 2, torch.tensor([len(scene.things) >= CROWDED for scene in scenes])
    return {
        "to_image": float(to_image.mean()),
        "to_text": float(to_text.mean()),
        "few_things": float(both[~crowded].mean()),
        "many_things": float(both[crowded].mean()),
        "swaps": measure_swaps(model, seen, scenes, vocabulary),
    }


def measure_swaps(model: DualEncoder, seen: torch.Tensor, scenes: Sequence[Scene], vocabulary: Vocabulary) -> float:
    right: list[str] = []
    wrong: list[str] = []
    place: list[int] = []
    rng = Random(0)
    for index, scene in enumerate(scenes):
        for group in group_claims(list_facts(scene)):
            try:
                other = swap_word(group, scene, rng)
            except ValueError:
                continue
            right.append(write_sentence(group, Random(0)))
            wrong.append(write_sentence(other, Random(0)))
            place.append(index)
    vectors = [
        torch.cat([model.encode_texts(part) for part in vocabulary.encode(texts).split(BATCH)])
        for texts in (right, wrong)
    ]
    near_right, near_wrong = ((seen[place] * one).sum(1) for one in vectors)
    return float((near_right > near_wrong).float().mean())


def read_outcomes() -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run_missing(folder: Path, *, num_scenes: int, steps: int, seeds: int, names: Sequence[str] | None) -> None:
    """Trains, measures and records what is not recorded yet."""
    done = {(one.arm, one.seed, one.scenes, one.steps) for one in read_outcomes()}
    captions = read_captions(folder, "captioner", num_scenes=num_scenes)
    pictures, tests = render_pictures(num_scenes), render_pictures(NUM_TEST, world=TEST_WORLD)
    for seed in range(seeds):
        arms = make_arms(captions, seed=seed)
        vocabulary = Vocabulary([text for arm in arms.values() for text in arm.texts])
        for name, arm in arms.items():
            if (name, seed, num_scenes, steps) in done or (names is not None and name not in names):
                continue
            start = time.perf_counter()
            model = train_encoder(arm, pictures, vocabulary, seed=seed, steps=steps)
            figures = {key: round(value, 4) for key, value in measure_encoder(model, tests, vocabulary).items()}
            outcome = Outcome(
                arm=name,
                seed=seed,
                scenes=num_scenes,
                steps=steps,
                pairs=sum(weight > 0 for weight in arm.weights),
                seconds=round(time.perf_counter() - start, 1),
                **figures,
            )
            say(f"{name}, seed {seed}: retrieval {outcome.retrieval:.3f} in {outcome.seconds:.0f} s")
            with RESULTS.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A table of arms, and the paired differences, for each number of scenes and steps."""
    for sizes in sorted({(one.scenes, one.steps) for one in outcomes}):
        own = [one for one in outcomes if (one.scenes, one.steps) == sizes]
        by_arm: Mapping[str, dict[int, Outcome]] = defaultdict(dict)
        for one in own:
            by_arm[one.arm][one.seed] = one
        print(f"\n{sizes[0]} pictures, {sizes[1]} steps of {BATCH} pairs; retrieval at 1 of {NUM_TEST}")
        heads = {"to image": 10, "to text": 9, "1-3": 7, "4-6": 7, "swaps": 8}
        print(f"{'arm':30}{'seeds':>6}{'pairs':>7}{'both ways':>16}" + "".join(f"{h:>{w}}" for h, w in heads.items()))
        for name, seeds in by_arm.items():
            runs = list(seeds.values())
            values = [one.retrieval for one in runs]
            spread = stdev(values) if len(values) > 1 else 0.0
            parts = [
                fmean(getattr(one, key) for one in runs)
                for key in ("to_image", "to_text", "few_things", "many_things", "swaps")
            ]
            cells = "".join(f"{value:{width}.3f}" for value, width in zip(parts, (10, 9, 7, 7, 8), strict=True))
            print(f"{name:30}{len(runs):6}{runs[0].pairs:7}{fmean(values):8.3f} ± {spread:.3f}{cells}")
        for name, other in COMPARISONS:
            if line := compare_arms(by_arm.get(name, {}), by_arm.get(other, {})):
                print(f"{name} over {other}: {line}")


def compare_arms(arm: Mapping[int, Outcome], other: Mapping[int, Outcome]) -> str:
    """The paired difference in retrieval with its 95 % interval over seeds, in points; "" for fewer than two seeds."""
    differences = [100 * (arm[seed].retrieval - other[seed].retrieval) for seed in arm.keys() & other.keys()]
    if len(differences) < 2:
        return ""
    half = T95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
    return f"{fmean(differences):+.1f} points ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="with captions and scores; without it, only print tables")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", help="by default all")
    args = parser.parse_args()
    if args.folder is not None:
        run_missing(args.folder, num_scenes=args.scenes, steps=args.steps, seeds=args.seeds, names=args.arms)
    outcomes = read_outcomes()
    print_outcomes(outcomes)
    print(json.dumps({"benchmark": "downstream", "outcomes": [asdict(one) for one in outcomes]}))


if __name__ == "__main__":
    main()
