"""Clips, and networks in small, that the tests of video evaluation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from acdit.evaluation.extractors import Extractor, ExtractorOptions
from acdit.evaluation.inception import Features


def random_clips(count: int = 3, frames: int = 5, height: int = 6, width: int = 4, channels: int = 3) -> np.ndarray:
    """uint8 (M, T, H, W, C)."""
    shape = (count, frames, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def frame_folders(folder: Path, clips: np.ndarray) -> Path:
    """A folder of PNGs a clip, numbered without leading zeros: 10.png comes after 9.png."""
    for index, clip in enumerate(clips):
        (folder / f"clip {index}").mkdir(parents=True)
        for number, frame in enumerate(clip):
            Image.fromarray(frame.squeeze()).save(folder / f"clip {index}" / f"{number}.png")
    return folder


def gifs(folder: Path, clips: np.ndarray) -> Path:
    """A gif a clip; exact where a frame has at most 256 colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, clip in enumerate(clips):
        pages = [Image.fromarray(frame.squeeze()) for frame in clip]
        pages[0].save(folder / f"{index}.gif", save_all=True, append_images=pages[1:], duration=100)
    return folder


def mean_colour(options: ExtractorOptions) -> Extractor:
    """An extractor of frames that has nothing to say of clips as wholes."""
    return Extractor("mean colour", 3, lambda pixels: Features(pixels.float().mean(dim=(2, 3))))


class ScriptedStandIn(nn.Module):
    """Called as StyleGAN-V's archive is, in small: 400 logits, or probabilities."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.output = nn.Linear(24, 400)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale:
            x = x * 2 / 255 - 1
        if resize:
            x = nn.functional.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        logits = self.output(nn.functional.adaptive_avg_pool3d(x, [2, 2, 2]).flatten(1))
        if return_features:
            return logits
        return logits.softmax(dim=1)


def save_stand_in(path: Path) -> str:
    torch.jit.script(ScriptedStandIn().eval()).save(str(path))
    return str(path)
