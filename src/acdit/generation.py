"""Pictures and clips by the ten thousands: drawn in chunks over processes, kept as they are finished, written as files
and npz.

Picture (or clip) i has seed + i and the label labels[i mod len(labels)], whatever the number of processes and the batch
size. The floating-point result of a batch depends on its size in the last bits, so another batch size may change a
pixel by one level; another number of processes, or a kill and a second start, changes nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acdit import storage
from acdit.chunks import ChunkStore, make_missing
from acdit.errors import ConfigError, NonFiniteError
from acdit.pictures import image_grid
from acdit.pipelines import ACDiTPipeline
from acdit.processes import Processes
from acdit.provenance import weights_sha256
from acdit.videos import contact_sheet, write_clip

GRID_PICTURES = 64
_SHEET_CLIPS = 8


@dataclass(frozen=True)
class SamplingSettings:
    """What a picture depends on besides the model and its index.

    Args:
        num_inference_steps: solver steps a block.
        guidance_scale: 1 is off.
        seed: picture i is drawn from seed + i.
        labels: picture i has labels[i mod len(labels)]; all classes in turn make balanced classes. None: no labels.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    seed: int = 0
    labels: tuple[int, ...] | None = None

    def labels_of(self, start: int, stop: int) -> list[int] | None:
        """Labels of the pictures start … stop − 1."""
        if self.labels is None:
            return None
        return [self.labels[index % len(self.labels)] for index in range(start, stop)]


def describe_sampling(pipeline: ACDiTPipeline, settings: SamplingSettings) -> dict[str, Any]:
    """Everything the pictures depend on, as JSON: recorded with them, and compared before parts are reused."""
    parts = [pipeline.transformer, *([pipeline.vae] if pipeline.vae is not None else [])]
    labels = settings.labels
    return {
        "model_sha256": weights_sha256(*parts),
        "model_config": _plain(pipeline.transformer.config),  # equal weights in other blocks draw other pictures
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "pixel_range": [pipeline.config.pixel_mean, pipeline.config.pixel_std],
        "solver": type(pipeline.scheduler).__name__,
        "solver_config": _plain(pipeline.scheduler.config),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale if labels is not None else 1.0,
        "seed": settings.seed,
        "labels": _as_range(labels),
    }


def generate(
    pipeline: ACDiTPipeline,
    settings: SamplingSettings,
    folder: str | Path,
    num_samples: int,
    *,
    batch_size: int = 64,
    chunk_size: int = 256,
    processes: Processes | None = None,
    progress: bool = True,
) -> ChunkStore:
    """Draw pictures 0 … num_samples − 1, or what is missing of them.

    Args:
        pipeline: a model of pictures or clips.
        settings: see there.
        folder: where the parts are kept: its own folder.
        num_samples: how many; more than in an earlier call goes on behind that one's last whole chunk.
        batch_size: pictures at once.
        chunk_size: pictures that are kept together; a kill loses less than one chunk a process.
        processes: this process among its peers.
        progress: whether to draw a progress bar.

    Returns:
        The store; its chunks hold "images", uint8 (n, C, H, W), of a video model (n, T, C, H, W).

    Raises:
        ConfigError: a model of neither, or settings that do not fit the model.
        NonFiniteError: a picture has NaN or infinite values; it is named.
        StorageError: the folder holds pictures of other settings.
    """
    draws_clips(pipeline)
    store = ChunkStore(folder, describe_sampling(pipeline, settings), num_samples, chunk_size)

    def draw(start: int, stop: int) -> Mapping[str, Tensor]:
        cuts = range(start, stop, batch_size)
        batches = [draw_pictures(pipeline, settings, first, min(first + batch_size, stop)) for first in cuts]
        return {"images": torch.cat(batches)}

    with _quiet(pipeline):
        make_missing(store, draw, processes, what="sampling", progress=progress)
    return store


def draws_clips(pipeline: ACDiTPipeline) -> bool:
    """Whether it is a video model; otherwise it is one of pictures.

    Raises:
        ConfigError: neither, a model of a single axis.
    """
    axes = pipeline.transformer.layout.ndim
    if axes not in (2, 3):
        raise ConfigError("model", found=f"a model of {axes}-D data", expected="a model of pictures or clips")
    return bool(axes == 3)


def require_pictures(pipeline: ACDiTPipeline) -> None:
    """Refuse a model of anything else.

    Raises:
        ConfigError: a video model, or one of a single axis.
    """
    if draws_clips(pipeline):
        raise ConfigError(
            "model", found="a video model", expected="a model of pictures", fix="--num-samples N draws N clips"
        )


def draw_pictures(pipeline: ACDiTPipeline, settings: SamplingSettings, start: int, stop: int, **options: Any) -> Tensor:
    """Pictures start … stop − 1 in one batch, uint8 (n, C, H, W) on the CPU, of a video model (n, T, C, H, W).

    Args:
        pipeline, settings: see `generate`.
        start, stop: which.
        options: go to the pipeline (a prefix).

    Raises:
        NonFiniteError: a picture has NaN or infinite values; it is named.
    """
    labels = settings.labels_of(start, stop)
    (images,) = pipeline(
        labels,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=settings.seed + start,
        batch_size=stop - start,
        output_type="pt",
        return_dict=False,
        **options,
    )
    images = images.float().cpu()
    finite = images.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        index = start + int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"picture {index} (seed {settings.seed + index})", found="NaN or infinite values", expected="finite ones",
            fix="--dtype fp32, a lower guidance scale, or another checkpoint",
        )  # fmt: skip
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def picture_name(index: int, settings: SamplingSettings) -> str:
    """File name of picture `index`."""
    labels = settings.labels_of(index, index + 1)
    label = f"-label-{labels[0]}" if labels is not None else ""
    return f"{index:05d}{label}-seed-{settings.seed + index}.png"


def save_png(pixels: Tensor, file: str | Path) -> None:
    """A picture (C, H, W) uint8, gray or RGB, as PNG; the file's name may end as it likes."""
    from PIL import Image

    array = np.ascontiguousarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    Image.fromarray(array).save(file, format="PNG")


def write_pngs(store: ChunkStore, settings: SamplingSettings, folder: str | Path, processes: Processes) -> None:
    """One PNG a picture; each process writes those of its share of the chunks."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for chunk in range(processes.rank, len(store), processes.size):
        first, _ = store.bounds(chunk)
        for index, pixels in enumerate(store.load(chunk)["images"], start=first):
            with storage.atomic_file(folder / picture_name(index, settings), pixels.nbytes, durable=False) as file:
                save_png(pixels, file)
    processes.wait_for_all()


def write_npz(store: ChunkStore, path: str | Path, settings: Mapping[str, Any], labels: Sequence[int] | None) -> None:
    """ADM's batch form, a chunk in memory at a time: `arr_0` uint8 (M, H, W, C), gray ones with three equal channels.

    Of clips `arr_0` is (M, T, H, W, C).
    Beside it lie `arr_1`, the labels (M,) int64, where there are any, and `settings`, a JSON text.
    """
    *frames, _, height, width = store.load(0)["images"].shape[1:]
    shape = (store.total, *frames, height, width, 3)
    with storage.atomic_file(path, int(np.prod(shape))) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(_entry("arr_0"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for chunk in store:
                pictures = chunk["images"].movedim(-3, -1).expand(*[-1] * (len(shape) - 1), 3)
                member.write(pictures.contiguous().numpy().tobytes())
        extra = {"settings": np.array(json.dumps(settings))}
        if labels is not None:
            extra["arr_1"] = np.asarray(labels, dtype=np.int64)
        for name, array in extra.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(_entry(name), buffer.getvalue())


def write_clips(
    store: ChunkStore, settings: SamplingSettings, folder: str | Path, processes: Processes, kind: str, fps: float = 8.0
) -> None:
    """One film (mp4 or gif, to look at) or one folder of frames (PNGs, exact) a clip; each process writes its share.

    Raises:
        ConfigError: an unknown kind, or mp4 without PyAV.
    """
    folder = Path(folder)
    for chunk in range(processes.rank, len(store), processes.size):
        first, _ = store.bounds(chunk)
        for index, frames in enumerate(store.load(chunk)["images"], start=first):
            name = picture_name(index, settings).removesuffix(".png")
            if kind != "frames":
                with storage.atomic_file(folder / f"{name}.{kind}", frames.nbytes, durable=False) as file:
                    write_clip(frames, file, kind, fps)
                continue
            for number, pixels in enumerate(frames):
                with storage.atomic_file(folder / name / f"{number:05d}.png", pixels.nbytes, durable=False) as file:
                    save_png(pixels, file)
    processes.wait_for_all()


def write_grid(store: ChunkStore, path: str | Path, columns: int = 8) -> None:
    """The first pictures side by side, or the first clips, a row each."""
    needed = range(-(-min(GRID_PICTURES, store.total) // store.chunk_size))
    pictures = torch.cat([store.load(chunk)["images"] for chunk in needed])[:GRID_PICTURES]
    if pictures.ndim == 5:
        sheet = contact_sheet(pictures[:_SHEET_CLIPS], columns)
    else:
        sheet = image_grid(pictures, columns=min(columns, len(pictures)))
    with storage.atomic_file(path) as file:
        sheet.save(file, format="PNG")


def _entry(name: str) -> zipfile.ZipInfo:
    """With a fixed date: equal pictures make equal files."""
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))


def _as_range(labels: tuple[int, ...] | None) -> list[int] | str | None:
    if labels is not None and len(labels) > 20 and list(labels) == list(range(labels[0], labels[0] + len(labels))):
        return f"{labels[0]}-{labels[-1]}"
    return None if labels is None else list(labels)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it, without what tells where and by which version it was saved."""
    kept = {key: value for key, value in sorted(config.items()) if not key.startswith("_")}
    return dict(json.loads(json.dumps(kept)))


@contextlib.contextmanager
def _quiet(pipeline: ACDiTPipeline) -> Iterator[None]:
    """Without the pipeline's own progress bar, a line a batch."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
