"""The machine's resources: usable CPU cores, and number formats that its CPU multiplies fast."""

from __future__ import annotations

import os


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def emulates_bfloat16() -> bool:
    """Whether bfloat16 products take this CPU about ten times as long as float32: torch has no fast kernel for them.

    Torch decides with the same two checks and has no public name for the second.
    """
    import torch

    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
