"""Networks from a local file, in the forms people have: a state dict, or a TorchScript archive. Here the FID Inception,
and what it shares with I3D (`acdit.evaluation.i3d_weights`)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from acdit.errors import ConfigError, DataError, first_line
from acdit.evaluation.inception import Features, FIDInception, flat_spatial, preprocess
from acdit.pickles import load_checkpoint, printable

FORMS = (
    "a state dict of the FID Inception (pt_inception-2015-12-05-6726825d.pth, or .safetensors with its names), or "
    "a TorchScript archive (inception-2015-12-05.pt)"
)
_ZOO = "a model zoo's Inception v3 is another network: FID needs the weights of 2015-12-05"
_LISTED = 20
"""Names of the file that a message repeats: a stranger's file must not choose how long it gets."""
_COUNTER = "num_batches_tracked"  # batch norm's, of no use here; files have it or not
_SPATIAL_CHAIN = (
    "conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1",
    "mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5", "mixed_6.conv",
)  # fmt: skip
"""Submodules of the archive's `layers` that lead to the spatial features of sFID."""


def load_inception(path: str | Path, preprocessing: str) -> nn.Module:
    """The network in eval mode: uint8 (B, 3, H, W) → `Features`.

    Raises:
        DataError: no such file, another form, or names or shapes that do not fit (all are listed).
        ConfigError: a preprocessing that the archive does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--weights {path}", found="no such file", expected=FORMS)
    if is_torchscript(path):
        if preprocessing != "tensorflow":
            raise ConfigError(
                "--preprocessing", found=preprocessing, expected="tensorflow: a TorchScript archive resizes by itself",
                fix="--preprocessing tensorflow, or a state dict",
            )  # fmt: skip
        return ScriptedInception(path).eval()
    network = FIDInception(preprocessing)
    fill(network, read_state_dict(path, FORMS), path, FORMS, _ZOO)
    return network.eval()


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive with code, as torch.jit.save writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return False


def read_state_dict(path: Path, forms: str) -> dict[str, Tensor]:
    """Names → tensors; no code in the file is run.

    Args:
        path: of the file.
        forms: what it may be, in words.

    Raises:
        DataError: unreadable, refused, or no state dict.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # its own error class, OSError
            raise DataError(f"--weights {path}", found=f"unreadable ({error})", expected=forms) from None
    content = load_checkpoint(path, older_form=True)
    plain = isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not plain:
        raise DataError(f"--weights {path}", found=f"a {type(content).__name__}, no state dict", expected=forms)
    return dict(content)


def fill(network: nn.Module, state: Mapping[str, Tensor], path: Path, forms: str, fix: str) -> None:
    """Load strictly: every name and shape must fit, batch norm's counters aside.

    Args:
        network: takes the weights.
        state: names → weights.
        path: where they are from, for the message.
        forms: what that may be, in words.
        fix: what helps.

    Raises:
        DataError: missing, unexpected or misshaped weights, listed; NaN or infinite ones.
    """
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith(_COUNTER)}
    given = {name: value for name, value in state.items() if not name.endswith(_COUNTER)}
    misshaped = [
        f"{name} {tuple(given[name].shape)} (expected {tuple(value.shape)})"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    wrong = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [printable(name) for name in given if name not in wanted],
        "misshaped": misshaped,
        "not finite": [name for name, value in given.items() if name in wanted and not bool(value.isfinite().all())],
    }
    if any(wrong.values()):
        raise DataError(
            f"--weights {path}",
            found="; ".join(f"{len(names)} {kind}: {_listed(names, kind)}" for kind, names in wrong.items() if names),
            expected=forms,
            fix=fix,
        )
    network.load_state_dict(given, strict=False)


def load_script(path: Path, forms: str) -> torch.jit.ScriptModule:
    """A TorchScript archive. Its code is not Python: it runs in torch's own interpreter, which imports nothing.

    Raises:
        DataError: none, or a damaged one.
    """
    try:
        script: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # RuntimeError and others, of a damaged archive
        found = f"no readable TorchScript ({first_line(error)})"
        raise DataError(f"--weights {path}", found=found, expected=forms) from None
    return script


def flat_answer(output: Any, count: int, path: Path) -> Tensor:
    """What a script answered for `count` inputs, as features (B, F) fp32.

    Raises:
        DataError: anything else than (B, F), or (B, F, 1, …).
    """
    given = isinstance(output, Tensor) and output.ndim >= 2 and output.shape[0] == count
    if not given or output[0].numel() != output.shape[1]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"--weights {path}", found=f"an answer {shape}", expected="features (B, F)")
    return output.flatten(1).float()


def accepted_arguments(script: torch.jit.ScriptModule) -> set[str]:
    """Names of the arguments of a script's forward."""
    forward: Any = script.forward
    return {argument.name for argument in forward.schema.arguments}


def _listed(names: list[str], kind: str) -> str:
    shown = [name[:120] for name in names[:_LISTED]] if kind == "unexpected" else names
    return ", ".join(shown) + " …" * (len(names) > len(shown))


class ScriptedInception(nn.Module):
    """A TorchScript archive: it takes pixel values 0 … 255 of any size and resizes by itself.

    Args:
        path: called as f(x, return_features=True) → (B, F) where it knows that argument (with no_output_bias=True →
            probabilities), as f(x) otherwise. Spatial features are read where its `layers` have the usual names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.script = load_script(path, FORMS)
        self.path = path
        self._accepts = accepted_arguments(self.script)
        self._spatial = self._spatial_chain()

    def forward(self, pixels: Tensor) -> Features:
        """uint8 (B, 3, H, W) → features, with what else the archive can tell."""
        values = pixels.float()
        options = {"return_features": True} if "return_features" in self._accepts else {}
        pooled = flat_answer(self.script(values, **options), len(pixels), self.path)
        spatial = probabilities = None
        if self._spatial is not None:
            cells = preprocess(pixels, "tensorflow")
            for step in self._spatial:
                cells = step(cells)
            spatial = flat_spatial(cells).float()
        if options and "no_output_bias" in self._accepts:
            probabilities = self.script(values, no_output_bias=True).float()
        return Features(pooled, spatial, probabilities)

    def _spatial_chain(self) -> list[Callable[[Tensor], Tensor]] | None:
        modules = dict(self.script.named_modules())
        names = [f"layers.{name}" for name in _SPATIAL_CHAIN]
        return [modules[name] for name in names] if all(name in modules for name in names) else None
