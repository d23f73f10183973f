"""Where a figure comes from: command, commit, versions, machine, and hashes of weights."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn


def facts() -> dict[str, Any]:
    """What a result file says of its origin: command, commit, versions, machine."""
    return {"command": command_line(), "commit": commit(), "versions": versions(), "machine": machine()}


def command_line() -> str:
    """The command this process was started with."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = [] if spec is None else ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*(module or [Path(sys.argv[0]).name]), *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the checkout this file is in; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie inside somebody else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Of this package and of what its figures depend on."""
    return {
        "acdit": sys.modules["acdit"].__version__,  # this package, not an import of everything above this file
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": np.__version__,
    }


def machine() -> dict[str, Any]:
    """What the command ran on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def weights_sha256(*modules: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bits of all parameters and buffers; files' formats play no part."""
    digest = hashlib.sha256()
    for module in modules:
        update_with_weights(digest, module)
    return digest.hexdigest()


def update_with_weights(digest: Any, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Feed names, dtypes, shapes and bits of a module's parameters and buffers to a hash.

    Args:
        digest: of hashlib.
        module: whose weights.
        dtype: take the weights in it, so that the precision they are held in plays no part; None: as they are.
    """
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
