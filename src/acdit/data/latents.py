"""Latents that `acdit encode` left: read from memory-mapped shards, never the whole set in memory.

    manifest.json             what was encoded, by which autoencoder, how; the shards with their sha256
    shard-00000.safetensors   "latents" (M, V, C, [T,] h, w), or "mean" and "std" of the posterior; "labels" (M,)
    shard-00000.json          the shard's commit marker, from which the manifest is made

V is 1, or 2 where the mirrored view was encoded too. Values are in model space.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acdit.codecs import LatentScale, vae_sha256
from acdit.errors import ConfigError, DataError, NonFiniteError, StorageError
from acdit.storage import MANIFEST, file_sha256

logger = logging.getLogger(__name__)

FORMAT = 1
KIND = "acdit latents"
_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # as safetensors calls them
STD_RANGE = (0.5, 2.0)
"""Outside of it the scale is probably another autoencoder's."""


@dataclass(frozen=True)
class VAEIdentity:
    """Which autoencoder made the latents, and its scale."""

    id: str
    subfolder: str | None
    class_name: str
    sha256: str
    scaling_factor: float
    shift_factor: float
    latents_mean: list[float] | None
    latents_std: list[float] | None

    @classmethod
    def of(cls, vae: Any, name: str, subfolder: str | None) -> VAEIdentity:
        """Of an autoencoder that was loaded by this name (a folder or hub id) from this subfolder."""
        scale = LatentScale.of(vae)
        return cls(
            id=name, subfolder=subfolder, class_name=type(vae).__name__, sha256=vae_sha256(vae),
            scaling_factor=scale.scaling_factor, shift_factor=scale.shift_factor,
            latents_mean=None if scale.latents_mean is None else list(scale.latents_mean),
            latents_std=None if scale.latents_std is None else list(scale.latents_std),
        )  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A committed shard."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LatentsManifest:
    """What a directory of latents holds."""

    vae: VAEIdentity
    latent_shape: list[int]
    """[C, h, w], of clips [C, T, h, w]"""
    dtype: str
    posterior: str
    """"mode", "sample" (drawn once), or "moments" (mean and standard deviation)."""
    flips: bool
    resolution: int
    crop: str
    picture_channels: int
    split: str
    seed: int
    precision: str
    batch_size: int
    class_names: list[str]
    samples: int
    files_sha256: str
    """Over what tells the samples from others, and their classes, in order (`LabelledFiles.listing`)."""
    channel_mean: list[float]
    channel_std: list[float]
    bad_files: dict[str, str]
    shards: list[Shard]
    versions: dict[str, str]
    clips: dict[str, Any] | None = None
    """Which frames of the files, as `EncodeSettings` calls them; None: pictures."""

    @property
    def std(self) -> float:
        """Standard deviation over all values, about each channel's mean."""
        return float((sum(value**2 for value in self.channel_std) / len(self.channel_std)) ** 0.5)

    def warn_about_std(self) -> None:
        """Warn where the standard deviation is far from 1, where noise schedules expect it."""
        if not STD_RANGE[0] <= self.std <= STD_RANGE[1]:
            logger.warning(
                "latents: standard deviation %.3g, expected %g … %g: is scaling_factor %g this autoencoder's?",
                self.std, *STD_RANGE, self.vae.scaling_factor,
            )  # fmt: skip

    def text(self) -> str:
        """The manifest file, with its own digest."""
        content = {"kind": KIND, "format": FORMAT, **asdict(self)}
        if self.clips is None:
            del content["clips"]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def read_manifest(root: str | Path) -> LatentsManifest:
    """The manifest of a directory of latents.

    Raises:
        DataError: there is none (encoding has not ended), or it is another kind of file.
        StorageError: its content has changed.
    """
    file = Path(root) / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        unfinished = any(Path(root).glob("shard-*.json"))
        raise DataError(
            str(file), found="an encoding that has not ended" if unfinished else error.strerror or str(error),
            expected="the manifest that `acdit encode` leaves",
            fix="give the same `acdit encode` command again: it goes on" if unfinished else "check data.root",
        ) from None  # fmt: skip
    try:
        content: dict[str, Any] = json.loads(text)
        if content.pop("kind") != KIND or content.pop("format") != FORMAT:
            raise ValueError("another kind or format")
        content.pop("sha256")
        vae, shards = VAEIdentity(**content.pop("vae")), [Shard(**shard) for shard in content.pop("shards")]
        manifest = LatentsManifest(vae=vae, shards=shards, **content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            str(file), found=f"no manifest of latents ({error})", expected="what `acdit encode` leaves"
        ) from None
    if manifest.text() != text:
        raise StorageError(f"{file}", found="another content than was written", expected="an unchanged manifest")
    return manifest


class LatentsDataset:
    """Cached latents by index.

    Items are (V, P, C, h, w), of clips (V, P, C, T, h, w), and the class: V views (the picture; the mirrored one if
    `flip`), P parts (the latent, or mean and standard deviation if `posterior` is "sample" and moments were cached).

    Args:
        root: what `acdit encode` left.
        flip: both views are wanted.
        posterior: "mode" or "sample".

    Raises:
        DataError: no manifest; shards missing, or of another size, shape or type than it says.
        ConfigError: views or a posterior that were not cached.
    """

    def __init__(self, root: str | Path, flip: bool = False, posterior: str = "mode") -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        if flip and not self.manifest.flips:
            raise ConfigError(
                "data.flip", found="true, but the mirrored views were not encoded", expected="false",
                fix="encode with --flips, or set data.flip=false",
            )  # fmt: skip
        self._require_posterior(posterior)
        self._views = 2 if flip else 1
        moments = self.manifest.posterior == "moments"
        self._names = ("mean", "std") if moments and posterior == "sample" else ("mean",) if moments else ("latents",)
        self.class_names = list(self.manifest.class_names)
        self.num_classes = len(self.class_names)
        self.shape = tuple(self.manifest.latent_shape)
        """(C, [T,] h, w) of a latent."""
        self._stops: list[int] = []
        for shard in self.manifest.shards:
            self._require_size(shard)
            self._stops.append((self._stops[-1] if self._stops else 0) + shard.count)
        self._open: dict[int, Any] = {}
        self.labels: list[int] = []
        """Class of every index."""
        for number in range(len(self.manifest.shards)):
            self._require_form(number)
            self.labels += self._shard(number).get_tensor("labels").tolist()

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(V, P, C, [T,] h, w) in the cached dtype, and the class.

        Raises:
            NonFiniteError: the cached values are NaN or infinite.
            DataError: the shard cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect.bisect_right(self._stops, index)
        row = index - (self._stops[number - 1] if number else 0)
        try:
            handle = self._shard(number)
            # A slice copies the pages of this row only: the file is mapped, not read.
            parts = [handle.get_slice(name)[row, : self._views] for name in self._names]
        except SafetensorError as error:
            raise self._damaged(number, str(error)) from error
        item = torch.stack(parts, dim=1)
        if not torch.isfinite(item).all():
            raise NonFiniteError(
                f"{self.root / self.manifest.shards[number].file}", found=f"NaN or infinite latents at index {row}"
                f" (sample {index} of the data set)",
                expected="finite numbers", fix="give the `acdit encode` command again: it replaces damaged shards",
            )  # fmt: skip
        return item, self.labels[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # mappings do not travel to other processes; they are opened anew

    def verify(self) -> None:
        """Check every shard against its sha256: reads the whole set.

        Raises:
            DataError: a shard has changed.
        """
        for number, shard in enumerate(self.manifest.shards):
            found = file_sha256(self.root / shard.file)
            if found != shard.sha256:
                raise self._damaged(number, f"sha256 {found[:16]}…, expected {shard.sha256[:16]}…")

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            try:
                self._open[number] = safe_open(self.root / self.manifest.shards[number].file, "pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(number, str(error)) from error
        return self._open[number]

    def _require_size(self, shard: Shard) -> None:
        file = self.root / shard.file
        found = f"{file.stat().st_size:,} bytes" if file.is_file() else "no such file"
        if found != f"{shard.bytes:,} bytes":
            raise DataError(
                str(file), found=found, expected=f"{shard.bytes:,} bytes", fix="give the `acdit encode` command again"
            )

    def _require_form(self, number: int) -> None:
        """A shard's header against the manifest: one of another encoding may have the same size to the byte."""
        manifest, shard = self.manifest, self._shard(number)
        latents = [manifest.shards[number].count, 1 + manifest.flips, *manifest.latent_shape]
        wanted = {name: (_DTYPES.get(manifest.dtype), latents) for name in self._names}
        wanted["labels"] = ("I64", latents[:1])
        for name, form in wanted.items():
            try:
                found = shard.get_slice(name)
            except SafetensorError as error:
                raise self._damaged(number, str(error)) from error
            if (found.get_dtype(), list(found.get_shape())) != form:
                reason = f"{name} is {found.get_dtype()} {found.get_shape()}, the manifest says {form[0]} {form[1]}"
                raise self._damaged(number, reason)

    def _damaged(self, number: int, reason: str) -> DataError:
        return DataError(
            str(self.root / self.manifest.shards[number].file), found=f"a damaged shard ({reason})",
            expected="what `acdit encode` wrote",
            fix="give the `acdit encode` command again: it replaces damaged shards",
        )  # fmt: skip

    def _require_posterior(self, posterior: str) -> None:
        cached = self.manifest.posterior
        fits = {"mode": ("mode",), "sample": ("sample",), "moments": ("mode", "sample")}[cached]
        if posterior not in fits:
            raise ConfigError(
                "codec.posterior", found=repr(posterior), expected=f"one of {fits}: the latents hold the {cached}",
                fix=f"set codec.posterior={fits[0]}, or encode with --posterior moments",
            )  # fmt: skip
