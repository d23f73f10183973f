from __future__ import annotations

import sys
import types

import pytest
import torch

from acdit.data import DigitsDataset
from acdit.errors import ConfigError
from acdit.evaluation.extractors import (
    Extractor,
    ExtractorOptions,
    build_extractor,
    extractor_names,
    register_extractor,
)
from acdit.evaluation.inception import Features


def test_the_registry_names_what_it_has() -> None:
    assert {"inception", "digits-classifier", "i3d", "pixels"} <= set(extractor_names())
    with pytest.raises(ConfigError, match="free"):
        register_extractor("pixels")(lambda options: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "name",
    ["inception_v3", "inception_v3.tf_in1k", "timm/inception_v3.tv_in1k", "hf-hub:timm/x", "dinov2_vitl14", "clip-vit"],
)
def test_ids_of_model_zoos_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model hub or zoo .*other weights"):
        build_extractor(name)


@pytest.mark.parametrize("name", ["nothing", "no_such_module:make", "json:no_such_function"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name.partition(":")[0]):
        build_extractor(name)


def test_options_that_an_extractor_has_no_use_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="--weights"):
        build_extractor("pixels", ExtractorOptions(weights="x.pt"))
    with pytest.raises(ConfigError, match=r"--weights; found nothing.*never fetched"):
        build_extractor("inception")


def test_pixels_are_means_over_cells_of_large_pictures() -> None:
    extractor = build_extractor("pixels")
    small = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(extractor(small).pooled, (small.float() / 255).flatten(1))
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert extractor(large).pooled.shape == (2, 3 * 32 * 32)
    assert torch.allclose(extractor(large).pooled[:, 0], small[:, 0, 0, 0].float() / 255)


def test_the_digits_classifier_gives_features_and_probabilities() -> None:
    extractor = build_extractor("digits-classifier")
    digits = DigitsDataset("held_out")
    features = extractor(digits.images)
    assert features.pooled.shape == (500, 64)
    assert features.spatial is None
    assert float((features.probabilities.argmax(dim=1) == digits.labels).double().mean()) > 0.97
    assert not features.pooled.requires_grad
    with pytest.raises(ConfigError, match="built-in digits"):
        extractor(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))


def test_an_extractor_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_features")
    module.make = lambda options: Extractor("mine", 3, lambda pixels: Features(pixels.float().flatten(1)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_features", module)
    extractor = build_extractor("my_features:make")
    assert extractor.describe() == {
        "name": "mine", "kind": "frames", "weights": None, "weights_sha256": None, "preprocessing": None
    }  # fmt: skip
