"""Compares the forms of a judge's verdicts on captions of held-out scenes: as written, and by probability.

For each form: how well the score ranks wholly right captions before the others (area under the ROC curve), how many of
the best half are wholly right, the balanced accuracy on the captions' sentences, output tokens of a sentence, and
tokens, CPU time and seconds beside those of the written form, which takes turns with the others. The score is the
product over sentences; "nothing twice" ranks captions that repeat a sentence last. Then, for the best half of all and
the best half of the captions with as many sentences, as `[filter] balance` keeps: how many are wholly right, and how
much of the corpus's share of crowded pictures is left. The last line is JSON.

With --vllm the models run in vLLM (`make vllm`), and a last table has what judging four candidates of an image costs
beside judging one, in turns on pictures that were not seen before, as the judge sees them and enlarged.

    python -m benchmarks.verdicts [--scenes 1000] [--judge MODEL] [--captioner MODEL] [--vllm]
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks.engine import read_cpu_seconds
from benchmarks.held_out import generate_captions, list_scenes, make_parser, make_samples, open_engine, render_image
from pipeline.engines import Engine, vllm
from pipeline.sources import scenes as scenes_source
from pipeline.storage.sentences import split_sentences
from stages.scenes.measure import measure_caption
from stages.scenes.teachers import answer_statement
from stages.scorers import Sample, ScoreResult, judge

FORMS: Mapping[str, Mapping[str, Any]] = {
    "written": {},
    "logprob": {"verdict": "logprob"},
    "logprob, no reasons": {"verdict": "logprob", "reasons": False},
}


BLOCK = 20  # scenes that a form judges before it is another's turn
EDGES = {"as shipped": None, "enlarged": 640}  # pictures -> pixels of an edge as the judge sees them; None: its own
NUM_CANDIDATES = 4
PICTURES, TURNS, WARM_UP = 8, 4, 1  # of a turn, and turns for each number of candidates
# Pictures that do not fit into a step of vLLM begin it with the text before them, and are not shared then.
OPTIONS = {"max_num_batched_tokens": 16384}


@dataclass(kw_only=True)
class Cost:
    """The cost of requests."""

    cpu: float = 0.0  # seconds, with those of vLLM's processes
    wall: float = 0.0  # seconds
    num_tokens: int = 0  # of output

    def measure(self, judge_samples: Callable[[], Iterable[ScoreResult]]) -> list[ScoreResult]:
        start, spent = time.perf_counter(), sum(read_cpu_seconds())
        results = list(judge_samples())
        self.wall += time.perf_counter() - start
        self.cpu += sum(read_cpu_seconds()) - spent
        self.num_tokens += sum(result.num_output_tokens or 0 for result in results)
        return results


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """The results of one form, by caption."""

    results: list[ScoreResult] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


def judge_in_turns(captions: Sequence[str], engine: Engine) -> Mapping[str, FormResult]:
    """Each form judges a block of captions, then the next one; every other block in the opposite order."""
    found = {name: FormResult() for name in FORMS}
    settings = {name: prepare_form(form) for name, form in FORMS.items()}
    samples = list(make_samples(captions))
    for form in settings.values():  # each compiles its grammar, which is not measured
        list(judge.score(samples[:1], form, {"judge": engine}))
    for turn, start in enumerate(range(0, len(samples), BLOCK)):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            work = partial(judge.score, samples[start : start + BLOCK], settings[name], {"judge": engine})
            found[name].results.extend(found[name].cost.measure(work))
    return found


def prepare_form(form: Mapping[str, Any]) -> judge.Settings:
    settings = judge.prepare(judge.Config(engine="judge", rubric="scenes", **form), run=None, field="benchmark")
    spec = replace(settings.rubric.spec, aggregate="product")
    return replace(settings, rubric=replace(settings.rubric, spec=spec))


def open_vllm(model: str) -> vllm.Vllm:
    return vllm.open(vllm.Config(model=model, max_model_len=2048, extra=OPTIONS))


class TokenCounter:
    """Counts the tokens of prompts that vLLM computes, without those that it has in its cache."""

    def __init__(self, engine: vllm.Vllm) -> None:
        self.num_prompts = self.num_tokens = self.num_new = 0
        self._core = engine._core._engine
        self._generate, self._core.generate = self._core.generate, self._count

    async def _count(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
        async for output in self._generate(*args, **more):
            yield output
        self.num_prompts += 1
        self.num_tokens += len(output.prompt_token_ids)
        self.num_new += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)


def compare_candidates(model: str, captions: Sequence[str], *, edge: int | None) -> dict[str, float]:
    """The cost of judging NUM_CANDIDATES captions of an image beside that of one, by the form with reasons."""
    form = prepare_form(FORMS["logprob"])
    with tempfile.TemporaryDirectory() as folder:
        engine = open_vllm(model if edge is None else str(enlarge_pictures(model, Path(folder) / "judge", edge=edge)))
        try:
            counter = TokenCounter(engine)
            costs, num_new = {1: Cost(), NUM_CANDIDATES: Cost()}, {1: 0, NUM_CANDIDATES: 0}
            for turn in range(2 * (TURNS + WARM_UP)):
                num = NUM_CANDIDATES if turn % 4 in (1, 2) else 1
                samples = list(draw_candidates(captions, turn=turn, num=num, edge=edge))
                before = counter.num_new
                cost = costs[num] if turn >= 2 * WARM_UP else Cost()
                cost.measure(partial(judge.score, samples, form, {"judge": engine}))
                num_new[num] += counter.num_new - before if turn >= 2 * WARM_UP else 0
        finally:
            engine.close()
    return {
        "prompt_tokens": counter.num_tokens / counter.num_prompts,
        "new_token_ratio": num_new[NUM_CANDIDATES] / num_new[1],
        "cpu_ratio": costs[NUM_CANDIDATES].cpu / costs[1].cpu,
        "time_ratio": costs[NUM_CANDIDATES].wall / costs[1].wall,
    }


def enlarge_pictures(model: str, folder: Path, *, edge: int) -> Path:
    """A copy of a model whose processor leaves pictures of `edge` x `edge` pixels as they are. Returns `folder`."""
    shutil.copytree(model, folder)
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["size"] = {"longest_edge": edge * edge, "shortest_edge": edge * edge}
    file.write_text(json.dumps(values))
    return folder


def draw_candidates(captions: Sequence[str], *, turn: int, num: int, edge: int | None) -> Iterator[Sample]:
    """Captions of scenes that no other turn has, `num` of each; most are those of other scenes, as candidates are."""
    for index in range(turn * PICTURES, (turn + 1) * PICTURES):
        data = render_image(index)
        if edge is not None:
            with Image.open(BytesIO(data)) as picture, BytesIO() as file:
                picture.convert("RGB").resize((edge, edge)).save(file, "PNG")
                data = file.getvalue()
        for candidate in range(num):
            text = captions[(index + 31 * candidate) % len(captions)]
            yield Sample(key=f"{index:012d}", candidate=candidate, text=text, data=partial(bytes, data))


def rank_captions(captions: Sequence[str], form: FormResult, *, repeats_last: bool) -> list[float]:
    """The score of each caption, 0 where there is none; with `repeats_last`, repeated sentences come below all."""
    scores = [result.value or 0.0 for result in form.results]
    if not repeats_last:
        return scores
    sentences = [[sentence.casefold() for sentence in split_sentences(text)] for text in captions]
    return [score - (len(set(parts)) < len(parts)) for score, parts in zip(scores, sentences, strict=True)]


def find_best_half(scores: Sequence[float], groups: Sequence[int] | None = None) -> list[int]:
    """The captions with the best scores, as many from each group as it has below its median."""
    members = defaultdict[int, list[int]](list)
    for i in range(len(scores)):
        members[groups[i] if groups else 0].append(i)
    ranked = (sorted(group, key=lambda i: -scores[i]) for group in members.values())
    return [i for group in ranked for i in group[: len(group) // 2]]


def measure_share(flags: Sequence[bool], chosen: Sequence[int]) -> float:
    return sum(flags[i] for i in chosen) / len(chosen)


def main() -> None:
    parser = make_parser(__doc__, num_scenes=1000)
    parser.add_argument("--vllm", action="store_true", help="run the models in vLLM; measure four candidates too")
    args = parser.parse_args()
    open_model: Callable[[str], Engine] = open_vllm if args.vllm else open_engine
    captions = [text or "(nothing)" for text in generate_captions(args.captioner, args.scenes, open_model=open_model)]
    scenes = list_scenes(args.scenes)
    is_right = [measure_caption(text, scene).is_wholly_right for text, scene in zip(captions, scenes, strict=True)]
    truths = [
        answer_statement(sentence, scene)[1]
        for text, scene in zip(captions, scenes, strict=True)
        for sentence in split_sentences(text) or [text]
    ]
    engine = open_model(args.judge)
    try:
        results = judge_in_turns(captions, engine)
    finally:
        engine.close()
    print(f"{args.scenes} captions, {sum(is_right) / len(is_right):.3f} wholly right; {len(truths)} sentences")
    print(f"{'':21}{'ROC area':>10}{'nothing twice':>15}{'best half':>11}{'balanced':>10}", end="")
    print(f"{'tokens':>8}{'ratio':>7}{'CPU':>7}{'time':>7}")
    figures: dict[str, dict[str, float]] = {}
    base = results["written"].cost
    rankings: dict[str, list[float]] = {}
    num_sentences = [len(split_sentences(text)) for text in captions]
    for name, result in results.items():
        plain, ranked = (rank_captions(captions, result, repeats_last=last) for last in (False, True))
        rankings[name] = ranked
        believed = [(criterion.value or 0.0) > 0.5 for one in result.results for criterion in one.criteria]
        figures[name] = {
            "roc_area": roc_auc_score(is_right, plain),
            "roc_area_nothing_twice": roc_auc_score(is_right, ranked),
            "best_half_right": measure_share(is_right, find_best_half(ranked)),
            "balanced_accuracy": balanced_accuracy_score(truths, believed),
            "tokens": result.cost.num_tokens / len(truths),
            "token_ratio": result.cost.num_tokens / base.num_tokens,
            "cpu_ratio": result.cost.cpu / base.cpu,
            "time_ratio": result.cost.wall / base.wall,
        }
        area, nothing_twice, half, balanced, tokens, *ratios = figures[name].values()
        print(f"{name:21}{area:10.3f}{nothing_twice:15.3f}{half:11.3f}{balanced:10.3f}{tokens:8.1f}", end="")
        print("".join(f"{ratio:7.2f}" for ratio in ratios))
    is_crowded = [len(scene.things) >= scenes_source.CROWD for scene in scenes]
    corpus = sum(is_crowded) / len(is_crowded)
    print(f"{scenes_source.CROWD} things or more: {corpus:.3f} of the pictures; of their share, left in the best half:")
    for name, ranked in rankings.items():
        for label, groups in (("of all", None), ("of as many sentences", num_sentences)):
            best = find_best_half(ranked, groups)
            right, left = measure_share(is_right, best), measure_share(is_crowded, best) / corpus
            key = label.replace(" ", "_")
            figures[name] |= {f"right_{key}": right, f"crowded_left_{key}": left}
            print(f"{name:21}{label:22} {len(best)} captions, {right:.3f} wholly right, {left:.2f} of the share")
    if args.vllm:
        print(f"judging {NUM_CANDIDATES} captions of an image, as a multiple of judging one:")
        for name, edge in EDGES.items():
            figures[f"pictures {name}"] = ratios_of = compare_candidates(args.judge, captions, edge=edge)
            tokens, *ratios = ratios_of.values()
            shown = ", ".join(
                f"{what} {one:.2f}" for what, one in zip(("new tokens", "CPU", "time"), ratios, strict=True)
            )
            print(f"pictures {name:12} prompts of {tokens:.0f} tokens: {shown}")
    print(json.dumps({name: {key: round(value, 4) for key, value in row.items()} for name, row in figures.items()}))


if __name__ == "__main__":
    main()
