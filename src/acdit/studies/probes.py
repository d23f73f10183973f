"""Linear probes on frozen features (paper Table 3, in small): which layers and averages is chosen on held-back data.

Shapes: M pictures, W hidden width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acdit import draws
from acdit.classifiers import ACDiTClassifier, corruption_of
from acdit.heads import ClassificationHead, Classifier
from acdit.layout import BlockLayout
from acdit.pipelines import ACDiTPipeline

NOISE_LEVELS = (0.0, 50.0, 150.0)
"""Timesteps at which a model of one block is asked: its features need one."""
_AT_ONCE = 200
_BATCH = 512

Linear = tuple[Tensor, Tensor, Tensor, Tensor]
"""Mean and standard deviation of the features; weight and bias."""


def fit(inputs: Tensor, labels: Tensor, *, classes: int, steps: int, seed: int, weight_decay: float = 1e-4) -> Linear:
    """A linear classifier of standardised features: AdamW, cosine.

    Args:
        inputs, labels: (M, F), (M,).
        classes: of the labels.
        steps: of the optimizer, with 512 pictures each.
        seed: of the draws.
        weight_decay: AdamW's.
    """
    mean, std = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=weight_decay)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    standardised = (inputs - mean) / std
    for step in range(steps):
        rows = draws.keyed_generator(seed, "probe", step).integers(0, len(labels), _BATCH)
        loss = F.cross_entropy(F.linear(standardised[rows], weight, bias), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
    return mean, std, weight.detach(), bias.detach()


def right(linear: Linear, inputs: Tensor, labels: Tensor) -> float:
    """Share of the inputs (M, F) whose class it says."""
    mean, std, weight, bias = linear
    return float((F.linear((inputs - mean) / std, weight, bias).argmax(1) == labels).double().mean())


def regions(tokens: Tensor, layout: BlockLayout, side: int) -> Tensor:
    """(M, N, L, W) → (M, W, side²): means over side × side equal regions of the picture, whatever its blocks.

    Where regions cut tokens, each takes every token it touches.
    """
    grid = BlockLayout(layout.token_grid, layout.block).from_blocks(tokens)
    return F.adaptive_avg_pool2d(grid, side).flatten(2)


@torch.no_grad()
def features(
    pipeline: ACDiTPipeline, pictures: Tensor, *, level: float | None, classes: int, seed: int, stream: str
) -> list[Tensor]:
    """Means over quarters of every layer's features, (M, W, 4) each.

    Args:
        pipeline: the model and its codec.
        pictures: (M, C, H, W) uint8.
        level: timestep of the noisy stream; None: the clean one.
        classes: of the data.
        seed, stream: of the noise.
    """
    transformer = pipeline.transformer
    layers = list(range(len(transformer.layers)))
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    head = ClassificationHead(width=width, num_classes=classes, layers=layers, noise_timestep=level)
    classifier = ACDiTClassifier(Classifier(transformer, head, corruption_of(pipeline.scheduler)), pipeline)
    found: list[list[Tensor]] = [[] for _ in layers]
    for start in range(0, len(pictures), _AT_ONCE):
        blocks = classifier.blocks(pictures[start : start + _AT_ONCE])
        noise = None
        if level is not None:
            samples = range(start, start + len(blocks))
            noise = draws.normal(tuple(blocks.shape[1:]), seed=seed, stream=stream, step=0, samples=samples)
            noise = noise.to(blocks)
        for layer, tokens in enumerate(classifier.classifier.features(blocks, noise)):
            found[layer].append(regions(tokens, transformer.layout, 2).cpu())
    return [torch.cat(parts) for parts in found]


def probe(
    pipeline: ACDiTPipeline,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    seed: int,
    steps: int,
    levels: Sequence[float] = NOISE_LEVELS,
) -> dict[str, Any]:
    """The accuracy of the linear probe that does best on a part of the training pictures, on those held out.

    Args:
        pipeline: a model of pictures. Of several blocks its clean stream is read; of one block its noisy stream.
        train, held_out: pictures (M, C, H, W) uint8 and classes (M,).
        seed: of the probe's draws and the noise.
        steps: of each probe.
        levels: timesteps to choose from, of a model of one block.

    Returns:
        "probe_accuracy" on the held-out pictures, "chosen" in words, "chosen_on": its accuracy on what was held back.
    """
    classes = int(train[1].max()) + 1
    count = len(train[1])
    shown = count - min(5000, count // 5)
    best: tuple[float, str, list[int], bool, float | None] | None = None
    taken: dict[float | None, list[Tensor]] = {}
    for level in levels if pipeline.transformer.layout.num_blocks == 1 else (None,):
        taken[level] = features(pipeline, train[0], level=level, classes=classes, seed=seed, stream="probe noise train")
        num_layers = len(taken[level])
        for layers in [*([layer] for layer in range(num_layers)), list(range(num_layers))]:
            for whole in (True, False):
                inputs = _joined(taken[level], layers, whole)
                linear = fit(inputs[:shown], train[1][:shown], classes=classes, steps=steps, seed=seed)
                accuracy = right(linear, inputs[shown:], train[1][shown:])
                if best is None or accuracy > best[0]:
                    told = f"layers {', '.join(map(str, layers))}, {'mean' if whole else 'means of quarters'}"
                    told += "" if level is None else f", timestep {level:g}"
                    best = (accuracy, told, layers, whole, level)
    assert best is not None
    chosen_on, told, layers, whole, level = best
    linear = fit(_joined(taken[level], layers, whole), train[1], classes=classes, steps=steps, seed=seed)
    tested = features(pipeline, held_out[0], level=level, classes=classes, seed=seed, stream="probe noise held out")
    accuracy = right(linear, _joined(tested, layers, whole), held_out[1])
    return {"probe_accuracy": accuracy, "chosen": told, "chosen_on": chosen_on}


def pixel_probe(train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], *, steps: int, seed: int) -> float:
    """The accuracy of the same probe on the pixels themselves: what features have to beat."""
    inputs, tested = (part[0].flatten(1).float() / 255 for part in (train, held_out))
    classes = int(train[1].max()) + 1
    return right(fit(inputs, train[1], classes=classes, steps=steps, seed=seed), tested, held_out[1])


def _joined(layers_of: list[Tensor], layers: list[int], whole: bool) -> Tensor:
    """(M, F): features of some layers side by side, of the whole picture or of its quarters."""
    parts = [layers_of[layer] for layer in layers]
    return torch.cat([part.mean(2) if whole else part.flatten(1) for part in parts], dim=1)
