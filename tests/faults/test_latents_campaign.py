"""Rows 15 and 24 of the reliability bar at length: one bad number in cached latents, another autoencoder than theirs.

Every campaign has a short form of a few cases, which each run of the tests makes.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acdit import storage
from acdit.data import LatentsDataset
from acdit.data.latents import read_manifest
from acdit.errors import ConfigError, DataError, NonFiniteError, StorageError
from acdit.training.build import build
from tests import autoencoders
from tests.faults.campaigns import short_and_long
from tests.faults.conftest import Tally
from tests.training.runs import run, tiny_recipe

MODEL = {
    "grid": [8, 8], "block": [4, 4], "in_channels": 3, "num_layers": 1, "num_attention_heads": 1,
    "attention_head_dim": 8,
}  # fmt: skip


# --- row 15: one bad number in cached latents ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoders.two_encodings(tmp_path_factory.mktemp("latents"))


def latents_recipe(base: Path, root: Path, **overrides: Any) -> Any:
    data = {"kind": "latents", "root": str(root), "flip": True}
    model = {**MODEL, "in_channels": 4, "num_classes": 2}
    return tiny_recipe(
        **{"data": data, "model": model, "codec__kind": "vae", "codec__vae": str(base / "vae"), **overrides}
    )


@short_and_long(12, 1500)
@pytest.mark.parametrize("cached", ["mode", "moments"])
def test_one_bad_number_anywhere_in_latents_is_named(
    cached: str, cases: int, base: Path, tmp_path: Path, tally: Tally
) -> None:
    root = Path(shutil.copytree(base / cached, tmp_path / "latents"))
    posterior = "sample" if cached == "moments" else "mode"
    rng = random.Random(cached)
    for case in range(cases):
        number = rng.randrange(3)
        file = root / f"shard-{number:05d}.safetensors"
        sound, tensors = file.read_bytes(), load_file(file)
        name = rng.choice(sorted(set(tensors) - {"labels"}))
        place = tuple(rng.randrange(extent) for extent in tensors[name].shape)
        tensors[name][place] = rng.choice((float("nan"), float("inf"), float("-inf")))
        save_file(tensors, file)
        row, view = place[:2]
        bad, views = 4 * number + row, rng.choice((1, 2))
        dataset = LatentsDataset(root, flip=views == 2, posterior=posterior)
        wanted = view < views  # a view that is not asked for hurts nobody
        for index in range(len(dataset)):
            if index == bad and wanted:
                with pytest.raises(NonFiniteError, match=rf"{file.name}.*index {row} \(sample {bad}\b") as caught:
                    dataset[index]
                assert caught.value.exit_code == 4
            else:
                assert torch.isfinite(dataset[index][0]).all()
        if wanted and case % 100 == 0:
            recipe = latents_recipe(base, root, codec__posterior=posterior, train__steps=20, data__flip=views == 2)
            with pytest.raises(NonFiniteError, match=file.name):
                run(recipe, tmp_path / f"run-{case}")
            assert not (tmp_path / f"run-{case}" / "checkpoint-20").exists()
        tally["named" if wanted else "in a view that is not read"] += 1
        file.write_bytes(sound)


# --- row 24: another autoencoder than the latents were made with ---------------------------------------------------


def _rewritten(root: Path, **changes: Any) -> None:
    """A manifest with other content and a digest that fits: as another encoding would have left it."""
    old = read_manifest(root)
    vae = {name: value for name, value in changes.items() if hasattr(old.vae, name)}
    own = {name: value for name, value in changes.items() if name not in vae}
    manifest = dataclasses.replace(old, vae=dataclasses.replace(old.vae, **vae), **own)
    storage.write_text_atomic(root / storage.MANIFEST, manifest.text())


IDENTITY = {
    "class_name": "AutoencoderTiny", "sha256": "0" * 64, "scaling_factor": 0.13025, "shift_factor": 0.2,
    "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


@short_and_long(10, 10**6)
def test_any_other_autoencoder_than_the_latents_is_refused(
    cases: int, base: Path, tmp_path: Path, tally: Tally
) -> None:
    """Every field of the identity, and every weight of the autoencoder by its last bit."""
    root = Path(shutil.copytree(base / "mode", tmp_path / "latents"))
    build(latents_recipe(base, root))
    for field, value in IDENTITY.items():
        _rewritten(root, **{field: value})
        with pytest.raises(ConfigError, match=field) as caught:
            build(latents_recipe(base, root))
        assert caught.value.exit_code == 2
        tally["field of the identity"] += 1
        shutil.copy(base / "mode" / storage.MANIFEST, root)
    _rewritten(root, dtype="fp16")
    with pytest.raises(DataError, match=r"BF16.*says F16"):
        build(latents_recipe(base, root))
    shutil.copy(base / "mode" / storage.MANIFEST, root)
    tally["dtype of the latents"] += 1
    names = sorted(autoencoders.kl().state_dict())
    for name in names if cases > len(names) else random.Random(24).sample(names, cases - 7):
        vae = autoencoders.kl()
        with torch.no_grad():
            value = vae.state_dict()[name].view(-1)[-1:]
            value.copy_(torch.nextafter(value, torch.full_like(value, torch.inf)))
        vae.save_pretrained(tmp_path / "other")
        with pytest.raises(ConfigError, match=r"another autoencoder.*sha256"):
            build(latents_recipe(base, root, codec__vae=str(tmp_path / "other")))
        tally["last bit of a weight"] += 1


@short_and_long(20, 10**6)
def test_no_entry_of_the_manifest_of_latents_can_be_changed_unseen(
    cases: int, base: Path, tmp_path: Path, tally: Tally
) -> None:
    root = Path(shutil.copytree(base / "moments", tmp_path / "latents"))
    file = root / storage.MANIFEST
    good = json.loads(file.read_text())
    places = list(_leaves(good))
    for place in places if cases > len(places) else random.Random(6).sample(places, cases):
        changed = json.loads(json.dumps(good))
        here = changed
        for key in place[:-1]:
            here = here[key]
        old = here[place[-1]]
        here[place[-1]] = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}x"
        file.write_text(json.dumps(changed, indent=2) + "\n")
        with pytest.raises((StorageError, DataError), match=r"manifest\.json"):
            LatentsDataset(root)
        tally["noticed"] += 1


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Any:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inside is None:
        yield place
        return
    for key, item in inside:
        yield from _leaves(item, (*place, key))


def test_a_shard_of_another_encoding_is_refused(base: Path, tmp_path: Path) -> None:
    """Of the same size to the byte, and with other numbers: fp16 for bf16, or without a label."""
    root = Path(shutil.copytree(base / "mode", tmp_path / "latents"))
    file = root / "shard-00001.safetensors"
    sound, tensors = file.read_bytes(), load_file(file)
    shape = tuple(tensors["latents"].shape)
    for wrong in (
        {**tensors, "latents": tensors["latents"].half()},
        {**tensors, "latents": tensors["latents"].reshape(shape[0], shape[2], shape[1], *shape[3:])},
        {"latents": tensors["latents"], "labelz": tensors["labels"]},
        {"latentz": tensors["latents"], "labels": tensors["labels"]},
    ):
        save_file(wrong, file)
        padding = len(sound) - file.stat().st_size
        assert padding == 0, padding
        with pytest.raises(DataError, match=r"shard-00001\.safetensors") as caught:
            LatentsDataset(root, flip=True)
        assert caught.value.exit_code == 3
    file.write_bytes(sound)
    LatentsDataset(root, flip=True)
