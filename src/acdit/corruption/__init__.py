"""How clean data become noisy, what the model is asked for, and what its answer costs."""

from acdit.corruption.gaussian import GaussianCorruption
from acdit.corruption.masking import MaskingCorruption

__all__ = ["GaussianCorruption", "MaskingCorruption"]
