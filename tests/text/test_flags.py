"""Flags of English answers, and of answers that quote the prompt."""

from __future__ import annotations

import pytest

from stages.text import flags
from tests.support.texts import MARKET_CAPTION

FLAGS_BY_TEXT = {
    MARKET_CAPTION: [],
    "A sign reads “I'm sorry, we're closed” on a shop door.": [],
    "A woman in this photograph album smiles; the picture frame is gold.": [],
    "I'm sorry, but I cannot describe this image.": ["refusal"],
    "I am unable to provide a description of the people.": ["refusal"],
    "Unfortunately, I can’t help with that.": ["refusal"],
    "As an AI language model, I have no eyes.": ["refusal"],
    "The image shows a cat on a mat.": ["meta_commentary"],
    "This image depicts a cat.": ["meta_commentary"],
    "A cat sits. The photo also captures a dog.": ["meta_commentary"],
    "In this picture, a cat sits on a mat.": ["meta_commentary"],
    "Here is a detailed caption for the image: A cat.": ["meta_commentary"],
    "Sure! A description follows: a cat.": ["meta_commentary"],
    "A cat on a mat. Let me know if you need more.": ["meta_commentary"],
    "A cat, unlike the alt text says.": ["prompt_leak"],
    "assistant: A cat on a mat.": ["prompt_leak"],
    "A cat. This description is highly accurate and complete.": ["meta_commentary", "self_praise"],
    "A cat.<|im_end|>": ["special_token"],
    "**Subject**: a cat.": ["markdown"],
    "Things:\n- a cat\n- a dog": ["markdown"],
}


@pytest.mark.parametrize("text", FLAGS_BY_TEXT)
def test_flags_of_texts(text: str) -> None:
    patterns = flags.load("english", run=None)
    assert list(flags.find_flags(text, patterns)) == FLAGS_BY_TEXT[text]


def test_quoting_the_prompt_is_a_flag() -> None:
    prompt = "Describe the picture. Say only what can be seen, and begin with the subject."
    assert flags.find_flags("A cat. Say only what can be seen, and begin with it.", {}, prompt=prompt) == (
        "prompt_leak",
    )
    assert flags.find_flags("A cat that can be seen begins with the subject.", {}, prompt=prompt) == ()
