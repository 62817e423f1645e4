"""The split into training and held-out examples, and the order of both.

The order follows from its arguments alone, so that a resumed training continues with the same examples.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

from pipeline.decoding.images import PixelRule

if TYPE_CHECKING:
    import datasets
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.int64]]  # of examples, from 0
    Digests = np.ndarray[Any, np.dtype[np.uint64]]


def draw_batches(sizes: Sequence[int] | Numbers, *, num_batches: int, batch_size: int, seed: int) -> array[int]:
    """The order of examples for a whole training, epoch after epoch: the images of a batch have one size.

    >>> order = draw_batches([1, 2, 1, 2], num_batches=2, batch_size=2, seed=0)
    >>> list(order) in ([0, 2, 1, 3], [2, 0, 1, 3], [0, 2, 3, 1])
    True
    """
    rng = Random(f"order/{seed}")
    incomplete: dict[int, list[int]] = {}  # size -> a batch
    order = array("q")
    while len(order) < num_batches * batch_size:
        epoch = array("q", range(len(sizes)))
        rng.shuffle(epoch)
        for example in epoch:
            batch = incomplete.setdefault(sizes[example], [])
            batch.append(example)
            if len(batch) == batch_size:
                order.extend(incomplete.pop(sizes[example]))
    return order[: num_batches * batch_size]


def order_examples(
    examples: datasets.Dataset,
    numbers: Numbers,
    processor: Any,
    *,
    same_size: bool,
    batch_size: int = 1,
    seed: int = 0,
    num_batches: int | None = None,
) -> Numbers:
    """The examples with these numbers, in the order of `num_batches` batches; by default each once, sorted by size.

    Args:
        same_size: the images of a batch have one size, which is faster on a CPU; rare sizes may wait long for a batch.
    """
    import numpy as np

    sizes = np.zeros(len(numbers), np.int64)
    if same_size:
        sizes = _read_sizes(examples, PixelRule.from_processor(processor))[numbers]
    if num_batches is None:
        order: Numbers = np.argsort(sizes, kind="stable")
    else:
        order = np.asarray(draw_batches(sizes, num_batches=num_batches, batch_size=batch_size, seed=seed))
    return numbers[order]


def _read_sizes(examples: datasets.Dataset, rule: PixelRule) -> Numbers:
    """Pixels of each example's image, as the model sees it."""
    import numpy as np

    @lru_cache
    def count_pixels(width: int, height: int) -> int:
        width, height = rule.target_size(width, height)
        return width * height

    columns = zip(*(_read_column(examples, name) for name in ("width", "height")), strict=True)
    return np.fromiter((count_pixels(*size) for size in columns), np.int64, len(examples))


def read_digests(examples: datasets.Dataset) -> Digests:
    """The first 64 bits of each image's SHA-256, which are enough to tell millions of images apart."""
    import numpy as np

    return np.fromiter((int(sha256[:16], 16) for sha256 in _read_column(examples, "sha256")), np.uint64, len(examples))


def _read_column(examples: datasets.Dataset, name: str) -> Iterator[Any]:
    for chunk in examples.data.column(name).chunks:
        yield from chunk.to_pylist()


def split_examples(digests: Digests, *, num_eval_images: int) -> tuple[Numbers, Numbers]:
    """The numbers of the examples to learn from, and of those to evaluate on; copies of an image are on one side."""
    import numpy as np

    held_out = np.isin(digests, np.unique(digests)[:num_eval_images])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
