"""A checkpoint of the reference (thunlp/ACDiT, a pickle in a zip) → a model folder that `ACDiTPipeline` loads.

The file is read by `acdit.pickles`, which runs none of its code. Then:

- of the namespace, a typed list of fields is used; every other field is reported as ignored;
- names, shapes and dtypes of all weights must fit a model of the sizes they imply; all misfits are listed at once.

Nothing is written unless all of it holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from acdit.corruption.gaussian import GaussianCorruption
from acdit.errors import ConfigError, DataError, StorageError
from acdit.model import ACDiTTransformer
from acdit.pickles import describe, load_checkpoint, plain_tensors, printable, require_shapes
from acdit.storage import atomic_directory

logger = logging.getLogger(__name__)

RENAMED = (
    # part of our name (a pattern), the reference's; every other part of a name is the same
    (r"^y_embedder\.", "y_embedder.embedding_table."),
    (r"^layers\.", "blocks."),
    (r"\.modulation\.", ".adaLN_modulation."),
    (r"^final_layer\.norm\.", "final_layer.norm_final."),
)
_MAX_EXTENT = 65536


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What a checkpoint holds, checked: the arguments of our model and its weights under our names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    dtype: torch.dtype
    ignored_fields: tuple[str, ...]
    """Fields of the checkpoint's arguments that say nothing about the model."""

    @property
    def num_parameters(self) -> int:
        return sum(value.numel() for value in self.weights.values())


def reference_name(name: str) -> str:
    """The reference's name of one of our parameters."""
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name


def to_reference_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights under the reference's names."""
    return {reference_name(name): value for name, value in model.state_dict().items()}


def convert_reference(checkpoint: str | Path, output: str | Path, weights: str = "model") -> ReferenceCheckpoint:
    """Convert a checkpoint of the reference to a model folder that `ACDiTPipeline.from_pretrained` loads.

    The folder holds transformer and scheduler and appears at once, or not at all. Models of latents need their
    autoencoder when pictures are wanted: `ACDiTPipeline.from_pretrained(output, vae=AutoencoderKL.from_pretrained(…))`.

    Args:
        checkpoint: the reference's `.pt`.
        output: the folder to make; it must not exist.
        weights: which entry of the checkpoint: "model", or "ema" where the reference's training saved one.

    Returns:
        What was read, with the fields that were ignored.

    Raises:
        DataError: the file is not such a checkpoint, is unsafe to read, or its weights do not fit; nothing is written.
        StorageError: the folder exists or cannot be written.
    """
    if Path(output).exists():
        raise StorageError(f"{output} exists", expected="a new folder", fix="choose another output, or remove it")
    read = read_reference(checkpoint, weights)
    with torch.device("meta"):
        transformer = ACDiTTransformer(**read.config)
    transformer.load_state_dict(read.weights, assign=True)
    index = {  # what the pipeline itself writes; pipelines stand above this file
        "_class_name": "ACDiTPipeline", "_diffusers_version": diffusers.__version__, "id2label": None,
        "pixel_mean": 0.5, "pixel_std": 0.5, "latents": True, "vae": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["acdit.model", "ACDiTTransformer"],
    }  # fmt: skip
    with atomic_directory(Path(output)) as folder:
        transformer.save_pretrained(folder / "transformer")
        GaussianCorruption().sampling_scheduler().save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if read.ignored_fields:
        logger.info("%s: fields that say nothing about the model: %s", checkpoint, ", ".join(read.ignored_fields))
    return read


def read_reference(checkpoint: str | Path, weights: str = "model") -> ReferenceCheckpoint:
    """Read and check a checkpoint, as `convert_reference` does before it writes; the weights are views of the file."""
    path = Path(checkpoint)
    content = load_checkpoint(path)
    if not isinstance(content, dict) or type(content.get("args")) is not argparse.Namespace:
        raise DataError(
            f"{path}: not a checkpoint of the reference",
            found=describe(content),
            expected='a dict with "args" (argparse.Namespace) and "model" (a state dict)',
        )
    if not isinstance(content.get(weights), dict):
        raise DataError(f'{path}: no "{weights}" state dict', found=describe(content), fix='weights="model" or "ema"')
    fields, ignored = _typed_fields(path, vars(content["args"]))
    state = plain_tensors(path, content[weights])
    config = {**_layout(path, fields), **_sizes(path, state)}
    ours = _fitted(path, config, state)
    return ReferenceCheckpoint(config, ours, next(iter(ours.values())).dtype, ignored)


# --- what its arguments say ---------------------------------------------------------------------------------------

_REQUIRED = (
    "image_size", "vae_patch_pixels", "patch_size", "vae_latent_size", "block_size", "ar_len", "num_frames",
)  # fmt: skip
_OPTIONAL: dict[str, tuple[type, ...]] = {"nd_split": (str, type(None)), "square_block": (bool,), "dataset": (str,)}


def _typed_fields(path: Path, given: Mapping[Any, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    wrong: list[str] = []
    for name in _REQUIRED:
        value = given.get(name)
        if type(value) is not int or not 1 <= value <= _MAX_EXTENT:
            wrong.append(f"{name}={describe(value) if name in given else 'missing'} (an int, 1 … {_MAX_EXTENT})")
    for name, types in _OPTIONAL.items():
        if name in given and type(given[name]) not in types:
            wrong.append(f"{name}={describe(given[name])} (one of {[kind.__name__ for kind in types]})")
    split = given.get("nd_split")
    if type(split) is str and not re.fullmatch(r"[1-9]\d?(_[1-9]\d?){1,2}", split):
        wrong.append(f"nd_split={describe(split)} (parts like 2_3_3)")
    if wrong:
        raise DataError(f"{path}: args", found="; ".join(wrong), expected="the fields of the reference's training")
    known = (*_REQUIRED, *_OPTIONAL)
    ignored = sorted(printable(name)[:80] if type(name) is str else describe(name) for name in given)
    return {name: given[name] for name in known if name in given}, tuple(name for name in ignored if name not in known)


def _layout(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Grid, block and patch. Images: squares, in raster order; videos: spans of the raster, whole frames or parts."""
    frames, patch, tokens = fields["num_frames"], fields["patch_size"], fields["block_size"]
    side = fields["image_size"] // fields["vae_patch_pixels"] // patch
    if side < 1 or tokens * fields["ar_len"] != frames * side**2:
        raise DataError(
            f"{path}: args do not add up",
            found=f"block_size {tokens} × ar_len {fields['ar_len']}",
            expected=f"num_frames {frames} × {side}² tokens a frame",
        )
    axes = (frames, side, side) if frames > 1 else (side, side)
    patches = (1, patch, patch) if frames > 1 else (patch, patch)
    split = [int(part) for part in fields["nd_split"].split("_")] if fields.get("nd_split") else None
    if split is not None and len(split) != len(axes):
        raise DataError(f"{path}: args", found=f"nd_split {split}", expected=f"{len(axes)} parts")
    # As its sampling scripts do: videos in raster order whatever square_block says, images in squares unless their
    # training says twice that it was otherwise.
    rows = not fields.get("square_block", True) and fields.get("dataset", "ImageNet") != "ImageNet"
    if frames > 1 or rows:
        block = _raster_span(path, tokens, axes)
    else:
        edge = math.isqrt(tokens)
        if edge**2 != tokens or side % edge:
            raise DataError(f"{path}: args", found=f"block_size {tokens}", expected=f"a square that divides {axes}")
        block = (edge, edge)
    grid = tuple(extent * size for extent, size in zip(axes, patches, strict=True))
    channels = fields["vae_latent_size"]
    return {
        "grid": grid, "block": block, "patch": patches, "in_channels": channels,
        "rope": "reference", "rope_split": split,
    }  # fmt: skip


def _raster_span(path: Path, tokens: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The rectangle that `tokens` consecutive tokens of a raster are: whole frames, whole rows, or a part of a row."""
    block: list[int] = []
    left = tokens
    for extent in reversed(axes):
        size = math.gcd(left, extent) if left % extent else extent
        block.append(size)
        left //= size
        if size != extent and left != 1:
            break
    if left != 1:
        raise DataError(f"{path}: args", found=f"block_size {tokens}", expected=f"whole frames or rows of {axes}")
    return tuple(reversed(block))


# --- its weights --------------------------------------------------------------------------------------------------


def _sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Width, depth, heads and classes from the shapes; names of presets are not trusted."""
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    # Two-dimensional tensors of the file bound every size that is inferred, so nothing large can be asked for.
    proj, q_norm, fc1 = (f"blocks.0.{name}.weight" for name in ("attn.proj", "attn.q_norm", "mlp.fc1"))
    table = "y_embedder.embedding_table.weight"
    wanted = {"x_embedder.weight": 2, table: 2, proj: 2, q_norm: 1, fc1: 2}
    wrong = [
        f"{name}: {tuple(state[name].shape) if name in state else 'missing'}"
        for name, ndim in wanted.items()
        if name not in state or state[name].ndim != ndim or 0 in state[name].shape
    ]
    if wrong:
        raise DataError(f"{path}: weights", found="; ".join(wrong), expected="the names of the reference's models")
    width, head_dim = state[proj].shape[0], state[q_norm].shape[0]
    if width % head_dim:
        raise DataError(f"{path}: weights", found=f"width {width}, heads of {head_dim}", expected="whole heads")
    return {
        "num_layers": depth,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": state[fc1].shape[0] / width,
        "num_classes": state[table].shape[0] - 1,
    }


def _fitted(path: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names, once names and shapes are exactly those of the model that `config` describes."""
    try:
        with torch.device("meta"):
            shapes = {name: tuple(value.shape) for name, value in ACDiTTransformer(**config).state_dict().items()}
    except ConfigError as error:
        raise DataError(f"{path}: args and weights do not go together", found=str(error)) from None
    expected = {reference_name(name): shape for name, shape in shapes.items()}
    require_shapes(
        path, expected, state,
        f"{config['num_layers']} layers × {config['num_attention_heads']} heads and its layout",
        "convert the checkpoint as the reference's training saved it",
    )  # fmt: skip
    return {name: state[reference_name(name)] for name in shapes}
