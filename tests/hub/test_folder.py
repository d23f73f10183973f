"""Exported folders: they load whichever way, draw the same to the bit, and are written wholly or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from acdit import ACDiTPipeline, ACDiTTextPipeline, storage
from acdit.classifiers import ACDiTClassifier
from acdit.errors import ConfigError, DataError, StorageError
from acdit.hub import share
from acdit.hub.samples import SampleOptions
from acdit.model_folder import beside_model, overrides_from, require_whole
from acdit.shims import with_shims, without_shims
from tests.hub.loading import drawn
from tests.hub.models import KINDS, pipeline_of, save

FEW = SampleOptions(count=2, num_inference_steps=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: save(kind, base / kind, head=kind == "image") for kind in KINDS}


@pytest.fixture(scope="module")
def exports(models: dict[str, Path]) -> dict[str, Path]:
    return {kind: exported(model, model.parent / "export") for kind, model in models.items()}


def exported(model: Path, output: Path, **options: Any) -> Path:
    pipeline = (ACDiTTextPipeline if model.parent.name in ("text", "ids") else ACDiTPipeline).from_pretrained(model)
    few = SampleOptions(count=2) if isinstance(pipeline, ACDiTTextPipeline) else FEW
    return share(pipeline, model, output, **{"options": few, **options}).folder


def loaded(way: str, folders: list[Path], modules: Path) -> list[str]:
    """What folders draw in a fresh process, without a network."""
    script = Path(__file__).with_name("loading.py")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    done = subprocess.run(
        [sys.executable, str(script), way, *map(str, folders)], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_all_ways_of_loading_draw_the_same_to_the_bit(
    models: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    theirs = loaded("theirs", [exports[kind] for kind in KINDS], tmp_path / "theirs")
    assert any((tmp_path / "theirs").rglob("pipeline_acdit.py"))
    both = loaded("own", [*(exports[kind] for kind in KINDS), *(models[kind] for kind in KINDS)], tmp_path / "own")
    assert not (tmp_path / "own").exists(), "code of the folder was taken without leave"
    own, before = both[: len(KINDS)], both[len(KINDS) :]
    assert theirs == own == before
    assert len(set(own)) == len(KINDS)
    assert json.loads(theirs[KINDS.index("text")])[1], "diffusers' loader has to bring the tokenizer"


def test_diffusers_own_loader_asks_for_leave(exports: dict[str, Path]) -> None:
    """Even where acdit is imported: the list in model_index.json is code to it."""
    for kind in ("image", "text"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(exports[kind])


def test_what_is_loaded_saves_as_any_other(exports: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("image", "text"):
        pipeline = DiffusionPipeline.from_pretrained(exports[kind], trust_remote_code=True)
        assert set(pipeline.components) >= {"transformer"}
        pipeline.save_pretrained(tmp_path / kind)
        again = type(pipeline).from_pretrained(tmp_path / kind)
        assert drawn(again) == drawn(pipeline)
        assert not list((tmp_path / kind).rglob("*.py"))


def test_code_of_others_is_not_run_without_leave(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports["image"], tmp_path / "foreign"))
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nfrom acdit import ACDiTPipeline, ACDiTTransformer\n"
    for file in (folder / "pipeline_acdit.py", folder / "transformer" / "modeling_acdit.py"):
        file.write_text(code)
    ACDiTPipeline.from_pretrained(folder)  # names of ours: the package's own classes, whatever the files hold
    index = json.loads((folder / "model_index.json").read_text())
    for change in ({"_class_name": ["evil", "ACDiTPipeline"]}, {"transformer": ["evil", "ACDiTTransformer"]}):
        for place in (folder, folder / "transformer"):
            (place / "evil.py").write_text(code)
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match="trust_remote_code"):
            ACDiTPipeline.from_pretrained(folder)
    assert not canary.exists()


def test_an_index_comes_back_as_it_was() -> None:
    plain = {"_class_name": "ACDiTPipeline", "transformer": ["acdit.model", "ACDiTTransformer"], "latents": False}
    travelled, files = with_shims(plain)
    assert without_shims(travelled) == without_shims(plain) == plain
    assert set(files) == {"pipeline_acdit.py", "transformer/modeling_acdit.py"}
    assert all(len(content.splitlines()) == 1 for content in files.values())
    text = {**plain, "_class_name": "ACDiTTextPipeline"}
    assert without_shims(with_shims(text, tokenizer=True)[0]) == text


def test_a_name_on_the_hub_loads_without_leave(exports: dict[str, Path], tmp_path: Path) -> None:
    """From the hub's cache, laid out as the library does; no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for kind in ("image", "text"):
        repository = tmp_path / f"models--owner--{kind}"
        shutil.copytree(exports[kind], repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        kept = ACDiTTextPipeline if kind == "text" else ACDiTPipeline
        again = kept.from_pretrained(f"owner/{kind}", cache_dir=tmp_path, local_files_only=True)
        assert drawn(again) == drawn(kept.from_pretrained(exports[kind]))


def test_the_head_travels(models: dict[str, Path], exports: dict[str, Path]) -> None:
    pixels = torch.rand(2, 1, 8, 8)
    before, after = (ACDiTClassifier.from_pretrained(one["image"])(pixels) for one in (models, exports))
    assert torch.equal(before, after)
    assert not (exports["video"] / "classifier").exists()


def test_no_place_of_this_machine_is_told(exports: dict[str, Path]) -> None:
    for folder in exports.values():
        for file in folder.rglob("*.json"):
            assert "_name_or_path" not in file.read_text(), file
        require_whole(folder)


def test_pictures_and_a_film_are_drawn(exports: dict[str, Path]) -> None:
    for kind in ("image", "unconditional", "latent", "video"):
        assert Image.open(exports[kind] / "samples.png").width > 64
    film = Image.open(exports["video"] / "samples.gif")
    assert film.n_frames == 4
    assert not list(exports["text"].glob("samples.*"))


def test_an_export_is_a_model_to_start_from_and_keeps_its_run(exports: dict[str, Path], tmp_path: Path) -> None:
    assert f'train.init_from="{exports["image"]}"' in overrides_from(exports["image"])
    with pytest.raises(ConfigError, match="ACDiTTextPipeline"):
        overrides_from(exports["text"])
    assert beside_model(exports["image"], "metrics.json") == exports["image"] / "metrics.json"
    once_more = exported(exports["image"], tmp_path / "again")
    assert (once_more / "metrics.json").read_bytes() == (exports["image"] / "metrics.json").read_bytes()
    assert (once_more / "classifier" / "config.json").is_file()


def test_only_an_unchanged_export_is_replaced(models: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(models["unconditional"], tmp_path / "export")
    exported(models["unconditional"], folder, license_id="mit")
    assert "license: mit" in (folder / "README.md").read_text()
    changes = {
        "README.md": ("edited", "edited"), "notes.txt": ("", "notes.txt"), "model_index.json": ("{}", "model_index"),
    }  # fmt: skip
    for name, (content, told) in changes.items():
        copy = Path(shutil.copytree(folder, tmp_path / f"with {name}"))
        (copy / name).write_text(content)
        with pytest.raises(StorageError, match=told):
            exported(models["unconditional"], copy)
        assert (copy / name).read_text() == content
    for occupied in (models["image"], tmp_path):  # a model (committed or not), a folder of other things
        with pytest.raises(StorageError, match="no export"):
            exported(models["unconditional"], occupied)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StorageError, match="a file"):
        exported(models["unconditional"], file)


def test_a_run_s_model_is_not_taken_for_an_export(models: dict[str, Path], tmp_path: Path) -> None:
    with storage.atomic_directory(tmp_path / "model") as place:
        pipeline_of("image").save_pretrained(place)
    with pytest.raises(StorageError, match="no export"):
        exported(models["image"], tmp_path / "model")


def test_an_edited_card_does_no_harm(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports["image"], tmp_path / "export"))
    (folder / "README.md").write_text("of my own")
    require_whole(folder)
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(StorageError, match=r"model_index\.json"):
        require_whole(folder)


def test_nothing_is_left_of_an_export_that_fails(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("acdit.hub.folder.model_card", full)
    with pytest.raises(StorageError, match="no room"):
        exported(models["image"], tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["[1]", "{", "\xff"])
def test_figures_that_cannot_be_read_are_named(content: str, tmp_path: Path) -> None:
    model = save("image", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"metrics\.json"):
        exported(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_line_of_the_card_draws_the_pictures_of_the_card(exports: dict[str, Path], tmp_path: Path) -> None:
    from acdit.pictures import image_grid

    card = (exports["image"] / "README.md").read_text()
    (line,) = {line.removeprefix("result = ") for line in card.splitlines() if line.startswith("result = ")}
    images = eval(line, {"pipe": ACDiTPipeline.from_pretrained(exports["image"])})
    import numpy as np

    pixels = torch.stack([torch.from_numpy(np.array(image))[None] for image in images])
    image_grid(pixels, columns=1, row_labels=["class 0", "class 2"]).save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (exports["image"] / "samples.png").read_bytes()
