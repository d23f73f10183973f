"""Clips as they are drawn and measured on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from acdit.cli import main
from tests.evaluation.clips import frame_folders, gifs, npz, random_clips, save_stand_in
from tests.test_pipelines import make_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video model of four frames, two a block."""
    path = tmp_path_factory.mktemp("clips") / "model"
    make_pipeline(grid=(4, 4, 4), block=(2, 4, 4)).save_pretrained(path)
    return path


def sample(model: Path, output: Path, *more: str) -> list[str]:
    return [
        "sample", str(model), "--num-samples", "5", "--steps", "2", "--seed", "5", "--chunk-size", "2",
        "--batch-size", "2", "--output", str(output), *more,
    ]  # fmt: skip


def clips_of(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"]


def measured(samples: Path | str, reference: str, output: Path, *more: str) -> dict[str, object]:
    arguments = ["evaluate", str(samples), "--reference", reference, "--output", str(output), *more]
    assert main(arguments) == 0
    return json.loads(output.read_text())


def test_clips_are_written_as_npz_films_and_frames(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path / "out", "--npz", str(tmp_path / "c.npz"), "--format", "gif", "--fps", "5")) == 0
    clips = clips_of(tmp_path / "c.npz")
    assert clips.shape == (5, 4, 4, 4, 3)
    assert len({clip.tobytes() for clip in clips}) == 5
    film = tmp_path / "out" / "00004-label-4-seed-9.gif"
    with Image.open(film) as opened:
        assert opened.info["duration"] == 200
        assert sum(1 for _ in ImageSequence.Iterator(opened)) == 4
    assert (tmp_path / "out" / "grid.png").is_file()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["seed"], settings["num_samples"]) == (5, 5)
    assert main(sample(model, tmp_path / "frames")) == 0  # frames are the default
    for index, clip in enumerate(clips):
        folder = tmp_path / "frames" / f"{index:05d}-label-{index}-seed-{5 + index}"
        for number, frame in enumerate(clip):
            assert np.array_equal(np.asarray(Image.open(folder / f"{number:05d}.png").convert("RGB")), frame)
    before = sorted((tmp_path / "frames").rglob("*.png"))
    assert main(sample(model, tmp_path / "frames")) == 0  # a second start adds nothing
    assert sorted((tmp_path / "frames").rglob("*.png")) == before


@pytest.mark.campaign
def test_two_processes_draw_the_clips_that_one_draws(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path / "one", "--npz", str(tmp_path / "one.npz"))) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "acdit.cli",
        *sample(model, tmp_path / "two", "--npz", str(tmp_path / "two.npz"), "--format", "frames"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(clips_of(tmp_path / "one.npz"), clips_of(tmp_path / "two.npz"))
    assert len(list((tmp_path / "two").glob("0*/*.png"))) == 20


def test_a_video_model_its_npz_and_its_frames_measure_the_same(model: Path, tmp_path: Path) -> None:
    reference = npz(tmp_path / "real.npz", arr_0=random_clips(7, 4, 4, 4))
    how = ["--frames", "4", "--extractor", "pixels", "--seed", "5", "--steps", "2", "--span", "2"]
    found = measured(model, reference, tmp_path / "m.json", *how, "--num-samples", "5", "--chunk-size", "2")
    for name in ("fvd", "frame_frechet"):
        assert found[name] > 0, name
    assert len(found["frame_frechet_over_time"]) == 2
    facts = {"frames": 4, "frame_stride": 1, "span": 2, "num_samples": 5, "num_reference": 7, "seed": 5}
    facts |= {"num_inference_steps": 2, "guidance_scale": 1.5, "solver": "DPMSolverMultistepScheduler"}
    assert {name: found[name] for name in facts} == facts
    assert found["extractor"]["of_clips"]["kind"] == "clips"
    for name in ("model_sha256", "ema", "command", "versions", "machine", "labels"):
        assert found[name], name
    assert "first frames" in found["protocol"]
    assert "commit" in found
    assert main(sample(model, tmp_path / "out", "--npz", str(tmp_path / "c.npz"), "--format", "frames")) == 0
    for where in (tmp_path / "c.npz", tmp_path / "out"):
        again = measured(where, reference, tmp_path / "again.json", *how)
        for name in ("fvd", "frame_frechet", "frame_frechet_over_time"):
            # Five clips have singular covariances, whose roots carry the rounding of other chunks.
            assert again[name] == pytest.approx(found[name], rel=1e-6), (where, name)
        assert (again["seed"], again["model_sha256"]) == (5, found["model_sha256"])


def test_fvd_names_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_stand_in(tmp_path / "i3d_torchscript.pt")
    clips = random_clips(4, 10, 8, 8, 1)
    reference = str(frame_folders(tmp_path / "real", clips // 2))
    films = gifs(tmp_path / "films", clips)
    how = ["--extractor", "i3d", "--weights", weights, "--frames", "9", "--preprocessing", "center-crop"]
    found = measured(films, reference, tmp_path / "m.json", *how)
    assert found["fvd"] > 0
    assert found["extractor"]["weights"] == "i3d_torchscript.pt"
    assert len(found["extractor"]["weights_sha256"]) == 64
    assert "center-crop" in found["extractor"]["preprocessing"]
    assert "FVD" in capsys.readouterr().out


def test_a_sweep_over_steps_plots_fvd(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    reference = npz(tmp_path / "real.npz", arr_0=random_clips(5, 4, 4, 4))
    how = ["--frames", "4", "--extractor", "pixels", "--num-samples", "4", "--sweep", "steps=1,2"]
    found = measured(model, reference, tmp_path / "m.json", *how)
    assert [row["num_inference_steps"] for row in found["results"]] == [1, 2]
    assert all(row["fvd"] > 0 and row["frame_frechet"] > 0 for row in found["results"])
    assert (tmp_path / "m.png").is_file()


WRONG: dict[str, tuple[list[str], int, str]] = {
    "a video model as pictures": (["MODEL", "--extractor", "pixels"], 2, "--frames T measures clips"),
    "a model of pictures as clips": (["PICTURES", "--extractor", "pixels", "--frames", "4"], 2, "a model of pictures"),
    "clips of the model too short": (["MODEL", "--extractor", "pixels", "--frames", "5"], 3, "a clip of 4 frames"),
    "pictures to i3d": (["digits:train", "--extractor", "i3d", "--weights", "I3D"], 3, "digits:train"),
    "npz of pictures to i3d": (["P.npz", "--extractor", "i3d", "--weights", "I3D"], 3, "(M, T, H, W, C)"),
    "npz of clips as pictures": (["C.npz", "--extractor", "pixels"], 3, "--frames N"),
    "too few frames for i3d": (
        ["C.npz", "--extractor", "i3d", "--weights", "I3D", "--frames", "4"], 2, "at least 9",
    ),
    "clips too short": (["C.npz", "--extractor", "pixels", "--frames", "17"], 3, "a clip of 4 frames"),
    "no weights": (["C.npz", "--extractor", "i3d"], 2, "never fetched"),
    "a stride without frames": (["C.npz", "--extractor", "pixels", "--frame-stride", "2"], 2, "--frame-stride"),
    "a span without frames": (["C.npz", "--extractor", "pixels", "--span", "2"], 2, "--span"),
    "no clip extractor": (
        ["C.npz", "--extractor", "tests.evaluation.clips:mean_colour", "--frames", "4", "--reference", "S.npz"],
        2, "statistics, and an extractor of frames",
    ),
    "self-test of i3d": (["--self-test", "--extractor", "i3d", "--weights", "I3D"], 2, "found pictures"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_in_measuring(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, code, part = WRONG[name]
    monkeypatch.chdir(tmp_path)
    npz(tmp_path / "C.npz", arr_0=random_clips(3, 4, 8, 8, 1))
    npz(tmp_path / "P.npz", arr_0=random_clips(1, 4, 8, 8)[0])
    npz(tmp_path / "S.npz", mu=np.zeros(4), sigma=np.eye(4))
    if "I3D" in given:
        save_stand_in(tmp_path / "I3D")
    if "PICTURES" in given:
        make_pipeline().save_pretrained(tmp_path / "PICTURES")
    arguments = [str(model) if argument == "MODEL" else argument for argument in given]
    if "--reference" not in arguments:
        pictures = "--frames" not in arguments and "i3d" not in arguments
        arguments += ["--reference", "P.npz" if pictures else "R.npz"]
        npz(tmp_path / "R.npz", arr_0=random_clips(3, 20, 8, 8))
    assert main(["evaluate", *arguments]) == code
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors
    assert "looks like a bug" not in errors
    assert not (tmp_path / "metrics.json").exists()


WRONG_SAMPLING = {
    "png": (["--num-samples", "2", "--png"], "--format frames"),
    "mp4 without PyAV": (["--num-samples", "2", "--format", "mp4"], "acdit[video]"),
}


@pytest.mark.parametrize("name", WRONG_SAMPLING)
def test_mistakes_in_sampling(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, part = WRONG_SAMPLING[name]
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["sample", str(model), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_pictures_has_no_films(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pipeline().save_pretrained(tmp_path / "pictures")
    assert main(sample(tmp_path / "pictures", tmp_path / "out", "--format", "gif")) == 2
    assert "PNGs are written" in capsys.readouterr().err
