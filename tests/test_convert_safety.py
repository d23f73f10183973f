"""Files from strangers: nothing they say is executed, unpacked or believed (rows 27 and 28 of the reliability bar)."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import cProfile
import ctypes
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import tarfile
import tempfile
import time
import timeit
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from acdit import convert, pickles
from acdit.convert import convert_reference, to_reference_state_dict
from acdit.errors import DataError
from tests.test_convert import IMAGE, random_model, save

CANARY = "CANARY"
"""What every gadget tries to make in the working directory."""
STATEMENT = f"open({CANARY!r}, 'w').close()"


class Call:
    """Pickles as the call of a function: what it does happens when it is read."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced

    def __call__(self) -> None:
        """pickle insists that what it will call looks callable already."""


def imported(name: str) -> Call:
    """os.<name>, without naming os as a global."""
    return Call(getattr, Call(importlib.import_module, "os"), name)


CALLS: dict[str, Any] = {
    "os.system": Call(os.system, f"touch {CANARY}"),
    "os.popen": Call(os.popen, f"touch {CANARY}"),
    "os.mkdir": Call(os.mkdir, CANARY),
    "os.open": Call(os.open, CANARY, os.O_CREAT | os.O_WRONLY),
    "os.spawnlp": Call(os.spawnlp, os.P_WAIT, "touch", "touch", CANARY),
    "subprocess.Popen": Call(subprocess.Popen, ["touch", CANARY]),
    "subprocess.run": Call(subprocess.run, ["touch", CANARY]),
    "subprocess.getoutput": Call(subprocess.getoutput, f"touch {CANARY}"),
    "builtins.exec": Call(builtins.exec, STATEMENT),
    "builtins.eval": Call(builtins.eval, STATEMENT),
    "builtins.open": Call(builtins.open, CANARY, "w"),
    "io.FileIO": Call(io.FileIO, CANARY, "w"),
    "import_module": Call(imported("mkdir"), CANARY),
    "__import__": Call(Call(getattr, Call(builtins.__import__, "os"), "mkdir"), CANARY),
    "functools.partial": Call(functools.partial(os.mkdir, CANARY)),
    "functools.reduce": Call(functools.reduce, os.mkdir, [CANARY, 0o700]),
    "operator.methodcaller": Call(operator.methodcaller("touch"), pathlib.Path(CANARY)),
    "pathlib.touch": Call(pathlib.Path.touch, pathlib.Path(CANARY)),
    "list of a map": Call(list, Call(map, os.mkdir, [CANARY])),
    "cProfile.run": Call(cProfile.run, STATEMENT, os.devnull),
    "timeit": Call(timeit.timeit, STATEMENT, "pass", time.perf_counter, 1),
    "shutil.copy": Call(shutil.copy, os.devnull, CANARY),
    "tempfile.mkdtemp": Call(tempfile.mkdtemp, "", CANARY, "."),
    "ctypes": Call(Call(getattr, Call(ctypes.CDLL, None), "mkdir"), CANARY.encode(), 0o700),
    "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, CANARY))),
    "tarfile": Call(tarfile.open, CANARY, "w"),
    "zipfile": Call(zipfile.ZipFile, CANARY, "w"),
    "torch.load": Call(functools.partial(torch.load, weights_only=False), "evil.pt"),
    "torch.save": Call(torch.save, 0, CANARY),
    "torch tensor to a file": Call(torch.UntypedStorage.from_file, CANARY, True, 8),
    "torch._utils": Call(torch._utils._rebuild_device_tensor_from_numpy, Call(os.mkdir, CANARY), None, "cpu", False),
    "torch subclass": Call(torch._tensor._rebuild_from_type_v2, os.mkdir, dict, (CANARY,), {}),
}
INSTRUCTIONS: dict[str, bytes] = {
    "GLOBAL posix": b"cposix\nmkdir\nX\x06\x00\x00\x00CANARY\x85R.",
    "INST": b"(X\x06\x00\x00\x00CANARYios\nmkdir\n.",
    "OBJ": b"(cos\nmkdir\nX\x06\x00\x00\x00CANARYo.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x06CANARY\x85R.",
    "STACK_GLOBAL dotted": b"\x80\x04\x8c\x07pathlib\x8c\x0aPath.touch\x93\x8c\x07pathlib\x8c\x04Path\x93"
    b"\x8c\x06CANARY\x85R\x85R.",
    "NEWOBJ": b"\x80\x02cio\nFileIO\nX\x06\x00\x00\x00CANARYX\x01\x00\x00\x00w\x86R.",
    "NEWOBJ_EX": b"\x80\x04czipfile\nZipFile\nX\x06\x00\x00\x00CANARYX\x01\x00\x00\x00w\x86R.",
    "BUILD of a class": b"\x80\x02cargparse\nNamespace\n)\x81cos\nmkdir\nX\x06\x00\x00\x00CANARY\x85Rb.",
    "python 2 name": b"\x80\x02c__builtin__\neval\nX\x1b\x00\x00\x00" + STATEMENT.encode() + b"\x85R.",
}
PICKLES = {name: pickle.dumps(call, protocol=2) for name, call in CALLS.items()} | INSTRUCTIONS


def archive(path: Path, pickled: bytes, method: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A torch checkpoint around a pickle of our choice."""
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("x/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            made.writestr(f"x/{name}", content)
    return path


@pytest.fixture
def cage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with an evil file for the gadget that has torch.load read one."""
    place = tmp_path / "cage"
    place.mkdir()
    monkeypatch.chdir(place)
    archive(place / "evil.pt", PICKLES["os.mkdir"])
    return place


def canaries(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name != "evil.pt"]


def is_refused(checkpoint: Path, output: Path, match: str | None = None) -> str:
    with pytest.raises(DataError, match=match) as caught:
        convert_reference(checkpoint, output)
    assert not output.exists()
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("name", PICKLES)
def test_gadgets_are_alive(cage: Path, name: str) -> None:
    """Read by pickle itself each makes its canary: the tests below would notice an execution."""
    with contextlib.suppress(Exception):  # what happens after the deed does not matter
        pickle.loads(PICKLES[name])
    for _ in range(100):
        if canaries(cage):
            return
        time.sleep(0.05)
    pytest.fail(f"{name} does nothing")


ENVIRONMENTS = {"plain": {}, "weights_only forced off": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", PICKLES)
def test_malicious_pickles_are_refused(
    tmp_path: Path, cage: Path, monkeypatch: pytest.MonkeyPatch, name: str, environment: str
) -> None:
    for key, value in ENVIRONMENTS[environment].items():
        monkeypatch.setenv(key, value)
    is_refused(archive(tmp_path / "in.pt", PICKLES[name]), tmp_path / "out")
    if name in CALLS:
        args = argparse.Namespace(**{**IMAGE, "lr": CALLS[name]})
        hidden = pickle.dumps({"args": args, "model": {}}, protocol=2)
        message = is_refused(archive(tmp_path / "hidden.pt", hidden), tmp_path / "out", "its pickle names")
        assert "weights have no use for" in message
    assert canaries(cage) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", PICKLES)
def test_the_second_wall_stands_alone(
    tmp_path: Path, cage: Path, monkeypatch: pytest.MonkeyPatch, name: str, environment: str
) -> None:
    """Were the list of instructions wrong, torch's restricted unpickler would still refuse."""
    for key, value in ENVIRONMENTS[environment].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(pickles, "_require_known_globals", lambda path, pickled: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        is_refused(archive(tmp_path / "in.pt", PICKLES[name]), tmp_path / "out")
    assert canaries(cage) == []


def test_what_others_allowed_does_not_count(tmp_path: Path, cage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_require_known_globals", lambda path, pickled: None)
    with torch.serialization.safe_globals([timeit.timeit, time.perf_counter, (io.FileIO, "_io.FileIO")]):
        path = archive(tmp_path / "in.pt", PICKLES["timeit"])
        torch.load(path, weights_only=True)
        assert canaries(cage) == [CANARY]  # whoever allowed it would run it
        os.remove(CANARY)
        is_refused(path, tmp_path / "out", "Unsupported global")
        assert canaries(cage) == []
        assert timeit.timeit in torch.serialization.get_safe_globals()
        assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_both_environment_switches_at_once(tmp_path: Path, cage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    path = save(tmp_path / "in.pt", to_reference_state_dict(random_model()))
    is_refused(path, tmp_path / "out", "should be set, but both were")


@pytest.mark.parametrize("form", ["bare pickle", "torch legacy", "tar", "torchscript", "text", "empty", "directory"])
def test_other_formats_are_refused(tmp_path: Path, cage: Path, form: str) -> None:
    path = tmp_path / "in.pt"
    if form == "bare pickle":
        path.write_bytes(PICKLES["os.mkdir"])
    elif form == "torch legacy":
        torch.save({"args": argparse.Namespace(**IMAGE)}, path, _use_new_zipfile_serialization=False)
    elif form == "tar":
        with tarfile.open(path, "w") as made:
            made.addfile(tarfile.TarInfo("storages"))
    elif form == "torchscript":
        archive(path, PICKLES["os.mkdir"], **{"constants.pkl": PICKLES["os.mkdir"], "code/a.py": b"x"})
    elif form == "text":
        path.write_text("hello")
    elif form == "directory":
        path.mkdir()
    else:
        path.touch()
    is_refused(path, tmp_path / "out")
    assert canaries(cage) == []


def test_names_cannot_repaint_a_terminal(tmp_path: Path) -> None:
    evil = b"\x80\x02cevil\x1b[2J\x07\nname\x1b]0;x\n."
    assert "\x1b" not in is_refused(archive(tmp_path / "in.pt", evil), tmp_path / "out", "evil")
    args = {**IMAGE, "\x1b[2Jfield": 1}
    read = convert.read_reference(save(tmp_path / "field.pt", to_reference_state_dict(random_model()), args))
    assert any("field" in name for name in read.ignored_fields)
    assert not any("\x1b" in name for name in read.ignored_fields)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.pt" in is_refused(tmp_path / "nowhere.pt", tmp_path / "out", "cannot be read")


# --- archives (row 28) ----------------------------------------------------------------------------------------------

GOOD = pickle.dumps({"args": argparse.Namespace(**IMAGE), "model": {}}, protocol=2)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    bomb = archive(tmp_path / "in.pt", GOOD, method, **{"data/0": bytes(2**24)})
    assert bomb.stat().st_size < 2**20
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("an entry was read"))
    is_refused(bomb, tmp_path / "out", "compressed entries")


def test_one_compressed_entry_is_enough(tmp_path: Path) -> None:
    path = archive(tmp_path / "in.pt", GOOD)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data/0", bytes(1000))
    is_refused(path, tmp_path / "out", "compressed entries")


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    """Many directory entries for the same bytes (Fifield 2019): all stored, together larger than the file."""
    path = archive(tmp_path / "in.pt", GOOD, **{"data/0": bytes(2**16)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as made:
        big = made.getinfo("x/data/0")
        start = made.start_dir
        count = len(made.infolist())
    directory = content[start : content.rindex(b"PK\x05\x06")]
    entry = directory[directory.index(b"PK\x01\x02", directory.index(b"x/byteorder")) :]
    assert big.filename.encode() in entry
    copies = b"".join(entry.replace(b"x/data/0", b"x/data/%x" % index) for index in range(1, 9))
    end = bytearray(content[content.rindex(b"PK\x05\x06") :])
    end[8:12] = (count + 8).to_bytes(2, "little") * 2
    end[12:16] = (len(directory) + len(copies)).to_bytes(4, "little")
    path.write_bytes(content[:start] + directory + copies + bytes(end))
    assert sum(info.file_size for info in zipfile.ZipFile(path).infolist()) > path.stat().st_size
    is_refused(path, tmp_path / "out", "more bytes than the file has")


def test_a_size_that_lies_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "in.pt", GOOD)
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + 20 : start + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(bytes(content))
    is_refused(path, tmp_path / "out", "more bytes than the file has")


def test_doubled_entries_and_roots_are_refused(tmp_path: Path) -> None:
    for name in ("x/data.pkl", "y/data.pkl", "data.pkl"):
        path = archive(tmp_path / "in.pt", GOOD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(path, "a") as made:
                made.writestr(name, PICKLES["os.mkdir"])
        is_refused(path, tmp_path / "out", "doubled entries or several roots")


def test_a_comment_is_refused(tmp_path: Path) -> None:
    """Two readers may disagree where an archive with a comment ends."""
    path = archive(tmp_path / "in.pt", GOOD)
    with zipfile.ZipFile(path, "a") as made:
        made.comment = b"a comment"
    is_refused(path, tmp_path / "out", "not what torch.save writes")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "in.pt", to_reference_state_dict(random_model()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    is_refused(path, tmp_path / "out", "is damaged")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    path = save(tmp_path / "in.pt", to_reference_state_dict(random_model()))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    is_refused(path, tmp_path / "out")


def test_a_huge_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_PICKLE_BYTES", 1000)
    path = archive(tmp_path / "in.pt", GOOD + bytes(1000))
    is_refused(path, tmp_path / "out", "not what torch.save writes")


def test_a_storage_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    """A tensor that claims more elements than the file has bytes must not read, or make, memory beyond it."""
    source = save(tmp_path / "in.pt", {"x": torch.zeros(77)})
    with zipfile.ZipFile(source) as made:
        records = {info.filename.split("/", 1)[1]: made.read(info) for info in made.infolist()}
    small, large = b"K\x4d", b"J" + (2**28).to_bytes(4, "little")  # BININT1 77, BININT 2²⁸
    pickled = records.pop("data.pkl")
    assert pickled.count(small) == 2  # of the storage, and of the tensor
    is_refused(archive(tmp_path / "grown.pt", pickled.replace(small, large), **records), tmp_path / "out", "torch.load")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_pickles_are_refused_or_read(tmp_path: Path, cage: Path, seed: int) -> None:
    """Random damage to the pickle ends in a checkpoint or in DataError: nothing else is raised, nothing is made."""
    source = save(tmp_path / "in.pt", to_reference_state_dict(random_model(num_layers=1)))
    with zipfile.ZipFile(source) as made:
        records = {info.filename.split("/", 1)[1]: made.read(info) for info in made.infolist()}
    pickled = records.pop("data.pkl")
    draw = random.Random(seed)
    refusals = 0
    for _ in range(60):
        mutated = bytearray(pickled)
        for _ in range(draw.choice([1, 1, 2, 8])):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        path = archive(tmp_path / "mutated.pt", bytes(mutated), **records)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                convert.read_reference(path)
            except DataError:
                refusals += 1
    assert refusals > 30
    assert canaries(cage) == []
