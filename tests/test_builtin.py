"""The models that come with the package: there before any training, small, from shipped recipes, as good as told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from acdit import ACDiTPipeline, ACDiTTextPipeline, builtin, demo, demo_video
from acdit.cli import main
from acdit.cli.models import averaging_of, is_text_model
from acdit.data.build import as_measured, build_dataset
from acdit.errors import ConfigError
from acdit.evaluation import digits_judge
from acdit.evaluation.perplexity import count_characters, text_bound
from acdit.model_folder import overrides_from, recipe_to_measure, require_whole
from acdit.recipe import load_recipe
from acdit.training.initial import initialise

MODELS = builtin.folder("digits").parents[1]


def metrics(name: str) -> dict:
    return dict(json.loads((MODELS / name / "metrics.json").read_text(encoding="utf-8")))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_weights_together_take_three_megabytes_at_most() -> None:
    weights = list(MODELS.rglob("*.safetensors"))
    assert len(weights) == len(builtin.NAMES)
    assert sum(file.stat().st_size for file in weights) <= 3_000_000


@pytest.mark.parametrize("name", builtin.NAMES)
def test_the_recipe_beside_a_model_is_the_shipped_one(name: str) -> None:
    beside = load_recipe(str(MODELS / name / "recipe.yaml"))
    shipped = load_recipe(metrics(name)["recipe"], [f"train.init_from={beside.train.init_from or 'null'}"])
    vocabulary = dataclasses.replace(shipped.model, vocab_size=beside.model.vocab_size)  # text: the data's
    assert beside == dataclasses.replace(shipped, model=vocabulary)


@pytest.mark.parametrize("name", builtin.NAMES)
def test_a_model_names_no_place_where_it_was_made(name: str) -> None:
    for file in (MODELS / name).rglob("*"):
        if file.suffix in (".json", ".yaml"):
            text = file.read_text(encoding="utf-8")
            assert "/tmp" not in text
            assert "/home" not in text
            assert "/work" not in text


def test_digits_are_as_good_as_told() -> None:
    pipeline = ACDiTPipeline.from_pretrained("digits")
    pipeline.set_progress_bar_config(disable=True)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.float32}
    recipe, labels = load_recipe("digits"), torch.arange(200) % 10
    samples = demo.draw_samples(pipeline, recipe, labels, seed=12_345)
    judge, _ = digits_judge()
    told = metrics("digits")["conditional_accuracy"]
    assert told >= 0.95
    assert judge.accuracy(samples, labels) >= told - 4 * (told * (1 - told) / len(labels)) ** 0.5


def test_moving_digits_are_as_good_as_told() -> None:
    pipeline = ACDiTPipeline.from_pretrained("moving-digits")
    pipeline.set_progress_bar_config(disable=True)
    recipe, labels = load_recipe("moving-digits-small"), torch.arange(100) % 10
    judge, _ = demo_video.frame_classifier(recipe)
    figures = demo_video.measure_clips(demo_video.draw_clips(pipeline, recipe, labels, seed=5), labels, judge, recipe)
    told = metrics("moving-digits")["frame_accuracy"]
    assert figures["frame_accuracy"] >= told - 4 * (told * (1 - told) / len(labels)) ** 0.5
    assert figures["velocity_error"] <= 0.15


def test_text_is_as_good_as_told() -> None:
    pipeline = ACDiTTextPipeline.from_pretrained("text")
    held_out = build_dataset(as_measured(load_recipe("text-small").data, "held_out"))
    bound = text_bound(pipeline.transformer, held_out.batches(64, 128), num_draws=2, copies=2, seed=1)
    bits = bound.bits_per_character(count_characters(held_out.tokenizer, held_out.batches(64, 128)))
    told = metrics("text")
    assert bits < told["bigram_bits_per_char"]
    assert bits == pytest.approx(told["bits_per_char"], abs=0.1)
    assert pipeline("To be", 20, generator=0).texts[0].startswith("To be")


def test_a_saved_pipeline_of_that_name_comes_first_and_another_folder_does_not_hide_it(elsewhere: Path) -> None:
    inside = str(builtin.folder("digits"))
    (elsewhere / "digits").mkdir()  # pictures, say
    assert builtin.located("digits") == inside
    ACDiTPipeline.from_pretrained("digits").save_pretrained("digits")
    assert builtin.located("digits") == "digits"
    assert builtin.located("owner/name") == "owner/name"
    assert builtin.located(Path("runs") / "digits") == "runs/digits"


def test_a_text_model_asked_for_as_pictures_is_told_so() -> None:
    with pytest.raises(ConfigError, match="ACDiTTextPipeline"):
        ACDiTPipeline.from_pretrained("text")
    with pytest.raises(ConfigError, match="ACDiTPipeline"):
        ACDiTTextPipeline.from_pretrained("digits")


def test_names_work_wherever_a_models_folder_does(elsewhere: Path) -> None:
    require_whole("moving-digits")
    assert is_text_model("text")
    assert not is_text_model("digits")
    assert averaging_of("digits")["decay"] == 0.999
    assert recipe_to_measure("digits", None, ["data.split=held_out"]).name == "digits"
    assert 'train.init_from="digits"' in overrides_from("digits")
    fresh = ACDiTPipeline.from_pretrained("digits").transformer
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    assert initialise(fresh, "digits") == []
    assert any(parameter.any() for parameter in fresh.parameters())


def test_the_command_line_draws_clips_and_text_without_any_training(
    elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["sample", "digits", "--labels", "3", "8", "--output", "pictures"]) == 0
    assert (elsewhere / "pictures" / "grid.png").is_file()
    assert json.loads((elsewhere / "pictures" / "settings.json").read_text())["model"] == "digits"
    assert main(["sample", "moving-digits", "--labels", "3", "--steps", "4", "--output", "clips"]) == 0
    assert main(["sample", "text", "--prompt", "To be, or", "--max-new-tokens", "16"]) == 0
    assert "To be, or" in capsys.readouterr().out
    assert main(["analyze", "loss", "digits", "data.split=held_out", "--num-samples", "50"]) == 0
