"""Splits of a training set: which of its named parts a sample belongs to.

A group of near copies is in one split as a whole, so that none of them is in a training part and in a held-out one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate


def draw_split(shares: Mapping[str, float], *, seed: int, group: str) -> str:
    """The split of a group of copies, drawn by the shares, which need not add up to 1.

    The same group is in the same split whatever else the run holds, and stays in it when later shares shrink.
    """
    digest = hashlib.sha256(json.dumps([seed, "split", group]).encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64 * sum(shares.values())
    ends = zip(shares, accumulate(shares.values()), strict=True)
    return next((name for name, end in ends if place < end), list(shares)[-1])
