"""The demo with a model too small and too briefly trained to be any good: files, figures, film, folder rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acdit import demo, storage
from acdit.data import DigitsDataset
from acdit.errors import ConfigError, StorageError
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import load_recipe

TINY = [
    "train.steps=4",
    "train.log_every=1",
    "train.sample_every=4",
    "train.tensorboard=false",
    "optim.batch_size=4",
    "optim.warmup_steps=1",
    "model.num_layers=1",
    "model.num_attention_heads=1",
    "sampling.num_inference_steps=3",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    metrics = demo.run_demo(run, seed=3, overrides=TINY, samples_per_class=50, command="make demo", progress=False)
    return run, metrics


def test_everything_promised_is_there(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    for name in ("samples.png", "generation.gif", "loss.png", "metrics.json", "recipe.yaml", "log.jsonl"):
        assert (run / name).stat().st_size > 100, name
    recipe = load_recipe(run / "recipe.yaml")
    assert (recipe.name, recipe.seed, recipe.train.steps) == (demo.RUN_NAME, 3, 4)
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_the_model_folder_loads_and_draws(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    pipeline = ACDiTPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(class_labels=[3], num_inference_steps=2, generator=0).images
    assert image.size == (8, 8)
    assert pipeline.transformer.layout.num_blocks == 4


def test_the_metrics_are_complete_finite_and_read_back(finished: tuple[Path, dict[str, Any]]) -> None:
    run, metrics = finished
    assert json.loads((run / "metrics.json").read_text()) == metrics
    promised = {
        "conditional_accuracy", "classifier_heldout_accuracy", "frechet_distance", "frechet_distance_real",
        "frechet_ratio", "nearest_training_distance", "nearest_training_distance_heldout", "seconds_training",
        "seconds_total", "seed", "protocol", "command", "commit", "versions", "machine", "targets", "num_samples",
    }  # fmt: skip
    assert promised <= set(metrics)
    numbers = [value for value in metrics.values() if isinstance(value, float)]
    assert len(numbers) >= 9
    assert np.isfinite(numbers).all()
    assert metrics["classifier_heldout_accuracy"] >= 0.97
    assert metrics["seconds_training"] <= metrics["seconds_total"]
    assert metrics["command"] == "make demo"
    assert metrics["num_samples"] == 500
    assert not metrics["targets"]["met"]  # four steps do not draw digits, and the figures say so
    assert "TARGETS MISSED" in demo.summary(metrics, run)


def test_the_samples_picture_has_a_row_a_class(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    with Image.open(run / "samples.png") as picture:
        assert picture.height == 4 + 10 * 68
        assert picture.width > 8 * 68


def test_the_film_shows_every_solver_step_of_every_block(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    film = Image.open(run / "generation.gif")
    assert film.n_frames == 4 * 3 + 1
    rows, columns = [], []
    for frame in range(12):
        film.seek(frame)
        page = np.asarray(film.convert("RGB")).astype(int)[:86, :86]
        y, x = np.nonzero(page.max(axis=2) - page.min(axis=2) > 60)
        rows.append(int(y.min()) // 40)
        columns.append(int(x.min()) // 40)
    assert list(zip(rows, columns, strict=True)) == [(0, 0)] * 3 + [(0, 1)] * 3 + [(1, 0)] * 3 + [(1, 1)] * 3


def test_the_film_shows_the_first_sample_of_each_class(finished: tuple[Path, dict[str, Any]]) -> None:
    """The last frame is the first column of samples.png."""
    run, _ = finished
    film, samples = Image.open(run / "generation.gif"), Image.open(run / "samples.png").convert("L")
    film.seek(film.n_frames - 1)
    last = np.asarray(film.convert("L")).astype(int)
    left = samples.width - 8 * 68
    for digit in range(10):
        row, column = divmod(digit, 5)
        filmed = last[6 + row * 86 :, 6 + column * 86 :][5:80:10, 5:80:10]
        drawn = np.asarray(samples).astype(int)[4 + digit * 68 :, left:][4:64:8, 4:64:8]
        assert abs(filmed - drawn).max() <= 6, digit  # the film has 255 colours


def test_a_second_demo_replaces_the_first(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = tmp_path / "demo"
    first = demo.run_demo(run, seed=3, overrides=TINY, samples_per_class=50, progress=False)
    (run / "metrics.json").unlink()  # as if interrupted
    (run / "checkpoint-99").mkdir()
    second = demo.run_demo(run, seed=4, overrides=TINY, samples_per_class=50, progress=False)
    assert second["seed"] == 4
    assert not (run / "checkpoint-99").exists()
    assert first["frechet_distance"] == pytest.approx(finished[1]["frechet_distance"], rel=1e-9)  # same seed
    assert second["frechet_distance"] != first["frechet_distance"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        demo.run_demo(tmp_path, overrides=TINY)
    (tmp_path / "recipe.yaml").write_text("name: imagenet\n")  # somebody's training run
    with pytest.raises(StorageError, match="no demo left"):
        demo.run_demo(tmp_path, overrides=TINY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(StorageError, match="a file"):
        demo.run_demo(tmp_path / "thesis.tex", overrides=TINY)


def test_a_demo_at_work_is_not_disturbed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: {demo.RUN_NAME}\n")
    (tmp_path / "log.jsonl").write_text("{}\n")
    with storage.RunLock(tmp_path), pytest.raises(StorageError, match="a run in progress"):
        demo.run_demo(tmp_path, overrides=TINY)
    assert (tmp_path / "log.jsonl").exists()


def test_a_wrong_override_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: {demo.RUN_NAME}\n")
    with pytest.raises(ConfigError):
        demo.run_demo(tmp_path, overrides=["optim.learning=1"])
    assert (tmp_path / "recipe.yaml").exists()


# --- the figures mean what they say ------------------------------------------------------------------------------


def test_real_digits_score_as_real_and_broken_ones_do_not() -> None:
    """Training digits as samples: ratio 1, everything recognised, distance 0 (memorised). Then with noise, then with
    the labels of the next digit, then one digit a class over and over."""
    train = DigitsDataset("train")
    perfect = demo.measure(train.images, train.labels)
    assert perfect["frechet_ratio"] == pytest.approx(1.0)
    assert perfect["conditional_accuracy"] > 0.99
    assert perfect["nearest_training_distance"] == 0.0
    assert perfect["nearest_training_distance_heldout"] > 0.5
    assert perfect["targets"]["met"]

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-90, 91, train.images.shape, generator=generator)
    noisy = demo.measure((train.images + noise).clamp(0, 255).to(torch.uint8), train.labels)
    assert noisy["frechet_ratio"] > 3
    assert noisy["nearest_training_distance"] > 0.9

    shifted = demo.measure(train.images, (train.labels + 1) % 10)
    assert shifted["conditional_accuracy"] < 0.05
    assert not shifted["targets"]["met"]

    first = torch.stack([train.images[train.labels == label][0] for label in range(10)])
    collapsed = demo.measure(first.repeat(100, 1, 1, 1), torch.arange(1000) % 10)
    assert collapsed["conditional_accuracy"] > 0.99
    assert collapsed["frechet_ratio"] > 3
    assert not collapsed["targets"]["met"]
