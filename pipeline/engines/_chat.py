"""Prompts for models in this process: a request rendered with the chat template, and the pixels of its images.

Template and pixel rule come from the model's own processor. It knows nothing of generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pipeline.decoding import images
from pipeline.engines import Request, TokenChoice, build_messages
from pipeline.engines._options import Model
from pipeline.engines._output import build_choice
from pipeline.engines._scheduler import SingleFlightCache
from pipeline.errors import BadRequestError, ConfigError, UndecodableError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

CACHED_IMAGES = 16  # decoded images: all requests about one image follow each other


class Prompter:
    """Turns requests into prompt texts and images. An image that consecutive requests share is decoded once.

    Raises:
        ConfigError: there is no such model, or it has no chat template.
    """

    def __init__(self, config: Model) -> None:
        self.processor = _load_processor(config)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)  # a text model has only a tokenizer
        self._rule = images.PixelRule.from_processor(self.processor, max_pixels=config.max_pixels)
        self._image_cache: SingleFlightCache[Picture] = SingleFlightCache(CACHED_IMAGES)

    def render_text(self, request: Request) -> str:
        """Renders the request with the model's chat template, with a placeholder for each image.

        Raises:
            BadRequestError: the template rejects it.
        """
        from jinja2 import TemplateError

        try:
            messages = build_messages(request, ({"type": "image"} for _ in request.images))
            rendered = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise BadRequestError(f"the chat template rejects it: {error}") from error
        return str(rendered)

    def load_images(self, request: Request) -> tuple[Picture, ...]:
        """Decodes the images at the sizes at which the model sees them.

        Raises:
            BadRequestError: one cannot be decoded.
        """
        try:
            return tuple(
                self._image_cache(image, partial(images.decode_pixels, image, self._rule)) for image in request.images
            )
        except UndecodableError as error:
            raise BadRequestError(f"an image cannot be decoded: {error}") from error


def decode_answer(tokenizer: Any, tokens: Sequence[int], *, stopped: bool) -> str:
    """Decodes an answer without its end token, or, if it was cut, without a trailing partial character."""
    kept = tokens[:-1] if stopped else tokens
    text = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text if stopped else text.rstrip("\ufffd")


def decode_choices(
    tokenizer: Any, tokens: Iterable[int], choices: Iterable[Mapping[int, float]]
) -> tuple[TokenChoice, ...]:
    """Decodes the tokens of an answer and their alternatives (token -> log-probability), each by itself."""

    @cache
    def decode(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return tuple(
        build_choice(decode(token), ((decode(other), logprob) for other, logprob in alternatives.items()))
        for token, alternatives in zip(tokens, choices, strict=True)
    )


def _load_processor(config: Model) -> Any:
    from transformers import AutoProcessor

    try:
        loaded = AutoProcessor.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise make_load_error(config, error) from error
    if not loaded.chat_template:
        raise ConfigError(f"model {config.model!r}", "has no chat template; use an instruction-tuned model")
    return loaded


def make_load_error(config: Model, error: Exception) -> ConfigError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(f"model {config.model!r}", f"cannot be loaded: {first_line}")
