"""What samples are compared with: pictures or clips, or ADM's reference file in either of its forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acdit.errors import DataError
from acdit.evaluation.clip_files import ClipCut
from acdit.evaluation.clip_sets import ClipSet, open_clips
from acdit.evaluation.image_sets import ImageSet, open_images
from acdit.evaluation.npz_files import npz_arrays


@dataclass(frozen=True)
class Reference:
    """Pictures or clips, statistics, or both: ADM's ImageNet file has statistics of all and a batch of 10,000."""

    name: str
    images: ImageSet | ClipSet | None = None
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """"pooled" and "spatial" → mean (F,) and covariance (F, F), fp64. They take the place of the pictures' own."""

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "name": self.name,
            "pictures": None if self.images is None else self.images.description,
            "statistics": sorted(self.statistics),
        }


def open_reference(
    where: str, channels: int | None = None, size: int | None = None, cut: ClipCut | None = None
) -> Reference:
    """Open a reference.

    Args:
        where: a folder or zip of pictures, digits:<split>, or an .npz with `arr_0` (uint8 (M, H, W, C)), with `mu`,
            `sigma` (and `mu_s`, `sigma_s`), or with both.
        channels: 1 or 3, what the extractor wants.
        size: resize and crop pictures that are files to this edge, as ADM does.
        cut: open clips (see `open_clips`), and take these frames of each; mu and sigma are then of clips' features.

    Raises:
        DataError: nothing there, other arrays, shapes that do not fit each other, NaN or infinite statistics.
    """

    def opened() -> ImageSet | ClipSet:
        return open_images(where, channels, size) if cut is None else open_clips(where, cut, channels, size)

    path = Path(where)
    if not (path.is_file() and path.suffix.lower() == ".npz"):
        return Reference(Path(where).name if path.exists() else where, opened())
    arrays = npz_arrays(path)
    statistics = {}
    for kind, mean_name, covariance_name in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        present = [name for name in (mean_name, covariance_name) if name in arrays]
        if len(present) == 1:
            raise DataError(str(path), found=f"{present[0]} alone", expected=f"{mean_name} and {covariance_name}")
        if present:
            statistics[kind] = _statistics(
                path, mean_name, arrays[mean_name](), covariance_name, arrays[covariance_name]()
            )
    if not statistics and "arr_0" not in arrays:
        raise DataError(
            str(path), found=f"the arrays {', '.join(sorted(arrays)) or 'none'}",
            expected="arr_0 (uint8 pictures or clips), or mu and sigma (with mu_s and sigma_s for sFID)",
        )  # fmt: skip
    images = opened() if "arr_0" in arrays else None
    return Reference(path.name, images, statistics)


def _statistics(path: Path, mean_name: str, mean: Any, covariance_name: str, covariance: Any) -> tuple[Tensor, Tensor]:
    for name, array, axes in ((mean_name, mean, 1), (covariance_name, covariance, 2)):
        if array.ndim != axes or not np.issubdtype(array.dtype, np.floating):
            expected = "floats (F,)" if axes == 1 else "floats (F, F)"
            raise DataError(f"{path}: {name}", found=f"{array.dtype} {array.shape}", expected=expected)
        if not np.isfinite(array).all():
            raise DataError(f"{path}: {name}", found="NaN or infinite values", fix="get the file again")
    size = len(mean)
    if covariance.shape != (size, size):
        raise DataError(f"{path}: {covariance_name}", found=f"shape {covariance.shape}", expected=f"({size}, {size})")
    wide = torch.from_numpy(np.array(covariance, dtype=np.float64))
    if float((wide - wide.T).abs().max()) > 1e-3 * float(wide.abs().max()):
        raise DataError(f"{path}: {covariance_name}", found="a matrix that is not symmetric", expected="a covariance")
    return torch.from_numpy(np.array(mean, dtype=np.float64)), wide
