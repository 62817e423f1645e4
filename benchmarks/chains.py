"""The questions a second that chains of steps ask, compared with single questions, with the engine echo.

    python -m benchmarks.chains [--images 10000] [--rounds 5] [--delay 0.0]

Echo costs little more than the hash of a request, so this is the cost of keeping chains in flight. In each round both
recipes ask the same number of questions about the same images; the order of the two alternates, and the ratio of each
round is printed, by the clock and by seconds of CPU, which other programs disturb less, with the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from pipeline import config
from pipeline.engines import echo
from pipeline.execution.passes import Pass
from pipeline.records import Image, make_key
from stages import caption
from stages.caption import CaptionInput

NUM_STEPS = 4
PROMPT = "Look at this picture, and describe number {number} of the things in it in one sentence."
SINGLE = f'prompt = "{PROMPT.format(number=0)}"\n'
STEP = """
[[steps]]
name = "{name}"
prompt = "{prompt}"
"""


def write_recipes(folder: Path) -> None:
    """Two recipes with equal questions; the later steps of the chain show the answer before them."""
    folder.mkdir()
    names = [chr(ord("a") + number) for number in range(NUM_STEPS)]
    prompts = [
        PROMPT.format(number=number) + (f" {{{names[number - 1]}}}" if number else "") for number in range(NUM_STEPS)
    ]
    steps = (STEP.format(name=name, prompt=prompt) for name, prompt in zip(names, prompts, strict=True))
    (folder / "single.toml").write_text(SINGLE)
    (folder / "chain.toml").write_text("".join(steps))


def build_passes(folder: Path) -> dict[str, Pass]:
    write_recipes(folder / "recipes")
    values = {
        "source": {"kind": "scenes"},
        "engines": {"model": {"kind": "echo"}},
        "caption": {name: {"recipe": name, "engine": "model"} for name in ("single", "chain")},
    }
    run = config.parse(values, file=folder / "run.toml")
    return {p.name: p for p in caption.passes(run)}


def make_inputs(num_images: int, num_candidates: int) -> Iterator[CaptionInput]:
    for index in range(num_images):
        data = index.to_bytes(8) * 512
        image = Image(
            key=make_key(0, index),
            shard=0,
            index=index,
            status="ok",
            error=None,
            source="benchmark",
            source_key=str(index),
            file="",
            offset=0,
            num_bytes=len(data),
            format="jpeg",
            width=512,
            height=384,
            orientation=1,
            num_frames=1,
            sha256=hashlib.sha256(data).hexdigest(),
            alt_text=None,
            metadata="{}",
        )
        for candidate in range(num_candidates):
            yield CaptionInput(image=image, candidate=candidate, data=lambda data=data: data)  # type: ignore[misc]


def measure_rates(p: Pass, num_images: int, *, candidates: int, delay: float) -> tuple[float, float]:
    """Questions a second, and a second of CPU."""
    engine = echo.open(echo.Config(delay=delay))
    clock, cpu = time.perf_counter(), time.process_time()
    num_rows = sum(1 for _ in p.work(make_inputs(num_images, candidates), {"model": engine}))
    assert num_rows == num_images * candidates
    num = num_images * NUM_STEPS
    return num / (time.perf_counter() - clock), num / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each answer takes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        passes = build_passes(Path(folder))
        ratios = []
        for number in range(arguments.rounds):
            rates = {}
            for name in ("single", "chain")[:: 1 if number % 2 else -1]:
                candidates = NUM_STEPS if name == "single" else 1
                rates[name] = measure_rates(
                    passes[name], arguments.images, candidates=candidates, delay=arguments.delay
                )
            ratios.append([chain / single for chain, single in zip(rates["chain"], rates["single"], strict=True)])
            figures = f"single {rates['single'][0]:6.0f}  chain {rates['chain'][0]:6.0f} questions/s"
            print(f"{figures}  ratio {ratios[-1][0]:.3f}, of CPU {ratios[-1][1]:.3f}")
        clock, cpu = (median(some) for some in zip(*ratios, strict=True))
        print(f"median ratio {clock:.3f}, of CPU {cpu:.3f}: {arguments.rounds} rounds of {arguments.images} chains")


if __name__ == "__main__":
    main()
