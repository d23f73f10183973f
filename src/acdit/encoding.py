"""`acdit encode`: a data set of pictures → shards of latents (the layout is described in `acdit.data.latents`).

A shard is a fixed range of samples and depends on nothing but its range: whichever process makes it, before or after a
kill, its bytes are the same. It is written under a temporary name and renamed; its .json, written after it, commits it.
A rerun checks what is committed against its sha256 and makes the rest.

Shards are no `acdit.chunks`: those are parts of a longer work, to be removed after it; shards are the product, flat
files with a manifest that others read.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
from acdit.data.build import build_dataset, require_used
from acdit.data.labelled import LabelledPictures
from acdit.data.latents import FORMAT, KIND, LatentsManifest, Shard, VAEIdentity
from acdit.errors import ConfigError, DataError, NonFiniteError, StorageError
from acdit.recipe import DataRecipe, differing
from acdit.workers import Progress, run_tasks

logger = logging.getLogger(__name__)

KINDS = ("images", "webdataset", "hf")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POSTERIORS = ("mode", "sample", "moments")
CROP = "adm-center"  # what `acdit.data.picture.resize_and_crop` does
PLAN = "encode.json"
_UNCOMPARED = ("vae.id", "vae.subfolder")  # where it lies; the identity is compared


@dataclass(frozen=True)
class EncodeSettings:
    """What to encode, and how; all of it shapes the result."""

    data: str
    """Where the pictures lie: data.root of a recipe of this `kind`."""
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
    flips: bool = False
    """Encode the mirrored view too."""
    posterior: str = "mode"
    """"mode", "sample" (drawn once, keyed by seed, sample and view), or "moments" (training may sample)."""
    dtype: str = "fp16"
    """Of the stored latents."""
    precision: str = "fp32"
    """Of the autoencoder's arithmetic."""
    batch_size: int = 16
    shard_size: int = 1024
    """Samples a shard."""
    max_bad_files: int = 0
    seed: int = 0
    tiling: bool = False
    slicing: bool = False


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
        DataError: the pictures, their labels, or more bad ones than allowed.
        NonFiniteError: NaN or infinite latents; the picture and its index are named.
        StorageError: no room (what is encoded stays), or a directory with other things in it.
        PeerLostError: a worker was killed.
    """
    _check(settings)
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
        dataset = build_dataset(_recipe(settings, channels))
        assert isinstance(dataset, LabelledPictures)  # as all of `KINDS` are
        plan = _begin(output, _plan(settings, dataset, vae, channels))
        counts = [
            min(settings.shard_size, plan["samples"] - start)
            for start in range(0, plan["samples"], settings.shard_size)
        ]
        found = [_committed(output, number) for number in range(len(counts))]
        missing = [number for number, record in enumerate(found) if record is None]
        bad = _all_bad(record for record in found if record is not None)
        _require_few(bad, settings)
        total = sum(counts[number] for number in missing)
        storage.require_room(output, total * _bytes_per_sample(settings, plan))
        encoder = ShardEncoder(settings, dataset, output, device)
        if workers == 1 or len(missing) <= 1:
            encoder.vae = vae
        del vae
        started = time.perf_counter()
        with tqdm(
            total=plan["samples"], initial=plan["samples"] - total, unit="picture", disable=not progress,
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
            print(f"encoded {total} pictures{views} in {seconds:.1f} s: {total / seconds:.1f} pictures/s")
        manifest = _manifest(output, plan, len(counts))
        storage.write_text_atomic(output / storage.MANIFEST, manifest.text())
    manifest.warn_about_std()
    return manifest


class ShardEncoder:
    """What a worker does: one shard a call. Travels to the workers, where it loads the autoencoder when first asked.

    Args:
        settings: what and how.
        dataset: the pictures.
        output: the directory.
        device: as in `encode_dataset`.
    """

    def __init__(self, settings: EncodeSettings, dataset: LabelledPictures, output: Path, device: str | None) -> None:
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
        self._codec = VAECodec(vae if settings.precision == "fp32" else vae.to(DTYPES[settings.precision]))

    def __call__(self, item: int, progress: Progress) -> dict[str, Any]:
        """Encode shard `item` and commit it; its commit record."""
        settings = self.settings
        first = item * settings.shard_size
        indices = range(first, min(first + settings.shard_size, len(self.dataset)))
        self.dataset.bad_files = BadFiles(settings.max_bad_files)  # of this shard alone, for its record
        batches: list[dict[str, Tensor]] = []
        labels: list[int] = []
        for start in range(0, len(indices), settings.batch_size):
            chosen = indices[start : start + settings.batch_size]
            loaded = [self.dataset[index] for index in chosen]
            labels += [label for _, label in loaded]
            batches.append(self._encode(torch.stack([picture for picture, _ in loaded]), chosen))
            progress(len(chosen))
        tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
        return self._commit(item, tensors)

    def _encode(self, pictures: Tensor, indices: range) -> dict[str, Tensor]:
        """(B, C, H, W) uint8 → the stored tensors, (B, V, C, h, w)."""
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
                index = indices[int((~finite).nonzero()[0])]
                raise NonFiniteError(
                    self.dataset.file_at(index), found=f"NaN or infinite {name} at index {index}",
                    expected=f"numbers that {settings.dtype} can hold",
                    fix="use --precision fp32 and --dtype fp32, and look at the picture and the autoencoder's weights",
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
    axes = [0, 1, 3, 4]
    return mean[:, :, 0].numel(), mean.sum(axes).tolist(), squares.sum(axes).tolist()


def _check(settings: EncodeSettings) -> None:
    for name, known in (("kind", KINDS), ("dtype", DTYPES), ("precision", DTYPES), ("posterior", POSTERIORS)):
        if getattr(settings, name) not in known:
            raise ConfigError(f"--{name}", found=repr(getattr(settings, name)), expected=f"one of {tuple(known)}")
    for name in ("size", "batch_size", "shard_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", found=str(getattr(settings, name)), expected="at least 1")
    if settings.max_bad_files < 0 or settings.seed < 0:
        raise ConfigError("--max-bad-files, --seed", found="a negative number", expected="at least 0")
    require_used(_recipe(settings))


def _recipe(settings: EncodeSettings, channels: int = 3) -> DataRecipe:
    """The pictures, as training would read them: what a recipe refuses is refused here."""
    names = ("kind", "split", "size", "classes", "image_column", "label_column", "max_bad_files")
    return DataRecipe(root=settings.data, channels=channels, **{name: getattr(settings, name) for name in names})


def _foreign(output: Path) -> bool:
    return any(not place.name.startswith(".") for place in output.iterdir())


def _plan(settings: EncodeSettings, dataset: LabelledPictures, vae: Any, channels: int) -> dict[str, Any]:
    """Everything the result follows from."""
    import diffusers

    codec = VAECodec(vae)
    set_memory_savers(vae, tiling=settings.tiling, slicing=settings.slicing)
    files = hashlib.sha256()
    for identity, label in dataset.listing():
        files.update(f"{identity}\0{label}\n".encode("utf-8", "surrogateescape"))
    plan = {
        "vae": asdict(VAEIdentity.of(vae, settings.vae, settings.subfolder)),
        "latent_shape": codec.latent_shape(settings.size, settings.size),
        "dtype": settings.dtype, "posterior": settings.posterior, "flips": settings.flips,
        "resolution": settings.size, "crop": CROP, "picture_channels": channels, "split": settings.split,
        "seed": settings.seed, "precision": settings.precision, "batch_size": settings.batch_size,
        "shard_size": settings.shard_size, "tiling": settings.tiling, "slicing": settings.slicing,
        "class_names": dataset.class_names, "samples": len(dataset), "files_sha256": files.hexdigest(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip
    return dict(json.loads(json.dumps(plan)))


def _begin(output: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Write the plan, or compare it with the one that was begun; the one that holds."""
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


def _bytes_per_sample(settings: EncodeSettings, plan: dict[str, Any]) -> int:
    channels, height, width = plan["latent_shape"]
    tensors = (2 if settings.flips else 1) * (2 if settings.posterior == "moments" else 1)
    return int(channels * height * width * tensors * DTYPES[settings.dtype].itemsize)


def _all_bad(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    return dict(itertools.chain.from_iterable(record["bad_files"].items() for record in records))


def _require_few(bad: dict[str, str], settings: EncodeSettings) -> None:
    """Each process counts for itself while it reads; this is the count over all of them."""
    if len(bad) <= settings.max_bad_files:
        return
    file, reason = next(iter(bad.items()))
    raise DataError(
        file, found=f"a bad picture ({reason}), one of {len(bad)}",
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
