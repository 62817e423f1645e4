"""The faster CPU code computes what the model's own code computes, and changes one model only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.scenes import tiny_model
from stages.training import cpu_speedups

SAME_SIZE, MIXED_SIZES = ((96, 96), (96, 96)), ((96, 96), (128, 80))


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_model.create_processor()


def create_model(processor: Any) -> Any:
    import torch

    torch.manual_seed(0)
    return tiny_model.create_model(processor).eval()


def make_inputs(processor: Any, sizes: Sequence[tuple[int, int]], questions: Sequence[str], **kwargs: Any) -> Any:
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    return processor(text=texts, images=images, padding=True, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("sizes", [SAME_SIZE, MIXED_SIZES])
def test_logits_are_those_of_the_model_s_own_code(processor: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    import torch

    model = create_model(processor)
    inputs = make_inputs(processor, sizes, ["Describe the picture."] * 2)
    with torch.no_grad():
        before = model(**inputs).logits
        cpu_speedups.install(model, compiled=False)
        after = model(**inputs).logits
    attended = inputs["attention_mask"].bool()
    assert torch.allclose(before[attended], after[attended], atol=1e-4)


def test_generated_tokens_are_those_of_the_model_s_own_code(processor: Any) -> None:
    import torch

    model = create_model(processor)
    inputs = make_inputs(processor, SAME_SIZE, ("Describe the picture.", "What?"), padding_side="left")
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    before = model.generate(**inputs, **options)
    cpu_speedups.install(model, compiled=False)
    after = model.generate(**inputs, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert torch.allclose(torch.stack(before.logits), torch.stack(after.logits), atol=1e-4)


def test_layers_are_compiled_for_training_and_not_for_generation(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new token has another shape, so that compiled layers would be compiled again and again."""
    import torch

    num_calls = 0

    def compile_nothing(forward: Any, *, dynamic: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += dynamic
            return forward(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = create_model(processor)
    inputs = make_inputs(processor, SAME_SIZE, ["Describe the picture."] * 2)
    cpu_speedups.install(model, compiled=True)
    model.generate(**inputs, max_new_tokens=3)
    assert num_calls == 0
    model(**inputs).logits.sum().backward()
    assert num_calls == model.config.text_config.num_hidden_layers


def test_no_other_model_of_the_process_is_affected(processor: Any) -> None:
    import torch

    other = create_model(processor)
    inputs = make_inputs(processor, SAME_SIZE, ["Describe the picture."] * 2)
    attention = other.config._attn_implementation

    def describe_code(model: Any) -> list[Any]:
        return [getattr(module.forward, "__func__", module.forward) for module in model.modules()]

    with torch.no_grad():
        before, code = other(**inputs).logits, describe_code(other)
        changed = create_model(processor)
        cpu_speedups.install(changed, compiled=False)
        cpu_speedups.encode_distinct_images(changed.model.visual)
        changed(**inputs)
        after = other(**inputs).logits
    assert torch.equal(before, after)
    created_later = create_model(processor)
    assert describe_code(changed) != code == describe_code(other) == describe_code(created_later)
    assert other.config._attn_implementation == created_later.config._attn_implementation == attention
    assert changed.config._attn_implementation == cpu_speedups.ATTENTION


def test_a_saved_model_does_not_know_of_the_speedups(processor: Any, tmp_path: Path) -> None:
    model = create_model(processor)
    model.save_pretrained(tmp_path / "plain")
    cpu_speedups.install(model, compiled=False)
    model.save_pretrained(tmp_path / "fast")
    plain, fast = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("plain", "fast"))
    assert plain == fast


def test_repeated_images_of_a_batch_are_encoded_once(processor: Any) -> None:
    import torch

    visual = create_model(processor).model.visual
    one, other = (Image.effect_noise(size, 90).convert("RGB") for size in MIXED_SIZES)
    inputs = processor.image_processor(images=[one, other, one, one], return_tensors="pt")
    before = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    num_patches = []
    visual.patch_embed.register_forward_hook(lambda _, args, __: num_patches.append(len(args[0])))
    cpu_speedups.encode_distinct_images(visual)
    after = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    assert torch.allclose(before, after, atol=1e-5)
    assert num_patches == [inputs["image_grid_thw"][:2].prod(-1).sum()]


def find_compile_cache(folder: str | None) -> str:
    """The compile cache of a process whose environment names this directory."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    code = (
        "import os; from stages.training import cpu_speedups; cpu_speedups._use_private_compile_cache();"
        f" print(os.environ[{name!r}])"
    )
    env = {key: value for key, value in os.environ.items() if key != name} | ({name: folder} if folder else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip()


@pytest.mark.slow
def test_each_process_has_a_compile_cache_of_its_own(tmp_path: Path) -> None:
    """A file that a killed process left incomplete would otherwise be used as if it were whole."""
    first, second = find_compile_cache(None), find_compile_cache(None)
    assert first and second and first != second
    assert not Path(first).exists()
    assert find_compile_cache(str(tmp_path)) == str(tmp_path)
