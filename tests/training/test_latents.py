"""The latent path end to end: encode → train → sample → decode; and what training refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acdit import ACDiTPipeline
from acdit.cli import main
from acdit.codecs import VAECodec, load_vae, vae_sha256
from acdit.errors import ConfigError, NonFiniteError
from acdit.recipe import Recipe, recipe_from_dict, recipe_to_dict
from acdit.training.batches import Batches
from acdit.training.build import build
from tests import autoencoders
from tests.conftest import tiny_model
from tests.training.runs import run, state_hash, tiny_recipe

MODEL = {
    "grid": [8, 8], "block": [4, 4], "in_channels": 4, "num_layers": 1, "num_attention_heads": 1,
    "attention_head_dim": 8, "num_classes": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoders.two_encodings(tmp_path_factory.mktemp("latents"))


def recipe(base: Path, cached: str | None = "mode", **overrides: Any) -> Recipe:
    """Cached latents, or (None) pictures that are encoded at every step."""
    data = {"kind": "latents", "root": str(base / cached)} if cached else {
        "kind": "images", "root": str(base / "pictures"), "size": 16
    }  # fmt: skip
    settings = {"model": MODEL, "data__flip": True, "codec__kind": "vae", "codec__vae": str(base / "vae"), **overrides}
    return tiny_recipe(**{"data": data, "train__steps": 4, "train__keep_checkpoints": 1, **settings})


def first_batches(recipe: Recipe, steps: int = 3) -> torch.Tensor:
    batches = iter(Batches(build(recipe), 0, 1, 0, torch.device("cpu")))
    return torch.stack([next(batches)[0].clean for _ in range(steps)])


def test_encode_train_sample_decode(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run(recipe(base, train__sample_every=4, sampling__num_inference_steps=2), tmp_path / "run")
    assert trainer.state.step == 4
    assert (tmp_path / "run" / "samples" / "step-4.png").is_file()
    model, out = tmp_path / "run" / "model", tmp_path / "out"
    assert main(["sample", str(model), "--labels", "0", "1", "--steps", "2", "--output", str(out)]) == 0
    pictures = sorted(out.glob("0*.png"))
    assert [Image.open(file).size for file in pictures] == [(16, 16)] * 2
    prefix = ["--prefix-image", str(pictures[0]), "--prefix-blocks", "2", "--labels", "1", "--steps", "2"]
    assert main(["sample", str(model), *prefix, "--output", str(tmp_path / "more")]) == 0
    pipeline = ACDiTPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    assert vae_sha256(pipeline.vae) == vae_sha256(load_vae(str(base / "vae")))
    options: dict[str, Any] = {"class_labels": [0, 1], "num_inference_steps": 2, "generator": 0}
    latents = pipeline(**options, output_type="latent").images
    assert latents.shape == (2, 4, 8, 8)
    expected = VAECodec(load_vae(str(base / "vae"))).decode(latents)
    torch.testing.assert_close(pipeline(**options, output_type="pt").images, expected)


def test_without_a_vae_latents_can_be_had_and_pictures_say_what_to_do(base: Path, tmp_path: Path) -> None:
    trainer = run(recipe(base, codec__vae=None), tmp_path / "run")
    pipeline = ACDiTPipeline.from_pretrained(trainer.run / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae is None
    assert pipeline(0, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(ConfigError, match=r'output_type="latent".*load_vae.*codec\.vae=PATH'):
        pipeline(0, num_inference_steps=1)
    with pytest.raises(ConfigError, match=r"train\.sample_every.*codec\.vae=PATH"):
        build(recipe(base, codec__vae=None, train__sample_every=2))
    published = str(tmp_path / "run" / "model")
    arguments = ["sample", published, "--labels", "0", "--steps", "1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert main([*arguments, "--vae-tiling"]) == 2
    assert main([*arguments, "--vae", str(base / "vae"), "--vae-tiling", "--vae-slicing"]) == 0
    assert (tmp_path / "out" / "grid.png").is_file()
    three = ACDiTPipeline(tiny_model(in_channels=3, dtype=torch.float32), pipeline.scheduler, latents=True)
    with pytest.raises(ConfigError, match="without its vae"):  # three channels look like a picture's, and are none
        three(0, num_inference_steps=1)


def test_cached_latents_give_the_batches_of_encoding_at_every_step(base: Path) -> None:
    """Same order, same flips, same posterior noise; the views cached are the views encoded."""
    for posterior in ("mode", "sample"):
        cached = first_batches(recipe(base, "moments", codec__posterior=posterior))
        online = first_batches(recipe(base, None, codec__posterior=posterior))
        torch.testing.assert_close(cached, online, rtol=1e-3, atol=1e-3)
    unflipped = first_batches(recipe(base, "moments", data__flip=False))
    flipped = first_batches(recipe(base, "moments"))
    same = [torch.equal(a, b) for a, b in zip(unflipped.flatten(0, 1), flipped.flatten(0, 1), strict=True)]
    assert any(same)
    assert not all(same)
    assert not torch.allclose(first_batches(recipe(base, "moments", codec__posterior="sample")), flipped)


def test_runs_resume_to_the_bit_and_workers_change_nothing(base: Path, tmp_path: Path) -> None:
    options = {"codec__posterior": "sample", "train__keep_checkpoints": 9}
    whole = run(recipe(base, "moments", **options), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    shutil.copytree(base / "vae", tmp_path / "moved")
    moved = recipe(base, "moments", **options, codec__vae=str(tmp_path / "moved"), data__num_workers=1)
    assert state_hash(run(moved, tmp_path / "cut", resume="latest")) == state_hash(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scaling_factor": 0.13025}, r"scaling_factor 0\.13025 \(latents: 5\.0\)"),
        ({"shift_factor": 0.2}, r"shift_factor 0\.2 \(latents: 0\.1\)"),
        ({"seed": 1}, r"another autoencoder.*sha256"),
    ],
)
def test_another_autoencoder_than_the_latents_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    autoencoders.kl(**change).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        build(recipe(base, codec__vae=str(tmp_path)))


def test_the_recipe_may_describe_the_autoencoder(base: Path) -> None:
    identity = vae_sha256(load_vae(str(base / "vae")))
    right = {"codec__scaling_factor": 5.0, "codec__shift_factor": 0.1, "codec__vae_sha256": identity}
    for cached in ("mode", None):
        build(recipe(base, cached, **right))
        for name, wrong in (("scaling_factor", 0.18215), ("shift_factor", 0.0), ("vae_sha256", "0" * 64)):
            with pytest.raises(ConfigError, match=rf"codec\.{name}"):
                build(recipe(base, cached, **{**right, f"codec__{name}": wrong}))
    with pytest.raises(ConfigError, match=r"codec\.scaling_factor"):
        build(recipe(base, codec__vae=None, codec__scaling_factor=0.18215))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {**MODEL, "in_channels": 16}}, r"model\.in_channels.*4, as the latents have"),
        ({"model": {**MODEL, "grid": [16, 16]}}, r"model\.grid.*\[8, 8\], the size of the latents"),
        ({"codec__kind": "pixels", "codec__vae": None}, r"codec\.kind.*set codec\.kind=vae"),
        ({"codec__mean": 0.4}, r"codec\.mean"),
        ({"codec__vae": "no/such/vae"}, "vae no/such/vae.*no such folder"),
        ({"codec__vae": None, "codec__tiling": True}, r"codec\.tiling"),
    ],
)
def test_parts_that_do_not_fit_are_refused(base: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(recipe(base, **change))


def test_settings_of_a_vae_are_not_ignored_for_pixels(base: Path) -> None:
    plain = recipe_to_dict(tiny_recipe())
    for name, value in (("vae", "x"), ("posterior", "sample"), ("slicing", True), ("scaling_factor", 1.0)):
        with pytest.raises(ConfigError, match=rf"codec\.{name}.*codec\.kind=vae"):
            build(recipe_from_dict({**plain, "codec": {name: value}}))
    with pytest.raises(ConfigError, match=r"codec\.vae.*acdit encode"):
        build(recipe(base, None, codec__vae=None))
    with pytest.raises(ConfigError, match=r"data\.channels"):
        build(recipe(base, None, data__channels=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_poisoned_latents_end_the_run_by_name(base: Path, tmp_path: Path, num_workers: int) -> None:
    root = tmp_path / "latents"
    shutil.copytree(base / "mode", root)
    tensors = load_file(root / "shard-00000.safetensors")
    tensors["latents"][1] = float("nan")
    save_file(tensors, root / "shard-00000.safetensors")
    poisoned = recipe(base, data={"kind": "latents", "root": str(root), "flip": True, "num_workers": num_workers})
    with pytest.raises(NonFiniteError, match=r"shard-00000\.safetensors.*index 1"):
        run(poisoned, tmp_path / "run")


def test_a_tiny_autoencoder_trains_and_decodes_too(base: Path, tmp_path: Path) -> None:
    autoencoders.tiny().save_pretrained(tmp_path / "vae")
    small = recipe(base, None, codec__vae=str(tmp_path / "vae"), train__steps=1)
    trainer = run(small, tmp_path / "run")
    pipeline = ACDiTPipeline.from_pretrained(trainer.run / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(0, num_inference_steps=1).images[0].size == (16, 16)
