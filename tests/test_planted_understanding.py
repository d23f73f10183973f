"""Mistakes that are easy to make with features and heads, each planted on purpose: the named test must catch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from acdit import layers, model
from acdit.heads import ClassificationHead, Pooled
from acdit.model import ACDiTTransformer
from tests import test_encode, test_heads
from tests.evaluation import test_classification
from tests.planted import Plant, require_caught


def clean_stream_sees_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "skip_causal_attention", lambda q, k, v, *_: layers.attend_all_blocks(q, k, v))


def label_in_the_features(patch: pytest.MonkeyPatch) -> None:
    encode = ACDiTTransformer.encode

    def leaking(self: ACDiTTransformer, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        assert self.y_embedder is not None
        return [one + self.y_embedder.weight[-1] for one in encode(self, *args, **kwargs)]

    patch.setattr(ACDiTTransformer, "encode", leaking)


def layers_counted_from_one(patch: pytest.MonkeyPatch) -> None:
    indices = model.layer_indices
    patch.setattr(model, "layer_indices", lambda given, count: [max(0, index - 1) for index in indices(given, count)])


def pooling_without_rescaling(patch: pytest.MonkeyPatch) -> None:
    """Weights of the blocks before are kept as they were, though the largest score has grown."""
    pool = ClassificationHead.pool

    def wrong(self: ClassificationHead, features: Any, before: Pooled | None = None) -> Pooled:
        now = pool(self, features)
        if before is None:
            return now
        return Pooled(now.total + before.total, now.weight + before.weight, now.largest)

    patch.setattr(ClassificationHead, "pool", wrong)


def noise_by_the_place_in_the_batch(patch: pytest.MonkeyPatch) -> None:
    of_blocks = test_heads.ACDiTClassifier.of_blocks
    patch.setattr(test_heads.ACDiTClassifier, "of_blocks", lambda self, clean, first=0: of_blocks(self, clean))


def an_interval_of_wald(patch: pytest.MonkeyPatch) -> None:
    def wald(right: int, total: int) -> tuple[float, float]:
        share = right / total
        half = 1.96 * (share * (1 - share) / total) ** 0.5
        return share - half, share + half

    patch.setattr(test_classification, "wilson_interval", wald)


FAULTS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "the clean stream sees later blocks": (
        clean_stream_sees_everything,
        lambda: test_encode.test_a_later_block_changes_an_earlier_feature_only_where_both_directions_are_seen(False),
    ),
    "the label leaks into the features": (
        label_in_the_features,
        test_encode.test_features_do_not_depend_on_the_parameters_of_label_timestep_and_output,
    ),
    "layers counted from one": (
        layers_counted_from_one,
        test_encode.test_noisy_features_end_in_the_prediction_and_are_those_of_denoise,
    ),
    "a running average that is not rescaled": (
        pooling_without_rescaling,
        lambda: test_heads.test_streaming_answers_as_all_blocks_at_once_after_every_block("attentive", {}),
    ),
    "noise by the place in the batch": (
        noise_by_the_place_in_the_batch,
        test_heads.test_a_one_block_models_noisy_features_are_dits_and_keyed_by_the_sample,
    ),
    "an interval of the wrong kind": (
        an_interval_of_wald,
        lambda: test_classification.test_wilsons_bounds_are_the_shares_that_are_just_not_refuted(3, 10),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_caught(*FAULTS[fault], monkeypatch)
