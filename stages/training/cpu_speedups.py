"""Faster forward passes for training a Qwen2.5-VL on a CPU, installed on one model's own modules.

Nothing is saved with the model, and no other model in the process is affected.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "recap_matmul"  # the name under which transformers knows `matmul_attention`


def install(model: Any, *, compiled: bool) -> None:
    """Makes training about twice as fast with plain matrix products instead of kernels that are slow on a CPU.

    Results equal those of the model's own code up to rounding.

    Args:
        compiled: compile the layers too. Training becomes another third faster after about a minute of compilation,
            which needs a C++ compiler.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, matmul_attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)
    visual = model.model.visual
    visual.register_forward_pre_hook(_compare_image_sizes, with_kwargs=True)
    visual.patch_embed.forward = MethodType(embed_patches, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = MethodType(batched_vision_attention, block.attn)
    if compiled:
        _use_private_compile_cache()
        for block in visual.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        for layer in model.model.language_model.layers:
            layer.forward = _compile_for_training(layer.forward)


def _compile_for_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where gradients are computed; as it is while tokens are generated, one by one and ever longer."""
    import torch

    compiled = torch.compile(forward, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return call


@cache
def _use_private_compile_cache() -> None:
    """Points torch's compile cache at a temporary directory of this process.

    In a shared one, a file that a killed process left incomplete would be used as if it were whole. A directory that
    the user has set is kept; torch sets its own default in the same variable.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        folder = tempfile.mkdtemp(prefix="recap-compiled-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def encode_distinct_images(visual: Any) -> None:
    """Makes a vision tower encode each distinct image of a batch once; the answers of a GRPO group share one."""
    encode = visual.forward

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        import torch

        patches = hidden_states.split(grid_thw.prod(-1).tolist())
        contents = [image.detach().float().cpu().numpy().tobytes() for image in patches]
        first: dict[bytes, int] = {}  # content -> the first image in the batch that has it
        for number, content in enumerate(contents):
            first.setdefault(content, number)
        distinct = list(first.values())
        places = {content: place for place, content in enumerate(first)}
        output = encode(torch.cat([patches[number] for number in distinct]), grid_thw=grid_thw[distinct], **kwargs)
        num_tokens = (grid_thw[distinct].prod(-1) // visual.spatial_merge_size**2).tolist()
        parts = output.pooler_output.split(num_tokens)
        output.pooler_output = torch.cat([parts[places[content]] for content in contents])
        return output

    visual.forward = forward


def embed_patches(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Qwen2_5_VisionPatchEmbed.forward without a convolution, since the kernel is as large as a patch."""
    weight = self.proj.weight
    return hidden_states.to(weight.dtype) @ weight.view(weight.shape[0], -1).T


def _compare_image_sizes(visual: Any, _: Any, kwargs: dict[str, Any]) -> None:
    """Notes on the attention layers whether all images of the batch have one size."""
    sizes = kwargs["grid_thw"].prod(-1)
    same_size = bool((sizes == sizes[0]).all())
    for block in visual.blocks:
        block.attn.same_size = same_size


def batched_vision_attention(
    self: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, position_embeddings: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Qwen2_5_VLVisionAttention.forward, as one product over all images of a batch where they have one size."""
    if not getattr(self, "same_size", False):
        output: torch.Tensor = type(self).forward(
            self, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
        )
        return output
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

    num_images, num_patches = cu_seqlens.numel() - 1, hidden_states.shape[0]
    per_image = num_patches // num_images
    parts = self.qkv(hidden_states).reshape(num_images, per_image, 3, self.num_heads, -1)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (p.view(num_images, 1, per_image, -1).to(q.dtype) for p in position_embeddings)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    weights = torch.softmax(torch.matmul(q * self.scaling, k.transpose(2, 3)), -1)
    attended: torch.Tensor = self.proj(torch.matmul(weights, v).transpose(1, 2).reshape(num_patches, -1))
    return attended


def matmul_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as plain products; the backward pass of the fused kernel takes half of a training step on a CPU.

    While a single token is generated, heads that share keys are computed as several queries of one head, so that no
    key is copied.
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
    output = torch.matmul(torch.softmax(weights, -1), value).reshape(batch, num_heads, length, size)
    return output.transpose(1, 2).contiguous(), None
