"""The pipeline as a diffusers user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler

from acdit import ACDiTPipeline
from acdit.codecs import VAECodec
from acdit.errors import ConfigError
from acdit.sampling import sample_blocks
from tests.conftest import tiny_model

NAMES = {str(index): f"class {index}" for index in range(5)}


def make_pipeline(channels: int = 1, vae: AutoencoderKL | None = None, **options: Any) -> ACDiTPipeline:
    model = tiny_model(dtype=torch.float32, in_channels=channels, **options)
    pipeline = ACDiTPipeline(model, DPMSolverMultistepScheduler(), vae=vae, id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.4, shift_factor=0.1, sample_size=16,
    ).eval()  # fmt: skip


def test_output_types() -> None:
    pipeline = make_pipeline(channels=3)
    options: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2, "generator": 0}
    pictures = pipeline(**options).images
    arrays = pipeline(**options, output_type="np").images
    tensors = pipeline(**options, output_type="pt", return_dict=False)[0]
    latents = pipeline(**options, output_type="latent").images
    assert [picture.size for picture in pictures] == [(8, 8)] * 2
    assert arrays.shape == (2, 8, 8, 3)
    assert tensors.shape == latents.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(arrays, tensors.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(tensors, (latents / 2 + 0.5).clamp(0, 1))
    assert np.abs(np.asarray(pictures[0]) / 255 - arrays[0]).max() <= 0.5 / 255 + 1e-6


def test_the_pipeline_is_the_sampler_and_the_layout() -> None:
    pipeline = make_pipeline()
    blocks = list(
        sample_blocks(
            pipeline.transformer,
            pipeline.scheduler,
            class_labels=[3],
            num_inference_steps=3,
            guidance_scale=1.5,
            generator=7,
        )
    )
    expected = pipeline.transformer.layout.from_blocks(torch.stack(blocks, dim=1))
    out = pipeline(3, num_inference_steps=3, guidance_scale=1.5, generator=7, output_type="latent").images
    assert torch.equal(out, expected)


def test_a_saved_pipeline_loads_back_with_no_trust_flag(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ACDiTPipeline"
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = ACDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [0, 4], "num_inference_steps": 2, "generator": 1, "output_type": "pt"}
    for one in (pipeline, loaded):
        one.transformer.double()  # fp32 answers differ in the last bits with the memory alignment of the weights
    torch.testing.assert_close(loaded(**options).images, pipeline(**options).images, rtol=0, atol=1e-10)
    assert loaded.get_label_ids(["class 3", "class 0"]) == [3, 0]
    assert loaded.config.id2label == NAMES


def test_callbacks_see_every_step_and_every_block() -> None:
    pipeline = make_pipeline()
    steps, blocks = [], []

    def on_step(pipe: ACDiTPipeline, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, kwargs["block"], kwargs["latents"].shape))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    def on_block(pipe: ACDiTPipeline, block: int, kwargs: dict[str, Any]) -> None:
        blocks.append((block, float(kwargs["latents"].abs().max())))

    pipeline(1, num_inference_steps=2, callback_on_step_end=on_step, callback_on_block_end=on_block)
    assert steps == [(step, step // 2, (1, 16, 1)) for step in range(8)]
    assert blocks == [(block, 0.0) for block in range(4)]
    with pytest.raises(ConfigError, match="latents"):
        pipeline(1, callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_callbacks_get_what_they_ask_for() -> None:
    pipeline = make_pipeline()
    seen = []

    def on_step(pipe: ACDiTPipeline, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((set(kwargs), pipe.num_timesteps))
        return kwargs

    for wanted in (["latents"], ["block"], ["latents", "block"]):
        seen.clear()
        pipeline(1, [1, 2, 1, 1], callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=wanted)
        assert seen == [(set(wanted), 5)] * 5


def test_a_callback_changes_the_guidance_of_the_steps_that_follow() -> None:
    pipeline = make_pipeline()
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": 0, "output_type": "latent"}
    expected = pipeline([1, 2], guidance_scale=[2.0, 2.0, 2.0, 5.0], **options).images

    def on_step(pipe: ACDiTPipeline, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 5:  # the last step of the third block
            pipe._guidance_scale = 5.0
        return kwargs

    found = pipeline([1, 2], guidance_scale=2.0, callback_on_step_end=on_step, **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert pipeline.guidance_scale == 5.0
    with pytest.raises(ConfigError, match="guidance without labels"):
        pipeline(None, callback_on_step_end=on_step, **options)


def test_the_progress_bar_counts_all_steps(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    pipeline(1, num_inference_steps=[1, 2, 3, 4])
    assert "10/10" in capfd.readouterr().err


def test_the_given_part_of_a_picture_is_kept_and_the_rest_continued() -> None:
    pipeline = make_pipeline()
    picture = torch.rand(1, 1, 8, 8)
    out = pipeline(
        [1, 2], num_inference_steps=2, prefix=picture, num_prefix_blocks=2, output_type="pt", generator=0
    ).images
    assert out.shape == (2, 1, 8, 8)
    torch.testing.assert_close(out[:, :, :4], picture[:, :, :4].expand(2, -1, -1, -1))  # two 4×4 blocks: the top half
    assert (out[0, :, 4:] - out[1, :, 4:]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"1 … 3"):
        pipeline(1, prefix=picture, num_prefix_blocks=4)


def test_latent_models_decode_with_their_vae(tmp_path: Path) -> None:
    vae = tiny_vae()
    pipeline = make_pipeline(channels=4, vae=vae)
    latents = pipeline(1, num_inference_steps=2, generator=0, output_type="latent").images
    pixels = pipeline(1, num_inference_steps=2, generator=0, output_type="pt").images
    with torch.no_grad():
        expected = (vae.decode(latents / 0.4 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(pixels, expected)
    pipeline.save_pretrained(tmp_path)
    loaded = ACDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(1, num_inference_steps=2, generator=0, output_type="pt").images
    torch.testing.assert_close(again, pixels, rtol=0, atol=1e-3)


def test_the_vae_codec_scales_and_shifts_both_ways() -> None:
    vae, pixels = tiny_vae(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mode = vae.encode(pixels * 2 - 1).latent_dist.mode()
    encoded = VAECodec(vae).encode(pixels)
    torch.testing.assert_close(encoded, (mode - 0.1) * 0.4)
    clip = torch.rand(2, 3, 5, 16, 16)
    codec = VAECodec(vae)
    frame_by_frame = torch.stack([codec.encode(clip[:, :, t]) for t in range(5)], dim=2)
    torch.testing.assert_close(codec.encode(clip), frame_by_frame, rtol=1e-4, atol=1e-5)
    assert codec.decode(codec.encode(clip)).shape == clip.shape
    assert codec.model_shape((3, 5, 16, 16)) == tuple(codec.encode(clip).shape[1:])
    drawing = VAECodec(vae, posterior="sample")
    assert drawing.noise_shape((3, 5, 16, 16)) == codec.model_shape((3, 5, 16, 16))
    assert drawing.noise_shape((3, 16, 16)) == codec.model_shape((3, 16, 16)) == codec.latent_shape(16, 16)


def test_a_latent_model_without_its_vae_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="vae"):
        make_pipeline(channels=4)(1)


def test_videos_come_as_frames() -> None:
    model = tiny_model((4, 4, 4), (2, 4, 4), dtype=torch.float32, in_channels=1)
    pipeline = ACDiTPipeline(model, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [0, 1], "num_inference_steps": 1, "generator": 0}
    assert pipeline(**options, output_type="pt").images.shape == (2, 4, 1, 4, 4)
    assert pipeline(**options, output_type="np").images.shape == (2, 4, 4, 4, 1)
    clips = pipeline(**options).images
    assert [len(clip) for clip in clips] == [4, 4]
    assert clips[0][0].size == (4, 4)


def test_mistakes_are_named() -> None:
    pipeline = make_pipeline()
    with pytest.raises(ConfigError, match="latent"):
        pipeline(1, output_type="tensor")
    with pytest.raises(ConfigError, match="no such class"):
        pipeline.get_label_ids("no such class")


def test_without_labels_guidance_is_off() -> None:
    pipeline = make_pipeline()
    unlabelled = pipeline(num_inference_steps=2, batch_size=2, generator=0, output_type="pt").images
    null = pipeline([5, 5], num_inference_steps=2, guidance_scale=1.0, generator=0, output_type="pt").images
    assert torch.equal(unlabelled, null)


def test_labels_may_be_names_and_any_integers() -> None:
    pipeline = make_pipeline()
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": 0, "output_type": "latent"}
    wanted = pipeline([3], **options).images
    for given in (3, "class 3", ["class 3"], np.int64(3), torch.tensor(3), torch.tensor([3])):
        assert torch.equal(pipeline(given, **options).images, wanted)


def test_a_clip_goes_back_in_as_it_came_out() -> None:
    pipeline = make_pipeline(channels=1, grid=(4, 4, 4), block=(2, 4, 4), attention_head_dim=16)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    clip = pipeline([1], generator=0, **options).images
    assert clip.shape == (1, 4, 1, 4, 4)
    longer = pipeline([1], generator=1, prefix=clip, num_prefix_blocks=1, **options).images
    torch.testing.assert_close(longer[:, :2], clip[:, :2], rtol=0, atol=1e-6)
    assert (longer[:, 2:] - clip[:, 2:]).abs().max() > 1e-3


def test_what_has_no_pixels_is_latent_only() -> None:
    pipeline = make_pipeline(grid=(16,), block=(4,))
    with pytest.raises(ConfigError, match="latent"):
        pipeline([1], num_inference_steps=1)
    assert pipeline([1], num_inference_steps=1, output_type="latent").images.shape == (1, 1, 16)


def test_blocks_without_their_prefix_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_prefix_blocks"):
        make_pipeline()([1], num_prefix_blocks=2)
