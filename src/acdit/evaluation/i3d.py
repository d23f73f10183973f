"""I3D, the network that FVD is defined by (Unterthiner et al. 2018): Inception-v1 inflated to three axes, trained on
Kinetics-400 (Carreira & Zisserman 2017). Its 400 logits, before any softmax, are the features.

Read for this file, and followed: google-research's frechet_video_distance.py (resize, values, the mean over time of the
logits), universome/stylegan-v's src/metrics/frechet_video_distance.py and universome/fvd-comparison (its TorchScript
port, 16 frames, 2,048 clips), piergiaj/pytorch-i3d's pytorch_i3d.py (names of the weights, TensorFlow's padding).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acdit.evaluation.inception import Features, tensorflow_resize

INPUT_SIZE = 224
NUM_CLASSES = 400
LEAST_FRAMES = 9
"""Time is halved three times, rounded up, and the last average takes two steps of it."""
I3D_PREPROCESSINGS = ("stylegan-v", "tensorflow", "center-crop")

# Input channels, then the widths of b0, b1a, b1b, b2a, b2b, b3b.
_MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


class Unit3D(nn.Module):
    """Convolution with TensorFlow's "SAME" padding, batch norm (ε 1e-3), ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same_padded(x, self.conv3d.kernel_size, self.conv3d.stride))))


class InceptionModule(nn.Module):
    """Four branches side by side, concatenated in this order: 1³; 1³, 3³; 1³, 3³; maximum over 3³, 1³."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit3D(in_channels, widths[0], 1)
        self.b1a, self.b1b = Unit3D(in_channels, widths[1], 1), Unit3D(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit3D(in_channels, widths[3], 1), Unit3D(widths[3], widths[4], 3)
        self.b3b = Unit3D(in_channels, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T, H, W) → (B, b0 + b1b + b2b + b3b, T, H, W)."""
        pooled = same_max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class _Logits(nn.Module):
    """Holds the last layer under the published name, `logits.conv3d`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, NUM_CLASSES, 1)


class I3D(nn.Module):
    """Bottom up: the stem, nine mixed layers, the classifier.

    Args:
        preprocessing: how frames become 224 × 224 inputs, see `preprocess_clips`.
    """

    def __init__(self, preprocessing: str = "stylegan-v") -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        for name, (in_channels, widths) in _MIXED.items():
            self.add_module(name, InceptionModule(in_channels, widths))
        self.logits = _Logits()

    def forward(self, clips: Tensor) -> Features:
        """Clips (B, T, 3, H, W), uint8, of any size, T ≥ 9 → 400 logits a clip. Sizes below are of 16 frames."""
        x = preprocess_clips(clips, self.preprocessing).to(self.logits.conv3d.weight.dtype)  # (B, 3, 16, 224, 224)
        x = same_max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))  # (B, 64, 8, 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = same_max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 192, 8, 28, 28)
        x = self._mixed(x, "3b", "3c")
        x = same_max_pool(x, (3, 3, 3), (2, 2, 2))  # (B, 480, 4, 14, 14)
        x = self._mixed(x, "4b", "4c", "4d", "4e", "4f")
        x = same_max_pool(x, (2, 2, 2), (2, 2, 2))  # (B, 832, 2, 7, 7)
        x = self._mixed(x, "5b", "5c")
        x = self.logits.conv3d(F.avg_pool3d(x, (2, 7, 7), stride=1))  # (B, 400, 1, 1, 1): a step of time for 16 frames
        return Features(x.mean(dim=2).flatten(1))

    def _mixed(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x


def same_padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's "SAME": ceil(extent / stride) outputs; of an odd number of zeros the larger half comes behind."""
    pads: list[int] = []
    for extent, edge, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((math.ceil(extent / step) - 1) * step + edge - extent, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad starts with the last axis
    return F.pad(x, pads)


def same_max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Maximum with "SAME" padding. Zeros are as good as −∞ there: the inputs come from ReLU."""
    return F.max_pool3d(same_padded(x, kernel, stride), kernel, stride)


def preprocess_clips(clips: Tensor, how: str) -> Tensor:
    """Resize each frame by itself, and values to [−1, 1].

    Args:
        clips: uint8 (B, T, 3, H, W).
        how: "stylegan-v": both edges to 224 whatever the aspect ratio, bilinear with half-pixel centres, as is usual
            where the archive is called with resize=False. "tensorflow": the same as TensorFlow 1 resizes, cells'
            corners on pixels: the original FVD code. "center-crop": the shorter edge to 224, then the centre, as
            VideoGPT's preprocessing has it (its values from −0.5 to 0.5 are not followed).

    Returns:
        fp32 (B, 3, T, 224, 224).
    """
    frames = clips.flatten(0, 1).float()
    if how == "tensorflow":
        frames = tensorflow_resize(frames, INPUT_SIZE)
    else:
        height, width = frames.shape[2:]
        shorter = min(height, width)
        # -(-a // b): ceil in whole numbers, which no rounding lifts.
        cropped = how == "center-crop"
        wanted = [-(-INPUT_SIZE * edge // shorter) if cropped else INPUT_SIZE for edge in (height, width)]
        frames = F.interpolate(frames, wanted, mode="bilinear", align_corners=False)
        top, left = ((edge - INPUT_SIZE) // 2 for edge in wanted)
        frames = frames[:, :, top : top + INPUT_SIZE, left : left + INPUT_SIZE]
    return (frames / 127.5 - 1).unflatten(0, clips.shape[:2]).transpose(1, 2)
