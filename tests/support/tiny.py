"""Untrained models that any engine can load: weights, tokenizer, processor and chat template.

Their answers are meaningless, but are ASCII text that depends on the image and sometimes ends by itself.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

PIXELS = 112  # edge of a picture: 16 image tokens
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_vision_model(
    folder: Path, *, seed: int = 0, hidden: int = 64, num_layers: int = 2, edge: int = PIXELS
) -> Path:
    """Saves an untrained Qwen2.5-VL, which sees images of up to `edge` x `edge` pixels. Returns `folder`."""
    tokenizer = _make_tokenizer()
    _make_processor(tokenizer, edge).save_pretrained(folder)
    _make_model(tokenizer, seed=seed, hidden=hidden, num_layers=num_layers).save_pretrained(folder)
    return folder


def save_text_model(folder: Path, *, seed: int = 0, hidden: int = 64, num_layers: int = 2) -> Path:
    """Saves an untrained Qwen2, which takes text only. Returns `folder`."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = _make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 2,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=8192,
            initializer_range=0.15,
            eos_token_id=end,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        model.lm_head.weight.copy_(_make_head(tokenizer, model.lm_head.weight, end))
        model.lm_head.weight[tokenizer.convert_tokens_to_ids('"')] *= 3  # so that its JSON strings are short
    model.to(torch.float32).save_pretrained(folder)
    return folder


def make_picture(n: int, *, edge: int = PIXELS) -> bytes:
    """Returns picture `n` as a PNG file: rectangles of random colours."""
    from PIL import Image, ImageDraw

    random = Random(f"picture {n}")
    image = Image.new("RGB", (edge, edge), _draw_colour(random))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = random.randrange(edge), random.randrange(edge)
        draw.rectangle((x, y, x + edge // 3, y + edge // 3), fill=_draw_colour(random))
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _draw_colour(random: Random) -> tuple[int, int, int]:
    return random.randrange(256), random.randrange(256), random.randrange(256)


def _make_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*SPECIAL, *PADS, *alphabet])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*SPECIAL, *PADS],
        model_max_length=8192,
    )


def _make_processor(tokenizer: Any, edge: int) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {"min_pixels": 28 * 28, "max_pixels": edge * edge}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _make_model(tokenizer: Any, *, seed: int, hidden: int, num_layers: int) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, *PADS)}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        "initializer_range": 0.15,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.15,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"]
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(_make_head(tokenizer, model.lm_head.weight, ids["<|im_end|>"]))
    return model.to(torch.float32)


def _make_head(tokenizer: Any, weight: Any, end: int) -> Any:
    """Returns an output layer that produces printable ASCII and sometimes <|im_end|>."""
    import torch

    head = torch.randn_like(weight) * 0.4
    for token, n in tokenizer.get_vocab().items():
        if token in (*SPECIAL, *PADS) or not (len(token) == 1 and (token.isascii() or token == "Ġ")):
            head[n] = 0
    head[end] = torch.randn_like(head[end]) * 0.4
    return head


if __name__ == "__main__":
    import sys

    print(json.dumps({"model": str(save_vision_model(Path(sys.argv[1])))}))
