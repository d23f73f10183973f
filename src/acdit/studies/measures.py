"""What is measured of a trained model: pictures against held-out ones, clips, probes. Each gives plain figures.

Judges (small classifiers of real data) are trained once, before any run, and kept beside the runs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdit import demo, demo_video
from acdit.data.build import as_measured, build_dataset
from acdit.evaluation import (
    ClassifierFacts,
    class_matched_subset,
    digits_judge,
    load_classifier,
    matched_frechet_distance,
    save_classifier,
    train_classifier,
)
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import Recipe
from acdit.studies.catalog import Setting
from acdit.studies.probes import pixel_probe, probe

CLIPS_A_CLASS = 20
PROBE_STEPS = 400
_PROBE_PICTURES = 10_000


def protocol(measure: str, setting: Setting) -> dict[str, Any]:
    """What a reading depends on beside the model: readings of another protocol are taken again."""
    if measure == "pictures":
        return {"samples_a_class": setting.per_class, "split": setting.held_out, "judge": setting.judge}
    if measure == "clips":
        return {"clips_a_class": CLIPS_A_CLASS, "judge": "demo"}
    return {"probe_steps": PROBE_STEPS, "split": setting.held_out, "pictures": _PROBE_PICTURES}


def prepare(measure: str, setting: Setting, recipe: Recipe, folder: Path) -> None:
    """Train and keep the judge that a measurement needs, if it needs one and has none.

    Args:
        measure: its name.
        setting: the data.
        recipe: of any arm.
        folder: where judges are kept.

    Raises:
        DataError: the judge may not judge: it recognises too few real pictures.
    """
    path = _judge_file(measure, setting, folder)
    if measure == "probe" or path.is_file():
        return
    if measure == "clips":
        classifier, accuracy = demo_video.frame_classifier(recipe)
        size = recipe.data.size
        assert isinstance(size, int)
        facts = ClassifierFacts("small", (1, size, size), 10, "frames of moving digits", accuracy)
    elif setting.name == "digits":
        classifier, accuracy = digits_judge()
        facts = ClassifierFacts("small", (1, 8, 8), 10, "the built-in training digits", accuracy)
    else:
        train, held_out = (_pictures(recipe, split) for split in (recipe.data.split, setting.held_out))
        classifier, accuracy = train_classifier(*train, *held_out, **setting.judge)
        channels, height, width = train[0].shape[1:]
        told = f"{len(train[0])} training pictures of {setting.name}"
        facts = ClassifierFacts(setting.judge["network"], (channels, height, width), 10, told, accuracy)
    save_classifier(classifier, facts, path)


def measure(
    name: str, pipeline: ACDiTPipeline, recipe: Recipe, setting: Setting, seed: int, folder: Path
) -> dict[str, Any]:
    """The figures of a model.

    Args:
        name: "pictures", "clips" or "probe".
        pipeline: of the model, where it shall run.
        recipe: of its run.
        setting: the data.
        seed: of the run; samples follow from it.
        folder: where judges are kept.
    """
    pipeline.set_progress_bar_config(disable=True)
    if name == "probe":
        return _probed(pipeline, recipe, setting, seed)
    judge, facts = load_classifier(_judge_file(name, setting, folder))
    if name == "clips":
        labels = torch.arange(10 * CLIPS_A_CLASS) % 10
        clips = demo_video.draw_clips(pipeline, recipe, labels, seed).cpu()
        figures = demo_video.measure_clips(clips, labels, judge, recipe)
        return {"frechet_distance": _frame_distance(clips, labels, judge, recipe), **figures}
    labels = torch.arange(10 * setting.per_class) % 10
    samples = demo.draw_samples(pipeline, recipe, labels, seed)
    if setting.name == "digits":
        figures = demo.measure(samples, labels, (judge, facts.held_out_accuracy))
        return {key: figures[key] for key in (
            "frechet_distance", "conditional_accuracy", "frechet_distance_real", "classifier_heldout_accuracy",
        )}  # fmt: skip
    pictures, classes = _pictures(recipe, setting.held_out)
    wanted = torch.full((10,), setting.per_class)
    rows = class_matched_subset(classes, wanted, seed=0, repeat=0)
    with torch.no_grad():
        ours, theirs = (_features(judge, part) for part in (samples, pictures[rows]))
    distance = matched_frechet_distance(ours, labels, theirs, classes[rows], repeats=1)
    return {
        "frechet_distance": distance, "conditional_accuracy": judge.accuracy(samples, labels),
        "classifier_heldout_accuracy": facts.held_out_accuracy,
    }  # fmt: skip


def _probed(pipeline: ACDiTPipeline, recipe: Recipe, setting: Setting, seed: int) -> dict[str, Any]:
    train = _pictures(recipe, recipe.data.split)
    train = (train[0][:_PROBE_PICTURES], train[1][:_PROBE_PICTURES])
    held_out = _pictures(recipe, setting.held_out)
    figures = probe(pipeline, train, held_out, seed=seed, steps=PROBE_STEPS)
    return {**figures, "pixels": pixel_probe(train, held_out, steps=PROBE_STEPS, seed=seed)}


def _frame_distance(clips: Tensor, labels: Tensor, judge: Any, recipe: Recipe) -> float:
    """Fréchet distance between single frames of clips (M, T, C, H, W) and of as many held-out clips of each class."""
    held_out: Any = build_dataset(dataclasses.replace(recipe.data, split="held_out"))
    rows = class_matched_subset(held_out.labels, torch.bincount(labels), seed=0, repeat=0)
    real = torch.stack([held_out[index][0].transpose(0, 1) for index in rows.tolist()])
    frames = clips.shape[1]
    with torch.no_grad():
        ours, theirs = (_features(judge, part.flatten(0, 1)) for part in (clips, real))
    classes = held_out.labels[rows].repeat_interleave(frames)
    return matched_frechet_distance(ours, labels.repeat_interleave(frames), theirs, classes, repeats=1)


def _features(judge: Any, pixels: Tensor) -> Tensor:
    return torch.cat([judge.features(part) for part in pixels.split(500)])


def _pictures(recipe: Recipe, split: str) -> tuple[Tensor, Tensor]:
    """All pictures (M, C, H, W) uint8 of a split, neither mirrored nor cropped at random, and their classes (M,)."""
    dataset: Any = build_dataset(as_measured(recipe.data, split))
    pairs = [dataset[index] for index in range(len(dataset))]
    return torch.stack([picture for picture, _ in pairs]), torch.tensor([label for _, label in pairs])


def _judge_file(measure: str, setting: Setting, folder: Path) -> Path:
    return folder / f"{'moving-digits' if measure == 'clips' else setting.name}.safetensors"
