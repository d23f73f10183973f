"""What is measured of a model: finite figures of every kind, and probes that find what is there."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from acdit.evaluation import load_classifier
from acdit.recipe import load_recipe
from acdit.studies import measures
from acdit.studies.catalog import SETTINGS, studies
from acdit.studies.probes import NOISE_LEVELS, fit, pixel_probe, probe, regions, right
from acdit.training import Trainer
from tests.studies.small import DIGITS, TINY, put_judges
from tests.test_pipelines import make_pipeline


def test_a_probe_finds_a_linear_class_and_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 8, generator=generator)
    labels = (inputs[:, 3] > 0).long()
    linear = fit(inputs[:400], labels[:400], classes=2, steps=100, seed=0)
    assert right(linear, inputs[400:], labels[400:]) > 0.9
    chance = torch.randint(0, 2, (600,), generator=generator)
    lost = fit(inputs[:400], chance[:400], classes=2, steps=100, seed=0)
    assert abs(right(lost, inputs[400:], chance[400:]) - 0.5) < 0.12


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [(4, 4), (8, 8), (2, 2), (1, 8)])
def test_regions_are_those_of_the_picture_whatever_the_blocks(block: tuple[int, int], side: int) -> None:
    pipeline = make_pipeline(block=block)
    layout = pipeline.transformer.layout
    grid = torch.arange(64.0).reshape(1, 1, 8, 8)
    found = regions(layout.to_blocks(grid), layout, side)
    edge = 8 // side
    starts = range(0, 8, edge)
    expected = [grid[0, 0, top : top + edge, left : left + edge].mean() for top in starts for left in starts]
    assert found[0, 0].tolist() == pytest.approx([float(value) for value in expected])


@pytest.mark.parametrize(("block", "level"), [((4, 4), None), ((8, 8), NOISE_LEVELS)])
def test_probes_of_blocks_read_clean_streams_and_of_one_block_noisy_ones(
    block: tuple[int, int], level: tuple[float, ...] | None
) -> None:
    pipeline = make_pipeline(block=block)
    channels = pipeline.transformer.config.in_channels
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    pictures = torch.randint(0, 60, (120, channels, 8, 8), generator=generator, dtype=torch.uint8)
    pictures[labels == 1] += 180  # bright and dark
    data = (pictures[:80], labels[:80]), (pictures[80:], labels[80:])
    found = probe(pipeline, *data, seed=0, steps=60)
    assert found["probe_accuracy"] > 0.9
    assert ("timestep" in found["chosen"]) == (level is not None)
    assert pixel_probe(*data, steps=60, seed=0) == 1.0


@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("pictures", {"frechet_distance", "conditional_accuracy"}),
        ("probe", {"probe_accuracy", "pixels"}),
        ("clips", {"frechet_distance", "frame_accuracy", "velocity_error"}),
    ],
)
def test_every_measurement_gives_its_figures_twice_alike(
    name: str, promised: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "CLIPS_A_CLASS", 2)
    monkeypatch.setattr(measures, "PROBE_STEPS", 20)
    torch.manual_seed(0)
    put_judges(tmp_path)
    study = next(study for study in studies(DIGITS).values() if study.measure == name)
    tiny = [one for one in TINY if not one.startswith(("train.steps", "train.checkpoint"))]
    recipe = load_recipe(study.recipe, [*study.overrides, *tiny, "train.steps=1", "train.checkpoint_every=1"])
    pipeline = Trainer(recipe, tmp_path / "run", progress=False).train()
    one, other = (measures.measure(name, pipeline, recipe, DIGITS, 3, tmp_path / "judges") for _ in range(2))
    assert promised <= set(one)
    assert {metric.key for metric in study.metrics} <= set(one)
    assert all(math.isfinite(one[key]) for key in promised)
    assert one == other


def test_a_judge_is_trained_once_and_is_the_demos(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    measures.prepare("pictures", DIGITS, recipe, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    before = load_file(file)
    _, facts = load_classifier(file)
    assert facts.held_out_accuracy >= 0.97
    written = file.stat().st_mtime_ns
    measures.prepare("pictures", DIGITS, recipe, tmp_path)
    assert file.stat().st_mtime_ns == written
    assert before
    measures.prepare("probe", DIGITS, recipe, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_pictures_than_the_built_in_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST's way, on pictures made here: idx files, a judge of their own, as many held-out ones as samples."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 200), ("t10k", 60)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 30, (count, 28, 28), dtype=np.uint8)
        for index, label in enumerate(labels):
            images[index, 2 * label : 2 * label + 6, 4:24] = 250
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            shape = np.array(array.shape, dtype=">u4").tobytes()
            magic = bytes([0, 0, 8, array.ndim])
            (tmp_path / f"{split}-{kind}-ubyte").write_bytes(magic + shape + array.tobytes())
    judge = {**SETTINGS["mnist"].judge, "epochs": 6, "batch_size": 20, "required_accuracy": 0.9}
    setting = dataclasses.replace(SETTINGS["mnist"], judge=judge, per_class=5)
    small = [one for one in TINY if not one.startswith("train.checkpoint")]
    recipe = load_recipe("mnist", [f"data.root={tmp_path}", *small, "train.checkpoint_every=5"])
    pipeline = Trainer(recipe, tmp_path / "run", progress=False).train()
    measures.prepare("pictures", setting, recipe, tmp_path / "judges")
    found = measures.measure("pictures", pipeline, recipe, setting, 0, tmp_path / "judges")
    assert found["frechet_distance"] > 0
    assert 0 <= found["conditional_accuracy"] <= 0.5
    assert found["classifier_heldout_accuracy"] >= 0.9
