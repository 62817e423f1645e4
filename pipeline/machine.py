"""Decides what is taken from this machine: the cores that are ours, and the numbers that its CPU multiplies quickly."""

from __future__ import annotations

import os


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def imitates_16_bits() -> bool:
    """Whether this CPU has no instructions for bfloat16: it takes ten times as long for a product as in float32."""
    import torch

    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
