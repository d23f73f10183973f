"""Probes and fine-tuning: the trainer's loop on a classification loss, with all it brings (exact resumption, averages).

A probe on clean, unchanging data takes every sample's features once, before the first step; they are kept in chunks and
outlive a kill. Everything else is computed step by step.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acdit import builtin, draws, provenance, storage
from acdit.chunks import ChunkStore, make_missing
from acdit.classifiers import FOLDER, ACDiTClassifier
from acdit.corruption import GaussianCorruption
from acdit.data.build import as_measured, length
from acdit.errors import ConfigError, StorageError
from acdit.heads import ClassificationHead, Classifier
from acdit.model import ACDiTTransformer
from acdit.pipelines import ACDiTPipeline
from acdit.recipe import ClassificationRecipe, Recipe, recipe_from_dict
from acdit.shims import ABOUT
from acdit.training.batches import Batches
from acdit.training.build import Built, build, parameter_groups
from acdit.training.checkpoints import read_description
from acdit.training.initial import initialise
from acdit.training.loop import Trainer
from acdit.training.reporting import Report
from acdit.training.shards import Part

logger = logging.getLogger(__name__)

_FEATURES = "features"
_CHUNK, _AT_ONCE = 2048, 128
_LEFT_OUT = (storage.MANIFEST, FOLDER, *ABOUT)


@dataclass
class LabelledBatch:
    """Everything a micro-batch's classification loss depends on."""

    clean: Tensor
    """(B, N, L, D); of features that were taken before, (B, F)"""
    target: Tensor
    """(B, classes): shares of the classes, smoothed and mixed"""
    noise: Tensor | None
    """like `clean`, for features of the noisy stream"""


class FeaturesDataset:
    """Pooled features in memory, in the place of the pictures they were taken from.

    Args:
        images: (M, F).
        dataset: the pictures' data set.
        labels: (M,).
    """

    def __init__(self, images: Tensor, dataset: Any, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.num_classes: int = dataset.num_classes
        self.class_names: list[str] = dataset.class_names
        self.shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class LabelledBatches(Batches):
    """`Batches` of samples and their classes; draws are keyed as there."""

    def _batch(self, step: int, positions: range, pictures: Tensor, labels: Tensor) -> LabelledBatch:
        recipe = self.built.recipe
        settings = classification(recipe)
        key: dict[str, Any] = {"seed": recipe.seed, "step": step, "samples": positions}
        dtype = self.built.model.x_embedder.weight.dtype
        taken = isinstance(self.built.dataset, FeaturesDataset)
        clean = pictures if taken else self._clean(pictures, key)
        classes = self.built.dataset.num_classes
        smoothing = settings.label_smoothing
        target = F.one_hot(labels, classes).double() * (1 - smoothing) + smoothing / classes
        if settings.mixup:
            share = _beta(settings.mixup, recipe.seed, step, positions)
            clean = _mixed(clean, share)
            target = _mixed(target, share)
        noise = None
        if settings.noise_timestep is not None and not taken:
            noise = draws.normal(tuple(clean.shape[1:]), stream="noise", **key).to(self.device, dtype)
        return LabelledBatch(clean.to(self.device, dtype), target.to(self.device, dtype), noise)


def classification(recipe: Recipe) -> ClassificationRecipe:
    """A recipe's section of that name.

    Raises:
        ConfigError: it has none.
    """
    if recipe.classification is None:
        raise ConfigError(
            "classification", found="nothing", expected="a section of that name",
            fix="finetune-digits, finetune-mnist or another recipe with one; acdit train trains models",
        )  # fmt: skip
    return recipe.classification


def _beta(parameter: float, seed: int, step: int, positions: range) -> Tensor:
    """(B,) shares, one key a sample: the larger of λ and 1 − λ, so that a sample stays mostly itself."""
    drawn = [draws.keyed_generator(seed, "mixup", step, sample).beta(parameter, parameter) for sample in positions]
    shares = torch.from_numpy(np.asarray(drawn))
    return torch.maximum(shares, 1 - shares)


def _mixed(values: Tensor, share: Tensor) -> Tensor:
    """Neighbours 2k and 2k + 1 mixed into each other: whichever process or micro-batch holds the one holds both."""
    other = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    share = share.to(values).view(-1, *[1] * (values.ndim - 1))
    return values * share + other * (1 - share)


class ClassifierTrainer(Trainer):
    """One run of probing or fine-tuning in one directory; see `Trainer`, whose arguments it takes.

    What it publishes in model/ is the generative pipeline it started from, as it was, with classifier/ beside it.
    `evaluate` is called as (`ACDiTClassifier`, step) every train.sample_every steps.

    Raises:
        ConfigError: also a recipe without `classification` or without a model to start from, or one of text.
    """

    transformer: ACDiTTransformer
    classifier: Classifier

    def _build(self, recipe: Recipe) -> Built:
        settings = classification(recipe)
        if recipe.train.init_from is None:
            raise ConfigError(
                "train.init_from", found="nothing", expected="the model whose features are read",
                fix="add model=PATH, the model/ folder of a run",
            )  # fmt: skip
        self.source = Path(builtin.located(recipe.train.init_from))
        if not (self.source / "model_index.json").is_file():
            raise ConfigError(
                "train.init_from",
                found=f"{self.source}, no folder of a pipeline",
                expected="the model/ folder of a run",
            )
        built = build(recipe)
        if not isinstance(built.corruption, GaussianCorruption):
            raise ConfigError("corruption.kind", found="'masking'", expected="'gaussian': texts have no classes here")
        if built.dataset.num_classes < 2:
            raise ConfigError("data", found=f"{built.dataset.num_classes} class", expected="at least two")
        count = len(built.model.layers)
        if not all(-count <= layer < count for layer in settings.layers):
            raise ConfigError(
                "classification.layers", found=str(settings.layers), expected=f"{-count} … {count - 1}, of this model"
            )
        return built

    def _model(self, begins: bool) -> nn.Module:
        settings, built = classification(self.recipe), self.built
        assert isinstance(built.corruption, GaussianCorruption)  # `_build` has seen to it
        if fresh := initialise(built.model, str(self.source)):
            raise ConfigError(
                "train.init_from", found=f"{', '.join(fresh)} of other shapes", expected="the recipe's model",
                fix="add model=PATH to take the model's own settings",
            )  # fmt: skip
        self._source_sha256 = provenance.weights_sha256(built.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            head = _new_head(settings, built)
        self.transformer = self.parallel.place(built.model)
        self.classifier = Classifier(self.transformer, head.to(self.parallel.device), built.corruption)
        if self.recipe.train.precision == "fp64":
            head.double()
        if settings.tune == "all":
            self.classifier.freeze_unused()
            return self.classifier
        self.transformer.requires_grad_(False)
        return head

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The head first, then layer by layer down, each at `layer_decay` times the rate of the one above."""
        settings, optim = classification(self.recipe), self.recipe.optim
        parts: list[tuple[nn.Module, float]] = [(self.classifier.head, 1.0)]
        if settings.tune == "all":
            depth = self.classifier.depth
            decay = settings.layer_decay
            parts += [(self.transformer.layers[index], decay ** (depth + 1 - index)) for index in range(depth, -1, -1)]
            embedders = [self.transformer.x_embedder, self.transformer.t_embedder, self.transformer.y_embedder]
            parts += [(embedder, decay ** (depth + 2)) for embedder in embedders if embedder is not None]
        groups = []
        for part, share in parts:
            for group in parameter_groups(part, optim.weight_decay):
                learning = [one for one in group["params"] if one.requires_grad]  # type: ignore[attr-defined]
                if learning:
                    groups.append({**group, "params": learning, "lr": optim.lr * share})
        return groups

    def _batches(self) -> LabelledBatches:
        if self._features_once():
            self.built = dataclasses.replace(self.built, dataset=self._taken())
        parallel = self.parallel
        return LabelledBatches(self.built, parallel.rank, parallel.world_size, self.state.step, parallel.device)

    def _features_once(self) -> bool:
        """Whether a sample's features are the same whenever it is seen."""
        settings, data = classification(self.recipe), self.recipe.data
        changing = as_measured(data) != data
        posterior = self.recipe.codec.posterior == "sample"
        probe = settings.tune == "head" and settings.pooling != "attentive"
        return probe and not (settings.mixup or changing or posterior or length(self.built.dataset) is None)

    @torch.no_grad()
    def _taken(self) -> FeaturesDataset:
        """Mean features of all samples, from parts that are kept in the run's directory."""
        dataset: Any = self.built.dataset
        config = self.classifier.head.config
        description = {
            "model": self._source_sha256, "samples": len(dataset), "layers": config.layers, "pooling": config.pooling,
            "noise_timestep": config.noise_timestep, "seed": self.recipe.seed, "data": vars(self.recipe.data),
        }  # fmt: skip
        description["data"] = {
            name: value for name, value in description["data"].items() if name not in ("root", "num_workers")
        }
        store = ChunkStore(self.run / _FEATURES, description, len(dataset), _CHUNK)

        def make(start: int, stop: int) -> Mapping[str, Tensor]:
            if self._interrupted is not None:  # no step has begun: what is taken stays, that is all there is to save
                raise SystemExit(128 + self._interrupted)
            pooled, labels = [], []
            for first in range(start, stop, _AT_ONCE):
                indices = range(first, min(first + _AT_ONCE, stop))
                samples = [dataset[index] for index in indices]
                labels.append(torch.tensor([label for _, label in samples]))
                pooled.append(self._mean_features(torch.stack([picture for picture, _ in samples]), indices))
            return {"pooled": torch.cat(pooled), "labels": torch.cat(labels)}

        make_missing(store, make, self.parallel.processes, what="features", progress=self.progress)
        chunks = list(store)
        images, labels = (torch.cat([chunk[name] for chunk in chunks]) for name in ("pooled", "labels"))
        return FeaturesDataset(images, dataset, labels)

    def _mean_features(self, pictures: Tensor, indices: range) -> Tensor:
        """(B, F) on the CPU. Noise is keyed by the sample: one draw for all epochs."""
        layout, weight = self.transformer.layout, self.transformer.x_embedder.weight
        clean = layout.to_blocks(self.built.codec.encode(pictures)).to(weight)
        noise = None
        if self.classifier.draws_noise:
            key: dict[str, Any] = {"seed": self.recipe.seed, "stream": "feature_noise", "step": 0, "samples": indices}
            noise = draws.normal(tuple(clean.shape[1:]), **key).to(weight)
        pooled = self.classifier.head.pool(self.classifier.features(clean, noise))
        return (pooled.total / pooled.weight[..., 0]).cpu()

    def _loss(self, model: Any, batch: LabelledBatch) -> Tensor:
        bf16 = self.recipe.train.precision == "bf16"
        with torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=bf16):
            if classification(self.recipe).tune == "all":
                logits = model(batch.clean, batch.noise)
            elif batch.clean.ndim == 2:
                config = self.classifier.head.config
                taken = batch.clean.unflatten(1, (-1, len(config.layers), config.width))  # (B, N or 1, layers, W)
                logits = model([layer[:, :, None] for layer in taken.unbind(2)])
            else:
                with torch.no_grad():
                    features = self.classifier.features(batch.clean, batch.noise)
                logits = model(features)
        return F.cross_entropy(logits.to(batch.target.dtype), batch.target)

    def _draw(self, report: Report) -> None:
        """No pictures: what `evaluate` says of the averaged weights, by the first process."""
        if not self.parallel.main or self.evaluate is None:
            return
        weights = {name: value.clone() for name, value in self.state.ema.weights(0).items()}
        classifier = self._classifier_of(weights)
        report.record(self.state.step, self.evaluate(classifier, self.state.step))

    def _classifier_of(self, weights: Mapping[str, Tensor]) -> ACDiTClassifier:
        """The classifier with other weights of what learns, around copies."""
        pipeline = ACDiTPipeline.from_pretrained(self.source)
        head = ClassificationHead.from_config(self.classifier.head.config)
        transformer = pipeline.transformer
        if classification(self.recipe).tune == "all":
            transformer = ACDiTTransformer.from_config(pipeline.transformer.config)
        made = Classifier(transformer, head, self.classifier.corruption)
        target: nn.Module = made if classification(self.recipe).tune == "all" else head
        target.load_state_dict(dict(weights))
        return ACDiTClassifier(made.to(self.parallel.device), pipeline.to(self.parallel.device))

    def _publish(self, checkpoint: Path) -> None:
        recipe = recipe_from_dict(read_description(checkpoint)["recipe"])
        part = Part(checkpoint, "ema-0")
        with storage.atomic_directory(self.run / "model") as directory:
            # The generative model is copied as it is, to the byte.
            shutil.copytree(self.source, directory, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True)
            made = self._classifier_of({name: part.tensor(name) for name in part.names})
            made.save(directory, whole=classification(recipe).tune == "all")

    def _published(self) -> ACDiTClassifier:
        return ACDiTClassifier.from_pretrained(self.run / "model")

    def _place_in_data(self) -> dict[str, Any]:
        return {**super()._place_in_data(), "source_sha256": self._source_sha256}

    def _restore(self, path: Path, *, branch: bool, allow_inexact: bool) -> None:
        held = read_description(path)["sampler"].get("source_sha256")
        if held != self._source_sha256:
            raise StorageError(
                f"train.init_from {self.source}", found="other weights than those the run began with",
                expected="the same", fix="restore that model, or start a new run",
            )  # fmt: skip
        super()._restore(path, branch=branch, allow_inexact=allow_inexact)


def _new_head(settings: ClassificationRecipe, built: Built) -> ClassificationHead:
    config = built.model.config
    return ClassificationHead(  # by name: diffusers takes what is given by position for defaults
        width=config.num_attention_heads * config.attention_head_dim,
        num_classes=built.dataset.num_classes,
        layers=list(settings.layers),
        pooling=settings.pooling,
        heads=settings.heads,
        num_blocks=built.model.layout.num_blocks,
        bidirectional=settings.bidirectional,
        noise_timestep=settings.noise_timestep,
        id2label={str(index): name for index, name in enumerate(built.dataset.class_names)},
    )
