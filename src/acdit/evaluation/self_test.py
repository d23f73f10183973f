"""Is the evaluation sane? Real pictures against themselves score 0, and growing noise raises the distance.

It runs on the built-in digits, through the same npz files, features and metrics as any evaluation.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acdit.data import DigitsDataset
from acdit.draws import normal
from acdit.errors import AcditError
from acdit.evaluation.extractors import Extractor
from acdit.evaluation.image_sets import open_images
from acdit.evaluation.measure import Evaluator
from acdit.evaluation.reference import open_reference

NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4)
"""Standard deviation of the added noise, in units of the whole range of pixel values."""
ZERO = 1e-6


def self_test(
    extractor: Extractor, work: str | Path, device: torch.device | None = None, progress: bool = True
) -> dict[str, Any]:
    """Measure digits against themselves, held-out ones, and noisy ones.

    Args:
        extractor: to be tested with.
        work: an empty folder.
        device: for the extractor.
        progress: whether to draw progress bars.

    Returns:
        `real_against_real`, `held_out_against_real` and `noise` (a list with `level`), the metrics of each.

    Raises:
        AcditError: a figure is not what it must be.
    """
    work = Path(work)
    real = DigitsDataset("train").images
    real_file = _write(work / "real.npz", real)
    evaluator = Evaluator(
        extractor, open_reference(real_file, extractor.channels), work, device=device, progress=progress
    )

    def measured(where: str) -> dict[str, Any]:
        return evaluator.measure(open_images(where, extractor.channels))

    result: dict[str, Any] = {
        "real_against_real": measured(real_file),
        "held_out_against_real": measured("digits:held_out"),
        "noise": [],
    }
    for level in NOISE_LEVELS:
        noise = normal(real.shape[1:], seed=0, stream="self-test", step=0, samples=range(len(real)))
        noisy = (real.float() + 255 * level * noise).round().clamp(0, 255).to(torch.uint8)
        result["noise"].append({"level": level, **measured(_write(work / f"noise-{level}.npz", noisy))})
    _require_sane(result)
    return result


def _require_sane(result: dict[str, Any]) -> None:
    same = result["real_against_real"]
    largest = result["noise"][-1]["fid"]
    for name, value in (("fid", same["fid"]), ("sfid", same["sfid"] or 0.0)):
        if abs(value) > ZERO * max(1.0, largest):
            raise AcditError("self-test: real against real", found=f"{name} {value}", expected="0 up to rounding")
    if (same["precision"], same["recall"]) != (1.0, 1.0):
        raise AcditError("self-test: real against real", found=f"precision {same['precision']}", expected="1")
    distances = [same["fid"], *(row["fid"] for row in result["noise"])]
    if any(later <= earlier for earlier, later in itertools.pairwise(distances)):
        raise AcditError(
            "self-test: growing noise", found=f"Fréchet distances {distances}", expected="growing ones",
            fix="do not trust figures of this extractor",
        )  # fmt: skip


def _write(path: Path, images: torch.Tensor) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    return str(path)
