"""The video demo: its files, its measures, its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acdit import demo_video
from acdit.data.moving import moving_digits
from acdit.errors import StorageError
from acdit.evaluation import SmallClassifier
from acdit.recipe import load_recipe

TINY = ["train.steps=2", "train.checkpoint_every=2", "train.sample_every=null", "model.num_layers=1",
        "sampling.num_inference_steps=2", "optim.batch_size=2", "train.tensorboard=false"]  # fmt: skip


def test_the_tracked_centre_is_where_the_digit_truly_is() -> None:
    """Against the known motion: rounding to whole levels and the background threshold cost little."""
    data = moving_digits("held_out")
    clips = torch.stack([data[index][0].transpose(0, 1) for index in range(40)])
    true = torch.from_numpy(np.stack([data.centroids(index)[0] for index in range(40)]))
    assert float((demo_video.centroids(clips) - true).abs().max()) < 0.1
    assert float((demo_video.speeds(clips) - true.diff(dim=1).norm(dim=-1)).abs().max()) < 0.15


def test_real_clips_score_as_real_and_others_do_not() -> None:
    recipe = load_recipe(demo_video.RECIPE)
    held_out = moving_digits("held_out", recipe.data.frames, 12)
    real = torch.stack([held_out[index][0].transpose(0, 1) for index in range(400)])
    labels = held_out.labels[:400]

    class Oracle(SmallClassifier):
        """Reads what was asked for, but for the third frame of a tenth of the clips."""

        def accuracy(self, pixels: torch.Tensor, asked: torch.Tensor) -> float:
            return 0.9 if torch.equal(pixels, real[:, 2]) else 1.0

    figures = demo_video.measure_clips(real, labels, Oracle((1, 12, 12), 10), recipe)
    assert figures["frame_accuracy"] == 0.9
    assert figures["velocity_error"] < 0.1
    slow = real[:, :1].expand(-1, real.shape[1], -1, -1, -1)  # digits that do not move
    assert demo_video.measure_clips(slow, labels, Oracle((1, 12, 12), 10), recipe)["velocity_error"] == pytest.approx(1)


def test_it_leaves_what_it_promises_and_refuses_a_strangers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    judge = SmallClassifier((1, 12, 12), 10).eval()
    monkeypatch.setattr(demo_video, "frame_classifier", lambda recipe: (judge, 0.99))
    run = tmp_path / "demo"
    options = {"overrides": TINY, "clips": 10, "stream_blocks": 12, "streams": 10, "progress": False}
    for _ in range(2):  # a second demo replaces the first
        metrics = demo_video.run_demo_video(run, **options)
    for name in ("samples.gif", "samples.png", "stream.mp4", "stream.png", "loss.png", "metrics.json", "model"):
        assert (run / name).exists(), name
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["stream_blocks"] == 12
    assert metrics["classifier_accuracy"] == 0.99
    assert len(metrics["stream_accuracy_by_block"]) == 12
    for name in ("frame_accuracy", "velocity_error", "stream_frame_accuracy", "stream_seconds_first_ten_blocks",
                 "stream_seconds_last_ten_blocks", "stream_peak_memory_first_ten_blocks"):  # fmt: skip
        assert metrics[name] >= 0, name
    with Image.open(run / "samples.gif") as film:
        assert film.n_frames > 1
    import av

    with av.open(str(run / "stream.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 12 * 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        demo_video.run_demo_video(tmp_path / "other", **options)
