"""acdit encode: what is stored, kill −9, several processes, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acdit import storage
from acdit.cli import main
from acdit.codecs import VAECodec, load_vae
from acdit.data.images import ImagesDataset
from acdit.data.latents import LatentsManifest, read_manifest
from acdit.encoding import encode_dataset
from acdit.encoding_plan import EncodeSettings
from acdit.errors import ConfigError, DataError, NonFiniteError, StorageError
from tests import autoencoders


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of 10 pictures and an autoencoder."""
    base = tmp_path_factory.mktemp("inputs")
    autoencoders.kl().save_pretrained(base / "vae")
    return {"data": str(autoencoders.picture_folder(base / "data")), "vae": str(base / "vae")}


def encode(inputs: dict[str, str], output: Path, workers: int = 1, **options: Any) -> LatentsManifest:
    settings = EncodeSettings(**{**inputs, "size": 16, "flips": True, "batch_size": 2, "shard_size": 3, **options})
    return encode_dataset(settings, output, workers=workers, device="cpu", progress=False)


def content(output: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {file.name: file.read_bytes() for file in sorted(output.iterdir()) if file.name != ".lock"}


def stored(output: Path, name: str) -> torch.Tensor:
    return torch.cat([load_file(file)[name] for file in sorted(output.glob("*.safetensors"))])


def test_latents_of_both_views_in_shards_with_a_manifest(inputs: dict[str, str], tmp_path: Path) -> None:
    manifest = encode(inputs, tmp_path, dtype="fp32")
    assert manifest == read_manifest(tmp_path)
    assert "clips" not in json.loads((tmp_path / storage.MANIFEST).read_text())  # as before there were any
    assert [shard.count for shard in manifest.shards] == [3, 3, 3, 1]
    assert (manifest.samples, manifest.class_names) == (10, ["class-0", "class-1"])
    assert (manifest.vae.scaling_factor, manifest.vae.shift_factor, manifest.resolution) == (5.0, 0.1, 16)
    for shard in manifest.shards:
        assert storage.file_sha256(tmp_path / shard.file) == shard.sha256
    latents = stored(tmp_path, "latents")
    pictures = ImagesDataset(inputs["data"], size=16)
    codec = VAECodec(load_vae(inputs["vae"]))
    seen = torch.stack([pictures[index][0] for index in range(10)])
    torch.testing.assert_close(latents[:, 0], codec.encode(seen), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[:, 1], codec.encode(seen.flip(-1)), rtol=1e-4, atol=1e-4)
    assert stored(tmp_path, "labels").tolist() == [0] * 5 + [1] * 5
    values = latents.double().transpose(0, 2).flatten(1)
    np.testing.assert_allclose(manifest.channel_mean, values.mean(1), rtol=1e-9)
    np.testing.assert_allclose(manifest.channel_std, values.std(1, correction=0), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 8e-3)])
def test_half_precision_shards(inputs: dict[str, str], tmp_path: Path, dtype: str, tolerance: float) -> None:
    encode(inputs, tmp_path / "half", dtype=dtype)
    encode(inputs, tmp_path / "full", dtype="fp32")
    half, full = stored(tmp_path / "half", "latents"), stored(tmp_path / "full", "latents")
    assert half.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    torch.testing.assert_close(half.float(), full, rtol=tolerance, atol=tolerance)


def test_posteriors(inputs: dict[str, str], tmp_path: Path) -> None:
    for name in ("mode", "sample", "moments"):
        encode(inputs, tmp_path / name, posterior=name, dtype="fp32")
    encode(inputs, tmp_path / "again", posterior="sample", dtype="fp32")
    encode(inputs, tmp_path / "other", posterior="sample", dtype="fp32", seed=1)
    mode, sample = stored(tmp_path / "mode", "latents"), stored(tmp_path / "sample", "latents")
    mean, std = stored(tmp_path / "moments", "mean"), stored(tmp_path / "moments", "std")
    assert torch.equal(mode, mean)
    assert content(tmp_path / "again") == content(tmp_path / "sample")
    assert not torch.equal(stored(tmp_path / "other", "latents"), sample)
    drawn = (sample - mean) / std
    assert abs(float(drawn.mean())) < 0.05
    assert abs(float(drawn.std()) - 1) < 0.05
    assert len(drawn.flatten(2).flatten(0, 1).round(decimals=3).unique(dim=0)) == 20  # every sample and view its own
    moments, sampled = read_manifest(tmp_path / "moments"), read_manifest(tmp_path / "sample")
    assert moments.std == pytest.approx(sampled.std, rel=0.1)


def test_a_kill_at_every_step_of_the_commit_then_a_rerun_ends_the_same(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at each point that changes the disk (nothing is cleaned up after a BaseException that is caught here)."""
    encode(inputs, tmp_path / "whole", shard_size=5)
    expected, steps = content(tmp_path / "whole"), 0

    class Killed(BaseException):
        pass

    @contextlib.contextmanager
    def uncleaned() -> Iterator[None]:
        with monkeypatch.context() as patch:  # a killed process removes nothing
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            yield

    for point in range(100):
        passed = 0

        def step(name: str, point: int = point) -> None:
            nonlocal passed
            passed += 1
            if passed > point:
                raise Killed(name)

        output = tmp_path / f"killed-{point}"
        with monkeypatch.context() as patch, uncleaned():
            patch.setattr(storage, "_step", step)
            try:
                encode(inputs, output, shard_size=5)
                break
            except Killed:
                steps += 1
        encode(inputs, output, shard_size=5)
        assert content(output) == expected, f"after a kill at step {point}"
    assert steps == 2 * (1 + 2 * 2 + 1)  # plan, two shards and their records, manifest: write and replace


def test_sigkill_of_two_workers_parent_then_one_process_ends_the_same(inputs: dict[str, str], tmp_path: Path) -> None:
    """The workers end with their parent, and their shards are those of one process."""
    encode(inputs, tmp_path / "whole", shard_size=1, batch_size=1)
    output = tmp_path / "killed"
    command = [
        sys.executable, "-m", "acdit.cli", "encode", inputs["data"], "--vae", inputs["vae"], "--size", "16", "--flips",
        "--batch-size", "1", "--shard-size", "1", "--workers", "2", "--device", "cpu", "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list(output.glob("shard-*.json")):
        time.sleep(0.01)
    workers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    committed = len(list(output.glob("shard-*.json")))
    assert not (output / storage.MANIFEST).exists()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert committed >= 1
    encode(inputs, output, shard_size=1, batch_size=1)
    assert content(output) == content(tmp_path / "whole")


def test_two_workers_equal_one(inputs: dict[str, str], tmp_path: Path) -> None:
    encode(inputs, tmp_path / "one")
    encode(inputs, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_damaged_shard_is_made_anew(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(inputs, tmp_path)
    expected = content(tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    (tmp_path / "shard-00003.json").unlink()
    capsys.readouterr()
    encode(inputs, tmp_path)
    assert content(tmp_path) == expected
    assert "encoded 4 pictures" in capsys.readouterr().out  # three and one, no more


def test_a_full_disk_ends_with_exit_5_and_keeps_what_is_encoded(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "encode", inputs["data"], "--vae", inputs["vae"], "--size", "16", "--flips", "--batch-size", "2",
        "--shard-size", "3", "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    encode(inputs, tmp_path / "whole")
    from acdit import encoding

    real, made = encoding.save_file, 0

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal made
        made += 1
        if made > 2:  # the kernel's answer, through safetensors' own writer
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            try:
                real(tensors, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "save_file", save)
        assert main(arguments) == 5
    message = capsys.readouterr().err
    assert "shard-00002.safetensors" in message
    assert "bytes" in message
    assert "Traceback" not in message
    assert sorted(content(tmp_path / "out")) == sorted(
        ["encode.json", *(f"shard-0000{number}.{end}" for number in (0, 1) for end in ("json", "safetensors"))]
    )
    assert main(arguments) == 0
    assert "encoded 4 pictures" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    monkeypatch.setattr(storage, "free_bytes", lambda _: 10)
    assert main([*arguments[:-1], str(tmp_path / "no-room")]) == 5
    assert "10,240 bytes" in capsys.readouterr().err  # 10 pictures × 2 views × 4 × 8 × 8 × 2 bytes, known beforehand


def test_other_settings_and_other_things_are_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    encode(inputs, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"dtype was fp16, is bf16.*resolution was 16, is 32"):
        encode(inputs, tmp_path / "out", dtype="bf16", size=32)
    autoencoders.kl(scaling_factor=0.18215).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"vae\.scaling_factor was 5\.0, is 0\.18215"):
        encode({**inputs, "vae": str(tmp_path / "other")}, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="other things"):
        encode(inputs, tmp_path / "mine")
    with pytest.raises(ConfigError, match="multiples of 2"):
        encode(inputs, tmp_path / "odd", size=15)
    for name, value in (("dtype", "fp8"), ("posterior", "median"), ("batch_size", 0), ("max_bad_files", -1)):
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            encode(inputs, tmp_path / "never", **{name: value})
    assert not (tmp_path / "never").exists()


def test_bad_pictures_are_counted_over_all_shards(inputs: dict[str, str], tmp_path: Path) -> None:
    data = autoencoders.picture_folder(tmp_path / "data")
    for name in ("class-0/1.png", "class-1/2.png"):
        (data / name).write_bytes(b"not a picture")
    changed = {**inputs, "data": str(data)}
    with pytest.raises(DataError, match=r"one of 2.*at most 1"):
        encode(changed, tmp_path / "out", max_bad_files=1)
    manifest = encode(changed, tmp_path / "out", max_bad_files=2)
    assert sorted(Path(file).name for file in manifest.bad_files) == ["1.png", "2.png"]
    latents = stored(tmp_path / "out", "latents")
    torch.testing.assert_close(latents[1], latents[2], rtol=1e-2, atol=1e-2)  # the next good one of its class stands in


def test_infinite_latents_are_named_by_picture_and_index(inputs: dict[str, str], tmp_path: Path) -> None:
    vae = autoencoders.kl(scaling_factor=1e5)  # beyond what fp16 can hold
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(NonFiniteError, match=r"class-0/0\.png.*at index 0.*--dtype fp32"):
        encode({**inputs, "vae": str(tmp_path / "vae")}, tmp_path / "out", dtype="fp16")
    black = autoencoders.picture_folder(tmp_path / "data")
    Image.new("RGB", (16, 16)).save(black / "class-1" / "3.png")
    settings = {"data": str(black), "vae": inputs["vae"]}
    from acdit import encoding

    moments = encoding.VAECodec.moments

    def poisoned(self: VAECodec, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = moments(self, pixels)
        mean[pixels.flatten(1).max(1).values == 0] = float("nan")
        return mean, std

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAECodec, "moments", poisoned)
        with pytest.raises(NonFiniteError, match=r"class-1/3\.png.*at index 8"):
            encode(settings, tmp_path / "nan")
    assert len(list((tmp_path / "nan").glob("shard-*.json"))) == 2  # those before it are kept


def test_a_wrong_scale_is_warned_of(inputs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encode(inputs, tmp_path / "good")
    assert "standard deviation" not in caplog.text
    autoencoders.kl(scaling_factor=0.05).save_pretrained(tmp_path / "vae")
    encode({**inputs, "vae": str(tmp_path / "vae")}, tmp_path / "out")
    assert "scaling_factor 0.05" in caplog.text


def test_the_manifest_notices_its_own_damage(inputs: dict[str, str], tmp_path: Path) -> None:
    encode(inputs, tmp_path)
    file = tmp_path / storage.MANIFEST
    good = file.read_text()
    file.write_text(good.replace('"scaling_factor": 5.0', '"scaling_factor": 0.18215'))
    with pytest.raises(StorageError, match="another content"):
        read_manifest(tmp_path)
    for text in ("", "[]", "{}", json.dumps({**json.loads(good), "kind": "something else"})):
        file.write_text(text)
        with pytest.raises(DataError, match="no manifest of latents"):
            read_manifest(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="has not ended"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_manifest(tmp_path / "nowhere")
