"""Data sets: maps from index to (uint8 picture or cached latents, class), and streams of pictures."""

from acdit.data.digits import DigitsDataset
from acdit.data.hf import HFDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset
from acdit.data.latents import LatentsDataset
from acdit.data.shards import ShardsDataset
from acdit.data.stream import StreamDataset

__all__ = [
    "DigitsDataset",
    "HFDataset",
    "IdxDataset",
    "ImagesDataset",
    "LatentsDataset",
    "ShardsDataset",
    "StreamDataset",
]
