"""The video demo: train on moving digits, look at clips, let a stream run on, measure both honestly.

It trains twice: the first block alone, which costs a tenth of a clip, then clips from there.
The judge is a classifier of single frames, trained on frames of the training clips; motion is measured by the centre of
the ink from frame to frame. Data compared with are clips of held-out digits.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from acdit import pictures, provenance, storage
from acdit.data.moving import MovingDigitsDataset, moving_digits
from acdit.demo import clear_folder
from acdit.draws import first_sample_seed, keyed_generator
from acdit.evaluation import PictureClassifier, train_classifier
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import Recipe, load_recipe, recipe_to_yaml
from acdit.streaming import Stream
from acdit.training import Trainer
from acdit.videos import contact_sheet, open_writer

RECIPE = "moving-digits"
FIRST_RECIPE = "moving-digits-first"
RUN_NAME = "moving-digits-demo"
FRAME_ACCURACY_TARGET = 0.9
VELOCITY_ERROR_TARGET = 0.15
STREAM_ACCURACY_TARGET = 0.8

_CLASSES = 10
_CHUNK = 50  # clips at a time
_ENDS = 10  # blocks at either end of the stream whose time and memory are told
_PROTOCOL = (
    "frame_accuracy: of {clips} clips, each class equally often, the share whose digit the classifier reads, in the "
    "frame where it is lowest. velocity_error: the larger of the relative differences of mean and standard deviation "
    "of the speed of the ink's centre (pixels a frame) between these clips and {held_out} held-out ones. "
    "stream_frame_accuracy: the share of frames read right in the last tenth of the blocks, {streams} samples. "
    "The classifier reads single frames; classifier_accuracy is its share on frames of held-out clips."
)


def run_demo_video(
    output_dir: str | Path = "runs/demo-video",
    seed: int = 0,
    *,
    overrides: Sequence[str] = (),
    clips: int = 200,
    stream_blocks: int = 200,
    streams: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, draw, stream, measure.

    Args:
        output_dir: the demo's own folder. It will hold model/, samples.gif, samples.png, stream.mp4, stream.png,
            loss.png, metrics.json, recipe.yaml, the trainer's log and last checkpoint, and first/, the run it starts
            from.
        seed: of training and samples.
        overrides: of both recipes, `moving-digits-first` and `moving-digits`.
        clips: how many to measure.
        stream_blocks: length of the stream.
        streams: samples that stream side by side.
        progress: draw progress bars, and print a summary at the end.

    Returns:
        What metrics.json holds.

    Raises:
        StorageError: the folder holds something else, or another demo is at work in it.
        ConfigError: no PyAV to write stream.mp4 with.
    """
    started = time.perf_counter()
    run = Path(output_dir)
    usual = [f"name={RUN_NAME}", f"seed={seed}"]
    first = load_recipe(FIRST_RECIPE, [*usual, *overrides])
    recipe = load_recipe(RECIPE, [*usual, f"train.init_from={run / 'first' / 'model'}", *overrides])
    clear_folder(run, RUN_NAME)
    run.mkdir(parents=True, exist_ok=True)
    storage.write_text_atomic(run / "recipe.yaml", recipe_to_yaml(recipe))  # whose folder this is, from the start
    with open_writer(run / "stream.mp4", "mp4", fps=12) as film:  # before the training: is PyAV there?
        training_started = time.perf_counter()
        Trainer(first, run / "first", progress=progress).train()
        seconds_first = time.perf_counter() - training_started
        pipeline = Trainer(recipe, run, progress=progress).train()
        seconds_training = time.perf_counter() - training_started
        pipeline.set_progress_bar_config(disable=True)
        judge, judge_accuracy = frame_classifier(recipe)
        labels = torch.arange(clips) % _CLASSES
        samples = draw_clips(pipeline, recipe, labels, seed, progress)
        _draw_samples(samples, labels, run)
        metrics: dict[str, Any] = measure_clips(samples, labels, judge, recipe)
        metrics |= run_stream(pipeline, recipe, judge, film, run / "stream.png", seed, stream_blocks, streams, progress)
    metrics = {
        "frame_accuracy": metrics.pop("frame_accuracy"),
        "velocity_error": metrics.pop("velocity_error"),
        "stream_blocks": metrics.pop("stream_blocks"),
        "stream_frame_accuracy": metrics.pop("stream_frame_accuracy"),
        "classifier_accuracy": judge_accuracy,
        **metrics,
        "seconds_training": round(seconds_training, 1),
        "seconds_total": round(time.perf_counter() - started, 1),
        "seconds_training_first_block": round(seconds_first, 1),
        "training_steps": [first.train.steps, recipe.train.steps],
        "parameters": sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        "num_inference_steps": recipe.sampling.num_inference_steps,
        "guidance_scale": recipe.sampling.guidance_scale,
        "window": recipe.model.window,
        "seed": seed,
        "protocol": _PROTOCOL.format(clips=clips, held_out=len(_held_out(recipe)), streams=streams),
        **provenance.facts(),
    }
    metrics["targets"] = {
        "frame_accuracy": f">= {FRAME_ACCURACY_TARGET}",
        "velocity_error": f"<= {VELOCITY_ERROR_TARGET}",
        "stream_frame_accuracy": f">= {STREAM_ACCURACY_TARGET}",
        "met": metrics["frame_accuracy"] >= FRAME_ACCURACY_TARGET
        and metrics["velocity_error"] <= VELOCITY_ERROR_TARGET
        and metrics["stream_frame_accuracy"] >= STREAM_ACCURACY_TARGET,
    }
    storage.write_json_atomic(run / "metrics.json", metrics)
    if progress:
        print(summary(metrics, run))
    return metrics


# --- the judge ------------------------------------------------------------------------------------------------------


def frame_classifier(recipe: Recipe, frames_a_clip: int = 2, epochs: int = 4) -> tuple[PictureClassifier, float]:
    """A classifier of single frames, trained on frames of the training clips, and its accuracy on held-out ones."""
    train, held_out = (_frames(data, frames_a_clip) for data in (_clips(recipe, "train"), _held_out(recipe)))
    return train_classifier(*train, *held_out, epochs=epochs)


def _clips(recipe: Recipe, split: str) -> MovingDigitsDataset:
    size = recipe.data.size
    return moving_digits(split, recipe.data.frames, 16 if size is None else size)


def _held_out(recipe: Recipe) -> MovingDigitsDataset:
    return _clips(recipe, "held_out")


def _frames(data: MovingDigitsDataset, each: int) -> tuple[Tensor, Tensor]:
    """Some frames of every clip, (M, C, H, W) uint8, and their classes; which ones is keyed by the clip."""
    chosen = []
    for index in range(len(data)):
        clip, _ = data[index]
        places = keyed_generator(0, "frames of the judge", index).permutation(clip.shape[1])[:each]
        chosen.append(clip[:, places].transpose(0, 1))
    return torch.cat(chosen), data.labels.repeat_interleave(each)


# --- clips ----------------------------------------------------------------------------------------------------------


def draw_clips(pipeline: ACDiTPipeline, recipe: Recipe, labels: Tensor, seed: int, progress: bool = False) -> Tensor:
    """Clip i of class labels[i]; (M, T, C, H, W) uint8."""
    parts = []
    with tqdm(total=len(labels), desc="sampling", unit="clip", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(labels), _CHUNK):
            part = labels[start : start + _CHUNK]
            (frames,) = pipeline(
                part, num_inference_steps=recipe.sampling.num_inference_steps,
                guidance_scale=recipe.sampling.guidance_scale, generator=first_sample_seed(seed) + start,
                output_type="pt", return_dict=False,
            )  # fmt: skip
            parts.append(_bytes(frames))
            bar.update(len(part))
    return torch.cat(parts)


def measure_clips(samples: Tensor, labels: Tensor, judge: PictureClassifier, recipe: Recipe) -> dict[str, Any]:
    """Are the digits what was asked for in every frame, and do they move as the data's?

    Args:
        samples: (M, T, C, H, W) uint8.
        labels: (M,).
        judge: of single frames.
        recipe: names the held-out clips.
    """
    by_frame = [judge.accuracy(samples[:, frame], labels) for frame in range(samples.shape[1])]
    held_out = _held_out(recipe)
    real = torch.stack([held_out[index][0].transpose(0, 1) for index in range(len(held_out))])
    ours, theirs = speeds(samples), speeds(real)
    differences = [abs(float(statistic(ours)) / float(statistic(theirs)) - 1) for statistic in (torch.mean, torch.std)]
    return {
        "frame_accuracy": min(by_frame),
        "velocity_error": max(differences),
        "frame_accuracy_by_frame": by_frame,
        "speed_mean_and_std": [float(ours.mean()), float(ours.std())],
        "speed_mean_and_std_real": [float(theirs.mean()), float(theirs.std())],
    }


def centroids(clips: Tensor) -> Tensor:
    """Centre of the ink of every frame: (M, T, C, H, W) uint8 → (M, T, 2) pixels, (row, column), fp64.

    Ink below a tenth of white counts as background: a sample's black is not perfectly black.
    """
    ink = clips.double().mean(dim=2) / 255
    ink = torch.where(ink < 0.1, 0.0, ink)
    total = ink.sum(dim=(2, 3)).clamp(min=1e-9)
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in ink.shape[2:])
    return torch.stack(
        [torch.einsum("mthw,h->mt", ink, rows) / total, torch.einsum("mthw,w->mt", ink, columns) / total], dim=-1
    )


def speeds(clips: Tensor) -> Tensor:
    """How far the ink's centre moves from each frame to the next, (M, T−1) pixels."""
    return torch.linalg.vector_norm(centroids(clips).diff(dim=1), dim=-1)


# --- the stream -----------------------------------------------------------------------------------------------------


def run_stream(
    pipeline: ACDiTPipeline,
    recipe: Recipe,
    judge: PictureClassifier,
    film: Any,
    sheet: Path,
    seed: int,
    blocks: int,
    samples: int,
    progress: bool = False,
) -> dict[str, Any]:
    """Stream, film the first samples, judge every frame; time and memory of the first and last ten blocks."""
    labels = torch.arange(samples) % _CLASSES
    stream = Stream(
        pipeline, labels.tolist(), num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.guidance_scale, seed=first_sample_seed(seed) + 2**31, max_blocks=blocks,
    )  # fmt: skip
    seconds: list[float] = []
    memory: list[int] = []
    accuracy: list[float] = []
    shown: list[Tensor] = []
    for frames in tqdm(_timed(stream, blocks, seconds, memory), total=blocks, desc="stream", unit="block",
                       disable=not progress, dynamic_ncols=True):  # fmt: skip
        now = _bytes(frames)
        accuracy.append(judge.accuracy(now.flatten(0, 1), labels.repeat_interleave(now.shape[1])))
        for page in _pages(now[:_CLASSES]):
            film.add(page[None])
        shown.append(now[:_CLASSES, 0])
    contact_sheet(torch.stack(shown, dim=1), columns=12, row_labels=[str(label) for label in range(_CLASSES)]).save(
        sheet
    )
    last = max(1, blocks // 10)
    ends = {"first": slice(None, _ENDS), "last": slice(-_ENDS, None)}
    return {
        "stream_blocks": blocks,
        "stream_frame_accuracy": sum(accuracy[-last:]) / last,
        "stream_accuracy_by_block": [round(value, 4) for value in accuracy],
        "stream_cache_bytes": stream.cache_nbytes,
        **{f"stream_seconds_{name}_ten_blocks": round(sum(seconds[part]), 3) for name, part in ends.items()},
        **{f"stream_peak_memory_{name}_ten_blocks": max(memory[part]) for name, part in ends.items()},
    }


def _timed(stream: Stream, blocks: int, seconds: list[float], memory: list[int]) -> Iterator[Tensor]:
    for _ in range(blocks):
        started = time.perf_counter()
        yield from stream.frames(1)
        seconds.append(time.perf_counter() - started)
        memory.append(_resident_bytes())


def _resident_bytes() -> int:
    """Memory this process holds now; where the system does not say, the most it has ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * resource.getpagesize()


# --- pictures -------------------------------------------------------------------------------------------------------


def _draw_samples(samples: Tensor, labels: Tensor, run: Path) -> None:
    """The first clips of each class: not chosen, only sorted."""
    firsts = torch.stack([samples[labels == label][0] for label in range(_CLASSES)])
    contact_sheet(firsts, columns=8, row_labels=[str(label) for label in range(_CLASSES)]).save(run / "samples.png")
    rows = torch.cat([samples[labels == label][:2] for label in range(_CLASSES)])
    rows = torch.cat([rows[0::2], rows[1::2]])  # a class a column
    with open_writer(run / "samples.gif", "gif", fps=8) as film:
        for page in _pages(rows):
            film.add(page[None])


def _pages(clips: Tensor) -> Iterator[Tensor]:
    """(M, T, C, H, W) → for each frame all clips side by side, (C, H, W) uint8."""
    for frame in clips.unbind(dim=1):
        grid = pictures.image_grid(frame, _CLASSES, scale=4)
        yield (
            torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
            .reshape(grid.height, grid.width, 3)
            .permute(2, 0, 1)
        )


def _bytes(frames: Tensor) -> Tensor:
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


def summary(metrics: dict[str, Any], run: str | Path) -> str:
    """A few lines for the terminal."""
    verdict = "targets met" if metrics["targets"]["met"] else "TARGETS MISSED"
    first, last = (metrics[f"stream_seconds_{name}_ten_blocks"] for name in ("first", "last"))
    return "\n".join(
        [
            f"frame accuracy    {metrics['frame_accuracy']:.3f}   (target >= {FRAME_ACCURACY_TARGET}; the classifier "
            f"reads {metrics['classifier_accuracy']:.3f} of real held-out frames)",
            f"velocity error    {metrics['velocity_error']:.3f}   (target <= {VELOCITY_ERROR_TARGET})",
            f"stream            {metrics['stream_frame_accuracy']:.3f} of the frames at the end of "
            f"{metrics['stream_blocks']} blocks (target >= {STREAM_ACCURACY_TARGET})",
            f"ten blocks take   {first:.1f} s at the beginning, {last:.1f} s at the end",
            f"seconds           {metrics['seconds_training']:.0f} training, {metrics['seconds_total']:.0f} in all",
            f"{verdict}; see {Path(run)}/samples.gif, samples.png, stream.mp4, stream.png, metrics.json, model/",
        ]
    )
