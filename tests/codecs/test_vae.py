"""Any diffusers autoencoder: scale, posterior, memory savers, identity, loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acdit.codecs import LatentScale, VAECodec, load_vae, spatial_factor, vae_sha256
from acdit.codecs.autoencoders import set_memory_savers
from acdit.errors import ConfigError
from tests import autoencoders


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (autoencoders.kl, (4, 8, 8)),
        (lambda: autoencoders.kl(latent_channels=16), (16, 8, 8)),
        (autoencoders.tiny, (4, 8, 8)),
        (autoencoders.dc, (32, 4, 4)),
        (autoencoders.vq, (3, 8, 8)),
    ],
)
def test_every_kind_codes_both_ways_as_diffusers_does(
    make: Callable[[], Any], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path))
    codec, pictures = VAECodec(vae), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert codec.latent_shape(16, 16) == shape
    with torch.no_grad():
        (encoded,) = vae.encode(pictures.float() / 127.5 - 1, return_dict=False)
        raw = encoded.mean if hasattr(encoded, "mean") and not isinstance(encoded, torch.Tensor) else encoded
        decoded = vae.decode(raw).sample
    shift = vae.config.get("shift_factor") or 0.0
    latents = codec.encode(pictures)
    assert tuple(latents.shape[1:]) == shape
    torch.testing.assert_close(latents, (raw - shift) * vae.config.scaling_factor)
    torch.testing.assert_close(codec.decode(latents), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_the_tiny_autoencoders_latents_are_in_model_space_already() -> None:
    vae = autoencoders.tiny()
    assert VAECodec(vae).scale == LatentScale(1.0, 0.0)
    latents = VAECodec(vae).encode(torch.rand(1, 3, 16, 16))
    clamped = VAECodec(vae).decode(latents * 1e6)  # its decoder saturates at ±3 by itself
    torch.testing.assert_close(clamped, VAECodec(vae).decode(latents.sign() * 1e6))


def test_means_and_deviations_per_channel() -> None:
    means, stds = (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 4.0)
    vae = autoencoders.kl(shift_factor=None, scaling_factor=0.7, latents_mean=means, latents_std=stds)
    codec, pictures = VAECodec(vae), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        posterior = vae.encode(pictures * 2 - 1).latent_dist
    mean, std = codec.moments(pictures)
    for channel in range(4):
        expected = (posterior.mean[:, channel] - means[channel]) / stds[channel] * 0.7
        torch.testing.assert_close(mean[:, channel], expected)
        torch.testing.assert_close(std[:, channel], posterior.std[:, channel] / stds[channel] * 0.7)
    torch.testing.assert_close(codec.scale.to_latent(mean), posterior.mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="both"):
        VAECodec(autoencoders.kl(shift_factor=0.1, latents_mean=means))
    with pytest.raises(ConfigError, match="one a channel"):
        VAECodec(autoencoders.kl(latents_std=(1.0, 2.0)))


def test_the_posteriors_mode_and_samples() -> None:
    vae, pictures = autoencoders.kl(), torch.rand(2, 3, 16, 16)
    mode, codec = VAECodec(vae).encode(pictures), VAECodec(vae, posterior="sample")
    mean, std = codec.moments(pictures)
    noise = torch.randn(mean.shape)
    assert torch.equal(mode, mean)
    torch.testing.assert_close(codec.encode(pictures, noise), mean + std * noise)
    with torch.no_grad():
        theirs = vae.encode(pictures * 2 - 1).latent_dist.sample(torch.Generator().manual_seed(1))
    ours = codec.encode(pictures, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, (theirs - 0.1) * 5.0)
    with pytest.raises(ConfigError, match="generator"):
        codec.encode(pictures)
    tiny = VAECodec(autoencoders.tiny(), posterior="sample")  # no posterior: nothing to draw
    assert torch.equal(tiny.encode(pictures, torch.randn(2, 4, 8, 8)), tiny.moments(pictures)[0])
    with pytest.raises(ConfigError, match="posterior"):
        VAECodec(vae, posterior="median")


def test_tiling_and_slicing_change_how_and_not_what() -> None:
    pictures = torch.rand(3, 3, 32, 32)
    whole = VAECodec(autoencoders.kl()).encode(pictures)
    sliced, tiled = autoencoders.kl(), autoencoders.kl()
    set_memory_savers(sliced, slicing=True)
    set_memory_savers(tiled, tiling=True)
    calls: list[tuple[int, ...]] = []
    for vae in (sliced, tiled):
        vae.encoder.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    torch.testing.assert_close(VAECodec(sliced).encode(pictures), whole, rtol=1e-4, atol=1e-5)
    assert calls == [(1, 3, 32, 32)] * 3
    calls.clear()
    latents = VAECodec(tiled).encode(pictures)
    assert latents.shape == whole.shape
    assert len(calls) > 1
    assert max(shape[-1] for shape in calls) == 16
    assert VAECodec(tiled).decode(latents).shape == pictures.shape
    with pytest.raises(ConfigError, match="AutoencoderTiny of 4 channels, factor 2"):
        set_memory_savers(autoencoders.tiny(), tiling=True)
    with pytest.raises(ConfigError, match="VQModel, which has none"):
        set_memory_savers(autoencoders.vq(), tiling=True)


def test_the_identity_is_of_class_settings_and_weights(tmp_path: Path) -> None:
    vae = autoencoders.kl()
    identity = vae_sha256(vae)
    vae.save_pretrained(tmp_path / "a")
    vae.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert vae_sha256(load_vae(str(tmp_path / "a"))) == identity
    assert vae_sha256(load_vae(str(tmp_path / "b"))) == identity
    assert vae_sha256(autoencoders.kl(seed=1)) != identity
    assert vae_sha256(autoencoders.kl(scaling_factor=0.13025)) != identity
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["latents_std"]  # as an older diffusers would have saved it: a default spelled out is none the less one
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert vae_sha256(load_vae(str(tmp_path / "a"))) == identity
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert vae_sha256(vae) != identity


def test_a_vae_is_loaded_from_a_pipelines_folder(tmp_path: Path) -> None:
    autoencoders.kl().save_pretrained(tmp_path / "vae")
    assert spatial_factor(load_vae(str(tmp_path), subfolder="vae")) == 2
    with pytest.raises(ConfigError, match="subfolder: vae"):
        load_vae(str(tmp_path))


def test_what_is_no_vae_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no-such/vae.*no such folder, and nothing on the hub"):
        load_vae("no-such/vae")
    for path in (str(tmp_path / "none"), "./none", "../a/b", "a/b/c"):  # these are no hub ids: no network is asked
        with pytest.raises(ConfigError, match="found no such folder; expected a folder"):
            load_vae(path)
    autoencoders.kl().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    good = config.read_text()
    for name in ("UNet2DModel", "os", "NoSuchClass", None):
        config.write_text(json.dumps({**json.loads(good), "_class_name": name}))
        with pytest.raises(ConfigError, match="_class_name"):
            load_vae(str(tmp_path))
    config.write_text(good)
    tensors = load_file(weights)
    dropped = tensors.pop("encoder.conv_in.bias")
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match=r"1 weights missing.*encoder\.conv_in\.bias"):
        load_vae(str(tmp_path))
    save_file({**tensors, "encoder.conv_in.bias": torch.cat([dropped, dropped])}, weights)
    with pytest.raises(ConfigError, match=r"conv_in|cannot be read"):
        load_vae(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_vae(str(tmp_path))
    weights.unlink()
    torch.save({**tensors, "encoder.conv_in.bias": dropped}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be read.*\.bin files are not read"):
        load_vae(str(tmp_path))


def test_clips_are_coded_a_few_frames_at_a_time() -> None:
    vae, clips = autoencoders.kl(), torch.randint(0, 256, (2, 3, 5, 16, 16), dtype=torch.uint8)
    seen: list[int] = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    latents = VAECodec(vae, frames_at_once=4).encode(clips)
    pixels = VAECodec(vae, frames_at_once=4).decode(latents)
    assert (tuple(latents.shape), tuple(pixels.shape)) == ((2, 4, 5, 8, 8), tuple(clips.shape))
    assert seen == [4, 4, 2] * 2
    for clip in range(2):
        for frame in range(5):
            alone = VAECodec(vae).encode(clips[clip : clip + 1, :, frame])
            torch.testing.assert_close(latents[clip, :, frame], alone[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pixels[clip, :, frame], VAECodec(vae).decode(alone)[0], rtol=1e-4, atol=1e-4)
    VAECodec(vae).decode(torch.zeros(2, 4, 20, 8, 8))
    assert max(seen) <= 16
