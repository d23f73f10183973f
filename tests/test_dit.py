"""DiT's checkpoints: the converted pipeline against a DiT written here, and what is refused."""

from __future__ import annotations

import argparse
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

import acdit.dit
from acdit.cli import main
from acdit.errors import AcditError, ConfigError, DataError
from tests.test_convert import random_model, save, to_reference_state_dict

WIDTH, HEADS, DEPTH, CHANNELS, PATCH, SIDE, CLASSES = 24, 3, 2, 4, 2, 4, 5
"""SIDE: tokens a side."""


def position_table() -> Tensor:
    """DiT's: half the features for the column, half for the row; sines, then cosines, of 10000^(−2i/d)."""
    table = torch.zeros(1, SIDE * SIDE, WIDTH, dtype=torch.float64)
    quarter = WIDTH // 4
    for token in range(SIDE * SIDE):
        for part, place in enumerate((token % SIDE, token // SIDE)):
            for i in range(quarter):
                angle = place / 10000 ** (i / quarter)
                table[0, token, part * 2 * quarter + i] = math.sin(angle)
                table[0, token, part * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def random_dit(seed: int = 0) -> dict[str, Tensor]:
    """A state dict under DiT's names, fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH), "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH), "final_layer.linear": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }  # fmt: skip
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH), f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH), f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }  # fmt: skip
    state = {"pos_embed": position_table()}

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)

    state["y_embedder.embedding_table.weight"] = draw(CLASSES + 1, WIDTH)
    for name, shape in shapes.items():
        state |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    return state


def dit_forward(state: dict[str, Tensor], x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """The published DiT, adaLN-Zero with learned sigma, in plain functions."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    batch = len(x)
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    # DiT computes its sinusoid in fp32, whatever the weights are.
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = timestep[:, None].float() * frequencies
    sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoid)))
    c = c + state["y_embedder.embedding_table.weight"][labels]
    for i in range(DEPTH):
        vectors = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale_a) + shift_a)
        q, k, v = qkv.reshape(batch, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = h + gate_a * linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        inner = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale_m) + shift_m)
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        h = h + gate_m * linear(f"blocks.{i}.mlp.fc2", gelu)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = out.reshape(batch, SIDE, SIDE, PATCH, PATCH, 2 * CHANNELS).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, 2 * CHANNELS, SIDE * PATCH, SIDE * PATCH)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2).save_pretrained(path)
    return path


@pytest.mark.parametrize("wrapped", ["plain", "ema", "model"])
def test_the_converted_transformer_computes_what_the_published_dit_does(tmp_path: Path, wrapped: str) -> None:
    state = random_dit()
    content = {
        "plain": state,
        "ema": {"ema": state, "model": random_dit(1), "opt": {}, "args": argparse.Namespace(model="DiT")},
        "model": {"model": state},
    }[wrapped]
    acdit.dit.convert_dit(saved(tmp_path / "in.pt", content), tmp_path / "out", heads=HEADS)
    transformer = acdit.dit.DiTTransformer.from_pretrained(tmp_path / "out/transformer", torch_dtype=torch.float64)
    x = torch.randn(4, CHANNELS, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    timestep, labels = torch.tensor([0, 37, 500, 999]), torch.tensor([0, 4, 5, 2])  # 5: no label
    with torch.no_grad():
        out = transformer.eval()(x, timestep, labels).sample
    torch.testing.assert_close(out, dit_forward(state, x, timestep, labels), rtol=0, atol=1e-10)


def test_the_folder_is_a_pipeline_of_diffusers(tmp_path: Path, vae: Path) -> None:
    state = {name: value.float() for name, value in random_dit().items()}
    checkpoint = saved(tmp_path / "in.pt", state)
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--vae", str(vae), "--heads", str(HEADS)]) == 0
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule, config.prediction_type) == (1000, "linear", "epsilon")
    assert (config.beta_start, config.beta_end, config.clip_sample) == (1e-4, 0.02, False)
    # diffusers' pipeline takes 1000 for "no label": with five classes it is run without guidance.
    images = pipeline([1, 3], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)


def test_an_autoencoder_can_be_handed_in_later(tmp_path: Path, vae: Path) -> None:
    acdit.dit.convert_dit(saved(tmp_path / "in.pt", random_dit()), tmp_path / "out", heads=HEADS)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out", vae=AutoencoderKL.from_pretrained(vae))
    assert pipeline.vae.config.latent_channels == 4
    assert pipeline.transformer.config.sample_size == SIDE * PATCH


def test_released_widths_say_their_heads() -> None:
    assert acdit.dit.HEADS == {384: 6, 768: 12, 1024: 16, 1152: 16}


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.qkv.bias", "x_embedder.proj.bias", "pos_embed", "t_embedder.mlp.2.weight"]
)
@pytest.mark.parametrize("fault", ["missing", "misshaped", "nan"])
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path: Path, name: str, fault: str) -> None:
    state = random_dit()
    if fault == "missing":
        del state[name]
    else:
        state[name] = state[name][..., :-1].clone() if fault == "misshaped" else state[name] * math.nan
    with pytest.raises(DataError, match=name.replace(".", r"\.") if fault == "nan" else "blocks|embed"):
        acdit.dit.convert_dit(saved(tmp_path / "in.pt", state), tmp_path / "out", heads=HEADS)
    assert not (tmp_path / "out").exists()


def test_extra_weights_are_refused(tmp_path: Path) -> None:
    state = {**random_dit(), "blocks.0.attn.q_norm.weight": torch.ones(8, dtype=torch.float64)}
    with pytest.raises(DataError, match=r"extra 'blocks\.0\.attn\.q_norm\.weight'"):
        acdit.dit.convert_dit(saved(tmp_path / "in.pt", state), tmp_path / "out", heads=HEADS)


@pytest.mark.parametrize(
    ("options", "match"),
    [({}, "width 24"), ({"heads": 5}, "divisor"), ({"heads": 3, "vae": "nowhere"}, "vae nowhere.*no such folder")],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        acdit.dit.convert_dit(saved(tmp_path / "in.pt", random_dit()), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_of_other_channels_is_refused(tmp_path: Path) -> None:
    AutoencoderKL(latent_channels=8, block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match="8 latent channels"):
        acdit.dit.convert_dit(saved(tmp_path / "in.pt", random_dit()), tmp_path / "out", tmp_path / "vae", HEADS)


def test_a_malicious_file_runs_nothing(tmp_path: Path) -> None:
    class Gadget:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.mkdir, (tmp_path / "canary",))

    content = {**random_dit(), "blocks.9": Gadget()}
    torch.save(content, tmp_path / "in.pt", pickle_module=pickle)
    with pytest.raises(AcditError, match="refused"):
        acdit.dit.convert_dit(tmp_path / "in.pt", tmp_path / "out", heads=HEADS)
    assert not (tmp_path / "canary").exists()


def test_the_references_checkpoints_are_still_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path / "in.pt", to_reference_state_dict(random_model()))
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--vae", "x"]) == 2
    assert "a DiT checkpoint to use it for" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    assert "ACDiTPipeline" in (tmp_path / "out/model_index.json").read_text()
