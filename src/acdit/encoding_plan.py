"""What `acdit encode` is to make: settings, the data they name, the plan that a begun encoding is known by."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from acdit import storage
from acdit.codecs import VAECodec
from acdit.codecs.autoencoders import set_memory_savers
from acdit.data.build import build_dataset, require_used
from acdit.data.labelled import LabelledFiles
from acdit.data.latents import FORMAT, KIND, VAEIdentity
from acdit.errors import ConfigError, StorageError
from acdit.recipe import DataRecipe, differing

logger = logging.getLogger(__name__)

KINDS = ("images", "webdataset", "hf", "clips")
CLIP_SETTINGS = ("frames", "frame_stride", "fps", "start", "short_clips", "split_file", "clips_per_file")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POSTERIORS = ("mode", "sample", "moments")
CROP = "adm-center"  # what `acdit.data.picture.resize_and_crop` does
PLAN = "encode.json"
_UNCOMPARED = ("vae.id", "vae.subfolder")  # where it lies; the identity is compared


@dataclass(frozen=True)
class EncodeSettings:
    """What to encode, and how; all of it shapes the result."""

    data: str
    """Where the pictures or clips lie: data.root of a recipe of this `kind`."""
    vae: str
    """Folder or hub id."""
    subfolder: str | None = None
    kind: str = "images"
    """How they lie there: one of `KINDS`, as data.kind of a recipe; so are the next four."""
    split: str = "train"
    classes: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    size: int = 256
    """Pixels: resize and centre crop as ADM does."""
    frames: int = 16
    """T of a clip, as data.frames of a recipe; so are the next five. Only kind "clips" has a use for them."""
    frame_stride: int = 1
    fps: float | None = None
    start: str = "center"
    """Where a clip begins in its file: "center" or "first". Latents are encoded once, so there is no "random"."""
    short_clips: str = "error"
    split_file: str | None = None
    clips_per_file: int = 1
    """Several: from places evenly spread over the file (see `ClipsDataset`) instead of `start`."""
    flips: bool = False
    """Encode the mirrored view too."""
    posterior: str = "mode"
    """"mode", "sample" (drawn once, keyed by seed, sample and view), or "moments" (training may sample)."""
    dtype: str = "fp16"
    """Of the stored latents."""
    precision: str = "fp32"
    """Of the autoencoder's arithmetic."""
    batch_size: int = 16
    """Pictures, or frames, that the autoencoder codes at once."""
    shard_size: int | None = None
    """Samples a shard; None: 1024 pictures, or 64 clips."""
    max_bad_files: int = 0
    seed: int = 0
    tiling: bool = False
    slicing: bool = False

    @property
    def of_clips(self) -> bool:
        """Clips are encoded, not pictures."""
        return self.kind == "clips"

    @property
    def samples_a_shard(self) -> int:
        """`shard_size`, or what it stands for."""
        return self.shard_size or (64 if self.of_clips else 1024)

    @property
    def samples_at_once(self) -> int:
        """How many are read and encoded together: a batch of pictures, or clips of about a batch of frames."""
        return max(1, self.batch_size // self.frames) if self.of_clips else self.batch_size


def check(settings: EncodeSettings) -> None:
    """Refuse settings that are wrong whatever the data.

    Raises:
        ConfigError: it names the option.
    """
    for name, known in (("kind", KINDS), ("dtype", DTYPES), ("precision", DTYPES), ("posterior", POSTERIORS)):
        if getattr(settings, name) not in known:
            raise ConfigError(f"--{name}", found=repr(getattr(settings, name)), expected=f"one of {tuple(known)}")
    for name in ("size", "batch_size", "shard_size", "clips_per_file"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(_option(name), found=str(value), expected="at least 1")
    if settings.max_bad_files < 0 or settings.seed < 0:
        raise ConfigError("--max-bad-files, --seed", found="a negative number", expected="at least 0")
    _check_clips(settings)
    require_used(_recipe(settings))


def _check_clips(settings: EncodeSettings) -> None:
    if not settings.of_clips:
        for name in CLIP_SETTINGS:
            value, default = getattr(settings, name), getattr(EncodeSettings, name)
            if value != default:
                raise ConfigError(
                    _option(name), found=repr(value), expected=f"{default!r}: only --kind clips has a use for it"
                )
        return
    if settings.start == "random":
        raise ConfigError(
            "--start", found="'random'", expected="'center' or 'first': latents are encoded once",
            fix="--clips-per-file N takes N clips from places spread over each file",
        )  # fmt: skip
    if settings.clips_per_file > 1 and settings.start != EncodeSettings.start:
        raise ConfigError(
            "--start", found=f"{settings.start!r}, and --clips-per-file {settings.clips_per_file}",
            expected="one of the two: several clips begin at places spread over their file",
        )  # fmt: skip


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_dataset(settings: EncodeSettings, channels: int) -> LabelledFiles:
    """The pictures or clips, as training would read them.

    Raises:
        ConfigError, DataError: what training would refuse.
    """
    dataset = build_dataset(_recipe(settings, channels), clips_per_file=settings.clips_per_file)
    assert isinstance(dataset, LabelledFiles)  # as all of `KINDS` are
    return dataset


def _recipe(settings: EncodeSettings, channels: int = 3) -> DataRecipe:
    names = ["kind", "split", "size", "classes", "image_column", "label_column", "max_bad_files"]
    given: dict[str, Any] = {}
    if settings.of_clips:
        names += ["frames", "frame_stride", "fps", "short_clips", "split_file"]
        given["start"] = settings.start if settings.clips_per_file == 1 else "random"
    return DataRecipe(
        root=settings.data, channels=channels, **given, **{name: getattr(settings, name) for name in names}
    )


def make_plan(settings: EncodeSettings, dataset: LabelledFiles, vae: Any, channels: int) -> dict[str, Any]:
    """Everything the result follows from, as JSON.

    Raises:
        ConfigError: the autoencoder cannot encode them so.
    """
    import diffusers

    codec = VAECodec(vae)
    set_memory_savers(vae, tiling=settings.tiling, slicing=settings.slicing)
    files = hashlib.sha256()
    for identity, label in dataset.listing():
        files.update(f"{identity}\0{label}\n".encode("utf-8", "surrogateescape"))
    plan = {
        "vae": asdict(VAEIdentity.of(vae, settings.vae, settings.subfolder)),
        "latent_shape": codec.model_shape(dataset.shape),
        "dtype": settings.dtype, "posterior": settings.posterior, "flips": settings.flips,
        "resolution": settings.size, "crop": CROP, "picture_channels": channels, "split": settings.split,
        "seed": settings.seed, "precision": settings.precision, "batch_size": settings.batch_size,
        "shard_size": settings.samples_a_shard, "tiling": settings.tiling, "slicing": settings.slicing,
        "class_names": dataset.class_names, "samples": len(dataset), "files_sha256": files.hexdigest(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip
    if settings.of_clips:
        # The split file says which files: these are in `files_sha256`, wherever the list lies.
        plan["clips"] = {name: getattr(settings, name) for name in CLIP_SETTINGS if name != "split_file"}
    return dict(json.loads(json.dumps(plan)))


def begin(output: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Write the plan, or compare it with the one that was begun.

    Returns:
        The one that holds: what the autoencoder was called, and library versions, may differ.

    Raises:
        ConfigError: begun with other settings, all of which are listed.
        StorageError: what was begun cannot be read.
    """
    file = output / PLAN
    if not file.is_file():
        storage.write_json_atomic(file, {"kind": KIND, "format": FORMAT, **plan})
        return plan
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
        if (begun.pop("kind"), begun.pop("format")) != (KIND, FORMAT):
            raise ValueError("another kind or format")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise StorageError(f"{file}", found=f"unreadable ({error})", expected="a begun encoding") from None
    changed = differing(begun, plan)
    if any(key.startswith("versions.") for key in changed):
        logger.warning("not bit-exact: begun with %s, now %s", begun["versions"], plan["versions"])
    changed = {key: pair for key, pair in changed.items() if key not in _UNCOMPARED and not key.startswith("versions.")}
    if changed:
        listed = ", ".join(f"{key} was {old!s:.60}, is {new!s:.60}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"{output}", found=f"an encoding begun with other settings: {listed}", expected="the same settings",
            fix="give the settings it was begun with, or choose another --output",
        )  # fmt: skip
    return dict(begun)


def bytes_per_sample(settings: EncodeSettings, plan: dict[str, Any]) -> int:
    """What a sample takes in its shard, all views and parts."""
    tensors = (2 if settings.flips else 1) * (2 if settings.posterior == "moments" else 1)
    return int(math.prod(plan["latent_shape"]) * tensors * DTYPES[settings.dtype].itemsize)
