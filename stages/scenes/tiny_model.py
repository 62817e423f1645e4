"""Decides what a new small vision-language model is: a Qwen2.5-VL of a few million parameters, and its way on a CPU.

Its folder loads in transformers and vLLM unchanged: architecture, tokenizer, processor and chat template are ordinary.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.scenes.teachers import sample_texts

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

PATCH, MERGE = 8, 2
CELL = PATCH * MERGE  # pixels of an image token's side
MIN_PIXELS, MAX_PIXELS = 4096, 10240  # a picture is scaled to so many
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
NUM_WORDS = 1024  # tokens, with the special ones and the 256 bytes
# What is one token where it can be: the fixed parts of a verdict, a word with the space before it, a digit, the rest.
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


def create(folder: Path, *, seed: int = 0, **shape: int) -> None:
    """Writes an untrained model with its tokenizer, processor and chat template. `shape`: see `config`."""
    import torch

    processor = new_processor()
    torch.manual_seed(seed)
    model = new_model(processor, **shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def new_model(processor: Qwen2_5_VLProcessor, **shape: int) -> Qwen2_5_VLForConditionalGeneration:
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    architecture = config(len(tokenizer), **shape)
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


def new_processor() -> Qwen2_5_VLProcessor:
    """A byte-level tokenizer whose merges come from the scenes world, so that its words are single tokens."""
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
        vocab_size=NUM_WORDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
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


def _texts() -> Iterator[str]:
    """What the tokenizer is made from: what is said in the scenes world, and words of prompts."""
    yield from sample_texts(400)
    for _ in range(5):
        yield ENGLISH


def config(
    vocab_size: int, *, hidden: int = 192, layers: int = 4, vision_hidden: int = 128, vision_layers: int = 4
) -> Qwen2_5_VLConfig:
    """The architecture. Heads have 32 dimensions, the smallest that vLLM's kernels know."""
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
        "window_size": 256,  # pixels; every layer looks at the whole image all the same
        "fullatt_block_indexes": list(range(vision_layers)),
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def quicken(model: Any, *, compiled: bool) -> None:
    """Makes training on a CPU about twice as fast: plain products in the place of kernels that a CPU is slow at.

    The numbers stay those of the model's own code up to rounding, and so does what is saved. `compiled` gains another
    third, for a minute at the start and a C++ compiler.
    """
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

    if code.Qwen2_5_VLVisionAttention.forward is not vision_attention:
        _patient["forward"] = code.Qwen2_5_VLVisionAttention.forward
        code.Qwen2_5_VLVisionAttention.forward = vision_attention
    model.model.visual.register_forward_pre_hook(_compare_sizes, with_kwargs=True)
    code.eager_attention_forward = text_attention
    code.Qwen2_5_VisionPatchEmbed.forward = embed_patches
    model.set_attn_implementation("eager")
    if compiled:
        _compile_apart()
        for block in model.model.visual.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        for layer in model.model.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)


@cache
def _compile_apart() -> None:
    """Has torch compile into a folder of this process: what a killed one was writing would be taken for whole.

    A folder that the user has named stays; torch writes its own default there too.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        folder = tempfile.mkdtemp(prefix="recap-compiled-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def see_once(visual: Any) -> None:
    """Lets a vision tower look at each picture of a batch once, however often it stands there (a group shares one)."""
    look = visual.forward

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **rest: Any) -> Any:
        import torch

        patches = hidden_states.split(grid_thw.prod(-1).tolist())
        first: dict[bytes, int] = {}  # picture -> where it first stands
        names = [picture.detach().float().cpu().numpy().tobytes() for picture in patches]
        for number, name in enumerate(names):
            first.setdefault(name, number)
        once = list(first.values())
        places = {name: place for place, name in enumerate(first)}
        shown = [places[name] for name in names]
        seen = look(torch.cat([patches[number] for number in once]), grid_thw=grid_thw[once], **rest)
        tokens = (grid_thw[once].prod(-1) // visual.spatial_merge_size**2).tolist()
        parts = seen.pooler_output.split(tokens)
        seen.pooler_output = torch.cat([parts[number] for number in shown])
        return seen

    visual.forward = forward


def embed_patches(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Qwen2_5_VisionPatchEmbed.forward without a convolution: a patch is as large as the kernel."""
    weight = self.proj.weight
    return hidden_states.to(weight.dtype) @ weight.view(weight.shape[0], -1).T


_patient: dict[str, Any] = {}  # transformers' own forward, one image after the other


def _compare_sizes(visual: Any, _: Any, given: dict[str, Any]) -> None:
    """Tells the layers whether all images of the batch have one size."""
    sizes = given["grid_thw"].prod(-1)
    alike = bool((sizes == sizes[0]).all())
    for block in visual.blocks:
        block.attn.alike = alike


def vision_attention(
    self: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, position_embeddings: Any = None, **rest: Any
) -> torch.Tensor:
    """Qwen2_5_VLVisionAttention.forward; where all images have one size, as one product instead of one per image."""
    if not getattr(self, "alike", False):
        mixed: torch.Tensor = _patient["forward"](
            self, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **rest
        )
        return mixed
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

    num_images, rows = cu_seqlens.numel() - 1, hidden_states.shape[0]
    parts = self.qkv(hidden_states).reshape(num_images, rows // num_images, 3, self.num_heads, -1)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (p.view(num_images, 1, rows // num_images, -1).to(q.dtype) for p in position_embeddings)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    weights = torch.softmax(torch.matmul(q * self.scaling, k.transpose(2, 3)), -1)
    seen: torch.Tensor = self.proj(torch.matmul(weights, v).transpose(1, 2).reshape(rows, -1))
    return seen


def text_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as plain products: on a CPU the backward pass of the fused kernel takes half of a training step.

    While an answer is drawn, a token at a time, the heads that share keys ask as queries of one, and no key is copied.
    """
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import repeat_kv

    batch, num_heads, length, size = query.shape
    if length == 1:
        query = query.reshape(batch, key.shape[1], -1, size)
    else:
        key, value = (repeat_kv(part, module.num_key_value_groups) for part in (key, value))
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    seen = torch.matmul(torch.softmax(weights, -1), value).reshape(batch, num_heads, length, size)
    return seen.transpose(1, 2).contiguous(), None
