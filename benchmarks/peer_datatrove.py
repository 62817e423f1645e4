"""Sends prebuilt payloads through datatrove's inference runner, in an environment of its own.

    python benchmarks/peer_datatrove.py PAYLOADS.jsonl URL MODEL IN_FLIGHT

Prints the seconds from the first request to the last answer, the CPU seconds in between, and the number of answers.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter


def main() -> None:
    file, url, model, in_flight = sys.argv[1:]
    logging.disable(logging.INFO)
    payloads = [json.loads(line) for line in Path(file).read_text().splitlines()]
    times: list[tuple[float, float]] = []

    async def rollout(document: Document, generate: Any) -> Any:
        times.append((time.perf_counter(), time.process_time()))
        answer = await generate(payloads[int(document.id)])
        times.append((time.perf_counter(), time.process_time()))
        return answer

    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=url,
        model_name_or_path=model,
        max_concurrent_generations=int(in_flight),
        max_concurrent_documents=int(in_flight),
    )
    with tempfile.TemporaryDirectory() as folder:
        runner = InferenceRunner(rollout_fn=rollout, config=config, output_writer=JsonlWriter(folder))
        runner.run((Document(text="", id=str(n)) for n in range(len(payloads))), rank=0, world_size=1)
    seconds, cpu = (last - first for first, last in zip(min(times), max(times), strict=True))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "num": len(times) // 2}))


if __name__ == "__main__":
    main()
