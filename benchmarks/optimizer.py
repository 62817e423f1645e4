"""Compares a step of `MixedPrecisionMuon` with one of torch.optim.Muon and AdamW, on one core. The last line is JSON.

    python -m benchmarks.optimizer [--steps 5]

Seconds are CPU time, for the small Qwen2.5-VL. `ONEDNN_MAX_CPU_ISA=AVX2` in the environment makes any x86 CPU one that
emulates 16-bit products.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from pipeline.machine import emulates_bfloat16
from stages.scenes import tiny_model
from stages.training.optimizer import MixedPrecisionMuon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model.create_model(tiny_model.create_processor())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    own = MixedPrecisionMuon(model, lr=1e-3)
    others, matrices = (group["params"] for group in own.param_groups)
    muon, adamw = torch.optim.Muon(matrices, lr=1.6e-2), torch.optim.AdamW(others, lr=1e-3)
    seconds = {
        "MixedPrecisionMuon": time_step(own.step, args.steps),
        "torch.optim": round(time_step(muon.step, args.steps) + time_step(adamw.step, args.steps), 3),
    }
    for name, value in seconds.items():
        print(f"{name:20}{value:8.3f} s a step")
    print(json.dumps({"benchmark": "optimizer", "emulates_bfloat16": emulates_bfloat16(), "seconds": seconds}))


def time_step(step: Callable[[], object], num_steps: int) -> float:
    """Mean CPU seconds of a step, after one that creates the optimizer's state."""
    step()
    start = time.process_time()
    for _ in range(num_steps):
        step()
    return round((time.process_time() - start) / num_steps, 3)


if __name__ == "__main__":
    main()
