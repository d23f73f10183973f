"""`acdit encode`: a data set of pictures or clips → shards of latents (their layout: `acdit.data.latents`).

A shard is a fixed range of samples and depends on nothing but its range: whichever process makes it, before or after a
kill, its bytes are the same. It is written under a temporary name and renamed; its .json, written after it, commits it.
A rerun checks what is committed against its sha256 and makes the rest.

Shards are no `acdit.chunks`: those are parts of a longer work, to be removed after it; shards are the product, flat
files with a manifest that others read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from acdit import draws, storage
from acdit.codecs import VAECodec, load_vae
from acdit.codecs.autoencoders import set_memory_savers
from acdit.data.bad_files import BadFiles
from acdit.data.labelled import LabelledFiles
from acdit.data.latents import LatentsManifest, Shard, VAEIdentity
from acdit.encoding_plan import (
    DTYPES,
    PLAN,
    EncodeSettings,
    begin,
    bytes_per_sample,
    check,
    make_plan,
    read_dataset,
)
from acdit.errors import DataError, NonFiniteError, StorageError
from acdit.workers import Progress, run_tasks

logger = logging.getLogger(__name__)


def encode_dataset(
    settings: EncodeSettings,
    output: str | Path,
    *,
    workers: int = 1,
    threads: int = 1,
    device: str | None = None,
    progress: bool = True,
) -> LatentsManifest:
    """Encode, or go on encoding, into a directory.

    Args:
        settings: what and how.
        output: a new or empty directory, or one that this very encoding has begun.
        workers: processes; the result is the same to the bit for any number.
        threads: of torch in each of them. Another number may change the last bits.
        device: "cpu", "cuda", "cuda:1"; None: cuda where there is one. "cuda" deals the workers over all devices.
        progress: draw a bar with the remaining time.

    Returns:
        The manifest, as written.

    Raises:
        ConfigError: a setting, the autoencoder, or a directory begun with other settings.
        DataError: the pictures or clips, their labels, or more bad ones than allowed.
        NonFiniteError: NaN or infinite latents; the picture and its index are named.
        StorageError: no room (what is encoded stays), or a directory with other things in it.
        PeerLostError: a worker was killed.
    """
    check(settings)
    output = Path(output)
    if output.exists() and not (output / PLAN).is_file() and (not output.is_dir() or _foreign(output)):
        raise StorageError(
            f"{output}", found="other things", expected="nothing there, or a begun encoding",
            fix="choose another --output",
        )  # fmt: skip
    with storage.RunLock(output):
        storage.clean_leftovers(output)
        vae = load_vae(settings.vae, settings.subfolder)
        channels = int(getattr(vae.config, "in_channels", 3))
        dataset = read_dataset(settings, channels)
        plan = begin(output, make_plan(settings, dataset, vae, channels))
        starts = range(0, plan["samples"], settings.samples_a_shard)
        counts = [min(settings.samples_a_shard, plan["samples"] - start) for start in starts]
        found = [_committed(output, number) for number in range(len(counts))]
        missing = [number for number, record in enumerate(found) if record is None]
        bad = _all_bad(record for record in found if record is not None)
        _require_few(bad, settings)
        total = sum(counts[number] for number in missing)
        storage.require_room(output, total * bytes_per_sample(settings, plan))
        encoder = ShardEncoder(settings, dataset, output, device)
        if workers == 1 or len(missing) <= 1:
            encoder.vae = vae
        del vae
        started = time.perf_counter()
        with tqdm(
            total=plan["samples"], initial=plan["samples"] - total, unit=dataset.bad_files.what, disable=not progress,
            dynamic_ncols=True,
        ) as bar, contextlib.closing(
            run_tasks(encoder, missing, workers=workers, threads=threads, on_progress=bar.update)
        ) as tasks:  # fmt: skip
            for result in tasks:
                bad |= result["bad_files"]
                _require_few(bad, settings)
        seconds = time.perf_counter() - started
        if total:
            views = " (two views each)" if settings.flips else ""
            what = f"{dataset.bad_files.what}s"
            print(f"encoded {total} {what}{views} in {seconds:.1f} s: {total / seconds:.1f} {what}/s")
        manifest = _manifest(output, plan, len(counts))
        storage.write_text_atomic(output / storage.MANIFEST, manifest.text())
    manifest.warn_about_std()
    return manifest


class ShardEncoder:
    """What a worker does: one shard a call. Travels to the workers, where it loads the autoencoder when first asked.

    Args:
        settings: what and how.
        dataset: the pictures or clips.
        output: the directory.
        device: as in `encode_dataset`.
    """

    def __init__(self, settings: EncodeSettings, dataset: LabelledFiles, output: Path, device: str | None) -> None:
        self.settings, self.dataset, self.output, self.device = settings, dataset, output, device
        self.vae: Any = None
        self._codec: VAECodec | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "vae": None, "_codec": None}

    def prepare(self, worker: int) -> None:
        """Load the autoencoder; workers on "cuda" are dealt over its devices."""
        settings = self.settings
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            device = f"cuda:{worker % torch.cuda.device_count()}"
        vae = self.vae or load_vae(settings.vae, settings.subfolder)
        set_memory_savers(vae, tiling=settings.tiling, slicing=settings.slicing)
        vae = vae.to(device)
        vae = vae if settings.precision == "fp32" else vae.to(DTYPES[settings.precision])
        self._codec = VAECodec(vae, frames_at_once=settings.batch_size)

    def __call__(self, item: int, progress: Progress) -> dict[str, Any]:
        """Encode shard `item` and commit it; its commit record."""
        settings = self.settings
        first = item * settings.samples_a_shard
        indices = range(first, min(first + settings.samples_a_shard, len(self.dataset)))
        what = self.dataset.bad_files.what
        self.dataset.bad_files = BadFiles(settings.max_bad_files, what=what)  # of this shard alone, for its record
        batches: list[dict[str, Tensor]] = []
        labels: list[int] = []
        for start in range(0, len(indices), settings.samples_at_once):
            chosen = indices[start : start + settings.samples_at_once]
            loaded = [self.dataset[index] for index in chosen]
            labels += [label for _, label in loaded]
            batches.append(self._encode(torch.stack([picture for picture, _ in loaded]), chosen))
            progress(len(chosen))
        tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
        return self._commit(item, tensors)

    def _encode(self, pictures: Tensor, indices: range) -> dict[str, Tensor]:
        """(B, C, [T,] H, W) uint8 → the stored tensors, (B, V, C, [T,] h, w)."""
        assert self._codec is not None  # `prepare` comes first
        settings = self.settings
        views: dict[str, list[Tensor]] = {}
        for view, seen in enumerate([pictures, pictures.flip(-1)] if settings.flips else [pictures]):
            mean, std = self._codec.moments(seen)
            if settings.posterior == "sample":
                noise = draws.normal(
                    tuple(mean.shape[1:]), seed=settings.seed, stream="encode", step=view, samples=indices
                )
                mean = mean + std * noise.to(mean)
            named = {"mean": mean, "std": std} if settings.posterior == "moments" else {"latents": mean}
            for name, values in named.items():
                views.setdefault(name, []).append(values.to(DTYPES[settings.dtype]).cpu())
        stored = {name: torch.stack(values, dim=1) for name, values in views.items()}
        for name, values in stored.items():
            finite = torch.isfinite(values).flatten(1).all(1)
            if not finite.all():
                index, what = indices[int((~finite).nonzero()[0])], self.dataset.bad_files.what
                raise NonFiniteError(
                    self.dataset.file_at(index), found=f"NaN or infinite {name} at index {index}",
                    expected=f"numbers that {settings.dtype} can hold",
                    fix=f"use --precision fp32 and --dtype fp32, and look at the {what} and the autoencoder's weights",
                )  # fmt: skip
        return stored

    def _commit(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        file = self.output / _shard_name(number)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with storage.atomic_file(file, size) as temporary:
            save_file(tensors, temporary)
        count, sums, squares = _sums(tensors)
        record = {
            "file": file.name, "count": len(tensors["labels"]), "bytes": file.stat().st_size,
            "sha256": storage.file_sha256(file), "values": count, "sums": sums, "squares": squares,
            "bad_files": self.dataset.bad_files.reasons,
        }  # fmt: skip
        storage.write_json_atomic(file.with_suffix(".json"), record)
        return record


def _sums(tensors: dict[str, Tensor]) -> tuple[int, list[float], list[float]]:
    """Values a channel, and per channel their sum and sum of squares as stored, in fp64.

    With moments these are of a sample's expectation: E[z²] = mean² + std².
    """
    mean = tensors["latents" if "latents" in tensors else "mean"].double()
    squares = mean.square() + (tensors["std"].double().square() if "std" in tensors else 0)
    axes = [axis for axis in range(mean.ndim) if axis != 2]
    return mean[:, :, 0].numel(), mean.sum(axes).tolist(), squares.sum(axes).tolist()


def _foreign(output: Path) -> bool:
    return any(not place.name.startswith(".") for place in output.iterdir())


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _committed(output: Path, number: int, check: bool = True) -> dict[str, Any] | None:
    """The commit record of a shard whose bytes are what was committed; None: it is to be made."""
    file = output / _shard_name(number)
    try:
        record = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        whole = file.stat().st_size == record["bytes"] and (not check or storage.file_sha256(file) == record["sha256"])
        complete = set(record) >= {"count", "values", "sums", "squares", "bad_files"}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (whole and complete):
        logger.warning("%s is damaged and is encoded anew", file)
        return None
    return dict(record)


def _all_bad(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    return dict(itertools.chain.from_iterable(record["bad_files"].items() for record in records))


def _require_few(bad: dict[str, str], settings: EncodeSettings) -> None:
    """Each process counts for itself while it reads; this is the count over all of them."""
    if len(bad) <= settings.max_bad_files:
        return
    file, reason = next(iter(bad.items()))
    raise DataError(
        file, found=f"a bad {'clip' if settings.of_clips else 'picture'} ({reason}), one of {len(bad)}",
        expected=f"at most {settings.max_bad_files} bad files", fix="repair or remove them, or raise --max-bad-files",
    )  # fmt: skip


def _manifest(output: Path, plan: dict[str, Any], shards: int) -> LatentsManifest:
    records = [_committed(output, number, check=False) for number in range(shards)]
    whole = [record for record in records if record is not None]
    if len(whole) != shards:  # another program took some away
        raise StorageError(
            f"{output}", found=f"{len(whole)} shards", expected=str(shards), fix="give the command again"
        )
    values = sum(record["values"] for record in whole)
    sums = [sum(channel) for channel in zip(*(record["sums"] for record in whole), strict=True)]
    squares = [sum(channel) for channel in zip(*(record["squares"] for record in whole), strict=True)]
    mean = [total / values for total in sums]
    std = [max(0.0, total / values - center**2) ** 0.5 for total, center in zip(squares, mean, strict=True)]
    fields = {key: value for key, value in plan.items() if key not in ("vae", "shard_size", "tiling", "slicing")}
    return LatentsManifest(
        vae=VAEIdentity(**plan["vae"]), channel_mean=mean, channel_std=std, bad_files=_all_bad(whole),
        shards=[Shard(**{key: record[key] for key in ("file", "count", "bytes", "sha256")}) for record in whole],
        **fields,
    )  # fmt: skip
