"""Sampling while weights wait elsewhere: offloading and casting hooks act on the model's verbs as on `forward`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler
from torch import Tensor, nn

from acdit import ACDiTTransformer
from acdit.sampling import sample_blocks
from acdit.text_sampling import sample_tokens
from tests.conftest import tiny_model
from tests.texts import text_model

# A CPU stands for the accelerator. What is offloaded is on the meta device (accelerate), or was written to disk and is
# left uninitialised in memory (diffusers): a verb that is not brought its weights fails, or answers something else.
OFFLOADED: dict[str, Callable[[ACDiTTransformer, Path], object]] = {
    "layer by layer to meta": lambda model, _: cpu_offload(model, torch.device("cpu")),
    "groups of layers to disk": lambda model, folder: model.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaves to disk": lambda model, folder: model.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}


def sample(model: ACDiTTransformer) -> Tensor:
    if model.mask_token is not None:
        return torch.cat(list(sample_tokens(model, prompts=[[1, 2]], generator=0)), dim=1)
    options = {"class_labels": [1, 3], "num_inference_steps": 2, "guidance_scale": 2.0, "generator": 0}
    return torch.stack(list(sample_blocks(model, DDIMScheduler(clip_sample=False), **options)), dim=1)


@pytest.mark.parametrize("make", [tiny_model, lambda: text_model(12, 3, vocab=5)], ids=["pictures", "text"])
@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_model_samples_the_same(way: str, make: Callable[[], ACDiTTransformer], tmp_path: Path) -> None:
    model = make().eval()
    expected = sample(model)
    OFFLOADED[way](model, tmp_path)
    torch.testing.assert_close(sample(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_model_encodes_the_same(way: str, tmp_path: Path) -> None:
    model = tiny_model().eval()
    blocks = torch.randn(2, 4, 16, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = model.encode(blocks, [0, -1]) + model.encode_noisy(blocks, blocks, 3.0)
        OFFLOADED[way](model, tmp_path)
        found = model.encode(blocks, [0, -1]) + model.encode_noisy(blocks, blocks, 3.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_weights_kept_in_eight_bits_are_computed_with_in_more() -> None:
    model = tiny_model(dtype=torch.float32).eval()
    expected = sample(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert {"layers.0.attn.qkv.weight", "layers.1.mlp.fc2.weight", "layers.0.modulation.1.weight"} <= kept
    assert not any(name.startswith(("x_embedder", "t_embedder", "y_embedder", "final_layer")) for name in kept)
    found = sample(model)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.3 * expected.abs().mean()


def test_whole_models_are_moved_by_every_verb() -> None:
    model = tiny_model().eval()
    seen = []

    class Seeing(CpuOffload):
        def pre_forward(self, module: nn.Module, *arguments: object, **options: object) -> object:
            seen.append(type(module).__name__)
            return super().pre_forward(module, *arguments, **options)

    model._hf_hook = Seeing(torch.device("cpu"))
    blocks, cache = torch.randn(1, 4, 16, 2, dtype=torch.float64), model.new_cache(1)
    with torch.no_grad():
        model.prefill(blocks[:, :1], cache)
        model.denoise(blocks[:, 1], 5.0, None, cache)
        model.encode(blocks)
        model.encode_noisy(blocks, blocks, 5.0)
    assert seen == ["ACDiTTransformer"] * 4


def test_where_a_model_computes_is_not_where_its_weights_wait() -> None:
    model = tiny_model()
    assert model.execution_device == model.device == torch.device("cpu")
    cpu_offload(model, torch.device("cpu"))
    assert (model.device.type, model.execution_device.type) == ("meta", "cpu")
