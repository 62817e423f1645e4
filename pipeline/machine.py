"""The machine's resources: usable CPU cores, and number formats that its CPU multiplies fast."""

from __future__ import annotations

import os
import platform


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def emulates_bfloat16() -> bool:
    """Whether bfloat16 products take this CPU three to ten times as long as float32, for want of instructions.

    oneDNN runs them on any AVX-512, so its own check is not enough on x86. Torch has no public name for the checks.
    """
    import torch

    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not has_instructions
