"""Decides what is taken from this machine: the cores that are ours, and the numbers that its CPU multiplies quickly."""

from __future__ import annotations

import os


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def emulates_bfloat16() -> bool:
    """Whether products in bfloat16 take this CPU ten times as long as in float32: torch has no fast way for them here.

    Torch itself asks so; it tells nobody else by a public name.
    """
    import torch

    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
