"""A small classifier of real pictures: it judges samples, and its features carry the Fréchet distance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acdit.draws import permutation
from acdit.errors import DataError

FEATURE_DIM = 64


class SmallClassifier(nn.Module):
    """Two convolutions, a hidden layer of 64 features, a linear head.

    Args:
        shape: (C, H, W) of a picture; H and W even.
        num_classes: of the head.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(64 * (height // 2) * (width // 2), FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Pictures (B, C, H, W), uint8 or float in [0, 1] → (B, 64), ≥ 0."""
        values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return F.relu(self.hidden(self.convolutions(values * 2 - 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, C, H, W), uint8 or float in [0, 1] → logits (B, num_classes)."""
        return self.head(self.features(pixels))

    @torch.no_grad()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """The share of pictures (M, C, H, W) recognised as their labels (M,)."""
        return float((self(pixels).argmax(dim=1) == labels).double().mean())


def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    held_out_pixels: Tensor,
    held_out_labels: Tensor,
    *,
    required_accuracy: float = 0.97,
    epochs: int = 15,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> tuple[SmallClassifier, float]:
    """Train on real pictures until it may judge: AdamW, one-cycle cosine, no augmentation; the global RNG is untouched.

    Args:
        pixels, labels: (M, C, H, W) uint8 or float in [0, 1], and (M,) classes to train on.
        held_out_pixels, held_out_labels: pictures it never trains on.
        required_accuracy: on the held-out pictures.
        epochs, batch_size, learning_rate, seed: of the training.

    Returns:
        The classifier in eval mode, and its held-out accuracy.

    Raises:
        DataError: the required accuracy is not reached: figures of such a judge would mean nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SmallClassifier((pixels.shape[1], pixels.shape[2], pixels.shape[3]), int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    per_epoch = math.ceil(len(labels) / batch_size)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * per_epoch)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(labels), seed=seed, stream="classifier order", step=epoch))
        for rows in order.split(batch_size):
            loss = F.cross_entropy(classifier(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
    classifier.eval()
    accuracy = classifier.accuracy(held_out_pixels, held_out_labels)
    if accuracy < required_accuracy:
        raise DataError(
            "the classifier that judges the samples",
            found=f"{accuracy:.4f} of the held-out pictures recognised",
            expected=f"at least {required_accuracy}",
            fix="more epochs, or data whose labels are right",
        )
    return classifier, accuracy
