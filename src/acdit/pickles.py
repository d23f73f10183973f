"""The one place of this project that reads pickle, for files from strangers:

- the archive is checked before anything is read from it: stored entries only, no more bytes than the file has;
- the pickle's instructions are listed without running them and must name tensors, dicts and `argparse.Namespace` only;
- `torch.load(weights_only=True)` then reads it, with `argparse.Namespace` the only class added to torch's own;
- weights must be ordinary dense tensors that lie in the file, finite and of one floating dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acdit.errors import DataError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_PICKLE_BYTES = 64 * 2**20
_ALLOWED_GLOBALS = frozenset(
    [
        "argparse Namespace",
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Bool")),
    ]
)
_IMPORTING_OPCODES = ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")


def load_checkpoint(path: Path, *, older_form: bool = False) -> Any:
    """The unpickled content, or DataError; executes nothing the file says, whatever the environment says.

    Args:
        path: of the file.
        older_form: also read what torch < 1.6 wrote (no zip; a list of its instructions cannot be taken beforehand).
    """
    zipped = not older_form or zipfile.is_zipfile(path)
    if zipped:
        _require_plain_archive(path)
    try:
        with _namespace_only():
            # Written out: an explicit weights_only cannot be overridden by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler raises whatever a broken stream makes it raise
        raise DataError(
            f"{path}: refused by torch.load(weights_only=True)", found=_shortened(error), expected="tensors and dicts"
        ) from None


@contextlib.contextmanager
def _namespace_only() -> Iterator[None]:
    """`argparse.Namespace` as the only addition to torch's own list; what others added is put back afterwards."""
    held = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([argparse.Namespace])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(held)


def _require_plain_archive(path: Path) -> None:
    """Check the zip and list the pickle's instructions, before anything is unpacked or run."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _require_stored(path, entries, path.stat().st_size)
            damaged = archive.testzip()
            if damaged is not None:
                raise DataError(f"{path}: entry {damaged!r} is damaged", found="a wrong checksum", fix="get it again")
            pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
            if len(pickles) != 1 or archive.comment or pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise DataError(f"{path}: not what torch.save writes", expected=f"one data.pkl ≤ {_MAX_PICKLE_BYTES} B")
            _require_known_globals(path, archive.read(pickles[0]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read", found=_shortened(error), fix="give the path of a .pt file") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, UnicodeError) as error:
        raise DataError(
            f"{path}: not a checkpoint of torch ≥ 1.6",
            found=_shortened(error),
            expected="the zip archive that torch.save writes",
        ) from None


def _require_stored(path: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise DataError(
            f"{path}: compressed entries", found=str(packed[:3]), expected="stored entries, as torch.save writes them"
        )
    if sum(entry.file_size for entry in entries) > size:
        raise DataError(f"{path}: entries claim more bytes than the file has", expected=f"at most {size}")
    names = [entry.filename for entry in entries]
    roots = {name.split("/")[0] for name in names}
    if len(set(names)) != len(names) or len(roots) != 1:
        raise DataError(f"{path}: doubled entries or several roots", expected="one of each, under one root")


def _require_known_globals(path: Path, pickled: bytes) -> None:
    unknown: set[str] = set()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _IMPORTING_OPCODES:
                unknown.add(f"{opcode.name} instruction")
            elif opcode.name == "GLOBAL" and argument not in _ALLOWED_GLOBALS:
                unknown.add(str(argument))
    except Exception as error:  # a broken stream makes it raise anything
        raise DataError(f"{path}: data.pkl is broken", found=_shortened(error)) from None
    if unknown:
        raise DataError(
            f"{path}: refused, its pickle names what weights have no use for",
            found=printable(", ".join(sorted(unknown)[:8])),
            expected="tensors, dicts and argparse.Namespace only",
            fix="do not load this file with anything else either, unless you made it yourself",
        )


def plain_tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict, once every value is an ordinary dense tensor that lies in the file, of one floating dtype."""
    wrong = [describe(name) for name, value in state.items() if type(name) is not str or not _is_plain(value)]
    if wrong or not state:
        raise DataError(f"{path}: weights", found=", ".join(wrong[:8]) or "none", expected="dense tensors under names")
    tensors = {name: value.detach() for name, value in state.items()}
    dtypes = {value.dtype for value in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise DataError(f"{path}: weights", found=str(dtypes), expected=f"one dtype for all, of {FLOATS}")
    if sum(value.nbytes for value in tensors.values()) > path.stat().st_size:
        raise DataError(f"{path}: weights share memory: they are larger than the file")
    infinite = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if infinite:
        raise DataError(f"{path}: NaN or infinite weights", found=", ".join(infinite)[:300], expected="finite numbers")
    return tensors


def _is_plain(value: Any) -> bool:
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and value.is_contiguous()


def describe(value: Any) -> str:
    """In few words: a file from a stranger must not choose how long a message gets."""
    if value is None or type(value) is bool or (type(value) is int and abs(value) < 10**12):
        return repr(value)
    if type(value) is str:
        return repr(value[:80])
    if type(value) is dict:
        return f"a dict with {[key[:40] for key in list(value)[:8] if isinstance(key, str)]}"
    return f"a {type(value).__name__}"


def require_shapes(
    path: Path, expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], model: str, fix: str
) -> None:
    """Refuse weights that have not exactly the names and shapes of a model.

    Args:
        path: of the file, for the message.
        expected: names and shapes.
        weights: what the file has.
        model: whose names and shapes these are, for the message.
        fix: what helps.

    Raises:
        DataError: what is missing, extra or misshaped, all of it.
    """
    found = {name: tuple(value.shape) for name, value in weights.items()}
    misfits = [f"missing {name}" for name in expected if name not in found]
    misfits += [f"extra {name[:120]!r}" for name in found if name not in expected]
    common = [name for name in expected if name in found]
    misfits += [f"{name} is {found[name]}, not {expected[name]}" for name in common if found[name] != expected[name]]
    if misfits:
        raise DataError(
            f"{path}: {len(misfits)} weights do not fit",
            found="; ".join(misfits), expected=f"those of {model}", fix=f"nothing was written; {fix}",
        )  # fmt: skip


def _shortened(error: BaseException) -> str:
    # torch's own message recommends to load the file without protection: only what it found is repeated.
    found = str(error).split("WeightsUnpickler error:")[-1].split(" Please use ")[0]
    return f"{type(error).__name__}: {printable(found)}"


def printable(text: str) -> str:
    """Without the control characters that could repaint a terminal."""
    return "".join(character if character.isprintable() else " " for character in text[:300]).strip()
