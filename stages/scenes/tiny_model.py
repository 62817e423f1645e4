"""A small untrained vision-language model: a Qwen2.5-VL of a few million parameters, with its tokenizer and processor.

Once saved, it loads in transformers and vLLM like any other Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages.scenes.teachers import sample_texts

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

PATCH, MERGE = 8, 2  # pixels along a patch's side; patches along an image token's side
MIN_PIXELS, MAX_PIXELS = 4096, 10240  # of a scaled picture
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY_SIZE = 1024  # tokens, including the special ones and the 256 bytes
# The longest possible tokens: the fixed parts of a verdict, a word with the space before it, a digit, anything else.
SPLIT = r'\{"reason": "|", "verdict": "|"\}| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+'
ENGLISH = """
Describe the picture. Name everything in this image. Does the sentence hold? Is this true of the picture? Answer with
JSON: first a short reason, then the verdict, yes or no. Caption: Sentence: Question: statement about what can be seen.
You are a careful judge of image captions. Look at the image and decide. Reply only with JSON. One of: unknown.
"""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def create_model(processor: Qwen2_5_VLProcessor, **shape: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model for the processor's tokenizer; `shape` is passed to `build_config`."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    architecture = build_config(len(tokenizer), **shape)
    architecture.image_token_id, architecture.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    architecture.vision_start_token_id, architecture.vision_end_token_id = (
        ids["<|vision_start|>"],
        ids["<|vision_end|>"],
    )
    text = architecture.text_config
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, ids["<|im_end|>"], ids["<|endoftext|>"]
    model = Qwen2_5_VLForConditionalGeneration(architecture)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model


def create_processor() -> Qwen2_5_VLProcessor:
    """A processor whose byte-level tokenizer merges come from the scenes world, so its words are single tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_iterate_training_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        extra_special_tokens=list(SPECIAL[3:]),
    )
    pixels = {
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": PATCH,
        "merge_size": MERGE,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE,
    )


def _iterate_training_texts() -> Iterator[str]:
    """Texts of the scenes world, and the vocabulary of prompts."""
    yield from sample_texts(400)
    for _ in range(5):
        yield ENGLISH


def build_config(
    vocab_size: int, *, hidden: int = 192, layers: int = 4, vision_hidden: int = 128, vision_layers: int = 4
) -> Qwen2_5_VLConfig:
    """The architecture. Heads have 32 dimensions, the smallest size that vLLM's kernels support."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_hidden * 2,
        "num_heads": vision_hidden // 32,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 256,  # pixels; has no effect, since every layer attends to the whole image
        "fullatt_block_indexes": list(range(vision_layers)),
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
