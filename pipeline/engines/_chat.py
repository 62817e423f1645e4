"""Decides what a model in this process is shown: the chat messages of a request, and the pixels of its images.

It takes chat template and rounding rule from the model's own processor. It knows nothing of generating.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.decoding import images
from pipeline.engines import Request
from pipeline.engines._options import Model
from pipeline.engines._scheduler import SingleFlightCache
from pipeline.errors import BadRequestError, ConfigError, UndecodableError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

CACHED_IMAGES = 16  # pictures: candidates and verdicts of one image are asked one after the other


class Prompter:
    """Makes requests into prompt texts and pictures; those that neighbours have in common once.

    Raises:
        ConfigError: there is no such model, or it has no chat template.
    """

    def __init__(self, config: Model) -> None:
        self.processor = _processor(config)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)  # a model without images has no more
        self._rule = images.PixelRule.from_processor(self.processor, max_pixels=config.max_pixels)
        self._decoded: SingleFlightCache[Picture] = SingleFlightCache(CACHED_IMAGES)

    def render_text(self, request: Request) -> str:
        """The request in the words of the model's chat template, with a place for each image.

        Raises:
            BadRequestError: the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            rendered = self.processor.apply_chat_template(
                build_messages(request), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise BadRequestError(f"the chat template refuses it: {error}") from error
        return str(rendered)

    def load_images(self, request: Request) -> tuple[Picture, ...]:
        """The images as the model sees them.

        Raises:
            BadRequestError: one cannot be decoded.
        """
        try:
            return tuple(
                self._decoded(image, partial(images.decode_pixels, image, self._rule)) for image in request.images
            )
        except UndecodableError as error:
            raise BadRequestError(f"an image cannot be shown: {error}") from error


def decode_answer(tokenizer: Any, tokens: Sequence[int], *, stopped: bool) -> str:
    """The words of an answer, without the token that ended it, or the part of a character at which it was cut."""
    said = tokens[:-1] if stopped else tokens
    text = str(tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text if stopped else text.rstrip("\ufffd")


def build_messages(request: Request) -> list[dict[str, Any]]:
    """The request as a chat, images before words, so that what is asked about one image shares a prefix."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    parts = [*({"type": "image"} for _ in request.images), {"type": "text", "text": request.prompt}]
    return [*system, {"role": "user", "content": parts}]


def _processor(config: Model) -> Any:
    from transformers import AutoProcessor

    try:
        loaded = AutoProcessor.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise make_load_error(config, error) from error
    if not loaded.chat_template:
        raise ConfigError(f"model {config.model!r}", "has no chat template; take an instruction-tuned model")
    return loaded


def make_load_error(config: Model, error: Exception) -> ConfigError:
    return ConfigError(f"model {config.model!r}", f"cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
