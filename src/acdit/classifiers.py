"""What users load to classify: a transformer, its head and the codec, from one model folder.

    MODEL/  model_index.json, transformer/, scheduler/ …   the generative pipeline, which knows nothing of this
            classifier/  config.json, *.safetensors          the head
                         transformer/                       where all of the model was fine-tuned: its own weights

A probe reads the generative transformer beside it, so the folder holds one model for two tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdit import draws, storage
from acdit.corruption import GaussianCorruption
from acdit.errors import ConfigError, StorageError, first_line
from acdit.heads import ClassificationHead, Classifier
from acdit.model import ACDiTTransformer
from acdit.pipelines import ACDiTPipeline

FOLDER = "classifier"
_TRANSFORMER = "transformer"


class ACDiTClassifier:
    """A classifier of pictures or clips.

    Args:
        classifier: transformer and head.
        pipeline: whose codec brings pixels to model space; its own transformer is not asked.
    """

    def __init__(self, classifier: Classifier, pipeline: ACDiTPipeline) -> None:
        self.classifier, self.pipeline = classifier.eval(), pipeline
        names: dict[str, str] = classifier.head.config.id2label or {}
        self.class_names = [names.get(str(index), str(index)) for index in range(classifier.head.config.num_classes)]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ACDiTClassifier:
        """Load a model folder that has a classifier.

        Raises:
            ConfigError: none there.
            StorageError: it is damaged.
        """
        folder = Path(folder)
        place = folder / FOLDER
        if not (place / "config.json").is_file():
            raise ConfigError(
                f"model {folder}", found=f"no {FOLDER}/ in it", expected="a model that has learned to classify",
                fix=f"acdit finetune RECIPE model={folder}",
            )  # fmt: skip
        if storage.is_committed(folder):
            storage.verify(folder)
        try:
            pipeline = ACDiTPipeline.from_pretrained(folder)
            head = ClassificationHead.from_pretrained(place)
            transformer = pipeline.transformer
            if (place / _TRANSFORMER).is_dir():
                transformer = ACDiTTransformer.from_pretrained(place / _TRANSFORMER)
        except (OSError, ValueError) as error:
            raise StorageError(f"model {folder}", found=first_line(error), expected="a saved classifier") from error
        return cls(Classifier(transformer, head, corruption_of(pipeline.scheduler)), pipeline)

    def save(self, folder: str | Path, whole: bool) -> None:
        """Write classifier/ into a folder that holds the generative pipeline.

        Args:
            folder: the model's.
            whole: the transformer too, where it is no longer the generative one.
        """
        place = Path(folder) / FOLDER
        self.classifier.head.save_pretrained(place)
        if whole:
            self.classifier.transformer.save_pretrained(place / _TRANSFORMER)

    def to(self, device: torch.device | str) -> ACDiTClassifier:
        """Move everything there."""
        self.classifier.to(device)
        self.pipeline.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor, first: int = 0) -> Tensor:
        """Logits of pictures or clips.

        Args:
            pixels: uint8, or float in [0, 1]: (B, C, H, W), or (B, C, T, H, W).
            first: index of the first one, which keys the noise of a baseline on noisy features.

        Returns:
            (B, num_classes).
        """
        return self.of_blocks(self.blocks(pixels), first)

    @torch.no_grad()
    def of_blocks(self, clean: Tensor, first: int = 0) -> Tensor:
        """Logits of data in model space, cut into blocks (B, N, L, D)."""
        noise = None
        if self.classifier.draws_noise:
            samples = range(first, first + len(clean))
            noise = draws.normal(tuple(clean.shape[1:]), seed=0, stream="feature_noise", step=0, samples=samples)
            noise = noise.to(clean)
        return self.classifier(clean, noise)

    @torch.no_grad()
    def stream(self, blocks: Iterator[Tensor] | Tensor) -> Iterator[Tensor]:
        """Logits after each block, each block read once against the cache of those before.

        Args:
            blocks: (B, N, L, D), or blocks (B, 1, L, D) as they come.

        Yields:
            (B, num_classes) for each block; the last is the answer for all of them.
        """
        cache, pooled = None, None
        for block in blocks.split(1, dim=1) if isinstance(blocks, Tensor) else blocks:
            if cache is None:
                cache = self.classifier.transformer.new_cache(len(block), self.classifier.transformer.layout.num_blocks)
            logits, pooled = self.classifier.go_on(block, cache, pooled)
            yield logits

    @torch.no_grad()
    def blocks(self, pixels: Tensor) -> Tensor:
        """Pixels as blocks in model space, (B, N, L, D).

        Raises:
            ConfigError: a model of latents without its autoencoder.
        """
        if self.pipeline.vae is None and self.pipeline.config.latents:
            raise ConfigError(
                "classifier", found="a model of latents without its autoencoder", expected="one, to read pixels",
                fix="--vae PATH",
            )  # fmt: skip
        model = self.classifier.transformer
        encoded = self.pipeline.codec.encode(pixels.to(model.execution_device))
        return model.layout.to_blocks(encoded).to(model.x_embedder.weight.dtype)

    def best(self, logits: Tensor, count: int) -> list[list[dict[str, Any]]]:
        """The `count` likeliest classes of each row: [{"class", "name", "probability"}, …]."""
        found = logits.double().softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
        return [
            [
                {"class": index, "name": self.class_names[index], "probability": probability}
                for index, probability in zip(indices, probabilities, strict=True)
            ]
            for indices, probabilities in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]


def corruption_of(scheduler: Any) -> GaussianCorruption | None:
    """The corruption a pipeline's scheduler undoes; None: of a kind that is not known here."""
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch"):
        return GaussianCorruption("flow_prediction", config.num_train_timesteps)
    names = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    if any(config.get(name) is None for name in names):
        return None
    return GaussianCorruption(**{name: config[name] for name in names})
