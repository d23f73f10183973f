"""Pictures or clips → features: a registry of extractors by name. A figure means something only together with its
extractor."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acdit.errors import ConfigError
from acdit.evaluation.i3d import I3D, I3D_PREPROCESSINGS, LEAST_FRAMES
from acdit.evaluation.i3d_weights import I3D_FORMS, load_i3d
from acdit.evaluation.inception import PREPROCESSINGS, Features
from acdit.evaluation.weight_files import FORMS, is_torchscript, load_inception
from acdit.provenance import weights_sha256

PIXELS_EDGE = 32
PIXELS_CLIP = (4, 8, 8)
"""Cells that a clip is averaged over, in time, height and width: 768 features of colour, as few as a covariance of a
few thousand clips can bear."""

Kind = Literal["frames", "clips"]
"""What one feature is of: a picture (a frame of a clip), or a whole clip."""


@dataclass(frozen=True)
class Extractor:
    """A function of pictures or clips, and what a result file says about it.

    Args:
        name: as registered.
        channels: 1 or 3: what pictures are converted to before they are handed over.
        function: uint8 (B, C, H, W) on the extractor's device → `Features`; of kind "clips" uint8 (B, T, C, H, W).
        network: its weights, hashed and moved to the device; None: it has none.
        weights: the file they came from.
        preprocessing: in words.
        kind: "frames": it sees pictures, and clips frame by frame; "clips": it sees clips as wholes.
        least_frames: that a clip must have.
        of_clips: of kind "frames", where the same can be said of clips as wholes: what sees them.
    """

    name: str
    channels: int
    function: Callable[[Tensor], Features]
    network: nn.Module | None = None
    weights: str | None = None
    preprocessing: str | None = None
    kind: Kind = "frames"
    least_frames: int = 1
    of_clips: Extractor | None = None

    def __call__(self, pixels: Tensor) -> Features:
        """Features of a batch.

        Raises:
            ConfigError: pictures for an extractor of clips, or clips for one of frames.
        """
        if pixels.ndim != (5 if self.kind == "clips" else 4):
            given, wanted = ("pictures", "clips") if self.kind == "clips" else ("clips", "pictures")
            raise ConfigError(
                f"--extractor {self.name}", found=given, expected=wanted,
                fix="an extractor of frames measures pictures: inception, classifier, pixels" if given == "pictures"
                else "hand over their frames, (B · T, C, H, W)",
            )  # fmt: skip
        # TF32 would move features in the third digit, differently on each card.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.function(pixels)

    def to(self, device: torch.device) -> Extractor:
        """Move the weights."""
        if self.network is not None:
            self.network.to(device)
        return self

    def require_frames(self, frames: int) -> None:
        """Refuse clips that are too short for it.

        Raises:
            ConfigError: they are.
        """
        if frames < self.least_frames:
            raise ConfigError(
                "--frames", found=f"{frames}, --extractor {self.name}", expected=f"at least {self.least_frames}"
            )

    def describe(self) -> dict[str, Any]:
        """For the result file; equal descriptions give equal features."""
        described = {
            "name": self.name,
            "kind": self.kind,
            "weights": None if self.weights is None else Path(self.weights).name,
            "weights_sha256": None if self.network is None else weights_sha256(self.network),
            "preprocessing": self.preprocessing,
        }
        return described if self.of_clips is None else {**described, "of_clips": self.of_clips.describe()}


@dataclass(frozen=True)
class ExtractorOptions:
    """What the command line says besides the name."""

    weights: str | None = None
    preprocessing: str | None = None


Factory = Callable[[ExtractorOptions], Extractor]
_FACTORIES: dict[str, Factory] = {}
_ZOO = re.compile(
    r"^(hf[-_]hub:|timm|https?:)|/|^(inception_v3|tv_|tf_|dino|clip|vit|resnet|convnext|swin|efficientnet|mae|sscd)",
    re.I,
)


def register_extractor(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make an extractor available under a name.

    Args:
        name: for `--extractor` and result files.

    Raises:
        ConfigError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise ConfigError(f"extractor {name!r}", found="one of this name", expected="a name that is free")
        _FACTORIES[name] = factory
        return factory

    return register


def extractor_names() -> list[str]:
    """All registered names."""
    return sorted(_FACTORIES)


def build_extractor(name: str, options: ExtractorOptions | None = None) -> Extractor:
    """Make a registered extractor, or one of your own: "module:factory" imports the module and calls the factory.

    Raises:
        ConfigError: an unknown name; a model zoo's id is refused with the reason; options it has no use for.
        DataError: its weights cannot be used.
    """
    options = options or ExtractorOptions()
    if name in _FACTORIES:
        return _FACTORIES[name](options)
    if _ZOO.search(name):
        raise ConfigError(
            f"--extractor {name}", found="an id of a model hub or zoo (timm-style)",
            expected=f"one of {', '.join(extractor_names())}",
            fix="a zoo's Inception v3 has other weights and preprocessing than FID's network of 2015-12-05, so its "
            "figures compare with no published FID: --extractor inception --weights FILE",
        )  # fmt: skip
    module, colon, attribute = name.partition(":")
    if colon:
        return _own(name, module, attribute)(options)
    raise ConfigError(
        f"--extractor {name}", found="an unknown name",
        expected=f"one of {', '.join(extractor_names())}, or module:factory of your own",
    )  # fmt: skip


def _own(name: str, module: str, attribute: str) -> Factory:
    try:
        factory: Factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--extractor {name}", found=str(error), expected="a module with that function") from None
    return factory


@register_extractor("inception")
def _inception(options: ExtractorOptions) -> Extractor:
    if options.weights is None:
        raise ConfigError(
            "--weights",
            found="nothing",
            expected=FORMS,
            fix="--extractor inception --weights FILE (never fetched here)",
        )
    scripted = Path(options.weights).is_file() and is_torchscript(Path(options.weights))
    preprocessing = _one_of(PREPROCESSINGS, options.preprocessing, "tensorflow" if scripted else "pytorch-fid")
    network = load_inception(options.weights, preprocessing)
    return Extractor("inception", 3, network, network, options.weights, f"{preprocessing}, 299×299")


@register_extractor("i3d")
def _i3d(options: ExtractorOptions) -> Extractor:
    """Of clips: what FVD is made of."""
    if options.weights is None:
        raise ConfigError(
            "--weights", found="nothing", expected=I3D_FORMS, fix="--extractor i3d --weights FILE (never fetched here)"
        )
    how = _one_of(I3D_PREPROCESSINGS, options.preprocessing, "stylegan-v")
    network = load_i3d(options.weights, how)
    form = "a state dict" if isinstance(network, I3D) else f"an archive called with {network.flags}"
    told = f"{how}, each frame to 224×224, values −1 … 1; 400 logits, the mean over time; {form}"
    return Extractor("i3d", 3, network, network, options.weights, told, kind="clips", least_frames=LEAST_FRAMES)


@register_extractor("digits-classifier")
def _digits_classifier(options: ExtractorOptions) -> Extractor:
    """The judge of the demo: a small classifier, trained now on the built-in digits (seconds)."""
    from acdit.data import DigitsDataset
    from acdit.evaluation.classifier import digits_judge

    _refuse_options("digits-classifier", options)
    (classifier, _), shape = digits_judge(), DigitsDataset("train").shape

    def features(pixels: Tensor) -> Features:
        if tuple(pixels.shape[1:]) != shape:
            raise ConfigError(
                "--extractor digits-classifier", found=f"pictures of shape {tuple(pixels.shape[1:])}",
                expected=f"{shape}, as the built-in digits are", fix="--extractor pixels, or inception",
            )  # fmt: skip
        pooled = classifier.features(pixels)
        return Features(pooled, probabilities=classifier.head(pooled).softmax(dim=1))

    return Extractor("digits-classifier", 1, features, classifier, None, "as trained: values −1 … 1")


@register_extractor("classifier")
def _classifier(options: ExtractorOptions) -> Extractor:
    """A judge of one's own data: what `acdit.evaluation.save_classifier` wrote."""
    from acdit.evaluation.classifier import load_classifier

    if options.weights is None:
        raise ConfigError(
            "--weights", found="nothing", expected="a classifier that acdit.evaluation.save_classifier wrote",
            fix="train one with acdit.evaluation.train_classifier, as benchmarks/real_data.py does",
        )  # fmt: skip
    if options.preprocessing is not None:
        raise ConfigError(
            "--preprocessing", found="--extractor classifier", expected="none: only inception and i3d have some"
        )
    classifier, facts = load_classifier(options.weights)

    def features(pixels: Tensor) -> Features:
        if tuple(pixels.shape[1:]) != facts.shape:
            raise ConfigError(
                f"--weights {options.weights}", found=f"pictures of shape {tuple(pixels.shape[1:])}",
                expected=f"{facts.shape}, as this classifier reads",
            )  # fmt: skip
        pooled = classifier.features(pixels)
        return Features(pooled, probabilities=classifier.head(pooled).softmax(dim=1))

    told = f"values −1 … 1; trained on {facts.trained_on}, reads {facts.held_out_accuracy:.4f} of held-out pictures"
    return Extractor("classifier", facts.shape[0], features, classifier, options.weights, told)


@register_extractor("pixels")
def _pixels(options: ExtractorOptions) -> Extractor:
    """No network: pixel values, of pictures larger than 32 × 32 their means over cells; of clips as wholes their means
    over at most 4 × 8 × 8 cells in time, height and width."""
    _refuse_options("pixels", options)

    def features(pixels: Tensor) -> Features:
        values = pixels.float() / 255
        if max(values.shape[2:]) > PIXELS_EDGE:
            values = F.adaptive_avg_pool2d(values, PIXELS_EDGE)
        return Features(values.flatten(1))

    def of_clip(clips: Tensor) -> Features:
        values = clips.float().transpose(1, 2) / 255  # (B, C, T, H, W)
        frames, height, width = (min(extent, most) for extent, most in zip(values.shape[2:], PIXELS_CLIP, strict=True))
        return Features(F.adaptive_avg_pool3d(values, (frames, height, width)).flatten(1))

    most = "×".join(map(str, PIXELS_CLIP))
    whole = Extractor("pixels", 3, of_clip, preprocessing=f"values in [0, 1], means over {most} cells", kind="clips")
    told = f"values in [0, 1], at most {PIXELS_EDGE}×{PIXELS_EDGE}"
    return Extractor("pixels", 3, features, preprocessing=told, of_clips=whole)


def _one_of(known: tuple[str, ...], asked: str | None, default: str) -> str:
    if asked is not None and asked not in known:
        raise ConfigError("--preprocessing", found=asked, expected=f"one of {', '.join(known)}")
    return asked or default


def _refuse_options(name: str, options: ExtractorOptions) -> None:
    for option in ("weights", "preprocessing"):
        if getattr(options, option) is not None:
            raise ConfigError(
                f"--{option}", found=f"--extractor {name}", expected="none: this extractor has no use for it"
            )
