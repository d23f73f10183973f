"""Data sets: maps from index to (uint8 picture or cached latents, class)."""

from acdit.data.digits import DigitsDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset
from acdit.data.latents import LatentsDataset

__all__ = ["DigitsDataset", "IdxDataset", "ImagesDataset", "LatentsDataset"]
