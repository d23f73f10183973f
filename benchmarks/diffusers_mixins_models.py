"""ACDiTTransformer under diffusers' own testers of models. `diffusers_mixins.py` puts this file into a checkout's
tests/models/transformers and runs it there; it is of no use elsewhere.

Three models: pictures, clips under a window, and text. diffusers compares outputs before and after something. A new
ACDiT predicts zero, which would make every comparison one of zeros, so here all weights are drawn.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from acdit import ACDiTTransformer

from ...testing_utils import enable_full_determinism, torch_device
from ..testing_utils import (
    AttentionBackendTesterMixin,
    AttentionTesterMixin,
    BaseModelTesterConfig,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)

enable_full_determinism()


@pytest.fixture(scope="module", autouse=True)
def drawn_weights() -> Any:
    """New models with no zero among their weights, while this module runs."""

    def draw(model: ACDiTTransformer) -> None:
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ACDiTTransformer, "initialize_weights", draw)
        yield


class Model(BaseModelTesterConfig):
    """What the three models share: inputs of `forward`, from one seed."""

    settings: ClassVar[dict[str, Any]]

    @property
    def model_class(self) -> type[ACDiTTransformer]:
        return ACDiTTransformer

    @property
    def main_input_name(self) -> str:
        return "noisy"

    @property
    def output_shape(self) -> tuple[int, ...]:
        model = ACDiTTransformer(**self.get_init_dict())
        return (model.layout.num_blocks, model.layout.block_tokens, model.token_dim)

    def get_init_dict(self) -> dict[str, Any]:
        return {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2.0, **self.settings}

    def get_dummy_inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        blocks, length, _ = shape = (2, *self.output_shape)[1:]
        labels = self.settings.get("num_classes")

        def tokens() -> Tensor:
            if vocabulary := self.settings.get("vocab_size"):
                return torch.randint(vocabulary, (2, blocks, length), generator=generator)
            return torch.randn((2, *shape), generator=generator)

        inputs: dict[str, Any] = {"clean": tokens(), "noisy": tokens()}
        inputs["timestep"] = torch.randint(1000, (2, blocks), generator=generator)
        if labels is not None:
            inputs["class_labels"] = torch.randint(labels, (2,), generator=generator)
        return {name: value.to(torch_device) for name, value in inputs.items()}


class Picture(Model):
    settings: ClassVar[dict[str, Any]] = {
        "grid": (8, 8),
        "block": (2, 2),
        "patch": 2,
        "in_channels": 3,
        "num_classes": 5,
    }


class Clip(Model):
    settings: ClassVar[dict[str, Any]] = {
        "grid": (4, 4, 4), "block": (1, 2, 2), "patch": (1, 2, 2), "in_channels": 1, "num_classes": 5, "window": 2,
    }  # fmt: skip


class Text(Model):
    settings: ClassVar[dict[str, Any]] = {"grid": (16,), "block": (4,), "vocab_size": 11}


class OfTraining(TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={"ACDiTTransformer"})


class OfCompilation(TorchCompileTesterMixin):
    def test_torch_compile_repeated_blocks(self) -> None:
        # The last layer is a graph of its own: it computes keys and values of the clean blocks only.
        super().test_torch_compile_repeated_blocks(recompile_limit=2)


def _cases(name: str, tester: type) -> dict[str, type]:
    """A test class for each of the three models."""
    return {f"Test{name}{model.__name__}": type(f"Test{name}{model.__name__}", (model, tester), {})
            for model in (Picture, Clip, Text)}  # fmt: skip


globals().update(_cases("Model", ModelTesterMixin))
globals().update(_cases("Training", OfTraining))
globals().update(_cases("Memory", MemoryTesterMixin))
globals().update(_cases("Compile", OfCompilation))
globals().update(_cases("Attention", AttentionTesterMixin))
globals().update(_cases("AttentionBackend", AttentionBackendTesterMixin))
