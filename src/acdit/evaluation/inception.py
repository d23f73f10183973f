"""The Inception network that FID is defined by (Szegedy et al. 2016, TensorFlow's weights of 2015-12-05).

It is not the Inception v3 that classifies ImageNet in model zoos: average pools leave the padding out of the mean, the
last mixed layer pools with a maximum, there are 1,008 classes, and the weights are others. Names of the parameters are
those of the state dict that circulates (pt_inception-2015-12-05-6726825d.pth).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
FEATURE_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
NUM_CLASSES = 1008
PREPROCESSINGS = ("pytorch-fid", "tensorflow")

Unit = tuple[str, int, tuple[int, int]]
"""Name, output channels, (kernel height, kernel width)."""


@dataclass(frozen=True)
class Features:
    """Of B pictures; what an extractor does not give is None, and the metrics that need it are not measured."""

    pooled: Tensor
    """(B, F): FID, precision, recall. Inception's 2048 means over its last cells."""
    spatial: Tensor | None = None
    """(B, S): sFID. Inception's first 7 channels of 17 × 17 cells, channels last, as ADM's statistics lie."""
    probabilities: Tensor | None = None
    """(B, classes), rows sum to 1: Inception Score. Inception's 1,008 from logits without bias, as ADM takes them."""


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm (ε 1e-3), ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of units side by side, and a pooled branch; outputs are concatenated in this order.

    Args:
        in_channels: of the input.
        chains: each a sequence of units; a last element with two units forks: both read the chain, side by side.
        pool: "average" (padding not counted) or "max", 3 × 3, followed by a 1 × 1 unit `branch_pool`; or "halve":
            chains end in stride 2 without padding, beside a 3 × 3 maximum of stride 2.
        pool_channels: of `branch_pool`.
    """

    def __init__(
        self, in_channels: int, chains: Sequence[Sequence[Unit | tuple[Unit, Unit]]], pool: str, pool_channels: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[tuple[str, ...]]] = []
        self.out_channels = pool_channels or in_channels
        for chain in chains:
            names, channels = [], in_channels
            for place, element in enumerate(chain):
                units: tuple[Unit, ...] = element if isinstance(element[0], tuple) else (element,)
                last = pool == "halve" and place == len(chain) - 1
                for name, width, kernel in units:
                    self.add_module(name, ConvUnit(channels, width, kernel, 2 if last else 1, padded=not last))
                names.append(tuple(name for name, _, _ in units))
                channels = sum(width for _, width, _ in units)
            self.chains.append(names)
            self.out_channels += channels
        if pool_channels:
            self.branch_pool = ConvUnit(in_channels, pool_channels, (1, 1), 1, padded=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W), halved where the block halves."""
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self.pool == "halve":
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def _at_35(in_channels: int, pool_channels: int) -> Mixed:
    """35 × 35 cells."""
    chains = [
        [("branch1x1", 64, (1, 1))],
        [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))],
    ]
    return Mixed(in_channels, chains, "average", pool_channels)


def _to_17(in_channels: int) -> Mixed:
    chains = [
        [("branch3x3", 384, (3, 3))],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))],
    ]
    return Mixed(in_channels, chains, "halve")


def _at_17(in_channels: int, width: int) -> Mixed:
    """17 × 17 cells; 7 × 7 kernels as a row and a column."""
    row, column = (1, 7), (7, 1)
    chains = [
        [("branch1x1", 192, (1, 1))],
        [("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ],
    ]
    return Mixed(in_channels, chains, "average", 192)


def _to_8(in_channels: int) -> Mixed:
    chains = [
        [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))],
        [
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3)),
        ],
    ]
    return Mixed(in_channels, chains, "halve")


def _at_8(in_channels: int, pool: str) -> Mixed:
    """8 × 8 cells; 3 × 3 kernels as a fork of a row and a column."""
    chains: list[list[Unit | tuple[Unit, Unit]]] = [
        [("branch1x1", 320, (1, 1))],
        [("branch3x3_1", 384, (1, 1)), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))],
        [
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ],
    ]
    return Mixed(in_channels, chains, pool, 192)


class FIDInception(nn.Module):
    """Bottom up: the stem, eleven mixed layers, the classifier.

    Args:
        preprocessing: how pictures become 299 × 299 inputs. "pytorch-fid": bilinear with half-pixel centres, values
            −1 … 1. "tensorflow": bilinear as TensorFlow 1 does it, cells' corners on pixels, (value − 128) / 128: what
            ADM's evaluator and its reference statistics have.
    """

    def __init__(self, preprocessing: str = "pytorch-fid") -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3), 1, padded=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3), 1, padded=True)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1), 1, padded=False)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3), 1, padded=False)
        self.Mixed_5b = _at_35(192, 32)
        self.Mixed_5c = _at_35(256, 64)
        self.Mixed_5d = _at_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _at_17(768, 128)
        self.Mixed_6c = _at_17(768, 160)
        self.Mixed_6d = _at_17(768, 160)
        self.Mixed_6e = _at_17(768, 192)
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _at_8(1280, "average")
        self.Mixed_7c = _at_8(2048, "max")
        self.fc = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, pixels: Tensor) -> Features:
        """Pictures (B, 3, H, W), uint8, of any size."""
        x = preprocess(pixels, self.preprocessing).to(self.fc.weight.dtype)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        # "mixed_6/conv" of TensorFlow's graph: the fourth mixed layer at 17 × 17, its 1 × 1 unit.
        spatial = flat_spatial(self.Mixed_6d.get_submodule("branch1x1")(x))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return Features(pooled, spatial, (pooled @ self.fc.weight.T).softmax(dim=1))


def flat_spatial(cells: Tensor) -> Tensor:
    """(B, C, 17, 17) → (B, 2023): first 7 channels, in TensorFlow's order (channels last)."""
    return cells[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def preprocess(pixels: Tensor, how: str) -> Tensor:
    """uint8 (B, 3, H, W) → fp32 (B, 3, 299, 299), see `FIDInception`."""
    values = pixels.float()
    if how == "tensorflow":
        return (tensorflow_resize(values, INPUT_SIZE) - 128) / 128
    size = (INPUT_SIZE, INPUT_SIZE)
    return F.interpolate(values / 255, size, mode="bilinear", align_corners=False) * 2 - 1


def tensorflow_resize(values: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize of (B, C, H, W) to a square: output pixel i reads position i · (input / output),
    with no half-pixel shift."""
    for axis in (2, 3):
        extent = values.shape[axis]
        position = torch.arange(size, device=values.device, dtype=torch.float32) * (extent / size)
        low = position.long().clamp(max=extent - 1)
        high = (low + 1).clamp(max=extent - 1)
        weight = (position - low).reshape(-1, *([1] * (3 - axis)))
        values = values.index_select(axis, low).lerp(values.index_select(axis, high), weight)
    return values
