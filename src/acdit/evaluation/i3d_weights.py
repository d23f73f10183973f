"""I3D from a local file, in the forms people have.

The two that circulate hold other weights: StyleGAN-V's archive those of tf.hub's deepmind/i3d-kinetics-400/1, which
published FVDs are made with; piergiaj's state dict those of DeepMind's repository (ImageNet, then Kinetics). Figures of
one do not compare with figures of the other.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from acdit.errors import DataError
from acdit.evaluation.i3d import I3D, NUM_CLASSES, preprocess_clips
from acdit.evaluation.inception import Features
from acdit.evaluation.weight_files import (
    accepted_arguments,
    fill,
    flat_answer,
    is_torchscript,
    load_script,
    read_state_dict,
)

I3D_FORMS = (
    "the TorchScript archive i3d_torchscript.pt (StyleGAN-V's), or a state dict of I3D with piergiaj's names "
    "(rgb_imagenet.pt, or .safetensors)"
)
_FLAGS = {"rescale": False, "resize": False, "return_features": True}
"""How the archive is called: values and sizes are right already, and what is wanted is in front of the softmax."""


def load_i3d(path: str | Path, preprocessing: str) -> I3D | ScriptedI3D:
    """The network in eval mode: uint8 (B, T, 3, H, W) → `Features` (B, 400).

    Raises:
        DataError: no such file, another form, or names or shapes that do not fit (all are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--weights {path}", found="no such file", expected=I3D_FORMS)
    if is_torchscript(path):
        return ScriptedI3D(path, preprocessing).eval()
    network = I3D(preprocessing)
    fill(
        network, read_state_dict(path, I3D_FORMS), path, I3D_FORMS,
        "rgb_imagenet.pt is one for RGB and 400 classes; flow models and those of other classes are not FVD's",
    )  # fmt: skip
    return network.eval()


class ScriptedI3D(nn.Module):
    """A TorchScript archive.

    Args:
        path: called as f(x, rescale=False, resize=False, return_features=True), with those of the three that it
            accepts, on values −1 … 1 (B, 3, T, 224, 224).
        preprocessing: see `preprocess_clips`.

    Raises:
        DataError: damaged, or one that cannot be asked for features.
    """

    def __init__(self, path: Path, preprocessing: str) -> None:
        super().__init__()
        self.script, self.path, self.preprocessing = load_script(path, I3D_FORMS), path, preprocessing
        accepted = accepted_arguments(self.script)
        if "return_features" not in accepted:  # its answer may be probabilities, and nothing would tell
            raise DataError(
                f"--weights {path}", found="a TorchScript archive without the argument return_features",
                expected=I3D_FORMS,
            )  # fmt: skip
        self.flags = {name: value for name, value in _FLAGS.items() if name in accepted}

    def forward(self, clips: Tensor) -> Features:
        """uint8 (B, T, 3, H, W) → 400 logits a clip."""
        output = self.script(preprocess_clips(clips, self.preprocessing), **self.flags)
        logits = flat_answer(output, len(clips), self.path)
        if logits.shape[1] != NUM_CLASSES:
            raise DataError(
                f"--weights {self.path}", found=f"{logits.shape[1]} features", expected=f"{NUM_CLASSES} logits"
            )
        return Features(logits)
