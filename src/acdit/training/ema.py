"""Moving averages of the weights, several decays at once, on diffusers' `EMAModel`."""

from __future__ import annotations

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from acdit.recipe import EMARecipe
from acdit.training.shards import cut_like, local


def ema_variant(decay: float) -> str:
    """The `variant=` under which a further average is published: 0.9999 is "ema-0_9999", for diffusers reads a dot as
    the end of a file's name."""
    return f"ema-{decay}".replace(".", "_")


class EMAWeights:
    """One `EMAModel` a decay; saved and restored by parameter name, without pickles.

    Under FSDP2 each process averages the rows it holds: an average is elementwise.

    Args:
        model: whose parameters are followed.
        recipe: decays and warm-up.
    """

    def __init__(self, model: nn.Module, recipe: EMARecipe) -> None:
        self.decays = list(recipe.decays)
        self._parameters = dict(model.named_parameters())
        self._averages = [
            EMAModel(
                _rows(model), decay=decay, use_ema_warmup=recipe.warmup, inv_gamma=recipe.inv_gamma,
                power=recipe.power, min_decay=0.0 if recipe.warmup else decay, foreach=True,
            )
            for decay in self.decays
        ]  # fmt: skip

    def step(self, model: nn.Module) -> None:
        """Follow the weights after an optimizer step."""
        parameters = _rows(model)
        for average in self._averages:
            average.step(parameters)

    def weights(self, index: int) -> dict[str, Tensor]:
        """The averaged weights by parameter name; the tensors themselves, not copies."""
        return {
            name: cut_like(rows, parameter)
            for (name, parameter), rows in zip(
                self._parameters.items(), self._averages[index].shadow_params, strict=True
            )
        }

    @property
    def counters(self) -> list[int]:
        """Optimizer steps each average has followed: what the warm-up depends on."""
        return [average.optimization_step for average in self._averages]

    @counters.setter
    def counters(self, values: list[int]) -> None:
        for average, value in zip(self._averages, values, strict=True):
            average.optimization_step = value


def _rows(model: nn.Module) -> list[Tensor]:
    """What this process holds of the parameters. `EMAModel` copies instead of averaging what needs no gradient."""
    return [
        parameter if (rows := local(parameter)) is parameter else rows.requires_grad_(parameter.requires_grad)
        for parameter in model.parameters()
    ]
