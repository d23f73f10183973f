"""Probes and fine-tuning: exact resumption, what learns and how fast, and one folder for two tasks."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import ACDiTPipeline
from acdit.classifiers import ACDiTClassifier
from acdit.cli.finetune import evaluation
from acdit.data import DigitsDataset
from acdit.errors import AcditError, ConfigError
from acdit.evaluation.classification import measure_accuracy
from acdit.model_folder import overrides_from
from acdit.recipe import Recipe, recipe_to_dict
from acdit.training import Trainer, finetune
from acdit.training.finetune import ClassifierTrainer, LabelledBatches
from tests.training.runs import largest_difference, run, state_hash, tiny_recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "linear probe": {},
    "linear probe, step by step": {"data__flip": True, "optim__batch_size": 4},
    "attentive probe of two layers": {"pooling": "attentive", "layers": [0, -1], "heads": 2},
    "linear probe of blocks": {"pooling": "blocks", "layers": [0, -1]},
    "probe of noisy features": {"noise_timestep": 50.0},
    "fine-tuning": {"tune": "all", "layer_decay": 0.5, "label_smoothing": 0.1},
    "fine-tuning, both directions, mixup": {"tune": "all", "bidirectional": True, "mixup": 0.8},
    "fine-tuning of noisy features": {"tune": "all", "noise_timestep": 50.0},
}
_MODEL = {
    "grid": [8, 8], "block": [4, 4], "in_channels": 1, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_classes": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generative model of a few steps."""
    place = tmp_path_factory.mktemp("source")
    run(tiny_recipe(model=_MODEL, train__steps=4, optim__batch_size=16), place)
    return place / "model"


def recipe_for(source: Path, **options: Any) -> Recipe:
    """A recipe of six steps; fields of `classification` by their names, others as of `tiny_recipe`."""
    others = {name: options.pop(name) for name in list(options) if "__" in name}
    settings: dict[str, Any] = {"model": _MODEL, "train__init_from": str(source), **others}
    return tiny_recipe(classification={"validation_split": "held_out", **options}, **settings)


def tune(recipe: Recipe, output: Path, **options: Any) -> ClassifierTrainer:
    trainer = ClassifierTrainer(recipe, output, progress=False, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(variant: str, source: Path, tmp_path: Path) -> None:
    recipe = recipe_for(source, **VARIANTS[variant])
    whole = tune(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "cut" / "features", ignore_errors=True)  # they are taken again, the same to the bit
    resumed = tune(recipe, tmp_path / "cut", resume="latest")
    assert state_hash(resumed) == state_hash(whole)
    published = [ACDiTClassifier.from_pretrained(tmp_path / place / "model").classifier for place in ("whole", "cut")]
    states = [one.state_dict() for one in published]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (tmp_path / "whole" / "features").exists() == (
        variant in ("linear probe", "linear probe of blocks", "probe of noisy features")
    )


@pytest.mark.parametrize("variant", ["linear probe", "attentive probe of two layers", "fine-tuning"])
def test_the_published_folder_holds_the_averages_and_generates_as_before(
    variant: str, source: Path, tmp_path: Path
) -> None:
    trainer = tune(recipe_for(source, **VARIANTS[variant]), tmp_path)
    found = ACDiTClassifier.from_pretrained(tmp_path / "model")
    average = trainer.state.ema.weights(0)
    tuned = VARIANTS[variant].get("tune") == "all"
    held = (found.classifier if tuned else found.classifier.head).state_dict()
    assert all(torch.equal(held[name], value) for name, value in average.items())
    assert (tmp_path / "model" / "classifier" / "transformer").exists() == tuned
    before, after = (ACDiTPipeline.from_pretrained(place) for place in (source, tmp_path / "model"))
    mine = after.transformer.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in before.transformer.state_dict().items())
    for file in source.rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            assert (tmp_path / "model" / file.relative_to(source)).read_bytes() == file.read_bytes()
    if not tuned:
        assert all(torch.equal(value, mine[name]) for name, value in found.classifier.transformer.state_dict().items())
    assert found.class_names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("pooling", ["mean", "blocks"])
def test_features_taken_once_learn_what_features_taken_at_every_step_do(
    pooling: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(source, pooling=pooling, layers=[0, -1], train__precision="fp64")
    once = tune(recipe, tmp_path / "once")
    monkeypatch.setattr(ClassifierTrainer, "_features_once", lambda self: False)
    always = tune(recipe, tmp_path / "always")
    assert largest_difference(once, always) <= 1e-6  # the kept features went through fp32


def test_a_signal_while_features_are_taken_ends_the_run_and_keeps_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "_CHUNK", 500)
    whole = tune(recipe_for(source), tmp_path / "whole")
    taken, take = [], ClassifierTrainer._mean_features

    def interrupted(self: ClassifierTrainer, pictures: torch.Tensor, indices: range) -> torch.Tensor:
        if not taken:
            signal.raise_signal(signal.SIGTERM)
        taken.append(indices)
        return take(self, pictures, indices)

    monkeypatch.setattr(ClassifierTrainer, "_mean_features", interrupted)
    with pytest.raises(SystemExit) as done:
        tune(recipe_for(source), tmp_path / "cut")
    assert done.value.code == 143
    assert taken[-1].stop == 500
    assert state_hash(tune(recipe_for(source), tmp_path / "cut")) == state_hash(whole)
    assert [indices.start for indices in taken].count(0) == 1  # kept ones are not taken again


def test_accumulation_equals_one_batch_with_mixup_too(source: Path, tmp_path: Path) -> None:
    options = {"tune": "all", "mixup": 0.8, "train__precision": "fp64", "optim__batch_size": 8, "train__steps": 2}
    whole = tune(recipe_for(source, **options), tmp_path / "1")
    cut = tune(recipe_for(source, **options, optim__accumulation=4), tmp_path / "4")
    assert largest_difference(cut, whole) <= 1e-10


def test_mixing_keeps_shares_and_goes_to_the_neighbour(source: Path, tmp_path: Path) -> None:
    options = {"tune": "all", "optim__batch_size": 8}
    batches = []
    for mixup in (0.0, 0.8):
        trainer = ClassifierTrainer(recipe_for(source, mixup=mixup, **options), tmp_path / str(mixup), progress=False)
        batches.append(next(iter(LabelledBatches(trainer.built, 0, 1, 0, torch.device("cpu"))))[0])
    plain, mixed = batches
    torch.testing.assert_close(mixed.target.sum(-1), torch.ones(8))
    neighbour = torch.arange(8) ^ 1
    labels = plain.target.argmax(-1)
    for row in range(8):
        if labels[row] == labels[neighbour[row]]:
            continue
        share = mixed.target[row, labels[row]]
        assert 0.5 <= share <= 1
        expected = share * plain.clean[row] + (1 - share) * plain.clean[neighbour[row]]
        torch.testing.assert_close(mixed.clean[row], expected)
        assert mixed.target[row, labels[neighbour[row]]] == pytest.approx(float(1 - share), abs=1e-6)


def test_rates_fall_layer_by_layer_and_what_serves_generation_alone_rests(source: Path, tmp_path: Path) -> None:
    recipe = recipe_for(source, tune="all", layer_decay=0.5)
    trainer = ClassifierTrainer(recipe, tmp_path, progress=False)
    rates = {
        id(parameter): group["initial_lr"]
        for group in trainer.state.optimizer.param_groups
        for parameter in group["params"]
    }
    named = dict(trainer.state.model.named_parameters())
    shares = {name: rates[id(value)] / recipe.optim.lr for name, value in named.items() if id(value) in rates}
    assert shares["head.linear.weight"] == 1
    assert shares["transformer.layers.1.attn.qkv.weight"] == 0.5
    assert shares["transformer.layers.0.mlp.fc1.bias"] == 0.25
    assert shares["transformer.x_embedder.weight"] == 0.125
    resting = {name for name in named if name not in shares}
    assert resting == {name for name, value in named.items() if not value.requires_grad}
    assert resting == {
        name for name in named
        if "modulation" in name or name.startswith(("transformer.final_layer", "transformer.t_", "transformer.y_"))
    }  # fmt: skip
    before = {name: value.clone() for name, value in named.items()}
    trainer.train()
    moved = {name for name, value in named.items() if not torch.equal(value, before[name])}
    assert moved == set(shares)


def test_a_probe_leaves_the_model_alone_and_learns(source: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        source, pooling="attentive", layers=[0, -1], train__steps=200, optim__batch_size=64, optim__lr=2e-2,
        train__checkpoint_every=200, train__sample_every=100, train__log_every=50,
    )  # fmt: skip
    trainer = ClassifierTrainer(recipe, tmp_path, progress=False, evaluate=evaluation(recipe))
    before = {name: value.clone() for name, value in trainer.transformer.state_dict().items()}
    found = trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.transformer.state_dict().items())
    told = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    accuracies = [line["accuracy"] for line in told if "accuracy" in line]
    figures = measure_accuracy(found, DigitsDataset("held_out"))
    assert len(accuracies) == 2
    assert accuracies[-1] == figures["top1"] > 0.5  # an almost untrained model's features already tell digits apart
    low, high = figures["top1_interval"]
    assert 0 < low < figures["top1"] < high < 1
    assert figures["top5"] >= figures["top1"]


def test_model_path_takes_what_the_folder_says(source: Path) -> None:
    from acdit.recipe import load_recipe

    recipe = load_recipe("finetune-digits", overrides_from(source))
    trained = tiny_recipe(model=_MODEL)
    assert {**recipe_to_dict(recipe)["model"], "patch": None} == {
        **recipe_to_dict(trained)["model"], "patch": None, "time_conditioning": True,
    }  # fmt: skip
    assert dataclasses.asdict(recipe.corruption) == dataclasses.asdict(trained.corruption)
    assert (recipe.train.init_from, recipe.codec.mean) == (str(source), 0.5)


def test_what_does_not_fit_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    def refusal(make: Any) -> str:
        with pytest.raises(AcditError) as refused:
            make()
        return str(refused.value)

    for options, named in (
        ({"layer_decay": 0.5}, "classification.layer_decay"),
        ({"bidirectional": True}, "classification.bidirectional"),
        ({"tune": "all", "bidirectional": True, "noise_timestep": 5.0}, "noise_timestep"),
        ({"noise_timestep": 1000.0}, "classification.noise_timestep"),
        ({"mixup": 1.0, "optim__batch_size": 3}, "classification.mixup"),
        ({"tune": "some"}, "classification.tune"),
        ({"layers": []}, "classification.layers"),
        ({"layers": [2]}, "classification.layers"),
        ({"pooling": "attentive", "heads": 5}, "classification.heads"),
        ({"validation_split": None, "train__sample_every": 2}, "validation_split"),
        ({"train__parallel": "fsdp2"}, "train.parallel"),
        ({"train__init_from": None}, "model=PATH"),
        ({"train__init_from": str(tmp_path)}, "train.init_from"),
        ({"depth": 3}, "classification.depth"),
    ):
        assert named in refusal(
            lambda options=options: ClassifierTrainer(recipe_for(source, **options), tmp_path / "x", progress=False)
        )
    assert "acdit finetune" in refusal(lambda: Trainer(recipe_for(source), tmp_path / "x", progress=False))
    assert "classification" in refusal(lambda: ClassifierTrainer(tiny_recipe(), tmp_path / "x", progress=False))
    with pytest.raises(ConfigError, match="classifier/"):
        ACDiTClassifier.from_pretrained(source)


def test_a_run_does_not_go_on_from_another_model(source: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(source, tmp_path / "source"))
    tune(recipe_for(place), tmp_path / "run")
    pipeline = ACDiTPipeline.from_pretrained(place)
    with torch.no_grad():
        pipeline.transformer.x_embedder.weight.add_(1)
    pipeline.save_pretrained(place)
    with pytest.raises(AcditError, match="other weights"):
        ClassifierTrainer(recipe_for(place), tmp_path / "run", resume="checkpoint-4", progress=False)
