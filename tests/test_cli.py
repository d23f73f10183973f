"""The command line as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acdit import ACDiTTransformer, cli
from acdit.cli import main
from acdit.cli.models import load_pipeline
from tests.data.pictures import bomb, png
from tests.training.runs import run, tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    run(tiny_recipe(train__steps=2), path)
    return path / "model"


@pytest.mark.parametrize(
    "command", ["train", "sample", "evaluate", "convert", "demo", "recipes", "plan", "data", "encode", "study"]
)
def test_every_command_explains_itself_with_an_example_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  acdit {command}" in text
    assert "exit codes:" in text


def test_help_and_recipes_need_no_torch() -> None:
    code = (
        "import sys; from acdit.cli import main; main(['recipes']); main(['train', 'digit']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout
    assert "did you mean 'digits'" in done.stderr


def test_unknown_flags_end_with_2() -> None:
    with pytest.raises(SystemExit) as done:
        main(["sample", "x", "--no-such-flag"])
    assert done.value.code == 2


def test_only_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--output", "x", "trian.steps=3"]) == 2
    assert "trian" in capsys.readouterr().err
    for stray in (["train", "digits", "--output", "x", "stray"], ["convert", "a", "b", "c=d"], ["recipes", "--a=b"]):
        with pytest.raises(SystemExit) as done:
            main(stray)
        assert done.value.code == 2


def test_train_sample_and_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "name: tiny\n"
        "model: {grid: [8, 8], block: [4, 4], in_channels: 1, num_layers: 1, num_attention_heads: 1,"
        " attention_head_dim: 8, num_classes: 10}\n"
        "data: {kind: digits, channels: 1}\noptim: {batch_size: 4}\ntrain: {steps: 9, tensorboard: false}\n"
    )
    output = tmp_path / "run"
    assert main(["train", str(recipe), "train.steps=3", "--output", str(output)]) == 0
    assert "model" in capsys.readouterr().out
    assert main(["train", str(recipe), "train.steps=3", "--output", str(output)]) == 5  # a run is there already
    # Overrides may stand anywhere, behind --resume too, whose checkpoint is optional.
    assert main(["train", str(recipe), "--output", str(output), "--resume", "train.steps=4", "train.log_every=1"]) == 0
    assert (output / "checkpoint-4").is_dir()
    assert main(["train", str(recipe), "--output", str(tmp_path / "b"), "--from", str(output / "checkpoint-4")]) == 0
    assert (tmp_path / "b" / "checkpoint-9").is_dir()


def test_sampling_writes_pictures_a_grid_and_the_settings(model: Path, tmp_path: Path) -> None:
    arguments = [
        "sample",
        str(model),
        "--labels",
        "0-2",
        "7",
        "--per_label",
        "2",
        "--steps",
        "2",
        "--guidance_scale=1.5",
    ]
    assert main([*arguments, "--seed", "5", "--output", str(tmp_path / "a")]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files[:2] == ["00000-label-0-seed-5.png", "00001-label-0-seed-6.png"]
    assert files[-2:] == ["grid.png", "settings.json"]
    assert len(files) == 10
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["labels"] == [0, 0, 1, 1, 2, 2, 7, 7]
    assert settings["guidance_scale"] == 1.5
    assert settings["solver"] == "DPMSolverMultistepScheduler"
    # A sample depends on its own seed, not on the batch it is drawn in.
    assert main([*arguments, "--seed", "5", "--batch-size", "3", "--output", str(tmp_path / "b")]) == 0
    for name in files[:8]:
        one, other = (np.asarray(Image.open(tmp_path / d / name), dtype=int) for d in ("a", "b"))
        assert np.abs(one - other).max() <= 1


def test_a_given_picture_is_continued(model: Path, tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "given.png")
    arguments = ["sample", str(model), "--labels", "3", "--steps", "2", "--prefix-image", str(tmp_path / "given.png")]
    assert main([*arguments, "--prefix-blocks", "2", "--output", str(tmp_path / "out")]) == 0
    out = np.asarray(Image.open(next((tmp_path / "out").glob("00000*"))), dtype=int)
    assert np.abs(out[:4] - pixels[:4]).max() <= 1
    assert np.abs(out[4:] - pixels[4:]).max() > 1


@pytest.mark.parametrize("kind", ["bomb", "postscript", "damaged", "missing"])
def test_a_picture_to_continue_is_read_as_carefully_as_data_are(
    model: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.png"
    content = {
        "bomb": bomb(13_000, 13_000),  # within Pillow's own limit
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",  # Pillow would start ghostscript
        "damaged": png(3)[:-30],
    }
    if kind in content:
        file.write_bytes(content[kind])
    arguments = ["--labels", "3", "--prefix-image", str(file), "--prefix-blocks", "2", "--steps", "1"]
    assert main(["sample", str(model), *arguments, "--output", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert str(file) in said
    expected = {
        "bomb": "13000×13000",
        "postscript": "cannot identify",
        "damaged": "truncated",
        "missing": "No such file",
    }
    assert expected[kind] in said


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "unipc", "dpm++"])
def test_solvers(model: Path, tmp_path: Path, solver: str) -> None:
    arguments = ["sample", str(model), "--labels", "1", "--steps", "2", "--solver", solver, "--output", str(tmp_path)]
    assert main(arguments) == 0


WRONG: dict[str, tuple[list[str], int, str]] = {
    "label": (["--labels", "11"], 2, "0 … 9"),
    "negative label": (["--labels", "-1"], 2, "0 … 9"),
    "class name": (["--labels", "cat"], 2, "cat"),
    "solver": (["--solver", "flow-euler"], 2, "fits this model"),
    "blocks without picture": (["--prefix-blocks", "1"], 2, "--prefix-image"),
    "too many blocks": (["--prefix-image", "x.png", "--prefix-blocks", "4"], 2, "1 … 3"),
    "guidance that is no number": (["--guidance-scale", "nan"], 2, "finite"),
    "a range upside down": (["--labels", "9-0"], 2, "--labels"),
    "no such device": (["--device", "foo"], 2, "--device"),
    "a seed too large": (["--seed", "9" * 20], 2, "2^63"),
    "more steps than trained": (["--steps", "5000"], 2, "at most 1000"),
    "count beside labels": (["--labels", "0", "--count", "3"], 2, "--count"),
    "no such picture": (["--prefix-image", "x.png", "--prefix-blocks", "1"], 3, "x.png"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_in_sampling(model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code, part = WRONG[name]
    try:
        found = main(["sample", str(model), "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as ended:  # argparse's own refusal
        found = ended.code
    assert found == code
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["a bit", "a cut", "config", "gone"])
def test_a_damaged_model_is_named_as_such(
    model: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "a bit":
        content[-7] ^= 1
        weights.write_bytes(content)
    elif damage == "a cut":
        weights.write_bytes(content[:-9])
    elif damage == "config":
        (copy / "transformer" / "config.json").write_text("{")
    else:
        weights.unlink()
    assert main(["sample", str(copy), "--output", str(tmp_path / "out")]) == 5
    errors = capsys.readouterr().err
    assert ("config.json" if damage == "config" else weights.name) in errors
    assert "hub" not in errors


def test_no_pickle_is_read_by_accident(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model / "transformer", tmp_path / "transformer"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        ACDiTTransformer.from_pretrained(folder)


def test_a_full_disk_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device", "runs/x/log.jsonl")

    monkeypatch.setattr(cli.recipes, "_recipes", full)
    assert main(["recipes"]) == 5
    errors = capsys.readouterr().err
    assert "runs/x/log.jsonl" in errors
    assert "bug" not in errors


def test_an_output_that_is_a_file_is_no_bug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", "digits", "train.steps=1", "--output", str(tmp_path / "file")]) == 5
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_solvers_do_not_clip_what_is_no_picture(model: Path, solver: str) -> None:
    options = cli._parsed(["sample", str(model), "--solver", solver])
    assert load_pipeline(options).scheduler.config.clip_sample is False


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"model_index\.json"):
        main(["sample", str(tmp_path), "--debug"])


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cli.recipes, "_recipes", broken)
    assert main(["recipes"]) == 1
    assert (
        capsys.readouterr().err == "acdit: error: ZeroDivisionError: oh (this looks like a bug; --debug shows where)\n"
    )


def test_interruption_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.recipes, "_recipes", interrupted)
    assert main(["recipes"]) == 130
