"""`acdit finetune`, `classify` and `evaluate --classification`: from a model to answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from acdit.classifiers import ACDiTClassifier
from acdit.cli import main
from acdit.corruption import GaussianCorruption
from acdit.data import DigitsDataset
from acdit.heads import ClassificationHead, Classifier
from acdit.pipelines import ACDiTPipeline
from tests.conftest import awaken, tiny_model
from tests.training.runs import run, tiny_recipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of digits that a few steps left, through the command."""
    base = tmp_path_factory.mktemp("tuned")
    run(tiny_recipe(train__steps=2, train__checkpoint_every=2), base / "source")
    arguments = [
        "finetune", "finetune-digits", f"model={base / 'source' / 'model'}", "train.steps=4", "train.sample_every=2",
        "train.tensorboard=false", "train.checkpoint_every=2", "optim.warmup_steps=0", "--output", str(base / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert main(arguments) == 5  # a run is there already
    assert main([*arguments, "--resume", "train.keep_checkpoints=2"]) == 0
    assert any("accuracy" in json.loads(line) for line in (base / "run" / "log.jsonl").open())
    return base / "run" / "model"


@pytest.fixture(scope="module")
def of_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video model with a random head."""
    base = tmp_path_factory.mktemp("clips")
    model = tiny_model((4, 8, 8), (2, 4, 4), dtype=torch.float32, in_channels=1, patch=(1, 2, 2))
    pipeline = ACDiTPipeline(model, GaussianCorruption().sampling_scheduler())
    pipeline.save_pretrained(base)
    head = awaken(ClassificationHead(width=32, num_classes=3, pooling="attentive"), 0.5)
    ACDiTClassifier(Classifier(model, head), pipeline).save(base, whole=False)
    frames = base / "film"
    frames.mkdir()
    for number in range(4):
        pixels = torch.randint(256, (8, 8), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(frames / f"{number}.png")
    return base


def test_pictures_are_classified_as_the_class_does_it(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = DigitsDataset("held_out")
    for index in range(5):
        Image.fromarray(digits.images[index, 0].numpy()).save(tmp_path / f"{index}.png")
    capsys.readouterr()
    assert main(["classify", str(tuned), str(tmp_path), "--top", "3", "--batch-size", "2", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == [f"{index}.png" for index in range(5)]
    found = ACDiTClassifier.from_pretrained(tuned)
    expected = found.best(found(digits.images[:5]), 3)
    for row, best in zip(rows, expected, strict=True):
        assert [one["class"] for one in row["top"]] == [one["class"] for one in best]
        assert row["top"][0]["probability"] == pytest.approx(best[0]["probability"], abs=1e-5)
    out = tmp_path / "classes.csv"
    command = [
        "classify",
        str(tuned),
        str(tmp_path / "1.png"),
        "--format",
        "csv",
        "--output",
        str(out),
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    (cells,) = csv.reader(out.open())
    assert (cells[0], len(cells)) == (str(tmp_path / "1.png"), 1 + 3 * 5)


def test_a_clip_is_answered_block_by_block_and_ends_where_it_ends_at_once(
    of_clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = str(of_clips / "film")
    capsys.readouterr()
    assert main(["classify", str(of_clips), film, "--device", "cpu"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["classify", str(of_clips), film, "--stream", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["block"] for row in rows] == [0, 1]
    assert rows[-1]["top"][0]["class"] == whole["top"][0]["class"]
    assert rows[-1]["top"][0]["probability"] == pytest.approx(whole["top"][0]["probability"], abs=1e-5)


def test_accuracy_is_measured_on_the_runs_validation_split_or_on_what_is_named(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "accuracy.json"
    command = ["evaluate", str(tuned), "--classification", "--output", str(out), "--device", "cpu"]
    assert main(command) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_samples"], figures["data"]["split"]) == (500, "held_out")
    digits, found = DigitsDataset("held_out"), ACDiTClassifier.from_pretrained(tuned)
    right = found(digits.images).argmax(-1) == digits.labels
    assert figures["top1"] == pytest.approx(float(right.float().mean()))
    assert figures["top1_interval"][0] <= figures["top1"] <= figures["top1_interval"][1]
    assert {"command", "commit", "machine", "versions"} <= set(figures)
    assert main([*command, "data.split=train", "--num-samples", "100"]) == 0
    assert json.loads(out.read_text())["data"]["split"] == "train"


def test_what_does_not_fit_ends_with_a_line(
    tuned: Path, of_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bare"
    pipeline = ACDiTPipeline(tiny_model(dtype=torch.float32), GaussianCorruption().sampling_scheduler())
    pipeline.save_pretrained(source)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for arguments, code, named in (
        (["classify", str(source), str(bad)], 2, "no classifier/"),
        (["classify", str(tuned), str(bad)], 3, "bad.png"),
        (["classify", str(tuned), str(bad), "--stream"], 2, "--stream"),
        (["classify", str(tuned), str(tmp_path / "bare" / "scheduler")], 3, "no pictures"),
        (["classify", str(of_clips), str(bad)], 3, "bad.png"),
        (["evaluate", str(tuned), "--classification", "--extractor", "pixels"], 2, "--extractor"),
        (["evaluate", str(of_clips), "--classification"], 2, "--data"),
        (["evaluate", str(of_clips), "--classification", "--data", "digits"], 2, "classes"),
        (["finetune", "finetune-digits"], 2, "model=PATH"),
        (["finetune", "finetune-digits", f"model={tmp_path}"], 2, "model_index.json"),
        (["finetune", "digits", f"model={source}"], 2, "classification"),
        (["train", "finetune-digits"], 2, "acdit finetune"),
        (["plan", "finetune-digits"], 2, "classification"),
    ):
        output = ["--output", str(tmp_path / "out")] if arguments[0] in ("finetune", "train") else []
        device = ["--device", "cpu"] if arguments[0] in ("classify", "evaluate") else []
        assert main([*arguments, *output, *device]) == code, arguments
        assert named in capsys.readouterr().err, arguments
