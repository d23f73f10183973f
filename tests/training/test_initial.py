"""Runs that start from a model's weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import ACDiTPipeline
from acdit.errors import ConfigError
from acdit.training import Trainer
from acdit.training.initial import initialise
from tests.conftest import tiny_model
from tests.training.runs import run, tiny_recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    run(tiny_recipe(train__steps=2), path)
    return path / "model"


def test_a_new_run_starts_from_the_published_averages(source: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(train__init_from=str(source), optim__lr=1e-4), tmp_path / "a", progress=False)
    published = ACDiTPipeline.from_pretrained(source).transformer.state_dict()
    for name, value in trainer.state.model.state_dict().items():
        assert torch.equal(value, published[name]), name
    for index in range(2):  # the averages start there too, not from fresh weights
        for name, value in trainer.state.ema.weights(index).items():
            assert torch.equal(value, published[name]), name
    trainer.train()


def test_a_resumed_run_does_not_start_again(source: Path, tmp_path: Path) -> None:
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    recipe = tiny_recipe(train__init_from=str(moved))
    whole = run(recipe, tmp_path / "whole")
    shutil.rmtree(moved)  # it is not needed any more
    resumed = Trainer(recipe, tmp_path / "whole", resume="checkpoint-2", progress=False)
    resumed.train()
    for name, value in resumed.state.model.state_dict().items():
        assert torch.equal(value, whole.state.model.state_dict()[name]), name
    with pytest.raises(ConfigError, match=r"train\.init_from"):
        Trainer(tiny_recipe(train__init_from="other"), tmp_path / "whole", resume="checkpoint-2", progress=False)


def test_an_image_model_initialises_a_video_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"in_channels": 1, "dtype": torch.float32}
    image = tiny_model((8, 8), (2, 2), patch=2, num_classes=5, **options)
    image.save_pretrained(tmp_path / "image")
    video = tiny_model((4, 8, 8), (1, 4, 4), patch=(1, 2, 2), num_classes=7, window=2, **options)
    before = video.y_embedder.weight.clone()
    with torch.no_grad():
        for parameter in video.parameters():
            parameter.add_(1.0)
    with caplog.at_level(logging.WARNING):
        fresh = initialise(video, str(tmp_path / "image"))
    assert fresh == ["y_embedder.weight"]
    assert "y_embedder.weight" in caplog.text
    assert torch.equal(video.y_embedder.weight, before + 1)
    for name, value in image.state_dict().items():
        if name not in fresh:
            assert torch.equal(video.state_dict()[name], value), name
    # One frame of the video model, a block of its own, is the picture to it: time turns nothing at t = 0.
    assert video.layout.block_grid == (4, 1, 1)


@pytest.mark.parametrize(
    ("options", "named"), [({"num_layers": 3}, "3 layers"), ({"num_attention_heads": 4}, "4 heads")]
)
def test_layers_of_another_size_are_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    tiny_model(**options).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=named):
        initialise(tiny_model(), str(tmp_path / "other"))


def test_no_such_model_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.init_from"):
        initialise(tiny_model(), str(tmp_path / "nowhere"))
