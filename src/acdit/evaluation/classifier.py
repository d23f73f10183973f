"""Small classifiers of real pictures: they judge samples, and their features carry the Fréchet distance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from acdit import storage
from acdit.data import DigitsDataset
from acdit.draws import keyed_generator, permutation
from acdit.errors import DataError
from acdit.pickles import require_shapes

FEATURE_DIM = 64
_PAD = 4  # pixels that a training picture of the larger network is shifted by at most
_AT_ONCE = 500


class PictureClassifier(nn.Module):
    """What the judges share: pictures in, features and logits out. Networks give `_features` and have a `head`."""

    head: nn.Linear

    def features(self, pixels: Tensor) -> Tensor:
        """Pictures (B, C, H, W), uint8 or float in [0, 1] → (B, F), ≥ 0."""
        values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return self._features(values * 2 - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, C, H, W), uint8 or float in [0, 1] → logits (B, num_classes)."""
        return self.head(self.features(pixels))

    @torch.no_grad()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """The share of pictures (M, C, H, W) recognised as their labels (M,)."""
        predicted = torch.cat([self(part).argmax(dim=1) for part in pixels.split(_AT_ONCE)])
        return float((predicted == labels).double().mean())

    def _features(self, values: Tensor) -> Tensor:
        raise NotImplementedError  # of each kind its own


class SmallClassifier(PictureClassifier):
    """Two convolutions, a hidden layer of 64 features, a linear head: enough for digits.

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

    def _features(self, values: Tensor) -> Tensor:
        return F.relu(self.hidden(self.convolutions(values)))


class ResidualClassifier(PictureClassifier):
    """Four stages of 3 × 3 convolutions with batch norm, two of them residual: for natural pictures of about 32 × 32.

    The nine-layer network known from the DAWNBench entries on CIFAR-10, a quarter as wide.

    Args:
        shape: (C, H, W) of a picture; H and W at least 8.
        num_classes: of the head.
        width: channels of the first stage; the features are 8 × as many.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = _unit(shape[0], width)
        self.first, self.first_residual = _unit(width, 2 * width), _residual(2 * width)
        self.second = _unit(2 * width, 4 * width)
        self.third, self.third_residual = _unit(4 * width, 8 * width), _residual(8 * width)
        self.head = nn.Linear(8 * width, num_classes)

    def _features(self, values: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(self.stem(values)), 2)
        x = x + self.first_residual(x)
        x = F.max_pool2d(self.second(x), 2)
        x = F.max_pool2d(self.third(x), 2)
        x = x + self.third_residual(x)
        return x.amax(dim=(2, 3))


def _unit(channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _residual(channels: int) -> nn.Sequential:
    return nn.Sequential(_unit(channels, channels), _unit(channels, channels))


NETWORKS: dict[str, type[PictureClassifier]] = {"small": SmallClassifier, "residual": ResidualClassifier}


def build_network(network: str, shape: Sequence[int], num_classes: int) -> PictureClassifier:
    """An untrained classifier: "small" or "residual", for pictures (C, H, W)."""
    channels, height, width = shape
    return NETWORKS[network]((channels, height, width), num_classes)


def digits_judge() -> tuple[PictureClassifier, float]:
    """The classifier that judges the built-in digits, always the same one, and its accuracy on the held-out ones.

    Raises:
        DataError: it recognises less than 0.97 of them.
    """
    train, held_out = DigitsDataset("train"), DigitsDataset("held_out")
    return train_classifier(train.images, train.labels, held_out.images, held_out.labels)


def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    held_out_pixels: Tensor,
    held_out_labels: Tensor,
    *,
    network: str = "small",
    required_accuracy: float = 0.97,
    epochs: int = 15,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    augment: bool = False,
    seed: int = 0,
) -> tuple[PictureClassifier, float]:
    """Train on real pictures until it may judge: AdamW, one-cycle cosine; the global RNG is untouched.

    Args:
        pixels, labels: (M, C, H, W) uint8 or float in [0, 1], and (M,) classes to train on.
        held_out_pixels, held_out_labels: pictures it never trains on.
        network: "small" or "residual".
        required_accuracy: on the held-out pictures.
        epochs, batch_size, learning_rate, seed: of the training.
        augment: mirror half of the pictures, and shift each by up to 4 pixels.

    Returns:
        The classifier in eval mode, and its held-out accuracy.

    Raises:
        DataError: the required accuracy is not reached: figures of such a judge would mean nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = build_network(network, pixels.shape[1:], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    per_epoch = math.ceil(len(labels) / batch_size)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * per_epoch)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(labels), seed=seed, stream="classifier order", step=epoch))
        for step, rows in enumerate(order.split(batch_size)):
            shown = _augmented(pixels[rows], seed, epoch * per_epoch + step) if augment else pixels[rows]
            loss = F.cross_entropy(classifier(shown), labels[rows])
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


def _augmented(pixels: Tensor, seed: int, step: int) -> Tensor:
    """Mirrored and shifted, by draws keyed by seed and step."""
    generator = keyed_generator(seed, "classifier augmentation", step)
    count, _, height, width = pixels.shape
    padded = F.pad(pixels.float(), (_PAD,) * 4, mode="reflect").to(pixels.dtype)
    mirrored, places = generator.random(count) < 0.5, generator.integers(0, 2 * _PAD + 1, (count, 2))
    cut = [
        picture[:, top : top + height, left : left + width] for picture, (top, left) in zip(padded, places, strict=True)
    ]
    stacked = torch.stack(cut)
    return torch.where(torch.from_numpy(mirrored)[:, None, None, None], stacked.flip(-1), stacked)


# --- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierFacts:
    """What a saved classifier says about itself."""

    network: str
    shape: tuple[int, int, int]
    """(C, H, W) of the pictures it reads."""
    num_classes: int
    trained_on: str
    """In words: data and number of pictures."""
    held_out_accuracy: float


def save_classifier(classifier: PictureClassifier, facts: ClassifierFacts, path: str | Path) -> None:
    """Write weights and facts to one safetensors file, for `--extractor classifier --weights PATH`."""
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    with storage.atomic_file(path) as temporary:
        save_file(weights, temporary, {"acdit_classifier": json.dumps(asdict(facts))})


def load_classifier(path: str | Path) -> tuple[PictureClassifier, ClassifierFacts]:
    """Read what `save_classifier` wrote, in eval mode.

    Raises:
        DataError: no such file, or another one.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["acdit_classifier"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        facts = ClassifierFacts(**{**told, "shape": tuple(told["shape"])})
        classifier = build_network(facts.network, facts.shape, facts.num_classes)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        found = "no such file" if not path.is_file() else f"{type(error).__name__}: {error}"
        raise DataError(
            str(path), found=found, expected="a classifier that acdit saved", fix="acdit.evaluation.save_classifier"
        ) from None
    shapes = {name: tuple(value.shape) for name, value in classifier.state_dict().items()}
    require_shapes(path, shapes, weights, f"the {facts.network} classifier", "save it again")
    classifier.load_state_dict(weights)
    return classifier.eval(), facts
