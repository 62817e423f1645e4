"""Labels of image tokens in scenes, and the linear head that trains a vision tower on them.

Each token has eight labels: colour (of the background where there is no thing), shape, size, texture, and the position
of the thing's centre, across and down: from the token, in tokens, and in the picture, in tenths. A vision tower learns
to see from these much faster than from captions alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.sources.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    assign_cells,
    centre_in_tenths,
    find_scene,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

IGNORED = -100
REACH = 3  # tokens: a centre further away than this counts as this far
NONE = "none"
WORDS = ((*COLOURS, *BACKGROUNDS), (NONE, *SHAPES), (NONE, *SIZES), (NONE, *TEXTURES))
NUM_CLASSES = (*(len(words) for words in WORDS), 2 * REACH + 1, 2 * REACH + 1, 10, 10)


def label_tokens(scene: Scene, *, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The labels of every image token in raster order: shape [rows * columns, 8]."""
    owners = assign_cells(scene, columns=columns, rows=rows)
    down, across = np.mgrid[:rows, :columns]
    labels = np.zeros((rows, columns, len(NUM_CLASSES)), np.int64)
    labels[..., 0] = WORDS[0].index(scene.background)
    labels[..., 4:] = IGNORED
    for number, thing in enumerate(scene.things):
        covered = owners == number
        values = (thing.colour, thing.shape, thing.size, thing.texture)
        labels[covered, 6:] = centre_in_tenths(thing, scene)
        labels[covered, :4] = [words.index(word) for words, word in zip(WORDS, values, strict=True)]
        for column, centre, position in (
            (4, thing.x / scene.width * columns, across),
            (5, thing.y / scene.height * rows, down),
        ):
            offset = np.round(centre - 0.5 - position[covered])
            labels[covered, column] = np.clip(offset, -REACH, REACH) + REACH
    return labels.reshape(-1, len(NUM_CLASSES))


def label_batch(source_keys: Iterable[str], grids: torch.Tensor, *, merge: int) -> torch.Tensor:
    """The labels of a batch's image tokens, shape [tokens, 8]. `grids`: frames, rows and columns of patches."""
    parts = [
        torch.from_numpy(label_tokens(find_scene(name), rows=int(grid[1]) // merge, columns=int(grid[2]) // merge))
        for name, grid in zip(source_keys, grids, strict=True)
    ]
    return torch.cat(parts)


class RegionReader(nn.Module):  # type: ignore[misc]
    """Predicts the labels from the image tokens of a vision tower with one linear layer, dropped after training."""

    def __init__(self, visual: nn.Module, hidden: int) -> None:
        super().__init__()
        self.heads = nn.Linear(hidden, sum(NUM_CLASSES))
        visual.register_forward_hook(self._store_tokens)
        self._tokens: torch.Tensor | None = None

    def _store_tokens(self, _: nn.Module, __: Any, output: Any) -> None:
        self._tokens = output.pooler_output

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy over the eight labels, for the last batch of images."""
        assert self._tokens is not None
        logits, self._tokens = self.heads(self._tokens).float(), None
        losses: Iterable[torch.Tensor] = (
            nn.functional.cross_entropy(part, labels[:, column], ignore_index=IGNORED)
            for column, part in enumerate(logits.split(NUM_CLASSES, -1))
        )
        return torch.stack(list(losses)).mean()
