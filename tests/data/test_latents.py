"""Cached latents: what is read, without reading all, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acdit.data.build import build_dataset
from acdit.data.latents import LatentsDataset
from acdit.encoding import encode_dataset
from acdit.encoding_plan import EncodeSettings
from acdit.errors import ConfigError, DataError, NonFiniteError
from acdit.recipe import DataRecipe
from tests import autoencoders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pictures, both views, shards of four."""
    return make(tmp_path)


def make(base: Path, **options: Any) -> Path:
    if not (base / "vae").exists():
        autoencoders.kl().save_pretrained(base / "vae")
        autoencoders.picture_folder(base / "pictures")
    settings: dict[str, Any] = {"size": 16, "flips": True, "shard_size": 4, **options}
    output = base / f"latents-{len(list(base.iterdir()))}"
    encode_dataset(EncodeSettings(str(base / "pictures"), str(base / "vae"), **settings), output, progress=False)
    return output


def test_items_are_the_stored_ones_also_after_pickling(root: Path) -> None:
    dataset = LatentsDataset(root, flip=True)
    shards = [load_file(file) for file in sorted(root.glob("*.safetensors"))]
    latents = torch.cat([shard["latents"] for shard in shards])
    assert (len(dataset), dataset.shape, dataset.num_classes) == (10, (4, 8, 8), 2)
    for reader in (dataset, pickle.loads(pickle.dumps(dataset))):
        for index in (0, 3, 4, 9, -1):
            item, label = reader[index]
            assert torch.equal(item[:, 0], latents[index])
            assert label == torch.cat([shard["labels"] for shard in shards])[index] == dataset.labels[index]
    with pytest.raises(IndexError):
        dataset[10]
    assert dataset[2][0].shape == (2, 1, 4, 8, 8)
    assert LatentsDataset(root)[2][0].shape == (1, 1, 4, 8, 8)


def test_a_large_shard_is_mapped_and_not_read(root: Path) -> None:
    """A shard of 200 MB: reading ten samples makes the process larger by a fraction of it."""
    import psutil

    from acdit import storage
    from acdit.data.latents import LatentsManifest, Shard, read_manifest

    file = root / "shard-00000.safetensors"
    count = 100_000
    latents = torch.zeros(count, 2, 4, 8, 8, dtype=torch.float16)
    save_file({"latents": latents, "labels": torch.zeros(count, dtype=torch.int64)}, file)
    del latents
    old = read_manifest(root)
    shard = Shard(file.name, count, file.stat().st_size, "unread")
    manifest = LatentsManifest(**{**old.__dict__, "shards": [shard], "samples": count})
    storage.write_text_atomic(root / storage.MANIFEST, manifest.text())
    before = psutil.Process().memory_info().rss
    dataset = LatentsDataset(root)
    for index in range(0, count, count // 10):
        assert dataset[index][0].shape == (1, 1, 4, 8, 8)
    assert psutil.Process().memory_info().rss - before < file.stat().st_size / 5


def test_poisoned_values_are_named_by_shard_and_index(root: Path) -> None:
    file = root / "shard-00001.safetensors"
    for poison in (float("nan"), float("inf")):
        tensors = load_file(file)
        tensors["latents"][2, 0, 1, 3, 3] = poison
        save_file(tensors, file)
        dataset = LatentsDataset(root)
        assert torch.isfinite(dataset[5][0]).all()
        with pytest.raises(NonFiniteError, match=r"shard-00001\.safetensors.*index 2 \(sample 6"):
            dataset[6]
        with pytest.raises(DataError, match=r"shard-00001\.safetensors.*damaged"):
            dataset.verify()
        tensors["latents"][2, 0, 1, 3, 3] = 0
        save_file(tensors, file)


def test_missing_and_truncated_shards_are_named(root: Path) -> None:
    LatentsDataset(root).verify()
    file = root / "shard-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"shard-00002\.safetensors.*expected 1,\d+ bytes|shard-00002"):
        LatentsDataset(root)
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(DataError, match=r"shard-00002\.safetensors.*damaged"):
        LatentsDataset(root)
    file.unlink()
    with pytest.raises(DataError, match=r"shard-00002\.safetensors.*no such file"):
        LatentsDataset(root)


def test_what_was_not_cached_is_refused(tmp_path: Path) -> None:
    one_view = make(tmp_path, flips=False)
    with pytest.raises(ConfigError, match=r"data\.flip.*--flips"):
        LatentsDataset(one_view, flip=True)
    with pytest.raises(ConfigError, match=r"codec\.posterior.*--posterior moments"):
        LatentsDataset(one_view, posterior="sample")
    moments = make(tmp_path, posterior="moments")
    item, _ = LatentsDataset(moments, flip=True, posterior="sample")[7]
    assert item.shape == (2, 2, 4, 8, 8)
    assert (item[:, 1] > 0).all()
    assert LatentsDataset(moments)[7][0].shape == (1, 1, 4, 8, 8)
    with pytest.raises(ConfigError, match=r"codec\.posterior"):
        LatentsDataset(make(tmp_path, posterior="sample"), posterior="mode")


def test_the_recipe_must_say_what_was_encoded(root: Path) -> None:
    recipe = {"kind": "latents", "root": str(root)}
    assert len(build_dataset(DataRecipe(**recipe, size=16, flip=True))) == 10
    for name, value in (("size", 32), ("channels", 1), ("split", "test"), ("max_bad_files", 1)):
        with pytest.raises(ConfigError, match=rf"data\.{name}"):
            build_dataset(DataRecipe(**recipe, **{name: value}))
    with pytest.raises(ConfigError, match=r"data\.root=/path"):
        build_dataset(DataRecipe(kind="latents"))
