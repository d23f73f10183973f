"""The demo: train on the built-in digits, draw what was learned, measure it honestly.

Everything lies in one folder that the demo owns. A demo in a folder that holds an earlier demo, finished or not,
starts afresh and replaces it; a folder with anything else in it is refused.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from acdit import pictures, provenance, storage
from acdit.data import DigitsDataset
from acdit.draws import first_sample_seed
from acdit.errors import StorageError
from acdit.evaluation import (
    PictureClassifier,
    digits_judge,
    matched_frechet_distance,
    nearest_training_distance,
)
from acdit.generation import SamplingSettings, draw_pictures
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import Recipe, load_recipe
from acdit.strict_yaml import read_yaml
from acdit.training import Trainer

RECIPE = "digits"
RUN_NAME = "digits-demo"
"""Name in recipe.yaml by which a folder is known to be a demo's."""
CONDITIONAL_ACCURACY_TARGET = 0.95
FRECHET_RATIO_TARGET = 3.0

_CLASSES = 10
_CHUNK = 250  # samples at a time: enough to keep two cores busy
_PROTOCOL = (
    "The classifier is trained on the real training digits; its features have {features} dimensions. Samples ask for "
    "each class equally often. Both Fréchet distances compare {count} digits with the {count} held-out ones, {each} a "
    "class on either side, and are means over the same number ({repeats}) of random class-matched draws, from the "
    "samples and from the real training digits. Nearest-training distances are means, Euclidean, of pixels in [0, 1]."
)
_REPEATS = 10


def run_demo(
    output_dir: str | Path = "runs/demo",
    seed: int = 0,
    *,
    overrides: Sequence[str] = (),
    samples_per_class: int = 100,
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, draw, measure.

    Args:
        output_dir: the demo's own folder. It will hold model/, samples.png, generation.gif, loss.png, metrics.json,
            recipe.yaml and the trainer's log and last checkpoint.
        seed: of training and samples.
        overrides: of the recipe `digits`, as on the command line ("train.steps=100").
        samples_per_class: how many to measure, at least as many as are held out of each class (50).
        command: what to write in metrics.json as the command; default: this process's.
        progress: draw progress bars, and print a summary at the end.

    Returns:
        What metrics.json holds.

    Raises:
        StorageError: the folder holds something else, or another demo is at work in it.
    """
    started = time.perf_counter()
    run = Path(output_dir)
    recipe = load_recipe(RECIPE, [f"name={RUN_NAME}", f"seed={seed}", *overrides])
    clear_folder(run, RUN_NAME)
    training_started = time.perf_counter()
    pipeline = Trainer(recipe, run, progress=progress).train()
    seconds_training = time.perf_counter() - training_started
    pipeline.set_progress_bar_config(disable=True)

    labels = torch.arange(_CLASSES * samples_per_class) % _CLASSES
    samples = draw_samples(pipeline, recipe, labels, seed, progress)
    _draw_samples_picture(samples, labels, run / "samples.png")
    draw_generation(pipeline, recipe, seed, run / "generation.gif")
    metrics: dict[str, Any] = {
        **measure(samples, labels),
        "seconds_training": round(seconds_training, 1),
        "seconds_total": round(time.perf_counter() - started, 1),
        "training_steps": recipe.train.steps,
        "parameters": sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        "num_inference_steps": recipe.sampling.num_inference_steps,
        "guidance_scale": recipe.sampling.guidance_scale,
        "seed": seed,
        **provenance.facts(),
        **({} if command is None else {"command": command}),
    }
    storage.write_json_atomic(run / "metrics.json", metrics)
    if progress:
        print(summary(metrics, run))
    return metrics


def draw_samples(pipeline: ACDiTPipeline, recipe: Recipe, labels: Tensor, seed: int, progress: bool = False) -> Tensor:
    """Sample i of class labels[i] from the seed (seed, i); (M, 1, 8, 8) uint8."""
    settings = SamplingSettings(
        recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale, first_sample_seed(seed),
        tuple(labels.tolist()),
    )  # fmt: skip
    chunks = []
    with tqdm(total=len(labels), desc="sampling", unit="digit", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(labels), _CHUNK):
            chunks.append(draw_pictures(pipeline, settings, start, min(start + _CHUNK, len(labels))))
            bar.update(len(chunks[-1]))
    return torch.cat(chunks)


def measure(samples: Tensor, labels: Tensor, judge: tuple[PictureClassifier, float] | None = None) -> dict[str, Any]:
    """How good samples (M, 1, 8, 8) uint8 of the classes `labels` (M,) are.

    Classifier and class-matched draws have a seed of their own, so that figures of different runs compare.

    Args:
        samples, labels: at least 50 of each class.
        judge: what `acdit.evaluation.digits_judge` gave; None: trained here.

    Returns:
        The figures of metrics.json that concern quality.

    Raises:
        DataError: the classifier recognises less than 0.97 of the real held-out digits, or too few samples.
    """
    train, held_out = DigitsDataset("train"), DigitsDataset("held_out")
    classifier, held_out_accuracy = judge or digits_judge()
    with torch.no_grad():
        sample_features, train_features, held_out_features = (
            classifier.features(pixels) for pixels in (samples, train.images, held_out.images)
        )

    def distance_to_held_out(features: Tensor, classes: Tensor) -> float:
        return matched_frechet_distance(features, classes, held_out_features, held_out.labels, repeats=_REPEATS)

    frechet = distance_to_held_out(sample_features, labels)
    frechet_real = distance_to_held_out(train_features, train.labels)
    accuracy = classifier.accuracy(samples, labels)
    ratio = frechet / frechet_real
    return {
        "conditional_accuracy": accuracy,
        "classifier_heldout_accuracy": held_out_accuracy,
        "frechet_distance": frechet,
        "frechet_distance_real": frechet_real,
        "frechet_ratio": ratio,
        "nearest_training_distance": float(nearest_training_distance(samples, train.images).mean()),
        "nearest_training_distance_heldout": float(nearest_training_distance(held_out.images, train.images).mean()),
        "targets": {
            "conditional_accuracy": f">= {CONDITIONAL_ACCURACY_TARGET}",
            "frechet_ratio": f"<= {FRECHET_RATIO_TARGET:g}",
            "met": accuracy >= CONDITIONAL_ACCURACY_TARGET and ratio <= FRECHET_RATIO_TARGET,
        },
        "num_samples": len(samples),
        "protocol": _PROTOCOL.format(
            features=held_out_features.shape[1],
            count=len(held_out),
            each=len(held_out) // held_out.num_classes,
            repeats=_REPEATS,
        ),
    }


def draw_generation(pipeline: ACDiTPipeline, recipe: Recipe, seed: int, path: Path) -> None:
    """A film of one digit of each class: every frame is one solver step of the block at work."""
    layout = pipeline.transformer.layout
    unseen = 2.4 * torch.ones(_CLASSES, layout.num_blocks, layout.block_tokens, pipeline.transformer.token_dim)
    blocks = unseen  # model space beyond white: it is clamped, and told from black background
    frames: list[Tensor] = []
    active: list[tuple[int, int, int, int] | None] = []

    def on_step(_: ACDiTPipeline, __: int, ___: Any, state: dict[str, Any]) -> dict[str, Any]:
        blocks[:, state["block"]] = state["latents"]
        frames.append(pipeline.decode_blocks(blocks, "pt"))
        active.append(_pixels_of_block(pipeline, state["block"]))
        return {}

    pipeline(
        torch.arange(_CLASSES),
        num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.guidance_scale,
        generator=first_sample_seed(seed),
        output_type="pt",
        callback_on_step_end=on_step,
    )
    frames.append(frames[-1])
    active.append(None)
    pictures.generation_gif(frames, active, path, columns=_CLASSES // 2, scale=10)


def _pixels_of_block(pipeline: ACDiTPipeline, block: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a block in the picture."""
    layout = pipeline.transformer.layout
    top, left = layout.positions(block, 1)[0, 0].tolist()
    (high, wide), (patch_high, patch_wide) = layout.block, layout.patch
    return top * patch_high, left * patch_wide, high * patch_high, wide * patch_wide


def _draw_samples_picture(samples: Tensor, labels: Tensor, path: Path) -> None:
    """The first 8 samples of each class, a class a row: not chosen, only sorted."""
    rows = [samples[labels == label][:8] for label in range(_CLASSES)]
    names = [str(label) for label in range(_CLASSES)]
    pictures.image_grid(torch.cat(rows), columns=len(rows[0]), row_labels=names).save(path)


def clear_folder(run: Path, name: str) -> None:
    """Make way for a demo: remove an earlier one, known by its recipe's name; refuse anything else.

    Raises:
        StorageError: the folder holds something else, or another demo is at work in it.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise StorageError(f"{run}", found="a file", expected="a folder for the demo", fix="choose another --output")
    present = {entry.name for entry in run.iterdir()} - {".lock"}
    if not present:
        return
    if not _is_demo(run / "recipe.yaml", name):
        raise StorageError(
            f"{run}",
            found=f"{len(present)} entries that no demo left ({', '.join(sorted(present)[:5])})",
            expected="an empty folder, or an earlier demo's",
            fix="choose another --output, or empty the folder",
        )
    with storage.RunLock(run):  # not while another demo is at work
        for entry in run.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (".lock", "recipe.yaml"):
                entry.unlink()
        (run / "recipe.yaml").unlink()  # last: an interrupted removal is still known as a demo's


def _is_demo(recipe_path: Path, name: str) -> bool:
    try:
        recipe = read_yaml(recipe_path.read_text(encoding="utf-8"), str(recipe_path))
    except (OSError, ValueError):
        return False
    return isinstance(recipe, dict) and recipe.get("name") == name


def summary(metrics: dict[str, Any], run: str | Path) -> str:
    """A few lines for the terminal."""
    verdict = "targets met" if metrics["targets"]["met"] else "TARGETS MISSED"
    return "\n".join(
        [
            f"conditional accuracy  {metrics['conditional_accuracy']:.3f}   (target >= {CONDITIONAL_ACCURACY_TARGET}; "
            f"the classifier reads {metrics['classifier_heldout_accuracy']:.3f} of real held-out digits)",
            f"Fréchet distance      {metrics['frechet_distance']:.2f}   = {metrics['frechet_ratio']:.2f} × the real "
            f"digits' {metrics['frechet_distance_real']:.2f} (target <= {FRECHET_RATIO_TARGET:g} ×)",
            f"nearest training      {metrics['nearest_training_distance']:.2f}   "
            f"(real held-out digits: {metrics['nearest_training_distance_heldout']:.2f})",
            f"seconds               {metrics['seconds_training']:.0f} training, {metrics['seconds_total']:.0f} in all",
            f"{verdict}; see {Path(run)}/samples.png, generation.gif, loss.png, metrics.json, model/",
        ]
    )
