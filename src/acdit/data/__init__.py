"""Data sets: maps from index to (uint8 picture or clip, cached latents or token ids, class), and streams."""

from acdit.data.clips import ClipsDataset
from acdit.data.digits import DigitsDataset
from acdit.data.hf import HFDataset
from acdit.data.idx import IdxDataset
from acdit.data.images import ImagesDataset
from acdit.data.latents import LatentsDataset
from acdit.data.moving import MovingDigitsDataset
from acdit.data.shards import ShardsDataset
from acdit.data.stream import PictureStream, StreamDataset
from acdit.data.text import TextDataset
from acdit.data.text_stream import TextStream

__all__ = [
    "ClipsDataset",
    "DigitsDataset",
    "HFDataset",
    "IdxDataset",
    "ImagesDataset",
    "LatentsDataset",
    "MovingDigitsDataset",
    "PictureStream",
    "ShardsDataset",
    "StreamDataset",
    "TextDataset",
    "TextStream",
]
