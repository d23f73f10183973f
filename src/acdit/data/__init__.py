"""Data sets: maps from index to (uint8 picture, class)."""

from acdit.data.digits import DigitsDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset

__all__ = ["DigitsDataset", "IdxDataset", "ImagesDataset"]
