"""`acdit sample` of a video model, as it is typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from acdit import ACDiTPipeline
from acdit.cli import main
from acdit.videos import write_clip
from tests.test_pipelines import make_pipeline
from tests.test_streaming import pipeline_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windowed; 4 frames of 4×4 pixels, two blocks a frame."""
    path = tmp_path_factory.mktemp("video") / "model"
    torch.manual_seed(0)
    pipeline_for((1, 2, 4)).save_pretrained(path)
    return path


def sample(model: Path, output: Path, *more: str) -> list[str]:
    return ["sample", str(model), "--steps", "2", "--output", str(output), "--format", "frames", *more]


def frames_in(folder: Path) -> np.ndarray:
    """(T, H, W) of a folder of frames."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("[0-9]*.png"))])


def test_clips_are_the_pipelines_with_a_sheet_and_settings(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path, "--labels", "1", "3", "--seed", "5")) == 0
    pipeline = ACDiTPipeline.from_pretrained(model)
    (clips,) = pipeline([1, 3], num_inference_steps=2, generator=5, output_type="pt", return_dict=False)
    for index, name in enumerate(("00000-label-1-seed-5", "00001-label-3-seed-6")):
        expected = (clips[index, :, 0] * 255).round().to(torch.uint8).numpy()
        assert np.abs(frames_in(tmp_path / name).astype(int) - expected).max() <= 1
    assert Image.open(tmp_path / "grid.png").width > 200
    assert json.loads((tmp_path / "settings.json").read_text())["blocks"] == 8


def test_a_gif_where_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path, "--labels", "1", "--format", "gif", "--fps", "4")) == 0
    with Image.open(tmp_path / "00000-label-1-seed-0.gif") as film:
        assert film.info["duration"] == 250
        assert 1 <= sum(1 for _ in ImageSequence.Iterator(film)) <= 4  # equal neighbours become one


def test_a_stream_goes_on_after_a_second_start_as_if_there_had_been_none(model: Path, tmp_path: Path) -> None:
    options = ["--labels", "2", "--stream", "--blocks"]
    assert main(sample(model, tmp_path / "whole", *options, "20")) == 0
    assert main(sample(model, tmp_path / "cut", *options, "7")) == 0
    assert main(sample(model, tmp_path / "cut", *options, "13")) == 5  # a begun one is not written over
    assert main(sample(model, tmp_path / "cut", *options, "13", "--resume")) == 0
    whole, cut = (frames_in(tmp_path / name / "00000-label-2-seed-0") for name in ("whole", "cut"))
    assert whole.shape == (10, 4, 4)
    assert np.array_equal(whole, cut)


def test_a_stream_without_an_end_is_stopped_by_a_signal_and_kept(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "acdit.cli", *sample(model, tmp_path, "--labels", "2", "--stream")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 120
        while not len(list(tmp_path.glob("00000-label-2-seed-0/0000[3-9].png"))):
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    made = frames_in(tmp_path / "00000-label-2-seed-0")
    assert main(sample(model, tmp_path, "--labels", "2", "--stream", "--blocks", "4", "--resume")) == 0
    assert len(frames_in(tmp_path / "00000-label-2-seed-0")) in (len(made) + 2, len(made) + 3)
    whole = len(frames_in(tmp_path / "00000-label-2-seed-0"))
    assert main(sample(model, tmp_path / "again", "--labels", "2", "--stream", "--blocks", str(2 * whole))) == 0
    again = frames_in(tmp_path / "again" / "00000-label-2-seed-0")
    assert np.array_equal(frames_in(tmp_path / "00000-label-2-seed-0"), again)


def test_a_label_is_switched_at_its_block(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path / "plain", "--labels", "1")) == 0
    assert main(sample(model, tmp_path / "switched", "--labels", "1", "--switch", "4:3")) == 0
    plain, switched = (frames_in(tmp_path / name / "00000-label-1-seed-0") for name in ("plain", "switched"))
    assert np.array_equal(plain[:2], switched[:2])  # blocks 0 … 3
    assert not np.array_equal(plain[2:], switched[2:])


def test_several_futures_of_one_prompt(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    write_clip(clip, tmp_path / "clip.gif", "gif")
    options = ["--labels", "1", "--futures", "2", "--prompt", str(tmp_path / "clip.gif"), "--prompt-blocks", "4"]
    assert main(sample(model, tmp_path / "out", *options)) == 0
    first, second = (frames_in(tmp_path / "out" / f"0000{i}-label-1-seed-{i}") for i in range(2))
    assert first.shape == (4, 4, 4)
    # The last two frames of the clip are given (through the gif's palette and back from its enlargement).
    assert np.abs(first[:2].astype(int) - clip[-2:, 0].numpy()).max() <= 2
    assert np.array_equal(first[:2], second[:2])
    assert not np.array_equal(first[2:], second[2:])


def test_a_picture_begins_a_video(model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "a.png")
    assert main(sample(model, tmp_path / "out", "--labels", "1", "--prompt", str(tmp_path / "a.png"))) == 0
    frames = frames_in(tmp_path / "out" / "00000-label-1-seed-0")
    assert np.array_equal(frames[0], np.arange(0, 256, 16).reshape(4, 4))
    assert frames.shape == (4, 4, 4)


WRONG: dict[str, tuple[list[str], int, str]] = {
    "blocks without stream": (["--blocks", "3"], 2, "--stream"),
    "sinks without window": (["--sinks", "3"], 2, "--window"),
    "a switch that is none": (["--switch", "x"], 2, "8:5"),
    "a switch to no class": (["--switch", "3:99"], 2, "--labels"),
    "prompt blocks alone": (["--prompt-blocks", "2"], 2, "--prompt"),
    "half a step": (["--prompt", "x.mp4", "--prompt-blocks", "3"], 2, "multiple of 2"),
    "no such prompt": (["--prompt", "x.mp4"], 3, "x.mp4"),
    "no such picture": (["--prompt", "x.png"], 3, "x.png"),
    "a picture's prefix": (["--prefix-image", "x.png"], 2, "--prompt"),
    "nothing to resume": (["--stream", "--resume", "--blocks", "1"], 5, "state"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code, part = WRONG[name]
    assert main(sample(model, tmp_path, "--labels", "1", *arguments)) == code
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors


def test_picture_models_refuse_what_only_videos_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pipeline().save_pretrained(tmp_path / "model")
    options: list[Any] = ["sample", str(tmp_path / "model"), "--steps", "2", "--output", str(tmp_path / "out")]
    assert main([*options, "--stream"]) == 2
    assert "a video model" in capsys.readouterr().err
