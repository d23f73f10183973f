"""Training on clips: a 3-D model end to end, exact resumption, frames through an autoencoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acdit import ACDiTPipeline
from acdit.cli import main
from acdit.errors import ConfigError
from acdit.recipe import Recipe
from acdit.training import build
from acdit.training.batches import DataOrder
from tests import autoencoders
from tests.training.runs import run, state_hash, tiny_recipe
from tests.training.test_data_kinds import drawn

MODEL = {
    "grid": [8, 12, 12], "block": [4, 4, 4], "patch": [1, 3, 3], "in_channels": 1, "num_layers": 1,
    "num_attention_heads": 1, "attention_head_dim": 16, "num_classes": 10,
}  # fmt: skip
MOVING = {"kind": "moving_digits", "channels": 1, "frames": 8, "size": 12}


def recipe_for(data: dict[str, Any], **options: Any) -> Recipe:
    model = {**MODEL, **options.pop("model", {})}
    return tiny_recipe(**{"model": model, "data": data, "train__steps": 2, **options})


def test_a_model_of_moving_digits_is_trained_published_and_sampled(tmp_path: Path) -> None:
    recipe = recipe_for(
        MOVING, train__sample_every=2, sampling__num_inference_steps=2, sampling__labels=[3, 7]
    )  # fmt: skip
    trained = run(recipe, tmp_path / "run")
    assert trained.built.model.layout.num_blocks == 2
    pipeline = ACDiTPipeline.from_pretrained(tmp_path / "run" / "model")
    clips = pipeline(class_labels=[3, 7], num_inference_steps=2, generator=0, output_type="pt").images
    assert tuple(clips.shape) == (2, 8, 1, 12, 12)
    assert bool(((clips >= 0) & (clips <= 1)).all())
    frames = pipeline(class_labels=[3], num_inference_steps=1, generator=0).images
    assert (len(frames[0]), frames[0][0].size) == (8, (12, 12))
    with Image.open(tmp_path / "run" / "samples" / "step-2.png") as grid:
        assert grid.width > 1.9 * grid.height  # four clips, a row each, of eight frames


def test_what_is_learned_from_is_the_clip_itself() -> None:
    (step,) = drawn(recipe_for(MOVING, optim__label_dropout=0.0), 1, 1)
    built = build(recipe_for(MOVING))
    shown = (built.model.layout.from_blocks(step["clean"]) * 127.5 + 127.5).round().to(torch.uint8)
    indices = DataOrder(len(built.dataset), seed=3).indices(0, 4)
    assert torch.equal(shown, torch.stack([built.dataset[index][0] for index in indices]))


def test_a_grid_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(ConfigError, match=r"model\.grid.*\[8, 16, 16\].*the size of the clips.*data\.frames and data"):
        build(recipe_for({**MOVING, "size": 16}))


# --- clips from files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av", reason="PyAV is in the extra video")
    from tests.data.videos import write_video

    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for index in range(6):
        noise = rng.integers(0, 256, (20, 16, 20, 3), dtype=np.uint8)
        write_video(folder / ("cat", "dog")[index % 2] / f"{index}.mp4", noise)
    return folder


def clips_recipe(root: Path, model: dict[str, Any] | None = None, **options: Any) -> Recipe:
    given = options.pop("data", {})
    data = {"kind": "clips", "root": str(root), "frames": 8, "size": 12, "crop": "random", "flip": True, **given}
    return recipe_for(data, **{"model": {"in_channels": 3, "num_classes": 2, **(model or {})}, **options})


def test_a_run_resumes_to_the_bit(root: Path, tmp_path: Path) -> None:
    recipe = clips_recipe(root, data={"num_workers": 2}, train__steps=4)
    whole = run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    assert state_hash(run(recipe, tmp_path / "cut", resume="latest")) == state_hash(whole)


def test_processes_accumulation_and_workers_change_no_frame(root: Path) -> None:
    def steps(world: int, accumulation: int = 1, workers: int = 0) -> list[dict[str, torch.Tensor]]:
        options = {"optim__batch_size": 4, "optim__accumulation": accumulation, "optim__label_dropout": 0.0}
        return drawn(clips_recipe(root, data={"num_workers": workers}, **options), world, 3)

    whole = steps(1)
    for other in (steps(2), steps(2, 2), steps(1, 4, 2)):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(whole, other, strict=True) for name in a)


def test_the_same_file_begins_elsewhere_the_next_time(root: Path) -> None:
    def epochs(start: str) -> list[torch.Tensor]:
        data = {"crop": "center", "flip": False, "start": start}
        steps = drawn(clips_recipe(root, data=data, optim__batch_size=6), 1, 2)  # six files: an epoch each
        return [step["clean"].flatten(1).unique(dim=0) for step in steps]

    assert torch.equal(*epochs("center"))
    assert torch.equal(*epochs("first"))
    one, other = epochs("random")
    assert not any(torch.equal(a, b) for a in one for b in other)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_frames_go_through_an_autoencoder_one_by_one(root: Path, tmp_path: Path, posterior: str) -> None:
    vae = autoencoders.kl()
    vae.save_pretrained(tmp_path / "vae")
    codec = {"kind": "vae", "vae": str(tmp_path / "vae"), "posterior": posterior, "slicing": True}
    model = {"grid": [8, 6, 6], "block": [4, 3, 3], "patch": [1, 2, 2], "in_channels": 4}
    recipe = clips_recipe(root, model, codec=codec)
    (step,) = drawn(recipe, 1, 1)
    built = build(recipe)
    latents = built.model.layout.from_blocks(step["clean"])
    assert tuple(latents.shape) == (4, 4, 8, 6, 6)
    if posterior == "mode":
        data = {"crop": "center", "flip": False, "start": "first"}
        (plain,) = drawn(clips_recipe(root, model, codec=codec, data=data, optim__batch_size=6), 1, 1)
        found = built.model.layout.from_blocks(plain["clean"])
        dataset = build(clips_recipe(root, model, codec=codec, data=data)).dataset
        for index in range(6):
            frames = dataset[index][0].transpose(0, 1)  # a batch of pictures
            expected = built.codec.encode(frames).transpose(0, 1)
            assert any(torch.allclose(expected, clip, rtol=1e-4, atol=1e-4) for clip in found)
    run(recipe, tmp_path / "run")
    pipeline = ACDiTPipeline.from_pretrained(tmp_path / "run" / "model")
    assert tuple(pipeline([1], num_inference_steps=1, generator=0, output_type="pt").images.shape) == (1, 8, 3, 12, 12)


def test_the_command_shows_what_clips_hold(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "moving-digits", "--samples", "50"]) == 0
    printed = capsys.readouterr().out
    assert "samples          10,000" in printed
    assert "sample           1 × 16 × 12 × 12 (channels × frames × height × width)" in printed
    settings = ["data.kind=clips", f"data.root={root}", "data.channels=3", "model.num_classes=2", "data.frames=9"]
    assert main(["data", "moving-digits", *settings, "data.size=12"]) == 0
    printed = capsys.readouterr().out
    assert "sample           3 × 9 × 12 × 12" in printed
    assert "stored as        16 × 20" in printed
    assert main(["data", "moving-digits", *settings, "data.size=12", "data.frames=30"]) == 3
    captured = capsys.readouterr()
    assert (
        "found a bad clip (20 frames, 30 needed), the first of 6" in captured.err or "no readable clip" in captured.err
    )
