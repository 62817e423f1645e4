"""Texts of a training set: which of an image's kept texts it is exported with, and how much of that text.

The choices are pure functions: equal seeds and keys give equal texts, whatever else the run holds. This module knows
neither tables nor files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.errors import MachineError
from pipeline.sections import key, plain_value
from pipeline.storage.sentences import split_sentences

RAW = "raw"  # the alt text, among the names of caption passes
Count = Callable[[str], int]  # tokens of a text
T = TypeVar("T", bound="ExportText")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The keys of `[export]` that decide an image's text."""

    texts: Mapping[str, float] | Literal["all"] | None = key(
        None,
        "PASS = weight: the pass of each image's text is drawn with these weights, raw is the alt text; all: every "
        "kept caption travels in the column texts; without it, the caption that the filter chose",
        stamp_default=False,
    )
    raw_top: float = key(
        0.0,
        "the share of all alt texts, those with the highest raw_score, that are exported in place of captions",
        least=0,
        most=1,
        stamp_default=False,
    )
    raw_score: str = key("", "SQL over an image's columns: the score of its alt text", stamp_default=False)
    sentences: int = key(
        0, "sentences that are sampled from the text, in its order; 0: all of it", least=0, stamp_default=False
    )
    random_length: bool = key(False, "keep a random number of sentences, from the first", stamp_default=False)
    tokenizer: str = key(
        "",
        "a model's folder or name on the Hub, whose tokenizer counts num_tokens",
        locate="model",
        stamp_default=False,
    )
    max_tokens: int = key(
        0,
        "tokens of a text with its prefix and the special tokens; longer ones are cut after a sentence; 0: any number",
        least=0,
        stamp_default=False,
    )
    prefix: Mapping[str, str] | None = key(None, "PASS = text that begins the texts of a pass", stamp_default=False)
    drop: float = key(
        0.0, "the share of samples with an empty caption, for guidance", least=0, most=1, stamp_default=False
    )
    weight: str = key("", "SQL over the exported caption's row: the column weight", stamp_default=False)

    def __post_init__(self) -> None:
        if isinstance(self.texts, Mapping) and not (sum(self.texts.values()) > 0 <= min(self.texts.values())):
            raise ValueError(f"texts is {dict(self.texts)}; its weights must be 0 or more, and one of them more than 0")
        if (self.raw_top > 0) != bool(self.raw_score):
            raise ValueError("raw_top and raw_score need each other: the share, and the score that ranks alt texts")
        if self.max_tokens and not self.tokenizer:
            raise ValueError(f"max_tokens is {self.max_tokens}; tokenizer must name the model whose tokens are counted")
        if self.tokenizer and not find_spec("tokenizers"):
            raise ValueError(
                "tokenizer needs the package tokenizers: pip install '.[transformers]' in a clone of recap"
            )

    @property
    def named_passes(self) -> set[str]:
        """The names of caption passes, or RAW, that its keys mention."""
        return {*(self.texts if isinstance(self.texts, Mapping) else ()), *(self.prefix or ())}

    @property
    def uses_raw(self) -> bool:
        return self.raw_top > 0 or (isinstance(self.texts, Mapping) and self.texts.get(RAW, 0) > 0)

    @property
    def is_drawn(self) -> bool:
        """True if the texts depend on the seed."""
        return isinstance(self.texts, Mapping) or self.random_length or self.sentences > 0 or self.drop > 0


def describe_texts(config: TextConfig) -> list[str]:
    """Sentences for people about how the texts were chosen; none if the filter alone chose whole captions."""
    notes = []
    if isinstance(config.texts, Mapping):
        total = sum(config.texts.values())
        mix = ", ".join(f"`{name}` {weight / total:.1%}" for name, weight in config.texts.items())
        notes.append(f"The text of each image was drawn by weight: {mix} (`{RAW}`: the corpus's own alt text).")
    if config.texts == "all":
        notes.append("`texts` has every kept caption of an image.")
    if config.raw_top:
        notes.append(f"The {config.raw_top:.1%} of alt texts with the highest `{config.raw_score}` replace captions.")
    if config.sentences:
        notes.append(f"At most {config.sentences} sentences were sampled from each text.")
    if config.random_length:
        notes.append("Each text ends after a random number of its sentences.")
    if config.max_tokens:
        notes.append(f"Texts were cut to {config.max_tokens} tokens of `{plain_value(config.tokenizer)}`.")
    if config.drop:
        notes.append(f"About {config.drop:.1%} of the captions are empty.")
    return notes


@dataclass(frozen=True, kw_only=True)
class ExportText:
    """A text that an image may be exported with."""

    text: str
    caption_pass: str  # or RAW
    is_kept: bool  # by the filter; alt text is not
    is_chosen: bool  # by the filter
    is_best: bool  # of the kept candidates of its pass
    is_top: bool  # RAW: among the share `raw_top`


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A text as it is exported."""

    text: str
    num_tokens: int  # 0 without a tokenizer
    cut: int  # tokens that were cut off at the end


def draw(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6]) / 2**48


def choose_text(texts: Sequence[T], config: TextConfig, *, seed: int, key: str) -> T | None:
    """The text of an image; None if it has none, and is not a sample.

    An alt text among the top share comes before captions (Nguyen et al. 2023, arXiv 2307.10350). Otherwise an image
    needs a kept caption, and the weights of passes of which it has none are shared among the others.
    """
    best = {text.caption_pass: text for text in texts if text.is_best}
    if top := next((text for text in texts if text.is_top), None):
        return top
    if not isinstance(config.texts, Mapping):
        return next((text for text in texts if text.is_chosen), None)
    weights = {name: weight for name, weight in config.texts.items() if weight > 0 and name in best}
    if not any(text.is_kept for text in texts):
        return None
    at = draw(seed, key, "texts") * sum(weights.values())
    for name, weight in weights.items():
        at -= weight
        if at < 0:
            return best[name]
    return best[name] if weights else None


def excerpt_text(text: ExportText, config: TextConfig, count: Count | None, *, seed: int, key: str) -> Excerpt:
    """The caption of a sample: dropped, sampled, shortened, with its prefix, and cut to `max_tokens`."""
    if config.drop and draw(seed, key, "drop") < config.drop:
        return Excerpt(text="", num_tokens=count("") if count else 0, cut=0)
    part = text.text
    if config.sentences:
        part = sample_sentences(part, config.sentences, seed=seed, key=key)
    if config.random_length:
        ends = list(find_sentence_ends(part))
        part = part[: ends[int(draw(seed, key, "length") * len(ends))]] if ends else part
    return cut_text(part, config.max_tokens, count, prefix=(config.prefix or {}).get(text.caption_pass, ""))


def sample_sentences(text: str, num: int, *, seed: int, key: str) -> str:
    """`num` of its sentences in their order, on one line; the whole text if it has no more."""
    sentences = split_sentences(text)
    if len(sentences) <= num:
        return text
    drawn = sorted(range(len(sentences)), key=lambda i: draw(seed, key, "sentences", i))[:num]
    return " ".join(sentences[i] for i in sorted(drawn))


def cut_text(text: str, max_tokens: int, count: Count | None, *, prefix: str = "") -> Excerpt:
    """The prefix and the beginning of the text that together have at most `max_tokens`; 0: the whole text.

    It ends with a sentence; if the first is too long already, with a word; if that is too, within it.
    """
    if count is None:
        return Excerpt(text=prefix + text, num_tokens=0, cut=0)
    whole = count(prefix + text)
    if not max_tokens or whole <= max_tokens:
        return Excerpt(text=prefix + text, num_tokens=whole, cut=0)
    words = (match.end() for match in re.finditer(r"\S+", text))
    for ends in (find_sentence_ends(text), words, range(1, len(text))):
        if end := _find_last(list(ends), lambda end: count(prefix + text[:end]) <= max_tokens):
            num_tokens = count(prefix + text[:end])
            return Excerpt(text=prefix + text[:end], num_tokens=num_tokens, cut=whole - num_tokens)
    return Excerpt(text="", num_tokens=count(""), cut=whole - count(""))


def _find_last(ends: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of ascending positions that fits; 0 if none does. Where one does not, later ones do not either."""
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(ends[middle]) else (low, middle)
    return ends[low - 1] if low else 0


def find_sentence_ends(text: str) -> Iterator[int]:
    """The position after each sentence of the text."""
    end = 0
    for sentence in split_sentences(text):
        end = text.index(sentence, end) + len(sentence)
        yield end


def fetch_tokenizer(name: str) -> str:
    """The path of a tokenizer.json of the Hub, in its cache.

    Raises:
        MachineError: it is not in the cache, and the Hub does not answer.
        OSError, ValueError: there is none of that name.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = try_to_load_from_cache(name, "tokenizer.json")
    if isinstance(found, str):
        return found
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it says of each try is in the last error too
    try:
        return hf_hub_download(name, "tokenizer.json")
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise
        raise MachineError(
            f"the Hub does not answer for the tokenizer of {name!r}: {error.__cause__ or error}"
        ) from error


@cache
def load_counter(name: str) -> Count:
    """A function that counts tokens, with special ones, as the tokenizer of a model does.

    Raises:
        OSError: there is no such tokenizer.
        MachineError: the Hub does not answer.
    """
    from tokenizers import Tokenizer  # transformers would import torch

    file = Path(name) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file if file.exists() else fetch_tokenizer(name)))
    except MachineError:
        raise
    except Exception as error:  # it raises no narrower type
        why = str(error).partition("\n")[0]
        raise OSError(
            f"{name!r} is not a folder with a tokenizer.json, and no model of the Hub with one: {why}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)
