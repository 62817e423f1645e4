"""Decides what a vision tower learns of labelled scenes besides words: what lies under each image token.

Eight answers a token: colour (of the ground where there is no thing), shape, size, texture, and where the thing's
centre is, across and down: from the token, in tokens, and in the picture, in tenths. A tower that has learnt this has
learnt to see; captions alone teach it slowly.
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
NUM_ANSWERS = (*(len(words) for words in WORDS), 2 * REACH + 1, 2 * REACH + 1, 10, 10)


def label_tokens(scene: Scene, *, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The answers of every image token in raster order: rows * columns by 8."""
    owner = assign_cells(scene, columns=columns, rows=rows)
    down, across = np.mgrid[:rows, :columns]
    answers = np.zeros((rows, columns, len(NUM_ANSWERS)), np.int64)
    answers[..., 0] = WORDS[0].index(scene.background)
    answers[..., 4:] = IGNORED
    for number, thing in enumerate(scene.things):
        there = owner == number
        said = (thing.colour, thing.shape, thing.size, thing.texture)
        answers[there, 6:] = centre_in_tenths(thing, scene)
        answers[there, :4] = [words.index(word) for words, word in zip(WORDS, said, strict=True)]
        for place, centre, here in (
            (4, thing.x / scene.width * columns, across),
            (5, thing.y / scene.height * rows, down),
        ):
            away = np.round(centre - 0.5 - here[there])
            answers[there, place] = np.clip(away, -REACH, REACH) + REACH
    return answers.reshape(-1, len(NUM_ANSWERS))


def label_batch(source_keys: Iterable[str], grids: torch.Tensor, *, merge: int) -> torch.Tensor:
    """Of a batch of pictures, in the order of their image tokens. `grids`: frames, rows and columns of patches."""
    parts = [
        torch.from_numpy(label_tokens(find_scene(name), rows=int(grid[1]) // merge, columns=int(grid[2]) // merge))
        for name, grid in zip(source_keys, grids, strict=True)
    ]
    return torch.cat(parts)


class RegionReader(nn.Module):  # type: ignore[misc]
    """Reads the answers off the image tokens of a vision tower, linearly; it is thrown away after training."""

    def __init__(self, visual: nn.Module, hidden: int) -> None:
        super().__init__()
        self.heads = nn.Linear(hidden, sum(NUM_ANSWERS))
        visual.register_forward_hook(self._keep)
        self._tokens: torch.Tensor | None = None

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self._tokens = output.pooler_output

    def loss(self, answers: torch.Tensor) -> torch.Tensor:
        """The mean over the eight questions, for the images that the tower saw last."""
        assert self._tokens is not None
        logits, self._tokens = self.heads(self._tokens).float(), None
        losses: Iterable[torch.Tensor] = (
            nn.functional.cross_entropy(part, answers[:, place], ignore_index=IGNORED)
            for place, part in enumerate(logits.split(NUM_ANSWERS, -1))
        )
        return torch.stack(list(losses)).mean()
