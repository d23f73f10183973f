"""From a recipe to a trained model."""

from acdit.training.build import Built, build
from acdit.training.loop import Trainer

__all__ = ["Built", "Trainer", "build"]
