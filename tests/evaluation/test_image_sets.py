"""Pictures and references to measure, good and bad."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acdit.errors import ConfigError, DataError
from acdit.evaluation.image_sets import open_images
from acdit.evaluation.reference import open_reference

RNG = np.random.default_rng(0)
BATCH = RNG.integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def pngs(folder: Path, batch: np.ndarray = BATCH) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(batch):
        Image.fromarray(picture).save(folder / f"{index:02d}.png")
    return folder


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_folder_zip_and_npz_give_the_same_pictures(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "pictures" / "some class")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"x/{file.name}")
    np.savez_compressed(tmp_path / "packed.npz", arr_0=BATCH)
    places = [str(folder.parent), str(tmp_path / "pictures.zip"), npz(tmp_path / "plain.npz", arr_0=BATCH)]
    for where in [*places, str(tmp_path / "packed.npz")]:
        images = open_images(where, 3)
        assert len(images) == 5
        assert np.array_equal(images.read(1, 4).permute(0, 2, 3, 1).numpy(), BATCH[1:4]), where
        assert images.description["count"] == 5


def test_an_uncompressed_npz_is_not_read_into_memory(tmp_path: Path) -> None:
    images = open_images(npz(tmp_path / "a.npz", first=np.arange(3), arr_0=BATCH))
    assert isinstance(images._images._array, np.memmap)  # type: ignore[attr-defined]
    assert np.array_equal(images.read(0, 5).permute(0, 2, 3, 1).numpy(), BATCH)


def test_gray_pictures_are_one_channel_or_three_equal_ones_as_wanted(tmp_path: Path) -> None:
    gray = BATCH[..., :1]
    one, three = npz(tmp_path / "one.npz", arr_0=gray), npz(tmp_path / "three.npz", arr_0=gray.repeat(3, axis=3))
    for where in (one, three):
        assert torch.equal(open_images(where, 1).read(0, 5), torch.from_numpy(gray).permute(0, 3, 1, 2))
        assert open_images(where, 3).read(0, 5).shape == (5, 3, 6, 4)
    with pytest.raises(DataError, match=r"arr_0\[0\].*colour"):
        open_images(npz(tmp_path / "colour.npz", arr_0=BATCH), 1).read(0, 5)


def test_what_sampling_left_beside_its_pictures_is_known(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "out")
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(folder / "grid.png")
    with pytest.raises(DataError, match=r"grid\.png.*found 60×50"):
        open_images(str(folder)).read(0, 6)
    (folder / "settings.json").write_text(json.dumps({"seed": 3}))
    images = open_images(str(folder))
    assert len(images) == 5
    assert images.settings == {"seed": 3}


def test_the_description_changes_with_the_files(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "out")
    before = open_images(str(folder)).description
    assert open_images(str(folder)).description == before
    Image.fromarray(BATCH[0][:, ::-1].copy()).save(folder / "03.png")
    assert open_images(str(folder)).description != before


def test_built_in_digits_and_resized_files() -> None:
    assert open_images("digits:held_out", 3).read(0, 2).shape == (2, 3, 8, 8)
    with pytest.raises(ConfigError, match="held_out"):
        open_images("digits:test")
    with pytest.raises(ConfigError, match="only they are resized"):
        open_images("digits:train", 3, size=16)


def test_reference_pictures_are_resized_and_cropped(tmp_path: Path) -> None:
    assert open_images(str(pngs(tmp_path / "a")), 3, size=4).read(0, 5).shape == (5, 3, 4, 4)


BAD_NPZ = {
    "no arr_0": ({"images": BATCH}, "the arrays images; expected arr_0"),
    "floats": ({"arr_0": BATCH / 255.0}, "float64 (5, 6, 4, 3); expected uint8"),
    "channels first": ({"arr_0": BATCH.transpose(0, 3, 1, 2)}, "uint8 (5, 3, 6, 4); expected uint8 (M, H, W, C)"),
    "one picture": ({"arr_0": BATCH[0]}, "uint8 (6, 4, 3)"),
    "none": ({"arr_0": BATCH[:0]}, "no pictures"),
    "objects": ({"arr_0": np.array([{}], dtype=object)}, "objects"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_wrong_npz_files(name: str, tmp_path: Path) -> None:
    arrays, message = BAD_NPZ[name]
    with pytest.raises(DataError) as refused:
        open_images(npz(tmp_path / "bad.npz", **arrays))
    assert "bad.npz" in str(refused.value)
    assert message in str(refused.value)


def test_a_torn_npz_is_named(tmp_path: Path) -> None:
    path = Path(npz(tmp_path / "torn.npz", arr_0=BATCH))
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(DataError, match=r"torn\.npz"):
        open_images(str(path))


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    folder = pngs(tmp_path / "a")
    data = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(data[:40])
    with pytest.raises(DataError, match=r"03\.png.*bad picture"):
        open_images(str(folder)).read(0, 5)
    (folder / "03.png").unlink()
    Image.fromarray(BATCH[0, :3, :3]).save(folder / "04.png")
    with pytest.raises(DataError, match=r"04\.png; found 3×3 pixels; expected 4×6"):
        open_images(str(folder)).read(0, 4)


@pytest.mark.parametrize(("name", "message"), [("empty", "no pictures"), ("nothing", "no such"), ("a.txt", "another")])
def test_places_without_pictures(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        open_images(str(tmp_path / name))


# --- references ---------------------------------------------------------------------------------------------------


def statistics(size: int = 4) -> dict[str, np.ndarray]:
    return {"mu": np.zeros(size), "sigma": np.eye(size)}


def test_adms_reference_in_both_forms(tmp_path: Path) -> None:
    spatial = {"mu_s": np.ones(3, np.float32), "sigma_s": 2 * np.eye(3, dtype=np.float32)}
    both = open_reference(npz(tmp_path / "both.npz", arr_0=BATCH, **statistics(), **spatial), 3)
    assert both.images is not None
    assert len(both.images) == 5
    assert set(both.statistics) == {"pooled", "spatial"}
    assert torch.equal(both.statistics["spatial"][1], 2 * torch.eye(3, dtype=torch.float64))
    alone = open_reference(npz(tmp_path / "statistics.npz", **statistics()), 3)
    assert alone.images is None
    assert set(alone.statistics) == {"pooled"}
    batch = open_reference(npz(tmp_path / "batch.npz", arr_0=BATCH), 3)
    assert batch.images is not None
    assert not batch.statistics


BAD_REFERENCES = {
    "mu alone": ({"mu": np.zeros(4)}, "mu alone; expected mu and sigma"),
    "nothing": ({"features": np.zeros((4, 4))}, "the arrays features; expected arr_0"),
    "shapes": ({"mu": np.zeros(4), "sigma": np.eye(5)}, "shape (5, 5); expected (4, 4)"),
    "integers": ({"mu": np.zeros(4, int), "sigma": np.eye(4)}, "int64 (4,); expected floats (F,)"),
    "flat": ({"mu": np.zeros(4), "sigma": np.ones(4)}, "float64 (4,); expected floats (F, F)"),
    "nan": ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "NaN"),
    "not symmetric": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "not symmetric"),
}


@pytest.mark.parametrize("name", BAD_REFERENCES)
def test_wrong_references(name: str, tmp_path: Path) -> None:
    arrays, message = BAD_REFERENCES[name]
    with pytest.raises(DataError) as refused:
        open_reference(npz(tmp_path / "bad.npz", **arrays), 3)
    assert message in str(refused.value)
