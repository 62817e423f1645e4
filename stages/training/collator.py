"""Examples as the tensors of a batch, prompted and sized as the engines do it; only answers are labels."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.decoding import images
from pipeline.execution.signals import STOPPING
from stages.training.dataset import read_image_file

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a label without a loss


def ignore_signals() -> None:
    """Makes a worker of a data loader ignore the signals that end a run, which clusters send to every process.

    The training process needs its workers until it has finished the step and saved a checkpoint; then it ends them.
    """
    import torch

    if torch.utils.data.get_worker_info() is not None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


class Collator:
    """Turns examples, rows as dicts, into a batch of tensors."""

    def __init__(self, processor: Any, *, regions: bool = False) -> None:
        """
        Args:
            regions: add the labels of image tokens, which only images of the scenes world have.
        """
        self._processor, self._regions = processor, regions
        self._rule = images.PixelRule.from_processor(processor)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        ignore_signals()
        shown = [example for example in examples if example["shows_image"]]
        images = [self.load_image(example) for example in shown]
        pixels = self._processor.image_processor(images=images, return_tensors="pt") if shown else {}
        grids, merge = pixels["image_grid_thw"] if shown else [], self._processor.image_processor.merge_size
        sizes = (int(grid.prod()) // merge**2 for grid in grids)
        rows = [self._tokenize(example, next(sizes) if example["shows_image"] else 0) for example in examples]
        longest = max(len(ids) for ids, _ in rows)
        pad = self._processor.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        batch = {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
            "mm_token_type_ids": (ids == self._processor.image_token_id).long(),
            **pixels,
        }
        if self._regions:
            from stages.scenes.region_head import label_batch

            batch["regions"] = label_batch([example["source_key"] for example in shown], grids, merge=merge)
        return batch

    def load_image(self, example: Mapping[str, Any]) -> Any:
        """The image as the engines show it to the model."""
        return images.decode_pixels(read_image_file(example), self._rule)

    def _tokenize(self, example: Mapping[str, Any], num_image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids and labels: an answer and its end are labels, the conversation before it is not."""
        tokenizer = self._processor.tokenizer
        ids: list[int] = []
        labels: list[int] = []
        system, before = example["system"], ""
        messages: list[dict[str, Any]] = (
            [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        )
        for turn, (question, answer) in enumerate(zip(example["questions"], example["answers"], strict=True)):
            image = [{"type": "image"}] if turn == 0 and example["shows_image"] else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            prompt = self._processor.apply_chat_template(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": answer})
            conversation = self._processor.apply_chat_template(messages)
            for text, is_answer in ((prompt[len(before) :], False), (conversation[len(prompt) :], True)):
                new = self._expand_image(tokenizer(text, add_special_tokens=False).input_ids, num_image_tokens)
                ids += new
                labels += new if is_answer else [IGNORED] * len(new)
            before = conversation
        return ids, labels

    def _expand_image(self, ids: list[int], num_image_tokens: int) -> list[int]:
        image = self._processor.image_token_id
        return [token for i in ids for token in ([i] * num_image_tokens if i == image else [i])]
