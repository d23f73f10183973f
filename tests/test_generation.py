"""Pictures by the ten thousands, here by the dozen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from acdit.cli import main
from acdit.errors import ConfigError, NonFiniteError, StorageError
from acdit.generation import SamplingSettings, draw_pictures, generate, write_npz
from tests.test_pipelines import make_pipeline
from tests.training.runs import run, tiny_recipe

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=1.5, seed=11, labels=(3, 1, 4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation") / "run"
    run(tiny_recipe(train__steps=2), path)
    return path / "model"


def sample(model: Path, output: Path, *more: str) -> list[str]:
    return [
        "sample", str(model), "--num-samples", "14", "--steps", "2", "--seed", "5", "--chunk-size", "4",
        "--batch-size", "2", "--output", str(output), *more,
    ]  # fmt: skip


def images_of(npz: Path) -> np.ndarray:
    with np.load(npz, allow_pickle=False) as arrays:
        return arrays["arr_0"]


def test_a_picture_depends_on_its_index_not_on_the_batch_or_chunk_it_is_in(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.transformer.double()  # equal beyond the rounding of single precision
    one = generate(pipeline, SETTINGS, tmp_path / "a", 7, batch_size=7, chunk_size=7, progress=False)
    other = generate(pipeline, SETTINGS, tmp_path / "b", 7, batch_size=2, chunk_size=3, progress=False)
    images = torch.cat([chunk["images"] for chunk in one])
    assert torch.equal(images, torch.cat([chunk["images"] for chunk in other]))
    alone = pipeline(
        [SETTINGS.labels[5 % 3]], num_inference_steps=2, guidance_scale=1.5, generator=11 + 5, output_type="pt"
    ).images
    assert torch.equal(images[5:6], (alone.float() * 255).round().to(torch.uint8))
    assert len({bytes(picture.numpy().tobytes()) for picture in images}) == 7


def test_labels_take_turns() -> None:
    assert SETTINGS.labels_of(2, 8) == [4, 3, 1, 4, 3, 1]
    assert SamplingSettings().labels_of(0, 3) is None


def test_a_picture_that_is_no_number_is_named() -> None:
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.transformer.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"picture 6 \(seed 17\)"):
        draw_pictures(pipeline, SETTINGS, 6, 8)


def test_another_model_or_setting_does_not_mix_with_the_parts_there(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    generate(pipeline, SETTINGS, tmp_path, 2, progress=False)
    with pytest.raises(StorageError, match=r"seed: 11 there, 12 now"):
        generate(pipeline, SamplingSettings(2, 1.5, 12, (3, 1, 4)), tmp_path, 2, progress=False)
    with torch.no_grad():
        pipeline.transformer.final_layer.linear.bias.add_(1e-6)
    with pytest.raises(StorageError, match="model_sha256"):
        generate(pipeline, SETTINGS, tmp_path, 2, progress=False)


def test_the_npz_is_adms_batch_form(tmp_path: Path) -> None:
    pipeline = make_pipeline(channels=3)
    store = generate(pipeline, SETTINGS, tmp_path / "parts", 5, chunk_size=2, progress=False)
    write_npz(store, tmp_path / "out.npz", store.description, SETTINGS.labels_of(0, 5))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        expected = torch.cat([chunk["images"] for chunk in store]).permute(0, 2, 3, 1)
        assert np.array_equal(arrays["arr_0"], expected.numpy())
        assert arrays["arr_1"].tolist() == [3, 1, 4, 3, 1]
        assert json.loads(str(arrays["settings"]))["seed"] == 11


def test_the_command_writes_pngs_npz_grid_and_settings(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path / "out", "--npz", str(tmp_path / "out.npz"), "--png")) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert len(names) == 14
    assert names[13] == "00013-label-3-seed-18.png"  # all ten classes in turn
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["seed"] == 5
    assert settings["solver"] == "DPMSolverMultistepScheduler"
    assert settings["ema"]["decay"] == 0.99
    assert re.fullmatch(r"[0-9a-f]{64}", settings["model_sha256"])
    arrays = images_of(tmp_path / "out.npz")
    assert arrays.shape == (14, 8, 8, 3)
    assert np.array_equal(arrays[13, ..., 0], np.asarray(Image.open(tmp_path / "out" / names[13])))
    assert (tmp_path / "out" / "grid.png").is_file()


def test_two_processes_and_a_kill_change_no_byte(model: Path, tmp_path: Path) -> None:
    assert main(sample(model, tmp_path / "one", "--npz", str(tmp_path / "one.npz"))) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "acdit.cli", *sample(model, tmp_path / "two", "--npz", str(tmp_path / "two.npz")),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Killed once the first part is there; what is finished must be used by the second start.
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "two" / "parts"
    while first.poll() is None and not any(parts.glob("items-*")):
        time.sleep(0.005)
    workers = psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []
    for process in (*workers, first):  # torchrun's workers have sessions of their own
        process.kill()
    first.wait()
    psutil.wait_procs(workers)
    kept = {path.name: path.stat().st_ino for path in parts.glob("items-*")}
    assert kept
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all((parts / name).stat().st_ino == inode for name, inode in kept.items())
    assert np.array_equal(images_of(tmp_path / "one.npz"), images_of(tmp_path / "two.npz"))
    assert len(list(parts.glob("items-*"))) == 4


WRONG = {
    "npz without number": (["--npz", "x.npz"], "--num-samples"),
    "count": (["--num-samples", "2", "--count", "2"], "--count"),
    "prefix": (["--num-samples", "2", "--prefix-image", "x.png"], "--prefix-image"),
    "per label": (["--num-samples", "2", "--per-label", "2"], "--per-label"),
    "label": (["--num-samples", "2", "--labels", "12"], "0 … 9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_not_go_together(
    model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, part = WRONG[name]
    assert main(["sample", str(model), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_clips_are_drawn_in_chunks_by_their_index(tmp_path: Path) -> None:
    pipeline = make_pipeline(channels=1, grid=(2, 4, 4), block=(1, 4, 4))
    pipeline.transformer.double()
    one = generate(pipeline, SETTINGS, tmp_path / "a", 5, batch_size=5, chunk_size=5, progress=False)
    other = generate(pipeline, SETTINGS, tmp_path / "b", 5, batch_size=2, chunk_size=3, progress=False)
    clips = torch.cat([chunk["images"] for chunk in one])
    assert clips.shape == (5, 2, 1, 4, 4)
    assert clips.dtype == torch.uint8
    assert torch.equal(clips, torch.cat([chunk["images"] for chunk in other]))
    alone = pipeline([SETTINGS.labels[1]], num_inference_steps=2, generator=11 + 4, output_type="pt").images
    assert torch.equal(clips[4:], (alone.float() * 255).round().to(torch.uint8))
    write_npz(other, tmp_path / "out.npz", other.description, SETTINGS.labels_of(0, 5))
    assert np.array_equal(images_of(tmp_path / "out.npz"), clips.movedim(2, -1).numpy().repeat(3, axis=-1))


def test_models_of_neither_pictures_nor_clips_are_refused(tmp_path: Path) -> None:
    pipeline = make_pipeline(channels=1, grid=(8,), block=(4,))
    with pytest.raises(ConfigError, match="1-D data"):
        generate(pipeline, SETTINGS, tmp_path, 2, progress=False)
